"""Reads what a request asks and what its response says, in OpenAI's JSON of chats, plain completions and responses.

Comes in: a request's body or a response, as parsed JSON of any shape. Goes out: text, messages, counts. What is missing
is empty or None. Nothing here raises, because an upstream's answer is recorded whatever it is.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

BETWEEN = "\n"  # what separates the texts of one message
# The keys of a message that `plain_messages` keeps besides role and content.
OTHER_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
# The names of both numbers of tokens: in chats and completions, in the responses API.
USAGE_KEYS = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))


def prompt_messages(body: Any) -> list[dict[str, Any]]:
    """The messages of a request. A plain prompt is one message of the user."""
    if not isinstance(body, Mapping):
        return []
    messages = body.get("messages")
    if isinstance(messages, list):
        return [message for message in messages if isinstance(message, dict)]
    prompt = body.get("prompt", body.get("input"))
    if isinstance(prompt, list) and prompt and all(isinstance(part, dict) for part in prompt):
        messages = prompt  # the responses API has messages here
    elif isinstance(prompt, str | list):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = []
    if isinstance(body.get("instructions"), str):
        messages = [{"role": "system", "content": body["instructions"]}, *messages]
    return messages


def answer_message(response: Any) -> dict[str, Any] | None:
    """The first choice's message, with its tool calls and reasoning. None if the response is no answer."""
    if not isinstance(response, Mapping):
        return None
    choice = _first(response.get("choices"))
    if choice is None:
        return _output_message(response.get("output"))
    if isinstance(choice.get("message"), dict):
        return {key: value for key, value in choice["message"].items() if value is not None}
    if isinstance(choice.get("text"), str):
        return {"role": "assistant", "content": choice["text"]}
    return None


def _output_message(output: Any) -> dict[str, Any] | None:
    """The message in a response of the responses API."""
    outputs = output if isinstance(output, list) else []
    messages = [m for m in outputs if isinstance(m, dict) and m.get("type") == "message"]
    return {"role": "assistant", "content": content_text(messages[-1].get("content"))} if messages else None


def content_text(content: Any) -> str:
    """The text of a message's content, which is a string or a list of parts. Images and sounds have no text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (
        part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content
    )
    return "".join(text for text in texts if isinstance(text, str))


def message_text(message: Mapping[str, Any]) -> str:
    """All texts of a message: content, reasoning, refusal, names and arguments of tool calls."""
    return BETWEEN.join(text for text in _texts(message) if text)


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    for key in ("reasoning_content", "reasoning", "refusal"):
        if isinstance(message.get(key), str):
            yield message[key]
    yield content_text(message.get("content"))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            yield str(function.get("name") or "")
            yield arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with strings as contents, as training takes them. None if they have images or sounds."""
    plain = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            if any(not isinstance(part, str) and not _is_text(part) for part in content):
                return None
            content = content_text(content)
        elif content is None:
            content = ""
        others = {key: message[key] for key in OTHER_KEYS if message.get(key) is not None}
        plain.append({"role": str(message.get("role", "user")), "content": content} | others)
    return plain


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def of_prompt(body: Any) -> list[str]:
    """The texts that `prompt` and `text` filters search: those of each message."""
    if isinstance(body, Mapping) and isinstance(body.get("unparsed"), str):
        return [body["unparsed"]]
    return [message_text(message) for message in prompt_messages(body)]


def of_answer(response: Any) -> list[str]:
    """The texts that `answer` and `text` filters search: those of each choice."""
    if not isinstance(response, Mapping):
        return []
    choices = response.get("choices")
    if not isinstance(choices, list):
        message = _output_message(response.get("output"))
        return [message_text(message)] if message else []
    answers = (answer_message({"choices": [choice]}) for choice in choices)
    return [message_text(answer) for answer in answers if answer is not None]


def opening(body: Any) -> str:
    """What the requests of one conversation share: the text of the user's first message, or else of the first."""
    messages = prompt_messages(body)
    first = next((m for m in messages if m.get("role") == "user"), messages[0] if messages else {})
    return message_text(first)


def finish_reason(response: Any) -> str | None:
    """The finish reason of the first choice."""
    choice = _first(response.get("choices")) if isinstance(response, Mapping) else None
    reason = choice.get("finish_reason") if choice else None
    return reason if isinstance(reason, str) else None


def usage(response: Any) -> tuple[int | None, int | None]:
    """(prompt tokens, completion tokens); None where the response does not say."""
    said = response.get("usage") if isinstance(response, Mapping) else None
    if not isinstance(said, Mapping):
        return None, None
    counts = [said.get(key, said.get(other)) for key, other in USAGE_KEYS]
    return tuple(n if isinstance(n, int) and not isinstance(n, bool) else None for n in counts)  # type: ignore


def _first(choices: Any) -> dict[str, Any] | None:
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
