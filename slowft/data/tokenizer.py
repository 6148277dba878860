"""Loads the tokenizer of a model directory as mlx-lm does, and checks it against the model.

Comes in: a directory, the number of rows of the model's embedding, and perhaps a chat template. Goes out: mlx-lm's
tokenizer, or a one-line error. What is only unusual is a warning. Never asks a question, and opens no weights.
"""

import contextlib
import io
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, ModelError, SlowftError, SlowftWarning
from ..models.loading import find_local
from ..models.outline import explain_hub
from ..models.tokenizer import NotSentencePieceError, has_sentencepiece_only, write_sentencepiece_tokenizer
from ..weights.inside import check_inside
from ..weights.recognise import read_json, recognise

# A tokenizer may have a few ids fewer than the embedding has rows (rows are padded to a round number), or more
# (Gemma 3 1B: an image token that no text gives). Ids that the data does give are checked one by one.
LEAST_VOCABULARY_SHARE = 0.9
CHECKED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
OF_LONG_TEXTS = "sequence-length-is-longer-than-the-specified-maximum"  # transformers' warning: here texts are cut
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.py", "*.model", "*.tiktoken"]  # all but a model's weights


def load_tokenizer(
    model_path: Path,
    embedding_rows: int | None,
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
):
    """mlx-lm's tokenizer of a model directory, checked against the model's embedding and configuration.

    If the directory has a SentencePiece model only (tokenizer.model), the tokenizer encodes as SentencePiece does.

    Args:
        embedding_rows: number of rows of the model's embedding, which token ids must be below. None if not known.
        trust_remote_code: let the tokenizer run Python code in its directory.
        chat_template: a file with the template to use in place of the model's own: Jinja, or JSON with
            "chat_template".
    Raises:
        DataError: the tokenizer is missing or broken, belongs to another model, or wants to run code.
        ModelError: a file lies outside the directory.
        ConfigError: `chat_template` does not exist, or is no template.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    template = None if chat_template is None else read_chat_template(Path(chat_template).expanduser())
    check_inside(model_path)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tiktoken.model")
    if not any((model_path / name).exists() for name in names):
        raise DataError(f"{model_path} has no tokenizer (tokenizer.json or tokenizer.model). Download the whole model")
    _refuse_impostors(model_path)
    try:
        ending = load_config(model_path).get("eos_token_id")
        with _with_tokenizer_json(model_path) as directory, contextlib.redirect_stdout(io.StringIO()):
            config = {"trust_remote_code": trust_remote_code}
            if template is not None:
                config["chat_template"] = template  # mlx-lm infers from it how tools are called
            tokenizer = load(directory, config, eos_token_ids=ending)
        getattr(tokenizer, "deprecation_warnings", {})[OF_LONG_TEXTS] = True
        vocabulary = tokenizer.get_vocab()
        tokenizer.encode("a b"), tokenizer.all_special_ids, tokenizer.eos_token_id  # some tokenizers fail only in use
    except SlowftError:
        raise
    except Exception as e:  # transformers raises many classes, and all of them mean that the tokenizer cannot be used
        if "trust_remote_code" in str(e):  # transformers refuses to run the tokenizer's code
            raise DataError(_wants_code(model_path)) from None
        raise DataError(f"the tokenizer in {model_path} cannot be loaded: {one_line(e)}") from None
    if template is None and not tokenizer.has_chat_template:
        template = _template_of_processor(model_path)
    if template is not None:
        tokenizer.chat_template = template
        tokenizer._chat_template = None  # mlx-lm prefers this one, which a chat_template_type makes
        object.__setattr__(tokenizer, "has_chat_template", True)  # setattr would set it on the wrapped tokenizer
    _check_size_of_vocabulary(model_path, tokenizer, vocabulary, embedding_rows)
    _check_ending(model_path, tokenizer, vocabulary, [ending] if isinstance(ending, int) else ending or [])
    return tokenizer


def read_chat_template(file: Path) -> str:
    """The chat template in a file of Jinja, or of JSON with "chat_template".

    Raises:
        ConfigError: the file cannot be read, or holds no template; names the line.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """The tag of transformers around the assistant's text."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        text = file.read_text("utf-8")
    except OSError as e:
        raise ConfigError(f"chat template {file} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"chat template {file} is not text in UTF-8. Give a file of Jinja") from None
    if file.suffix == ".json":
        text = _template_in(read_json(file, ConfigError), file)
    if not text.strip():
        raise ConfigError(f"chat template {file} is empty")
    try:
        jinja2.Environment(extensions=[loopcontrols, Generation]).parse(text)
    except jinja2.TemplateSyntaxError as e:
        raise ConfigError(f"chat template {file} line {e.lineno} is not Jinja: {e.message}") from None
    return text


def _template_in(content: Any, file: Path) -> str:
    template = content.get("chat_template") if isinstance(content, dict) else content
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ConfigError(f'chat template {file} has no "chat_template" with a text. Give a file of Jinja')
    return template


def _template_of_processor(model_path: Path) -> str | None:
    """The template of a model for images or sound too, which is in a file of the model's processor."""
    file = model_path / "chat_template.json"
    return read_chat_template(file) if file.exists() else None


