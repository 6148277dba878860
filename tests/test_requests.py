"""The file of recorded requests: what is in it is read here by plain SQL, and filters are computed again in Python."""

import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slowft
from slowft import platform
from slowft.requests import prices
from slowft.requests.filters import Filter, parse
from slowft.requests.store import RequestStore
from slowft.requests.streams import Pieces

CHAT = "/v1/chat/completions"


def asked(text: str, model: str = "gpt-4o", **more) -> dict:
    return {"model": model, "messages": [{"role": "user", "content": text}]} | more


def answered(text: str | None, reason: str = "stop", **message) -> dict:
    message = {"role": "assistant", "content": text} | message
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage}


def recorded(store: RequestStore, text: str, answer: str | None = "So.", status_code: int = 200, **more) -> int:
    id = store.begin(path=CHAT, body=asked(text, **more), source="upstream")
    store.finish(id, response=answered(answer), status_code=status_code)
    return id


def sql(file: Path, statement: str, *values) -> list[tuple]:
    """What another program reads in the file."""
    with closing(sqlite3.connect(file)) as db:
        return db.execute(statement, values).fetchall()


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "requests.db"


@pytest.fixture
def store(file):
    with RequestStore(file, prices={"gpt-*": {"input": 2.0, "output": 10.0}}) as store:
        yield store


# --- Recording ------------------------------------------------------------------------------------------


def test_a_request_is_in_the_file_when_it_begins_and_has_its_answer_when_it_ends(store, file):
    body = json.dumps(asked("Why?\ud83d", temperature=0)).encode()
    id = store.begin(path=CHAT, body=body, source="upstream", tags={"app": "shop", "n": 3})
    look = "SELECT status, model, source, path, request, response FROM requests JOIN bodies USING (id)"
    ((*facts, request, response),) = sql(file, look)
    assert facts == ["begun", "gpt-4o", "upstream", CHAT] and response is None
    assert json.loads(request) == json.loads(body)
    assert sql(file, "SELECT name, value, request FROM tags ORDER BY 1") == [("app", "shop", id), ("n", "3", id)]
    store.finish(id, response=answered("Because."), status_code=200)
    ((*_, response),) = sql(file, look)
    assert json.loads(response) == answered("Because.")
    numbers = "SELECT status, status_code, finish_reason, prompt_tokens, completion_tokens, cost FROM requests"
    assert sql(file, numbers) == [("complete", 200, "stop", 100, 10, (100 * 2 + 10 * 10) / 1e6)]
    assert 0 <= store.get(id).duration_s < 60 and store.get(id).tags == {"app": "shop", "n": "3"}


@pytest.mark.parametrize(
    "how, status",
    [
        ({"response": answered("So."), "status_code": 200}, "complete"),
        ({"response": answered("So."), "status_code": None}, "complete"),
        ({"response": {"error": {"message": "no"}}, "status_code": 429}, "error"),
        ({"response": {"error": {"message": "no"}}, "status_code": 200}, "error"),
        ({"response": None, "status_code": 200}, "error"),
        ({"response": answered("So."), "status_code": 200, "error": "timeout"}, "error"),
        ({"response": answered("So"), "status_code": 200, "is_broken": True}, "broken"),
    ],
)
def test_how_it_ended_is_its_status(how, status, store, file):
    store.finish(store.begin(path=CHAT, body=asked("Why?"), source="local"), **how)
    assert sql(file, "SELECT status FROM requests") == [(status,)]


@pytest.mark.parametrize("body", [b"\xff\x00{", b"[" * 100_000, b"null", b"[1]", b'{"messages": 3, "model": []}', b""])
def test_a_body_of_any_kind_is_recorded(body, store, file):
    id = store.begin(path=CHAT, body=body, source="upstream")
    store.finish(id, response={"choices": [{"message": 3}, 4], "usage": [5]}, status_code=200)
    assert store.get(id).status == "complete" and json.loads(sql(file, "SELECT request FROM bodies")[0][0]) != ""
    store.cached(CHAT, body)
    store.list([parse("text~abc")])


def test_the_file_and_what_lies_beside_it_are_the_users_alone(file):
    before = os.umask(0)
    try:
        file.touch(0o644)
        with RequestStore(file) as store:
            recorded(store, "Why?")
            modes = {f.name: f.stat().st_mode & 0o777 for f in file.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"requests.db": 0o600, "requests.db-wal": 0o600, "requests.db-shm": 0o600}


