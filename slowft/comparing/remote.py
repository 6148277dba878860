"""Has servers with OpenAI's interface answer cells: one chat completion a cell, several at a time.

A request that failed is tried again if that may help. An error is written into its cell and never ends the comparison.
The API key is read from the environment and is not stored anywhere. Redirections are not followed, because they would
send the key elsewhere.
"""

import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, SlowftError, printable
from ..platform import tls_context
from ..reports.base import Report, late
from ..requests import texts
from ..version import __version__
from .answers import Answers, key_of
from .cells import Cell
from .suite import Answering, Suite, Variant

MAX_TOKENS = 256  # the same as for local models
ANSWER_NBYTES = 32 << 20  # a larger response is refused; no answer comes near it
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
# fields that a suite and a request's body have in common. OpenAI lacks some, so they are sent only if they are given
OPTIONAL = ("top_p", "min_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop")


class AskingFailed(Exception):  # noqa: N818  (the name says what happened)
    """An answer did not come; says why. `after`: seconds to wait before trying again, None if that would not help."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


def body_of(variant: Variant, cell: Cell) -> dict[str, Any]:
    """The request's body for a cell. Fields that `extra` sets to null are left out."""
    body: dict[str, Any] = {"model": variant.model, "messages": cell.messages}
    body |= {"max_tokens": variant.max_tokens or MAX_TOKENS, "temperature": variant.temp or 0.0}
    given = variant.given()
    body |= {name: given[name] for name in OPTIONAL if name in given}
    body |= cell.scenario.body | variant.extra
    return {name: value for name, value in body.items() if value is not None}


@dataclass
class Upstream:
    """A server. `ask` may be called from several threads."""

    suite: Suite
    who: Answering

    def __post_init__(self):
        name = self.who.api_key_env
        self._key = None if name is None else os.environ.get(name)
        if name is not None and not self._key:
            raise ConfigError(f"{name} is not set in the environment, and {self.who.upstream} is asked with it")
        self._url = self.who.upstream.rstrip("/") + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=tls_context()))

    def key_of(self, body: dict[str, Any]) -> str:
        return key_of({"url": self._url, "body": body})

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, after several tries if necessary.

        Raises:
            AskingFailed: there is no answer; says why.
        """
        for number in range(self.suite.retries + 1):
            try:
                return self._ask_once(body)
            except AskingFailed as e:
                if e.after is None:
                    raise
                if number == self.suite.retries:
                    tries = f" ({number + 1} tries)" if number else ""
                    raise AskingFailed(f"{e}{tries}") from None
                # twice as long each time, and random, so that requests refused together are not repeated together
                backoff = FIRST_WAIT_S * 2**number * random.uniform(0.5, 1.0)
                time.sleep(min(max(e.after, backoff), LONGEST_WAIT_S))
        raise AssertionError("not reached")

    def _ask_once(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": f"slowft/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        begin = time.perf_counter()
        try:
            with self._opener.open(request, timeout=self.suite.timeout) as response:
                content = response.read(ANSWER_NBYTES + 1)
        except urllib.error.HTTPError as e:
            with e:
                raise _refused(e) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
            reason = getattr(e, "reason", None) or e
            raise AskingFailed(f"{self.who.upstream} cannot be reached: {printable(str(reason))}", 0.0) from None
        if len(content) > ANSWER_NBYTES:
            raise AskingFailed(f"the response has more than {ANSWER_NBYTES >> 20} MB")
        return _answer(content, time.perf_counter() - begin)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # the redirection is then an error


def _refused(error: urllib.error.HTTPError) -> AskingFailed:
    try:
        content = error.read(10_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        content = ""
    try:
        said = json.loads(content)["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, LookupError, TypeError):
        said = content
    why = f"HTTP {error.code}: {printable(' '.join(str(said).split()) or str(error.reason))}"
    if error.code not in (408, 409, 425, 429) and error.code < 500:
        return AskingFailed(why)
    try:
        after = max(0.0, float(error.headers.get("Retry-After", 0)))
    except ValueError:  # a date
        after = 0.0
    return AskingFailed(why, after)


def _answer(content: bytes, seconds: float) -> dict[str, Any]:
    try:
        response = json.loads(content)
    except (ValueError, RecursionError):
        raise AskingFailed(f"the response is no JSON: {printable(content[:200].decode('utf-8', 'replace'))}") from None
    message = texts.answer_message(response)
    if message is None:
        said = response.get("error") if isinstance(response, dict) else response
        raise AskingFailed(f"the response has no answer: {printable(json.dumps(said))}")
    text = texts.content_text(message.get("content"))
    if not text and message.get("tool_calls"):
        text = json.dumps(message["tool_calls"], ensure_ascii=False)
    prompt_tokens, tokens = texts.usage(response)
    named = response.get("model")
    return {
        "text": text,
        "finish_reason": texts.finish_reason(response),
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "model": named if isinstance(named, str) else None,
    }


class Asking:
    """Requests that several threads send, each once. The threads are daemons, so the process can end without them.

    Args:
        requests: (upstream, body, key of the answer) of each.
    """

    def __init__(self, requests: Sequence[tuple[Upstream, dict[str, Any], str]], at_once: int, answers: Answers):
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._answers, self.n = answers, len(requests)
        for request in requests:
            self._requests.put(request)
        for number in range(min(at_once, len(requests))):
            threading.Thread(target=self._work, name=f"slowft-upstream-{number}", daemon=True).start()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | None, str | None]]:
        """(key, answer, why there is none) of each request, in the order in which they end.

        Raises:
            SlowftError: an answer cannot be written to the file of answers.
        """
        for _ in range(self.n):
            key, answer, why = self._done.get()
            if isinstance(why, SlowftError):
                raise why
            yield key, answer, why

    def stop(self) -> None:
        """Send no more requests."""
        while not self._requests.empty():
            try:
                self._requests.get_nowait()
            except queue.Empty:
                return

    def _work(self) -> None:
        while True:
            try:
                upstream, body, key = self._requests.get_nowait()
            except queue.Empty:
                return
            try:
                answer = upstream.ask(body)
                self._answers.add(key, answer)
                self._done.put((key, answer, None))
            except AskingFailed as e:
                self._done.put((key, None, str(e)))
            except SlowftError as e:
                self._done.put((key, None, e))


class RemoteCells:
    """The cells that servers answer. Requests are sent from the beginning, and `settle` waits for the answers."""

    def __init__(self, suite: Suite, cells: Sequence[Cell], answers: Answers):
        upstreams: dict[int, Upstream] = {}
        requests = []
        self._waiting: dict[str, list[Cell]] = {}
        for cell in (c for c in cells if c.variant.upstream is not None):
            if cell.column not in upstreams:
                upstreams[cell.column] = Upstream(suite, cell.variant)
            body = body_of(cell.variant, cell)
            cell.key = upstreams[cell.column].key_of(body)
            if (known := answers.get(cell.key)) is not None:
                cell.answer, cell.was_known = known, True
            elif cell.key in self._waiting:
                self._waiting[cell.key].append(cell)  # two variants ask the same
            else:
                self._waiting[cell.key] = [cell]
                requests.append((upstreams[cell.column], body, cell.key))
        self._asking = Asking(requests, suite.at_once, answers)

    def settle(self, report: Report) -> None:
        """Wait for all answers."""
        for key, answer, why in late(report, self._asking, "Asking", self._asking.n):
            for cell in self._waiting[key]:
                cell.answer, cell.error = answer, why

    def stop(self) -> None:
        self._asking.stop()
