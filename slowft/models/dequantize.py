"""Dequantizing on a CPU, in float32, by the C functions of dequantize.c: the numbers of `mx.dequantize`.

Comes in: packed weights and their scales, as bytes. Goes out: float32 values, in memory that is there already. To the
last bit what MLX computes, on every core (MLX: one a stream), and many times faster (benchmarks/LOG.md). Where it was
not compiled, and on a GPU, `is_available` says so and MLX does it.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

MAX_GROUP_SIZE = 512
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
SCALES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}  # as dequantize.c numbers them
# of modes whose values are codes: the scale that stands for 1, and the code that does
ONE = {"mxfp4": (127, 2), "mxfp8": (127, 0x38), "nvfp4": (0x38, 2)}
THREAD_VALUES = 1 << 18  # fewer are not worth another thread


def is_available(bits: int, group_size: int, mode: str, scales: mx.Dtype, dtype: mx.Dtype) -> bool:
    """Whether `dequantize` can do this, here.

    Args:
        scales: dtype that the scales are stored in; dtype: of the values.
    """
    if dtype != mx.float32 or mx.default_device() != mx.Device(mx.cpu) or _library() is None:
        return False
    if mode == "affine":
        return bits in AFFINE_BITS and scales in SCALES and group_size % 32 == 0 and group_size <= MAX_GROUP_SIZE
    return mode in ONE


def dequantize(
    parts: Sequence[memoryview], bits: int, group_size: int, mode: str, scales: mx.Dtype, out: memoryview
) -> None:
    """Fill `out`, bytes of a contiguous float32 array, on every core.

    Args:
        parts: bytes of the packed weight, of its scales and, of mode "affine", of its biases, all contiguous.
        scales: dtype of the latter two.
    """
    n_groups = out.nbytes // (4 * group_size)
    addresses, to = [_address(part) for part in parts], _address(out)
    group_nbytes = group_size * bits // 8
    if mode == "affine":
        function = _library().slowft_affine
    else:
        values, scale_values = _tables(mode, bits, group_size)
        function = _library().slowft_codes4 if bits == 4 else _library().slowft_codes8

    def work(first: int, n: int) -> None:
        packed, *others = (a + first * size for a, size in zip(addresses, (group_nbytes, scales.size, scales.size)))
        target = ctypes.c_void_p(to + first * 4 * group_size)
        groups = ctypes.c_size_t(n), ctypes.c_size_t(group_size)
        pointers = [ctypes.c_void_p(a) for a in (packed, *others)]
        if mode == "affine":
            function(*pointers, SCALES[scales], target, *groups, bits)
        else:
            function(*pointers, ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(scale_values.ctypes.data),
                     target, *groups)  # fmt: skip

    n_threads = max(1, min(_n_threads(), n_groups * group_size // THREAD_VALUES))
    step = -(-n_groups // n_threads)
    ranges = [(first, min(step, n_groups - first)) for first in range(0, n_groups, max(step, 1))]
    others = [_threads().submit(work, *of_thread) for of_thread in ranges[1:]]
    if ranges:
        work(*ranges[0])
    for other in others:
        other.result()


def _address(data: memoryview) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions; None if there are none. Calls let other Python threads run."""
    spec = importlib.util.find_spec("slowft.models._dequantize")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def _n_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """All but the calling one. They never come near MLX, whose streams belong to threads."""
    return ThreadPoolExecutor(max(_n_threads() - 1, 1), "slowft-dequantize")


@functools.cache
def _tables(mode: str, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(values of a byte's codes, values of scales), as MLX has them."""
    scale_of_one, code_of_one = ONE[mode]
    codes = np.arange(256, dtype=np.uint8)
    one = np.full((256, 64 * bits // 8), code_of_one * (0x11 if bits == 4 else 1), np.uint8)

    def values(packed: np.ndarray, scales: mx.array) -> np.ndarray:
        scales = mx.repeat(scales, packed.shape[1] * 8 // bits // group_size, axis=1)
        array = mx.dequantize(mx.array(packed.view(np.uint32)), scales, None, group_size, bits, mode, dtype=mx.float32)
        return np.array(array)

    return (
        values(codes[None], mx.full((1, 1), scale_of_one, mx.uint8))[0],
        np.ascontiguousarray(values(one, mx.array(codes)[:, None])[:, 0]),
    )
