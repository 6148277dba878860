"""`slowft serve` from its settings: opens models, the file of requests and the server, and closes them again."""

import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..platform import allow_open_files
from ..requests import prices, pruning
from ..requests.store import RequestStore
from .guard import Guard
from .pages import Pages
from .recorder import Recorder
from .server import Parts, Server
from .upstream import Upstream

EMULATED = "emulated"  # the name of what --emulate and --delta make
OPEN_FILES = 4096  # a client that is passed on takes two connections, and macOS gives a process 256 files
PASS_S = 0.5  # that a pass over the weights may take to end, when the server does


@dataclass(frozen=True)
class Settings:
    """How to serve; names and meanings are `mlx_lm.server`'s where that has them.

    Attributes:
        adapter: NAME=PATH of each. emulate, delta, delta_top_p: as in `slowft generate`.
        upstream: base URL of what answers for other models. record: file. cache: equal requests are answered from it.
        token: that clients have to send; None: none.
        wave: rows at a time; None: as many as memory lets, up to 32.
    """

    model: str | None = None
    adapter: Sequence[str] = ()
    emulate: str | None = None
    delta: Sequence[str] = ()
    delta_top_p: float | None = None
    upstream: str | None = None
    record: str | None = None
    cache: bool = False
    redact: Sequence[str] = ()
    prices: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    chat_template: str | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    wave: int | None = None
    memory: str | int | None = None
    compute_dtype: str | None = None
    trust_remote_code: bool = False


class Service:
    """All that `slowft serve` runs. A context manager.

    Args:
        say: told lines for a person. on_answer: told of each request; None: nobody is.

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
            local = None if s.model is None else self._open_local(s)
            self.names = [] if local is None else list(local.names)
            self.scheduler = None if local is None else local.scheduler
            self.recorder = recorder
            allow_open_files(OPEN_FILES)
            self.server = Server(
                s.host, s.port, Parts(guard, Pages(store), local, upstream, recorder, s.cache, on_answer)
            )
            self._closing.callback(self.server.close)
        except BaseException:
            self._closing.close()
            raise
        self.url = self.server.url

    def __enter__(self) -> "Service":
        self.server.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Break off what is being answered, finish what is recorded, close the models."""
        self._closing.close()

    def _close_store(self) -> None:
        if self.server is None or self.server.is_recorded:  # else a thread still writes
            self.store.close()

    def _open_local(self, s: Settings):
        from .local import Defaults, Local
        from .scheduler import Scheduler

        opened: dict[str, Any] = {}
        scheduler = Scheduler(lambda: _open(s, opened), s.wave)
        scheduler.start()
        self._closing.callback(scheduler.close, PASS_S)
        return Local(scheduler, opened, Defaults(s.temp, s.top_p, s.top_k, s.min_p, s.max_tokens, s.chat_template_args))


def serve(settings: Settings, say: Callable[[str], None], on_answer: Callable[[str], None] | None) -> None:
    """Serve until Ctrl-C or SIGTERM. Threads may still run then: nobody waits long for them."""
    ended = threading.Event()
    before = []
    logging.getLogger().addHandler(logging.NullHandler())  # what mlx-lm's server logs is in answers' headers
    try:
        with Service(settings, say, on_answer) as service:
            for number in (signal.SIGINT, signal.SIGTERM):
                before.append((number, signal.signal(number, lambda *_: ended.set())))
            others = f"; other models: {settings.upstream}" if settings.upstream else ""
            recorded = f"; recorded in {settings.record}" if settings.record else ""
            say(f"Serving at {service.url}: {', '.join(service.names) or 'no local models'}{others}{recorded}")
            while not ended.wait(1.0):
                pass
    finally:
        for number, handler in before:
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


def _open(s: Settings, names: dict[str, Any]):
    """(voices, what closes the models), on the thread that uses them; `names` becomes what answers."""
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
    """What a model is asked for by: its hub id, or the name of its directory."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise ConfigError(f"--adapter {text} is not NAME=PATH. Give such as shop=adapters/shop")
    return name, Path(path).expanduser()


def _pruning(adapter: Path):
    rules = pruning.load(adapter)
    return None if not rules else lambda messages: pruning.apply(rules, messages)
