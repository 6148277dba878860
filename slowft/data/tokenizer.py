"""The tokenizer of a model directory, as mlx-lm loads it, checked against the model.

Comes in: a directory, and the number of rows of the model's embedding. Goes out: mlx-lm's tokenizer, or a one-line
error. Never asks a question, and opens no weights.
"""

import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError, ModelError
from ..models.loading import find_local
from ..models.outline import explain_hub
from ..models.tokenizer import NotSentencePieceError, has_sentencepiece_only, write_sentencepiece_tokenizer

# A tokenizer may have a few ids fewer than the embedding has rows (rows are padded to a round number), or more
# (Gemma 3 1B: an image token that no text gives). Ids that the data does give are checked one by one.
LEAST_VOCABULARY_SHARE = 0.9
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.py", "*.model", "*.tiktoken"]  # of a model on the hub: no weights


def load_tokenizer(model_path: Path, embedding_rows: int | None, trust_remote_code: bool = False):
    """mlx-lm's tokenizer of a model directory, checked against the model's embedding and configuration.

    Of a directory with a SentencePiece model only (tokenizer.model), one that encodes as SentencePiece does.

    Raises:
        DataError: no tokenizer, a broken one, or one that belongs to another model.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tiktoken.model")
    if not any((model_path / name).exists() for name in names):
        raise DataError(f"{model_path} has no tokenizer (tokenizer.json or tokenizer.model). Download the whole model")
    try:
        extra = {"trust_remote_code": True} if trust_remote_code else {}
        ending = load_config(model_path).get("eos_token_id")
        with _with_tokenizer_json(model_path) as directory:
            tokenizer = load(directory, extra, eos_token_ids=ending)
        vocabulary = tokenizer.get_vocab()
    except DataError:
        raise
    except Exception as e:  # transformers raises many kinds, all of which mean: not a usable tokenizer
        raise DataError(f"the tokenizer in {model_path} cannot be loaded: {one_line(e)}") from None
    _check_size_of_vocabulary(model_path, tokenizer, vocabulary, embedding_rows)
    _check_ending(model_path, tokenizer, vocabulary, [ending] if isinstance(ending, int) else ending or [])
    return tokenizer


@contextmanager
def _with_tokenizer_json(model_path: Path) -> Iterator[Path]:
    """The directory, or a temporary one of the same with the tokenizer.json that it lacks."""
    if not has_sentencepiece_only(model_path):
        yield model_path
        return
    with tempfile.TemporaryDirectory(prefix="slowft-tokenizer-") as temporary:
        directory = Path(temporary)
        try:
            write_sentencepiece_tokenizer(model_path, directory)
        except NotSentencePieceError:  # a tokenizer.model of another kind, which mlx-lm may know
            yield model_path
            return
        for file in [*model_path.glob("*.json"), *model_path.glob("*.jinja")]:
            if not (directory / file.name).exists() and not file.name.endswith(".index.json"):
                (directory / file.name).symlink_to(file.resolve())
        yield directory


def _check_size_of_vocabulary(model_path: Path, tokenizer, vocabulary: dict[str, int], rows: int | None) -> None:
    if rows is None:
        return
    n_ids = max(vocabulary.values()) + 1
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    beyond = [i for i in vocabulary.values() if i >= rows and i not in added]
    if beyond or min(n_ids, rows) < LEAST_VOCABULARY_SHARE * max(n_ids, rows):
        raise DataError(
            f"the tokenizer in {model_path} has {n_ids} token ids, the model's embedding {rows} rows: they "
            "belong to different models. Put the model's own tokenizer files there"
        )
    for name, i in (("begin", tokenizer.bos_token_id), ("end", tokenizer.eos_token_id)):
        if i is not None and i >= rows:
            raise DataError(
                f"the tokenizer in {model_path} has its {name} token at id {i}, the model's embedding {rows} rows. "
                "Put the model's own tokenizer files there"
            )


def _check_ending(model_path: Path, tokenizer, vocabulary: dict[str, int], ending: list[int]) -> None:
    """One of the tokens that end a text by config.json is special in the tokenizer, or it is of another model."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if ending and special and not special & set(ending):
        token = next((t for t, i in vocabulary.items() if i == ending[0]), None)
        raise DataError(
            f"{model_path}: by config.json token {ending[0]} ends a text, which in the tokenizer there is "
            f"{'an ordinary ' + repr(token) if token else 'none'} (its own end is {tokenizer.eos_token}, "
            f"{tokenizer.eos_token_id}): they belong to different models. Put the model's own tokenizer files there"
        )


def one_line(error: Exception) -> str:
    """What other libraries say, on one line."""
    return textwrap.shorten(str(error), 240) or type(error).__name__


def tokenizer_files(path_or_hub_id: str) -> Path:
    """The local directory of a model; of one on the hub, with everything but its weights, which is downloaded.

    Raises:
        ModelError: no such directory, or the hub does not have it or cannot be reached.
    """
    if (local := find_local(path_or_hub_id)) is not None:
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=SMALL_FILES))
    except Exception as e:  # huggingface-hub and its HTTP library raise many kinds
        raise ModelError(explain_hub(e, path_or_hub_id)) from None
