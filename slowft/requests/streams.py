"""Puts the pieces of a streamed answer together: the result is what would have come without streaming."""

from collections.abc import Mapping
from typing import Any

JOINED = ("content", "reasoning_content", "reasoning", "refusal", "text", "arguments")  # the texts that come in pieces


class Pieces:
    """Takes chunks, each as parsed JSON, in their order. Chunks of unknown form are ignored."""

    def __init__(self):
        self._common: dict[str, Any] = {}  # what the chunks say besides choices
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: Any) -> None:
        """Add a chunk of a chat's or a plain completion's stream."""
        if not isinstance(chunk, Mapping):
            return
        self._common |= {key: value for key, value in chunk.items() if key != "choices" and value is not None}
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, Mapping):
                self._add_choice(choice)

    def response(self) -> dict[str, Any] | None:
        """The answer as far as it has come. None if nothing has."""
        if not self._common and not self._choices:
            return None
        kind = str(self._common.get("object", "")).removesuffix(".chunk")
        choices = [self._choices[i] for i in sorted(self._choices)]
        return self._common | ({"object": kind} if kind else {}) | {"choices": choices}

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        index = choice.get("index") if isinstance(choice.get("index"), int) else 0
        whole = self._choices.setdefault(index, {"index": index})
        for key, value in choice.items():
            if key == "delta" and isinstance(value, Mapping):
                _join(whole.setdefault("message", {"role": "assistant"}), value)
            elif key == "logprobs" and isinstance(value, Mapping):
                _lengthen(whole.setdefault("logprobs", {}), value)
            elif key not in ("delta", "index"):
                _join(whole, {key: value})


def _join(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for key, value in piece.items():
        if key == "tool_calls" and isinstance(value, list):
            _join_calls(whole.setdefault("tool_calls", []), value)
        elif key in JOINED and isinstance(value, str) and isinstance(whole.get(key), str):
            whole[key] += value
        elif isinstance(value, Mapping) and isinstance(whole.get(key), dict):
            _join(whole[key], value)
        elif value is not None or key not in whole:
            whole[key] = dict(value) if isinstance(value, Mapping) else value


def _join_calls(calls: list[dict[str, Any]], pieces: list[Any]) -> None:
    for piece in pieces:
        if not isinstance(piece, Mapping):
            continue
        index = piece.get("index") if isinstance(piece.get("index"), int) else len(calls)
        while len(calls) <= min(index, len(calls)):  # adds one at most, whatever index a piece claims to have
            calls.append({})
        _join(calls[min(index, len(calls) - 1)], {key: value for key, value in piece.items() if key != "index"})


def _lengthen(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for key, value in piece.items():
        if isinstance(value, list) and isinstance(whole.get(key), list):
            whole[key] = whole[key] + value
        elif value is not None or key not in whole:
            whole[key] = value
