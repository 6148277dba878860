"""`slowft compare`: suites, answers that are kept, checks, judges, figures; and the page that shows them."""

import json
import re
import threading
import time
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from click.testing import CliRunner

import slowft
from conftest import in_memory, randomise
from slowft.cli.main import slowft as command
from slowft.comparing import remote
from slowft.comparing.answers import Answers
from slowft.comparing.checks import Check, steps_of
from slowft.comparing.judging import said_of
from slowft.comparing.page import text as page_text
from slowft.comparing.statistics import sign_test, wilson
from slowft.comparing.suite import EXAMPLE, Asking, Judge, Price, Scenarios, Suite, Variant, load
from slowft.comparing.templates import render
from slowft.inference.prompts import Template
from slowft.requests import pruning

HOSTILE = '</script><img src=x onerror="window.hit=1"><!--<script>\u2028</SCRIPT >&lt;'


def run(*arguments):
    return CliRunner().invoke(command, ["compare", *map(str, arguments)], catch_exceptions=False)


def compared(suite: Path, *options) -> dict:
    done = run(suite, "--json", *options)
    assert done.exit_code in (0, 1), done.output
    return json.loads(done.stdout)


# --- Figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, n, low, high",
    [  # Newcombe, Statistics in Medicine 17:857 (1998), table I, method 3: Wilson's score without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_wilsons_as_published(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_differences_are_tested_exactly():
    # Fagerland, Lydersen and Laake (2013), table 1: 1 and 7 discordant pairs, exact conditional McNemar p = 0.0703
    assert sign_test(1, 7) == sign_test(7, 1) == pytest.approx(0.0703, abs=5e-5)
    assert sign_test(0, 0) == sign_test(5, 5) == 1.0
    assert sign_test(0, 10) == pytest.approx(2 / 1024)
    assert 0 < sign_test(2000, 1900) < 1  # of integers that no float holds


# --- Checks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check, good, bad, why",
    [
        (dict(contains="Lima"), "It is Lima.", "lima", 'does not contain "Lima"'),
        (dict(contains="LIMA", ignore_case=True), "It is Lima.", "Cusco", 'does not contain "LIMA"'),
        (dict(not_contains="sorry"), "Yes", "I am sorry", 'contains "sorry"'),
        (dict(regex=r"^\d{2}$"), "42", "421", r'nothing matches "^\\d{2}$"'),
        (dict(not_regex=r"(?i)as an ai"), "No", "As an AI I", '"As an AI" matches "(?i)as an ai"'),
        (dict(equals="Lima"), " Lima\n", "Lima.", 'is not "Lima"'),
        (dict(max_length=3), "abc", "abcd", "has 4 characters, more than 3"),
        (dict(max_length=2, unit="words"), "a b", "a b c", "has 3 words, more than 2"),
        (dict(json="$"), "[1]", "[1", "is no JSON: Expecting ',' delimiter: line 1 column 3 (char 2)"),
        (dict(json="$"), '```json\n{"a": 1}\n```', '{"a": NaN}', "is no JSON: NaN is no number of JSON's"),
        (dict(json="a[1].b"), '{"a": [0, {"b": null}]}', '{"a": [0]}', "has no a[1].b"),
        (dict(json="$.a", equals=3), '{"a": 3}', '{"a": "3"}', '$.a is "3", not 3'),
        (dict(json="a", equals="3"), '{"a": 3}', '{"a": 4}', 'a is 4, not "3"'),
        (dict(json="a", equals=True), '{"a": true}', '{"a": 1}', "a is 1, not true"),
        (dict(json="a", equals=None), '{"a": null}', "{}", "has no a"),
        (dict(json="a", exists=False), "{}", '{"a": 0}', "has a: 0"),
    ],
)
def test_checks_say_why(check, good, bad, why):
    bound = Check(**check).bound({})
    assert bound.why_not(good) is None
    assert bound.why_not(bad) == why


def test_tokens_are_counted_by_who_answered():
    check = Check(max_length=5, unit="tokens").bound({})
    assert check.why_not("a", 5) is None and check.why_not("a", 6) == "has 6 tokens, more than 5"
    assert check.why_not("a", None) == "the server did not say how many tokens it has"


def test_paths_are_read_as_written():
    assert steps_of("$") == [] and steps_of("$.a[-1].b c[0]") == ["a", -1, "b c", 0]
    for wrong in ("", "a..b", "a[x]", "a]"):
        with pytest.raises(slowft.ConfigError, match="json is a path"):
            steps_of(wrong)


