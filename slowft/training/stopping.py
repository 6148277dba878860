"""Asks a run to end before its last step: on Ctrl-C, on SIGTERM, or when its time limit is over.

Comes in: signals and a number of seconds. Goes out: a `Stop`, which the trainer looks at after each step. A second
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
        """Whether to end now, given the `asks` of all machines by rank. One machine that is asked to end is enough."""
        for number, is_over in asks:
            self.signal = self.signal or number
            self.is_over = self.is_over or is_over
        return self.signal is not None or self.is_over


class StopAsked(Exception):  # noqa: N818  (no error)
    """Raised from within an evaluation, or a journalled step, when a stop is asked for."""


@contextmanager
def listening(stop: Stop, note: Callable[[str], None], is_launched: bool = False) -> Iterator[None]:
    """Within this context, the first Ctrl-C or SIGTERM asks `stop` to end the run. The second one acts as usual.

    In a process that `mlx.launch` started, a hangup (SIGHUP) asks as well: it ends remote processes by a hangup, and
    then sends SIGTERM. After a machine was lost, SIGTERM is ignored: the remaining processes end anyway, and write a
    checkpoint first.

    In a thread other than the main one, which gets no signals, this does nothing.
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
        with suppress(OSError):  # after a hangup the terminal may be gone
            note("Stopping after this step, batch or journalled block; once more stops now")

    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):  # a job started in the background keeps ignoring it
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
    """The seconds of a duration such as "8h", "90m" or "1h30m", or of a number of seconds.

    Raises:
        ConfigError: it is no duration; names the option `what`.
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
