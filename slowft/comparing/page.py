"""The results of a comparison as one JSON object, and as a page that holds the same and needs nothing else.

`page.html` is the page; `slowft serve` shows it too, then without results and with a server to ask. Answers are data in
it, never markup: no text in the JSON can end its element, and the page's script writes texts as text.
"""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from ..version import __version__
from ..weights.tensorfile import write_file
from .cells import Cell
from .run import Comparison

FILE = Path(__file__).with_name("page.html")
DATA = '<script type="application/json" id="data">{}</script>'
FORMAT = 1  # of the results


def results(of: Comparison) -> dict[str, Any]:
    """All that was found, as plain data."""
    suite, variants = of.suite, of.variants
    columns = []
    for column, variant in enumerate(variants):
        about = {"model": variant.model, "adapter": variant.adapter_path, "upstream": variant.upstream}
        about |= {"prompt": variant.prompt, "system_prompt": variant.system_prompt}
        asked = {name: value for name, value in variant.said().items() if name not in about}
        columns.append(
            {"name": variant.name, **about, "asked": asked}
            | {"summary": of.summary(column), "against_baseline": of.against_baseline(column)}
        )
    rows = [
        {
            "name": scenario.name,
            "variables": scenario.variables,
            "messages": scenario.messages,
            "answer": scenario.answer,
            "request": scenario.request,
            "checks": [check.name for check in scenario.checks],
        }
        for scenario in of.scenarios
    ]
    verdicts = [
        {"scenario": v.row, "first": v.first, "second": v.second, "better": v.better, "orders": v.orders, "why": v.why}
        for v in of.verdicts
    ]
    found = {"format": FORMAT, "slowft": __version__, "suite": suite.file.name, "baseline": suite.first}
    found |= {"variants": columns, "scenarios": rows, "cells": [_cell(of, cell) for cell in of.cells]}
    return json.loads(json.dumps(found | {"verdicts": verdicts}, default=str))  # dates of YAML become texts


def _cell(of: Comparison, cell: Cell) -> dict[str, Any]:
    found = {"scenario": cell.row, "variant": cell.column, "messages": cell.messages, "text": cell.text}
    answer = cell.answer or {}
    found |= {name: answer.get(name) for name in ("finish_reason", "prompt_tokens", "tokens", "seconds")}
    found |= {"cost": of.cost_of(cell), "error": cell.error, "was_known": cell.was_known}
    return found | {"passes": cell.passes, "failures": cell.failures}


def write(file: Path, found: dict[str, Any]) -> None:
    """The page with these results.

    Raises:
        SlowftError: it cannot be written.
    """
    write_file(file, with_results(found).encode())


def with_results(found: dict[str, Any]) -> str:
    """The page. It allows itself its own script and style, by their hashes, and no connection to anywhere."""
    page = text()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{policy_of(page, "none")}">'
    page = page.replace("<head>", f"<head>\n{policy}", 1)
    return page.replace(DATA.format("null"), DATA.format(as_data(found)), 1)


def as_data(found: Any) -> str:
    """JSON that can stand in a <script> element: nothing in it ends one, or begins a comment."""
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return re.sub("[<>&\u2028\u2029]", lambda one: escaped[one[0]], json.dumps(found, ensure_ascii=False))


@cache
def text() -> str:
    """The page without results."""
    return FILE.read_text("utf-8")


def policy_of(page: str, connects_to: str = "self") -> str:
    """The Content-Security-Policy under which the page works: its script and style by hash, and nothing else.

    Args:
        connects_to: "self" where a server shows it, "none" of a file.
    """

    def hashes(element: str) -> str:
        found = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src '{connects_to}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
