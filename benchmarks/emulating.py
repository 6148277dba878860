"""Emulated fine-tuning: tokens a second where the tuned small model drafts, against plain, reads as slow as a laptop's.

python benchmarks/emulating.py     # as root: memory and reads are limited by a cgroup; about 5 minutes

The paper (arXiv 2310.12962) has 2.5 times. Writes JSON to benchmarks/results/. How often a draft is right depends on
the models: here the large one is the small one with more blocks, whose outputs are scaled by --apart, so acceptance is
made, not found; what is measured is what a given acceptance is worth. Each way is a process of its own; passes that
take in prompts are not counted.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from activation_cache import SHAPE
from generating import NoText
from slowft.bench import cgroup
from slowft.sizes import parse_nbytes

RESULTS = Path(__file__).parent / "results"
WAYS = {"1 row": (1, 0, {}), "1 row, drafts": (1, None, {}), "1 row, drafts, sampled": (1, None, {"temp": 0.7})}
WAYS |= {"4 rows": (4, 0, {}), "4 rows, drafts": (4, None, {})}


def write(directory: Path, layers: int, of_small: int, apart: float) -> Path:
    """A Llama whose first blocks are the same whatever their number; later ones change little."""
    config = SHAPE | {"num_hidden_layers": layers}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, array in tree_flatten(Model(ModelArgs.from_dict(config)).parameters()):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = random.normal(0, array.shape[-1] ** -0.5, array.shape) if array.ndim > 1 else np.ones(array.shape)
        block = int(name.split(".")[2]) if ".layers." in name else 0
        if block >= of_small and ("o_proj" in name or "down_proj" in name):
            values *= apart
        if name == "lm_head.weight":
            values *= 6  # as sure of a token as language models are
        weights[name] = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
        mx.eval(weights[name])
    save_in_order(directory / "model.safetensors", weights)
    return directory


def save_in_order(file: Path, weights: dict[str, mx.array]) -> None:
    """Tensors in the order of the model, from a whole page on.

    `mx.save_safetensors` scatters a block's tensors, and begins at any byte: then Linux reads ahead of what is asked
    for, and the drive gives twice as many bytes as are counted (1,081 MB for 541 MB).
    """
    header, at = {}, 0
    for name, array in weights.items():
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [at, at := at + array.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for array in weights.values():
            out.write(memoryview(array.reshape(-1).view(mx.uint8)))


def write_adapter(model: Path, directory: Path) -> Path:
    with slowft.open_model(model) as opened:
        opened.add_lora(num_layers=-1, rank=8)
        mx.random.seed(1)
        values = [(name, 0.02 * mx.random.normal(p.shape)) for name, p in tree_flatten(opened.trainable_parameters())]
        opened.load_weights(values, strict=False)
        opened.save_adapter(directory)
    return directory


def measure(directory: Path, memory: int, rows: int, drafted: int | None, sampling: dict, tokens: int) -> dict:
    """Generate in this process; figures of the passes that took in no prompt."""
    opened = slowft.emulate(directory / "large", directory / "small", [(directory / "adapter", 1.0)], memory=memory)
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 2000, 16).tolist() for _ in range(rows)]
    run = slowft.generate(
        opened, prompts, tokenizer=NoText(), max_tokens=tokens, wave=rows, draft_tokens=drafted, **sampling
    )
    passes, answers = [], []
    while not run.is_done:
        before, begin = run.tokens, time.perf_counter()
        answers += run.step()
        passes.append((run.tokens - before, time.perf_counter() - begin, opened.stats.last.wait_s))
        if answers:
            break
    counted = passes[2:-1]
    n, seconds = sum(n for n, _, _ in counted), sum(s for _, s, _ in counted)
    return {
        "rows": run.wave,
        "tokens_per_s": n / seconds,
        "tokens_per_reading": n / len(counted),
        "pass_s": seconds / len(counted),
        "wait_share": sum(w for _, _, w in counted) / seconds,
        "read_nbytes": opened.stats.last.bytes_read,
        "drafted": run.drafted,
        "accepted": run.accepted,
        "acceptance": run.depth.acceptance if run.drafted else None,
        "reported_gain": run.gain,
        "planned_peak_nbytes": run.plan.peak_nbytes,
        "answers": [answer.tokens for answer in sorted(answers, key=lambda a: a.number)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--small-layers", type=int, default=2)
    parser.add_argument("--apart", type=float, default=0.05, help="how much the large model's further blocks change")
    parser.add_argument("--memory", default="480MB", help="of the process")
    parser.add_argument("--limit-read", default="120MB", help="bytes a second")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer without drafts; four times as many with")
    parser.add_argument("--only", help="ways whose name begins so")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    memory = parse_nbytes(args.memory)
    if args.way:
        directory, name = args.way
        rows, drafted, sampling = WAYS[name]
        tokens = args.tokens * (1 if drafted == 0 else 4)
        print(json.dumps(measure(Path(directory), memory, rows, drafted, sampling, tokens)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        large = write(Path(scratch) / "large", args.layers, args.small_layers, args.apart)
        small = write(Path(scratch) / "small", args.small_layers, args.small_layers, args.apart)
        write_adapter(small, Path(scratch) / "adapter")
        files = [large / "model.safetensors"]
        print(
            f"{files[0].stat().st_size / 1e6:.0f} MB of weights beside {args.small_layers} of {args.layers} blocks in "
            f"memory, {args.memory} of memory, reads at {args.limit_read}/s"
        )
        for name, (rows, _, _) in WAYS.items():
            if args.only and not name.startswith(args.only):
                continue
            passed = ["--memory", args.memory, "--tokens", str(args.tokens), "--way", scratch, name]
            # what this machine is known to do without a limit must not be told here, nor what is measured here there
            environment = os.environ | {"XDG_CACHE_HOME": scratch}
            way = [sys.executable, __file__, *passed]
            done, peak = cgroup.run(way, memory, parse_nbytes(args.limit_read), files, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            found = results[name] = json.loads(done.stdout.splitlines()[-1]) | {"kernel_peak_nbytes": peak}
            plain = results[f"{rows} row" + "s" * (rows > 1)]
            found["times"] = found["tokens_per_s"] / plain["tokens_per_s"]
            right = ""
            if found["drafted"]:
                right = (
                    f"; {found['accepted']} of {found['drafted']} drafted tokens right (a = {found['acceptance']:.2f})"
                )
                right += f", says {found['reported_gain'] or float('nan'):.2f} itself"
            print(
                f"{name:22} {found['tokens_per_s']:6.2f} tok/s, {found['times']:5.2f} times; "
                f"{found['tokens_per_reading']:5.2f} tokens a reading, {found['pass_s']:.2f} s each, waiting "
                f"{found['wait_share']:.0%}; kernel's peak {peak / 1e6:.0f} MB{right}",
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"emulating_{datetime.date.today().isoformat()}.json"
    for found in results.values():
        found.pop("answers")
    file.write_text(
        json.dumps({"arguments": {k: v for k, v in vars(args).items() if k != "way"}, "results": results}, indent=2)
    )


if __name__ == "__main__":
    main()
