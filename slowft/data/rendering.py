"""Turns a sample into tokens by the model's chat template, decides which are trained, and checks the result.

Comes in: a `Text` or a `Chat`, and mlx-lm's tokenizer. Goes out: `Rendered` tokens. One rule stands over all: what is
rendered contains everything that the sample says, and what is trained is what its author meant to be trained. A sample
for which this is not true is refused.

Targets are counted as in mlx-lm's `default_loss`: a pair (first, last) says that the tokens from `first` to `last`,
both included, are predicted. mlx-lm's last is the number of tokens, so one padding token is predicted too.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .samples import REASONING, BadSample, Chat, Text
from .tokenizer import one_line

OVERLAP = 16  # pieces of a document share one in this many of their tokens
PATTERNS = 10_000  # sequences of roles for which the template's answer is remembered
MARK = "slowft{}mark"


@dataclass
class Rendered:
    """Tokens, and pairs (first, last) of those that are predicted. `is_cut` says that there were more tokens."""

    tokens: list[int]
    pairs: list[tuple[int, int]]
    is_cut: bool = False


class Renderer:
    """Renders samples for one tokenizer and one way to train.

    Args:
        mask_prompt: train only the last answer.
        train_on: "assistant" trains every answer; None trains everything, unless `mask_prompt` is set.
        note: is called once with each thing that a person should know.
    """

    def __init__(
        self, tokenizer, max_seq_length: int, mask_prompt: bool, train_on: str | None, note: Callable[[str], None]
    ):
        self._tokenizer, self._max_tokens = tokenizer, max_seq_length
        self._mask_prompt, self._train_on = mask_prompt, train_on
        self._note, self._noted = note, set()
        self._dropped: dict[tuple, list[int] | None] = {}  # roles -> see `_dropped_of`
        tags = {("<think>", "</think>")}
        if getattr(tokenizer, "has_thinking", False):
            tags.add((tokenizer.think_start, tokenizer.think_end))
        self._thoughts = [
            re.compile(f"\\s*{re.escape(a)}(.*?){re.escape(b)}(.*)", re.DOTALL) for a, b in tags if a and b
        ]

    def render(self, sample: Text | Chat) -> Iterator[Rendered]:
        """The tokens of a sample: one sequence of at most `max_seq_length` tokens, or several for a document.

        Raises:
            BadSample: the sample cannot be trained on, or not as its author meant it.
            DataError: no sample of this form can be trained on, such as a conversation without a chat template.
        """
        if isinstance(sample, Chat):
            tokens, pairs = self._chat(sample)
        else:
            tokens = self._text(sample.text)
            pairs = [(0, len(tokens))]
            if sample.is_document:
                yield from self._pieces(tokens)
                return
        yield self._cut(tokens, pairs)

    def _cut(self, tokens: list[int], pairs: list[tuple[int, int]]) -> Rendered:
        n, kept = len(tokens), tokens[: self._max_tokens]
        within = [(first, min(last, len(kept))) for first, last in pairs if max(1, first) <= len(kept) - 1]
        if not any(min(last, len(kept) - 1) >= max(1, first) for first, last in within):
            prompt = pairs[0][0] if pairs else n
            why = f"it has {n} tokens, {prompt} of them prompt"
            if prompt and n > len(kept):
                why = f"its prompt alone has {prompt} tokens and --max-seq-length is {self._max_tokens}"
            raise BadSample(f"has no token to train on: {why}. Remove it, or raise --max-seq-length")
        return Rendered(kept, within, n > len(kept))

    # --- Texts --------------------------------------------------------------------------------------

    def _text(self, text: str) -> list[int]:
        if self._mask_prompt or self._train_on:
            option = "--mask-prompt" if self._mask_prompt else "--train-on assistant"
            raise DataError(f"the data hold plain text, which has no prompt to mask. Leave out {option}")
        tokens = self._encode(text, add_special_tokens=True)
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if end is None:
            raise DataError(
                "the tokenizer has no end token, with which every text ends. Name one as eos_token in the model's "
                "tokenizer_config.json"
            )
        if begin is not None and begin != end and tokens[:2] == [begin, begin]:
            tokens = tokens[1:]
            self._note_once(f"Texts begin with {self._tokenizer.bos_token} already; the tokenizer's own is left out")
        if not tokens:
            raise BadSample("is empty. Remove it")
        return tokens if tokens[-1] == end else [*tokens, end]

    def _pieces(self, tokens: list[int]) -> Iterator[Rendered]:
        overlap = self._max_tokens // OVERLAP
        for start in range(0, max(len(tokens) - overlap, 1), self._max_tokens - overlap):
            piece = tokens[start : start + self._max_tokens]
            if len(piece) > 1:
                yield Rendered(piece, [(overlap if start else 0, len(piece))])

    # --- Conversations ------------------------------------------------------------------------------

    def _chat(self, chat: Chat) -> tuple[list[int], list[tuple[int, int]]]:
        if not self._tokenizer.has_chat_template:
            raise DataError(
                "the tokenizer has no chat template, by which conversations, prompts and completions become text. Give "
                '--chat-template FILE, or write the data as {"text": ...}, as the model is to see it'
            )
        self._check_meaning(chat)
        chat, text, places = self._rendered(self._with_known_roles(chat))
        tokens = self._encode(text)
        self._note_missing_end(chat, tokens)
        if self._train_on:
            answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and m.get("weight", 1)]
            return tokens, self._answers(chat, text, tokens, places, answers)
        if not self._mask_prompt:
            return tokens, [(0, len(tokens))]
        return tokens, [(self._offset(chat, text, tokens, places), len(tokens))]

    def _rendered(self, chat: Chat) -> tuple[Chat, str, list[tuple[int, int]]]:
        """(The chat, its text, where each message stands in it).

        Most templates expect a tool call's arguments as an object. Some (DeepSeek's) expect JSON, which is tried next.
        """
        try:
            return chat, (text := self._apply(chat)), self._locate(chat, text)
        except BadSample as e:
            written = [_with_arguments_as_json(message) for message in chat.messages]
            if written == chat.messages:
                raise
            chat = Chat(written, chat.tools, chat.n_prompt)
            try:
                return chat, (text := self._apply(chat)), self._locate(chat, text)
            except BadSample:
                raise e from None

    def _apply(self, chat: Chat) -> str:
        try:
            return self._template(chat)
        except Exception as e:  # a template may raise anything
            raise BadSample(f"cannot be tokenised: the chat template says: {one_line(e)}") from None

    def _check_meaning(self, chat: Chat) -> None:
        roles = [message["role"] for message in chat.messages]
        if (self._mask_prompt or self._train_on) and roles[-1] != "assistant":
            raise BadSample(f"ends with a message of {roles[-1]}: there is no answer to train after it")
        if not self._train_on and any(not message.get("weight", 1) for message in chat.messages):
            raise BadSample("has a message of weight 0, which only --train-on assistant leaves untrained")
        if self._mask_prompt and roles[:-1].count("assistant"):
            self._note_once(
                "Of conversations with several answers, --mask-prompt trains the last; --train-on assistant, all"
            )
        begin = self._tokenizer.bos_token
        for i, message in enumerate(chat.messages):
            if begin and begin in message["content"]:
                raise BadSample(
                    f"has the begin token {begin} in message {i + 1}, which the chat template writes itself. Remove it"
                )

    def _with_known_roles(self, chat: Chat) -> Chat:
        """The chat, with the role "developer" renamed to "system" unless the template names it: few templates do.

        Raises:
            BadSample: the template leaves out a message because of its role.
        """
        if any(message["role"] == "developer" for message in chat.messages):
            if "developer" not in str(getattr(self._tokenizer, "chat_template", "")):
                renamed = [m | {"role": "system"} if m["role"] == "developer" else m for m in chat.messages]
                chat = Chat(renamed, chat.tools, chat.n_prompt)
                self._note_once("The chat template does not know the role developer: it is written as system")
        if dropped := self._dropped_of(chat):
            i = dropped[0]
            role = chat.messages[i]["role"]
            raise BadSample(f"has a message that the chat template leaves out: message {i + 1}, of the role {role}")
        return chat

    def _dropped_of(self, chat: Chat) -> list[int] | None:
        """Numbers of the messages that the template leaves out because of their roles; None if it refuses the roles.

        The template is tried with marks as contents: a short text could be found anywhere in what it writes.
        """
        key = tuple((m["role"], tuple(m), not m["content"]) for m in chat.messages), chat.tools is not None
        if key not in self._dropped:
            marks = {i: MARK.format(i) for i, message in enumerate(chat.messages) if message["content"]}
            messages = [m | {"content": marks[i]} if i in marks else m for i, m in enumerate(chat.messages)]
            try:
                text = self._template(Chat(messages, chat.tools, chat.n_prompt))
                dropped: list[int] | None = [i for i, mark in marks.items() if mark not in text]
            except Exception:  # it may accept the real contents
                dropped = None
            if len(self._dropped) >= PATTERNS:
                self._dropped.clear()
            self._dropped[key] = dropped
        return self._dropped[key]

    def _locate(self, chat: Chat, text: str) -> list[tuple[int, int]]:
        """Where each message stands in the rendered text, (begin, end) in characters.

        Raises:
            BadSample: the text lacks something that the sample says.
        """
        places, at = [], 0
        for i, message in enumerate(chat.messages):
            begin = end = None
            for what, forms, is_needed in self._parts(message, is_last=i == len(chat.messages) - 1):
                found = _find(text, forms, at if end is None else end)
                if found is None and is_needed:
                    role = message["role"]
                    raise BadSample(
                        f"is not what the chat template makes of it: {what} of message {i + 1} ({role}) is left out or "
                        "changed"
                    )
                if found is not None:
                    begin, end = found[0] if begin is None else min(begin, found[0]), max(found[1], end or 0)
            at = at if end is None else end
            places.append((at if begin is None else begin, at))
        for name in _names(chat.tools):
            if name not in text:
                raise BadSample(f"has the tool {name}, which the chat template leaves out")
        return places

    def _parts(self, message: dict[str, Any], is_last: bool) -> Iterator[tuple[str, list[str], bool]]:
        """(What it is, how it may be written, whether it must be there) for each part of a message, in order.

        Reasoning must be there in the last message only: templates drop it from earlier answers, as in use.
        """
        content = message["content"].strip()
        for key in REASONING:
            if message.get(key, "").strip():
                yield f"the {key}", _forms(message[key]), is_last
        if message["role"] == "assistant" and (thought := self._thought(content)):
            yield "the reasoning", _forms(thought[0]), is_last
            content = thought[1].strip()
        if content:
            yield "the content", _forms(content), True
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            yield "the tool call", [function["name"]], True
            arguments = function["arguments"]
            for value in _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments):
                yield "a tool call's argument", _forms(value), True

    def _thought(self, content: str) -> tuple[str, str] | None:
        """(The reasoning, what follows it) if an answer has both in its content."""
        matches = (pattern.match(content) for pattern in self._thoughts)
        match = next((match for match in matches if match and match[1].strip()), None)
        return (match[1], match[2]) if match else None

    def _offset(self, chat: Chat, text: str, tokens: list[int], places: Sequence[tuple[int, int]]) -> int:
        """The token at which the answer begins: after the prompt's tokens, as in mlx-lm, if the text begins with them.

        It may not: the prompt may begin reasoning that the answer does not have, or one token may span the end of the
        prompt. Then the answer begins where the texts or tokens of the two first differ.
        """
        prompt = self._prompt(chat, chat.n_prompt)
        if prompt is not None and text.startswith(prompt) and tokens[: len(own := self._encode(prompt))] == own:
            if len(prompt) <= self._end_of_answer(chat, places):
                return len(own)
        return self._n_tokens(text[: self._begin(chat, chat.n_prompt, text, places)], tokens)

    def _end_of_answer(self, chat: Chat, places: Sequence[tuple[int, int]]) -> int:
        return places[chat.n_prompt][1] if chat.n_prompt < len(places) else 0

    def _answers(
        self, chat: Chat, text: str, tokens: list[int], places: Sequence[tuple[int, int]], answers: Sequence[int]
    ) -> list[tuple[int, int]]:
        pairs = []
        for i in answers:
            begin = self._begin(chat, i, text, places)
            end = len(text)
            if i < len(chat.messages) - 1:
                # train what the template writes after the answer too, above all its end token
                part = self._try_template(Chat(chat.messages[: i + 1], chat.tools, i))
                after = part[_end_of(part, text[places[i][0] : places[i][1]]) :] if part else ""
                end = places[i][1] + _common(text[places[i][1] :], after)
            first = self._n_tokens(text[:begin], tokens)
            last = len(tokens) if end == len(text) else self._n_tokens(text[:end], tokens)
            if last > first:
                pairs.append((first, last - 1))
        return pairs

    def _begin(self, chat: Chat, i: int, text: str, places: Sequence[tuple[int, int]]) -> int:
        """The character at which message `i`, an answer, begins: where the prompt that asks for it ends."""
        before = places[i - 1][1] if i else 0
        prompt = self._prompt(chat, i)
        begin = _common(text, prompt) if prompt else 0
        return min(begin, places[i][0]) if begin > before or (not i and begin) else places[i][0]

    def _prompt(self, chat: Chat, n: int) -> str | None:
        """The prompt for an answer after `n` messages; None if the template fails."""
        return self._try_template(Chat(chat.messages[:n], chat.tools, n), add_generation_prompt=True)

    def _note_missing_end(self, chat: Chat, tokens: list[int]) -> None:
        ends = set(self._tokenizer.eos_token_ids)
        if chat.messages[-1]["role"] == "assistant" and not ends & set(tokens[-8:]):
            self._note_once(
                "The chat template ends an answer without an end token: the model does not learn where to stop"
            )

    # --- The tokenizer ------------------------------------------------------------------------------

    def _template(self, chat: Chat, **options) -> str:
        messages = [{key: value for key, value in m.items() if key != "weight"} for m in chat.messages]
        return self._tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, **options)

    def _try_template(self, chat: Chat, **options) -> str | None:
        try:
            return self._template(chat, **options)
        except Exception:
            return None

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadSample("has half of a character in it (a lone surrogate, as \\ud83d). Remove it") from None
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _n_tokens(self, begin: str, tokens: list[int]) -> int:
        """How many whole tokens of the text lie within `begin`, the text's beginning."""
        return _common(tokens, self._encode(begin))

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)


