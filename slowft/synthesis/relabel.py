"""Has another model answer recorded requests anew, in waves. Each new answer is a row beside the old one.

A request that the same model answered before, with the same options, is not answered again. So a run that was stopped
goes on.
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

AT_ONCE = 1000  # rows whose prompts are in memory at the same time
LIMITS = ("max_completion_tokens", "max_tokens")  # fields of a request that limit its answer's tokens
BY = "slowft"  # the key of the new row's request that says which model answered, with which options
# Fields of a request that the new one does not have, because they say how the other model sampled
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
        model: the name that the new rows give as their model. limit: the most rows.
    """
    counts, about = Counts("relabel"), json.loads(json.dumps(session.about()))  # as it will be read from the file
    rows = _up_to(limit, _rows(store, filters))
    while batch := [*islice(rows, AT_ONCE)]:
        to_answer: list[tuple[Recorded, dict[str, Any], Asked]] = []
        for row in batch:
            counts.came_in += 1
            body = _body(row, model, about)
            asked, why = _asked(session, row)
            if why is None and _is_done(store, row, body):
                counts.went_out += 1
                counts.about["done before"] = counts.about.get("done before", 0) + 1
            elif why is None:
                to_answer.append((row, body, asked))
            else:
                counts.leave_out(why)
        if to_answer:
            _answer(store, session, to_answer, model, report)
            counts.went_out += len(to_answer)
    return counts


def _up_to(limit: int | None, rows: Iterator[Recorded]) -> Iterator[Recorded]:
    """Rows up to the `limit`th request. Answers made anew do not count: they are the newest and would use it up."""
    n_requests = 0
    for row in rows:
        yield row
        n_requests += row.relabels is None
        if n_requests == limit:
            return


def _rows(store: RequestStore, filters: Sequence[Filter]) -> Iterator[Recorded]:
    """Rows, read page by page, because SQLite cannot tidy its file while one reading lasts for hours."""
    before = None
    while page := store.list(filters, before, 200):
        yield from page
        before = page[-1].id


def _body(row: Recorded, model: str, about: dict[str, Any]) -> dict[str, Any]:
    """The request as the new model would have received it."""
    request = row.request if isinstance(row.request, dict) else {}
    return {key: value for key, value in request.items() if key not in SAMPLING} | {"model": model, BY: about}


def _is_done(store: RequestStore, row: Recorded, body: dict[str, Any]) -> bool:
    return any(new.status == "complete" and new.request == body for new in map(store.get, store.relabelled(row.id)))


def _asked(session: Session, row: Recorded) -> tuple[Any, str | None]:
    """(what the model is asked, None), or (None, why it cannot be asked)."""
    if row.relabels is not None:
        return None, "answers anew themselves"
    messages = plain_messages(prompt_messages(row.request))
    if messages is None:
        return None, "with images or sounds"
    if not messages:
        return None, "without a prompt"
    if row.request.get("tools") or row.request.get("functions"):
        return None, "with tools"
    prompt = messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages
    try:
        asked = session.asked(prompt)
    except DataError:
        return None, "of a form that the chat template does not take"
    limits = (row.request.get(name) for name in LIMITS)
    limit = next((n for n in limits if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
    return replace(asked, id=row.id, max_tokens=limit), None


def _answer(store: RequestStore, session: Session, to_answer, model: str, report: Any) -> None:
    run = session.answers([asked for _, _, asked in to_answer])
    n_done = 0
    try:
        with report.generating(len(to_answer)) as on_progress:
            while n_done < len(to_answer):
                for answer in run.step():
                    row, body, _ = to_answer[answer.number]
                    store.add([_row(row, body, model, answer)])
                    n_done += 1
                on_progress(run, n_done)
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
