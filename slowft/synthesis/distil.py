"""Distils a large model into a small one by a recipe, and measures what each part of the way was worth.

Comes in: a recipe, a teacher, a student, options of training. Goes out: a folder with the data, the teacher's
probabilities of its tokens, three adapters that were trained for equal steps, and their losses and wins on held-out
rows. The adapters learn from the texts of people that the seeds are made of, from the made data, and from the made
data with the teacher's probabilities. A stage is skipped if its outputs are complete and its inputs are the same. One
that was stopped goes on.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data.datasets import load_data
from ..data.tokenizer import load_tokenizer, tokenizer_files
from ..engine.budget import default_memory
from ..engine.model import open_model
from ..errors import DataError
from ..inference import score
from ..inference.teaching import TeachingSession
from ..inference.vocabularies import check_same_vocabulary
from ..models.adapters import digest
from ..reports.base import Report, late_bar
from ..training.config import OPERATIONAL, TrainConfig
from ..training.run import run
from ..weights.tensorfile import write_file
from . import contamination, filters, generating, judging, seeds, steps
from .make import make
from .recipe import Recipe
from .rows import Out, answer_of, count, lines, prompt_of, read, without_reasoning

BEFORE, RAW, MADE, TAUGHT = "before", "raw", "made", "taught"
WHAT = {
    BEFORE: "the student before",
    RAW: "trained on the raw seeds",
    MADE: "trained on the made data",
    TAUGHT: "... with the teacher's probabilities",
}
JUDGED = 200  # the most held-out questions that are answered and judged


class Distillation:
    """All stages from a recipe to a table of results.

    Args:
        recipe: its model is the teacher.
        config: how the student is trained; `model` is the student.
        top_k: for each token the teacher's probabilities of so many tokens are kept.
        weight, temperature: how much they count in training (`distil_weight`, `distil_temperature`); None: the default.
        output: folder for all of it.
        held_out: rows to measure on. None: the recipe's own test set, or its validation set if it has no test set.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: TrainConfig,
        output: Path,
        report: Report,
        held_out: Path | None = None,
        top_k: int = 64,
        weight: float | None = None,
        temperature: float | None = None,
    ):
        if held_out is not None:  # the student must not be trained on any of it
            files = [*recipe.contamination.files, str(held_out.resolve())]
            recipe = replace(recipe, contamination=replace(recipe.contamination, files=files))
        self._recipe = replace(recipe, output=str((output / "data").resolve()))
        if config.memory is None:
            config = replace(config, memory=recipe.memory)
        if not (config.train_on or config.mask_prompt):
            config = replace(config, train_on="assistant")
        self._config, self._top_k, self._output, self._report = config, top_k, output, report
        self._teacher_options = {"distil_weight": weight, "distil_temperature": temperature}
        replace(config, teacher_cache="", **self._teacher_options).check()
        self._steps, self._held_out = output / "steps", held_out

    def run(self) -> dict[str, Any]:
        """Run the stages that are not done yet. Returns the result, which is also written to `result.json`.

        Raises:
            SlowftError: a stage failed.
        """
        if self._held_out is not None and not self._held_out.is_file():
            raise DataError(f"{self._held_out} is not there. Give --held-out a file of rows such as test.jsonl")
        student, teacher = self._config.model, self._recipe.model_path(self._recipe.model)
        check_same_vocabulary(tokenizer_files(student), tokenizer_files(teacher))
        self._report.note("Making data with the teacher")
        make(self._recipe, self._report)
        data = self._output / "data"
        held_out = self._held_out or next((f for n in ("test", "valid") if (f := data / f"{n}.jsonl").exists()), None)
        if held_out is None:
            raise DataError(
                "the recipe's split holds nothing back to measure on. Set split: {test: 0.1}, or --held-out"
            )
        raw = self._raw(held_out)
        cache = self._cache(data / "train.jsonl")
        adapters = {}
        if raw is not None:
            adapters[RAW] = self._train(RAW, raw, train_on=self._trains_answers(raw), mask_prompt=False)
        adapters[MADE] = self._train(MADE, data)
        adapters[TAUGHT] = self._train(TAUGHT, data, teacher_cache=str(cache), **self._teacher_options)
        result = self._losses(held_out, adapters)
        if self._recipe.judge is not None:
            for name, share in self._wins(held_out, adapters).items():
                result["students"][name]["win_rate"] = share
        write_file(self._output / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        return result

    # --- Stages -------------------------------------------------------------------------------------

    def _raw(self, held_out: Path) -> Path | None:
        """The folder of the texts of people that the seeds are made of, or None if they are fewer than a batch.

        Texts that rows of valid and test are made of are left out.
        """
        r, file = self._recipe, self._output / "raw" / "train.jsonl"
        inputs = [r.path(seed.file) for seed in r.seeds if seed.file] + [held_out]
        inputs += [f for seed in r.seeds if seed.folder for f in sorted(r.path(seed.folder).rglob("*")) if f.is_file()]
        made = [f for n in ("valid", "test") if (f := self._output / "data" / f"{n}.jsonl").exists()]

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            groups = {row.get("group") for file in made for row in lines(file)}
            texts = contamination.Texts(read([held_out]), r.contamination.words, seeds.fixed_parts(r))
            rows = [row for row in seeds.raw(r) if row["group"] not in groups]
            are_answered = all("messages" in row and row["messages"][-1]["role"] == "assistant" for row in rows)
            for row, _, why in filters.without_contamination(lambda: iter(rows), texts, held_out.name):
                counts.came_in += 1
                if why is not None:
                    counts.leave_out(why)
                    continue
                counts.went_out += 1
                outs[0].row(row if are_answered else {"text": "\n\n".join([prompt_of(row), answer_of(row)]).strip()})

        options = {"seeds": [asdict(seed) for seed in r.seeds], "words": r.contamination.words}
        counts = steps.run("raw seeds", self._steps / "raw-seeds.json", [*inputs, *made], [file], options, work)
        self._report.note(counts.sentence())
        if counts.went_out >= self._config.batch_size:
            return file.parent
        self._report.note(
            f"Warning: that is less than a batch of {self._config.batch_size}: nothing is trained on them"
        )
        return None

    def _trains_answers(self, folder: Path) -> str | None:
        return "assistant" if "messages" in next(lines(folder / "train.jsonl")) else None

    def _cache(self, train: Path) -> Path:
        """The folder of the teacher's probabilities of the made data."""
        r, folder = self._recipe, self._output / "teacher"
        rendering = {name: value for name, value in self._rendering().items() if value is not None}
        settings = TrainConfig(model=r.model_path(r.model), data=str(train), memory=self._config.memory, **rendering)
        adapters = {} if r.adapter_path is None else {"adapter": str(r.path(r.adapter_path))}
        options = {"model": self._identity(settings.model), "top_k": self._top_k, "rendering": rendering}

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            self._begin(folder, [train], options)
            self._report.note("Scoring the made data with the teacher")
            session = TeachingSession(settings, adapters, self._top_k, folder, self._report)
            try:
                with late_bar(self._report, session.n_visits) as on_visit:
                    session.run(on_visit)
                counts.came_in = counts.went_out = count(train)
                counts.about = {"tokens": session.work()["tokens"]}
            finally:
                session.close()

        manifests = [folder / "manifest.json"]
        counts = steps.run("teacher", self._steps / "teacher.json", [train], [], options, work, made=manifests)
        self._report.note(counts.sentence())
        return folder

    def _train(self, name: str, data: Path, **how: Any) -> Path:
        """Train the student on a folder of data. Returns the adapter's folder."""
        folder = self._output / "adapters" / name
        valid = data / "valid.jsonl"
        uses_valid = valid.exists() and count(valid) >= self._config.batch_size
        config = replace(
            self._config, data=str(data if uses_valid else data / "train.jsonl"), adapter_path=str(folder), **how
        )
        inputs = [data / "train.jsonl", *([valid] if uses_valid else [])]
        if "teacher_cache" in how:
            inputs.append(Path(how["teacher_cache"]) / "manifest.json")
        options = {key: value for key, value in asdict(config).items() if key not in OPERATIONAL}
        options |= {"model": self._identity(config.model), "chat_template": self._rendering()["chat_template"]}

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            self._begin(folder, inputs, options)
            self._report.note(f"Training the student: {WHAT[name]}")
            is_begun = any((folder / "checkpoints").glob("*.safetensors"))
            run(replace(config, resume=is_begun), self._report)
            counts.came_in = counts.went_out = count(data / "train.jsonl")

        files = [folder / "adapters.safetensors", folder / "adapter_config.json"]
        counts = steps.run(name, self._steps / f"{name}.json", inputs, [], options, work, made=files)
        if counts.was_done:
            self._report.note(counts.sentence())
        return folder

    def _losses(self, held_out: Path, adapters: dict[str, Path]) -> dict[str, Any]:
        """Losses on held-out rows: of the student without and with each adapter, in one reading, and of the teacher."""
        file, r = self._output / "losses.json", self._recipe
        teacher = r.model_path(r.model)
        teacher_adapter = {} if r.adapter_path is None else {"adapter": r.path(r.adapter_path)}
        options = {
            "student": self._identity(self._config.model),
            "teacher": self._identity(teacher),
            "how": self._rendering(),
        }

        def losses(model_path: str, adapters: dict[str, Path]) -> dict[str, score.Score]:
            c = replace(self._config, model=model_path, data=str(held_out))
            memory = default_memory() if c.memory is None else c.memory
            with open_model(
                c.model, memory, compute_dtype=c.compute_dtype, trust_remote_code=c.trust_remote_code
            ) as model:
                code = c.trust_remote_code, c.chat_template
                tokenizer = load_tokenizer(model.path, model.embedding_rows, *code)
                rows, _, _ = load_data(c.data, tokenizer, c, ("train",), model.embedding_rows)
                model.budget.measure_anew()
                return score.score(model, rows, adapters)

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            self._report.note(f"Measuring on {held_out}")
            scores, teacher_scores = losses(self._config.model, adapters), losses(teacher, teacher_adapter)
            students = {BEFORE if name == score.BASE else name: _loss(one) for name, one in scores.items()}
            of_teacher = list(teacher_scores.values())[-1]  # with its adapter, if it has one
            about = {"file": held_out.name, "samples": len(of_teacher.samples), "tokens": of_teacher.tokens}
            outs[0].text(json.dumps({"held_out": about, "students": students, "teacher": _loss(of_teacher)}))

        weights = [adapter / "adapters.safetensors" for adapter in adapters.values()]
        steps.run("losses", self._steps / "losses.json", [held_out, *weights], [file], options, work)
        about = {"teacher_model": teacher, "student_model": self._config.model, "iters": self._config.iters}
        return about | json.loads(file.read_text())

    def _wins(self, held_out: Path, adapters: dict[str, Path]) -> dict[str, float]:
        """How often the judge prefers each student's answer to the held-out row's own, averaged over both orders."""
        r, file = self._recipe, self._output / "wins.json"
        judged = [row for row in read([held_out]) if prompt_of(row) and answer_of(row)][:JUDGED]
        if not judged:
            self._report.note(f"Warning: {held_out} has no questions with answers, so there are no wins")
            return {}
        how = replace(r.answers, count=1, temp=0.0)
        options = {
            "student": self._identity(self._config.model),
            "judge": self._identity(r.model_path(r.judge.model or r.model)),
        }
        options |= {"answers": asdict(how), "prompt": r.judge.pair_prompt}

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            pairs: dict[str, list[tuple[str, str, str]]] = {}
            for name in (BEFORE, *adapters):
                self._report.note(f"Answering as {WHAT[name]}")
                path = None if name == BEFORE else str(adapters[name].resolve())
                as_student = replace(
                    r, model=_path(self._config.model), adapter_path=path, answers=how, chat_template=self._template()
                )
                into = self._output / "answers" / f"{name}.jsonl"
                into.parent.mkdir(parents=True, exist_ok=True)
                questions = [{"id": str(i), "messages": row["messages"][:-1]} for i, row in enumerate(judged)]
                generating.write_answers(as_student, questions, into, self._report)
                answered = (row for row, _, _ in generating.with_answers(questions, into, 1))
                pairs[name] = [
                    (prompt_of(row), without_reasoning(answer_of(own)), without_reasoning(answer_of(row)))
                    for row, own in zip(judged, answered)
                ]
            self._report.note("Judging answers, in both orders")
            all_pairs = [pair for of_student in pairs.values() for pair in of_student]
            preferences = iter(judging.preferences(r, all_pairs, self._report))
            better = {name: [next(preferences) for _ in of_student] for name, of_student in pairs.items()}
            shares = {name: sum((p > 0.5) + (p == 0.5) / 2 for p in ps) / len(ps) for name, ps in better.items()}
            counts.came_in = counts.went_out = len(judged)
            outs[0].text(json.dumps(shares))

        weights = [adapter / "adapters.safetensors" for adapter in adapters.values()]
        steps.run("wins", self._steps / "wins.json", [held_out, *weights], [file], options, work)
        return json.loads(file.read_text())

    # --- Underneath ---------------------------------------------------------------------------------

    def _begin(self, folder: Path, inputs: Sequence[Path], options: dict[str, Any]) -> None:
        """Begin a stage that writes a folder. What is in the folder is removed unless the same inputs made it."""
        file = self._steps / f"{folder.name}.begun.json"
        about = json.dumps([[steps.digest(path) for path in inputs], options], sort_keys=True, default=str)
        if not file.exists() or file.read_text() != about:
            shutil.rmtree(folder, ignore_errors=True)
            self._steps.mkdir(parents=True, exist_ok=True)
            write_file(file, about.encode())

    def _identity(self, model: str) -> list[Any]:
        """Values that identify the model: its name, its files and, for the teacher, its adapter."""
        r = self._recipe
        has_adapter = r.adapter_path is not None and model == r.model_path(r.model)
        return [model, steps.files_of(model), digest(r.path(r.adapter_path)) if has_adapter else None]

    def _rendering(self) -> dict[str, Any]:
        """How rows become tokens, for the teacher and the student alike."""
        names = "max_seq_length mask_prompt train_on chat_template skip_bad_samples compute_dtype trust_remote_code"
        return {name: getattr(self._config, name) for name in names.split()}

    def _template(self) -> str | None:
        template = self._config.chat_template
        return None if template is None else str(Path(template).expanduser().resolve())


def _loss(of: score.Score) -> dict[str, float]:
    return {"loss": -of.mean, "loss_stderr": of.standard_error}


def _path(model: str) -> str:
    """The absolute path of a directory, or a hub id as it is."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model
