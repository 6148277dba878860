"""Gives the results of a comparison as one JSON object, or as a page that holds the same and needs nothing else.

The page is `page.html`. `slowft serve` shows it too, but without results and with a server to ask. Answers are data in
the page and never markup: no text in the JSON can end its element, and the page's script writes texts as text.
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
FORMAT = 1  # number of the results' format


def results(of: Comparison) -> dict[str, Any]:
    """The whole comparison as plain data."""
    suite, variants = of.suite, of.variants
    columns = []
    for column, variant in enumerate(variants):
        about = {"model": variant.model, "adapter": variant.adapter_path, "upstream": variant.upstream}
        about |= {"prompt": variant.prompt, "system_prompt": variant.system_prompt}
        asked = {name: value for name, value in variant.given().items() if name not in about}
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
    data = {"format": FORMAT, "slowft": __version__, "suite": suite.file.name, "baseline": suite.first}
    data |= {"variants": columns, "scenarios": rows, "cells": [_cell(of, cell) for cell in of.cells]}
    return json.loads(json.dumps(data | {"verdicts": verdicts}, default=str))  # dates of YAML become texts


def _cell(of: Comparison, cell: Cell) -> dict[str, Any]:
    data = {"scenario": cell.row, "variant": cell.column, "messages": cell.messages, "text": cell.text}
    answer = cell.answer or {}
    data |= {name: answer.get(name) for name in ("finish_reason", "prompt_tokens", "tokens", "seconds")}
    data |= {"cost": of.cost_of(cell), "error": cell.error, "was_known": cell.was_known}
    return data | {"passes": cell.passes, "failures": cell.failures}


def write(file: Path, data: dict[str, Any]) -> None:
    """Write the page with these results.

    Raises:
        SlowftError: it cannot be written.
    """
    write_file(file, with_results(data).encode())


def with_results(data: dict[str, Any]) -> str:
    """The page with results. It may run only its own script and style, by their hashes, and connect to nothing."""
    page = text()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{policy_of(page, "none")}">'
    page = page.replace("<head>", f"<head>\n{policy}", 1)
    return page.replace(DATA.format("null"), DATA.format(as_data(data)), 1)


def as_data(value: Any) -> str:
    """JSON that can stand in a <script> element: nothing in it can end the element or begin a comment."""
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return re.sub("[<>&\u2028\u2029]", lambda match: escaped[match[0]], json.dumps(value, ensure_ascii=False))


@cache
def text() -> str:
    """The page without results."""
    return FILE.read_text("utf-8")


def policy_of(page: str, connects_to: str = "self") -> str:
    """The page's Content-Security-Policy. It allows the page's own script and style, by hash, and nothing else.

    Args:
        connects_to: "self" if a server shows the page, "none" if it is a file.
    """

    def hashes(element: str) -> str:
        contents = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src '{connects_to}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
