"""The page of `slowft compare --html` and of `slowft serve`: what answers say stays text; it works by keyboard, on a
phone, in the dark."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

import browser
from slowft.comparing import page
from slowft.serving.service import Service, Settings

HOSTILE = '</script><img src=x onerror="window.hit=1"><script>window.hit=1</script><!--<script>\u2028</SCRIPT >&lt;'
SAID = ["The cat sat on the mat.", "The dog sat on a mat.", HOSTILE]


def results(rows: int, texts=SAID) -> dict:
    """What `page.results` gives, of made-up answers; every third scenario fails."""

    def share(k):
        return {"k": k, "n": rows, "share": k / rows, "low": 0.1, "high": 0.9}

    def variant(name, against):
        summary = {"answers": rows, "errors": 0, "passed": share(rows - rows // 3), "checks": {HOSTILE: share(1)}}
        summary |= {"prompt_tokens": 9, "tokens": 9, "seconds": 0.5, "cost": None}
        about = {"name": name, "model": f"m {HOSTILE}", "adapter": None, "upstream": None, "prompt": "{{ x }}"}
        about |= {"system_prompt": None, "asked": {}, "summary": summary}
        return about | {"against_baseline": against}

    against = {"scenarios": rows, "better": 1, "worse": 0, "difference": 0.1, "p": 1.0}
    found = {"format": 1, "slowft": "0", "suite": f"suite {HOSTILE}.yaml", "baseline": 0, "verdicts": []}
    found["variants"] = [variant("base", None), variant("tuned", against), variant(HOSTILE, against)]
    found["scenarios"] = [
        {"name": f"row {i}", "variables": {"x": HOSTILE}, "messages": None, "answer": HOSTILE, "request": None}
        | {"checks": [f"check {HOSTILE}"]}
        for i in range(rows)
    ]
    cell = {"finish_reason": "stop", "prompt_tokens": 3, "tokens": 3, "seconds": 0.1, "cost": 0.5, "error": None}
    found["cells"] = [
        cell
        | {"scenario": i, "variant": v, "messages": [{"role": "user", "content": HOSTILE}], "text": texts[v]}
        | {"passes": i % 3 != 2, "failures": [HOSTILE if i % 3 == 2 else None], "was_known": False}
        for i in range(rows)
        for v in range(3)
    ]
    return found


class Elements(HTMLParser):
    """What an HTML parser of its own makes of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=False)
        self.found: list[tuple[str, dict, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), ""))

    def handle_endtag(self, tag):
        self.found.append(("", {}, ""))

    def handle_data(self, data):
        if self.found and self.found[-1][0] in ("script", "style"):
            tag, attributes, text = self.found[-1]
            self.found[-1] = tag, attributes, text + data

    def of(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def test_answers_cannot_leave_the_data_and_the_policy_lets_only_the_pages_own_script_run():
    given = results(4)
    elements = Elements(page.with_results(given))
    (about, data), (plain, script) = elements.of("script")
    assert about == {"type": "application/json", "id": "data"} and plain == {}
    assert json.loads(data) == given and not re.search("[<>&\u2028]", data)
    assert not elements.of("img") and not elements.of("link")
    policy = next(a["content"] for a, _ in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (style,) = elements.of("style")
    for name, text in (("script", script), ("style", style[1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy
    for attributes in (a for _, a, _ in elements.found):
        assert not {"style", "src", "href"} & attributes.keys() or attributes.get("href") == "#main"
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", script)


def test_the_page_without_results_has_none():
    elements = Elements(page.text())
    assert elements.of("script")[0][1] == "null"


# --- In a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    if browser.find() is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with browser.Browser() as opened:
        yield opened


def test_a_page_of_hostile_answers_shows_marks_and_filters_them(chromium, tmp_path):
    file = tmp_path / "page.html"
    page.write(file, results(340))
    b = chromium
    b.open(file.as_uri())
    shown = "[...document.querySelectorAll('#scenario-0 .said')].map(one => one.textContent)"
    assert b.js(shown) == [SAID[0], "The catdog sat on thea mat.", HOSTILE]
    marks = (
        "[...document.querySelectorAll('#scenario-0 ins, #scenario-0 del')].map(one => one.localName + one.textContent)"
    )
    assert b.js(marks) == ["delcat", "insdog", "delthe", "insa"]
    b.press("d")
    assert b.js(shown) == SAID
    count = "document.getElementById('count').textContent"
    b.press("f")
    assert b.js(count) == "113 of 340 scenarios"
    b.press("f")
    b.press("/")
    assert b.js("document.activeElement.id") == "search"
    b.call("Input.insertText", text="row 77")
    assert b.js(count) == "1 of 340 scenarios"
    b.js("shown.text = ''; drawCompare()")
    b.js("while (waiting.length) drawMore()")
    assert b.js("document.querySelectorAll('.cell').length") == 1020
    assert b.js("document.querySelectorAll('.said[tabindex]').length") == 0  # none is so long that it scrolls
    assert b.js("performance.memory.usedJSHeapSize") < 60e6
    b.js("document.activeElement.blur()")
    b.press("j")
    b.press("j")
    assert b.js("document.activeElement.id") == "scenario-1"
    assert b.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    b.press("?")
    assert b.js("document.getElementById('keys').open && document.querySelectorAll('#key-list dt').length") == 6
    # nothing of an answer became markup, and nothing tried to
    assert b.js("[document.querySelectorAll('img').length, window.hit ?? null]") == [0, None]
    unnamed = (
        "[...document.querySelectorAll('input, select, textarea, button')].filter(one => !one.labels?.length && "
        "!one.getAttribute('aria-label') && !one.textContent.trim() && !one.hidden).map(one => one.outerHTML)"
    )
    assert b.js(unnamed) == []
    for is_dark in (False, True):
        b.open(file.as_uri(), 390, is_dark)
        assert b.js("document.documentElement.scrollWidth") == 390
        back, text = b.js("['backgroundColor', 'color'].map(one => getComputedStyle(document.body)[one])")
        light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (back, text)]
        assert (light[0] < light[1]) == is_dark
    assert b.complaints == []
    b.events.clear()


def test_the_playground_runs_answers_and_keeps_them(chromium, llama_with_tokenizer, tmp_path):
    record = tmp_path / "requests.db"
    settings = Settings(
        str(llama_with_tokenizer), port=0, record=str(record), token="a token", max_tokens=6, memory="1GB"
    )
    with Service(settings, print) as service:
        b = chromium
        b.open(service.url.removesuffix("v1"))
        b.wait("document.getElementById('token').open")  # which this server asks for
        b.js("document.getElementById('token-field').focus()")
        b.call("Input.insertText", text="a token")
        b.press("Enter", windowsVirtualKeyCode=13, text="\r")
        b.wait("models.length > 0 && document.querySelector('#grid textarea') !== null")
        assert b.js("[...document.querySelector('[data-model]').options].map(one => one.text)") == ["tiny", "another…"]
        b.js("document.querySelector('#grid textarea').focus()")
        b.call("Input.insertText", text="Who is it?")
        b.press("Enter", modifiers=2, windowsVirtualKeyCode=13)
        b.wait("results.cells.length === 1 && !results.cells[0].running")
        cell = b.js("results.cells[0]")
        assert cell.get("error") is None and cell["tokens"] == 6 and cell["finish_reason"] == "length"
        b.js("document.querySelector('.cell [data-run]').focus()")
        b.press("y")
        b.wait("results.cells[0].kept === true")
        b.until(lambda: service.store.get(1).status == "complete")
        (row,) = service.store.list()
        assert row.kept is True and row.request["messages"] == [{"role": "user", "content": "Who is it?"}]
        assert row.response["choices"][0]["message"]["content"] == cell["text"]
        b.press("q")
        b.wait("rows.length === 1")
        b.press("j")
        assert b.js("document.activeElement.dataset.id") == "1"
        b.press("x")
        b.wait("rows[0].kept === false")
        b.press("o")
        b.wait("results.scenarios.length === 2")
        assert service.store.get(1).kept is False
        assert b.js("document.querySelectorAll('#grid article').length") == 2
        b.js("localStorage.clear()")
        assert [one["entry"]["url"].rpartition("/")[2] for one in b.complaints] == ["models"]  # refused at first
