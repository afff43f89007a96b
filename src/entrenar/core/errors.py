"""The errors a user can meet: each is one sentence of what is wrong, where, what is allowed and what to do."""


class EntrenarError(Exception):
    """Something failed that is not the user's input; the command ends with exit code 1."""

    exit_code = 1


class InputError(EntrenarError, ValueError):
    """Bad usage, config, data or model file; the command ends with exit code 2."""

    exit_code = 2


class StoppedError(EntrenarError):
    """A run was stopped by a signal after it wrote a checkpoint; the same command goes on from there."""


def listing(names: list[str], limit: int = 8) -> str:
    """Join names for an error sentence, cutting a long list and saying how many were left out."""
    head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"


def first_line(error: Exception) -> str:
    """The first line of its message, and the second where the first ends with a colon."""
    head, _, rest = str(error).strip().partition("\n")
    return f"{head} {rest.strip().partition(chr(10))[0]}" if head.endswith(":") else head
