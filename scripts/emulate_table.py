"""What SmolLM2-135M gains from a half of it that was fine-tuned: loss on held-back answers, as a table.

    python scripts/emulate_table.py DIRECTORY > table.md     # downloads 93 MB; an hour on two cores

The small base is the healed half of `halved_model.py`. It is fine-tuned on questions and answers of the entries of the
Jargon File that it was not healed with: that is the delta. The same fine-tuning of the large model itself is what
emulation may at best come near to. DIRECTORY keeps what is done already: a run that was stopped goes on.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
from pathlib import Path

from halved_model import healed, note, tune
from slowft import demo

ITERS = 80
WEIGHTS = (0.5, 1.0, 1.5)
COLUMNS = ("loss", "±", "perplexity")


class Scores:
    """Of the held-back answers, by a name for the table; kept in a file as they are found."""

    def __init__(self, file: Path, samples: list[dict], tokenizer):
        self.file, self.samples, self.tokenizer = file, samples, tokenizer
        self.found: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}

    def add(self, opening, names: dict[str, str], adapters: dict[str, Path] | None = None) -> None:
        """Score a model that `opening()` gives; `names` says what its scores are called in the table."""
        if all(name in self.found for name in names.values()):
            return
        with opening() as model:
            scores = slowft.score(
                model,
                self.samples,
                adapters or {},
                tokenizer=self.tokenizer,
                mask_prompt=True,
                max_seq_length=256,
            )
        for own, name in names.items():
            self.found[name] = [-scores[own].mean, scores[own].standard_error, scores[own].perplexity]
            note(f"{name}: {self.found[name]}")
        self.file.write_text(json.dumps(self.found))


def asked(data: Path, to: Path) -> Path:
    """A data folder of the entries that are not healed with, and the held-back ones."""
    to.mkdir(exist_ok=True)
    for name, first, step in (("train", 1, 2), ("valid", 0, 1)):
        lines = (data / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)[first::step]
        (to / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return to


SMALL, LARGE = "small base (16 of 30 blocks, healed)", "large base (SmolLM2-135M-Instruct)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    small, large = healed(directory), demo.fetch_model(directory, note)
    data = asked(directory / "data", directory / "asked")
    of_small = tune(small, data, directory / "of_small", ITERS)
    samples = [json.loads(line) for line in (data / "valid.jsonl").read_text("utf-8").splitlines()]
    tokenizer = slowft.load_tokenizer(large, None)
    scores = Scores(directory / "scores.json", samples, tokenizer)
    scores.add(lambda: slowft.open_model(small), {"base": SMALL, "tuned": "small, tuned"}, {"tuned": of_small})
    for weight in WEIGHTS:
        names = {"base": LARGE, "emulated": f"large, emulating small tuned, weight {weight:g}"}
        scores.add(lambda w=weight: slowft.emulate(large, small, [(of_small, w)]), names)
    filtered = {"emulated": "large, emulating small tuned, weight 1, nucleus 0.95"}
    scores.add(lambda: slowft.emulate(large, small, [(of_small, 1.0)], nucleus=0.95), filtered)
    of_large = tune(large, data, directory / "of_large", ITERS)
    scores.add(lambda: slowft.open_model(large), {"tuned": "large, tuned itself"}, {"tuned": of_large})
    down = {"emulated": "small base, with what the large one learnt"}
    scores.add(lambda: slowft.emulate(small, large, [(of_large, 1.0)]), down)
    with slowft.emulate(large, small, [(of_small, 1.0)]) as model:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": demo.QUESTION}], add_generation_prompt=True)
        run = slowft.generate(model, [prompt], max_tokens=60)
        (answer,) = run

    print("# Emulated fine-tuning of SmolLM2\n")
    print(f"`python scripts/emulate_table.py`: loss of {len(samples)} held-back answers of the Jargon File.\n")
    print(f"| model | {' | '.join(COLUMNS)} |\n|---|---|---|---|")
    for name, (loss, error, perplexity) in scores.found.items():
        print(f"| {name} | {loss:.3f} | {error:.3f} | {perplexity:.1f} |")
    print(
        f"\nAn answer of 60 tokens took {run.passes} readings; {run.accepted} of {run.drafted} drafted tokens were "
        f"right.\n\n> {demo.QUESTION}\n>\n> {' '.join(answer.text.split())}"
    )


if __name__ == "__main__":
    main()
