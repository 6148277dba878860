"""Measures how fast quantized weights become float32, by slowft's C functions and by MLX, on one core and on all.

python benchmarks/dequantizing.py     # about a minute

Each format is measured on layers of 2816x2048, in the way a block's layers are dequantized: into memory that was in use
before, which MLX allocates again and fills with zeros first. "C alone" is without that. Writes JSON to
benchmarks/results/.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from slowft.weights import quantized
from slowft.weights.sources import Packed, build_all, casting_streams
from slowft.weights.extents import Extent

RESULTS = Path(__file__).parent / "results"
SHAPE, LAYERS = (2816, 2048), 4
FORMATS = [(bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)] + [
    (4, 32, "affine"),
    (4, 128, "affine"),
    (4, 32, "mxfp4"),
    (8, 32, "mxfp8"),
    (4, 16, "nvfp4"),
]


def best_s(function: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def extent(part: mx.array) -> Extent:
    return Extent("", "", 0, part.nbytes, str(part.dtype).rsplit(".", 1)[-1], part.shape)


def rates(bits: int, group_size: int, mode: str, streams: list[mx.Stream]) -> dict[str, float]:
    """Rates in GB/s of packed weights, not counting scales."""
    weight = mx.random.normal(SHAPE).astype(mx.bfloat16)
    parts = mx.quantize(weight, group_size, bits, mode=mode)
    stored = [part.reshape(-1).view(mx.uint8) for part in parts]
    mx.eval(stored)
    extents = [extent(part) for part in parts]
    source = Packed(extents[0], extents[1], (extents + [None])[2], group_size, bits, mode, mx.float32)
    out = mx.zeros((weight.size * 4,), mx.uint8)
    mx.eval(out)
    memory, views, scales = memoryview(out), [memoryview(part) for part in stored], parts[1].dtype
    gb = parts[0].nbytes / 1e9
    result = {"C alone": gb / best_s(lambda: quantized.dequantize(views, bits, group_size, mode, scales, memory), 200)}
    can_dequantize = quantized.can_dequantize
    for name, repetitions in (("C", 40), ("MLX", 3)):
        quantized.can_dequantize = can_dequantize if name == "C" else lambda *_: False
        mx.clear_cache()  # so that MLX hands out again the memory that is freed below, and not some freed earlier
        seconds = best_s(lambda: mx.eval(build_all([source] * LAYERS, [stored] * LAYERS, streams)), repetitions)
        result[name] = LAYERS * gb / seconds
    quantized.can_dequantize = can_dequantize
    return result


def memory_rates() -> dict[str, float]:
    """Rates in GB/s of writing to memory that is in use, and to fresh pages."""
    array = np.zeros(LAYERS * SHAPE[0] * SHAPE[1], np.float32)
    array.fill(1)
    in_use = best_s(lambda: array.fill(2), 10)
    fresh = best_s(lambda: np.frombuffer(mx.zeros((array.nbytes,), mx.uint8), np.uint8).ctypes.data, 3)
    return {"fill": array.nbytes / 1e9 / in_use, "fresh pages": array.nbytes / 1e9 / fresh}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cores = os.sched_getaffinity(0)
    results = {"device": mx.device_info().get("device_name"), "cores": len(cores)}
    streams = casting_streams()
    with_cache = 2 * LAYERS * SHAPE[0] * SHAPE[1] * 4
    for name, n in (("one core", 1), ("all cores", len(cores))):
        os.sched_setaffinity(0, sorted(cores)[:n])
        mx.set_cache_limit(0)
        results[name] = {"memory": memory_rates()}
        print(f"{name}: " + ", ".join(f"{k} {v:.1f} GB/s" for k, v in results[name]["memory"].items()))
        mx.set_cache_limit(with_cache)
        for bits, group_size, mode in FORMATS:
            gb_per_s = rates(bits, group_size, mode, streams[:n])
            results[name][f"{bits} {mode} {group_size}"] = gb_per_s
            print(
                f"  {bits} bits, {mode:6} {group_size:3}: " + ", ".join(f"{k} {v:.3f}" for k, v in gb_per_s.items()),
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"dequantizing_{datetime.date.today().isoformat()}.json"
    file.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
