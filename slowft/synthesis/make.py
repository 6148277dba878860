"""Makes a data set by its recipe: runs the steps in order, and skips those that were done before.

The folder `steps/` of the output has three files for each step: its rows, the rows that it left out (with the reason
in their history), and a manifest. What the model generated is there unchanged, in the format of `slowft generate`, and
is never thrown away.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..reports.base import Report, late
from . import card, contamination, filters, generating, judging, seeds, steps
from .convert import as_messages, as_preference
from .recipe import Recipe
from .rows import Out, check_replaceable, count, lines, read
from .split import SPLITS

PREFERENCES = "preferences"  # folder of the rows with prompt, chosen and rejected


def make(recipe: Recipe, report: Report) -> list[steps.Counts]:
    """Make the data set, or what is missing of it. Returns what each step counted.

    Raises:
        ConfigError, DataError: the recipe asks for something impossible; says for what.
        SlowftError: something cannot be read or written, or one of the user's own rules failed.
    """
    return _Making(recipe, report).run()


class _Making:
    def __init__(self, recipe: Recipe, report: Report):
        self._recipe, self._report = recipe, report
        self._output = recipe.path(recipe.output)
        self._folder = self._output / "steps"
        self._done: list[steps.Counts] = []

    def run(self) -> list[steps.Counts]:
        r = self._recipe
        if not (self._folder / "split.json").exists():  # an error has to come before the model writes for hours
            check_replaceable(self._output / f"{name}.jsonl" for name in SPLITS)
        rows = self._seeds()
        if any(seed.kind == "template" or (seed.kind != "requests" and seed.writes == "question") for seed in r.seeds):
            rows = self._questions(rows)
        if r.duplicates.questions:
            rows = self._without_duplicates(rows, "question")
        rows = self._answers(rows)
        rows = self._sift(
            "rules", rows, self._rules_options(), lambda read: filters.by_rules(read(), r.rules, r.folder)
        )
        if r.judge is not None:
            rows = self._judge(rows)
        if r.duplicates.answers:
            rows = self._without_duplicates(rows, "answer")
        if r.contamination.files:
            rows = self._contamination(rows)
        if quotas := seeds.quotas(r):
            options = {"quotas": [[*topic, n] for topic, n in quotas.items()]}
            rows = self._sift("quotas", rows, options, lambda read: filters.within_quotas(read, quotas))
        files = self._split(rows)
        self._card(files)
        return self._done

    # --- Steps --------------------------------------------------------------------------------------

    def _seeds(self) -> Path:
        r = self._recipe
        inputs = [r.path(seed.file) for seed in r.seeds if seed.file]
        folders = [r.path(seed.folder) for seed in r.seeds if seed.folder]
        listed = [(folder, file) for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
        inputs += [file for _, file in listed]
        options = {"seeds": [asdict(seed) for seed in r.seeds], "seed": r.seed}
        options["documents"] = [file.relative_to(folder).as_posix() for folder, file in listed]

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            for row in seeds.rows(r):
                outs[0].row(row)
                counts.went_out += 1
            counts.came_in = counts.went_out

        return self._step("seeds", inputs, options, work)

    def _questions(self, rows: Path) -> Path:
        r, generated = self._recipe, self._folder / "questions.generated.jsonl"
        options = self._identity(r.model) | {"how": _without_speed(asdict(r.questions))}

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            without_question = [row for row in lines(rows) if "messages" not in row]
            if without_question:
                generating.write_questions(r, without_question, generated, self._report)
            sifted = generating.with_questions(lines(rows), generated)
            steps.sift(sifted, counts, *outs, self._report, count(rows))

        return self._step("questions", [rows], options, work)

    def _answers(self, rows: Path) -> Path:
        r, generated = self._recipe, self._folder / "answers.generated.jsonl"
        options = self._identity(r.model) | {"how": _without_speed(asdict(r.answers))}

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            generating.write_answers(r, lines(rows), generated, self._report)
            sifted = generating.with_answers(lines(rows), generated, r.answers.count)
            steps.sift(sifted, counts, *outs, self._report, count(rows) * r.answers.count)
            counts.came_in = count(rows)

        return self._step("answers", [rows], options, work)

    def _judge(self, rows: Path) -> Path:
        r = self._recipe
        options = self._identity(r.judge.model or r.model) | {"judge": asdict(r.judge)}

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            marks = judging.judge(r, lines(rows), self._report)
            steps.sift(judging.judged(lines(rows), marks, r.judge), counts, *outs, self._report, count(rows))

        return self._step("judge", [rows], options, work)

    def _without_duplicates(self, rows: Path, on: str) -> Path:
        how = self._recipe.duplicates
        return self._sift(
            f"{on} duplicates",
            rows,
            {"on": on, "threshold": how.threshold, "words": how.words},
            lambda reading: filters.without_duplicates(
                reading,
                on,
                how.threshold,
                how.words,
                self._watching(count(rows)),
            ),
        )

    def _contamination(self, rows: Path) -> Path:
        r = self._recipe
        files = [r.path(name) for name in r.contamination.files]
        parts = seeds.fixed_parts(r)

        def sifted(reading: filters.Reading) -> filters.Sifted:
            texts = contamination.Texts(read(files), r.contamination.words, parts)
            return filters.without_contamination(reading, texts, ", ".join(file.name for file in files))

        return self._sift("contamination", rows, {"words": r.contamination.words, "without": parts}, sifted, files)

    def _split(self, rows: Path) -> dict[str, Path]:
        """The files for training, by name: a split such as "train", or "preferences/train"."""
        r = self._recipe
        used = [split for split in SPLITS if split == "train" or getattr(r.split, split)]
        files = {split: self._output / f"{split}.jsonl" for split in used}
        pairs = {f"{PREFERENCES}/{split}": self._output / PREFERENCES / f"{split}.jsonl" for split in used}
        if r.judge is None or not r.judge.pairs:
            pairs = {}
        parts, left_out = seeds.fixed_parts(r), self._folder / "split.left-out.jsonl"
        options = {"split": asdict(r.split), "seed": r.seed, "words": r.contamination.words, "without": parts}
        options["pairs"] = bool(pairs)

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            out_of = dict(zip([*files, *pairs, "left out"], outs))
            sizes = dict.fromkeys([*files, *pairs], 0)
            shares = r.split.valid, r.split.test
            in_splits = filters.into_splits(
                lambda: lines(rows), *shares, r.seed, None, r.contamination.words, parts, self._watching(count(rows))
            )
            for row, split, why in late(self._report, in_splits, "Split", count(rows)):
                counts.came_in += 1
                if why is not None:
                    counts.leave_out(why)
                    row["history"].append({"step": "split", "split": split, "left_out": why})
                    out_of["left out"].row(row)
                    continue
                counts.went_out += 1
                row["history"].append({"step": "split", "split": split})
                sizes[split] += 1
                out_of[split].row(as_messages(row))
                if pairs and (preference := as_preference(row)) is not None:
                    out_of[f"{PREFERENCES}/{split}"].row(preference)
                    sizes[f"{PREFERENCES}/{split}"] += 1
            counts.about = {"rows": {name: n for name, n in sizes.items() if n}}
            if not sizes["train"]:
                raise DataError(
                    f"no rows are left to train on. {counts.sentence()}. Make more, or lower valid and test"
                )

        outputs = [*files.values(), *pairs.values(), left_out]
        optional = [file for name, file in (files | pairs).items() if name != "train"]
        self._run("split", [rows], options, work, outputs, optional)
        return {name: file for name, file in (files | pairs).items() if file.exists()}

    def _card(self, files: dict[str, Path]) -> None:
        r, counts = self._recipe, list(self._done)
        models = [r.model] + ([r.judge.model or r.model] if r.judge is not None else [])
        options = {"licences": [card.licence(r.model_path(name)) for name in models]}
        options |= {"card": asdict(r.card), "counts": [[c.name, c.as_dict()] for c in counts]}

        def work(counts_of_card: steps.Counts, outs: list[Out]) -> None:
            outs[0].text(card.text(r, counts, files))

        self._run("card", list(files.values()), options, work, [self._output / "README.md"], sifts_rows=False)

    # --- Underneath ---------------------------------------------------------------------------------

    def _sift(
        self,
        name: str,
        rows: Path,
        options: dict[str, Any],
        sifted: Callable[[filters.Reading], filters.Sifted],
        files: Sequence[Path] = (),
    ) -> Path:
        """A step that leaves rows out."""

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            steps.sift(sifted(lambda: lines(rows)), counts, *outs, self._report, count(rows))

        return self._step(name, [rows, *files], options, work)

    def _step(self, name: str, inputs: Iterable[Path], options: dict[str, Any], work: Callable) -> Path:
        stem = name.replace(" ", "-")
        outputs = [self._folder / f"{stem}.jsonl", self._folder / f"{stem}.left-out.jsonl"]
        self._run(name, list(inputs), options, work, outputs)
        return outputs[0]

    def _run(self, name, inputs, options, work, outputs, optional=(), sifts_rows=True) -> None:
        manifest = self._folder / f"{name.replace(' ', '-')}.json"
        counts = steps.run(name, manifest, inputs, outputs, options, work, optional)
        if not sifts_rows:
            return
        self._done.append(counts)
        self._report.note(counts.sentence())
        if not counts.went_out:
            raise DataError(f"nothing is left to go on with. {counts.sentence()}. See {outputs[-1]}")

    def _watching(self, total: int) -> filters.Watched:
        return lambda rows: late(self._report, rows, "Comparing", total)

    def _identity(self, name: str) -> dict[str, Any]:
        """Values that identify the model and its adapter. If they change, steps with the model are run again."""
        r = self._recipe
        adapter = [] if r.adapter_path is None else sorted(r.path(r.adapter_path).glob("*.safetensors"))
        return {
            "model": name,
            "files": steps.files_of(r.model_path(name)),
            "adapter": [steps.digest(file) for file in adapter],
            "compute_dtype": r.compute_dtype,
            "chat_template": None if r.chat_template is None else steps.digest(r.path(r.chat_template)),
        }

    def _rules_options(self) -> dict[str, Any]:
        r = self._recipe
        own = [name.rpartition(":")[0] for name in r.rules.own if not name.startswith("!")]
        own += [word for command in r.rules.commands for word in command.split()]
        files = [r.folder / name for name in own]
        return asdict(r.rules) | {"files": [steps.digest(file) for file in files if file.is_file()]}


def _without_speed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that change what is generated. Those for speed and memory (`wave`, drafts, `spill_kv`) do not."""
    speed = ("wave", "draft_model", "draft_lookup", "num_draft_tokens", "spill_kv")
    return {name: value for name, value in settings.items() if name not in speed}
