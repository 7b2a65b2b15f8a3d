"""Errors that a user can put right, and the interruption of a run."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the user's input. The message names what is wrong, where, and the remedy.

    The command line prints the message as one line and exits with code 2. Any other exception is a bug in this
    package and keeps its traceback.
    """


class StorageError(UserError):
    """A file that cannot be written: a full disk, or an object store that did not answer. A retry may succeed."""


class ClusterLost(UserError):
    """A Ray cluster that has died or does not answer any more."""


class FolderLost(UserError):
    """The folder of a search or run that another driver has taken over."""


class FolderGone(FolderLost):
    """The folder of a search or run without the record of its driver: removed, unmounted, or taken over and left."""


class Interrupted(Exception):
    """A run that was stopped before its last iteration, after its checkpoint was written."""


def user_error_in(error: BaseException | None) -> UserError | None:
    """Return the `UserError` that caused an exception, also where Ray wrapped it; None where there is none."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return (StorageError if isinstance(error, StorageError) else UserError)(str(error))
        error = cause
    return None
