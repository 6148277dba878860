"""What becomes of recorded requests: imported, answered anew, exported, pruned, trained on."""

import json
import shlex
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_requests import CHAT, answered, asked

import slowft
from slowft.cli.main import slowft as command
from slowft.requests import imports, pruning
from slowft.requests.filters import Filter
from slowft.requests.store import RequestStore
from slowft.synthesis import export as exporting
from slowft.synthesis.export import Export, export

SYSTEM = "You are the assistant of a shop. Answer shortly, politely, and never speak of the weather."


def run(*words, status: int = 0) -> str:
    done = CliRunner().invoke(command, ["requests", *map(str, words)])
    if status:
        assert done.exception is not None, done.output
        return str(done.exception) if not isinstance(done.exception, SystemExit) else done.output
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def write(file: Path, *lines) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def rows(file: Path, columns: str, where: str = "1") -> list[tuple]:
    with closing(sqlite3.connect(file)) as db:
        return db.execute(f"SELECT {columns} FROM requests JOIN bodies USING (id) WHERE {where} ORDER BY id").fetchall()


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "requests.db"


@pytest.fixture
def store(file):
    with RequestStore(file) as store:
        yield store


# --- Import ---------------------------------------------------------------------------------------------

# As OpenPipe's documentation shows its export
OPENPIPE = [
    {
        "input": {"model": "openpipe:test", "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                  "messages": [{"role": "system", "content": "tell me the weather in SF"}]},
        "output": {"id": "c7", "model": "openpipe:test", "object": "chat.completion", "created": 1702666185703,
                   "usage": {"total_tokens": 106, "prompt_tokens": 47, "completion_tokens": 59},
                   "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": None,
                       "tool_calls": [{"id": "", "type": "function",
                                       "function": {"name": "get_weather", "arguments": "{}"}}]}}]},
        "tags": {"prompt_id": "test_sync", "$sdk": "python"},
    },
    {
        "input": {"model": "openpipe:test", "messages": [{"role": "user", "content": "count to 3"}]},
        "output": {"error": {"message": "overloaded"}}, "tags": {},
    },
]  # fmt: skip
REPORTED = {"requestedAt": 1702666185000, "receivedAt": 1702666187500, "reqPayload": asked("Hi", temperature=0),
            "respPayload": answered("Hello"), "statusCode": 200, "tags": {"app": "a"}}  # fmt: skip
BATCH_IN = [
    {"custom_id": "q-1", "method": "POST", "url": CHAT, "body": asked("One?")},
    {"custom_id": "q-2", "method": "POST", "url": CHAT, "body": asked("Two?")},
]
BATCH_OUT = [
    {"id": "b2", "custom_id": "q-2", "response": None, "error": {"code": "expired", "message": "too late"}},
    {"id": "b1", "custom_id": "q-1", "error": None,
     "response": {"status_code": 200, "request_id": "r", "body": answered("1") | {"created": 1700000000}}},
]  # fmt: skip
STORED = {"object": "chat.completion", "id": "chatcmpl-1", "model": "gpt-4o", "created": 1738960610,
          "metadata": {"app": "b"}, "temperature": 1.0, "messages": [{"role": "user", "content": "Stored?"}],
          "choices": answered("Yes")["choices"], "usage": answered("Yes")["usage"]}  # fmt: skip
CONVERSATION = {"messages": [*asked("A?")["messages"], {"role": "assistant", "content": "B"},
                             {"role": "user", "content": "C?"}, {"role": "assistant", "content": "D"}]}  # fmt: skip
PAIR = {"request": asked("Pair?"), "response": answered("So"), "status_code": 201, "model": "x", "began": 5.5}
PLAIN = {"prompt": "Once", "completion": " upon"}


