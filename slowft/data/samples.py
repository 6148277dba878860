"""Reads a sample, in any of the forms in which people write texts and conversations.

Comes in: an object from a file. Goes out: a `Text` or a `Chat`, or `BadSample` with the reason. A sample that is not
understood is refused. Nothing is guessed, and nothing that the sample says is left out.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from .files import Features

# What "from" may be in "conversations", whose turns are {"from": ..., "value": ...} as in ShareGPT -> the role.
FROM = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content


class BadSample(Exception):  # noqa: N818  (it is counted and reported, and no error of the program)
    """A sample that must not be trained on. The text continues a sentence that begins with its place: "is empty"."""


@dataclass
class Text:
    """Plain text. A document may be long, and is trained in pieces."""

    text: str
    is_document: bool = False


@dataclass
class Chat:
    """Messages with a role and a content that is a string. The first `n_prompt` are the prompt."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    n_prompt: int


def form_of(sample: dict[str, Any], features: Features) -> tuple[str, ...]:
    """The keys that decide a sample's form. If a sample has several, mlx-lm's order decides.

    Raises:
        BadSample: the sample has no such keys.
    """
    forms = (features.prompt, features.completion), (features.chat,), (features.text,)
    for form in (*forms, ("conversations",), ("instruction", "output")):
        if all(key in sample for key in form):
            return form
    raise BadSample(
        f"has the keys {', '.join(map(str, sample)) or '(none)'}; known are {features.text}, {features.prompt} with "
        f"{features.completion}, {features.chat}, conversations, or instruction with output"
    )


def understand(sample: dict[str, Any], features: Features, is_document: bool = False) -> Text | Chat:
    """What a sample says. Samples that mlx-lm can read are read in the same way.

    Raises:
        BadSample: the sample has no known form, or a part of it has a wrong type.
    """
    form = form_of(sample, features)
    if form == (features.prompt, features.completion):
        prompt = _turns(sample[features.prompt], "user", features.prompt)
        answer = _turns(sample[features.completion], "assistant", features.completion)
        return _chat([*prompt, *answer], sample, n_prompt=len(prompt))
    if form == (features.chat,):
        return _chat(_messages(sample[features.chat], features.chat), sample)
    if form == (features.text,):
        text = string(sample[features.text], f"its {features.text}")
        if not text.strip():
            raise BadSample("is empty. Remove it")
        return Text(text, is_document)
    if form == ("conversations",):
        turns = _messages(sample["conversations"], "conversations")
        if isinstance(sample.get("system"), str) and sample["system"].strip():
            turns = [{"role": "system", "content": sample["system"]}, *turns]
        return _chat(turns, sample)
    return _chat(_instruction(sample), sample)


def _instruction(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Turns of Alpaca's form, {"instruction", "input", "output"}, with "system" and "history" if they are there."""
    question = string(sample["instruction"], "its instruction")
    given = sample.get("input")
    if given is not None and (given := string(given, "its input")).strip():
        question = f"{question}\n\n{given}"
    turns = []
    if (system := sample.get("system")) is not None and string(system, "its system").strip():
        turns.append({"role": "system", "content": system})
    for pair in _as_list(sample.get("history") or [], "its history"):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise BadSample("has a history that is no list of [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": sample["output"]}]


def _turns(value: Any, role: str, key: str) -> list[Any]:
    """A prompt or completion: a string, or messages."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return value
    return [{"role": role, "content": value, "key": key}]


def _messages(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise BadSample(f"has {key} that are {_kind(value)}: messages are a list of objects with role and content")
    if not value:
        raise BadSample(f"has no messages in {key}. Remove it")
    turns = []
    for i, turn in enumerate(value):
        if isinstance(turn, dict) and "from" in turn and "value" in turn and "role" not in turn:
            if not isinstance(turn["from"], str) or turn["from"] not in FROM:
                raise BadSample(f"has a turn from {turn['from']!r}; known are {', '.join(FROM)}")
            turn = {"role": FROM[turn["from"]], "content": turn["value"]}
        if not isinstance(turn, dict):
            raise BadSample(
                f"has {_kind(turn)} for message {i + 1}: messages are a list of objects with role and content"
            )
        turns.append(turn)
    return turns


def _chat(turns: list[Any], sample: dict[str, Any], n_prompt: int | None = None) -> Chat:
    messages = [_message(turn, i, len(turns)) for i, turn in enumerate(turns)]
    tools = sample.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parsed(tools, "its tools")
    if tools is not None and not isinstance(tools, list | str):
        raise BadSample(f"has tools that are {_kind(tools)}, not a list")
    return Chat(messages, tools or None, len(messages) - 1 if n_prompt is None else n_prompt)


def _message(turn: dict[str, Any], i: int, n: int) -> dict[str, Any]:
    """The message with a string as content, and with objects as arguments of its tool calls."""
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise BadSample(f"has no role in message {i + 1}")
    name = f"its {turn['key']}" if "key" in turn else f"the content of message {i + 1} ({role})"
    message = {key: value for key, value in turn.items() if key != "key" and value is not None}
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_call(call, i) for call in _as_list(calls, f"the tool calls of message {i + 1}")]
    elif "tool_calls" in message:
        del message["tool_calls"]
    content = turn.get("content")
    if content is None and (calls or any(message.get(key) for key in REASONING)):
        content = ""
    elif isinstance(content, list | tuple):
        content = "".join(_part(part, i) for part in content)
    message["content"] = content = string(content, name)
    if role == "assistant" and not (content.strip() or calls):
        raise BadSample(f"has an empty answer (message {i + 1} of {n}). Remove it")
    for key in REASONING:
        if key in message:
            message[key] = string(message[key], f"the {key} of message {i + 1}")
    return message


def _part(part: Any, i: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
        return string(part.get("text"), f"a part of message {i + 1}")
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise BadSample(f"has a part of kind {kind} in message {i + 1}: only text can be trained on")


def _call(call: Any, i: int) -> dict[str, Any]:
    """A tool call. If its arguments are a JSON string, they become an object, which chat templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSample(f"has a tool call without a function's name in message {i + 1}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments or "{}", f"the tool call's arguments in message {i + 1}")
    if arguments is not None and not isinstance(arguments, dict):
        raise BadSample(f"has tool call arguments in message {i + 1} that are {_kind(arguments)}, not an object")
    function = {**function, "arguments": arguments or {}}
    return {**call, "function": function} if "function" in call else function


def _as_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise BadSample(f"has {_kind(value)} for {what}, not a list")
    return list(value)


def parsed(text: str, what: str) -> Any:
    """The value of JSON. Raises BadSample if it is none; `what` says where it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadSample(f"has no JSON in {what}") from None


def string(value: Any, what: str) -> str:
    """The value, if it is text. Raises BadSample if it is not; `what` names it."""
    if isinstance(value, str):
        return value
    if value is None:
        raise BadSample(f"has a value of the wrong kind: {what} is null")
    if isinstance(value, float) and math.isnan(value):
        raise BadSample(f"has a value of the wrong kind: {what} is NaN, an empty cell of a table")
    raise BadSample(f"has a value of the wrong kind: {what} is {_kind(value)}, not text. Put it into quotation marks")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")
