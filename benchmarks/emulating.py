"""Measures emulated fine-tuning: tokens a second with the tuned small model as drafter, against without drafts.

python benchmarks/emulating.py     # as root: memory and reads are limited by a cgroup; about 5 minutes

The paper (arXiv 2310.12962) reports a factor of 2.5. How often a draft is right depends on the models. Here the large
model is the small one with more blocks, whose outputs are scaled by --apart. So the rate of acceptance is set, and what
is measured is the gain at that rate. Each way runs in a process of its own, with reads as slow as a laptop's. Passes
that take in prompts are not counted. Writes JSON to benchmarks/results/.
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
    """A Llama whose first `of_small` blocks do not depend on the number of layers. Later blocks change little."""
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
            values *= 6  # then the model is about as certain of a token as language models are
        weights[name] = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
        mx.eval(weights[name])
    save_in_order(directory / "model.safetensors", weights)
    return directory


def save_in_order(file: Path, weights: dict[str, mx.array]) -> None:
    """Save tensors in the model's order, beginning at a whole page.

    `mx.save_safetensors` scatters a block's tensors and begins at any byte. Linux then reads ahead of the requests, and
    the drive reads twice as many bytes as are counted (1,081 MB for 541 MB).
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
    """Generate in this process. Returns figures of the passes that took in no prompt."""
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
    parser.add_argument("--memory", default="480MB", help="limit of the process")
    parser.add_argument("--limit-read", default="120MB", help="limit of reads in bytes a second")
    parser.add_argument("--tokens", type=int, default=12, help="tokens of an answer; four times as many with drafts")
    parser.add_argument("--only", help="ways whose name begins with this")
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
            # so that rates remembered of this machine without limits do not count here, nor those of here elsewhere
            environment = os.environ | {"XDG_CACHE_HOME": scratch}
            way = [sys.executable, __file__, *passed]
            done, peak = cgroup.run(way, memory, parse_nbytes(args.limit_read), files, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            figures = results[name] = json.loads(done.stdout.splitlines()[-1]) | {"kernel_peak_nbytes": peak}
            plain = results[f"{rows} row" + "s" * (rows > 1)]
            figures["times"] = figures["tokens_per_s"] / plain["tokens_per_s"]
            right = ""
            if figures["drafted"]:
                right = f"; {figures['accepted']} of {figures['drafted']} drafted tokens right"
                right += f" (a = {figures['acceptance']:.2f})"
                right += f", reports a gain of {figures['reported_gain'] or float('nan'):.2f} itself"
            print(
                f"{name:22} {figures['tokens_per_s']:6.2f} tok/s, {figures['times']:5.2f} times; "
                f"{figures['tokens_per_reading']:5.2f} tokens a reading, {figures['pass_s']:.2f} s each, waiting "
                f"{figures['wait_share']:.0%}; kernel's peak {peak / 1e6:.0f} MB{right}",
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"emulating_{datetime.date.today().isoformat()}.json"
    for figures in results.values():
        figures.pop("answers")
    file.write_text(
        json.dumps({"arguments": {k: v for k, v in vars(args).items() if k != "way"}, "results": results}, indent=2)
    )


if __name__ == "__main__":
    main()
