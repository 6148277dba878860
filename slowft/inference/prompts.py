"""Makes token ids of prompts: of texts, of conversations, and of files of either.

As in `mlx_lm.generate`, a prompt goes through the chat template as a user's message. Without a template it is plain
text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import SUFFIXES, Source
from ..errors import ConfigError, DataError, first_line
from ..requests import pruning
from .sampling import Sampling

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """One prompt.

    Attributes:
        id: the user's name for it, or its number. prompt: as it was given.
        tokens: int ids, with those that the chat template adds.
        max_tokens, adapter, sampling, stop: options for this prompt, as in `Generation`; None: those of the run.
    """

    id: Any
    prompt: Prompt
    tokens: list[int]
    max_tokens: int | None = None
    adapter: bool | str | None = None
    sampling: Sampling | None = None
    stop: Sequence[str] | None = None


@dataclass(frozen=True)
class TemplateOptions:
    """How prompts become conversations. Names and meanings are those of the options of `mlx_lm.generate`.

    Attributes:
        system_prompt: goes before each prompt. prefill_response: each answer begins with it.
        ignore_chat_template: the model continues prompts as they are.
        chat_template_config: variables for the template.
    """

    system_prompt: str | None = None
    prefill_response: str | None = None
    ignore_chat_template: bool = False
    chat_template_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Template(TemplateOptions):
    """Turns prompts into token ids. `pruning`: texts that are removed from messages, see `requests.pruning`."""

    pruning: Sequence[str] = ()

    def tokens(self, tokenizer: Any, prompt: Prompt) -> list[int]:
        """Token ids of a text (a user's message) or of messages. A prompt of token ids is returned as it is.

        Raises:
            DataError: messages are given, and there is no chat template or it refuses them.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return list(prompt)
        plain = self.ignore_chat_template or not tokenizer.has_chat_template
        if isinstance(prompt, str):
            if plain:
                text = "".join(part for part in (self.system_prompt, prompt, self.prefill_response) if part)
                return encode(tokenizer, text)
            messages = [{"role": "user", "content": prompt}]
        else:
            messages = list(prompt)
            if plain:
                reason = "--ignore-chat-template was given" if self.ignore_chat_template else "the model has none"
                raise DataError(f"messages need a chat template, and {reason}. Give texts as prompts")
        if self.system_prompt is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        messages = pruning.apply(self.pruning, messages)
        if self.prefill_response is not None:
            messages = [*messages, {"role": "assistant", "content": self.prefill_response}]
        continues_answer = bool(messages) and messages[-1].get("role") == "assistant"
        try:
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=continues_answer,
                add_generation_prompt=not continues_answer,
                **self.chat_template_config,
            )
        except Exception as e:
            raise DataError(f"the model's chat template does not take these messages: {first_line(e)}") from None
        return tokenizer.encode(text, add_special_tokens=False)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain text. The tokenizer's begin token is added unless the text begins with it."""
    has_begin_token = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_special_tokens=not has_begin_token)


def asked(prompts: Iterable[Prompt], tokenizer: Any, template: Template) -> list[Asked]:
    """Token ids of prompts. Their numbers are their ids."""
    return [Asked(i, prompt, template.tokens(tokenizer, prompt)) for i, prompt in enumerate(prompts)]


def read(file: Path, tokenizer: Any, template: Template) -> list[Asked]:
    """Prompts of a file: lines of {"prompt": ...} or {"messages": [...]}, perhaps with "id" and "max_tokens".

    Raises:
        DataError: the file cannot be read, a line has another form (the error gives its number), or two have one id.
    """
    if not file.is_file():
        what = "a folder" if file.is_dir() else "not there"
        raise DataError(f'{file} is {what}. Give a file with lines of {{"prompt": ...}} or {{"messages": [...]}}')
    if not file.name.lower().removesuffix(".gz").endswith(tuple(SUFFIXES)):
        raise DataError(f"{file} is of no kind that slowft reads. Give lines of JSON: prompts.jsonl")
    prompts, places = [], {}
    for line in Source([file]).read():
        if line.reason:
            raise DataError(f"{line.place} {line.reason}")
        sample = line.sample
        prompt = sample.get("prompt", sample.get("messages"))
        if not isinstance(prompt, (str, list)) or not prompt:
            raise DataError(f'{line.place} has neither a "prompt" nor "messages". Give it one of them')
        if isinstance(prompt, list) and not all(isinstance(message, dict) for message in prompt):
            raise DataError(f'{line.place}: "messages" must be a list of {{"role": ..., "content": ...}}')
        name, limit = sample.get("id", len(prompts)), sample.get("max_tokens")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise DataError(f'{line.place}: "max_tokens" must be a number of 1 or more, got {limit!r}')
        if (key := repr(name)) in places:
            raise DataError(f"{line.place} has the id {name!r}, as {places[key]} has. Give each its own")
        places[key] = line.place
        try:
            prompts.append(Asked(name, prompt, template.tokens(tokenizer, prompt), limit))
        except DataError as e:
            raise DataError(f"{line.place}: {e}") from None
        if not prompts[-1].tokens:
            raise DataError(f"{line.place} has an empty prompt. Remove it")
    if not prompts:
        raise DataError(f'{file} holds no prompts. Write one a line: {{"prompt": ...}} or {{"messages": [...]}}')
    return prompts


def check(prompts: Sequence[Asked], embedding_rows: int | None) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
        ConfigError: a prompt has no tokens. DataError: a token id is outside of the model's.
    """
    for one in prompts:
        if not one.tokens:
            raise ConfigError("a prompt is empty. Give some text")
        if embedding_rows is not None and not 0 <= min(one.tokens) <= max(one.tokens) < embedding_rows:
            raise DataError(f"prompt {one.id!r} has a token id outside of the model's {embedding_rows} ids")
