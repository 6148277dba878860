"""Dequantizes to float32 on a CPU, by the C functions of quantized.c.

Comes in: bytes. Goes out: bytes, in memory that the caller gives. The result is that of `mx.dequantize` to the last
bit, computed on every core (MLX: one core per stream) and many times faster (benchmarks/LOG.md). Where the functions
were not compiled, and on a GPU, `can_dequantize` is False and MLX does the work.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from .. import platform
from ..memory import computes_on_gpu

MAX_GROUP_SIZE = 512
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
KINDS = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}  # quantized.c's numbers for these
# for modes that store values as codes: (the scale that stands for 1, the code that stands for 1)
ONE = {"mxfp4": (127, 2), "mxfp8": (127, 0x38), "nvfp4": (0x38, 2)}
THREAD_VALUES = 1 << 18  # fewer values than these are not worth another thread


def can_dequantize(bits: int, group_size: int, mode: str, scales: mx.Dtype, dtype: mx.Dtype) -> bool:
    """Whether `dequantize` can do this on this machine.

    Args:
        scales: dtype that the scales are stored in.
        dtype: dtype of the values.
    """
    if dtype != mx.float32 or computes_on_gpu() or not is_compiled():
        return False
    if mode == "affine":
        return bits in AFFINE_BITS and scales in KINDS and _is_group(group_size)
    return mode in ONE


def dequantize(
    parts: Sequence[memoryview], bits: int, group_size: int, mode: str, scales: mx.Dtype, out: memoryview
) -> None:
    """Fill `out`, bytes of a contiguous float32 array, on every core.

    Args:
        parts: bytes of the packed weight, of its scales and, in mode "affine", of its biases, all contiguous.
        scales: dtype of the scales and biases.
    """
    sizes = group_size * bits // 8, scales.size, scales.size  # bytes per group of each part
    values_per_group = ctypes.c_size_t(group_size)
    if mode == "affine":

        def work(n, out, weight, scales_, biases):
            _library().slowft_affine(weight, scales_, biases, KINDS[scales], out, n, values_per_group, bits)
    else:
        values, scale_values = _tables(mode, bits, group_size)
        function = _library().slowft_codes4 if bits == 4 else _library().slowft_codes8
        tables = ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(scale_values.ctypes.data)

        def work(n, out, weight, scales_):
            function(weight, scales_, *tables, out, n, values_per_group)

    _on_every_core(work, group_size, [(out, 4 * group_size), *zip(parts, sizes)])


def is_compiled() -> bool:
    return _library() is not None


def _is_group(group_size: int) -> bool:
    return group_size % 32 == 0 and group_size <= MAX_GROUP_SIZE


def _on_every_core(work: Callable, group_size: int, buffers: Sequence[tuple[memoryview, int]]) -> None:
    """Call `work(number of groups, *addresses)` on every core, each with an equal share of the groups.

    Args:
        buffers: (buffer, its bytes per group). The first one says how many groups there are.
    """
    n_groups = buffers[0][0].nbytes // buffers[0][1]
    addresses = [(np.frombuffer(buffer, np.uint8).ctypes.data, nbytes) for buffer, nbytes in buffers]
    share = -(-n_groups // max(1, min(platform.cores(), n_groups * group_size // THREAD_VALUES)))

    def work_from(first: int) -> None:
        pointers = [ctypes.c_void_p(address + first * nbytes) for address, nbytes in addresses]
        work(ctypes.c_size_t(min(share, n_groups - first)), *pointers)

    others = [_threads().submit(work_from, first) for first in range(share, n_groups, share)]
    work_from(0)
    for other in others:
        other.result()


@functools.cache
def _library() -> Any:
    """The compiled functions; None if there are none. A call lets other Python threads run meanwhile."""
    spec = importlib.util.find_spec("slowft.weights._quantized")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """One thread per core, less the calling one. They never call MLX, whose streams belong to threads."""
    return ThreadPoolExecutor(max(platform.cores() - 1, 1), "slowft-quantized")


@functools.cache
def _tables(mode: str, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(values of a byte's codes, values of scales), as MLX computes them."""
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
