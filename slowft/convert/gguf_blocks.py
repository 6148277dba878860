"""Blocks of GGUF tensors as MLX has them: packed groups of 32 where a kind has an equal, else plain values.

Comes in: the bytes of whole rows. Goes out: NumPy arrays in the layout of MLX's (bfloat16 as uint16). Exact, but for
Q6_K. Layouts of the blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; of MLX's groups:
`mx.quantize`.
"""

import numpy as np

GROUP_SIZE = 32
AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
PACKED = (*AFFINE_BITS, "MXFP4")


def repack(kind: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 [n, bytes of a row] -> `weight` uint32 [n, ...], `scales` and, unless MXFP4, `biases` [n, groups].

    A value of an affine group is scale * integer + bias, in llama.cpp as in MLX; of MXFP4 both have the same codes.
    """
    n = len(rows)
    if kind == "MXFP4":
        blocks = rows.reshape(-1, 17)
        return {"weight": _words(_packed_nibbles(blocks[:, 1:]), n), "scales": blocks[:, 0].reshape(n, -1)}
    if kind == "Q8_0":
        blocks = rows.reshape(-1, 34)
        scales, integers, least = _float16(blocks, 0), blocks[:, 2:] ^ 0x80, -128  # int8 as that much above -128
        packed, biases = integers, scales * np.float16(least)
    elif kind in ("Q4_0", "Q5_0"):
        blocks = rows.reshape(-1, 18 if kind == "Q4_0" else 22)
        scales = _float16(blocks, 0)
        packed, biases = _packed_bits(kind, blocks[:, 2:]), scales * np.float16(-8 if kind == "Q4_0" else -16)
    else:
        blocks = rows.reshape(-1, 20 if kind == "Q4_1" else 24)
        scales, biases = _float16(blocks, 0), _float16(blocks, 2)
        packed = _packed_bits(kind, blocks[:, 4:])
    return {"weight": _words(packed, n), "scales": scales.reshape(n, -1), "biases": biases.reshape(n, -1)}


def _words(packed: np.ndarray, n_rows: int) -> np.ndarray:
    return np.ascontiguousarray(packed).reshape(n_rows, -1).view("<u4")


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]


def _packed_bits(kind: str, data: np.ndarray) -> np.ndarray:
    return _packed_nibbles(data) if AFFINE_BITS[kind] == 4 else _packed_fives(data)


def _packed_nibbles(data: np.ndarray) -> np.ndarray:
    """Byte j holds values j and j + 16 of a block in GGUF, values 2j and 2j + 1 in MLX."""
    low, high = data & 15, data >> 4
    return np.concatenate([half[:, ::2] | half[:, 1::2] << 4 for half in (low, high)], axis=1)


def _packed_fives(data: np.ndarray) -> np.ndarray:
    """4 bytes of fifth bits, then nibbles as above; in MLX the bits of one value after those of another."""
    fifths = np.unpackbits(data[:, :4], axis=1, bitorder="little")
    values = np.concatenate([data[:, 4:] & 15, data[:, 4:] >> 4], axis=1) | fifths << 4
    bits = np.unpackbits(values[:, :, None], axis=2, count=5, bitorder="little")
    return np.packbits(bits.reshape(len(data), -1), axis=1, bitorder="little")


def widen(kind: str, rows: np.ndarray) -> np.ndarray:
    """uint8 [n, bytes of a row] of F32, F16, BF16 or Q6_K -> float32 [n, values], exactly."""
    if kind == "F32":
        return rows.view("<f4")
    if kind == "F16":
        return rows.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = rows.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = (low >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(-1, 16, 16)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 16, 16)
    integers = (low | high << 4).astype(np.int8) - np.int8(32)
    scales = _float16(blocks, 208).astype(np.float32)[:, None] * blocks[:, 192:208].view(np.int8)
    return (scales[:, :, None] * integers).reshape(len(rows), -1)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> F32, F16 or BF16 (as uint16, the lower bits cut off: for values that have none)."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype], copy=False)
