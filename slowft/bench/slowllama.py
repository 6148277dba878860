"""Runs okuvshynov/slowllama on the same workload. It is the one other trainer that streams Llama blocks from disk.

None of its code is here: it is imported from a checkout, in a process of its own, and runs its own loop. Only its own
classes can write its file format, so they write random weights of the shape, once.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import platform
from ..errors import ConfigError
from .workload import Workload

KEYS = ("self_attn.q_proj", "self_attn.v_proj")  # the only layers that it attaches LoRA to
MODULES = ("llama2", "llama2_loader", "model_config", "blackbox", "utils")


def check(checkout: str, workload: Workload) -> None:
    """Raises ConfigError unless the checkout could run the workload in this interpreter."""
    missing = [name for name in MODULES if not (Path(checkout) / f"{name}.py").exists()]
    if missing:
        raise ConfigError(
            f"{checkout} is no checkout of slowllama: it lacks {missing[0]}.py. "
            "To fix it: git clone https://github.com/okuvshynov/slowllama"
        )
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("slowllama needs PyTorch, which is not installed. To fix it: pip install torch")
    params_of(workload)


def params_of(workload: Workload) -> dict[str, Any]:
    """The shape as arguments of slowllama's ModelArgs.

    Raises:
        ConfigError: slowllama cannot have this shape.
    """
    config = json.loads((Path(workload.model) / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    plain = config["model_type"] == "llama" and "quantization" not in config
    if not plain or config.get("head_dim", hidden // heads) * heads != hidden:
        name = workload.name
        raise ConfigError(f"slowllama runs plain 16-bit Llama shapes, which {name} is not. Use --shape llama-1b")
    if workload.num_layers not in (-1, config["num_hidden_layers"]):
        raise ConfigError("slowllama trains all blocks. Use --num-layers -1, or leave --slowllama out")
    ffn = config["intermediate_size"]
    return {
        "dim": hidden,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        # slowllama computes int(multiplier * int(8 / 3 * dim)), rounded up to a multiple of `multiple_of`
        "ffn_dim_multiplier": ffn / int(8 * hidden / 3),
        "multiple_of": ffn,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "vocab_size_override": config["vocab_size"],
        "max_seq_len": max(workload.tokens, 2048),
        "lora_rank": workload.rank,
        "lora_dropout": 0.0,
    }


def directory(workload: Workload) -> Path:
    """The directory for slowllama's files of this shape."""
    key = hashlib.sha256(json.dumps(params_of(workload), sort_keys=True).encode()).hexdigest()[:12]
    return platform.cache_directory() / "bench" / f"slowllama-{key}"


def drop_cached_files(workload: Workload) -> None:
    """Remove slowllama's files from the file cache, through which it reads. A memory limit counts only new pages."""
    for file in directory(workload).rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDWR)
            os.fsync(fd)
            os.close(fd)
            platform.make_cold(str(file))


def write(workload: Workload, progress: Callable[[int], None], checkout: str) -> dict[str, Any]:
    """Write random bfloat16 weights of the workload's shape in slowllama's format, unless they are there."""
    torch, llama2, model_config = _import(checkout)
    final, params = directory(workload), params_of(workload)
    if final.exists():
        return {}
    unfinished = final.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.random.manual_seed(0)
    model = llama2.Transformer(  # it writes its blocks while it is made
        model_config.ModelArgs(**params, frozen_dtype=torch.bfloat16, served_model_path=str(unfinished))
    )
    (unfinished / "params.json").write_text(json.dumps(params))
    torch.save(model.state_dict(), unfinished / "model.pth")
    os.replace(unfinished, final)
    return {}


def run(workload: Workload, progress: Callable[[int], None], checkout: str) -> dict[str, Any]:
    """Runs the loop of slowllama's finetune.py: bfloat16 on disk, float32 for computing, AdamW."""
    torch, _, _ = _import(checkout)
    from llama2_loader import load_frozen

    with tempfile.TemporaryDirectory(dir=directory(workload).parent, prefix="slowllama-inputs-") as inputs:
        model = load_frozen(
            str(directory(workload)),
            compute_dtype=torch.float32,
            frozen_dtype=torch.bfloat16,
            lora_rank=workload.rank,
            cached_data_path=inputs,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = [torch.tensor(batch).long() for batch in workload.batches()]
        pairs = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
        steps, losses = [], []
        for i in range(workload.steps + 1):
            platform.reset_peak_memory()
            begin = time.perf_counter()
            optimizer.zero_grad()
            losses.append(sum(model.manual_loop(*pair) for pair in pairs) / len(pairs))
            optimizer.step()
            steps.append({"step_s": time.perf_counter() - begin, "peak_nbytes": platform.peak_memory()})
            progress(i + 1)
    return {"first": steps[0], "steps": steps[1:], "losses": losses}


def _import(checkout: str):
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # slowllama's files hold whole modules, not only weights
    sys.path.insert(0, checkout)
    import llama2
    import model_config
    import torch

    return torch, llama2, model_config
