"""The one exception that is the user's to mend: shown as a message, without a traceback."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Says which YAML path is wrong, what was given, what is allowed and what to do."""
