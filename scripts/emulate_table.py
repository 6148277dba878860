"""What SmolLM2-135M gains from a half of it that was fine-tuned: perplexity of held-back answers, as a table.

    python scripts/emulate_table.py DIRECTORY > docs/emulated.md     # downloads 93 MB; an hour or two on two cores

The small base is SmolLM2 without the blocks in its middle, healed by LoRA on half of the Jargon File as plain text and
fused (`mlx_lm fuse`). It is then fine-tuned on questions and answers of the other half: that is the delta. The same
fine-tuning of the large model itself is what emulation may at best come near to. DIRECTORY keeps what is done already.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from slowft import demo

ITERS = {"heal": 800, "small": 300, "large": 300}
WEIGHTS = (0.0, 0.5, 1.0, 1.5)
DRAFTED = demo.QUESTION


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def halve(model: Path, to: Path) -> Path:
    """The model without the blocks in its middle, which it misses least."""
    if (to / "config.json").exists():
        return to
    to.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    n = config["num_hidden_layers"]
    number = {old: new for new, old in enumerate([*range((n + 2) // 4), *range(n - n // 4, n)])}
    weights = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, array in mx.load(str(file)).items():
            parts = name.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                if int(parts[at]) not in number:
                    continue
                parts[at] = str(number[int(parts[at])])
            weights[".".join(parts)] = array
    mx.save_safetensors(str(to / "model.safetensors"), weights, {"format": "mlx"})
    for file in model.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            (to / file.name).write_bytes(file.read_bytes())
    (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(number)}, indent=4))
    return to


def tune(model: Path, data: Path, adapter: Path, iters: int, **how) -> Path:
    if (adapter / "adapters.safetensors").exists():
        return adapter
    note(f"Tuning {model.name} on {data.name}: {iters} iterations")
    begin = time.perf_counter()
    config = replace(
        demo.config(adapter.parent, iters), model=str(model), data=str(data), adapter_path=str(adapter), **how
    )
    with slowft.open_model(model) as opened:
        tokenizer = slowft.load_tokenizer(opened.path, opened.embedding_rows)
        train, valid, _ = slowft.load_data(str(data), tokenizer, config)
        slowft.Trainer(opened, config).fit(train, valid)
    note(f"  {time.perf_counter() - begin:.0f} s")
    return adapter


def halves(data: Path, directory: Path) -> tuple[Path, Path]:
    """(plain text for healing, questions and answers for tuning) of the two halves of the training data."""
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    text, asked = directory / "text", directory / "asked"
    for to, some in ((text, lines[::2]), (asked, lines[1::2])):
        to.mkdir(exist_ok=True)
        if to is text:
            some = [{"text": one["completion"]} for one in some]
        (to / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some), "utf-8")
    valid = [json.loads(line) for line in (data / "valid.jsonl").read_text("utf-8").splitlines()]
    (asked / "valid.jsonl").write_text("".join(json.dumps(one) + "\n" for one in valid), "utf-8")
    (text / "valid.jsonl").write_text("".join(json.dumps({"text": one["completion"]}) + "\n" for one in valid), "utf-8")
    return text, asked


def perplexity(model, tokenizer, samples: list[dict]) -> float:
    """Of the answers' tokens, given the questions."""
    total = n = 0
    for sample in samples:
        messages = [{"role": "user", "content": sample["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        answer = tokenizer.encode(sample["completion"], add_special_tokens=False)[: 256 - len(prompt)]
        tokens = mx.array([[*prompt, *answer, tokenizer.eos_token_id]])
        logits = model(tokens[:, :-1])[0, len(prompt) - 1 :].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        of_answer = mx.take_along_axis(logprobs, tokens[0, len(prompt) :, None], axis=-1)
        total, n = total - np.array(of_answer).sum(), n + of_answer.size
    return math.exp(total / n)


def main() -> None:
    directory = Path(sys.argv[1])
    large = demo.fetch_model(directory, note)
    data = demo.write_data(directory)
    text, asked = halves(data, directory)
    half = halve(large, directory / "half")
    small = directory / "small"
    if not (small / "config.json").exists():
        much = {"rank": 64, "scale": 10.0, "dropout": 0.0}
        heal = tune(
            half, text, directory / "heal", ITERS["heal"], mask_prompt=False, num_layers=-1, lora_parameters=much
        )
        fuse = ["mlx_lm", "fuse", "--model", half, "--adapter-path", heal, "--save-path", small, "--dequantize"]
        subprocess.run([sys.executable, "-m", *map(str, fuse)], check=True, stdout=sys.stderr)
    of_small = tune(small, asked, directory / "of_small", ITERS["small"], num_layers=-1)
    of_large = tune(large, asked, directory / "of_large", ITERS["large"], num_layers=-1)
    samples = [json.loads(line) for line in (asked / "valid.jsonl").read_text("utf-8").splitlines()]
    tokenizer = slowft.load_tokenizer(large, None)
    rows = []

    def add(name: str, opened) -> None:
        with opened as model:
            if hasattr(model, "eval"):
                model.eval()
            rows.append((name, perplexity(model, tokenizer, samples)))
        note(f"{name}: {rows[-1][1]:.2f}")

    add("small base (15 of 30 blocks, healed)", slowft.open_model(small))
    add("small, tuned", slowft.open_model(small, adapter_path=of_small))
    add("large base (SmolLM2-135M-Instruct)", slowft.open_model(large))
    for weight in WEIGHTS:
        add(f"large, emulating small tuned, weight {weight:g}", slowft.emulate(large, small, [(of_small, weight)]))
    add("... weight 1, nucleus 0.95", slowft.emulate(large, small, [(of_small, 1.0)], nucleus=0.95))
    add("small base, with what the large one learnt", slowft.emulate(small, large, [(of_large, 1.0)]))
    add("large, tuned itself", slowft.open_model(large, adapter_path=of_large))

    print("# Emulated fine-tuning of SmolLM2\n")
    print(f"`python scripts/emulate_table.py`: perplexity of {len(samples)} held-back answers of the Jargon File.\n")
    print("| model | perplexity |\n|---|---|")
    for name, found in rows:
        print(f"| {name} | {found:.2f} |")
    with slowft.emulate(large, small, [(of_small, 1.0)]) as model:
        run = slowft.generate(
            model,
            [tokenizer.apply_chat_template([{"role": "user", "content": DRAFTED}], add_generation_prompt=True)],
            max_tokens=60,
        )
        (answer,) = run
    print(
        f"\nAn answer of 60 tokens took {run.passes} readings; {run.accepted} of {run.drafted} drafted tokens were "
        f"right.\n\n> {DRAFTED}\n>\n> {' '.join(answer.text.split())}"
    )


if __name__ == "__main__":
    main()