def test_keys_and_what_the_patterns_match_are_nowhere_in_the_file(file):
    secrets = ["K3y-of-the-body", "k3y-in-the-path", "4711-0815", "sk-proj-abcdef123456", "tok3n-of-bearer"]
    with RequestStore(file, redact=[r"\d{4}-\d{4}"]) as store:
        body = asked("Card 4711-0815!", api_key=secrets[0], extra_headers={"Cookie": secrets[0]})
        body["tools"] = [{"4711-0815": ["4711-0815"]}]
        id = store.begin(path=f"{CHAT}?key={secrets[1]}", body=body, source="upstream", tags={"card": "4711-0815"})
        error = {"error": {"message": f"Incorrect key {secrets[3]}, Authorization: Bearer {secrets[4]}"}}
        store.finish(id, response=error, status_code=401, error=f"of 4711-0815: {secrets[3]}")
        store.finish(
            store.begin(path=CHAT, body=asked("b"), source="x"), response=answered("4711-0815"), status_code=200
        )
        while_open = b"".join(f.read_bytes() for f in file.parent.iterdir())
        assert store.get(id).request["messages"][0]["content"] == "Card [redacted]!"
        assert store.get(id).response["error"]["message"] == "Incorrect key [redacted], Authorization: [redacted]"
        assert not store.list([parse("text~4711")]) and len(store.list([parse("text~redacted")])) == 2
        assert store.cached(CHAT, asked("b")) is None  # the answer in the file is not the one that was given
    for content in (while_open, file.read_bytes()):
        assert b"Card" in content and not [secret for secret in secrets if secret.encode() in content]
    with pytest.raises(slowft.ConfigError, match=r"--redact '\(' is no regular expression"):
        RequestStore(file, redact=["("])


def test_equal_requests_have_the_newest_complete_answer(store):
    assert store.cached(CHAT, asked("Why?")) is None
    recorded(store, "Why?", "one", temperature=0)
    recorded(store, "Why?", "two", temperature=0, stream=True, metadata={"a": "b"})
    recorded(store, "Why?", "no", 500, temperature=0)
    store.begin(path=CHAT, body=asked("Why?", temperature=0), source="upstream")
    spaced = b' {"temperature" : 0, "messages":[{"content":"Why?", "role":"user"}],\n"model":"gpt-4o"}'
    assert store.cached(f"{CHAT}?a=b", spaced).response == answered("two")
    for other in (asked("Why?"), asked("Why? ", temperature=0), asked("Why?", temperature=0, n=2)):
        assert store.cached(CHAT, other) is None
    assert store.cached("/v1/completions", spaced) is None