def test_templates_run_in_a_sandbox_and_miss_nothing():
    assert render("{{ a }} of {{ b | regex_escape }}", {"a": 1, "b": "x.y"}) == r"1 of x\.y"
    for text, why in (
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ capitol }}", "'capitol' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ):
        with pytest.raises(slowft.ConfigError, match=why):
            render(text, {})


# --- The suite ------------------------------------------------------------------------------------------


def test_the_example_has_every_field_and_is_a_suite():
    text = EXAMPLE.read_text()
    assert [variant.name for variant in load(EXAMPLE).variants] == ["base", "terse"]
    for kind in (Suite, Variant, Asking, Scenarios, Check, Judge, Price):
        for f in fields(kind):
            assert f.name == "file" and kind is Suite or re.search(rf"\b{f.name}\b", text), (kind, f.name)
    uncommented = re.sub(r"(?m)^( *)# (?= *(- )?\{?[a-z_]+:)", r"\1", text)
    whole = yaml.safe_load(uncommented)
    assert set(whole) == {f.name for f in fields(Suite)} - {"file"}
    assert len(whole["variants"]) == 4 and len(whole["scenarios"]) == 5 and len(whole["checks"]) == 6
    shown = run("--example")
    assert shown.exit_code == 0 and shown.output == text


BASE = """variants:
  - {name: a, model: m}
  - {name: b, model: m, temp: 0.5}
scenarios:
  - {variables: {x: 1}}
checks:
  - {contains: "{{ x }}"}
defaults: {prompt: "{{ x }}"}
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("temp: 0.5", "temp: -1", "suite.yaml line 3: variants[2]: temp must be 0 or more, got -1"),
        ("temp: 0.5", "heat: 1", "line 3: variants[2].heat is no field of a suite"),
        ("name: b", "name: a", "line 1: variants: two are named a. Give each its own name"),
        ("temp: 0.5", "adapter_path: x, upstream: 'http://h'", "line 3: variants[2]: adapter_path has no effect with"),
        ("temp: 0.5", "upstream: h", "line 3: variants[2]: upstream must begin with http:// or https://, got h"),
        ("temp: 0.5", "extra: {a: 1}", "line 3: variants[2]: extra has no effect without upstream"),
        ("variables: {x: 1}", "file: f, requests: r", "line 5: scenarios[1]: a scenario has variables and messages of"),
        ("contains:", "regex: a, contains:", "line 7: checks[1]: a check is one of contains, not_contains"),
        ('contains: "{{ x }}"', "regex: '['", 'line 7: checks[1]: regex "[" is no regular expression'),
        ('contains: "{{ x }}"', "json: a..b", "line 7: checks[1]: json is a path such as items[0].name"),
        ('contains: "{{ x }}"', 'contains: "{{ x"', "line 7: checks[1]: contains is no template of jinja2"),
        ("defaults:", "baseline: c\ndefaults:", "line 8: baseline is c, and no variant is named so. There are: a, b"),
        ("defaults:", "judge: {prompt: a}\ndefaults:", "line 8: judge: judge needs a model or the name of a variant"),
        ('"{{ x }}"}\ndef', '"{{ y }}"}\ndef', "scenario 1: check contains \"{{ y }}\": 'y' is undefined"),
        ('prompt: "{{ x }}"', 'prompt: "{{ y }}"', "variant a, scenario 1: prompt: 'y' is undefined"),
        ('prompt: "{{ x }}"', "temp: 0", "variant a, scenario 1: there is neither a prompt nor messages"),
        ("{variables: {x: 1}}", "{file: nowhere.jsonl}", "nowhere.jsonl is not there"),
    ],
)
def test_what_is_wrong_with_a_suite_is_named_before_anything_is_asked(tmp_path, old, new, message):
    assert BASE.count(old) == 1
    file = tmp_path / "suite.yaml"
    file.write_text(BASE.replace(old, new))
    with pytest.raises(slowft.SlowftError) as error:
        run(file)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [file]


# --- Local models ---------------------------------------------------------------------------------------

SHARED = "You answer whoever asks, in a word or two at most."  # which the adapter has learnt
LOCAL = """variants:
  - {{name: base, model: {model}}}
  - {{name: tuned, model: {model}, adapter_path: adapter}}
  - {{name: hot, model: {model}, temp: 0.9, seed: 3}}
defaults: {{prompt: "Of {{{{ x }}}}", max_tokens: 8}}
scenarios:
  - {{variables: {{x: one}}}}
  - {{file: more.jsonl}}
checks:
  - {{max_length: 8, unit: tokens}}
