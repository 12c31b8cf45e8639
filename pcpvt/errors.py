"""The one exception that the program shows to its user, as a single line and a non-zero exit."""


class UserError(Exception):
    """Something the user can put right; the message names the field or file, the value, and the remedy."""