def _refuse_impostors(model_path: Path) -> None:
    for name in CHECKED:
        if (model_path / name).exists():
            try:
                read_json(model_path / name, DataError)
            except DataError as e:
                raise DataError(f"the tokenizer in {model_path} cannot be loaded: {e}") from None
    kind = recognise(model_path / "tokenizer.model")  # a good one may be text
    if kind is not None and kind[0].startswith(("an empty", "a pointer", "an HTML", "an XML")):
        raise DataError(f"the tokenizer in {model_path} cannot be loaded: tokenizer.model is {kind[0]}. {kind[1]}")


def _wants_code(model_path: Path) -> str:
    files = set()
    for name in ("tokenizer_config.json", "config.json"):
        entries = _mapping(model_path / name).get("auto_map") or {}
        classes = list(entries.values()) if isinstance(entries, dict) else [entries]
        for place in [p for entry in classes for p in (entry if isinstance(entry, list) else [entry]) if p]:
            files.add(str(place).rpartition("--")[2].rpartition(".")[0] + ".py")
        if files:
            break
    shown = ", ".join(sorted(files)) or "by its auto_map"
    return (
        f"the tokenizer in {model_path} wants to run code of its own ({shown}). Read it, and if you trust it: "
        "--trust-remote-code"
    )


def _mapping(file: Path) -> dict:
    try:
        content = read_json(file, ModelError)
    except ModelError:
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _with_tokenizer_json(model_path: Path) -> Iterator[Path]:
    """The directory or, if it has a SentencePiece model only, a temporary copy that has a tokenizer.json too."""
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
        for file in [file for kind in ("*.json", "*.jinja", "*.py") for file in model_path.glob(kind)]:
            if not (directory / file.name).exists() and not file.name.endswith(".index.json"):
                (directory / file.name).symlink_to(file.resolve())
        yield directory


def _check_size_of_vocabulary(model_path: Path, tokenizer, vocabulary: dict[str, int], rows: int | None) -> None:
    """Refuse ids beyond the embedding, except a few added tokens, which are rare in texts. Warn of far too few ids."""
    if rows is None or not vocabulary:
        return
    n_ids = max(vocabulary.values()) + 1
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    beyond = [i for i in vocabulary.values() if i >= rows and i not in added]
    if beyond or rows < LEAST_VOCABULARY_SHARE * n_ids:
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
    if n_ids < LEAST_VOCABULARY_SHARE * rows:
        _note(
            f"the tokenizer in {model_path} has only {n_ids} token ids, the model's embedding {rows} rows: is it this "
            "model's own?"
        )


def _check_ending(model_path: Path, tokenizer, vocabulary: dict[str, int], ending: list[int]) -> None:
    """Warn if none of config.json's end tokens is a special token of the tokenizer: usually one is."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if ending and special and not special & set(ending):
        token = next((t for t, i in vocabulary.items() if i == ending[0]), None)
        _note(
            f"{model_path}: by config.json token {ending[0]} ends a text, which in the tokenizer there is "
            f"{'an ordinary ' + repr(token) if token else 'none'} (its own end is {tokenizer.eos_token}, "
            f"{tokenizer.eos_token_id}): is the tokenizer this model's own?"
        )


def _note(text: str) -> None:
    warnings.warn(text, SlowftWarning, stacklevel=4)


def one_line(error: Exception) -> str:
    """The message of another library's error, on one line."""
    return textwrap.shorten(str(error), 240) or type(error).__name__


def tokenizer_files(path_or_hub_id: str) -> Path:
    """The local directory of a model. For a hub id, everything but the weights is downloaded to it.

    Raises:
        ModelError: there is no such directory, and the hub does not have the model or cannot be reached.
    """
    if (local := find_local(path_or_hub_id)) is not None:
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=SMALL_FILES))
    except Exception as e:  # huggingface-hub and its HTTP library raise many classes
        raise ModelError(explain_hub(e, path_or_hub_id)) from None