def test_many_threads_lose_nothing(store, file):
    def work(i: int) -> None:
        for k in range(10):
            recorded(store, f"Question {i} {k}", f"Answer {i} {k}")
            store.list([parse("status=complete")], limit=3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = sql(file, "SELECT request, response FROM bodies JOIN requests USING (id) WHERE status = 'complete'")
    pairs = {
        (json.loads(a)["messages"][0]["content"], json.loads(b)["choices"][0]["message"]["content"]) for a, b in rows
    }
    assert pairs == {(f"Question {i} {k}", f"Answer {i} {k}") for i in range(8) for k in range(10)}


def test_several_may_make_the_file_at_a_time(tmp_path):
    for k in range(5):
        file, together, errors = tmp_path / f"a b?#%{k}.db", threading.Barrier(8), []

        def work(file=file, together=together, errors=errors) -> None:
            together.wait()
            try:
                with RequestStore(file) as store:
                    recorded(store, "Why?")
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and sql(file, "SELECT count(*), count(DISTINCT id) FROM requests") == [(8, 8)]


# --- Crashes --------------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys
from slowft.requests.store import RequestStore
store = RequestStore(sys.argv[1])
for i in range(3):
    id = store.begin(path="/", body={"messages": [{"role": "user", "content": f"begun {i}"}]}, source="upstream")
    if i == 1:
        store.finish(id, response={"choices": []}, status_code=200)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_had_begun_is_broken_at_the_next_opening_and_what_a_living_one_has_is_not(store, file):
    mine = store.begin(path=CHAT, body=asked("mine"), source="upstream")
    subprocess.run([sys.executable, "-c", CRASH, str(file)], check=False)
    look = "SELECT status FROM requests ORDER BY id"
    assert sql(file, look) == [("begun",), ("begun",), ("complete",), ("begun",)]
    with RequestStore(file, read_only=True):
        assert sql(file, look)[1] == ("begun",)  # nothing is written
    with RequestStore(file) as other:
        assert sql(file, look) == [("begun",), ("broken",), ("complete",), ("broken",)]
        assert [row.id for row in other.list([parse("text~begun")])] == [4, 3, 2]
    store.finish(mine, response=answered("So."), status_code=200)
    assert sql(file, look)[0] == ("complete",)


def test_a_request_that_was_taken_for_broken_is_what_its_own_process_says_in_the_end(store, file, monkeypatch):
    id = store.begin(path=CHAT, body=asked("Why not?"), source="upstream")
    with monkeypatch.context() as patch:
        patch.setattr(platform, "is_running", lambda process: False)  # as in a container with numbers of its own
        RequestStore(file).close()
    assert store.get(id).status == "broken" and store.list([parse("prompt~why not")])
    for answer in ("Because.", "That is why."):
        store.finish(id, response=answered(answer), status_code=200)
        assert store.get(id).status == "complete" and store.list([parse(f"answer~{answer}")])
    assert not store.list([parse("answer~because")]) and store.list([parse("prompt~why not")])
    sql(file, "INSERT INTO texts (texts) VALUES ('integrity-check')")


def test_what_is_copied_into_the_file_reaches_the_drive_on_macos_too(file, monkeypatch):
    """By F_FULLFSYNC, whichever connection copies it: this process's, a reader's, or a forked child's."""
    connections, connect = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connections.append(connect(*a, **k)) or connections[-1])
    with RequestStore(file) as store:
        recorded(store, "Why?")
        store.list()
        child = os.getppid()  # a number that a running process has
        monkeypatch.setattr(os, "getpid", lambda: child)
        recorded(store, "How?")
        assert len(connections) == 3
        assert [db.execute("PRAGMA checkpoint_fullfsync").fetchone() for db in connections] == [(1,)] * 3
        monkeypatch.undo()


FORK = """
import os, sys
from slowft.requests.store import RequestStore
def record(text, meanwhile=lambda: None):
    id = store.begin(path="/", body={"prompt": text}, source="client")
    meanwhile()
    store.finish(id, response={"choices": [{"text": text}]}, status_code=200)
def fork():
    store.list()
    if os.fork() == 0:
        record("child")
        assert len(store.list()) == 2
        store.close()
        sys.exit()
    assert os.wait()[1] == 0
    assert [row.status for row in store.list()] == ["complete", "begun"]
store = RequestStore(sys.argv[1])
record("parent", fork)
store.close()
"""


def test_a_process_that_forks_records_and_so_does_its_child(file):
    subprocess.run([sys.executable, "-c", FORK, str(file)], check=True)
    assert sql(file, "SELECT status, request FROM requests JOIN bodies USING (id) ORDER BY id") == [
        ("complete", '{"prompt": "parent"}'),
        ("complete", '{"prompt": "child"}'),
    ]
    assert sql(file, "SELECT count(*) FROM writers") == [(0,)] and sql(file, "PRAGMA integrity_check") == [("ok",)]


class Unsaid:
    def __str__(self):
        return 1 / 0


def test_a_first_request_that_could_not_be_written_does_not_hide_the_next(file):
    with RequestStore(file) as store:
        with pytest.raises(ZeroDivisionError):
            store.begin(path=CHAT, body=asked("lost"), source="upstream", tags={"a": Unsaid()})
        store.begin(path=CHAT, body=asked("Why?"), source="upstream", tags={"": "x", "a": "b"})
        assert sql(file, "SELECT count(*) FROM requests JOIN writers ON writers.id = writer") == [(1,)]
        assert sql(file, "SELECT name, value FROM tags") == [("a", "b")]


def test_what_a_store_had_begun_when_it_was_closed_is_broken(file):
    with RequestStore(file) as store:
        store.begin(path=CHAT, body=asked("Why?"), source="upstream")
    assert sql(file, "SELECT status, writer FROM requests") == [("broken", None)]
    assert sql(file, "SELECT count(*) FROM writers") == [(0,)]


