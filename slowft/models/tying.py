"""Whether a model has a head of its own or shares the embedding's weights, where its config does not say.

Comes in: a config and where the tensors lie. Goes out: a config that says it, and the tensors that are not used.
Transformers leaves a setting out of config.json if it is the default of its own class, and mlx-lm's class may have the
other default. So the tensors themselves are compared: if the head's bytes equal the embedding's, the two are tied.
"""

import contextlib
import copy
import io
import re
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import platform
from ..errors import ModelError
from ..weights.extents import Extent
from ..weights.transfers import opened, read_bytes
from .config import NESTED, Classes, arguments, has

HEAD = "lm_head."
EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?)\.")
PIECE_NBYTES = 8 << 20


def settle_head(
    path: Path, config: dict, classes: Classes, extents: dict[str, Extent]
) -> tuple[dict, list[str], list[str]]:
    """Decide whether a head that lies in the files is used or the embedding in its place.

    Returns:
        The config, the names of tensors that are not used, and what a person should know, a sentence each.
    Raises:
        ModelError: the files have a head of their own, and mlx-lm's class has no place for one.
    """
    head = [name for name in extents if re.search(r"(^|\.)lm_head\.\w+$", name)]
    if not any(name.endswith("lm_head.weight") for name in head):
        return config, [], []
    nested = any(isinstance(config.get(name), dict) for name in NESTED)
    if config.get("tie_word_embeddings") is False and not nested:
        return config, [], []
    parts = [(cls, part) for cls, part in arguments(config, classes) if has(cls, "tie_word_embeddings")]
    tied = next((part["tie_word_embeddings"] for _, part in parts if "tie_word_embeddings" in part), None)
    if tied is None:
        tied = config.get("tie_word_embeddings")
    has_head, drops_head = _heads_of_class(config, classes, extents, head)
    if has_head and not drops_head:
        return config, [], []  # mlx-lm uses the head
    if tied is None and _is_embedding(extents, head):
        return config, head, []
    if tied is None and has_head:
        return config, [], []
    if tied is True:
        differs = not _is_embedding(extents, head, most=PIECE_NBYTES)
        note = f"{path}: config.json ties the head to the embedding, so {head[0]}, which differs, is not used"
        return config, head, [note] if differs else []
    if not parts:
        raise ModelError(
            f"{path} has a head of its own ({head[0]}, which differs from the embedding), and mlx-lm's "
            f"{config.get('model_type')} has none: it would compute something else. Use a model that mlx-lm reads"
        )
    config = copy.deepcopy(config)
    for _, part in arguments(config, classes):
        part["tie_word_embeddings"] = False
    if tied is False:
        return config, [], []
    note = (
        f"{path}: config.json does not say whether the head is tied to the embedding, and {head[0]} differs from it: "
        "used as a head of its own; mlx-lm's own commands would leave it out"
    )
    return config, [], [note]


def _heads_of_class(config: dict, classes: Classes, extents: dict[str, Extent], head: list[str]) -> tuple[bool, bool]:
    """(Whether mlx-lm's model has a head of its own, whether it has none if the files have none)."""

    def has_head(model) -> bool:
        return any(re.search(r"(^|\.)lm_head\.\w+$", name) for name, _ in tree_flatten(model.parameters()))

    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        model_class, args_class = classes(config)
        model = model_class(args_class.from_dict(copy.deepcopy(config)))
        before = has_head(model)
        if before and hasattr(model, "sanitize"):
            with contextlib.suppress(Exception):
                weights = {n: mx.zeros(e.shape, getattr(mx, e.dtype)) for n, e in extents.items() if n not in head}
                model.sanitize(weights)  # Gemma's drops the head if there are no weights for it; nothing is evaluated
        return before, not has_head(model)
    return True, False  # if mlx-lm cannot build the model, loading reports it later


def _is_embedding(extents: dict[str, Extent], head: list[str], most: int | None = None) -> bool:
    """Whether the head's tensors equal those of an embedding, byte by byte. Compares only `most` bytes if given."""
    head_extents = {name.rpartition(HEAD)[2]: extents[name] for name in head}
    prefixes = {match[0] for name in extents if (match := EMBEDDING.match(name))}
    for prefix in prefixes:
        pairs = [(extent, extents.get(prefix + key)) for key, extent in head_extents.items()]
        if all(other is not None and _are_equal(extent, other, most) for extent, other in pairs):
            return True
    return False


def _are_equal(a: Extent, b: Extent, most: int | None) -> bool:
    if (a.stored, a.shape) != (b.stored, b.shape):
        return False
    with opened(a.file) as first, opened(b.file) as second:
        for start in range(0, min(a.nbytes, most or a.nbytes), PIECE_NBYTES):
            n = min(PIECE_NBYTES, a.nbytes - start)
            pieces = [read_bytes(e.file, fd, n, e.offset + start, ModelError) for e, fd in ((a, first), (b, second))]
            if pieces[0] != pieces[1]:
                return False
            platform.drop_cached(first, a.offset + start, n)
            platform.drop_cached(second, b.offset + start, n)
        return True
