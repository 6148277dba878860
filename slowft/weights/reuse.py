"""Which freed buffers MLX keeps to hand out again, from one piece of work to the next.

Comes in: a `Schedule`, which knows what each piece takes. Goes out: MLX's cache limit, set anew around each.
"""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import platform
from ..memory import limits
from ..planning.schedule import Schedule

COLD_STEPS = 2  # that find fewer freed buffers than later ones
# what small buffers left free between them: takes 0.5 to 1.5 ms; in the head, large ones go there and leave their pages
RELEASE_EVERY_S, RELEASE_IN_HEAD_EVERY_S = 0.1, 0.02


class Reuse:
    """How much of freed buffers MLX keeps to hand out again, from one piece of work to the next.

    Fresh pages cost more than most of what is written to them. MLX gives back to the system what is freed while its
    cache is full, whatever it is full of; so what was freed longest ago has to go first.

    Args:
        schedule: `cache_nbytes` are kept at least (of the head `head_cache_nbytes`), and what arrays leave of
            `total_nbytes`. With `keep_buffers` all are kept, as long as steps have the same shape.
    """

    def __init__(self, schedule: Schedule):
        self._schedule = schedule
        self._total, self._least = schedule.total_nbytes, schedule.cache_nbytes
        self._least_of_head = self._least if schedule.head_cache_nbytes is None else schedule.head_cache_nbytes
        self._steps = 0
        self._released_at = 0.0
        self._was_head = False
        self._graph: Hashable = None
        self._of_graph: int | None = None

    def raise_by(self, nbytes: int) -> None:
        """Keep so many bytes more from the next step on, which takes at most so much more than the last one did.

        Of the first steps only what they took too much counts.
        """
        self._steps += 1
        if self._total and (nbytes < 0 or self._steps > COLD_STEPS):
            self._total = max(self._schedule.total_nbytes, self._total + nbytes)

    def begin_graph(self, kind: Hashable) -> None:
        """All blocks and the head are computed next, as one graph; those of one kind ask for the same buffers."""
        if not self._schedule.keep_buffers:
            return
        if kind != self._graph:
            limits().give_back()
            self._graph, self._of_graph = kind, None
        elif self._of_graph is None:
            self._of_graph = mx.get_cache_memory()
        limit = max(self._least, self._total - mx.get_active_memory())
        limits().keep_freed(limit, self._of_graph)  # let go of what nobody has asked for since

    @contextmanager
    def computing(self, is_head: bool = False) -> Iterator[None]:
        """Around what is computed: as much is kept as leaves it room."""
        s = self._schedule
        if s.keep_buffers:
            yield
            return
        grows = s.head_workspace_nbytes if is_head else s.workspace_nbytes
        limit = max(self._least_of_head if is_head else self._least, self._total - mx.get_active_memory() - grows)
        # what is kept by then is of sizes that nobody will ask for
        is_useless = is_head != self._was_head and not s.head_reuses_blocks
        self._was_head = is_head
        limits().keep_freed(limit, max(0, limit - grows) if is_useless else None)
        if s.active_nbytes is None:  # no ceiling
            yield
            return
        if is_head or time.perf_counter() - self._released_at > RELEASE_EVERY_S:
            platform.release_freed_memory()
            self._released_at = time.perf_counter()
        if not is_head:
            yield
            return
        freed_nbytes = s.cache_nbytes or 0
        limits().hold(s.head_active_nbytes or s.active_nbytes, freed_nbytes)
        try:
            with platform.releasing_freed_memory(RELEASE_IN_HEAD_EVERY_S):  # where most is taken at once
                yield
        finally:
            limits().hold(s.active_nbytes, freed_nbytes)

    def before_freeing(self, nbytes: int, wanted_nbytes: int, are_alike: bool) -> None:
        """Weights of so many bytes are about to be freed.

        Args:
            wanted_nbytes: that are made next; are_alike: of weights that take up the former's buffers.
        """
        s = self._schedule
        if s.keep_buffers:
            return
        left = self._total - (mx.get_active_memory() - nbytes) - wanted_nbytes
        limit = max(self._least + nbytes if are_alike else self._least_of_head, left)
        cached = mx.get_cache_memory()
        if are_alike or not s.head_reuses_blocks or cached + nbytes <= limit:
            limits().keep_freed(limit, of_those_kept=max(0, limit - nbytes))
        else:  # what is there already is of use, the weights are not
            limits().keep_freed(min(cached, limit))

    def before_head(self, nbytes: int) -> None:
        """Weights of so many bytes are about to be freed, and the head comes next."""
        self.before_freeing(nbytes, self._schedule.head_workspace_nbytes, are_alike=False)
