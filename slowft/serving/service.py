"""Runs `slowft serve`: opens the models, the file of requests and the server that settings name, and closes them."""

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import ConfigError, check_least
from ..requests import prices, pruning
from ..requests.store import RequestStore
from .guard import Guard
from .pages import Pages
from .recorder import Recorder
from .server import Parts, Server
from .settings import Settings as Settings
from .upstream import Upstream

EMULATED = "emulated"  # the name of the model that --emulate and --delta make
PASS_S = 0.5  # seconds that the end of the server waits for the end of a pass over the weights


class Service:
    """All that `slowft serve` runs. A context manager.

    Args:
        say: is called with lines for a person. on_answer: is called with a line about each request, if given.

    Attributes:
        url: the base URL for clients. names: models on this machine.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None], on_answer: Callable[[str], None] | None = None):
        s = settings
        _check(s)
        self._closing = ExitStack()
        self.server = None
        try:
            guard = Guard(s.host, s.token)
            upstream = None if s.upstream is None else Upstream(s.upstream)
            self.store = store = recorder = None
            if s.record is not None:
                listed = None if s.prices is None else prices.load(s.prices)
                self.store = store = RequestStore(s.record, redact=s.redact, prices=listed)
                self._closing.callback(self._close_store)
                recorder = Recorder(store, say)
            parts = Parts(guard, Pages(store), None, upstream, recorder, s.cache, on_answer)
            self.server = Server(s.host, s.port, parts)  # a port that is taken is found before the model is opened
            local = None if s.model is None else self._open_local(s)
            self.server.answer_by(local)
            self.names = [] if local is None else list(local.names)
            self.scheduler = None if local is None else local.scheduler
            self.recorder = recorder
            self._closing.callback(self.server.close)
        except BaseException:
            if self.server is not None:
                self.server.close()
            self._closing.close()
            raise
        self.url = self.server.url

    def __enter__(self) -> "Service":
        try:
            self.server.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Break off the answers that are being made, finish recording, close the models."""
        self._closing.close()

    def _close_store(self) -> None:
        if self.server is None or self.server.is_recorded:  # otherwise a thread is still writing
            self.store.close()

    def _open_local(self, s: Settings):
        from .local import Local
        from .scheduler import Scheduler

        opened: dict[str, Any] = {}
        scheduler = Scheduler(lambda: _open(s, opened), s.wave)
        scheduler.start()
        self._closing.callback(scheduler.close, PASS_S)
        return Local(scheduler, opened, s)


def serve(settings: Settings, say: Callable[[str], None], on_answer: Callable[[str], None] | None) -> None:
    """Serve until Ctrl-C or SIGTERM. Threads that do not end soon are still running when this returns."""
    ended = threading.Event()
    earlier_handlers = []
    logging.getLogger().addHandler(logging.NullHandler())  # headers of answers say what mlx-lm's server logs
    try:
        with Service(settings, say, on_answer) as service:
            for number in (signal.SIGINT, signal.SIGTERM):
                earlier_handlers.append((number, signal.signal(number, lambda *_: ended.set())))
            others = f"; other models: {settings.upstream}" if settings.upstream else ""
            recorded = f"; recorded in {settings.record}" if settings.record else ""
            say(f"Serving at {service.url}: {', '.join(service.names) or 'no local models'}{others}{recorded}")
            while not ended.wait(1.0):
                pass
    finally:
        for number, handler in earlier_handlers:
            signal.signal(number, handler)


def _check(s: Settings) -> None:
    if s.model is None and s.upstream is None:
        raise ConfigError("nothing to serve: give a MODEL, an --upstream, or both")
    if s.model is None and (s.adapter or s.emulate or s.delta):
        raise ConfigError("--adapter and --emulate need the MODEL that they belong to")
    if s.record is None and (s.cache or s.redact or s.prices):
        raise ConfigError("--cache, --redact and --prices are about recorded requests. Give --record FILE too")
    if (s.delta or s.delta_top_p is not None) and s.emulate is None:
        raise ConfigError("--delta says what another model learnt. Give that model's base too: --emulate SMALL")
    if s.token is not None and not s.token.strip():
        raise ConfigError("--token is empty. Give one that nobody guesses")
    check_least(1, max_tokens=s.max_tokens, wave=s.wave)
    if s.model is not None:  # without one, MLX is not needed
        from ..inference.sampling import Sampling

        Sampling(temp=s.temp, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p)  # raises an error for impossible values


def _open(s: Settings, names: dict[str, Any]):
    """(voices, a function that closes the models). Runs on the thread that uses the models, and fills `names`."""
    from ..data.tokenizer import load_tokenizer
    from ..engine.budget import default_memory
    from ..engine.model import open_model
    from ..inference.generate import USUAL_WAVE
    from .local import Name
    from .scheduler import Voice

    wave, how = s.wave or USUAL_WAVE, {"compute_dtype": s.compute_dtype, "trust_remote_code": s.trust_remote_code}
    with ExitStack() as closing:
        memory = default_memory() if s.memory is None else s.memory
        adapters = [_named(text) for text in s.adapter]
        emulated = None
        if s.emulate is None:
            model = closing.enter_context(open_model(s.model, memory, **how))
        else:
            from ..inference.emulate import emulate, parse_delta

            deltas = [parse_delta(text) for text in s.delta]
            emulated = emulate(s.model, s.emulate, deltas, memory=memory, nucleus=s.delta_top_p, **how)
            model = closing.enter_context(emulated).streamed
            if adapters and not emulated.is_up_scaling:
                raise ConfigError(f"--adapter belongs to {s.model}, which is in memory here: {s.emulate} is larger")
        for name, path in adapters:
            model.add_adapter(name, path)

        def tokenizer_of(path: Path):
            return load_tokenizer(path, model.embedding_rows, s.trust_remote_code, s.chat_template)

        voices = []
        if emulated is None or emulated.is_up_scaling:
            plain = Voice(model, tokenizer_of(model.path), wave)
            voices.append(plain)
            names[name_of(s.model)] = Name(plain, False)
            for name, path in adapters:
                if name in names or name == EMULATED:
                    raise ConfigError(f"--adapter {name}=... is the name of another model here. Give it another name")
                names[name] = Name(plain, name, _pruning(path))
        if emulated is not None:
            voices.append(Voice(emulated, tokenizer_of(emulated.path), wave))
            names[EMULATED] = Name(voices[-1], True)
        model.budget.measure_anew()  # tokenizers and adapters are in memory now
        return voices, closing.pop_all().close


def name_of(model: str) -> str:
    """The name by which requests ask for a model: its hub id, or the name of its directory."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _named(text: str) -> tuple[str, Path]:
    """(name, path) of NAME=PATH."""
    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise ConfigError(f"--adapter {text} is not NAME=PATH. Give such as shop=adapters/shop")
    return name, Path(path).expanduser()


def _pruning(adapter: Path):
    """A function that prunes messages by the adapter's rules; None: it has no rules."""
    rules = pruning.load(adapter)
    return None if not rules else lambda messages: pruning.apply(rules, messages)
