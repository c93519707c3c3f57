"""What ends a release. Each says what still answers the clients."""

from mqwen.errors import UserError


class ReleaseError(UserError):
    """A release that cannot be made, or must not be; the message says why and what to do."""
