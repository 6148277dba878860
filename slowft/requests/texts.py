"""What a request asks and what its response says, out of OpenAI's JSON: chat, plain completions, responses.

Comes in: a request's body or a response, as parsed JSON of any shape. Goes out: text, messages, counts. What is not
there is empty or None; nothing here raises, because what an upstream answers is recorded whatever it is.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

BETWEEN = "\n"  # what a message says in several places


def prompt_messages(body: Any) -> list[dict[str, Any]]:
    """Messages that were asked: a chat's, or a plain prompt as one of the user's."""
    if not isinstance(body, Mapping):
        return []
    messages = body.get("messages")
    if isinstance(messages, list):
        return [message for message in messages if isinstance(message, dict)]
    asked = body.get("prompt", body.get("input"))
    if isinstance(asked, list) and asked and all(isinstance(part, dict) for part in asked):
        messages = asked  # of the responses API
    elif isinstance(asked, str) or isinstance(asked, list):
        messages = [{"role": "user", "content": asked}]
    else:
        messages = []
    if isinstance(body.get("instructions"), str):
        messages = [{"role": "system", "content": body["instructions"]}, *messages]
    return messages


def answer_message(response: Any) -> dict[str, Any] | None:
    """The first choice's message, with tool calls and reasoning where there are any; None of what is no answer."""
    if not isinstance(response, Mapping):
        return None
    choice = _first(response.get("choices"))
    if choice is None:
        return _of_output(response.get("output"))
    if isinstance(choice.get("message"), dict):
        return {key: value for key, value in choice["message"].items() if value is not None}
    if isinstance(choice.get("text"), str):
        return {"role": "assistant", "content": choice["text"]}
    return None


def _of_output(output: Any) -> dict[str, Any] | None:
    """The message in a response of the responses API."""
    messages = [m for m in output if isinstance(m, dict) and m.get("type") == "message"] if _is_list(output) else []
    return {"role": "assistant", "content": content_text(messages[-1].get("content"))} if messages else None


def content_text(content: Any) -> str:
    """The text of a message's content, which is a string or parts; images and sounds have none."""
    if isinstance(content, str):
        return content
    if not _is_list(content):
        return ""
    texts = (
        part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content
    )
    return "".join(text for text in texts if isinstance(text, str))


def message_text(message: Mapping[str, Any]) -> str:
    """All that a message says: content, reasoning, refusal, names and arguments of tool calls."""
    return BETWEEN.join(part for part in _said(message) if part)


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    for key in ("reasoning_content", "reasoning", "refusal"):
        if isinstance(message.get(key), str):
            yield message[key]
    yield content_text(message.get("content"))
    calls = message.get("tool_calls")
    for call in calls if _is_list(calls) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            yield str(function.get("name") or "")
            yield arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Messages whose contents are strings, as training takes them; None if there are images or sounds among them."""
    found = []
    for message in messages:
        content = message.get("content")
        if _is_list(content):
            if any(not isinstance(part, str) and not _is_text(part) for part in content):
                return None
            content = content_text(content)
        elif content is None:
            content = ""
        kept = {key: message[key] for key in OF_MESSAGE if message.get(key) is not None}
        found.append({"role": str(message.get("role", "user")), "content": content} | kept)
    return found


# What of a message is kept beside role and content
OF_MESSAGE = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def of_prompt(body: Any) -> list[str]:
    """What `prompt` and `text` filters look in: all that each message says."""
    if isinstance(body, Mapping) and isinstance(body.get("unparsed"), str):
        return [body["unparsed"]]
    return [message_text(message) for message in prompt_messages(body)]


def of_answer(response: Any) -> list[str]:
    """What `answer` and `text` filters look in: all that each choice says."""
    if not isinstance(response, Mapping):
        return []
    choices = response.get("choices")
    if not _is_list(choices):
        message = _of_output(response.get("output"))
        return [message_text(message)] if message else []
    answers = (answer_message({"choices": [choice]}) for choice in choices)
    return [message_text(answer) for answer in answers if answer is not None]


def opening(body: Any) -> str:
    """What the requests of one conversation have in common: the user's first message; without one, the first."""
    messages = prompt_messages(body)
    first = next((m for m in messages if m.get("role") == "user"), messages[0] if messages else {})
    return message_text(first)


def finish_reason(response: Any) -> str | None:
    """Of the first choice."""
    choice = _first(response.get("choices")) if isinstance(response, Mapping) else None
    reason = choice.get("finish_reason") if choice else None
    return reason if isinstance(reason, str) else None


def usage(response: Any) -> tuple[int | None, int | None]:
    """(prompt tokens, completion tokens), where the response says."""
    found = response.get("usage") if isinstance(response, Mapping) else None
    if not isinstance(found, Mapping):
        return None, None
    counts = [found.get(key, found.get(other)) for key, other in NAMES_OF_USAGE]
    return tuple(n if isinstance(n, int) and not isinstance(n, bool) else None for n in counts)  # type: ignore


NAMES_OF_USAGE = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))


def _first(choices: Any) -> dict[str, Any] | None:
    return choices[0] if _is_list(choices) and choices and isinstance(choices[0], dict) else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
