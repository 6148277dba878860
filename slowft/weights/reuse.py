"""Decides how many freed buffers MLX keeps for reuse, from one piece of work (a block's pass, the head's) to the next.

Comes in: a `Schedule`, which says what each piece takes. Goes out: MLX's cache limit, set before each piece.
"""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import platform
from ..memory import limits
from ..planning.schedule import Schedule

COLD_STEPS = 2  # the first steps, which find fewer freed buffers than later ones
# What lies free between small buffers is released before the head, and this often before blocks, which takes 0.5 to
# 1.5 ms.
RELEASE_EVERY_S = 0.1


class Reuse:
    """Keeps as many freed buffers for reuse as there is room for.

    Fresh pages cost more than most of what is written to them. While MLX's cache is full, whatever it is full of, MLX
    gives each newly freed buffer back to the system. So the buffers freed longest ago have to go first.

    Args:
        schedule: at least `cache_nbytes` of buffers are kept, and whatever arrays leave of `total_nbytes`. With
            `keep_buffers` all are kept, as long as steps have the same shape.
    """

    def __init__(self, schedule: Schedule):
        self._schedule = schedule
        self._total_nbytes, self._cache_nbytes = schedule.total_nbytes, schedule.cache_nbytes
        self._steps = 0
        self._released_at = 0.0
        self._was_head = False
        self._graph_kind: Hashable = None
        self._graph_cache_nbytes: int | None = None  # of freed buffers, after one step of that kind

    def raise_by(self, nbytes: int) -> None:
        """Keep so many bytes more from the next step on. It then takes at most so much more than the last one did.

        In the first `COLD_STEPS` calls only a negative number counts.
        """
        self._steps += 1
        if self._total_nbytes and (nbytes < 0 or self._steps > COLD_STEPS):
            self._total_nbytes = max(self._schedule.total_nbytes, self._total_nbytes + nbytes)

    def begin_graph(self, kind: Hashable) -> None:
        """All blocks and the head are computed next, as one graph. Graphs of one kind ask for the same buffers."""
        if not self._schedule.keep_buffers:
            return
        if kind != self._graph_kind:
            limits().give_back()
            self._graph_kind, self._graph_cache_nbytes = kind, None
        elif self._graph_cache_nbytes is None:
            self._graph_cache_nbytes = mx.get_cache_memory()
        # What arrays leave now is more than what they leave within the graph, where they take `active_nbytes`.
        limit = max(self._cache_nbytes, self._total_nbytes - self._schedule.active_nbytes)
        limits().keep_freed(limit, self._graph_cache_nbytes)  # gives back what no graph has asked for since

    @contextmanager
    def computing(self, is_head: bool = False) -> Iterator[None]:
        """While this is entered, a block or the head is computed, and freed buffers are kept as far as it has room."""
        s = self._schedule
        if s.keep_buffers:
            yield
            return
        workspace_nbytes = s.head_workspace_nbytes if is_head else s.workspace_nbytes
        limit = max(self._cache_nbytes, self._total_nbytes - mx.get_active_memory() - workspace_nbytes)
        # between blocks and head, the buffers kept so far are of sizes that nobody will ask for
        is_useless = is_head != self._was_head and not s.in_memory
        self._was_head = is_head
        limits().keep_freed(limit, max(0, limit - workspace_nbytes) if is_useless else None)
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
            yield
        finally:
            limits().hold(s.active_nbytes, freed_nbytes)

    def before_freeing(self, nbytes: int, next_nbytes: int, are_alike: bool) -> None:
        """Weights of so many bytes are about to be freed.

        Args:
            next_nbytes: bytes that are allocated next.
            are_alike: whether these are weights that fit the freed buffers.
        """
        s = self._schedule
        if s.keep_buffers:
            return
        room_nbytes = self._total_nbytes - (mx.get_active_memory() - nbytes) - next_nbytes
        limit = max(self._cache_nbytes + (nbytes if are_alike else 0), room_nbytes)
        cached_nbytes = mx.get_cache_memory()
        if are_alike or not s.in_memory or cached_nbytes + nbytes <= limit:
            limits().keep_freed(limit, of_those_kept=max(0, limit - nbytes))
        else:  # the buffers kept already are of use, those of the weights are not
            limits().keep_freed(min(cached_nbytes, limit))

    def before_head(self, nbytes: int) -> None:
        """Weights of so many bytes are about to be freed, and the head comes next."""
        self.before_freeing(nbytes, self._schedule.head_workspace_nbytes, are_alike=False)
