"""The base of every error whose message is written for the user: it names what was given and the way out."""


class UserError(Exception):
    """Shown as one line by the command lines, without a trace."""
