"""The base of every error whose message is written for the user: it names what was given and the way out."""


class UserError(Exception):
    """Shown as one line by the command lines, without a trace."""


class LastingError(UserError):
    """What would come again: a run that starts anew from its last checkpoint comes to the same end."""