def _forms(value: str) -> list[str]:
    """How a template may write a value: as it is, or in JSON."""
    value = value.strip()
    return list(dict.fromkeys([value, *(json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]))


def _leaves(value: Any) -> Iterator[str]:
    """The names and values in a tool call's arguments, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _with_arguments_as_json(message: dict[str, Any]) -> dict[str, Any]:
    if not (calls := message.get("tool_calls")):
        return message
    written = []
    for call in calls:
        function = call.get("function", call)
        function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        written.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": written}


def _names(tools: Any) -> list[str]:
    """The names of the functions that a model is offered."""
    if not isinstance(tools, list):
        return []
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [f["name"] for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)]


def _find(text: str, forms: Sequence[str], start: int) -> tuple[int, int] | None:
    """Where one of the forms stands: the first place after `start` or, if there is none, in the whole text."""
    for at in (start, 0):
        found = [(place, place + len(form)) for form in forms if (place := text.find(form, at)) >= 0]
        if found:
            return min(found)
    return None


def _end_of(text: str, part: str) -> int:
    """Where the last occurrence of a part ends; the end of the text if there is none."""
    at = text.rfind(part) if part else -1
    return at + len(part) if at >= 0 else len(text)


def _common(a: Sequence, b: Sequence) -> int:
    """Length of the beginning that two texts, or two lists of tokens, have in common."""
    if a[: len(b)] == b:
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
