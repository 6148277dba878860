"""`slowft serve`: what passes through is the upstream's, byte for byte; what is answered here is mlx-lm's in memory."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import asyncio
import errno
import http.client
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import TCPServer

import mlx.core as mx
import mlx_lm
import numpy as np
import openai
import pytest
from click.testing import CliRunner
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from conftest import randomise
from test_gpu_failures import gpu  # noqa: F401  (a fixture)
from slowft import platform
from slowft.cli.main import slowft as command
from slowft.inference.sampling import place_seed
from slowft.requests import pruning
from slowft.requests.filters import Filter
from slowft.requests.store import RequestStore
from slowft.serving import answers
from slowft.serving.guard import Guard, Refused
from slowft.serving.service import Service, Settings
from slowft.serving.recorder import tags_of
from slowft.serving.scheduler import OneRow, Wanted, passes_ahead
from upstreams import RECORDED, Recorded

TEMPLATE = (
    "{% if tools %}<tool_call> tool_call.name {{ tools | length }}{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SHARED = "You are a careful assistant of the Jargon File. Be brief, and be kind to those who ask."
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Served:
    """A server with all its parts, and what the tests compare it with."""

    service: Service
    upstream: Recorded
    path: Path
    adapter: Path
    template: Path
    said: list[str]

    @property
    def port(self) -> int:
        return self.service.server.server_address[1]

    @property
    def store(self) -> RequestStore:
        return self.service.store

    def client(self, **how) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.service.url, api_key="KEY-OF-THE-CLIENT", max_retries=0, **how)

    def ask(self, model: str, path: str = "/v1/chat/completions", headers: dict | None = None, **body):
        """(status, reason, headers, body) of a plain request."""
        said = json.dumps({"model": model, "messages": HELLO} | body).encode()
        return asked(self.port, "POST", path, said, headers)

    def rows(self, *filters: Filter, n: int = 1) -> list:
        """The newest rows, when nothing waits to be written any more."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = self.store.list(filters, limit=n)
            if len(found) >= n and all(row.status != "begun" for row in found):
                return list(found)
            time.sleep(0.01)
        raise AssertionError(f"{found} after 20 seconds")

    def in_memory(self, adapter: bool, prompt: str, n: int, **how) -> list[int]:
        """Tokens of mlx-lm's own model, loaded afresh."""
        model, tokenizer = self._loaded(adapter)
        tokens = mx.array(tokenizer.encode(prompt, add_special_tokens=False))
        return [token for token, _ in generate_step(tokens, model, max_tokens=n, **how)]

    def _loaded(self, adapter: bool):
        kept = self.__dict__.setdefault("_kept", {})
        if adapter not in kept:
            kept[adapter] = mlx_lm.load(str(self.path), adapter_path=str(self.adapter) if adapter else None)
        return kept[adapter]


def asked(port: int, method: str, path: str, body: bytes = b"", headers: dict | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body or None, headers or {})
        response = connection.getresponse()
        return response.status, response.reason, response.getheaders(), response.read()
    finally:
        connection.close()