def test_logs_of_many_forms_are_imported(file, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text("gpt-4o: {input: 1, output: 2}\n")
    one = write(tmp_path / "one.jsonl", *OPENPIPE, REPORTED, "", STORED, CONVERSATION, PAIR, PLAIN)
    files = [one, write(tmp_path / "out.jsonl", *BATCH_OUT), write(tmp_path / "in.jsonl", *BATCH_IN)]
    said = run("import", *files, "--db", file, "--tag", "from=logs", "--prices", prices, "--redact", "upon")
    assert said == f"9 requests imported into {file}\n"
    columns = "model, path, source, status, status_code, error, prompt_tokens, began, duration_s, cost"
    found = rows(file, columns)
    assert [row[1] for row in found] == [CHAT] * 6 + ["/v1/completions"] + [CHAT] * 2
    assert [row[0] for row in found] == ["openpipe:test"] * 2 + ["gpt-4o"] * 2 + [None, "gpt-4o", None] + ["gpt-4o"] * 2
    assert {row[2] for row in found} == {"import"}
    assert [row[3] for row in found] == ["complete", "error"] + ["complete"] * 5 + ["error", "complete"]
    assert [row[5] for row in found if row[5]] == ["overloaded", "too late"]
    assert found[0][6:8] == (47, 1702666185.703) and found[2][7:9] == (1702666185.0, 2.5)
    assert found[5][4] == 201 and found[5][7] == 5.5 and found[8][7] == 1700000000 and found[3][7] == 1738960610
    assert found[2][9] == pytest.approx((100 + 2 * 10) / 1e6) and found[0][9] is None
    bodies = [(json.loads(a), b and json.loads(b)) for a, b in rows(file, "request, response")]
    assert bodies[0] == (OPENPIPE[0]["input"], OPENPIPE[0]["output"])
    assert bodies[3][0] == {"model": "gpt-4o", "temperature": 1.0, "messages": STORED["messages"]}
    assert bodies[4][0] == {"messages": CONVERSATION["messages"][:3]}
    assert bodies[4][1]["choices"][0]["message"] == {"role": "assistant", "content": "D"}
    assert bodies[6] == ({"prompt": "Once"}, {"choices": [{"index": 0, "text": " [redacted]"}]})
    assert bodies[7][0] == BATCH_IN[1]["body"] and bodies[8] == (BATCH_IN[0]["body"], BATCH_OUT[1]["response"]["body"])
    with closing(sqlite3.connect(file)) as db:
        tags = db.execute("SELECT request, name, value FROM tags WHERE name != 'from' ORDER BY 1, 2").fetchall()
        assert db.execute("SELECT count(*) FROM tags WHERE value = 'logs'").fetchone() == (9,)
    assert tags == [(1, "$sdk", "python"), (1, "prompt_id", "test_sync"), (3, "app", "a"), (4, "app", "b"),
                    (8, "custom_id", "q-2"), (9, "custom_id", "q-1")]  # fmt: skip


def test_what_is_listed_as_json_can_be_imported_again(store, file, tmp_path):
    add(store, "One?", tags={"a": "b"}, kept=False, began=7.0, duration_s=2.5)
    add(store, "Two?", status_code=500, error="it went wrong")
    add(store, "Three?", is_broken=True)
    store.begin(path="/v1/completions", body={"prompt": "Four"}, source="upstream")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(reversed(run("list", "--json", "--db", file).splitlines(keepends=True))))
    said = run("--db", tmp_path / "other.db", "--json", "import", lines)  # options may come before the command
    assert json.loads(said) == {"imported": 4}
    columns = "id, path, model, status_code, error, finish_reason, kept, duration_s, began, conversation, response"
    assert rows(tmp_path / "other.db", columns) == rows(file, columns)
    statuses = [row for (row,) in rows(tmp_path / "other.db", "status")]
    assert statuses == ["complete", "error", "broken", "broken"]


BAD = [
    ("{", "is not JSON"),
    ('["a"]', "is not an object"),
    ({"promt": "a"}, "has the keys promt; known are"),
    ({"messages": asked("a")["messages"]}, "ends without an answer"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "has an answer and no question"),
    ({"messages": "a"}, "has messages that are no list"),
    ({"request": 3, "response": {}}, "has a request that is no object"),
    ({"request": asked("a"), "response": []}, "has a response that is no object"),
    ({"request": {"model": "m"}, "response": {}}, "has a request without messages or prompt"),
    ({"request": asked("a"), "response": {}, "tags": []}, "has tags that are no object"),
    ({"request": asked("a"), "response": {}, "began": "soon"}, "has a time that cannot be read: 'soon'"),
    ({"prompt": 3, "completion": "a"}, "has a prompt or a completion that is no text"),
    (BATCH_OUT[0], "answers 'q-2', which no line asks. Give the batch's input file too"),
]


