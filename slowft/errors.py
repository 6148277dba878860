"""The errors a user can cause. Each message is one line: what is wrong, where, and what to do."""

import errno

QUOTED = 500  # characters, at most, of what others say or a file holds


class SlowftError(Exception):
    """Something a user can put right. The command line prints it as one line and exits with status 1."""


class ModelError(SlowftError):
    """The model directory is missing, incomplete, corrupt, or of a kind that cannot be streamed."""


class NeedsPreparing(ModelError):
    """The model has to be written anew before it can be streamed: `slowft prepare` does.

    Attributes:
        reason: what in its files is not as the model uses it.
        nbytes: of that.
    """

    def __init__(self, message: str, reason: str, nbytes: int):
        super().__init__(message)
        self.reason, self.nbytes = reason, nbytes


class DataError(SlowftError):
    """The training data is missing, malformed, or does not fit the model."""


class AdapterError(SlowftError):
    """An adapter cannot be attached, loaded or written."""


class ConfigError(SlowftError):
    """An option has an impossible value, is unknown, or would have no effect."""


class Interrupted(SlowftError):
    """A run was asked to stop, and did, with a checkpoint to go on from. `signal` is the number of what asked."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def reason_of(error: OSError) -> str:
    """The operating system's reason, and what to do where that is not plain."""
    reason = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{reason}. Raise the limit (ulimit -n 4096) and start again"
    return reason


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if there is none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def printable(quoted: str) -> str:
    """On one line of no great length, whatever it is of a file or from another program: it goes to a terminal."""
    shown = quoted if len(quoted) <= QUOTED else f"{quoted[: QUOTED - 4]} ..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


class PeerLost(SlowftError):  # noqa: N818  (what happened, not whose error it is)
    """A machine that trains with this one was lost, or never came. `loss` says which and why, where that is known."""

    def __init__(self, message: str, loss=None):
        super().__init__(message)
        self.loss = loss


class SlowftWarning(UserWarning):
    """Something that will work, but not as well as it could."""
