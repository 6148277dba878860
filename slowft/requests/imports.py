"""Reads logs that other programs wrote: JSON lines in several forms, which differ in their keys.

Comes in: files. Goes out: rows as `RequestStore.add` takes them. If lines are malformed, one error names them all by
file and line, and nothing is imported.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import Found, Source
from ..errors import DataError, printable
from .filters import seconds

SHOWN = 20  # how many malformed lines an error names
SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
CHAT, PLAIN, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FORMS = (
    '{"request", "response"}, {"input", "output"} of OpenPipe, lines of OpenAI\'s batches, stored completions with '
    'their messages, {"messages"} that end with an answer, or {"prompt", "completion"}'
)
# The keys that several programs have for the same thing
BEGAN = ("began", "requestedAt", "requested_at", "created_at", "timestamp", "created")
ENDED = ("receivedAt", "received_at")
STATUS = ("status_code", "statusCode")
ERROR = ("error", "errorMessage", "error_message")
IN_RESPONSE = {"id", "object", "created", "choices", "usage", "system_fingerprint", "service_tier", "request_id"}
MILLISECONDS = 1e11  # seconds since 1970 are fewer until the year 5138

Row = dict[str, Any]


class _Bad(Exception):
    """Says why a line is not imported. The line's place is put before this text."""


def read(files: Sequence[Path]) -> Iterator[Row]:
    """Read rows from files. A batch's answers find their questions, by `custom_id`, in any of the files.

    Raises:
        DataError: a file cannot be read; or, after all lines were read, some are malformed.
    """
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not there. Give a file of JSON lines")
        if not file.name.lower().endswith(SUFFIXES):
            raise DataError(f"{file} is of no kind that is imported. Known are {', '.join(SUFFIXES)}")
    questions = {}
    for found in Source(list(files)).read():
        if found.sample is not None and "custom_id" in found.sample and isinstance(found.sample.get("body"), dict):
            questions[str(found.sample["custom_id"])] = found.sample
    bad: list[str] = []
    n_bad = n = 0
    for found in Source(list(files)).read():
        try:
            row = _row(found, questions)
            if row is None:
                continue
            n += 1
            if not n_bad:
                yield row
        except _Bad as e:
            n_bad += 1
            if len(bad) < SHOWN:
                bad.append(f"{found.place} {printable(str(e))}")
    if n_bad == 1:
        raise DataError(f"{bad[0]}. Nothing was imported")
    if n_bad:
        more = f"\n  and {n_bad - len(bad)} more" if n_bad > len(bad) else ""
        raise DataError(f"{n_bad} lines cannot be imported, so nothing was:" + "".join(f"\n  {b}" for b in bad) + more)
    if not n:
        raise DataError(f"{', '.join(map(str, files))} holds no answered requests")


def _row(found: Found, questions: Mapping[str, Row]) -> Row | None:
    """A line as a row. None for a batch's question, which comes with its answer."""
    if found.reason:
        raise _Bad(found.reason)
    line = found.sample
    if "custom_id" in line:
        return _of_batch(line, questions)
    for is_form, read_as in READERS:
        if is_form(line):
            return read_as(line)
    raise _Bad(f"has the keys {', '.join(map(str, line)) or '(none)'}; known are {FORMS}")


def _of_batch(line: Row, questions: Mapping[str, Row]) -> Row | None:
    """A line of OpenAI's batch output, with the question from the batch's input."""
    if isinstance(line.get("body"), dict):
        return None
    question = questions.get(str(line["custom_id"]))
    if question is None:
        raise _Bad(f"answers {line['custom_id']!r}, which no line asks. Give the batch's input file too")
    response = line.get("response") if isinstance(line.get("response"), dict) else {}
    row = {"body": question["body"], "path": question.get("url", CHAT), "response": response.get("body")}
    row |= {"status_code": response.get("status_code"), "tags": {"custom_id": str(line["custom_id"])}}
    return _completed(row, {"error": line.get("error")})


def _of_pair(line: Row, request: Any, response: Any) -> Row:
    if not isinstance(request, dict):
        raise _Bad("has a request that is no object")
    if "body" in request and isinstance(request["body"], dict):  # and the path beside it
        line, request = {"path": request.get("path", request.get("url")), **line}, request["body"]
    if not isinstance(response, dict | type(None)):
        raise _Bad("has a response that is no object")
    return _completed({"body": request, "response": response}, line)