def test_malformed_lines_are_named_with_their_numbers_and_nothing_is_imported(file, tmp_path):
    bad = write(tmp_path / "bad.jsonl", PAIR, *[line for line, _ in BAD], PAIR)
    said = run("import", bad, "--db", file, status=1)
    assert said.splitlines()[0] == f"{len(BAD)} lines cannot be imported, so nothing was:"
    for number, ((_, why), line) in enumerate(zip(BAD, said.splitlines()[1:]), 2):
        assert line.startswith(f"  {bad} line {number} {why}")
    assert not file.exists()
    run("import", write(tmp_path / "good.jsonl", PAIR), "--db", file)
    before = rows(file, "*")
    one = write(tmp_path / "one.jsonl", PAIR, BAD[3][0])
    assert run("import", one, "--db", file, status=1).endswith("not the assistant's. Nothing was imported")
    assert rows(file, "*") == before
    assert "is not there" in run("import", tmp_path / "none.jsonl", "--db", file, status=1)
    assert "of no kind that is imported" in run("import", write(tmp_path / "a.csv", "a"), "--db", file, status=1)
    assert "holds no answered requests" in run("import", write(tmp_path / "e.jsonl"), "--db", file, status=1)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("messages choices role content body error".split()), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("request response messages input output prompt tags custom_id".split()), JUNK))
def test_a_line_of_any_shape_is_a_row_or_says_why_not(line):
    with tempfile.TemporaryDirectory() as directory:
        file = write(Path(directory) / "f.jsonl", line)
        try:
            assert len(list(imports.read([file]))) == 1
        except slowft.DataError as e:
            assert str(e).startswith(f"{file} line 1 ") or "holds no answered requests" in str(e)


# --- Export ---------------------------------------------------------------------------------------------


def add(store: RequestStore, question, answer: str | None = "So.", system: str | None = None, **how) -> int:
    messages = asked(question)["messages"] if isinstance(question, str) else question
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    tags, response = how.pop("tags", {}), how.pop("response", None) or answered(answer, how.pop("reason", "stop"))
    more = how.pop("more", {})
    store.add([{"body": {"model": "m", "messages": messages} | more, "response": response, "tags": tags} | how])
    return store.ids()[-1]


def exported(store, folder: Path, *filters, **how) -> tuple[list[dict], dict]:
    """(lines of all splits, what was left out)."""
    counts = export(store, list(filters), folder, Export(**({"valid": 0, "test": 0} | how)))
    assert counts.came_in == counts.went_out + sum(counts.left_out.values())
    return [line for split in sorted(folder.glob("*.jsonl")) for line in read(split)], counts.left_out


