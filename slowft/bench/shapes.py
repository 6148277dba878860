"""Makes models of a known shape with random weights, once, and keeps them in the user's cache directory.

Comes in: a shape's name, or a config. Goes out: an mlx-lm model directory. It takes little memory however large the
model is: values are written a few megabytes at a time, and kept out of the file cache.
"""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .. import platform
from ..errors import ConfigError, SlowftError

PIECE_VALUES = 4 << 20


def _llama(hidden: int, ffn: int, heads: int, kv_heads: int, layers: int, vocab: int = 32000, **other) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **other,
    }


# The sizes are those of the models that the comments name.
SHAPES = {
    "llama-135m": _llama(576, 1536, 9, 3, 30, 49152, tie_word_embeddings=True),  # SmolLM2-135M
    "llama-1b": _llama(2048, 5632, 32, 4, 22),  # TinyLlama-1.1B
    "llama-3b": _llama(3072, 8192, 24, 8, 28, 128256, head_dim=128, tie_word_embeddings=True),  # Llama-3.2-3B
    "llama-8b": _llama(4096, 14336, 32, 8, 32, 128256),  # Llama-3.1-8B
    "llama-13b": _llama(5120, 13824, 40, 40, 40),  # Llama-2-13B
    "llama-70b": _llama(8192, 28672, 64, 8, 80, 128256),  # Llama-3.3-70B
}


def config_of(shape: str, layers: int | None = None, bits: int | None = None) -> dict:
    """The config of a named shape, if asked for with another number of blocks or quantized.

    Raises:
        ConfigError: there is no such shape.
    """
    if shape not in SHAPES:
        raise ConfigError(f"there is no shape {shape}. Use one of {', '.join(SHAPES)}, or --model with a directory")
    config = dict(SHAPES[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    return quantized(config, bits)


def quantized(config: dict, bits: int | None) -> dict:
    """The config of the same model in `bits` bits, in groups of 64; None leaves it as it is."""
    return config if bits is None else config | {"quantization": {"group_size": 64, "bits": bits}}


def cached(config: dict, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """The directory of a random model of `config` in the cache directory. It is made if it is not there.

    Args:
        progress: called with the bytes written and the bytes in all.
    Raises:
        SlowftError: the disk is full.
    """
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    directory = platform.cache_directory() / "bench" / f"{config['model_type']}-{config['num_hidden_layers']}-{key}"
    if not directory.exists():
        unfinished = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
        try:
            write_random(unfinished, config, progress)
            os.replace(unfinished, directory)
        except OSError as e:
            raise SlowftError(f"random weights cannot be written to {directory.parent}: {e.strerror}") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def write_random(
    directory: Path, config: dict, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write a random model of mlx-lm's class for `config` (bfloat16 unless it says otherwise) to a new directory.

    Matrices are uniform within 1 / sqrt(columns), as MLX initialises them. Vectors are ones, or zeros if they are
    biases. Quantized weights are random bits, with scales that bring them into the same range.

    Raises:
        SlowftError: the disk has no room.
    """
    from ..models.outline import outline_of_config

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    with outline_of_config(directory / "config.json") as outline:
        source, file = outline / "model.safetensors", directory / "model.safetensors"
        with open(source, "rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(n))
        total, free = source.stat().st_size, shutil.disk_usage(directory).free
        if total > free:
            raise SlowftError(
                f"random weights take {total / 1e9:.1f} GB and {directory.parent} has {free / 1e9:.1f} GB free. To fix "
                "it: a smaller --shape, fewer --layers, or XDG_CACHE_HOME on another disk"
            )
        (directory / "config.json").write_bytes((outline / "config.json").read_bytes())
        with open(source, "rb") as f, open(file, "wb", buffering=0) as out:
            platform.skip_file_cache(out.fileno())
            out.write(f.read(8 + n))
            platform.preallocate(out.fileno(), total)
            header.pop("__metadata__", None)
            random = np.random.default_rng(0)
            for name, entry in header.items():
                begin, end = (8 + n + offset for offset in entry["data_offsets"])
                _fill(out.fileno(), name, entry["dtype"], entry["shape"], begin, end, random, config)
                progress(end, total)
    return directory


def _fill(fd: int, name: str, dtype: str, shape: list[int], begin: int, end: int, random, config: dict) -> None:
    itemsize = (end - begin) // max(math.prod(shape), 1)
    step = PIECE_VALUES * itemsize
    for at in range(begin, end, step):
        n = min(step, end - at) // itemsize
        data = memoryview(_values(name, dtype, shape, n, random, config)).cast("B")
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], at + done)
        platform.write_back(fd, at, n * itemsize)
        platform.drop_cached(fd, at, n * itemsize)


def _values(name: str, dtype: str, shape: list[int], n: int, random, config: dict) -> np.ndarray:
    if dtype not in ("BF16", "F16", "F32"):
        return np.frombuffer(random.bytes(n * {"U32": 4, "U8": 1, "I32": 4, "I64": 8}[dtype]), np.uint8)
    if name.endswith((".scales", ".biases")) and len(shape) > 1:
        quantization = config["quantization"]
        levels = 1 << quantization["bits"]
        bound = 1 / math.sqrt(shape[-1] * quantization["group_size"])
        values = np.full(n, 2 * bound / levels if name.endswith(".scales") else -bound, np.float32)
    elif len(shape) > 1:
        values = random.random(n, np.float32)
        values -= 0.5
        values *= 2 / math.sqrt(shape[-1])
    else:
        values = np.full(n, 0.0 if name.endswith("bias") else 1.0, np.float32)
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16: the upper half