judge: {{variant: base}}
memory: 1GB
"""


@pytest.fixture(scope="module")
def suite(llama_with_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    with slowft.open_model(llama_with_tokenizer) as model:
        model.add_lora(num_layers=2, rank=2, scale=20.0)
        randomise(model)
        model.save_adapter(folder / "adapter")
    pruning.save(folder / "adapter", [SHARED])
    said = [("system", SHARED), ("user", "Who?"), ("assistant", "The user.")]
    messages = [{"role": role, "content": content} for role, content in said]
    lines = [{"x": "two", "id": "b"}, {"messages": messages, "x": "three"}]
    (folder / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "suite.yaml").write_text(LOCAL.format(model=llama_with_tokenizer))
    return folder / "suite.yaml"


def test_base_and_adapter_share_passes_and_answer_as_generate_does(suite, llama_with_tokenizer):
    done = run(suite)
    assert done.exit_code == 0, done.output
    tokens, n, readings = map(
        int, re.search(r": (\d+) tokens of (\d+) answers in (\d+) readings", done.output).groups()
    )
    assert n == 9 and tokens > 4 * readings
    found = compared(suite)
    assert all(cell["was_known"] for cell in found["cells"])
    assert [row["name"] for row in found["scenarios"]] == ["1", "more b", "more 2"]
    shared = [{"role": "system", "content": SHARED}]
    assert found["scenarios"][2]["answer"] == "The user."
    # the prompt stands in place of what the user said
    assert found["cells"][6]["messages"] == [*shared, {"role": "user", "content": "Of three"}]
    for column, adapter in ((0, None), (1, suite.parent / "adapter")):
        with slowft.open_model(llama_with_tokenizer, adapter_path=adapter) as model:
            tokenizer = slowft.load_tokenizer(model.path, model.embedding_rows)
            asked = [[{"role": "user", "content": f"Of {x}"}] for x in ("one", "two", "three")]
            asked[2] = [*([] if adapter else shared), *asked[2]]
            answers = {
                a.number: a.text
                for a in slowft.generate(model, asked, tokenizer=tokenizer, max_tokens=8, template=Template())
            }
        texts = [cell["text"] for cell in found["cells"] if cell["variant"] == column]
        assert texts == [answers[i] for i in range(3)]


def test_answers_are_the_users_alone_and_one_comparison_writes_them_at_a_time(tmp_path):
    with Answers(tmp_path / "answers.jsonl") as answers:
        answers.add("a", {"text": HOSTILE})
        assert (tmp_path / "answers.jsonl").stat().st_mode & 0o777 == 0o600
        with pytest.raises(slowft.ConfigError, match="is written by another comparison"):
            Answers(tmp_path / "answers.jsonl")
    with Answers(tmp_path / "answers.jsonl") as answers:
        assert answers.get("a") == {"text": HOSTILE}
    answers.add("b", {"text": "too late"})  # of a server that is still answering when all has ended
    assert (tmp_path / "answers.jsonl").read_bytes().count(b"\n") == 1


def test_only_what_is_new_is_asked_for(suite):
    whole = suite.read_text()
    text = whole.replace("judge: {variant: base}\n", "")
    kept = suite.with_name("suite.answers.jsonl")
    try:
        suite.write_text(text)
        compared(suite)
        before = kept.read_bytes()
        suite.write_text(text.replace("max_length: 8, unit: tokens", "contains: e"))
        assert all(cell["was_known"] for cell in compared(suite)["cells"])
        assert kept.read_bytes() == before
        suite.write_text(text.replace("- {variables: {x: one}}", "- {variables: {x: one}}\n  - {variables: {x: ten}}"))
        found = compared(suite)
        assert [cell["was_known"] for cell in found["cells"]] == [True] * 3 + [False] * 3 + [True] * 6
        suite.write_text(text.replace("seed: 3", "seed: 4"))
        found = compared(suite)
        assert [cell["was_known"] for cell in found["cells"]] == [True, True, False] * 3
    finally:
        suite.write_text(whole)


def test_a_line_that_a_kill_cut_off_is_asked_for_again(suite):
    whole = suite.read_text()
    suite.write_text(whole.replace("judge: {variant: base}\n", ""))
    compared(suite)
    kept = suite.with_name("suite.answers.jsonl")
    before = kept.read_bytes()
    for cut in (before[:-20] + b'{"key": "0', before[:5]):
        kept.write_bytes(cut)
        compared(suite)
        # in another order perhaps, but the same answers
        assert {(a["key"], a.get("text")) for a in map(json.loads, kept.read_bytes().splitlines())} >= {
            (a["key"], a.get("text")) for a in map(json.loads, before.splitlines()[:9])
        }
    kept.write_bytes(b"My diary.\n")
    with pytest.raises(slowft.ConfigError, match="line 1 is no answer of slowft compare"):
        compared(suite)
    kept.write_bytes(b"My diary")
    with pytest.raises(slowft.ConfigError, match="holds no answers of slowft compare"):
        compared(suite)
    assert kept.read_bytes() == b"My diary"
    kept.unlink()
    suite.write_text(whole)


def test_a_local_judge_says_what_it_holds_for_most_probable_in_both_orders(suite, llama_with_tokenizer):
    found = compared(suite)
    reference = in_memory(llama_with_tokenizer)
    tokenizer = slowft.load_tokenizer(llama_with_tokenizer, None)
    digits = [tokenizer.encode(f"{digit}", add_special_tokens=False)[0] for digit in (0, 1, 2)]

    def says(question, first, second):
        prompt = render(Judge(variant="base").prompt, {"question": question, "first": first, "second": second})
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        tokens = tokens if isinstance(tokens, list) else tokens["input_ids"]
        return int(mx.argmax(reference(mx.array([tokens]))[0, -1][mx.array(digits)]).item())

    cells = {(cell["scenario"], cell["variant"]): cell["text"] for cell in found["cells"]}
    asked = ["Of one", "Of two", "Who?"]
    judged = [v for v in found["verdicts"] if v["orders"] is not None]
    assert len(judged) >= 3
    for v in judged:
        a, b = cells[v["scenario"], v["first"]], cells[v["scenario"], v["second"]]
        orders = [says(asked[v["scenario"]], a, b), says(asked[v["scenario"]], b, a)]
        assert v["orders"] == orders
        assert v["better"] == {(1, 2): "first", (2, 1): "second"}.get(tuple(orders), "tie")


def test_the_example_runs(llama_with_tokenizer, tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(EXAMPLE.read_text().replace("Qwen/Qwen3-0.6B", str(llama_with_tokenizer)).replace(": 100 ", ": 4 "))
    done = run(file, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "names the capital" in done.output and "judged against base" in done.output
    assert (tmp_path / "page.html").stat().st_size > len(page_text())


# --- Servers --------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """With OpenAI's interface: says what `replies` says to what the user said last."""

    daemon_threads = True

    def __init__(self, replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.lock = replies, [], threading.Lock()
        self.at_once = self.most = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append((self.path, self.headers.get("Authorization"), body))
            number = sum(one["messages"] == body["messages"] for _, _, one in self.server.asked)
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
        time.sleep(0.01)  # so that others come meanwhile, as many as may
        status, headers, content = self.server.replies(said, number)
        if isinstance(content, str) and status == 200:
            message = {"role": "assistant", "content": content}
            content = {
                "model": "m-1",
                "choices": [{"message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 500},
            }
        with self.server.lock:
            self.server.at_once -= 1
        if status is None:
            self.connection.close()
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.01)
    begun = []

    def start(replies) -> Server:
        begun.append(Server(replies))
        return begun[-1]

    yield start
    for server in begun:
        server.shutdown()
        server.server_close()


def test_servers_are_asked_several_at_a_time_and_again_where_that_helps(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret")

    def replies(said, number):
        if said == "limited" and number < 3:
            return 429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}
        if said == "cut" and number == 1:
            return None, {}, b""
        return {
            "broken": (500, {}, {"error": {"message": HOSTILE}}),
            "refused": (400, {}, {"error": {"message": "no such\nmodel"}}),
            "moved": (302, {"Location": "http://127.0.0.1:1/"}, b""),
            "odd": (200, {}, b"[1, 2"),
            "empty": (200, {}, {"choices": []}),
            "tool": (200, {}, {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]}),
        }.get(said, (200, {}, f"It is {said}. {HOSTILE}"))

    server = serve(replies)
    names = ["fine", "limited", "cut", "broken", "refused", "moved", "odd", "empty", "tool"]
    suite = {
        "variants": [
            {
                "name": "a",
                "model": "big",
                "upstream": server.url,
                "api_key_env": "A_KEY",
                "top_p": 0.5,
                "extra": {"temperature": None, "user": "me"},
            },
            {"name": "b", "model": "big", "upstream": server.url + "/", "system_prompt": "Be {{ how }}."},
        ],
        "scenarios": [{"name": name, "variables": {"x": name, "how": "good"}} for name in names],
        "defaults": {"prompt": "{{ x }}"},
        "checks": [{"contains": "{{ x }}"}],
        "prices": {"b*": {"input": 2.0, "output": 8.0}},
        "at_once": 3,
        "retries": 2,
    }
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(suite))
    found = compared(file, "--html", tmp_path / "page.html")
    cells = {(names[c["scenario"]], "ab"[c["variant"]]): c for c in found["cells"]}
    for name in ("fine", "limited", "cut"):
        assert cells[name, "a"]["text"] == f"It is {name}. {HOSTILE}" and cells[name, "a"]["passes"] is True
    assert cells["fine", "b"]["cost"] == (1000 * 2 + 500 * 8) / 1e6
    assert cells["tool", "a"]["text"] == '[{"id": "1"}]' and cells["tool", "a"]["tokens"] is None
    said = {name: cells[name, "a"]["error"] for name in names[3:8]}
    assert said["broken"].startswith("HTTP 500: </script>") and said["broken"].endswith("(3 tries)")
    assert said["refused"] == "HTTP 400: no such model"
    assert said["moved"].startswith("HTTP 302") and said["odd"] == "the response is no JSON: [1, 2"
    assert said["empty"] == "the response has no answer: null"
    assert server.most == 3
    by_user = [(key, body) for path, key, body in server.asked if body["messages"][-1]["content"] == "fine"]
    (key_a, a), (key_b, b) = sorted(by_user, key=lambda one: len(one[1]["messages"]))
    assert (key_a, key_b) == ("Bearer sk-secret", None)
    assert a == {
        "model": "big",
        "messages": [{"role": "user", "content": "fine"}],
        "max_tokens": 256,
        "top_p": 0.5,
        "user": "me",
    }
    assert b["messages"][0] == {"role": "system", "content": "Be good."} and b["temperature"] == 0.0
    summary = found["variants"][0]["summary"]
    assert (summary["answers"], summary["errors"], summary["passed"]["k"], summary["passed"]["n"]) == (4, 5, 3, 4)
    assert summary["tokens"] is None and found["variants"][0]["asked"] == {"top_p": 0.5}
    # errors are asked for again, answers are not; the key is nowhere
    n = len(server.asked)
    done = run(file)
    assert done.exit_code == 1 and "10 of the answers did not come; the first, a on broken: HTTP 500" in done.output
    again = [body["messages"][-1]["content"] for _, _, body in server.asked[n:]]
    assert set(again) == {"broken", "refused", "moved", "odd", "empty"}
    for one in tmp_path.iterdir():
        assert b"sk-secret" not in one.read_bytes()