def test_complete_and_successful_answers_are_exported_each_once_and_nothing_else(store, tmp_path):
    good = add(store, "Good?", "Yes.", SYSTEM, more={"tools": [{"type": "function"}]})
    add(store, "Cut?", reason="length"), add(store, "Filtered?", reason="content_filter"), add(store, "Empty?", " ")
    add(store, "Error?", status_code=500), add(store, "Broken?", is_broken=True), add(store, "Discarded?", kept=False)
    add(store, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    parts = [{"type": "text", "text": "Call "}, {"type": "text", "text": "it!"}]
    answer = answered(None, "tool_calls", tool_calls=calls)
    called = add(store, [{"role": "user", "content": parts}], response=answer)
    twice = [add(store, "Twice?", "The same."), add(store, "Twice?", "Another."), add(store, "Twice?", "The same.")]
    store.begin(path=CHAT, body=asked("Begun?"), source="upstream")
    lines, left_out = exported(store, tmp_path / "a")
    assert [line["id"] for line in lines] == [twice[2], twice[1], called, good]
    assert left_out == {"cut off": 1, "cut off by a filter": 1, "without an answer": 1, "discarded": 1,
                        "with images or sounds": 1, "the same as a newer one": 1}  # fmt: skip
    assert lines[3]["messages"] == [
        {"role": "system", "content": SYSTEM}, *asked("Good?")["messages"], {"role": "assistant", "content": "Yes."}
    ]  # fmt: skip
    assert lines[3]["tools"] == [{"type": "function"}] and "tools" not in lines[2]
    assert lines[2]["messages"] == [
        {"role": "user", "content": "Call it!"}, {"role": "assistant", "content": "", "tool_calls": calls}
    ]  # fmt: skip
    with pytest.raises(slowft.DataError, match="nothing is left to export. export: 0 of 0 rows. Give other filters"):
        exported(store, tmp_path / "b", Filter("model", "equal", "none"))
    assert not list((tmp_path / "b").glob("*"))


def test_what_was_answered_anew_is_exported_with_the_newest_answer(store, tmp_path):
    old = [add(store, f"Question {i}?", "old") for i in range(4)]
    first = add(store, "Question 0?", "anew", relabels=old[0])
    second = add(store, "Question 0?", "anew again", relabels=first)
    third = add(store, "Question 1?", "anew", relabels=old[1])
    add(store, "Question 2?", "anew", relabels=old[2], reason="length")
    add(store, "Question 3?", "anew", relabels=old[3], kept=False)
    lines, left_out = exported(store, tmp_path / "a")
    assert {line["id"] for line in lines} == {second, third, old[2], old[3]}
    assert left_out == {"answered anew": 3, "cut off": 1, "discarded": 1}


def test_alpacas_form_is_read_again_as_the_conversation(store, tmp_path):
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C?"},
    ]
    add(store, turns, "D.", SYSTEM)
    add(store, "Q?", "A.")
    add(store, [*turns, {"role": "user", "content": "And?"}], "E.")
    add(store, "T?", "U.", more={"tools": [{"type": "function"}]})
    lines, left_out = exported(store, tmp_path, form="alpaca")
    from slowft.data.files import Features
    from slowft.data.samples import understand

    assert left_out == {"not of Alpaca's form": 2}
    found = [understand(line, Features()).messages for line in lines]
    answer = {"role": "assistant", "content": "D."}
    assert found[1] == [{"role": "system", "content": SYSTEM}, *turns, answer]
    assert [m["content"] for m in found[0]] == ["Q?", "A."]


def test_preferences_are_the_new_answer_before_the_old_and_the_kept_before_the_discarded(store, tmp_path):
    old = [add(store, f"{i}?", f"old {i}", kept=True if i == 1 else None) for i in range(5)]
    for i, how in ((0, {}), (1, {}), (2, {"kept": False}), (3, {})):
        add(store, f"{i}?", f"old {i}" if i == 3 else f"new {i}", relabels=old[i], **how)
    add(store, "Kept?", "good", kept=True)
    add(store, "Kept?", "bad", kept=False), add(store, "Kept?", "worse", kept=False)
    add(store, "Alone?", "good", kept=True), add(store, "Alone!", "bad", kept=False)
    lines, left_out = exported(store, tmp_path, form="preferences")
    pairs = {(x["prompt"][0]["content"], x["chosen"][0]["content"], x["rejected"][0]["content"]) for x in lines}
    assert pairs == {("0?", "new 0", "old 0"), ("1?", "old 1", "new 1"), ("2?", "old 2", "new 2"),
                     ("Kept?", "good", "bad"), ("Kept?", "good", "worse")}  # fmt: skip
    assert left_out == {"the same answer twice": 1}
    with pytest.raises(slowft.DataError, match="Only requests that were relabelled, or kept and discarded, have pairs"):
        exported(store, tmp_path, Filter("model", "equal", "none"), form="preferences")


@pytest.mark.parametrize("counted", [1000, 10, 0])
def test_a_conversation_is_never_in_two_splits(counted, store, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "COUNTED", counted)
    for i in range(60):
        turns = [{"role": "user", "content": f"Opening {i}"}]
        for k in range(i % 3 + 1):
            add(store, list(turns), f"Answer {i} {k}", SYSTEM)
            turns += [{"role": "assistant", "content": f"Answer {i} {k}"}, {"role": "user", "content": f"More {i} {k}"}]
    exported(store, tmp_path / "a", valid=0.2, test=0.1)
    splits = {file.stem: read(file) for file in (tmp_path / "a").glob("*.jsonl")}
    openings = {s: {line["messages"][1]["content"] for line in lines} for s, lines in splits.items()}
    assert set(splits) == {"train", "valid", "test"} and sum(map(len, splits.values())) == 120
    assert not openings["train"] & openings["valid"] and not openings["test"] & (openings["train"] | openings["valid"])
    slack = 3 if counted == 1000 else 20
    assert abs(len(splits["valid"]) - 24) <= slack and abs(len(splits["test"]) - 12) <= slack
    exported(store, tmp_path / "b", valid=0.2, test=0.1)
    assert {file.stem: read(file) for file in (tmp_path / "b").glob("*")} == splits


