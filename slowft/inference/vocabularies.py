"""Checks that two models have the same vocabulary: then their logits can be added, and one can draft for the other."""

from pathlib import Path

from ..data.tokenizer import load_tokenizer
from ..errors import ConfigError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


def check_same_vocabulary(path: Path, other: Path, sizes: tuple[int, int] | None = None) -> bool:
    """True if both directories have a tokenizer, and the same one. False if one has none, so that nothing was compared.

    The number of rows that embeddings are padded to does not matter.

    Args:
        sizes: numbers of logits of the two models, which are compared if a tokenizer is missing. None: not known yet.
    Raises:
        ConfigError: the tokenizers differ (names the first id whose texts differ), or the sizes do.
    """
    ours, theirs = _texts(path), _texts(other)
    if ours is not None and theirs is not None:
        if ours == theirs:
            return True
        first = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        our_text, their_text = ("nothing" if first not in texts else repr(texts[first]) for texts in (ours, theirs))
        reason = f"id {first} is {their_text} there and {our_text} here. Give models of one family"
    elif sizes is not None and sizes[0] != sizes[1]:
        reason = f"{sizes[1]} token ids there and {sizes[0]} here. Put tokenizer.json beside the weights, to compare"
    else:
        return False
    raise ConfigError(f"{other} has another vocabulary than {path}: {reason}")


def _texts(path: Path) -> dict[int, str] | None:
    """The vocabulary: id -> text. None: the directory has no tokenizer."""
    if not any((path / name).exists() for name in FILES):
        return None
    return {i: text for text, i in load_tokenizer(path, None).get_vocab().items()}
