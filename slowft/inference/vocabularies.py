"""Whether two models have one vocabulary, so that what the one says can be added to, or guessed by, the other."""

from pathlib import Path

from ..data.tokenizer import load_tokenizer
from ..errors import ConfigError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


def check_same_vocabulary(path: Path, other: Path, sizes: tuple[int, int] | None = None) -> bool:
    """Whether both have a tokenizer; then they are the same. How many rows embeddings are padded to does not matter.

    Args:
        sizes: token ids that each gives logits of; they are compared where there is no other way. None: not known yet.
    Raises:
        ConfigError: the other one's tokenizer has another text for an id (names the first such id), or another size.
    """
    ours, theirs = _texts(path), _texts(other)
    if ours is not None and theirs is not None:
        if ours == theirs:
            return True
        first = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        here, there = ("nothing" if first not in texts else repr(texts[first]) for texts in (ours, theirs))
        differ = f"id {first} is {there} there and {here} here. Give models of one family"
    elif sizes is not None and sizes[0] != sizes[1]:
        differ = f"{sizes[1]} token ids there and {sizes[0]} here. Put tokenizer.json beside the weights, to compare"
    else:
        return False
    raise ConfigError(f"{other} has another vocabulary than {path}: {differ}")


def _texts(path: Path) -> dict[int, str] | None:
    """Id -> text. None: the directory has no tokenizer."""
    if not any((path / name).exists() for name in FILES):
        return None
    return {i: text for text, i in load_tokenizer(path, None).get_vocab().items()}