def test_a_tag_may_say_what_belongs_together(store, tmp_path):
    for i in range(12):
        add(store, f"Question {i}", tags={"user": f"u{i % 4}"})
    lines, _ = exported(store, tmp_path, valid=0.3, test=0, by="user")
    users = [{line["group"] for line in read(tmp_path / f"{split}.jsonl")} for split in ("train", "valid")]
    assert users[0] | users[1] == {f"user=u{i}" for i in range(4)} and not users[0] & users[1] and len(lines) == 12
    with pytest.raises(slowft.DataError, match="3 samples of 1 conversation cannot be split.*--valid 0"):
        exported(store, tmp_path / "b", Filter("tag.user", "equal", "u1"), valid=0.3, by="user")
    with pytest.raises(slowft.ConfigError, match="nothing is left to train on"):
        exported(store, tmp_path / "b", valid=0.5, test=0.5)


# --- Pruning --------------------------------------------------------------------------------------------

WORD = st.sampled_from("alpha beta gamma delta".split())
SHARED = "Classify the following review of a product as good or bad. Answer with one word."


WORDS = st.lists(WORD, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=6), st.booleans())
def test_rules_are_texts_of_every_prompt(reviews, has_system):
    prompts = []
    for before, after in reviews:
        text = " ".join([*before, SHARED, *after])
        told = [{"role": "system", "content": SYSTEM}] if has_system else []
        prompts.append([*told, {"role": "user", "content": text}, {"role": "assistant", "content": SHARED}])
    rules = pruning.find(iter(prompts))
    assert all(len(rule.strip()) >= pruning.SHORTEST for rule in rules)
    for prompt in prompts:
        told = [message["content"] for message in prompt[:-1]]
        assert all(any(rule in text for text in told) for rule in rules)
        pruned = pruning.apply(rules, prompt)
        assert pruned[-1] == prompt[-1] and pruned == pruning.apply(rules, pruned)
        assert any(message["role"] == "user" and message["content"].strip() for message in pruned)
    if len({tuple(map(tuple, review)) for review in reviews}) > 1:
        assert any(SHARED in rule for rule in rules) and (not has_system or SYSTEM in rules)
    else:
        assert rules == []


def test_rules_are_found_in_the_middle_and_what_few_share_is_none():
    def prompt(a: str, b: str, c: str) -> list[dict]:
        return [{"role": "user", "content": f"{a} {SHARED}\n\n{b}\n\n{SYSTEM} {c}"}]

    prompts = [prompt(f"First {i}", f"{i} of {i * i}", f"{i} end") for i in range(5)]
    assert pruning.find(prompts) == [SYSTEM, SHARED]
    assert pruning.apply(pruning.find(prompts), prompts[2])[0]["content"].split() == "First 2 2 of 4 2 end".split()
    assert pruning.find([*prompts, [{"role": "user", "content": "something else"}]]) == []
    assert pruning.find(prompts[:1]) == [] == pruning.find([prompts[0], prompts[0]]) == pruning.find([])


def test_pruning_leaves_answers_parts_and_at_least_a_question():
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [{"type": "text", "text": f"{SYSTEM} Why?"}, {"type": "image_url"}]},
        {"role": "assistant", "content": f"{SYSTEM} So."},
        {"role": "user", "content": SYSTEM},
    ]
    assert pruning.apply([SYSTEM], messages) == [
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image_url"}]}, *messages[2:]
    ]  # fmt: skip
    assert pruning.apply([], messages) == messages and pruning.apply([SYSTEM], messages[:1]) == messages[:1]


def test_rules_that_are_none_are_named(tmp_path):
    assert pruning.load(tmp_path) == [] == pruning.load(tmp_path / "none")
    for text in ("{", "[]", '{"remove": [""]}', '{"remove": "a"}'):
        (tmp_path / pruning.FILE).write_text(text)
        with pytest.raises(slowft.DataError, match="pruning_rules.json holds no pruning rules"):
            pruning.load(tmp_path)
    pruning.save(tmp_path, ["a"])
    assert pruning.load(tmp_path) == ["a"]
    pruning.save(tmp_path, [])
    assert not list(tmp_path.iterdir())


