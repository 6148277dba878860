"""Scores samples as `slowft score` does: it opens the model, reads the samples, scores them and sums up.

Comes in: a `TrainConfig` of the options that training has too, adapters, and options of scoring. Goes out: plain values
by sample and by adapter. Mistakes of the user that are cheap to find are looked for first.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..data.datasets import load_data
from ..data.files import SPLITS, Source, find
from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from ..errors import ConfigError, DataError
from . import questions, score
from .decoder import opened
from .passes import Row, n_visits

SPLIT_ORDER = ("test", "valid", "train")


class ScoringSession:
    """An opened model and the samples that it scores.

    Args:
        settings: a `TrainConfig`: `model`, `data`, `memory` and the options of reading and rendering samples.
        adapters: directories by name.
        emulation: (base that was tuned, or None; its deltas; top-p).
        split: which set of a folder is scored; None: test, or else valid, or else train.
        judge: marks such as "1-5", if samples ask for one.
        plain: prompts of questions are not written by the chat template.
        report: shows notes, and the progress of tokenising.

    Attributes:
        kind: what the samples are: "texts", "choices", "answers" or "marks".
    """

    def __init__(
        self,
        settings: Any,
        adapters: Mapping[str, str],
        split: str | None,
        judge: str | None,
        plain: bool,
        report: Any,
        emulation: tuple[str | None, Sequence[str], float | None] = (None, (), None),
    ):
        self._marks = None if judge is None else questions.parse_marks(judge)
        sources, notes = find(settings.data, settings)
        self._split, source = _of_split(settings.data, sources, split)
        first = next(iter(source.read()), None)
        if first is None:
            raise DataError(f"{settings.data} has no samples in its {self._split} set. Write one a line")
        is_question = questions.is_question(first.sample)
        self.kind = "marks" if self._marks else "texts"
        if is_question and not self._marks:
            self.kind = "choices" if "choices" in first.sample else "answers"
        _refuse_options_without_effect(self.kind, settings, plain)
        memory = default_memory() if settings.memory is None else settings.memory
        self.model = opened(
            settings.model,
            *emulation,
            memory,
            compute_dtype=settings.compute_dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        try:
            self._variants = score.load_variants(self.model, adapters)
            tokenizer = load_tokenizer(
                self.model.path, self.model.embedding_rows, settings.trust_remote_code, settings.chat_template
            )
            for note in notes:
                report.note(note)
            if self.kind == "texts":
                self._rows, self._places = _texts(settings, tokenizer, self._split, self.model, report)
            else:
                prompts = questions.Prompts(tokenizer, False if plain else None)
                self._read_questions(source, prompts, settings.max_seq_length)
            self.model.budget.measure_anew()  # tokenizer and samples are in memory now
        except BaseException:
            self.model.close()
            raise
        self._n_read = self.model.stats.total.bytes_read

    def _read_questions(self, source: Source, prompts: questions.Prompts, max_tokens: int) -> None:
        if self.kind == "marks":
            read = questions.to_judge(source.read(), prompts, self._marks, max_tokens)
            self._rows, self._places, self._mark_ids = read
            return
        self._questions = questions.questions(_of_one_kind(source, self.kind), prompts, max_tokens)
        self._places = [question.where for question in self._questions]
        self._rows: list[Row] = list(itertools.chain.from_iterable(question.rows for question in self._questions))

    @property
    def n_visits(self) -> int:
        """The sum of the numbers that `run` calls `on_visit` with."""
        return n_visits(self.model, self._rows, list(self._variants))

    def run(self, on_visit: Callable[[int], object] = lambda n: None) -> dict[str, Any]:
        """Scores of all samples, by name of the adapter."""
        if self.kind == "texts":
            return score.score_rows(self.model, self._rows, self._places, self._variants, on_visit=on_visit)
        if self.kind == "marks":
            what = self._rows, self._places, self._marks, self._mark_ids
            return questions.judge(self.model, *what, self._variants, on_visit)
        return questions.choose(self.model, self._questions, self._variants, on_visit)

    def samples(self, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Where each sample came from, and its scores by name of the adapter."""
        for i, place in enumerate(self._places):
            scores = {
                name: _of_sample(self.kind, (of_adapter.samples if self.kind == "texts" else of_adapter)[i])
                for name, of_adapter in result.items()
            }
            yield {"where": place, "scores": scores}

    def summary(self, result: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Means over all samples, by name of the adapter."""
        return {name: _SUMMARIES[self.kind](of_adapter) for name, of_adapter in result.items()}

    def work(self) -> dict[str, float]:
        """Number of samples, GB read, readings of the whole model that this equals, and peak memory in GB."""
        total = self.model.stats.total
        n_read = total.bytes_read - self._n_read
        return {
            "samples": len(self._places),
            "read_gb": n_read / 1e9,
            "readings": n_read / self.model.nbytes_on_disk,
            "peak_memory": total.peak_memory / 1e9,
        }

    def close(self) -> None:
        self.model.close()


def _of_split(data: Any, sources: dict[str, Source], split: str | None) -> tuple[str, Source]:
    """(name of the set to score, its source)."""
    name = split or next((name for name in SPLIT_ORDER if sources[name]), SPLITS[0])
    if not sources[name]:
        existing = ", ".join(name for name in SPLITS if sources[name]) or "nothing"
        raise ConfigError(f"{data} has no {name} set: there is {existing}. Leave out --split {name}")
    return name, sources[name]


def _refuse_options_without_effect(kind: str, settings: Any, plain: bool) -> None:
    if kind == "texts" and plain:
        raise ConfigError("--plain has no effect on texts: it is about the prompts of questions. Leave it out")
    given = {"--mask-prompt": settings.mask_prompt, "--train-on": settings.train_on}
    given["--skip-bad-samples"] = settings.skip_bad_samples
    for name, value in given.items():
        if value and kind != "texts":
            raise ConfigError(f"{name} has no effect on {kind}: only what answers a prompt is scored. Leave it out")


def _texts(settings: Any, tokenizer: Any, split: str, model: Any, report: Any) -> tuple[list[Row], list[str]]:
    loaded = load_data(settings.data, tokenizer, settings, [split], model.embedding_rows, report.progress)
    dataset = dict(zip(SPLITS, loaded))[split]
    if not len(dataset):
        raise DataError(f"{settings.data} has no {split} samples")
    if dataset.n_cut:
        report.note(
            f"Warning: {dataset.n_cut} of {len(dataset)} {split} samples are cut to {settings.max_seq_length} tokens"
        )
    return score.rows_of(dataset)


def _of_one_kind(source: Source, kind: str) -> Iterator:
    """The samples. A sample of another kind than the first gets a `reason` to be refused."""
    for line in source.read():
        if not line.reason and ("choices" in line.sample) != (kind == "choices"):
            line.reason = f"has {'no ' if kind == 'choices' else ''}choices, unlike the first sample"
        yield line


# --- Plain values -------------------------------------------------------------------------------------


def _of_sample(kind: str, scored: Any) -> dict[str, Any]:
    if kind == "texts":
        return {
            "tokens": scored.tokens,
            "log_probability": scored.total,
            "perplexity": scored.perplexity,
            "exact": scored.is_exact,
            "log_probabilities": [round(float(value), 6) for value in scored.log_probabilities],
        }
    if kind == "marks":
        return {"mark": scored.value, "share": scored.share, "probabilities": scored.probabilities}
    of_answer = {"exact": scored.is_exact, "log_probabilities": scored.totals}
    if kind == "answers":
        return of_answer
    chosen = {"chosen": scored.chosen, "chosen_by_length": scored.chosen_by_length}
    return chosen | {"acc": scored.is_right, "acc_norm": scored.is_right_by_length} | of_answer


def _sum_up_texts(scores: score.Score) -> dict[str, float]:
    return {
        "perplexity": scores.perplexity,
        "perplexity_stderr": scores.perplexity_error,
        "log_probability": scores.mean,
        "log_probability_stderr": scores.standard_error,
        "tokens": scores.tokens,
        "samples": len(scores.samples),
        "exact": scores.exact,
    }


def _sum_up_choices(scores: list[questions.QuestionScore]) -> dict[str, float]:
    shares = {"acc": [q.is_right for q in scores], "acc_norm": [q.is_right_by_length for q in scores]}
    shares["exact"] = [q.is_exact for q in scores]
    result: dict[str, float] = {}
    for name, values in shares.items():
        result[name], result[f"{name}_stderr"] = questions.share(values)
    return result | {"samples": len(scores)}


def _sum_up_answers(scores: list[questions.QuestionScore]) -> dict[str, float]:
    exact, error = questions.share([q.is_exact for q in scores])
    mean = sum(q.totals[0] for q in scores) / len(scores)
    return {"exact": exact, "exact_stderr": error, "log_probability": mean, "samples": len(scores)}


def _sum_up_marks(marks: list[questions.Mark]) -> dict[str, float]:
    n, mean = len(marks), sum(mark.value for mark in marks) / len(marks)
    variance = sum((mark.value - mean) ** 2 for mark in marks) / (n - 1) if n > 1 else math.nan
    return {
        "mark": mean,
        "mark_stderr": math.sqrt(variance / n),
        "share": sum(mark.share for mark in marks) / n,
        "samples": n,
    }


_SUMMARIES = {"texts": _sum_up_texts, "choices": _sum_up_choices, "answers": _sum_up_answers, "marks": _sum_up_marks}
