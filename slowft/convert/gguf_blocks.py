"""Repacks blocks of GGUF tensors: into groups of 32 if MLX has the same quantization, else into plain values.

Comes in: the bytes of whole rows. Goes out: NumPy arrays in MLX's layout (bfloat16 as uint16). All is exact but for
Q6_K. The layouts of the blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; of MLX's groups:
`mx.quantize`.
"""

import numpy as np

GROUP_SIZE = 32
AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
PACKED = (*AFFINE_BITS, "MXFP4")


def repack(kind: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Repack uint8 [n, bytes of a row] as `weight` uint32 [n, ...], `scales` and (not for MXFP4) `biases` [n, groups].

    A value of an affine group is scale * integer + bias both in llama.cpp and in MLX. Both have the same MXFP4 codes.
    """
    n = len(rows)
    if kind == "MXFP4":
        blocks = rows.reshape(-1, 17)
        return {"weight": _words(_packed_nibbles(blocks[:, 1:]), n), "scales": blocks[:, 0].reshape(n, -1)}
    if kind == "Q8_0":
        blocks = rows.reshape(-1, 34)
        scales, integers, least = _float16(blocks, 0), blocks[:, 2:] ^ 0x80, -128  # int8 as its distance from -128
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
    """GGUF has 4 bytes of fifth bits, then nibbles as above. MLX has the 5 bits of each value one after the other."""
    fifths = np.unpackbits(data[:, :4], axis=1, bitorder="little")
    values = np.concatenate([data[:, 4:] & 15, data[:, 4:] >> 4], axis=1) | fifths << 4
    bits = np.unpackbits(values[:, :, None], axis=2, count=5, bitorder="little")
    return np.packbits(bits.reshape(len(data), -1), axis=1, bitorder="little")


def widen(kind: str, rows: np.ndarray) -> np.ndarray:
    """Widen uint8 [n, bytes of a row] of F32, F16, BF16 or Q6_K to float32 [n, values], exactly."""
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
    """Cast float32 to another dtype. For bfloat16 (as uint16) the lower 16 bits are dropped: values must have none."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype, copy=False)
