"""An opened model to generate with, as `slowft generate` does: settings in, answers out.

It stands between the command and `generate`: it opens model, tokenizer, adapter and draft model, and continues files of
answers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from ..engine.in_memory import ModelInMemory, load_in_memory
from ..engine.model import compute_dtype_of
from ..errors import ConfigError
from ..models import adapters
from ..models.loading import resolve
from ..requests import pruning
from .decoder import opened
from .generate import Generation
from .prompts import Asked, Prompt, Template, TemplateOptions, asked, read
from .results import Results
from .sampling import Sampling, SamplingOptions
from .vocabularies import check_same_vocabulary
from .waves import KeyValues


@dataclass(frozen=True)
class Settings(KeyValues, TemplateOptions, SamplingOptions):
    """How to generate; names and meanings are `mlx_lm.generate`'s where that has them."""

    max_tokens: int = 256
    stop: Sequence[str] = ()
    extra_eos_token: Sequence[str] = ()
    draft_model: str | None = None
    draft_lookup: bool = False
    num_draft_tokens: int | None = None
    wave: int | None = None
    emulate: str | None = None
    delta: Sequence[str] = ()
    delta_top_p: float | None = None

    def part(self, kind: type) -> Any:
        """The settings that are fields of `kind`, as one of these."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind) if hasattr(self, f.name)})


class Session:
    """An opened model with all that generating needs. A context manager.

    Args:
        model: directory or hub id. memory: the ceiling; None: half of the machine's memory.
    """

    def __init__(
        self,
        model: str,
        settings: Settings,
        adapter_path: str | None = None,
        memory: str | int | None = None,
        compute_dtype: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
    ):
        self.settings = settings
        self._sampling, self._kept = settings.part(Sampling), settings.part(KeyValues)
        rules = [] if adapter_path is None else pruning.load(adapter_path)
        self._template = replace(settings.part(Template), pruning=rules)
        memory = default_memory() if memory is None else memory
        how = {"compute_dtype": compute_dtype, "trust_remote_code": trust_remote_code}
        emulation = settings.emulate, settings.delta, settings.delta_top_p
        self.model = opened(model, *emulation, memory, adapter_path, **how)
        try:
            self._adapter_path = None if adapter_path is None else Path(adapter_path).expanduser()
            code = trust_remote_code, chat_template
            self.tokenizer = load_tokenizer(self.model.path, self.model.embedding_rows, *code)
            for token in settings.extra_eos_token:
                if not token.isdecimal() and token not in self.tokenizer.get_vocab():
                    raise ConfigError(
                        f"--extra-eos-token {token}: the tokenizer has no such token. Give one, or its id"
                    )
                self.tokenizer.add_eos_token(token)
            self._draft = "lookup" if settings.draft_lookup else None
            if settings.draft_model is not None:
                self._draft = self._load_draft(settings.draft_model, compute_dtype, trust_remote_code)
        except BaseException:
            self.model.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.model.close()

    def asked(self, prompt: Prompt) -> Asked:
        """One prompt, with the token ids that the model is given."""
        return asked([prompt], self.tokenizer, self._template)[0]

    def read(self, file: Path) -> list[Asked]:
        """The prompts of a file."""
        return read(file, self.tokenizer, self._template)

    def with_question(self, messages: Sequence[dict], question: str) -> list[dict]:
        """The messages of a conversation with one more question."""
        if not self.tokenizer.has_chat_template or self._template.ignore_chat_template:
            raise ConfigError("a conversation needs a chat template, and there is none. Give a --prompt")
        return [*messages, {"role": "user", "content": question}]

    def answers(self, prompts: Sequence[Asked], on_text: Callable[[Asked, str], None] | None = None) -> Generation:
        """The run that answers prompts: an iterator of answers, as they are finished."""
        s = self.settings
        return Generation(
            self.model,
            prompts,
            self.tokenizer,
            s.max_tokens,
            self._sampling,
            s.stop,
            s.wave,
            self._kept,
            self._draft,
            s.num_draft_tokens,
            on_text=on_text,
        )

    def answer_into(self, file: Path, prompts: Sequence[Asked], report) -> None:
        """Answer all prompts that `file` does not answer yet, and append them to it.

        Raises:
            ConfigError: the file holds answers of another run.
        """
        results = Results(file, prompts, self.about())
        try:
            numbers = [i for i in range(len(prompts)) if i not in results.done]
            left = [prompts[i] for i in numbers]
            if results.done:
                then = "going on with the others" if left else "nothing is left to do"
                report.note(f"{file} has {len(results.done)} of {len(prompts)} answers; {then}")
            if left:
                run = self.answers(left)
                report.note(_planned(run))
                begin = time.perf_counter()
                with report.generating(len(left)) as show_progress:
                    while len(results.done) < len(prompts):
                        for answer in run.step():
                            number = numbers[answer.number]
                            results.add(answer.with_number(number))
                            results.done.add(number)
                        show_progress(run, len(left) - (len(prompts) - len(results.done)))
                run.close()
                report.generated(run, time.perf_counter() - begin, file)
            results.finish()
        finally:
            results.close()

    def about(self) -> dict[str, Any]:
        """The keys of a row of a file of answers that say how it was generated."""
        s = self.settings
        others = {"max_tokens": s.max_tokens, "stop": list(s.stop), "extra_eos_token": list(s.extra_eos_token)}
        template = self._template
        others |= {f.name: getattr(template, f.name) for f in fields(template)}
        kept = {name: value for name, value in vars(self._kept).items() if value != getattr(KeyValues(), name)}
        sampler = self._sampling.as_dict() | kept | {name: value for name, value in others.items() if value}
        adapter = None if self._adapter_path is None else adapters.digest(self._adapter_path)
        about = {"sampler": sampler, "seed": s.seed, "model": self.model.fingerprint(), "adapter": adapter}
        return about if s.emulate is None else about | {"emulated": self.model.about}

    def _load_draft(self, path: str, compute_dtype: str | None, trust_remote_code: bool) -> ModelInMemory:
        """Load a draft model into memory; it must have the same vocabulary."""
        directory = resolve(path)
        check_same_vocabulary(self.model.path, directory)
        return load_in_memory(directory, compute_dtype_of(compute_dtype), trust_remote_code, self.model.budget)


def _planned(run: Generation) -> str:
    """A line about the plan: rows at a time, blocks that stay in memory, peak memory, expected speed."""
    plan, text = run.plan, f"{run.wave} of {run.prompts} rows at a time"
    if plan is None:
        return text
    if plan.is_ordinary:
        text += ", all weights stay in memory"
    else:
        text += f", {plan.resident_blocks} of {len(plan.job.blocks)} blocks stay in memory"
        text += f", {plan.read_nbytes / 1e9:.2f} GB a reading"
    text += f"; peak {plan.peak_nbytes / 1e9:.2f} of {plan.memory / 1e9:.2f} GB"
    if run.predicted_s is not None:
        text += f", about {float(f'{run.wave / run.predicted_s:.2g}'):g} tok/s"
    return text
