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


def check_least(least: int, **options: int | None) -> None:
    """Raises ConfigError if one of these options is below `least`. An option that is None was not given."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")


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


class GpuError(SlowftError):
    """The GPU did not finish what it was given. The process lives on, and what it computed before is as it was.

    Attributes:
        what: happened. advice: what to do.
    """

    def __init__(self, what: str, advice: str):
        super().__init__(f"{what}. {advice}")
        self.what, self.advice = what, advice


# What MLX 0.32 raises on Metal (mlx/backend/metal/device.cpp, allocator.cpp), once for each failure.
_OF_METAL = ("[METAL] Command buffer execution failed: ", "[metal::malloc] ")
_OF_METAL_S_TIME = ("Impacting Interactivity", "Timeout", "Hang")
_OF_METAL_S_MEMORY = ("Insufficient Memory", "OutOfMemory", "[metal::malloc]")


def gpu_error(error: BaseException) -> GpuError | None:
    """What to say of an error of MLX's, if it is one of the GPU's; None: it is another."""
    said = str(error)
    if isinstance(error, GpuError):
        return error
    if not isinstance(error, RuntimeError) or not said.startswith(_OF_METAL):
        return None
    reason = printable(said.removeprefix(_OF_METAL[0]).rstrip("."))
    if any(word in said for word in _OF_METAL_S_MEMORY):
        return GpuError(f"the GPU ran out of memory ({reason})", "Give a lower --memory, or close other programs")
    if any(word in said for word in _OF_METAL_S_TIME):  # https://github.com/ml-explore/mlx/issues/3267
        return GpuError(
            f"macOS ended work on the GPU that kept the display waiting ({reason})",
            "Let the display sleep, or give the GPU less at a time: lower --batch-size, --max-seq-length or --wave. "
            "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment helps on some Macs",
        )
    return GpuError(f"the GPU failed ({reason})", "Start again; if it fails again, restart the Mac")


class SlowftWarning(UserWarning):
    """Something that will work, but not as well as it could."""
