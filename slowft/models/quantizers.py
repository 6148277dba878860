"""Tells from config and tensor names which software quantized a model whose weights mlx-lm cannot read.

Comes in: a config and names of tensors. Goes out: a name for an error message. It is called only after mlx-lm has
failed, because only mlx-lm knows what it can read.
"""

import re
from collections.abc import Iterable
from typing import Any

NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "FBGEMM's fp8",
    "fp8": "block-scaled fp8",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "NVIDIA's ModelOpt",
    "quanto": "Quanto",
    "quark": "AMD's Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}

# Patterns of tensor names that only this method writes. The first method that matches is named.
SIGNS = {
    "GPTQ": r"\.g_idx$",
    "bitsandbytes": r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.|\.weight_format$",
    "AQLM": r"\.codebooks$",
    "HQQ": r"\.W_q$",
    "ExLlamaV2": r"\.q_weight$",
    "ExLlamaV3": r"\.(trellis|suh|svh)$",
    "Quanto": r"\.weight\._data$|\.weight\._scale$",
    "torchao": r"weight(_|:|:_)(qdata|weight_qdata)$|\._weight_qdata$",
    "VPTQ": r"\.(centroids|res_centroids)(\.weight)?$",
    "SpQR": r"\.(dense_weights|row_offsets|col_vals)$",
    "AWQ or GPTQ": r"\.(qweight|qzeros)$",
    "block-scaled fp8": r"_scale_inv$",
    "compressed-tensors": r"\.(weight_packed|weight_shape|weight_zero_point|weight_global_scale)$",
    "fp8 or int8 with a scale a layer": r"\.(weight_scale|weight_scale_2|input_scale|weight_scales|scale_weight)$",
}


def method_of(config: dict) -> dict[str, Any] | None:
    """The config's description of a quantization by other software than mlx-lm, if there is one."""
    method = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return method if isinstance(method, dict) and not config.get("quantization") else None


def quantizer(config: dict, tensors: Iterable[str]) -> str | None:
    """The software that quantized a model; None if neither config nor tensors tell."""
    names = list(tensors)
    method = method_of(config)
    by_names = next((who for who, sign in SIGNS.items() if any(re.search(sign, name) for name in names)), None)
    if method is not None:
        named = str(method.get("quant_method") or "").lower()
        if named:
            return NAMES.get(named, named)
        flags = next((k for k in method if k.startswith(("load_in_", "_load_in_", "bnb_"))), None)
        return "bitsandbytes" if flags else by_names or "a method that its quantization_config does not name"
    return by_names
