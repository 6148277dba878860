"""Recorded requests are answered anew by another model, in waves; each new answer is a row beside the old one.

What was answered anew by the same model with the same options is not answered again, so a run that was stopped goes on.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from ..errors import DataError
from ..inference.prompts import Asked
from ..inference.session import Session
from ..requests.filters import Filter
from ..requests.store import Recorded, RequestStore
from ..requests.texts import plain_messages, prompt_messages
from .steps import Counts

AT_ONCE = 1000  # rows whose prompts are in memory, and go through in waves
LIMITS = ("max_completion_tokens", "max_tokens")  # of an answer, as a request has them
BY = "slowft"  # key of the new row's request: what answered, and how
# Of a request that is not taken over: how another model sampled
SAMPLING = {
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "seed",
    "n",
    "logprobs",
    "top_logprobs",
    "metadata",
    "store",
}


def relabel(
    store: RequestStore, filters: Sequence[Filter], session: Session, model: str, report: Any, limit: int | None = None
) -> Counts:
    """Answer all rows that the filters are true of, newest first.

    Args:
        model: what the new rows say that they were answered by. limit: rows at most.
    """
    counts, about = Counts("relabel"), json.loads(json.dumps(session.about()))  # as the file gives it back
    rows = _up_to(limit, _rows(store, filters))
    while some := [*islice(rows, AT_ONCE)]:
        left: list[tuple[Recorded, dict[str, Any], Asked]] = []
        for row in some:
            counts.came_in += 1
            body = _body(row, model, about)
            asked, why = _asked(session, row)
            if why is None and _is_done(store, row, body):
                counts.went_out += 1
                counts.about["done before"] = counts.about.get("done before", 0) + 1
            elif why is None:
                left.append((row, body, asked))
            else:
                counts.leave_out(why)
        if left:
            _answer(store, session, left, model, report)
            counts.went_out += len(left)
    return counts


def _up_to(limit: int | None, rows: Iterator[Recorded]) -> Iterator[Recorded]:
    """Rows up to the `limit`th request: new answers, which are newer than all of them, would else use it up."""
    n = 0
    for row in rows:
        yield row
        n += row.relabels is None
        if n == limit:
            return


def _rows(store: RequestStore, filters: Sequence[Filter]) -> Iterator[Recorded]:
    """Rows page by page: a reading that lasted for hours would keep SQLite from tidying its file."""
    before = None
    while page := store.list(filters, before, 200):
        yield from page
        before = page[-1].id


def _body(row: Recorded, model: str, about: dict[str, Any]) -> dict[str, Any]:
    """The request as it would have been made of the new model."""
    asked = row.request if isinstance(row.request, dict) else {}
    return {key: value for key, value in asked.items() if key not in SAMPLING} | {"model": model, BY: about}


def _is_done(store: RequestStore, row: Recorded, body: dict[str, Any]) -> bool:
    return any(new.status == "complete" and new.request == body for new in map(store.get, store.relabelled(row.id)))


def _asked(session: Session, row: Recorded) -> tuple[Any, str | None]:
    """(what the model is asked, None) or (None, why it cannot be)."""
    if row.relabels is not None:
        return None, "answers anew themselves"
    messages = plain_messages(prompt_messages(row.request))
    if messages is None:
        return None, "with images or sounds"
    if not messages:
        return None, "without a prompt"
    if row.request.get("tools") or row.request.get("functions"):
        return None, "with tools"
    one = messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages
    try:
        asked = session.asked(one)
    except DataError:
        return None, "of a form that the chat template does not take"
    limits = (row.request.get(name) for name in LIMITS)
    limit = next((n for n in limits if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
    return replace(asked, id=row.id, max_tokens=limit), None


def _answer(store: RequestStore, session: Session, left, model: str, report: Any) -> None:
    run = session.answers([asked for _, _, asked in left])
    n = 0
    try:
        with report.generating(len(left)) as tell:
            while n < len(left):
                for answer in run.step():
                    row, body, _ = left[answer.number]
                    store.add([_row(row, body, model, answer)])
                    n += 1
                tell(run, n)
    finally:
        run.close()


def _row(row: Recorded, body: dict[str, Any], model: str, answer: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}}
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.tokens)}
    response = {"object": "chat.completion", "model": model, "usage": usage}
    response["choices"] = [choice | {"finish_reason": answer.finish_reason}]
    return {
        "body": body,
        "response": response,
        "path": "/v1/chat/completions",
        "source": "relabel",
        "status_code": 200,
        "tags": row.tags,
        "relabels": row.id,
    }