def test_only_a_verdict_that_is_the_same_in_both_orders_counts(serve, tmp_path):
    def replies(said, number):
        if not said.startswith("Here is a question"):
            return 200, {}, said
        first, second = re.search(r"Answer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\nWhich", said).groups()
        if "first" in first:  # this judge likes the first one of these
            return 200, {}, "1"
        if "odd" in first:
            return 200, {}, "Both 1 and 2 are fine."
        return 200, {}, f"Answer {1 if len(first) > len(second) else 2} is better."

    server = serve(replies)
    who = {"upstream": server.url, "model": "m"}
    suite = {
        "variants": [{"name": "a", **who, "prompt": "{{ x }}"}, {"name": "b", **who, "prompt": "{{ x }}{{ more }}"}],
        "scenarios": [
            {"variables": {"x": x, "more": more}} for x, more in (("p", "q"), ("p", ""), ("first", "!"), ("odd", "!"))
        ],
        "judge": {"variant": "a"},
    }
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(suite))
    found = compared(file)
    assert [(v["better"], v["orders"], v["why"]) for v in found["verdicts"]] == [
        ("second", [2, 1], None),
        ("tie", None, "the same answer"),
        ("tie", [1, 1], None),
        ("tie", [None, None], None),
    ]
    judge = found["variants"][1]["against_baseline"]["judge"]
    assert (judge["won"], judge["lost"], judge["ties"], judge["unclear"]) == (1, 0, 3, 1)
    n = len(server.asked)
    assert compared(file)["verdicts"] == found["verdicts"] and len(server.asked) == n
    assert compared(file, "--again")["verdicts"] == found["verdicts"] and len(server.asked) > n


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("1", 1),
        (" 2.", 2),
        ("Answer 0", 0),
        ("12", None),
        ("1 or 2", None),
        ("1.5", None),
        ("I like 2!", 2),
        ("", None),
    ],
)
def test_a_judges_reply_has_to_be_plain(reply, verdict):
    assert said_of(reply) == verdict
