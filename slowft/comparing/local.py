"""Answers by models that stream on this machine: all variants of one model, base and adapters, in the same passes.

Comes in: cells of one model. Goes out: their answers, as they are finished, in the cells and in the file of answers.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from ..engine.model import StreamedModel, open_model
from ..errors import DataError
from ..inference.generate import Generation
from ..inference.prompts import Asked, Template
from ..models import adapters
from ..reports.base import Report
from ..requests import pruning, texts
from .answers import Answers, key_of
from .cells import Cell
from .suite import Answering, Suite

MAX_TOKENS = 256  # as in `slowft generate`


class LocalModel:
    """An opened model with the adapters of several variants, and digests of all.

    Args:
        adapter_paths: as the suite names them.
    """

    def __init__(self, suite: Suite, name: str, adapter_paths: Sequence[str]):
        memory = default_memory() if suite.memory is None else suite.memory
        how = {"compute_dtype": suite.compute_dtype, "trust_remote_code": suite.trust_remote_code}
        self.model: StreamedModel = open_model(suite.model_path(name), memory, **how)
        try:
            self.tokenizer = load_tokenizer(self.model.path, self.model.embedding_rows, suite.trust_remote_code)
            self._digests: dict[str, str] = {}
            self._pruning: dict[str | None, list[str]] = {None: []}
            for path in adapter_paths:
                directory = suite.path(path)
                self._digests[path] = adapters.digest(directory)
                self._pruning[path] = pruning.load(directory)
                self.model.add_adapter(path, directory)
        except BaseException:
            self.model.close()
            raise

    def __enter__(self) -> "LocalModel":
        return self

    def __exit__(self, *_) -> None:
        self.model.close()

    def about(self, adapter: str | None) -> dict[str, Any]:
        """What the answers of the model with this adapter are known by."""
        digest = None if adapter is None else self._digests[adapter]
        dtype = str(self.model.engine.compute_dtype)
        return {"model": self.model.fingerprint(), "adapter": digest, "dtype": dtype}

    def asked(self, cell: Cell) -> Asked:
        """A cell's conversation for the wave; its id is the key of its answer, which its random numbers belong to.

        Raises:
            DataError: the chat template does not take it.
        """
        variant = cell.variant
        config = dict(variant.chat_template_config or {})
        if "tools" in cell.scenario.body:
            config["tools"] = cell.scenario.body["tools"]
        messages = [
            m if isinstance(m.get("content"), str) or not m.get("content") else m | {"content": _text(m)}
            for m in cell.messages
        ]
        template = Template(chat_template_config=config, pruning=self._pruning[variant.adapter_path])
        prompt: Any = messages
        if not self.tokenizer.has_chat_template and [m["role"] for m in messages] in (["user"], ["system", "user"]):
            prompt = "\n\n".join(m["content"] for m in messages)
        tokens = template.tokens(self.tokenizer, prompt)
        if not tokens:
            raise DataError("the prompt is empty")
        sampling, stop, limit = variant.sampling(), variant.stop or [], variant.max_tokens or MAX_TOKENS
        about = self.about(variant.adapter_path) | {
            "tokens": tokens,
            "max_tokens": limit,
            "stop": stop,
            "sampling": sampling.as_dict(),
        }
        adapter = variant.adapter_path or False
        return Asked(key_of(about), cell.messages, tokens, limit, adapter, sampling, stop)


def _text(message: dict[str, Any]) -> str:
    parts = message["content"]
    if any(isinstance(part, dict) and not isinstance(part.get("text"), str) for part in parts):
        raise DataError("a message has parts other than text, such as images, which local models are not given")
    return texts.content_text(parts)


def by_model(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of local variants, model by model."""
    local = sorted((c for c in cells if c.variant.upstream is None), key=lambda c: (c.variant.model, c.row, c.column))
    return [list(group) for _, group in itertools.groupby(local, key=lambda c: c.variant.model)]


def answer(suite: Suite, cells: Sequence[Cell], answers: Answers, report: Report) -> None:
    """Have cells of one model answered: those that are not in the file of answers, in waves."""
    adapter_paths = dict.fromkeys(c.variant.adapter_path for c in cells if c.variant.adapter_path is not None)
    with LocalModel(suite, cells[0].variant.model, list(adapter_paths)) as local:
        waiting: dict[str, list[Cell]] = {}
        left: list[Asked] = []
        for cell in cells:
            try:
                asked = local.asked(cell)
            except DataError as e:
                cell.error = str(e)
                continue
            cell.key = asked.id
            if (known := answers.get(asked.id)) is not None:
                cell.answer, cell.was_known = known, True
            elif asked.id in waiting:
                waiting[asked.id].append(cell)  # two variants ask the same
            else:
                waiting[asked.id] = [cell]
                left.append(asked)
        if left:
            _generate(local, left, report, lambda key, found: _take(waiting[key], key, found, answers))


def _take(cells: Sequence[Cell], key: str, found: dict[str, Any], answers: Answers) -> None:
    answers.add(key, found)
    for cell in cells:
        cell.answer = found


def _generate(local: LocalModel, left: list[Asked], report: Report, take: Callable[[str, dict], None]) -> None:
    run = Generation(local.model, left, local.tokenizer)
    done = 0
    try:
        with report.generating(len(left)) as tell:
            while done < len(left):
                for one in run.step():
                    done += 1
                    found = {"text": one.text, "finish_reason": one.finish_reason, "prompt_tokens": one.prompt_tokens}
                    take(one.id, found | {"tokens": len(one.tokens), "seconds": round(one.seconds, 3)})
                tell(run, done)
    finally:
        run.close()
    report.note(
        f"{local.model.path.name}: {run.tokens} tokens of {len(left)} answers in {run.passes} readings of the weights"
    )


@contextmanager
def judging_model(suite: Suite, judge: Answering):
    """(the model, its adapter as `MicroBatch` takes it, what it is known by) of a local judge."""
    path = judge.adapter_path
    with LocalModel(suite, judge.model, [] if path is None else [path]) as local:
        yield local, path or False, local.about(path)
