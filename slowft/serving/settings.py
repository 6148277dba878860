"""The settings of `slowft serve`, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How to serve; names and meanings are `mlx_lm.server`'s where that has them.

    Attributes:
        adapter: NAME=PATH of each adapter. emulate, delta, delta_top_p: as in `slowft generate`.
        upstream: base URL of the server that answers for other models.
        record: file of requests and answers. cache: a request equal to a recorded one is answered from it.
        redact: regular expressions; what matches is replaced in the file. prices: file with the cost of tokens.
        token: clients have to send it; None: there is none.
        temp, top_p, top_k, min_p, max_tokens, chat_template_args: of requests that do not give them.
        wave: rows at a time; None: as many as fit into memory, up to 32.
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
