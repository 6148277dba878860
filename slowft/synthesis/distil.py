"""From a large model and a recipe to a small model that has learnt, and to the table that says what it was worth.

Comes in: a recipe, a teacher, a student, options of training. Goes out: a folder with the data, what the teacher holds
for probable of it, three adapters of equal steps (on what people wrote that the seeds are made of, on the made data,
and on that with the teacher's probabilities), and the losses and wins of all of them on held-back rows. A stage whose
outputs are whole, and of the same inputs, is left as it is; one that was stopped goes on.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
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
from .rows import Out, Row, answer_of, count, lines, prompt_of, read, said

BEFORE, RAW, MADE, TAUGHT = "before", "raw", "made", "taught"
WHAT = {
    BEFORE: "the student before",
    RAW: "trained on the raw seeds",
    MADE: "trained on the made data",
    TAUGHT: "... with the teacher's probabilities",
}
JUDGED = 200  # held-back questions that are answered and judged at most


class Distillation:
    """One way from a recipe to a table.

    Args:
        recipe: its model is the teacher.
        config: what the student is trained by; `model` is the student.
        top_k: of how many tokens the teacher's probabilities are kept.
        weight, temperature: how much they count, as in training; None: as usual.
        output: folder for all of it.
        held_out: rows to measure on in place of the recipe's own test set (or, without one, validation set).
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
        if held_out is not None:  # nothing of it may be trained on
            files = [*recipe.contamination.files, str(held_out.resolve())]
            recipe = replace(recipe, contamination=replace(recipe.contamination, files=files))
        self._recipe = replace(recipe, output=str((output / "data").resolve()))
        if config.memory is None:
            config = replace(config, memory=recipe.memory)
        if not (config.train_on or config.mask_prompt):
            config = replace(config, train_on="assistant")
        self._config, self._top_k, self._output, self._report = config, top_k, output, report
        self._taught = {"distil_weight": weight, "distil_temperature": temperature}
        replace(config, teacher_cache="", **self._taught).check()
        self._steps, self._held_out = output / "steps", held_out

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; the result, which `result.json` in the folder has too.

        Raises:
            SlowftError: as the stages do.
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
        adapters[TAUGHT] = self._train(TAUGHT, data, teacher_cache=str(cache), **self._taught)
        result = self._losses(held_out, adapters)
        if self._recipe.judge is not None:
            for name, share in self._wins(held_out, adapters).items():
                result["students"][name]["win_rate"] = share
        write_file(self._output / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        return result

    # --- Stages -------------------------------------------------------------------------------------

    def _raw(self, held_out: Path) -> Path | None:
        """The folder of what people wrote that the seeds are made of, but for what the held-back rows are made of."""
        r, file = self._recipe, self._output / "raw" / "train.jsonl"
        inputs = [r.path(seed.file) for seed in r.seeds if seed.file] + [held_out]
        inputs += [f for seed in r.seeds if seed.folder for f in sorted(r.path(seed.folder).rglob("*")) if f.is_file()]
        made = [f for n in ("valid", "test") if (f := self._output / "data" / f"{n}.jsonl").exists()]

        def work(counts: steps.Counts, outs: list[Out]) -> None:
            groups = {row.get("group") for other in made for row in lines(other)}
            texts = contamination.Texts(read([held_out]), r.contamination.words, seeds.fixed_parts(r))
            rows = [row for row in seeds.raw(r) if row["group"] not in groups]
            are_answered = all("messages" in row and row["messages"][-1]["role"] == "assistant" for row in rows)
            found = filters.without_contamination(lambda: iter(rows), texts, held_out.name)
            for row, _, why in found:
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
        """What the teacher holds for probable of the made data."""
        r, folder = self._recipe, self._output / "teacher"
        own = {name: value for name, value in self._rendering().items() if value is not None}
        settings = TrainConfig(model=r.model_path(r.model), data=str(train), memory=self._config.memory, **own)
        adapters = {} if r.adapter_path is None else {"adapter": str(r.path(r.adapter_path))}
        options = {"model": self._model(settings.model), "top_k": self._top_k, "rendering": own}

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

        files = [folder / "manifest.json"]
        counts = steps.run("teacher", self._steps / "teacher.json", [train], [], options, work, made=files)
        self._report.note(counts.sentence())
        return folder

    def _train(self, name: str, data: Path, **how: Any) -> Path:
        """The adapter that the student learns from a folder of data."""
        folder = self._output / "adapters" / name
        valid = data / "valid.jsonl"
        is_enough = valid.exists() and count(valid) >= self._config.batch_size
        used = data if is_enough else data / "train.jsonl"
        config = replace(self._config, data=str(used), adapter_path=str(folder), **how)
        inputs = [data / "train.jsonl", *([valid] if is_enough else [])]
        if "teacher_cache" in how:
            inputs.append(Path(how["teacher_cache"]) / "manifest.json")
        options = {key: value for key, value in asdict(config).items() if key not in OPERATIONAL}
        options |= {"model": self._model(config.model), "chat_template": self._rendering()["chat_template"]}

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
        """Loss on held-back rows of the student with each adapter and without, in one reading; and the teacher's."""
        file, r = self._output / "losses.json", self._recipe
        teacher = r.model_path(r.model)
        own = {} if r.adapter_path is None else {"adapter": r.path(r.adapter_path)}
        options = {
            "student": self._model(self._config.model),
            "teacher": self._model(teacher),
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
            of_student, of_teacher = losses(self._config.model, adapters), losses(teacher, own)
            names = {score.BASE: BEFORE}
            found = {names.get(name, name): _loss(one) for name, one in of_student.items()}
            best = of_teacher[list(of_teacher)[-1]]
            about = {"file": held_out.name, "samples": len(best.samples), "tokens": best.tokens}
            outs[0].text(json.dumps({"held_out": about, "students": found, "teacher": _loss(best)}))

        weights = [adapter / "adapters.safetensors" for adapter in adapters.values()]
        steps.run("losses", self._steps / "losses.json", [held_out, *weights], [file], options, work)
        about = {"teacher_model": teacher, "student_model": self._config.model, "iters": self._config.iters}
        return about | json.loads(file.read_text())

    def _wins(self, held_out: Path, adapters: dict[str, Path]) -> dict[str, float]:
        """How often the judge prefers each student's answer to the one in the held-back row, both orders averaged."""
        r, file = self._recipe, self._output / "wins.json"
        asked = [row for row in read([held_out]) if prompt_of(row) and answer_of(row)][:JUDGED]
        if not asked:
            self._report.note(f"Warning: {held_out} has no questions with answers, so there are no wins")
            return {}
        how = replace(r.answers, count=1, temp=0.0)
        options = {
            "student": self._model(self._config.model),
            "judge": self._model(r.model_path(r.judge.model or r.model)),
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
                questions = list(_questions(asked))
                generating.write_answers(as_student, questions, into, self._report)
                given = [said(answer_of(row)) for row, _, _ in generating.with_answers(questions, into, 1)]
                pairs[name] = [(prompt_of(row), own, said(answer_of(row))) for row, own in zip(asked, given)]
            self._report.note("Judging answers, in both orders")
            found = iter(judging.preferences(r, [pair for of in pairs.values() for pair in of], self._report))
            better = {name: [next(found) for _ in of] for name, of in pairs.items()}
            shares = {name: sum((p > 0.5) + (p == 0.5) / 2 for p in of) / len(of) for name, of in better.items()}
            counts.came_in = counts.went_out = len(asked)
            outs[0].text(json.dumps(shares))

        weights = [adapter / "adapters.safetensors" for adapter in adapters.values()]
        steps.run("wins", self._steps / "wins.json", [held_out, *weights], [file], options, work)
        return json.loads(file.read_text())

    # --- Underneath ---------------------------------------------------------------------------------

    def _begin(self, folder: Path, inputs: Sequence[Path], options: dict[str, Any]) -> None:
        """A stage that writes a folder begins, or goes on if what is there is of the same inputs."""
        file = self._steps / f"{folder.name}.begun.json"
        about = json.dumps([[steps.digest(other) for other in inputs], options], sort_keys=True, default=str)
        if not file.exists() or file.read_text() != about:
            shutil.rmtree(folder, ignore_errors=True)
            self._steps.mkdir(parents=True, exist_ok=True)
            write_file(file, about.encode())

    def _model(self, model: str) -> list[Any]:
        """What tells that a model is another one; of the teacher, its adapter too."""
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


def _loss(found: score.Score) -> dict[str, float]:
    return {"loss": -found.mean, "loss_stderr": found.standard_error}


def _questions(rows: Sequence[Row]) -> Iterator[Row]:
    for i, row in enumerate(rows):
        yield {"id": str(i), "messages": row["messages"][:-1]}


def _path(model: str) -> str:
    """A directory by its whole name, or a hub id."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model
