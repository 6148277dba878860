"""Answers requests with models on this machine, by mlx-lm's own server classes.

mlx-lm's `APIHandler` reads a request's settings, checks them and words the answer. Its `ResponseGenerator` makes token
ids of a conversation. Where mlx-lm then runs its own batches, the passes of `scheduler` take their place.
"""

import argparse
import inspect
import io
import json
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm import server as mlx_server
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from transformers import PreTrainedTokenizerBase

from ..errors import GpuError, SlowftError, first_line
from ..inference.prompts import encode
from .guard import Refused
from .replies import OWN_HEADERS, Gone, Reply, error_of
from .scheduler import Piece, Scheduler, Token, Voice, Wanted
from .settings import Settings

SILENT_S = 15  # after so many seconds without a token, a stream gets a comment, which keeps the connection alive
TOP_LOGPROBS = 20  # OpenAI's limit
# Keys of a body that OpenAI's servers follow and that have no effect here, with their defaults. A header of the answer
# names those that a request gave another value.
WITHOUT_EFFECT = {
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "best_of": 1,
    "echo": False,
    "suffix": None,
    "functions": None,
}
TEMPLATE_NAMES = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


@dataclass(frozen=True)
class Name:
    """What answers requests for a name.

    Attributes:
        adapter: as in `MicroBatch`. prune: removes texts from messages by the adapter's rules.
    """

    voice: Voice
    adapter: bool | str
    prune: Callable[[list[dict]], list[dict]] | None = None


class Local:
    """The models of this machine, by name.

    Args:
        names: what answers, by name; the first answers requests that name no model.
        defaults: its sampling options are those of requests that give none.
    """

    def __init__(self, scheduler: Scheduler, names: Mapping[str, Name], defaults: Settings):
        self.scheduler, self.names, self.defaults = scheduler, dict(names), defaults
        self.fingerprint = mlx_server.get_system_fingerprint()
        self.created = int(time.time())
        self.tokenizing = threading.Lock()  # transformers' tokenizers are one thread's at a time

    def name_of(self, body: Any) -> str | None:
        """The name of the model here that a request asks for; None: it asks for another model."""
        if not isinstance(body, dict):
            return None
        model = body.get("model")
        if model is None or model == "default_model":  # mlx-lm's name for the first model
            return next(iter(self.names))
        return model if isinstance(model, str) and model in self.names else None

    def answer(self, path: str, body: dict, reply: Reply, on_gone: Callable[[Callable[[], None]], None]) -> None:
        """Answer a request.

        Args:
            on_gone: is called with the function to call if the client hangs up.
        Raises:
            Refused: settings are impossible. Gone: the client has hung up.
        """
        name = self.name_of(body)
        assert name is not None
        asking = Asking(self, self.names[name], on_gone)
        try:
            settled, n_top = _settled(body, path)
            LocalAnswer(asking, path, settled | {"model": name}, n_top, reply).do_POST()
        finally:
            asking.cancel()


