"""Measures a mixture of experts with 1, 32 and 2,048 tokens: bytes read and seconds, by each way to read blocks.

python benchmarks/experts.py          # about 3 minutes; --read 150MB limits reads by a control group, as root
python benchmarks/experts.py --train  # steps of training instead of evaluation

"whole": every block is read whole. "routed": a block is read without its experts, and then the experts that tokens
are routed to. "groups": experts are read in groups of 16 MB, which takes the least memory. "planned": slowft chooses.
Training has only the first and the third way.
The model has 8 blocks of 64 experts, 4 a token (or --per-token), in 0.43 GB. Its weights are random, the router's too.
Writes JSON to benchmarks/results/.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from slowft.bench.limits import Limits
from slowft.bench.shapes import write_random
from slowft.bench.system import describe
from slowft.bench.workload import Workload
from slowft.engine.model import parse_nbytes

RESULTS = Path(__file__).parent / "results"
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}
TOKENS = (1, 32, 2048)
METHODS = ("whole", "routed", "groups", "planned")

WORKER = """
import json, statistics, sys, time
import slowft
import mlx.core as mx
from slowft.engine import offloaded
from slowft.planning.schedule import Schedule
directory, method, tokens, passes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
trains = sys.argv[5] == "train"
if method in ("whole", "routed"):
    offloaded.is_read_on_demand = lambda *_: method == "routed"
model = slowft.open_model(directory)
if trains:
    model.add_lora(num_layers=-1, rank=8)
model.train(trains)
model.engine.follow(Schedule(slots=1, group_nbytes=16 << 20 if method == "groups" else None))
mx.random.seed(0)
read, seconds = [], []
for _ in range(passes):
    batch = mx.random.randint(0, 1024, (1, tokens + trains))
    before, begin = model.stats.total.bytes_read, time.perf_counter()
    mx.eval(model.loss_and_grads(batch, mx.array([[0, tokens]])) if trains else model(batch))
    seconds.append(time.perf_counter() - begin)
    read.append(model.stats.total.bytes_read - before)
of_blocks = sum(unit.nbytes for unit in model.engine.cut.blocks)
print(json.dumps({
    "method": method, "tokens": tokens, "read_nbytes": statistics.median(read[1:]),
    "seconds": statistics.median(seconds[1:]), "of_blocks": statistics.median(read[1:]) / of_blocks,
    "peak_nbytes": model.stats.total.peak_memory,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", help="limit of reads in bytes a second, such as 150MB")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--per-token", type=int, default=CONFIG["num_experts_per_tok"], help="experts for each token")
    parser.add_argument("--train", action="store_true", help="measure steps of training")
    args = parser.parse_args()
    rate = args.read and parse_nbytes(args.read)
    config = CONFIG | {"num_experts_per_tok": args.per_token}
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_random(Path(scratch) / "model", config)
        for tokens in args.tokens:
            for method in METHODS[::2] if args.train else METHODS:
                passes = "9" if tokens < 1000 else "2"
                kind = "train" if args.train else "evaluate"
                command = [sys.executable, "-c", WORKER, str(directory), method, str(tokens), passes, kind]
                limits = Limits(read_bytes_per_s=rate)
                with limits.group(Workload(str(directory), "experts")) as group:
                    command = command if group is None else group.entered(command)
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print("{tokens:5} tokens, {method:8} {read_nbytes:13,} bytes, {seconds:.2f} s".format(**results[-1]))
    kinds = ["train"] * args.train + [args.read] * bool(args.read)
    kinds += [f"{args.per_token}_a_token"] * (config != CONFIG)
    name = "_".join(["experts", str(datetime.date.today()), *kinds]) + ".json"
    result = {"machine": describe(), "config": config, "read": args.read, "results": results}
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
