"""The one error a user is meant to read."""


class UserError(ValueError):
    """Bad input: the message names the field, the value and what would be right. Commands print it, exit code 2."""
