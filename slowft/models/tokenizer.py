"""Makes a tokenizer.json from the pieces, their kinds, and scores or merges in a GGUF file or SentencePiece model.

Comes in: a GGUF header, or a `tokenizer.model`. Goes out: a Tokenizer of the `tokenizers` library, and the files that
mlx-lm loads. Imports neither MLX nor transformers.

Transformers 5 turns a `tokenizer.model` into merges in the order of the ids. SentencePiece merges in the order of the
scores, and so does this room. In Mistral's tokenizer the two differ for runs of spaces.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..convert.gguf_file import Gguf
from ..errors import DataError, ModelError
from ..weights.recognise import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, in SentencePiece and in GGUF
SPACE = "▁"


class NotSentencePieceError(DataError):
    """A `tokenizer.model` that is not a SentencePiece model of unigrams or BPE."""


# --- How byte-level BPE splits text, by llama.cpp's name for it -------------------------------------------

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")]
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_GPT2_DIGITS = (r"\p{N}", *_GPT2)
_LLAMA3 = (_CONTRACTION + _WORD + r"|\p{N}{1,3}" + _REST,)
_QWEN2 = (_CONTRACTION + _WORD + r"|\p{N}" + _REST,)
_QWEN35 = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT4O = ("|".join(f"{word}{_CONTRACTION}?" for word in _CASED) + r"|\p{N}{1,3}" + _CASED_REST,)
_TEKKEN = ("|".join(_CASED) + r"|\p{N}" + _CASED_REST,)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED = (_CONTRACTION + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)

SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "mellum"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _GPT2_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "qwen35": _QWEN35,
    "tekken": _TEKKEN,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK3,
    "seed-coder": _SEED,
}
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken", "glm4")
BEGIN_UNLESS_SAID = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken")
NFC = ("qwen2", "deepseek-r1-qwen", "command-r", "olmo", "mpt")  # their tokenizer.json normalises text to NFC


# --- GGUF ------------------------------------------------------------------------------------------------


def write_gguf_tokenizer(gguf: Gguf, n_rows: int, directory: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json. Returns config.json's entries about special tokens.

    Args:
        n_rows: number of rows of the model's embedding.
    Raises:
        ModelError: there is no tokenizer, its kind is not known here, or it belongs to another model.
    """
    metadata = gguf.metadata

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, pre, tokens = get("model"), get("pre"), get("tokens")
    if not tokens:
        raise ModelError(f"{gguf.file} has no tokenizer. Take the original model (safetensors)")
    if len(tokens) > n_rows:
        raise ModelError(
            f"{gguf.file}: the tokenizer has {len(tokens)} token ids, the embedding {n_rows} rows: they belong to "
            "different models"
        )
    if not (kind == "llama" or kind == "gpt2" and pre in SPLITS):
        known = f"llama, and gpt2 with {', '.join(SPLITS)}"
        raise ModelError(f"{gguf.file} has a tokenizer of kind {kind}/{pre}; known are {known}")
    types = [int(t) for t in get("token_type", [NORMAL] * len(tokens))]
    try:
        if kind == "llama":
            tokenizer = sentencepiece_bpe(tokens, types, get("scores", []), get("add_space_prefix", True))
        else:
            tokenizer = _byte_level_bpe(tokens, types, get("merges", []), pre)
    except Exception as e:  # the library raises no more specific class
        raise ModelError(f"{gguf.file}: its tokenizer contradicts itself ({e}). Download it again") from None
    begins = get("add_bos_token", kind == "llama" or pre in BEGIN_UNLESS_SAID)

    ids = {name: get(f"{name}_token_id") for name in ("bos", "eos", "eot", "unknown", "padding")}
    if wrong := [f"{name} {i}" for name, i in ids.items() if i is not None and not 0 <= i < len(tokens)]:
        raise ModelError(f"{gguf.file}: special tokens beyond the {len(tokens)} tokens: {', '.join(wrong)}")
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    ends = bool(get("add_eos_token", False)) and "eos" in special
    add_ends(tokenizer, special.get("bos") if begins else None, special["eos"] if ends else None)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length", 1 << 20),
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "unknown", "padding"):
        if name in special:
            config[{"unknown": "unk_token", "padding": "pad_token"}.get(name, f"{name}_token")] = special[name]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n", "utf-8")

    ending = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    result = {"bos_token_id": ids["bos"], "eos_token_id": ending if len(ending) > 1 else next(iter(ending), None)}
    return {key: value for key, value in result.items() if value is not None}


def _byte_level_bpe(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in WHOLE_WORDS_FIRST))
    if pre in NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _mark(tokenizer, tokens, types)
    return tokenizer


# --- SentencePiece ---------------------------------------------------------------------------------------


def has_sentencepiece_only(model_path: Path) -> bool:
    """Whether a model directory has a tokenizer.model, no tokenizer.json, and no tokenizer class of its own."""
    if (model_path / "tokenizer.json").exists() or not (model_path / "tokenizer.model").exists():
        return False
    return "auto_map" not in _read_json(model_path / "tokenizer_config.json")


