"""When a run is asked to end before its last step: by Ctrl-C, by SIGTERM, or by its own time limit.

Comes in: signals and a number of seconds. Goes out: a reason, which the trainer looks for after each step. A second
signal ends the run at once.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from .. import platform
from ..errors import ConfigError, PeerLost

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Stop:
    """Whether a run is asked to end.

    Attributes:
        signal: the number of the signal that asked for it; None: none did.
        deadline: on `platform.seconds_by_the_clock`; None: no limit.
        is_over: whether a machine's time was over when they last agreed.
    """

    def __init__(self, max_time_s: float | None = None):
        self.signal: int | None = None
        self.is_over = False
        self.deadline = None if max_time_s is None else platform.seconds_by_the_clock() + max_time_s

    @property
    def asks(self) -> tuple[int | None, bool]:
        """(the signal, whether the time is over) as this machine knows; `take` has what all of them know."""
        is_over = self.deadline is not None and platform.seconds_by_the_clock() > self.deadline
        return self.signal, self.is_over or is_over

    def take(self, asks: Iterable[tuple[int | None, bool]]) -> bool:
        """One that is asked to end asks all: returns whether to end now. `asks` are the machines', by rank."""
        for number, is_over in asks:
            self.signal = self.signal or number
            self.is_over = self.is_over or is_over
        return self.signal is not None or self.is_over


class StopAsked(Exception):  # noqa: N818  (no error)
    """Raised out of an evaluation, when a stop is asked for."""


@contextmanager
def listening(stop: Stop, note: Callable[[str], None], is_launched: bool = False) -> Iterator[None]:
    """While this is entered, the first Ctrl-C or SIGTERM asks to stop, and the second is what it always was.

    A hangup asks too, of a process that `mlx.launch` started: so it ends those elsewhere, and sends SIGTERM then.
    After a machine was lost SIGTERM has nothing to say: those that are left end anyway, and write a checkpoint first.

    In a thread other than the main one, which gets no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if is_launched else []))
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number, frame):
        stop.signal = number
        if number != signal.SIGHUP:
            for other, handler in before.items():
                signal.signal(other, handler)
        with suppress(OSError):  # after a hangup nobody may be there to read it
            note("Stopping after this step, batch or journalled block; once more stops now")

    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):  # a job that was started in the background stays deaf
                signal.signal(number, ask)
        yield
    except PeerLost:
        before |= {number: signal.SIG_IGN for number in numbers if number != signal.SIGINT}
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def parse_seconds(duration: str | float, what: str = "--max-time") -> float:
    """Seconds of a duration such as "8h", "90m" or "1h30m", or a number of seconds.

    Raises:
        ConfigError: it is none.
    """
    text = str(duration).strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if parts and "".join(f"{n}{unit}" for n, unit in parts) == text:
        seconds = sum(float(n) * UNITS[unit] for n, unit in parts)
    else:
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{what} must be a time such as 8h, 90m or 1h30m, got {duration!r}")
    return seconds
