"""Predicted reads and seconds of a step, against the block cache itself on a drive and a clock that are not real."""

import itertools
import os
import random

import pytest

from slowft.planning.timeline import Work, reads_of, step_seconds
from slowft.weights import cache
from slowft.weights.reader import ByteRange

RATE = 100.0  # bytes a second


class Drive:
    """Stands for a reader: reads take as long as their bytes do, on a clock that stands still unless it is moved."""

    def __init__(self):
        self.now = self.free_at = 0.0
        self.bytes_read = 0

    def submit(self, ranges, buffer):
        self.bytes_read += (nbytes := sum(r.nbytes for r in ranges))
        self.free_at = max(self.free_at, self.now) + nbytes / RATE
        return DriveRead(self, self.free_at)

    def wait(self, read):
        self.now = max(self.now, read.done_at)


class DriveRead:
    def __init__(self, drive: Drive, done_at: float):
        self.drive, self.done_at = drive, done_at

    def done(self):
        return self.drive.now >= self.done_at

    def cancel(self):
        return False

    def exception(self):
        assert self.done(), "a buffer is given away before it is filled"


def gone_through(
    order: list[int], sizes: list[int], capacity: int, slots: int, works: list[Work], temporary: list[int]
):
    """(bytes read, seconds) of the last of some rounds; never more is held than the capacity at each visit."""
    drive = Drive()
    blocks = cache.BlockCache(drive, [[ByteRange("", 0, n, 0)] for n in sizes], capacity, slots)
    visits, told = order * 6, []
    for at, item in enumerate(visits[: 5 * len(order)]):
        if at % len(order) == 0:
            told.append((drive.bytes_read, drive.now))
        work = works[at % len(order)]
        blocks.take(item, visits[at + 1 :], (temporary * 6)[at:])
        drive.now += work.freed_s
        if slots == 1:
            blocks.release(item)
        assert blocks.held_nbytes() <= capacity + temporary[at % len(order)]
        drive.now += work.seconds - work.freed_s
        blocks.release(item)
    return drive.bytes_read - told[-1][0], drive.now - told[-1][1]


@pytest.mark.parametrize("most_lent", [0, 1, 5])
@pytest.mark.parametrize("slots, with_head", [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("seed", range(int(os.environ.get("SLOWFT_FUZZ", 25))))
def test_a_step_is_predicted_as_the_cache_takes_it(seed, slots, with_head, most_lent, monkeypatch):
    """Also with a head that is larger than blocks, read ahead into a place of its size that blocks use too.

    And with more places (at most `most_lent`) the further the turn is away.
    """
    monkeypatch.setattr(cache, "READS_AHEAD", 99)  # it is asked only between visits
    draw = random.Random(seed)
    n, lowest = draw.randint(2, 9), draw.randint(0, 2)
    order = [*range(n), *([n] if with_head else []), *reversed(range(min(lowest, n - 1), n))]
    sizes = [50] * n + [80] * with_head
    works = []
    for _ in order:
        seconds = draw.uniform(0.1, 1.2)
        works.append(Work(0.05 if slots == 1 else seconds, seconds))
    temporary = sorted((draw.randint(0, most_lent) for _ in range(n)), reverse=True) + [0] * with_head
    temporary = [temporary[item] for item in order]
    for kept in range(n):
        places = [slots + kept + more for more in temporary]
        reads = reads_of(order, sizes, [1] * len(sizes), places, slots)
        capacity = slots * max(sizes) + 50 * kept
        nbytes, seconds = gone_through(order, sizes, capacity, slots, works, [50 * more for more in temporary])
        predicted = sum(r.nbytes for r in reads)
        assert predicted == pytest.approx(nbytes, abs=2 * max(sizes))  # rounds may take turns
        rel = 1e-6 if nbytes == predicted and not with_head else 0.05
        two_reads = 2 * max(sizes) / RATE if any(temporary) else 0
        predicted_s = step_seconds(reads, works, RATE, RATE)
        assert predicted_s == pytest.approx(seconds, rel=rel, abs=two_reads), (n, kept, predicted, nbytes)


def test_what_is_read_and_computed_alone_bounds_a_step_from_below():
    works = [Work(0.01, 0.3)] * 4 + [Work(0.0, 1.0, 50, inline_rate=1.0)] + [Work(0.01, 0.5, 20, 10)] * 4
    order = [0, 1, 2, 3, None, 3, 2, 1, 0]
    for size, kept in itertools.product((10, 40, 90), range(5)):
        reads = reads_of(order, [size] * 4, [1] * 4, [1 + kept] * 9, 1)
        computing = sum(work.seconds for work in works)
        reading = (sum(r.nbytes for r in reads) + sum(w.read_nbytes + w.written_nbytes for w in works)) / RATE
        seconds = step_seconds(reads, works, RATE, RATE)
        assert max(computing + 0.5, reading) <= seconds + 1e-9 <= computing + reading + 1e-9
        assert step_seconds(reads, works, float("inf"), float("inf")) == pytest.approx(computing)