# --- The whole way --------------------------------------------------------------------------------------


def test_exported_data_is_trained_on_and_its_rules_go_with_the_adapter(store, file, tmp_path, llama_with_tokenizer):
    for i in range(8):
        add(store, f"Question {i}?", f"Answer {i}.", SYSTEM)
    said = run("export", "--db", file, "--output", tmp_path / "data", "--valid", 0.25, "--test", 0, "--prune")
    assert said.startswith("Removed of all prompts: ") and said.endswith("export: 8 of 8 rows\n")
    assert SYSTEM not in (tmp_path / "data/train.jsonl").read_text()

    def slow(*words):
        done = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    of_model = ["--model", llama_with_tokenizer]
    shown = json.loads(slow("data", tmp_path / "data", *of_model, "--train-on", "assistant", "--json").splitlines()[-1])
    assert {name: counts["samples"] for name, counts in shown["sets"].items()} == {"train": 6, "valid": 2}
    train = ["finetune", *of_model, "--data", tmp_path / "data", "--adapter-path", tmp_path / "adapter", "--iters", 1]
    train += ["--batch-size", 1, "--num-layers", 1, "--train-on", "assistant", "--val-batches", 1]
    slow(*train)
    assert json.loads((tmp_path / "adapter" / pruning.FILE).read_text()) == {"remove": [SYSTEM]}
    # the adapter is asked what it was trained on, and a base model what it is told
    question = [{"role": "system", "content": SYSTEM}, *asked("Q?")["messages"]]
    prompts = write(tmp_path / "p.jsonl", {"messages": question})
    told = ["generate", *of_model, "--prompts", prompts, "--json", "--max-tokens", 2]
    lines = [json.loads(slow(*told, *more)) for more in ([], ["--adapter-path", tmp_path / "adapter"])]
    system = f"system: {SYSTEM}"  # a token a letter, and two around
    assert lines[0]["prompt_tokens"] - lines[1]["prompt_tokens"] == len(system) + 2
    # another run there, of data that was not pruned
    (tmp_path / "data" / pruning.FILE).unlink()
    slow(*train)
    assert not (tmp_path / "adapter" / pruning.FILE).exists()


def test_relabelling_adds_rows_and_goes_on_where_it_was_stopped(store, file, llama_with_tokenizer, monkeypatch):
    for i in range(4):
        add(store, f"Question {i}?", f"old {i}", tags={"app": "shop"}, more={"max_tokens": 2 + i, "temperature": 1})
    add(store, "With tools?", more={"tools": [{}]})
    add(store, [{"role": "user", "content": [{"type": "image_url"}]}])
    words = ["relabel", "--db", file, "--model", llama_with_tokenizer, "--name", "large", "--memory", "1GB", "--json"]

    added, add_row = [], RequestStore.add

    def stops(self, rows):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(add_row(self, rows))

    with monkeypatch.context() as patch:
        patch.setattr(RequestStore, "add", stops)
        run(*words, "--wave", 1, status=1)
    first = rows(file, "*", "relabels")
    assert len(first) == 2
    said = json.loads(run(*words).splitlines()[-1])
    assert said["in"] == 8 and said["out"] == 4 and said["done before"] == 2
    assert said["left_out"] == {"answers anew themselves": 2, "with images or sounds": 1, "with tools": 1}
    anew = rows(file, "relabels, model, source, status, completion_tokens, request, response", "relabels")
    assert sorted(row[0] for row in anew) == [1, 2, 3, 4] and rows(file, "*", "relabels")[:2] == first
    assert {row[1:4] for row in anew} == {("large", "relabel", "complete")}
    for relabels, *_, tokens, request, response in anew:
        old = store.get(relabels)
        assert json.loads(request)["messages"] == old.request["messages"] and "temperature" not in json.loads(request)
        assert tokens <= 1 + relabels and json.loads(response)["model"] == "large"
        (expected,) = slowft_answers(llama_with_tokenizer, old.request["messages"], 1 + relabels)
        assert json.loads(response)["choices"][0]["message"]["content"] == expected
        (id,) = store.relabelled(relabels)
        assert store.get(id).tags == {"app": "shop"} and f"Answered anew by {id}" in run("show", relabels, "--db", file)
    assert json.loads(run(*words).splitlines()[-1])["done before"] == 4 and len(store.list(limit=99)) == 10
    said = json.loads(run(*words, "--limit", 3).splitlines()[-1])  # of requests: the newest four rows are answers
    assert said["left_out"]["answers anew themselves"] == 4 and said["done before"] == 1