def test_a_process_is_told_from_a_later_one_of_its_number():
    me = platform.identity_of_process(os.getpid())
    assert platform.is_running(me) and not platform.is_running(f"{me}9")
    done = subprocess.Popen(["true"])
    other = platform.identity_of_process(done.pid)
    assert other is None or other != me
    while done.poll() is None:
        pass
    assert platform.identity_of_process(done.pid) is None


# --- Filters --------------------------------------------------------------------------------------------

MODELS, APPS = ["gpt-4o", "gpt-4o-mini", "Llama", None], ["shop", "Shop 2", "50%_off", None]
WORDS = ["refund", "Größe", "ÜBER", "москва", "a_b", "50%", 'say "no"', "x\\y", "the", "end", "日本語の本"]


def a_row(draw: random.Random) -> dict:
    text = " ".join(draw.choices(WORDS, k=draw.randint(0, 3)))
    body = {"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": text}]}
    if (model := draw.choice(MODELS)) is not None:
        body["model"] = model
    app = draw.choice(APPS)
    return {
        "body": body,
        "response": draw.choice([answered(draw.choice(WORDS)), answered(None), {"error": {"message": "x"}}]),
        "status_code": draw.choice([200, 200, 500]),
        "began": float(draw.randint(1, 50)),
        "is_broken": draw.random() < 0.2,
        "kept": draw.choice([None, True, False]),
        "tags": {} if app is None else {"app": app, "other": draw.choice(WORDS)},
    }


class Many:
    """A store and all of its rows, which Hypothesis does not print."""

    def __init__(self, store: RequestStore):
        self.store, self.rows = store, [store.get(i) for i in range(1, 321)]
        self.anew = {row.relabels for row in self.rows}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    draw, file = random.Random(0), tmp_path_factory.mktemp("many") / "requests.db"
    with RequestStore(file) as store:
        assert store.add(a_row(draw) for _ in range(300)) == 300
        store.add(a_row(draw) | {"relabels": draw.randint(1, 300)} for _ in range(20))
        yield Many(store)


def texts_of(row, field: str) -> list[str]:
    prompt = [message["content"] for message in row.request["messages"]]
    answers = [c["message"]["content"] or "" for c in row.response.get("choices", [])]
    return {"prompt": prompt, "answer": answers, "text": prompt + answers}[field]


def is_true(f: Filter, row, anew: set[int]) -> bool:
    """The filter, read from its description."""
    if f.field == "time":
        return row.began >= f.value if f.op == "after" else row.began < f.value
    if f.field == "relabelled":
        return (row.id in anew) == (f.value == "yes")
    if f.field in ("text", "prompt", "answer"):
        return any(f.value.lower() in text.lower() for text in texts_of(row, f.field)) == (f.op == "contains")
    if f.field == "kept":
        return (row.kept == {"yes": True, "no": False, "": None}[f.value]) == (f.op == "equal")
    value = row.tags.get(f.field[4:]) if f.field.startswith("tag.") else getattr(row, f.field)
    if f.op in ("equal", "not"):
        return (value == f.value) == (f.op == "equal")
    return (value is not None and f.value.lower() in str(value).lower()) == (f.op == "contains")


TEXT = st.sampled_from(["refund", "größe", "über", "МОСКВА", "a_b", "50%", '"no', "x\\y", "the end", "日本語", "zzz"])
SHORT = st.sampled_from(["gpt", "gpt-4o", "LLAMA", "shop", "Shop", "%", "_", "zzz", "p-4", "Llama"])
OPS = st.sampled_from(["equal", "not", "contains", "lacks"])
FILTERS = st.one_of(
    st.builds(Filter, st.sampled_from(["model", "tag.app", "tag.other", "tag.none", "source", "path"]), OPS, SHORT),
    st.builds(Filter, st.just("status"), st.sampled_from(["equal", "not"]), st.sampled_from(["complete", "broken"])),
    st.builds(Filter, st.just("status_code"), st.sampled_from(["equal", "not"]), st.sampled_from([200, 500])),
    st.builds(Filter, st.sampled_from(["text", "prompt", "answer"]), st.sampled_from(["contains", "lacks"]), TEXT),
    st.builds(Filter, st.just("time"), st.sampled_from(["after", "before"]), st.integers(0, 51)),
    st.builds(Filter, st.just("kept"), st.sampled_from(["equal", "not"]), st.sampled_from(["yes", "no", ""])),
    st.builds(Filter, st.just("relabelled"), st.just("equal"), st.sampled_from(["yes", "no"])),
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FILTERS, max_size=4), st.integers(0, 321))
def test_filters_find_the_rows_that_they_describe(many, filters, before):
    store, rows = many.store, many.rows
    expected = [row.id for row in rows if all(is_true(f, row, many.anew) for f in filters)]
    assert list(store.ids(filters)) == expected == [row.id for row in store.rows(filters)]
    assert store.count(filters) == len(expected)
    page = [row.id for row in store.list(filters, before_id=before, limit=7)]
    assert page == [i for i in reversed(expected) if i < before][:7]