def _of_stored(line: Row) -> Row:
    """A chat completion with the messages that it answers: an export of OpenAI's stored completions."""
    question = line.get("messages", line.get("input"))
    response = {key: value for key, value in line.items() if key in IN_RESPONSE | {"model"}}
    body = {key: value for key, value in line.items() if key not in IN_RESPONSE | {"metadata", "input", "tags"}}
    tags = line.get("tags", line.get("metadata"))
    return _completed({"body": body | {"messages": question}, "response": response}, {"tags": tags} | line)


def _of_conversation(line: Row) -> Row:
    """A sample of a data set, whose last message is the answer."""
    messages = line["messages"]
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise _Bad("has messages that are no list of objects")
    *before, answer = messages
    if answer.get("role") != "assistant":
        raise _Bad("ends without an answer: its last message is not the assistant's")
    if not before:
        raise _Bad("has an answer and no question")
    body = {key: line[key] for key in ("model", "tools", "tool_choice", "response_format") if line.get(key) is not None}
    response = {"choices": [{"index": 0, "message": answer}]}
    return _completed({"body": body | {"messages": before}, "response": response}, line)


def _of_completion(line: Row) -> Row:
    if not isinstance(line["prompt"], str) or not isinstance(line["completion"], str):
        raise _Bad("has a prompt or a completion that is no text")
    body = {"prompt": line["prompt"]} | ({"model": line["model"]} if isinstance(line.get("model"), str) else {})
    response = {"choices": [{"index": 0, "text": line["completion"]}]}
    return _completed({"body": body, "response": response, "path": PLAIN}, line)


def _first(line: Row, names: Sequence[str]) -> Any:
    return next((line[name] for name in names if line.get(name) is not None), None)


def _completed(row: Row, line: Row) -> Row:
    """Add to the row what the line says besides request and response."""
    body, response = row["body"], row["response"]
    if not any(isinstance(body.get(key), list | str) and body[key] for key in ("messages", "prompt", "input")):
        raise _Bad("has a request without messages or prompt")
    if "model" not in body and (model := line.get("model") or (response or {}).get("model")):
        row["body"] = body = {**body, "model": model}
    row.setdefault("path", line.get("path") or (RESPONSES if "input" in body else PLAIN if "prompt" in body else CHAT))
    row["tags"] = row.get("tags") or _tags(line.get("tags"))
    row["status_code"] = row.get("status_code") or _first(line, STATUS)
    row["kept"] = line.get("kept") if isinstance(line.get("kept"), bool) else None
    row["is_broken"] = line.get("status") in ("begun", "broken")  # a line that slowft exported
    error = _first(line, ERROR) or (response or {}).get("error")
    if isinstance(error, dict):
        error = error.get("message") or str(error)
    if error is None and not row["is_broken"] and not (response or {}).keys() & {"choices", "output"}:
        error = "no answer was recorded"
    row["error"] = error
    began, ended = (_time(line, names) for names in (BEGAN, ENDED))
    row["began"] = began if began is not None else _time(response or {}, ("created",))
    if began is not None and ended is not None:
        row["duration_s"] = ended - began
    elif isinstance(line.get("duration_s"), int | float):
        row["duration_s"] = line["duration_s"]
    return row


def _time(line: Row, names: Sequence[str]) -> float | None:
    value = _first(line, names)
    if value is None:
        return None
    try:
        at = seconds(value)
    except Exception:
        raise _Bad(f"has a time that cannot be read: {value!r}") from None
    return at / 1000 if at > MILLISECONDS else at


def _tags(tags: Any) -> dict[str, str]:
    if tags is None:
        return {}
    if not isinstance(tags, dict):
        raise _Bad("has tags that are no object")
    return {str(name): str(value) for name, value in tags.items() if name and value is not None}


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda line: all(key in line for key in keys)


# (whether a line has this form, how it is read); the first that fits is used
READERS: tuple[tuple[Callable[[Row], bool], Callable[[Row], Row]], ...] = (
    (_has("request", "response"), lambda line: _of_pair(line, line["request"], line["response"])),
    (_has("reqPayload"), lambda line: _of_pair(line, line["reqPayload"], line.get("respPayload"))),
    (lambda line: isinstance(line.get("input"), dict), lambda line: _of_pair(line, line["input"], line.get("output"))),
    (lambda line: "choices" in line and ("messages" in line or "input" in line), _of_stored),
    (_has("messages"), _of_conversation),
    (_has("prompt", "completion"), _of_completion),
)
