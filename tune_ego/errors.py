"""What a user can put right, or asked for."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: it says what is wrong, where, and what to do.

    The command line prints it as one line and exits with 2. Any other exception is a bug of ours
    and keeps its traceback.
    """


class StorageError(UserError):
    """A file that cannot be written: the disk is full, or an object store did not answer; the next try may work."""


class Interrupted(Exception):
    """A run was asked to stop before its end, and has written a checkpoint."""


def user_error_in(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an exception that Ray wrapped, if there is one."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return (StorageError if isinstance(error, StorageError) else UserError)(str(error))
        error = cause
    return None
