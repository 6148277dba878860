"""okuvshynov/slowllama on the same job, out of a checkout: the one other trainer that streams Llama blocks from disk.

Nothing of its code is here: it is imported from the checkout, in a process of its own, and drives itself. Its format
has no other writer than itself, so its own classes write random weights of the shape, once.
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
from .job import Job

KEYS = ("self_attn.q_proj", "self_attn.v_proj")  # where it attaches LoRA, and nowhere else
MODULES = ("llama2", "llama2_loader", "model_config", "blackbox", "utils")


def check(checkout: str, job: Job) -> None:
    """Raises ConfigError unless the checkout could run the job in this interpreter."""
    missing = [name for name in MODULES if not (Path(checkout) / f"{name}.py").exists()]
    if missing:
        raise ConfigError(
            f"{checkout} is no checkout of slowllama: it lacks {missing[0]}.py. "
            "To fix it: git clone https://github.com/okuvshynov/slowllama"
        )
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("slowllama needs PyTorch, which is not installed. To fix it: pip install torch")
    params_of(job)


def params_of(job: Job) -> dict[str, Any]:
    """The shape in the terms of its ModelArgs.

    Raises:
        ConfigError: a shape that it does not have.
    """
    config = json.loads((Path(job.model) / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    plain = config["model_type"] == "llama" and "quantization" not in config
    if not plain or config.get("head_dim", hidden // heads) * heads != hidden:
        raise ConfigError(f"slowllama runs plain 16-bit Llama shapes, which {job.name} is not. Use --shape llama-1b")
    if job.num_layers not in (-1, config["num_hidden_layers"]):
        raise ConfigError("slowllama trains all blocks. Use --num-layers -1, or leave --slowllama out")
    ffn = config["intermediate_size"]
    return {
        "dim": hidden,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        # it has int(multiplier * int(8 / 3 * dim)), rounded up to a multiple
        "ffn_dim_multiplier": ffn / int(8 * hidden / 3),
        "multiple_of": ffn,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "vocab_size_override": config["vocab_size"],
        "max_seq_len": max(job.tokens, 2048),
        "lora_rank": job.rank,
        "lora_dropout": 0.0,
    }


def directory(job: Job) -> Path:
    """Where its files of this shape are, or will be."""
    key = hashlib.sha256(json.dumps(params_of(job), sort_keys=True).encode()).hexdigest()[:12]
    return platform.cache_directory() / "bench" / f"slowllama-{key}"


def drop_cached_files(job: Job) -> None:
    """Have the kernel forget its files, which it reads through the file cache: a memory limit counts only new pages."""
    for file in directory(job).rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDWR)
            os.fsync(fd)
            os.close(fd)
            platform.make_cold(str(file))


def write(job: Job, told: Callable[[int], None], checkout: str) -> dict[str, Any]:
    """Random bfloat16 weights of the job's shape, in its format, unless they are there."""
    torch, llama2, model_config = _import(checkout)
    final, params = directory(job), params_of(job)
    if final.exists():
        return {}
    unfinished = final.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.random.manual_seed(0)
    model = llama2.Transformer(  # writes its blocks as it makes them
        model_config.ModelArgs(**params, frozen_dtype=torch.bfloat16, served_model_path=str(unfinished))
    )
    (unfinished / "params.json").write_text(json.dumps(params))
    torch.save(model.state_dict(), unfinished / "model.pth")
    os.replace(unfinished, final)
    return {}


def run(job: Job, told: Callable[[int], None], checkout: str) -> dict[str, Any]:
    """Its own loop, as its finetune.py has it: bfloat16 on disk, computing in float32, AdamW."""
    torch, _, _ = _import(checkout)
    from llama2_loader import load_frozen

    with tempfile.TemporaryDirectory(dir=directory(job).parent, prefix="slowllama-inputs-") as inputs:
        model = load_frozen(
            str(directory(job)),
            compute_dtype=torch.float32,
            frozen_dtype=torch.bfloat16,
            lora_rank=job.rank,
            cached_data_path=inputs,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = [torch.tensor(batch).long() for batch in job.batches()]
        pairs = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
        steps, losses = [], []
        for i in range(job.steps + 1):
            platform.reset_peak_memory()
            begin = time.perf_counter()
            optimizer.zero_grad()
            losses.append(sum(model.manual_loop(*pair) for pair in pairs) / len(pairs))
            optimizer.step()
            steps.append({"step_s": time.perf_counter() - begin, "peak_nbytes": platform.peak_memory()})
            told(i + 1)
    return {"first": steps[0], "steps": steps[1:], "losses": losses}


def _import(checkout: str):
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # its files are whole modules
    sys.path.insert(0, checkout)
    import llama2
    import model_config
    import torch

    return torch, llama2, model_config
