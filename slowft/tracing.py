"""Records when things happened in a step, as spans of time on a few lanes: a trace for Perfetto or chrome://tracing.

Comes in: spans, from any thread that reads, casts, computes, waits or spills. Goes out: one JSON file. While nothing is
recorded, a span costs one look-up of a global.
"""

import bisect
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import SlowftError

LANES = ("read", "cast", "compute", "wait", "spill")  # from top to bottom
MAX_SPANS = 500_000  # about 100 MB of JSON

_recorder: "Recorder | None" = None
_nothing = nullcontext()


@dataclass
class Span:
    """A stretch of time. `begin` and `end` are seconds of `time.perf_counter`."""

    lane: str
    name: str
    begin: float
    end: float
    args: dict[str, Any]


@dataclass
class Recorder:
    """The spans of a recording, in the order in which they ended."""

    spans: list[Span] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)
    n_dropped: int = 0

    def add(self, span: Span) -> None:
        if len(self.spans) < MAX_SPANS:
            self.spans.append(span)  # atomic: no lock
        else:
            self.n_dropped += 1

    def name_reads(self, places: Sequence[tuple[str, int, int, str]]) -> None:
        """Give reads, which know only file and offset, the name of what lies there.

        Args:
            places: (file, begin, end, name), in any order.
        """
        places = sorted(places)
        starts = [place[:2] for place in places]
        for span in self.spans:
            file, offset = span.args.get("file"), span.args.get("offset")
            if file is None:
                continue
            at = bisect.bisect_right(starts, (file, offset)) - 1
            if at >= 0 and places[at][0] == file and offset < places[at][2]:
                span.name = places[at][3]

    def write(self, file: str | Path) -> None:
        """Write the JSON of the Trace Event Format: complete events of one process, with a thread for each lane.

        Spans of one lane that overlap get further threads, whose names count up: "read 2".

        Raises:
            SlowftError: the file cannot be written.
        """
        rows: dict[str, list[float]] = {lane: [] for lane in LANES}  # lane -> when each of its rows is free
        events = []
        for span in sorted(self.spans, key=lambda span: (span.begin, -span.end)):
            free = rows[span.lane]
            row = next((i for i, end in enumerate(free) if end <= span.begin), len(free))
            free[row : row + 1] = [span.end]
            events.append(
                {
                    "name": span.name,
                    "cat": span.lane,
                    "ph": "X",
                    "ts": 1e6 * (span.begin - self.begin),
                    "dur": 1e6 * (span.end - span.begin),
                    "pid": 1,
                    "tid": _thread(span.lane, row),
                    "args": span.args,
                }
            )
        names = [
            {"name": kind, "ph": "M", "pid": 1, "tid": _thread(lane, row), "args": {key: value}}
            for lane, free in rows.items()
            for row in range(max(len(free), 1))
            for kind, key, value in (
                ("thread_name", "name", lane if row == 0 else f"{lane} {row + 1}"),
                ("thread_sort_index", "sort_index", _thread(lane, row)),
            )
        ]
        process = {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "slowft"}}
        trace = {
            "traceEvents": [process, *names, *events],
            "displayTimeUnit": "ms",
            "otherData": {"pid": os.getpid(), "spans_dropped": self.n_dropped},
        }
        try:
            Path(file).write_text(json.dumps(trace))
        except OSError as e:
            raise SlowftError(f"{file} cannot be written: {e.strerror}. Give the trace another name") from None


def _thread(lane: str, row: int) -> int:
    return 100 * LANES.index(lane) + row + 1


@contextmanager
def recording() -> Iterator[Recorder]:
    """While this is entered, spans are kept in the recorder that it gives. A process has one recorder at a time."""
    global _recorder
    previous, _recorder = _recorder, Recorder()
    try:
        yield _recorder
    finally:
        _recorder = previous


class _Timed:
    def __init__(self, recorder: Recorder, lane: str, name: str, args: dict[str, Any]):
        self._recorder, self._lane, self._name, self._args = recorder, lane, name, args

    def __enter__(self):
        self._begin = time.perf_counter()

    def __exit__(self, *_):
        self._recorder.add(Span(self._lane, self._name, self._begin, time.perf_counter(), self._args))


def span(lane: str, name: str, **args: Any) -> AbstractContextManager:
    """While this is entered, a span is recorded. `args` are shown with it, and have to be JSON values."""
    return _nothing if _recorder is None else _Timed(_recorder, lane, name, args)


def spanned(function: Callable, lane: str, name: str, **args: Any) -> Callable:
    """`function` with a span around each call."""
    if _recorder is None:
        return function

    def run(*arguments):
        with span(lane, name, **args):
            return function(*arguments)

    return run
