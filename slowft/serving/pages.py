"""The page for a browser at `/`, and the recorded requests that the page asks for under `/api/`.

Comes in: paths, a JSON body. Goes out: one page that may load nothing from elsewhere, and JSON.

    GET  /api/requests?filter=model=gpt-4o&filter=text~refund&before=120&limit=50    {"requests": [...]}, newest first
    GET  /api/requests/17                                                           one of them
    POST /api/requests/17/tag    {"name": "app", "value": "shop"}                    null takes the tag away
    POST /api/requests/17/keep   {"keep": true}                                      as a sample; false, null
"""

import base64
import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from ..errors import SlowftError
from ..requests.filters import parse
from ..requests.store import RequestStore
from .guard import Refused
from .replies import Reply

PAGE_FILE = Path(__file__).parent.parent / "comparing" / "page.html"
MOST = 500  # rows of one answer
ONE = re.compile(r"/api/requests/([0-9]{1,18})(?:/(tag|keep))?")
SCRIPT = re.compile(rb"<script(?:\s[^>]*)?>(.*?)</script>", re.DOTALL)


class Pages:
    """The page and its data.

    Args:
        store: the recorded requests; None: nothing is recorded. file: the page.
    """

    def __init__(self, store: RequestStore | None, file: Path = PAGE_FILE):
        self._store = store
        self._page = file.read_bytes() if file.exists() else None

    def answer(self, method: str, path: str, query: str, body: Any, reply: Reply) -> None:
        """Answer a request for `/` or `/api/...`.

        Raises:
            Refused: there is no such page or request, or the change is not possible.
        """
        if path == "/" and method == "GET":
            if self._page is None:
                raise Refused(404, "there is no page here. The models are under /v1")
            reply.whole(200, self._page, "text/html; charset=utf-8", page_headers(self._page))
            return
        if self._store is None:
            raise Refused(404, "nothing is recorded. Start the server with --record requests.db", "not_recorded")
        try:
            reply.json(200, self._requests(self._store, method, path, query, body))
        except SlowftError as e:
            raise Refused(404 if "has no request" in str(e) else 400, str(e)) from e

    def _requests(self, store: RequestStore, method: str, path: str, query: str, body: Any) -> Any:
        """The JSON answer to a request for `/api/...`, as the file's docstring lists them."""
        one = ONE.fullmatch(path)
        if method == "GET" and path == "/api/requests":
            asked = parse_qs(query, max_num_fields=50)
            filters = [parse(text) for text in asked.get("filter", ())]
            before = _number(asked, "before", None)
            rows = store.list(filters, before, min(_number(asked, "limit", 50), MOST))
            return {"requests": [asdict(row) for row in rows]}
        if one is None or (one[2] is None) != (method == "GET") or method not in ("GET", "POST"):
            raise Refused(404, "there is no such thing under /api")
        number = int(one[1])
        if one[2] is None:
            return asdict(store.get(number))
        body = body if isinstance(body, dict) else {}
        if one[2] == "keep":
            if not isinstance(body.get("keep", 0), bool) and body.get("keep", 0) is not None:
                raise Refused(400, 'give {"keep": true}, false or null', param="keep")
            store.keep(number, body["keep"])
        else:
            name, value = body.get("name"), body.get("value")
            if not isinstance(name, str) or not name or not isinstance(value, str | None):
                raise Refused(400, 'give {"name": ..., "value": ...}', param="name")
            store.tag(number, name, value)
        return asdict(store.get(number))


def page_headers(page: bytes) -> Iterable[tuple[str, str]]:
    """Headers that let a browser run only the page's own scripts, by their hashes, and load nothing from elsewhere."""
    hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in SCRIPT.findall(page))
    scripts = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [("Content-Security-Policy", policy), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer")]


def _number(asked: dict[str, list[str]], name: str, usual: int | None) -> Any:
    if name not in asked:
        return usual
    if not re.fullmatch(r"[0-9]{1,18}", asked[name][0]):
        raise Refused(400, f"{name} must be a number", param=name)
    return int(asked[name][0])