class Asking(mlx_server.ResponseGenerator):
    """mlx-lm's `ResponseGenerator` for one request, whose answer comes from the scheduler's passes."""

    def __init__(self, local: Local, name: Name, on_gone: Callable[[Callable[[], None]], None]):
        # mlx-lm's __init__ is not called: it starts a thread that generates, and the scheduler has one already.
        self.local, self.name, self._on_gone = local, name, on_gone
        self.wanted: Wanted | None = None
        d = local.defaults
        self.model_provider = argparse.Namespace(
            processor=None,
            cli_args=argparse.Namespace(
                temp=d.temp,
                top_p=d.top_p,
                top_k=d.top_k,
                min_p=d.min_p,
                max_tokens=d.max_tokens,
                num_draft_tokens=0,
                chat_template_args=dict(d.chat_template_args),
            ),
        )

    def generate(
        self,
        request: mlx_server.CompletionRequest,
        generation_args: mlx_server.GenerationArguments,
        progress_callback: Any = None,
    ) -> tuple[mlx_server.GenerationContext, Iterator[Piece | None]]:
        """(what mlx-lm's handler needs to know, the answer's pieces, with None where none came for `SILENT_S`)."""
        scheduler, args, tokenizer = self.local.scheduler, generation_args, self.name.voice.tokenizer
        with self.local.tokenizing:
            prompt, initial_state = self._prompt(tokenizer, request, args)
        wanted = self.wanted = Wanted(
            prompt,
            args.max_tokens,
            self.name.voice,
            self.name.adapter,
            tuple(args.stop_words),
            None if _is_plain(args) else lambda: self._sampler(args),
            secrets.randbits(63) if args.seed is None else args.seed,
            max(args.top_logprobs, 0) if args.logprobs else 0,
            args.sampling.temperature == 0,
        )
        self._on_gone(self.cancel)
        scheduler.want(wanted)
        event = self._next()
        if isinstance(event, Exception):
            raise event
        context = mlx_server.GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            # The scheduler looks for stop texts. In an answer they may be split into tokens in other ways.
            text_sm=make_text_state_machine(tokenizer, []),
            initial_state=initial_state,
            prompt=prompt,
        )
        return context, self._pieces()

    def cancel(self) -> None:
        if self.wanted is not None:
            self.local.scheduler.cancel(self.wanted)
            self.wanted.events.put(Gone())

    def _pieces(self) -> Iterator[Piece | None]:
        while True:
            event = self._next(SILENT_S)
            if isinstance(event, Exception):
                raise event
            yield event
            if event is not None and event.finish_reason is not None:
                return

    def _next(self, timeout_s: float | None = None) -> Any:
        """The next event of the request; None: none came in `timeout_s`. Without a timeout it waits for one."""
        while True:
            try:
                return self.wanted.events.get(timeout=timeout_s or SILENT_S)
            except queue.Empty:
                if not self.local.scheduler.is_well:
                    return SlowftError("the thread that generates has ended. Start the server again")
                if timeout_s is not None:
                    return None

    def _prompt(
        self, tokenizer: Any, request: mlx_server.CompletionRequest, args: mlx_server.GenerationArguments
    ) -> tuple[list[int], str]:
        if request.request_type == "text":
            text = request.prompt
            return (list(text) if isinstance(text, list) else encode(tokenizer, text)), "normal"
        if self.name.prune is not None:
            request.messages = self.name.prune(request.messages)
        prompt, _, _, initial_state, _ = self._tokenize(tokenizer, request, args)
        return prompt, initial_state

    def _sampler(self, args: mlx_server.GenerationArguments):
        with self.local.tokenizing:
            sampler = mlx_server._make_sampler(args, self.name.voice.tokenizer)
        return sampler, mlx_server._make_logits_processors(args)