def raw(port: int, data: bytes, is_all: bool = True) -> bytes:
    """What comes for these bytes until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        found = b""
        try:
            sock.sendall(data)
            if is_all:
                sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                found += piece
        except OSError:
            pass
        return found


def ids_of(response) -> list[int]:
    return [token.id for token in response.choices[0].logprobs.content]


@pytest.fixture(scope="module")
def served(llama_with_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with slowft.open_model(llama_with_tokenizer) as model:
        model.add_lora(num_layers=2, rank=2, scale=20.0)
        randomise(model)
        model.save_adapter(folder / "adapter")
    pruning.save(folder / "adapter", [SHARED])
    (folder / "template.jinja").write_text(TEMPLATE)
    upstream, said = Recorded(), []
    settings = Settings(
        model=str(llama_with_tokenizer),
        adapter=[f"tuned={folder / 'adapter'}"],
        emulate=str(llama_with_tokenizer),
        delta=[f"{folder / 'adapter'}:0.5"],
        upstream=upstream.url,
        record=str(folder / "requests.db"),
        chat_template=str(folder / "template.jinja"),
        port=0,
        memory="3GB",
        max_tokens=12,
    )
    with Service(settings, said.append) as service:
        yield Served(service, upstream, llama_with_tokenizer, folder / "adapter", folder / "template.jinja", said)
    upstream.close()


# --- Upstream ---------------------------------------------------------------------------------------------

BETWEEN_NEIGHBOURS = {"connection", "transfer-encoding", "keep-alive"}


@pytest.mark.parametrize("name", ["plain", "stream", "tools", "tool-stream", "text", "limited", "gzip", "moved", "old"])
def test_what_the_upstream_answers_passes_byte_for_byte(served, name):
    def but_hops(headers):
        return [(key, value) for key, value in headers if key.lower() not in BETWEEN_NEIGHBOURS | {"content-length"}]

    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "grüß – \ud800"}], "x": [1.50, None]})
    headers = {"Authorization": "Bearer K", "X-Own": "a, b", "Accept-Encoding": "br, gzip;q=0.5", "OpenAI-Beta": "x=1"}
    direct = asked(served.upstream.port, "POST", "/v1/chat/completions?api-version=1", body.encode(), headers)
    line, seen, sent = served.upstream.asked[-1]
    through = asked(served.port, "POST", "/v1/chat/completions?api-version=1", body.encode(), headers)
    assert through[:2] == direct[:2] and through[3] == direct[3]
    assert but_hops(through[2]) == but_hops(direct[2])
    line_too, seen_too, sent_too = served.upstream.asked[-1]
    assert (line_too, sent_too) == (line, sent)
    expected = {text for text in seen if not text.startswith("Accept-Encoding")} | {"Accept-Encoding: gzip;q=0.5"}
    assert set(seen_too) == expected


def test_pieces_pass_as_they_come_and_over_one_connection(served):
    came, waited = threading.Event(), []
    pieces = list(RECORDED["stream"])
    served.upstream.answers["slow"] = [*pieces[:2], lambda: waited.append(came.wait(5)), *pieces[2:]]
    client = served.client()
    for _ in range(2):
        came.clear()
        texts = []
        for part in client.chat.completions.create(model="slow", messages=HELLO, stream=True):
            texts += [choice.delta.content or "" for choice in part.choices]
            came.set()  # what follows is sent only after this was seen here
        assert waited.pop()
        assert "".join(texts) == "A heisenbug: gone when one looks – 你好."


def test_other_paths_pass_and_models_of_both_are_listed(served):
    client = served.client()
    assert client.embeddings.create(model="e", input="x", encoding_format="float").data == []
    assert [one.id for one in client.models.list()] == [served.path.name, "tuned", "emulated", "large-1"]
    assert client.models.retrieve("tuned").owned_by == "slowft"
    status, _, headers, body = asked(served.port, "DELETE", "/v1/files/f%201?purpose=x")
    assert (status, body) == (204, b"") and ("x-deleted", "yes") in headers


def test_an_answer_that_breaks_off_breaks_off_for_the_client_too_and_is_marked(served):
    with pytest.raises(openai.APIConnectionError), served.client() as client:
        client.chat.completions.create(model="short", messages=HELLO)
    assert served.rows()[0].status == "broken"
    texts = []
    with pytest.raises(openai.APIConnectionError), served.client() as client:
        for part in client.chat.completions.create(model="broken", messages=HELLO, stream=True):
            texts.append(part.choices[0].delta.content)
    assert texts == ["", "A heisen"]
    (row,) = served.rows()
    assert row.status == "broken" and "too early" in row.error
    assert row.response["choices"][0]["message"]["content"] == "A heisen"
    with pytest.raises(openai.InternalServerError, match="502|cannot be used"), served.client() as client:
        client.chat.completions.create(model="no-http", messages=HELLO)


# --- The openai package, on both sides ----------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


def say(monkeypatch, text: str) -> None:
    """Rows that are sampled say this, a byte a token."""

    def choose(self, logits, rows):
        data = text.encode()
        places = [place for _, place, _ in rows]
        tokenizer = self._wanted.voice.tokenizer
        ids = [tokenizer.encode(text, add_special_tokens=False)[p] if p < len(data) else 1 for p in places]
        return ids, [0.0] * len(rows)

    monkeypatch.setattr(OneRow, "choose", choose)


def test_the_openai_package_streams_and_does_not_and_gets_usage_and_errors(served):
    client = served.client()
    for model in ("plain", served.path.name):
        answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=6)
        assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens in (6, 12)
        of_stream = "stream" if model == "plain" else model
        parts = list(
            client.chat.completions.create(
                model=of_stream, messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
            )
        )
        assert (
            "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == answer.choices[0].message.content
        )
        assert parts[-1].usage.total_tokens == answer.usage.total_tokens
        assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == answer.choices[0].finish_reason
    with pytest.raises(openai.RateLimitError) as limited:
        client.chat.completions.create(model="limited", messages=HELLO)
    assert limited.value.response.headers["retry-after"] == "7" and limited.value.code == "rate_limit_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature must be at least 0"):
        client.chat.completions.create(model="tuned", messages=HELLO, temperature=-1)
    assert client.completions.create(model="text", prompt="x").choices[0].text == " gone."
    assert len(client.completions.create(model="tuned", prompt="x", max_tokens=3).choices[0].text) >= 1
    assert served.rows()[0].path == "/v1/completions"


def test_tools_are_called_by_upstream_and_local_models(served, monkeypatch):
    client = served.client()
    said = '<tool_call>{"name": "find", "arguments": {"word": "bogon"}}</tool_call><tool_call>'
    say(monkeypatch, said + '{"name": "f", "arguments": {}}</tool_call> so < that')
    for model, stream in (("tools", "tool-stream"), ("tuned", "tuned")):
        how = {"messages": HELLO, "tools": TOOLS, "temperature": 1, "max_tokens": 200}
        answer = client.chat.completions.create(model=model, **how).choices[0]
        assert answer.finish_reason == ("stop" if model == "tools" else "tool_calls")
        assert [json.loads(call.function.arguments) for call in answer.message.tool_calls][0] == {"word": "bogon"}
        calls: dict[int, list[str]] = {}
        text = ""
        for part in client.chat.completions.create(model=stream, stream=True, **how):
            for choice in part.choices:
                text += choice.delta.content or ""
                for call in choice.delta.tool_calls or ():
                    calls.setdefault(call.index, []).append(call.function.arguments)
        assert json.loads("".join(calls[0])) == {"word": "bogon"}
        (row,) = served.rows()
        kept = row.response["choices"][0]["message"]
        assert json.loads(kept["tool_calls"][0]["function"]["arguments"]) == {"word": "bogon"}
        if model == "tuned":  # what might have become a marker is not lost
            assert len(calls) == 2 and text == answer.message.content == kept["content"] == " so < that"


def test_stop_texts_are_cut_exactly_and_their_tokens_counted(served, monkeypatch):
    say(monkeypatch, "one two three")
    how = {"model": "tuned", "messages": HELLO, "temperature": 1, "stop": ["wo t", "zzz"], "max_tokens": 50}
    answer = served.client().chat.completions.create(**how)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one t", "stop")
    assert answer.usage.completion_tokens == len("one two t")
    parts = served.client().chat.completions.create(**how, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "one t"


def test_a_client_that_hangs_up_frees_its_place_and_its_row_is_broken(served):
    scheduler = served.service.scheduler
    with served.client() as client:
        stream = client.chat.completions.create(model="tuned", messages=HELLO, stream=True, max_tokens=100_000)
        next(iter(stream))
        stream.close()
    wait_until(lambda: not scheduler.state()["running"])
    with socket.create_connection(
        ("127.0.0.1", served.port), timeout=20
    ) as sock:  # not streamed: nothing is written meanwhile
        body = json.dumps({"model": "tuned", "messages": HELLO, "max_tokens": 100_000}).encode()
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
        sock.sendall(body)
        wait_until(lambda: scheduler.state()["running"])
    wait_until(lambda: not scheduler.state()["running"])
    for row in served.rows(n=2):
        assert row.status == "broken" and row.error == "the client hung up"
    gone = threading.Event()
    served.upstream.answers["silent"] = [*RECORDED["stream"][:2], gone.wait]
    with served.client() as client:
        stream = client.chat.completions.create(model="silent", messages=HELLO, stream=True)
        next(iter(stream))
        stream.close()
    assert served.rows(Filter("model", "equal", "silent"))[0].status == "broken"
    gone.set()


def wait_until(is_so, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- Local --------------------------------------------------------------------------------------------------


def test_a_hundred_streams_at_once_each_get_mlx_lms_tokens(served):
    words = ["hello", "what is a bogon?", "x", "the quick brown fox jumps over"]
    expected = {}
    for text in words:
        prompt = f"<s>user: {text}</s><s>assistant: "
        for name in (served.path.name, "tuned"):
            expected[name, text] = served.in_memory(name == "tuned", prompt, 8)

    async def one(client, i: int):
        name, text = [served.path.name, "tuned"][i % 2], words[i % len(words)]
        stream = await client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": text}], stream=True, max_tokens=8, logprobs=True
        )
        tokens = []
        async for part in stream:
            tokens += [token.id for token in part.choices[0].logprobs.content] if part.choices[0].logprobs else []
        return (name, text), tokens

    async def everyone():
        async with openai.AsyncOpenAI(base_url=served.service.url, api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(100)))

    before = served.service.scheduler.rounds
    found = asyncio.run(everyone())
    assert len(found) == 100
    for key, tokens in found:
        assert tokens == expected[key]
    assert served.service.scheduler.rounds - before < 100 * 8 / 4


def test_on_a_mac_base_and_adapter_answer_what_mlx_lm_says_there(mac, llama_with_tokenizer, tmp_path):
    with slowft.open_model(llama_with_tokenizer) as model:
        randomise(model.add_lora(num_layers=2, rank=2, scale=20.0))
        model.save_adapter(tmp_path / "adapter")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    adapter, template = tmp_path / "adapter", str(tmp_path / "template.jinja")
    paths = {"model": str(llama_with_tokenizer), "adapter": [f"tuned={adapter}"], "chat_template": template}
    with Service(Settings(**paths, port=0, memory="3GB", max_tokens=8), lambda _: None) as service:
        served = Served(service, None, llama_with_tokenizer, adapter, tmp_path / "template.jinja", [])
        for name in (llama_with_tokenizer.name, "tuned"):
            with served.client() as client:
                answer = client.chat.completions.create(model=name, messages=HELLO, logprobs=True, temperature=0)
            prompt = f"<s>user: {HELLO[0]['content']}</s><s>assistant: "
            assert ids_of(answer) == served.in_memory(name == "tuned", prompt, len(ids_of(answer)))


def test_the_likeliest_tokens_of_bfloat16_logits_are_told_in_float32():
    logits = mx.array(np.random.default_rng(1).normal(20, 3, (2, 4000))).astype(mx.bfloat16)
    one = OneRow(Wanted([1], 2, None, sampler=lambda: (make_sampler(0), []), n_top=5))
    tokens, logprobs = one.choose(logits, [(7, 3, []), (7, 4, [])])
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    for i, place in enumerate((3, 4)):
        ids, values = zip(*one.top[place])
        assert np.abs(exact[i][list(ids)] - values).max() < 1e-4
        assert list(exact[i][list(ids)]) == sorted(exact[i])[:-6:-1]
        assert logprobs[i] == values[ids.index(tokens[i])]


def test_an_adapter_by_name_is_a_fresh_load_and_sampling_is_generates(served):
    client, prompt = served.client(), "<s>user: hello</s><s>assistant: "
    how = {"messages": HELLO, "max_tokens": 12, "logprobs": True}
    base, tuned = (ids_of(client.chat.completions.create(model=name, **how)) for name in (served.path.name, "tuned"))
    assert base == served.in_memory(False, prompt, 12) != tuned
    assert tuned == served.in_memory(True, prompt, 12)
    sampled = client.chat.completions.create(model="tuned", seed=7, temperature=0.8, top_p=0.9, **how)
    expected, draw = [], make_sampler(0.8, 0.9)

    def sampler(logprobs):
        mx.random.seed(place_seed(7, 0, len(expected)))
        expected.append(draw(logprobs))
        mx.eval(expected[-1])
        return expected[-1]

    served.in_memory(True, prompt, 12, sampler=sampler)
    assert ids_of(sampled) == [token.item() for token in expected[:12]] != tuned
    forced = client.chat.completions.create(model="tuned", logit_bias={"70": 100}, **how)
    assert ids_of(forced) == [70] * 12
    top = client.chat.completions.create(model="tuned", top_logprobs=20, **how).choices[0].logprobs.content
    assert [token.top_logprobs[0].id for token in top] == tuned and len(top[0].top_logprobs) == 20


def test_the_emulated_model_answers_as_generate_does(served):
    with slowft.emulate(served.path, served.path, [(served.adapter, 0.5)]) as emulated:
        tokenizer = slowft.load_tokenizer(served.path, emulated.embedding_rows, chat_template=str(served.template))
        prompt = tokenizer.encode("<s>user: hello</s><s>assistant: ", add_special_tokens=False)
        (expected,) = slowft.generate(emulated, [prompt], tokenizer=tokenizer, max_tokens=12)
    answer = served.client().chat.completions.create(model="emulated", messages=HELLO, logprobs=True)
    assert ids_of(answer) == expected.tokens
    assert expected.tokens != served.in_memory(False, "<s>user: hello</s><s>assistant: ", 12)


def test_pruning_rules_of_an_adapter_are_applied_to_its_requests_and_to_no_others(served):
    client = served.client()
    long = [{"role": "system", "content": SHARED}, *HELLO]
    for name, is_pruned in (("tuned", True), (served.path.name, False)):
        answers_ = [
            client.chat.completions.create(model=name, messages=messages, max_tokens=4) for messages in (long, HELLO)
        ]
        assert (answers_[0].usage.prompt_tokens == answers_[1].usage.prompt_tokens) is is_pruned
        assert (answers_[0].choices[0].message == answers_[1].choices[0].message) is is_pruned
    assert served.rows(Filter("model", "equal", "tuned"), n=2)[1].request["messages"] == long


def test_a_drive_that_fails_ends_the_answers_of_that_pass_and_no_others(served, monkeypatch):
    voice, failures = served.service.scheduler.voices[0], []
    step = voice.waves.step

    def failing():
        if voice.waves.passes > before + 3 and not failures:
            failures.append(1)
            raise OSError(5, "Input/output error")
        return step()

    before = voice.waves.passes
    monkeypatch.setattr(voice.waves, "step", failing)
    client, texts = served.client(), []
    with pytest.raises(openai.APIError, match="Input/output error"):
        for part in client.chat.completions.create(model="tuned", messages=HELLO, stream=True):
            texts.append(part.choices[0].delta.content)
    assert 0 < len(texts) <= 4 and failures
    (row,) = served.rows()
    assert row.status == "error" and "Input/output error" in row.error
    assert row.response["choices"][0]["message"]["content"] == "".join(texts)
    answer = client.chat.completions.create(model="tuned", messages=HELLO)
    assert answer.choices[0].message.content.startswith("".join(texts))


def test_a_gpu_that_fails_ends_the_answers_of_that_pass_and_no_others(served, gpu):  # noqa: F811
    """Whoever samples: what is computed late fails late, and it is the pass that failed."""
    client = served.client()
    plain = client.chat.completions.create(model="tuned", messages=HELLO).choices[0].message.content
    for module in ("slowft.weights.residency", "slowft.inference.sampling", "slowft.weights.residency"):
        gpu.fail(6, module)
        with pytest.raises(
            openai.APIError, match="macOS ended work on the GPU that kept the display waiting"
        ) as caught:
            client.chat.completions.create(model="tuned", messages=HELLO, temperature=0.5, seed=1)
        assert caught.value.status_code == 500 and gpu.left is None
        (row,) = served.rows()
        assert row.status == "error" and "Let the display sleep" in row.error
        assert client.chat.completions.create(model="tuned", messages=HELLO).choices[0].message.content == plain


def test_a_server_keeps_the_machine_awake_while_it_answers(served, monkeypatch):
    events = []

    @contextmanager
    def kept_awake():
        events.append("awake")
        yield
        events.append("as it was")

    monkeypatch.setattr(platform, "kept_awake", kept_awake)
    for n in (1, 2):
        with served.client().chat.completions.create(model="tuned", messages=HELLO, stream=True) as stream:
            for _ in stream:
                assert len(events) >= 2 * n - 1
        wait_until(lambda n=n: events == ["awake", "as it was"] * n)


def test_a_server_that_may_open_no_more_files_waits_for_some_and_does_not_spin(served, monkeypatch):
    tries, accept = [], TCPServer.get_request

    def full(server):
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(server)

    monkeypatch.setattr(TCPServer, "get_request", full)
    assert asked(served.port, "GET", "/health")[0] == 200
    assert tries[3] - tries[0] >= 0.3


def test_what_local_models_cannot_do_is_said(served):
    for body, what in [
        ({"n": 2}, "n must be 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "text",
        ),
        ({"messages": []}, "not empty"),
        ({"stop": [1]}, "stop must be"),
        ({"max_tokens": 10**12}, "memory of 3.00 GB is too little"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "variables of the chat template"),
        ({"logit_bias": {"99999": 1}}, "outside of the model's"),
        ({"temperature": float("inf")}, "finite"),
        ({"top_k": 10**6, "temperature": 1}, "top_k"),
    ]:
        status, _, _, said = served.ask("tuned", **body)
        assert status == 400 and what in json.loads(said)["error"]["message"], (body, said)
    _, _, headers, _ = served.ask("tuned", response_format={"type": "json_object"}, tool_choice="auto", max_tokens=1)
    assert ("slowft-ignored", "response_format") in headers
    status, _, _, said = served.ask("tuned", max_tokens=2, temperature=None, top_p=None, stop=None, tools=None)
    assert status == 200


def test_no_request_waits_for_more_passes_than_the_plan_said(served, tmp_path):
    settings = Settings(model=str(served.path), wave=3, port=0, memory="2GB")
    rng = random.Random(0)
    with Service(settings, print) as service:
        voice = service.scheduler.voices[0]
        tokenizer = voice.tokenizer
        tokenizer.add_eos_token("p")  # some answers end before their limit
        wanted = [
            Wanted([*range(3, 3 + rng.randint(1, 90))], rng.randint(1, 12), voice, adapter=False) for _ in range(40)
        ]
        for i, one in enumerate(wanted):
            service.scheduler.want(one)
            if i % 7 == 0:
                time.sleep(0.01)
            if i % 9 == 5:
                service.scheduler.cancel(one)
        ended = [one for one in wanted if not one.is_cancelled]
        for one in ended:
            while getattr(one.events.get(timeout=20), "finish_reason", None) is None:
                pass
        assert all(0 <= one.waited <= one.promised for one in ended)
        assert max(one.waited for one in ended) > 20
        state = service.scheduler.state()
        assert state["wave"] == 3 and state["longest_wait"]["waited_passes"] <= max(one.promised for one in ended)


def test_the_promise_is_what_a_simulation_of_all_passes_finds():
    rng = random.Random(1)
    for _ in range(300):
        size, prefilled = rng.randint(1, 5), rng.randint(1, 5)
        running = [rng.randint(1, 9) for _ in range(rng.randint(0, size))]
        waiting = [rng.randint(1, 9) for _ in range(rng.randint(1, 12))]
        left, queue, passes = list(running), list(waiting), 0
        while True:
            n = 0
            while queue and len(left) < size and n < prefilled:
                left.append(queue.pop(0))
                n += 1
            if not queue:
                break
            passes += 1
            left = [tokens - 1 for tokens in left if tokens > 1]
        assert passes_ahead(running, waiting, size, prefilled) == passes


# --- What is recorded ---------------------------------------------------------------------------------------


def test_keys_and_cookies_are_never_stored_and_tags_are(served):
    headers = {
        "Authorization": "Bearer KEY-OF-THE-CLIENT",
        "Cookie": "session=COOKIE-OF-THE-CLIENT",
        "x-api-key": "OTHER-KEY-OF-THE-CLIENT",
        "op-tags": '{"app": "shop", "run": 3}',
    }
    served.ask("plain", headers=headers, metadata={"user": "ann"})
    assert served.rows()[0].tags == {"app": "shop", "run": "3", "user": "ann"}
    line, seen, _ = served.upstream.asked[-1]
    assert "Authorization: Bearer KEY-OF-THE-CLIENT" in seen and "op-tags" not in " ".join(seen)
    served.ask("tuned", headers=headers)
    served.rows()
    stored = b"".join(file.read_bytes() for file in served.store.path.parent.glob("requests.db*"))
    assert b"heisenbug" in stored
    for secret in ("KEY-OF-THE", "COOKIE-OF-THE"):
        assert secret.encode() not in stored
    assert served.store.path.stat().st_mode & 0o777 == 0o600


def test_a_recorded_stream_is_what_the_same_request_gives_without_streaming(served):
    for model, stream in (("plain", "stream"), ("tools", "tool-stream"), ("gzip", None)):
        served.ask(model)
        (whole,) = served.rows()
        assert whole.status == "complete" and whole.source == "upstream" and whole.prompt_tokens == 9
        if stream is not None:
            served.ask(stream, stream=True)
            (row,) = served.rows()
            message = row.response["choices"][0]["message"]
            assert {k: v for k, v in message.items() if v is not None} == {
                k: v for k, v in whole.response["choices"][0]["message"].items() if v is not None
            }
            assert (row.completion_tokens, row.response["object"]) == (12, "chat.completion")
    assert whole.response["choices"][0]["message"]["content"] == "squeezed"
    served.ask("tuned", logprobs=True)
    served.ask("tuned", logprobs=True, stream=True, stream_options={"include_usage": True})
    streamed, plain = served.rows(n=2)
    for row in (streamed, plain):
        assert row.source == "local" and row.status == "complete" and row.duration_s > 0
    same = ("choices", "usage", "object", "model")
    assert {k: streamed.response[k] for k in same} == {k: plain.response[k] for k in same}
    again = answers.put_together(answers.events(answers.as_stream(plain.response, True)))
    assert {k: again[k] for k in same} == {k: plain.response[k] for k in same}


def test_a_file_that_cannot_be_written_disturbs_no_answer(served, may_have_pages, tmp_path):
    said = []
    settings = Settings(upstream=served.upstream.url, record=str(tmp_path / "r.db"), port=0)
    with Service(settings, said.append) as service:
        port = service.server.server_address[1]
        body = json.dumps({"model": "plain", "messages": HELLO}).encode()
        other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # another program has it locked
        begin = time.monotonic()
        assert asked(port, "POST", "/v1/chat/completions", body)[0] == 200
        assert time.monotonic() - begin < 2
        other.execute("ROLLBACK")
        wait_until(lambda: service.recorder.written == 1)
        assert service.store.list()[0].status == "complete"
        may_have_pages(other.execute("PRAGMA page_count").fetchone()[0])
        big = json.dumps({"model": "plain", "messages": HELLO, "x": "y" * 100_000}).encode()
        for _ in range(3):
            status, _, _, answer = asked(port, "POST", "/v1/chat/completions", big)
            assert status == 200 and b"heisenbug" in answer
        wait_until(lambda: service.recorder.lost == 3)
        may_have_pages(1_000_000)
        asked(port, "POST", "/v1/chat/completions", body)
        wait_until(lambda: service.recorder.written == 2)
        health = json.loads(asked(port, "GET", "/health")[3])
    assert len(said) == 1 and "no space is left" in said[0]
    assert health["recorded"] == {"requests": 2, "lost": 3}


def test_a_hundred_streams_pass_at_once_and_are_recorded_redacted_and_with_their_cost(served, tmp_path):
    (tmp_path / "prices.yaml").write_text('"str*": {input: 2, output: 10}\n')
    settings = Settings(
        upstream=served.upstream.url,
        record=str(tmp_path / "r.db"),
        redact=[r"heisen\w+", "secret-[0-9]+"],
        prices=str(tmp_path / "prices.yaml"),
        port=0,
    )
    bodies = [
        json.dumps({"model": "stream", "messages": [{"role": "user", "content": f"secret-{i}"}]}).encode()
        for i in range(100)
    ]
    found = []
    with Service(settings, print) as service:
        port = service.server.server_address[1]
        threads = [
            threading.Thread(
                target=lambda body=body: found.append(asked(port, "POST", "/v1/chat/completions", body)[3])
            )
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = asked(served.upstream.port, "POST", "/v1/chat/completions", bodies[0])[3]
        assert found == [expected] * 100
        wait_until(lambda: service.recorder.written == 100)
        rows = service.store.list(limit=200)
    assert {row.status for row in rows} == {"complete"} and len(rows) == 100
    assert all(row.cost == pytest.approx((9 * 2 + 12 * 10) / 1e6) for row in rows)
    assert {row.request["messages"][0]["content"] for row in rows} == {"[redacted]"}
    assert rows[0].response["choices"][0]["message"]["content"].startswith("A [redacted]: gone")


def test_a_request_is_in_the_file_before_its_answer_begins(served, monkeypatch):
    begin = served.store.begin

    def slowly(**about):
        time.sleep(0.1)
        return begin(**about)

    monkeypatch.setattr(served.store, "begin", slowly)
    for model in ("plain", "tuned"):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        body = json.dumps({"model": model, "messages": HELLO, "stream": True, "user": "early"}).encode()
        connection.request("POST", "/v1/chat/completions", body)
        connection.getresponse()
        assert served.store.list(limit=1)[0].model == model
        connection.close()


def test_equal_requests_are_answered_from_the_file(served, tmp_path):
    settings = Settings(upstream=served.upstream.url, record=str(tmp_path / "r.db"), cache=True, port=0)
    with Service(settings, print) as service:
        client = openai.OpenAI(base_url=service.url, api_key="x", max_retries=0)
        before = len(served.upstream.asked)
        first = client.chat.completions.create(model="tools", messages=HELLO)
        wait_until(lambda: service.recorder.written == 1)
        again = client.chat.completions.create(model="tools", messages=HELLO)
        assert again.to_dict() == first.to_dict()
        streamed = list(client.chat.completions.create(model="tools", messages=HELLO, stream=True))
        assert streamed[0].choices[0].delta.tool_calls[0].function.arguments == '{"word": "bogon"}'
        assert streamed[-1].choices[0].finish_reason == "stop"
        assert len(served.upstream.asked) == before + 1
        client.chat.completions.create(model="tools", messages=HELLO, temperature=0.5)
        for _ in range(2):
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="limited", messages=HELLO)
        assert len(served.upstream.asked) == before + 4


def test_tags_are_read_as_openpipe_writes_them_and_otherwise():
    assert tags_of('{"a": "b", "n": 1, "deep": {}}', {"metadata": {"a": "x", "c": "d"}}) == {
        "a": "b",
        "n": "1",
        "c": "d",
    }
    assert tags_of("a=b, c=d=e,nothing", None) == {"a": "b", "c": "d=e"}
    assert tags_of("[1]", {"metadata": [1]}) == {}
    assert len(tags_of(None, {"metadata": {str(i): "x" * 9999 for i in range(100)}})) == 50


KILLS = int(os.environ.get("SLOWFT_KILLS", "3"))


def start(folder: Path, *words: str) -> tuple[subprocess.Popen, int]:
    """The command in a process of its own, and its port."""
    run = subprocess.Popen(
        [sys.executable, "-m", "slowft", "serve", "--port", "0", "--record", str(folder / "r.db"), *words],
        stderr=subprocess.PIPE,
        text=True,
    )
    line = run.stderr.readline()
    assert line.startswith("Serving at http://127.0.0.1:"), line
    return run, int(line.split("/v1")[0].rpartition(":")[2])


def test_a_kill_in_mid_stream_loses_no_request_and_ctrl_c_ends_at_once(tmp_path, llama_with_tokenizer):
    """The last run, which is not killed, has a model too: threads that compute end as quietly as others."""
    upstream, rng = Recorded(), random.Random(2)
    stopped = threading.Event()
    upstream.answers["endless"] = [*RECORDED["stream"][:3], stopped.wait]
    n_done = n_begun = 0
    for kill in range(KILLS + 1):
        local = [str(llama_with_tokenizer)] if kill == KILLS else []
        run, port = start(tmp_path, *local, "--upstream", upstream.url)
        for model in rng.choices(["plain", "stream"], k=rng.randint(1, 4)) + [Path(name).name for name in local]:
            body = json.dumps({"model": model, "messages": HELLO, "max_tokens": 2}).encode()
            assert asked(port, "POST", "/v1/chat/completions", body)[0] == 200
            n_done += 1
        body = json.dumps({"model": "endless", "messages": HELLO, "stream": True}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/v1/chat/completions", body)
        assert connection.getresponse().read1(10)
        n_begun += 1
        if kill < KILLS:
            time.sleep(rng.random() * 0.02 + (0.02 if kill % 2 else 0))
            run.kill()
            run.wait(10)
        else:
            begin = time.monotonic()
            run.send_signal(signal.SIGINT)
            assert run.wait(10) == 0 and time.monotonic() - begin < 2.5
            assert run.stderr.read() == ""
        run.stderr.close()
        connection.close()
        with RequestStore(tmp_path / "r.db") as store:
            found = [row.status for row in store.list(limit=1000)]
        assert found.count("broken") == n_begun and "begun" not in found
        # of the last answer before the kill, the client may have had all when it was not yet written down
        assert n_done - KILLS <= found.count("complete") <= n_done and len(found) == n_done + n_begun
    stopped.set()
    upstream.close()


# --- Who may use it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:3000"}, 403),
        ({"Origin": "http://localhost:{port}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1"}, 400),
        ({"Host": ""}, 400),
        ({"Origin": "https://evil.example", "Host": "evil.example"}, 403),
    ],
)
def test_pages_of_other_origins_and_other_host_names_are_refused(served, headers, status):
    n = len(served.upstream.asked)
    headers = {name: value.format(port=served.port) for name, value in headers.items()}
    for method, path, body in [
        ("GET", "/v1/models/tuned", b""),
        ("GET", "/api/requests?limit=1", b""),
        ("POST", "/v1/chat/completions", json.dumps({"model": "plain", "messages": HELLO}).encode()),
    ]:
        found = asked(served.port, method, path, body, headers)
        assert found[0] == status, found
        assert not any(name.lower().startswith("access-control") for name, _ in found[2])
        assert status == 200 or "error" in json.loads(found[3])
    assert len(served.upstream.asked) == n + (status == 200)
    if status == 200 and "Origin" in headers:  # what a browser holds for this machine is nobody else's
        cookie = {"Cookie": "of=another-port", "Referer": "http://127.0.0.1/"}
        assert asked(served.port, *("POST", path, body), headers | cookie)[0] == 200
        seen = {text.split(":")[0].lower() for text in served.upstream.asked[-1][1]}
        assert not seen & {"cookie", "referer", "origin"}
    preflight = asked(served.port, "OPTIONS", "/v1/chat/completions", b"", {"Origin": "https://evil.example"})
    assert preflight[0] >= 400 and not any(name.lower().startswith("access-control") for name, _ in preflight[2])


@pytest.mark.parametrize(
    "target",
    [
        "http://example.org/v1/models",
        "//example.org/v1/models",
        "/v1/../admin",
        "/v1/%2e%2e/admin",
        "/v1/..%2fadmin",
        "/v1/%252e%252e/admin",
        "/v1/..\\admin",
        "/v1/%5c..%5cadmin",
        "/v1//admin",
        "/v1/@example.org",
        "/v1/x%00y",
        "/v1/x%0d%0aHost:%20evil",
        "/v1/./x",
        "/v1/x#y",
        "/v1",
        "/v2/models",
        "/admin",
        "*",
        "/v1/é",
    ],
)
def test_no_path_leads_out_of_the_upstreams_own(served, target):
    n = len(served.upstream.asked)
    found = raw(served.port, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(), False)
    status = int(found.split()[1])
    asked_of = served.upstream.asked[n:]
    if target == "/v1/@example.org":  # a path like any other
        assert [line for line, _, _ in asked_of] == [f"GET {target} HTTP/1.1"]
    else:
        assert status in (400, 404) and not asked_of, found


def test_it_fetches_nothing_but_from_the_upstream(served):
    others = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{others.getsockname()[1]}/x"
    picture = [{"type": "image_url", "image_url": {"url": url}}, {"type": "input_image", "image_url": url}]
    for part in picture:
        assert served.ask("tuned", messages=[{"role": "user", "content": [part]}])[0] == 400
    served.upstream.answers["away"] = [
        f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()
    ]
    assert served.ask("away")[0] == 307
    raw(served.port, f"CONNECT {url[7:-2]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    others.settimeout(0.05)
    with pytest.raises(TimeoutError):
        others.accept()
    others.close()


def test_other_addresses_need_a_token_and_the_upstream_never_sees_it(served, tmp_path, monkeypatch):
    with pytest.raises(slowft.ConfigError, match="--token"):
        Service(Settings(upstream=served.upstream.url, host="0.0.0.0", port=0), print)
    with pytest.raises(slowft.ConfigError, match="in use"):
        Service(Settings(upstream=served.upstream.url, port=served.port), print)
    taken = [f"emulated={served.adapter}"]
    with pytest.raises(slowft.ConfigError, match="the name of another model"):
        Service(Settings(model=str(served.path), adapter=taken, port=0, memory="2GB"), print)
    settings = Settings(upstream=served.upstream.url, host="0.0.0.0", port=0, token="sesame")
    with Service(settings, print) as service:
        port = service.server.server_address[1]
        body = json.dumps({"model": "plain", "messages": HELLO}).encode()

        def status(**headers) -> int:
            return asked(port, "POST", "/v1/chat/completions", body, headers)[0]

        n = len(served.upstream.asked)
        assert status() == status(Authorization="Bearer nope") == status(Authorization="sesame") == 401
        assert asked(port, "GET", "/health")[0] == asked(port, "GET", "/api/requests")[0] == 401
        assert status(Authorization="Bearer sesame", Origin="https://evil.example") == 403
        assert len(served.upstream.asked) == n
        assert status(Authorization="Bearer sesame", Host="my-machine:1") == 200
        assert not any(text.lower().startswith("authorization") for text in served.upstream.asked[-1][1])
        monkeypatch.setenv("SLOWFT_UPSTREAM_KEY", "KEY")
        assert status(Authorization="Bearer sesame") == 200
        assert "Authorization: Bearer KEY" in served.upstream.asked[-1][1]


def test_a_taken_port_is_found_before_the_model_is_opened(served, tmp_path, monkeypatch):
    missing = Settings(model=str(tmp_path / "no-model"), port=served.port)
    with pytest.raises(slowft.ConfigError, match=f"cannot listen at 127.0.0.1, port {served.port}.*--port or --host$"):
        Service(missing, print)
    with pytest.raises(slowft.ModelError, match="no-model"):  # and the address is free again
        Service(Settings(model=str(tmp_path / "no-model"), port=0), print)
    for wrong in ({"temp": -1}, {"top_p": 9}, {"wave": 0}, {"max_tokens": 0}):
        with pytest.raises(slowft.ConfigError, match=f"--{next(iter(wrong)).replace('_', '-')} must be"):
            Service(Settings(model=str(tmp_path / "no-model"), port=0, **wrong), print)
    first = Service(Settings(upstream=served.upstream.url, port=0), print)
    again = Settings(upstream=served.upstream.url, port=first.server.server_address[1])
    with pytest.raises(slowft.ConfigError, match="cannot listen at"):  # the first; on macOS the second
        with Service(again, print), first:
            pass
    first.close()


def test_a_page_gets_strict_headers_and_its_data(served, tmp_path):
    served.ask("plain", headers={"op-tags": "page=yes"})
    (row,) = served.rows()
    status, _, _, body = asked(served.port, "GET", "/api/requests?filter=tag.page%3Dyes&limit=1")
    assert status == 200 and [one["id"] for one in json.loads(body)["requests"]] == [row.id]
    assert json.loads(asked(served.port, "GET", f"/api/requests/{row.id}")[3])["tags"] == {"page": "yes"}

    def post(what: str, said) -> tuple[int, dict]:
        found = asked(served.port, "POST", f"/api/requests/{row.id}/{what}", json.dumps(said).encode())
        return found[0], json.loads(found[3])

    assert post("keep", {"keep": True})[1]["kept"] is True
    assert post("keep", {"keep": None})[1]["kept"] is None
    assert post("tag", {"name": "page", "value": None})[1]["tags"] == {}
    assert post("keep", {"keep": 1})[0] == post("keep", {})[0] == post("tag", {"name": ""})[0] == 400
    assert asked(served.port, "GET", "/api/requests/999999")[0] == 404
    assert asked(served.port, "GET", "/api/requests?filter=nonsense")[0] == 400
    for method, path in (("GET", "/api/other"), ("DELETE", f"/api/requests/{row.id}")):
        assert asked(served.port, method, path)[0] == 404


def test_a_thousand_fuzzed_requests_get_errors_and_hang_nothing(served):
    rng = random.Random(5)
    values = [None, True, -1, 0, 1.5, 10**30, "", "x", "\ud800", [], [[]], {}, {"a": None}, [None], "9" * 400]
    values.append(float("nan"))
    keys = (
        "model messages prompt stream stream_options temperature top_p top_k min_p stop seed logprobs top_logprobs n "
        "logit_bias tools max_tokens metadata role_mapping chat_template_kwargs repetition_penalty frequency_penalty "
        "xtc_probability adapters"
    ).split()
    good = b"Host: localhost\r\nConnection: close\r\n"

    def request(i: int) -> bytes:
        said = {"model": "tuned", "messages": HELLO, "prompt": "x", "max_tokens": 1}
        for key in rng.sample(keys, rng.randint(1, 3)):
            said[key] = rng.choice(values)
        if isinstance(said.get("max_tokens"), float) or said.get("max_tokens") is None:
            said["max_tokens"] = 1
        body = json.dumps(said).encode()
        path = rng.choice(["/v1/chat/completions", "/v1/completions"])
        if i % 5 == 1:  # of a good one, some bytes are others
            body = bytearray(body)
            for _ in range(rng.randint(1, 8)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        if i % 50 == 3:
            body = b"[" * 100_000
        head = b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n" % (path.encode(), good, len(body))
        if i % 5 == 2:
            length = rng.choice(["-1", "1e3", "", "99999999999", "0x10", "5, 5", f"{len(body)}\r\nContent-Length: 3"])
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n".encode()
        if i % 5 == 3:
            head = bytearray(head + b"Transfer-Encoding: chunked\r\nop-tags: {\r\nX: \xff\r\n")
            for _ in range(rng.randint(0, 4)):
                head[rng.randrange(len(head))] = rng.randrange(256)
        if i % 100 == 4:
            return rng.randbytes(rng.randint(0, 3000))
        return bytes(head) + b"\r\n" + bytes(body)

    statuses = []
    for i in range(1000):
        # of a whole request the answer is waited for; what is none would wait for more
        found = raw(served.port, request(i), is_all=i % 5 > 1)
        statuses.append(int(found.split()[1]) if found.startswith(b"HTTP/1.1 ") else 0)
        assert 500 not in statuses, found
        assert found.startswith(b"HTTP/1.1 ") or found == b"" or found.startswith(b"{"), found
    assert statuses.count(200) > 10 and statuses.count(400) > 200
    served.upstream.asked.clear()
    assert served.service.scheduler.is_well and not served.said
    wait_until(lambda: not served.service.scheduler.state()["running"])
    assert served.ask("tuned", max_tokens=2)[0] == 200


def test_the_guard_alone():
    import email

    def check(target: str, text: str, host: str = "127.0.0.1") -> str:
        return Guard(host).check(target, email.message_from_string(text))

    assert check("/v1/models?x=1", "Host: LOCALHOST:8080\n\n") == "/v1/models"
    assert check("/v1/a", "Host: my-mac.local\n\n", "my-mac.local") == "/v1/a"
    for text in ("\n", "Host: a\nHost: b\n\n", "Host: 127.0.0.1:99999\n\n"):
        with pytest.raises(Refused):
            check("/v1/a", text)


# --- The command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, what",
    [
        ([], "nothing to serve"),
        (["--upstream", "ftp://x"], "no base URL"),
        (["--upstream", "http://x", "--cache"], "--record FILE too"),
        (["--upstream", "http://x", "--adapter", "a=b"], "need the MODEL"),
        (["--upstream", "http://x", "--host", "0.0.0.0"], "--token"),
        (["--upstream", "http://x", "--delta", "d"], "need the MODEL"),
        (["m", "--adapter", "a=b", "--delta", "d"], "--emulate SMALL"),
        (["--upstream", "http://x", "--port", "99999"], "from 0 to 65535"),
    ],
)
def test_what_cannot_be_served_is_one_line(words, what):
    result = CliRunner().invoke(command, ["serve", *words])
    assert result.exit_code != 0 and what in str(result.exception)