def test_no_filter_sorts_and_each_has_its_index(many):
    """What SQLite plans: lists out of indexes, merged; a temporary B-tree would hold every row that is found."""
    store = many.store
    from slowft.requests.filters import ids

    for text in ("model=a", "status=complete", "tag.app=a", "tag.app!=a", "text~abc", "kept=yes", "model!=a", "time<9"):
        for others in ([], [parse("text!~xyz"), parse("model=b"), parse("status=error"), parse("tag.x~y")]):
            statement, values = ids([parse(text), *others], True, 10)
            plan = [row[3] for row in sql(store.path, f"EXPLAIN QUERY PLAN {statement}", *values)]
            assert not [line for line in plan if "TEMP B-TREE" in line], (text, plan)


@pytest.mark.parametrize(
    "text, field, op, value",
    [
        ("model=a=b", "model", "equal", "a=b"),
        ("model != a", "model", "not", "a"),
        ("text~a=b", "text", "contains", "a=b"),
        ("tag.a.b!~c", "tag.a.b", "lacks", "c"),
        ("time>=2026-01-01T00:00:00+00:00", "time", "after", 1767225600.0),
        ("time<5", "time", "before", 5.0),
        ("tag.a=", "tag.a", "equal", ""),
    ],
)
def test_filters_are_written_as_one_would(text, field, op, value):
    assert parse(text) == Filter(field, op, value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("model", "'model' is no filter. Write such as model=gpt-4o"),
        ("=a", "is no filter"),
        ("modl=a", "no field 'modl'. Known are model, status"),
        ("tag.=a", "no field 'tag.'"),
        ("text=abc", "text has no 'equal', only contains, lacks"),
        ("text~ab", "text: 'ab' is too short to look for. Give 3 characters or more"),
        ("model<a", "model has no 'before'"),
        ("time>=yesterday", "'yesterday' is no time. Write such as 2026-11-28"),
        ("status=done", "no status 'done'. Known are begun, complete, error, broken"),
        ("status_code=ok", "status_code is a number, not 'ok'"),
        ("kept=maybe", "kept is yes, no, or nothing"),
    ],
)
def test_a_filter_that_is_none_says_what_to_write(text, says):
    with pytest.raises(slowft.ConfigError) as e:
        parse(text)
    assert says in str(e.value) and "\n" not in str(e.value)


# --- Marks ----------------------------------------------------------------------------------------------


def test_tags_and_marks_are_set_changed_and_taken_away(store, file):
    one, two = recorded(store, "a"), recorded(store, "b")
    store.tag(one, "app", "shop")
    store.tag(one, "app", "desk")
    store.mark([one, two], {"seen": "yes", "never": None}, False)
    store.keep(two, True)
    assert sql(file, "SELECT * FROM tags ORDER BY 1, 3") == [("app", "desk", 1), ("seen", "yes", 1), ("seen", "yes", 2)]
    assert sql(file, "SELECT kept FROM requests") == [(0,), (1,)]
    store.tag(one, "app", None)
    store.keep(two, None)
    assert store.get(one).tags == {"seen": "yes"} and store.get(two).kept is None
    with pytest.raises(slowft.DataError, match="has no request 9"):
        store.mark([one, 9], {"seen": "no"})
    assert store.get(one).tags == {"seen": "yes"}  # all or none
    for wrong in (lambda: store.tag(9, "a", "b"), lambda: store.keep(9, True), lambda: store.get(9)):
        with pytest.raises(slowft.DataError, match="has no request 9. `slowft requests list` shows"):
            wrong()


# --- Files that are none, and prices --------------------------------------------------------------------


