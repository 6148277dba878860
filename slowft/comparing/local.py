"""Has models that stream on this machine answer cells. The base and the adapters of one model share the same passes.

Comes in: cells of one model. Goes out: their answers, in the cells and in the file of answers, as they are finished.
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
    """An opened model with the adapters of several variants.

    Args:
        adapter_paths: the adapters' paths as the suite has them.
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
        """What identifies the model with this adapter in the keys of its answers."""
        digest = None if adapter is None else self._digests[adapter]
        dtype = str(self.model.engine.compute_dtype)
        return {"model": self.model.fingerprint(), "adapter": digest, "dtype": dtype}

    def asked(self, cell: Cell) -> Asked:
        """A cell's conversation as a prompt. Its id is the key of its answer, and also decides its random numbers.

        Raises:
            DataError: the chat template does not take the conversation.
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
    """The cells of local variants, grouped by their models."""
    local = sorted((c for c in cells if c.variant.upstream is None), key=lambda c: (c.variant.model, c.row, c.column))
    return [list(group) for _, group in itertools.groupby(local, key=lambda c: c.variant.model)]


def answer(suite: Suite, cells: Sequence[Cell], answers: Answers, report: Report) -> None:
    """Have cells of one model answered. Those whose answers are not in the file of answers are generated in waves."""
    adapter_paths = dict.fromkeys(c.variant.adapter_path for c in cells if c.variant.adapter_path is not None)
    with LocalModel(suite, cells[0].variant.model, list(adapter_paths)) as local:
        waiting: dict[str, list[Cell]] = {}
        prompts: list[Asked] = []
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
                prompts.append(asked)

        def take(key: str, answer: dict[str, Any]) -> None:
            answers.add(key, answer)
            for cell in waiting[key]:
                cell.answer = answer

        if prompts:
            _generate(local, prompts, report, take)


def _generate(local: LocalModel, prompts: list[Asked], report: Report, take: Callable[[str, dict], None]) -> None:
    """Generate the answers. `take` is called with each one and its key as soon as it is finished."""
    run = Generation(local.model, prompts, local.tokenizer)
    n_done = 0
    try:
        with report.generating(len(prompts)) as on_progress:
            while n_done < len(prompts):
                for result in run.step():
                    n_done += 1
                    answer = {name: getattr(result, name) for name in ("text", "finish_reason", "prompt_tokens")}
                    take(result.id, answer | {"tokens": len(result.tokens), "seconds": round(result.seconds, 3)})
                on_progress(run, n_done)
    finally:
        run.close()
    n, passes = len(prompts), run.passes
    report.note(f"{local.model.path.name}: {run.tokens} tokens of {n} answers in {passes} readings of the weights")


@contextmanager
def judging_model(suite: Suite, judge: Answering):
    """Opens a local judge. Yields (the model, its adapter as `MicroBatch` takes it, what identifies both in keys)."""
    path = judge.adapter_path
    with LocalModel(suite, judge.model, [] if path is None else [path]) as local:
        yield local, path or False, local.about(path)