class LocalAnswer(mlx_server.APIHandler):
    """mlx-lm's handler for one request that was read already. It answers by the connection's `Reply`."""

    def __init__(self, asking: Asking, path: str, body: dict, n_top: int, reply: Reply):
        # mlx-lm's __init__ is not called: it would read from the connection.
        self.response_generator, self.path, self.n_top, self.reply = asking, path, n_top, reply
        self.created, self.system_fingerprint = int(time.time()), asking.local.fingerprint
        raw = json.dumps(body).encode()
        self.headers, self.rfile, self.wfile = {"Content-Length": str(len(raw))}, io.BytesIO(raw), io.BytesIO()

    def do_POST(self) -> None:
        super().do_POST()
        if self.reply.status is None:  # mlx-lm found an error, and wrote it to `wfile`, which is no connection here
            written = self.wfile.getvalue()
            try:
                message = str(json.loads(written)["error"])
            except (ValueError, KeyError, TypeError):
                message = written.decode(errors="replace")
            raise Refused(self._status, message)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        self._status = status_code

    def end_headers(self) -> None:
        pass

    def handle_chat_completions(self) -> mlx_server.CompletionRequest:
        """As mlx-lm's, but never fetches the images that messages give addresses of."""
        self.request_id = f"chatcmpl-{secrets.token_hex(12)}"
        self.object_type = "chat.completion.chunk" if self.stream else "chat.completion"
        tools, roles = self.body.get("tools"), self.body.get("role_mapping")
        return mlx_server.CompletionRequest("chat", "", self.body["messages"], tools or None, roles)

    def handle_completion(self, request: mlx_server.CompletionRequest, stop_words: list[str]) -> None:
        """As mlx-lm's, but a pass may give several tokens, stop texts are cut exactly, and errors are like OpenAI's."""
        args = self._arguments(stop_words)
        try:
            context, pieces = self.response_generator.generate(request, args)
        except (Gone, Refused):
            raise
        except SlowftError as e:
            raise Refused(400, str(e)) from e
        except Exception as e:  # a chat template or a tokenizer raised it
            raise Refused(400, first_line(e)) from e
        reply, headers = self.reply, self._own_headers(request, context)
        if self.stream:
            reply.begin(200, [("Content-Type", "text/event-stream"), *OWN_HEADERS, *headers], None)
        parts = Parts(context, mlx_server.ToolCallFormatter(context.tool_parser, request.tools, self.stream))
        n_tokens, logprobs = 0, []
        try:
            for piece in pieces:
                if piece is None:
                    if self.stream:
                        reply.write(b": waiting\n\n")
                    continue
                parts.take(piece)
                n_tokens += len(piece.tokens)
                logprobs += piece.tokens if args.logprobs else []
                if self.stream and (parts.has_news or piece.finish_reason is not None):
                    self._send(self._worded(parts, logprobs, context, n_tokens))
                    logprobs = []
        except Gone:
            raise
        except Exception as e:
            message = first_line(e)
            if not self.stream:
                raise Refused(500 if isinstance(e, OSError | GpuError) else 400, message) from e
            self._send(error_of(500, message))
            reply.end()
            return
        if not self.stream:
            reply.json(200, self._worded(parts, logprobs, context, n_tokens), headers)
            return
        if isinstance(self.stream_options, dict) and self.stream_options.get("include_usage"):
            self._send(self.completion_usage_response(len(context.prompt), n_tokens))
        reply.write(b"data: [DONE]\n\n")
        reply.end()

    def _own_headers(
        self, request: mlx_server.CompletionRequest, context: mlx_server.GenerationContext
    ) -> list[tuple[str, str]]:
        """Headers that say how many passes the request waits at most, and what of its body has no effect."""
        ignored = [key for key, usual in WITHOUT_EFFECT.items() if self.body.get(key, usual) != usual]
        if request.tools and not context.has_tool_calling:
            ignored.append("tools")
        headers = [("slowft-waits", str(self.response_generator.wanted.promised))]
        return headers + ([("slowft-ignored", ", ".join(ignored))] if ignored else [])

    def completion_usage_response(self, *counts: int, **others: Any) -> dict:
        return super().completion_usage_response(*counts, **others) | {"object": self.object_type}

    def _send(self, chunk: dict) -> None:
        self.reply.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def _worded(self, parts: "Parts", logprobs: Sequence[Token], context: Any, n_tokens: int) -> dict:
        """The response of what came since the last time, in mlx-lm's form, with log-probabilities in OpenAI's form."""
        text, reasoning, calls, reason = parts.give()
        response = self.generate_response(
            text, reason, len(context.prompt), n_tokens, tool_calls=calls, reasoning_text=reasoning
        )
        if logprobs:
            response["choices"][0]["logprobs"] = {"content": [self._logprob(token) for token in logprobs]}
        return response

    def _logprob(self, token: Token) -> dict:
        def worded(number: int, logprob: float) -> dict:
            text = self.response_generator.name.voice.tokenizer.decode([number])
            is_part = "\ufffd" in text  # the token has only a part of a character's bytes
            return {"id": number, "token": text, "logprob": logprob, "bytes": None if is_part else list(text.encode())}

        return worded(token.id, token.logprob) | {"top_logprobs": [worded(*one) for one in token.top]}

    def _arguments(self, stop_words: list[str]) -> mlx_server.GenerationArguments:
        if self.logit_bias is not None:
            rows = self.response_generator.name.voice.model.embedding_rows
            for number in self.logit_bias:
                if number < 0 or rows is not None and number >= rows:
                    raise Refused(400, f"logit_bias has a token id {number} outside of the model's {rows} ids")
        return mlx_server.GenerationArguments(
            model=mlx_server.ModelDescription(self.requested_model, "default_model", None),
            sampling=mlx_server.SamplingArguments(
                self.temperature, self.top_p, self.top_k, self.min_p, self.xtc_probability, self.xtc_threshold
            ),
            logits=mlx_server.LogitsProcessorArguments(
                self.logit_bias,
                self.repetition_penalty,
                self.repetition_context_size,
                self.presence_penalty,
                self.presence_context_size,
                self.frequency_penalty,
                self.frequency_context_size,
            ),
            stop_words=stop_words,
            max_tokens=self.max_tokens,
            num_draft_tokens=0,
            logprobs=self.logprobs,
            top_logprobs=self.n_top,
            seed=self.seed,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class Parts:
    """Divides an answer into text, reasoning and tool calls, by mlx-lm's state machine.

    Attributes:
        has_news: something came that can be given out before the answer ends.
    """

    def __init__(self, context: mlx_server.GenerationContext, formatted: mlx_server.ToolCallFormatter):
        self._state = context.text_sm.make_state(context.initial_state)
        self._part, self._formatted = context.initial_state, formatted
        self._text = self._reasoning = self._tool = ""
        self._calls: list[str] = []
        self._has_called = False
        self._reason: str | None = None

    @property
    def has_news(self) -> bool:
        return bool(self._text or self._reasoning or self._calls)

    def take(self, piece: Piece) -> None:
        self._state, segments = TextStateMachine.split(self._state, piece.text)
        if piece.finish_reason is not None:  # the beginning of a marker that never came is text
            self._state, rest, part = TextStateMachine.flush(self._state)
            segments.append((part, rest))
        for part, text in segments:
            if part == "reasoning":
                self._reasoning += text
            elif part == "tool":
                self._tool += text
            elif part == "normal":
                if self._part == "tool":
                    self._end_call()
                self._text += text
            self._part = part
        if piece.finish_reason is not None:
            if self._tool:
                self._end_call()
            self._reason = "tool_calls" if piece.finish_reason == "stop" and self._has_called else piece.finish_reason

    def give(self) -> tuple[str, str, list[dict], str | None]:
        """(text, reasoning, calls, finish reason) since the last time."""
        news = self._text, self._reasoning, self._formatted(self._calls), self._reason
        self._text, self._reasoning, self._calls = "", "", []
        return news

    def _end_call(self) -> None:
        self._calls.append(self._tool)
        self._tool, self._has_called = "", True


def _is_plain(args: mlx_server.GenerationArguments) -> bool:
    """Whether only the likeliest token is asked for. The tokens of such rows are chosen together."""
    logits, has_top = args.logits, args.logprobs and args.top_logprobs > 0
    penalties = logits.repetition_penalty, logits.presence_penalty, logits.frequency_penalty
    return args.sampling.temperature == 0 and not (logits.logit_bias or any(penalties) or has_top)


def _settled(body: dict, path: str) -> tuple[dict, int]:
    """(a body that mlx-lm's handler takes, `top_logprobs`, which may be more than the handler's 11).

    Nothing in the body is null, messages are plain text, and it has no address that mlx-lm would fetch.

    Raises:
        Refused: names what is wrong.
    """
    body = {key: value for key, value in body.items() if value is not None}
    if body.get("n", 1) != 1:
        raise Refused(400, "n must be 1: local models give one answer to a request", param="n")
    for key, value in body.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Refused(400, f"{key} must be a finite number", param=key)
    stop = body.get("stop", [])
    if not (isinstance(stop, str) or isinstance(stop, list) and all(isinstance(one, str) for one in stop)):
        raise Refused(400, "stop must be a text or a list of texts", param="stop")
    if not isinstance(body.get("stream_options", {}), dict):
        raise Refused(400, "stream_options must be an object", param="stream_options")
    top = body.pop("top_logprobs", 0)
    if isinstance(body.get("logprobs"), int) and not isinstance(body["logprobs"], bool):  # in plain completions
        top, body["logprobs"] = body["logprobs"], True
    if not isinstance(top, int) or not 0 <= top <= TOP_LOGPROBS:
        raise Refused(400, f"top_logprobs must be from 0 to {TOP_LOGPROBS}", param="top_logprobs")
    variables = body.get("chat_template_kwargs", {})
    if not isinstance(variables, dict) or TEMPLATE_NAMES & variables.keys():
        raise Refused(400, "chat_template_kwargs must be variables of the chat template", param="chat_template_kwargs")
    if not isinstance(body.get("role_mapping", {}), dict):
        raise Refused(400, "role_mapping must be an object", param="role_mapping")
    if not isinstance(body.get("tools", []), list):
        raise Refused(400, "tools must be a list", param="tools")
    if path.endswith("/chat/completions"):
        body["messages"] = _plain_messages(body.get("messages"))
    else:
        body["prompt"] = _one_prompt(body.get("prompt"))
    return body, top


def _plain_messages(messages: Any) -> list[dict]:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise Refused(400, "messages must be a list of objects, and not empty", param="messages")
    plain = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message.get("role"), str):
            raise Refused(400, f"{where} has no role", param=where)
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(text, str) for text in texts):
                raise Refused(400, f"{where} has parts that are no text, which local models do not take", param=where)
            content = "".join(texts)
        if not isinstance(content, str | None):
            raise Refused(400, f"{where} has a content that is no text", param=where)
        plain.append(message | {"content": content})
    return plain


def _one_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        (prompt,) = prompt
    is_ids = isinstance(prompt, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in prompt)
    if not (isinstance(prompt, str) or is_ids):
        raise Refused(400, "prompt must be one text or one list of token ids", param="prompt")
    return prompt