def refusal(file: Path, **how) -> str:
    with pytest.raises(slowft.DataError) as e:
        RequestStore(file, **how).close()
    assert "\n" not in str(e.value) and str(file) in str(e.value)
    return str(e.value)


def test_a_file_that_cannot_be_used_is_named_with_what_to_do(file, tmp_path, monkeypatch):
    text = tmp_path / "text.db"
    text.write_text("This is no database at all, only a text of some length, which nobody should write to." * 20)
    before = text.read_bytes()
    for how in ({}, {"read_only": True}):
        assert "is no file of recorded requests" in refusal(text, **how) and text.read_bytes() == before
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE requests (a)")
    assert "is no file of recorded requests. Give another --db" in refusal(other)
    assert "is not there. Give --db the file" in refusal(tmp_path / "none.db", read_only=True)
    assert not (tmp_path / "none.db").exists()
    assert "Make its folder first" in refusal(tmp_path / "none" / "a.db")
    RequestStore(file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 99")
    assert "is of format 99, written by a newer slowft; this one reads 1. Upgrade slowft" in refusal(file)


def test_a_file_that_another_program_writes_is_waited_for_and_then_named(store, file):
    id = store.begin(path=CHAT, body=asked("Why?"), source="upstream")
    with closing(sqlite3.connect(file, isolation_level=None)) as db, RequestStore(file, busy_s=0.05) as other:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(slowft.DataError, match="is being written by another program for 0.05 s and more"):
            other.tag(id, "a", "b")
        assert other.list()[0].id == id  # reading does not wait
        db.execute("ROLLBACK")
        other.tag(id, "a", "b")


def test_a_full_disk_is_named_and_what_was_recorded_stays(may_have_pages, file):
    store = RequestStore(file)
    recorded(store, "Why?")
    may_have_pages(sql(file, "PRAGMA page_count")[0][0] + 2)
    with pytest.raises(slowft.DataError, match="no space is left on the disk. Make room and try again"):
        for i in range(200):
            recorded(store, f"{i} " * 500)
    may_have_pages(1_000_000)
    assert store.get(1).response == answered("So.") and sql(file, "PRAGMA integrity_check") == [("ok",)]
    recorded(store, "and on")
    store.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ones_own_is_named(file):
    RequestStore(file).close()
    file.chmod(0o400)
    assert "cannot be opened for recording: Permission denied" in refusal(file)


def test_prices_are_the_models_own_or_of_the_pattern_that_says_most(tmp_path):
    file = tmp_path / "prices.yaml"
    patterns = "gpt-*: {input: 1, output: 2}\ngpt-4o*: {input: 3}\n'*': {input: 7}\n'*-2024': {input: 9}\n"
    file.write_text(f"{patterns}gpt-4o-mini: {{output: 5}}\n")
    found = prices.load(file)
    costs = {
        model: prices.cost(found, model, 1_000_000, 1_000_000)
        for model in ("gpt-3", "gpt-4o", "gpt-4o-mini", "x", "gpt-3-2024")
    }
    assert costs == {"gpt-3": 3, "gpt-4o": 3, "gpt-4o-mini": 5, "x": 7, "gpt-3-2024": 9}
    assert prices.cost(found, None, 1, 1) is None and prices.cost(found, "x", None, None) is None
    assert prices.cost({}, "x", 1, 1) is None and prices.cost({"y": found["*"]}, "x", 1, 1) is None
    for text, says in (
        ("a: [", "is no YAML"),
        ("- a", "holds no prices. Write lines such as gpt-4o*"),
        ("a: 3", "a has no prices that are numbers"),
        ("a: {input: x}", "a has no prices that are numbers"),
        ("a: {input: 1, out: 2}", "a has no prices that are numbers"),
        ("a: {input: true}", "a has no prices that are numbers"),
    ):
        file.write_text(text)
        with pytest.raises(slowft.ConfigError) as e:
            prices.load(file)
        assert says in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(slowft.ConfigError, match="none.yaml cannot be read"):
        prices.load(tmp_path / "none.yaml")


# --- Streams --------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "delta", "index", "content", "tool_calls", "function", "arguments", "logprobs"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(JUNK, max_size=4))
def test_pieces_of_any_kind_are_put_together_to_something(chunks):
    pieces = Pieces()
    for chunk in chunks:
        pieces.add(chunk)
    json.dumps(pieces.response())