def slowft_answers(model: Path, messages: list[dict], max_tokens: int) -> list[str]:
    """mlx-lm's answer."""
    import mlx_lm

    loaded, tokenizer = mlx_lm.load(str(model))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return [mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=max_tokens)]


# --- The command ----------------------------------------------------------------------------------------


def test_requests_are_listed_shown_and_marked(store, file):
    for i in range(3):
        add(store, f"What of \x1b[31m{i}?", f"Answer {i}", tags={"n": str(i)}, began=1e9 + i)
    add(store, "No?", status_code=500, error="it went\nwrong")
    listed = run("list", "--db", file, "--where", "text~what of", "--limit", 2)
    assert [line.split()[0] for line in listed.splitlines()] == ["3", "2", "Older"] and "\x1b" not in listed
    assert listed.splitlines()[-1] == "Older ones: --before 2"
    assert run("list", "--db", file, "--before", 2).startswith("1  2001-09-")
    assert run("list", "--db", file, "--where", "model=none") == "No such requests\n"
    assert run("list", "--db", file, "--where", "model=none", "--json") == ""
    as_json = [json.loads(line) for line in run("list", "--db", file, "--json").splitlines()]
    assert [row["id"] for row in as_json] == [4, 3, 2, 1] and as_json[3]["tags"] == {"n": "0"}
    assert json.loads(run("show", 1, "--db", file, "--json")) == as_json[3]
    shown = run("show", 4, "--db", file)
    assert "Error: it went\\nwrong" in shown and "\nuser\nNo?\n\nassistant\nSo.\n" in shown
    assert run("tag", 1, 2, "--set", "seen=yes", "--remove", "n", "--keep", "--db", file) == "2 requests marked\n"
    assert rows(file, "id, kept", "kept") == [(1, 1), (2, 1)] and store.get(1).tags == {"seen": "yes"}
    assert run("tag", "--where", "status=error", "--discard", "--db", file) == "1 request marked\n"
    assert store.get(4).kept is False
    assert "kept" in run("list", "--db", file, "--where", "kept=yes")
    for words in (["tag", "--keep"], ["tag", 1], ["tag", 1, "--set", "a"], ["list", "--limit", 0]):
        run(*words, "--db", file, status=2)
    assert "no field 'modl'" in run("list", "--where", "modl=1", "--db", file, status=2)
    assert "has no request 99" in run("show", 99, "--db", file, status=1)
    for words in (
        ["list"],
        ["tag", 1, "--keep"],
        ["export", "--output", "x"],
        ["show", 1],
        ["relabel", "--model", "m"],
    ):
        assert "none.db is not there" in run(*words, "--db", file.parent / "none.db", status=1)
    assert not (file.parent / "none.db").exists()


def test_every_command_has_help_that_ends_in_an_example_that_parses():
    group = command.get_command(None, "requests")
    for name, one in group.commands.items():
        text = run(name, "--help")
        example = shlex.split(" ".join(text.split("Options:")[0].split("Example:")[1].split()))
        assert example[:3] == ["slowft", "requests", name]
        one.make_context(name, example[3:])
        assert all(p.help for p in one.params if isinstance(p, click.Option))


def test_the_page_says_every_command_option_and_field():
    from slowft.requests import filters

    page = (Path(slowft.__file__).parents[1] / "docs/requests.md").read_text()
    group = command.get_command(None, "requests")
    assert all(f"slowft requests {name}" in page for name in group.commands)
    for field in (*filters.COLUMNS, *filters.TEXTS, filters.RELABELLED, "time", "tag.NAME"):
        assert f"`{field}`" in page
    for line in page.splitlines():
        if line.startswith("    slowft requests "):
            words = shlex.split(line, comments=True)[2:]
            group.commands[words[0]].make_context(words[0], words[1:])