def write_sentencepiece_tokenizer(model_path: Path, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a model directory that has a tokenizer.model only.

    Texts begin with the begin token if tokenizer_config.json says so (`add_bos_token`), as with mlx-lm.

    Raises:
        NotSentencePieceError: see `read_sentencepiece`.
        DataError: files contradict each other.
    """
    from tokenizers import AddedToken

    config, special, named_added = (
        _read_json(model_path / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    added = {i: AddedToken(content, normalized=False) for content, i in named_added.items()}
    added |= {int(i): AddedToken(**token) for i, token in config.get("added_tokens_decoder", {}).items()}
    tokenizer, named = read_sentencepiece(model_path / "tokenizer.model", added)
    config = named | special | config
    begin, end = (_content(config.get(f"{name}_token")) for name in ("bos", "eos"))
    add_ends(tokenizer, begin if config.get("add_bos_token") else None, end if config.get("add_eos_token") else None)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n", "utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file, DataError) if file.exists() else {}


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def read_sentencepiece(file: Path, added: dict[int, Any] | None = None):
    """(A Tokenizer that encodes as SentencePiece does, its begin, end and unknown piece as in tokenizer_config.json).

    Args:
        added: AddedTokens by id. They come after the pieces, or replace them.
    Raises:
        NotSentencePieceError: the file is no SentencePiece model (Llama 3's is none), or not one of unigrams or BPE.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except (DecodeError, RuntimeError) as e:
        raise NotSentencePieceError(f"{file} is not a SentencePiece model: {e}") from None
    pieces, trained, normalizer = model.pieces, model.trainer_spec, model.normalizer_spec
    if not pieces or trained.model_type not in (trained.UNIGRAM, trained.BPE):
        raise NotSentencePieceError(f"{file} is not a SentencePiece model of unigrams or BPE")
    tokens, types, scores = ([getattr(p, name) for p in pieces] for name in ("piece", "type", "score"))
    named = {"bos_token": trained.bos_id, "eos_token": trained.eos_id, "unk_token": trained.unk_id}
    named = {name: tokens[i] for name, i in named.items() if 0 <= i < len(tokens)}
    for i, token in sorted((added or {}).items()):
        missing = range(len(tokens), i + 1)
        tokens += [f"<unused {n}>" for n in missing]
        types += [UNUSED] * len(missing)
        scores += [0.0] * len(missing)
        tokens[i] = token.content
        if types[i] != UNKNOWN:
            types[i] = CONTROL if token.special else USER_DEFINED
    make = sentencepiece_bpe if trained.model_type == trained.BPE else _sentencepiece_unigram
    charsmap = normalizer.precompiled_charsmap
    tokenizer = make(tokens, types, scores, normalizer.add_dummy_prefix, charsmap, normalizer.remove_extra_whitespaces)
    for token in (added or {}).values():  # with their own settings, such as whether spaces around them are stripped
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
    return tokenizer, named


def sentencepiece_bpe(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    prefix: bool,
    charsmap: bytes = b"",
    squeeze: bool = False,
):
    """A BPE Tokenizer that merges as SentencePiece does: always the pair whose piece has the highest score.

    Args:
        prefix: put a space before every text.
        charsmap: SentencePiece's table of characters to replace.
        squeeze: remove spaces at both ends, and replace runs of spaces by one.
    """
    from tokenizers import Tokenizer, models

    ranks = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == NORMAL}
    merges = []
    for token in sorted(ranks, key=lambda t: (-scores[ranks[t]], ranks[t])):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
    vocabulary = {_as_matched(t, kind): i for i, (t, kind) in enumerate(zip(tokens, types))}
    unknown = next((t for t, kind in zip(tokens, types) if kind == UNKNOWN), None)
    byte_fallback = BYTE in types
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    return _sentencepiece(Tokenizer(model), tokens, types, prefix, charsmap, squeeze)


def _sentencepiece_unigram(tokens, types, scores, prefix: bool, charsmap: bytes, squeeze: bool):
    from tokenizers import Tokenizer, models

    vocabulary = [(_as_matched(t, kind), score) for t, kind, score in zip(tokens, types, scores)]
    model = models.Unigram(vocabulary, types.index(UNKNOWN), BYTE in types)
    return _sentencepiece(Tokenizer(model), tokens, types, prefix, charsmap, squeeze)


def _sentencepiece(tokenizer, tokens, types, prefix: bool, charsmap: bytes, squeeze: bool):
    from tokenizers import Regex, decoders, normalizers

    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    _mark(tokenizer, [_as_matched(t, kind) for t, kind in zip(tokens, types)], types)
    return tokenizer


def _as_matched(token: str, kind: int) -> str:
    """The piece as it occurs in the text: user-defined pieces are matched before spaces are replaced."""
    return token.replace(SPACE, " ") if kind == USER_DEFINED else token


# --- Both ------------------------------------------------------------------------------------------------


def _mark(tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Add control, unknown and user-defined pieces as added tokens, which are never split or merged."""
    from tokenizers import AddedToken

    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        marked = [AddedToken(t, normalized=False, special=special) for t, kind in zip(tokens, types) if kind in kinds]
        tokenizer.add_special_tokens(marked) if special else tokenizer.add_tokens(marked)


def add_ends(tokenizer, begin: str | None, end: str | None) -> None:
    """Have every encoded text begin and end with these tokens."""
    from tokenizers import processors

    if begin is None and end is None:
        return
    template = [*([begin] if begin else []), "$A", *([end] if end else [])]
    special = [(token, tokenizer.token_to_id(token)) for token in {begin, end} - {None}]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=None, special_tokens=special)
