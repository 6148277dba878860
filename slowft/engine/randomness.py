"""Random state as a function of step, block and micro-batch, so that a recomputation replays dropout exactly."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


def dropout_seed(seed: int, step: int, block: int, micro_batch: int) -> int:
    """The seed that is set (`mx.random.seed`) before a block runs, in the forward pass and in its recomputation.

    It is a hash, so that neighbouring steps, blocks and micro-batches get unrelated masks, and a resumed run the same
    ones. `block` is the number of the visit in a forward pass, from 0.
    """
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, block, micro_batch), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restore the random state on leaving, whatever dropout has drawn meanwhile."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)
