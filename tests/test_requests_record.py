"""`slowft.record` with the real openai package and a server of canned answers: the application sees no difference."""

import asyncio
import json
import logging
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

import slowft
from slowft.requests.store import RequestStore

CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"order": 12}'}}
MESSAGES = [{"role": "user", "content": "Where is my order?"}]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def chunk(delta: dict, reason: str | None = None, **more) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "s", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": [choice]} | more


def whole(message: dict, reason: str = "stop") -> dict:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": reason}
    return {"id": "w", "object": "chat.completion", "created": 5, "model": "m", "choices": [choice], "usage": USAGE}


TEXT = whole({"content": "It is on its way."})
STREAMED = [
    *(chunk({"role": "assistant", "content": ""}), chunk({"content": "It is "}), chunk({"content": "on its way."})),
    *(chunk({}, "stop"), chunk({}, usage=USAGE) | {"choices": []}),
]
BEGINNING = {"index": 0} | CALL | {"function": {"name": "look_up", "arguments": ""}}
CALLED = [
    chunk({"role": "assistant", "content": None, "tool_calls": [BEGINNING]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"order"'}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": ": 12}"}}]}, "tool_calls"),
]
PLAIN = {"id": "p", "object": "text_completion", "created": 5, "model": "m"}
PLAIN |= {"choices": [{"index": 0, "text": " way.", "finish_reason": "stop", "logprobs": None}]}


class Canned(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        what = body["model"]
        if what == "limited":
            error = {"error": {"message": f"Too many. {self.headers['Authorization']}", "type": "rate"}}
            return self.answer(429, json.dumps(error).encode())
        if what == "cut":
            pieces = [f"data: {json.dumps(piece)}\n\n".encode() for piece in STREAMED[:2]]
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"".join(pieces))
            self.close_connection = True
            return None
        pieces, answer = [PLAIN], PLAIN
        if self.path.endswith("/chat/completions"):
            pieces, answer = STREAMED, TEXT
            if "tools" in body:
                pieces, answer = CALLED, whole({"content": None, "tool_calls": [CALL]}, "tool_calls")
        if body.get("stream"):
            lines = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
            return self.answer(200, lines.encode(), "text/event-stream")
        return self.answer(200, json.dumps(answer).encode())

    def answer(self, status: int, content: bytes, kind: str = "application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["sync", "async"])
def clients(request, server, tmp_path):
    """(call a client that records, call one that does not, its file): both of one kind, waited for if it is async."""
    kind = openai.OpenAI if request.param == "sync" else openai.AsyncOpenAI
    how = {
        "api_key": "sk-of-the-user-123456",
        "base_url": f"http://127.0.0.1:{server.server_port}/v1",
        "max_retries": 0,
    }
    file = tmp_path / "requests.db"
    recording, plain = slowft.record(kind(**how), db=file, tags={"app": "shop"}), kind(**how)
    loop = asyncio.new_event_loop()

    def call(client, use):
        if request.param == "sync":
            return use(client)
        return loop.run_until_complete(use(client))

    yield (lambda use: call(recording, use)), (lambda use: call(plain, use)), file
    for client in (recording, plain):
        closing_ = client.close()
        if request.param == "async":
            loop.run_until_complete(closing_)
    loop.close()


def of_both(clients, work, **body):
    """What a call gives with recording and without, which has to be the same, and the rows of the file."""
    with_, without, file = clients
    results = []
    for call in (with_, without):

        def use(client):
            is_async = isinstance(client, openai.AsyncOpenAI)
            return work_async(work, client, body) if is_async else work_sync(work, client, body)

        results.append(call(use))
    assert results[0] == results[1]
    with RequestStore(file, read_only=True) as store:
        return results[0], store.list()


def work_sync(work: str, client, body):
    resource = client.completions if work == "plain" else client.chat.completions
    try:
        answer = resource.create(**body)
        if not body.get("stream"):
            return type(answer), answer.model_dump()
        if work == "left":
            with answer as stream:
                return type(answer), next(iter(stream)).model_dump()
        return type(answer), [piece.model_dump() for piece in answer]
    except openai.OpenAIError as e:
        return type(e), str(e)


async def work_async(work: str, client, body):
    resource = client.completions if work == "plain" else client.chat.completions
    try:
        answer = await resource.create(**body)
        if not body.get("stream"):
            return type(answer), answer.model_dump()
        if work == "left":
            async with answer as stream:
                async for piece in stream:
                    return type(answer), piece.model_dump()
        return type(answer), [piece.model_dump() async for piece in answer]
    except openai.OpenAIError as e:
        return type(e), str(e)


def test_answers_are_the_clients_own_and_are_in_the_file(clients):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    metadata = {"prompt": "order"}
    for more in ({}, {"tools": tools}, {"extra_body": {"top_k": 3}, "extra_headers": {"X-A": "b"}, "timeout": 30}):
        for stream in (False, True):
            kind, rows = of_both(
                clients,
                "chat",
                model="m",
                messages=MESSAGES,
                stream=stream,
                metadata=metadata,
                user=openai.omit,
                **more,
            )
            row, expected = rows[0], whole({"content": None, "tool_calls": [CALL]}) if "tools" in more else TEXT
            assert row.status == "complete" and row.path == "/v1/chat/completions" and row.source == "client"
            assert row.tags == {"app": "shop", "prompt": "order"} and row.model == "m" and row.duration_s > 0
            body = {"model": "m", "messages": MESSAGES, "stream": stream, "metadata": metadata}
            assert row.request == body | ({"tools": tools} if "tools" in more else more.get("extra_body", {}))
            found = row.response["choices"][0]["message"]
            assert found == expected["choices"][0]["message"]
            assert row.finish_reason == ("tool_calls" if "tools" in more else "stop")
            assert row.response["object"] == "chat.completion"
            assert "tools" in more or (row.prompt_tokens, row.completion_tokens) == (7, 3)
    for stream in (False, True):
        _, rows = of_both(clients, "plain", model="m", prompt="It is on its", stream=stream)
        assert rows[0].path == "/v1/completions" and rows[0].response["choices"][0]["text"] == " way."
    assert len(rows) == 8


def test_errors_and_answers_that_were_cut_off_are_the_clients_own_and_are_in_the_file(clients):
    (kind, _), rows = of_both(clients, "chat", model="limited", messages=MESSAGES)
    assert kind is openai.RateLimitError
    assert (rows[0].status, rows[0].status_code) == ("error", 429) and "Too many" in rows[0].error
    assert b"sk-of-the-user" not in b"".join(f.read_bytes() for f in clients[2].parent.iterdir())
    (kind, _), rows = of_both(clients, "chat", model="cut", messages=MESSAGES, stream=True)
    assert issubclass(kind, openai.OpenAIError) and rows[0].status == "error"
    assert rows[0].response["choices"][0]["message"]["content"] == "It is "
    _, rows = of_both(clients, "left", model="m", messages=MESSAGES, stream=True)  # after the first piece
    assert rows[0].status == "broken" and rows[0].response["choices"][0]["message"]["content"] == ""
    assert [row.status for row in rows] == ["broken", "error", "error"]


def test_raw_responses_are_left_alone_and_copies_of_a_client_record(server, tmp_path):
    file = tmp_path / "requests.db"
    how = {"api_key": "k", "base_url": f"http://127.0.0.1:{server.server_port}/v1", "max_retries": 0}
    with slowft.record(openai.OpenAI(**how), db=file) as client:
        raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
        assert json.loads(raw.text) == TEXT and raw.parse().choices[0].message.content == "It is on its way."
        with client.chat.completions.with_streaming_response.create(model="m", messages=MESSAGES) as streaming:
            assert json.loads(streaming.read()) == TEXT
        with RequestStore(file, read_only=True) as store:
            assert not store.list()
        client.with_options(timeout=5).chat.completions.create(model="m", messages=(m for m in MESSAGES))
        assert server.asked[-1]["messages"] == MESSAGES
        with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
            assert stream.get_final_completion().choices[0].message.content == "It is on its way."
    with RequestStore(file, read_only=True) as store:
        assert [row.status for row in store.list()] == ["complete", "complete"]
        assert store.get(1).request["messages"] == MESSAGES


def test_a_failure_to_record_disturbs_nothing(clients, monkeypatch, caplog):
    for name in ("begin", "finish"):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "slowft.requests"):
            patch.setattr(RequestStore, name, lambda *_, **__: 1 / 0)
            for stream in (False, True):
                of_both(clients, "chat", model="m", messages=MESSAGES, stream=stream)
    assert {record.getMessage() for record in caplog.records} == {"a request was not recorded: division by zero"}
    with closing(sqlite3.connect(clients[2], isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(RequestStore, "begin", lambda *_, **__: other.execute("SELECT * FROM nothing"))
        of_both(clients, "chat", model="m", messages=MESSAGES)
        other.execute("ROLLBACK")


def test_what_is_under_way_when_the_process_ends_is_broken(server, tmp_path):
    script = f"""
import openai, slowft
client = slowft.record(openai.OpenAI(api_key="k", base_url="http://127.0.0.1:{server.server_port}/v1"), db="r.db")
stream = client.chat.completions.create(model="m", messages=[], stream=True)
print(next(stream).id)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("s\n", "", 0)
    with closing(sqlite3.connect(tmp_path / "r.db")) as db:
        assert db.execute("SELECT status, writer FROM requests").fetchall() == [("broken", None)]
