"""Reads a data folder as mlx-lm does (`text`, `completions`, `chat`), tokenised and checked before training.

Comes in: `train.jsonl`, `valid.jsonl`, `test.jsonl` and a tokenizer. Goes out: sequences of (tokens, prompt
offset). Every sample that could not train is found here, with its file and line, before any work is lost.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..errors import DataError
from .tokenizer import one_line

SPLITS = ("train", "valid", "test")

Progress = Callable[[Iterable, str, int], Iterable]  # (items, description, how many) -> the same items


class TokenDataset:
    """Tokenised samples: `[i]` gives (int32 tokens, prompt offset), `where(i)` the file and line it came from."""

    def __init__(self, samples: list[tuple[np.ndarray, int]], places: list[str], n_cut: int = 0):
        self._samples, self._places = samples, places
        self.n_cut = n_cut

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self._samples[i]

    def where(self, i: int) -> str:
        return self._places[i]


def load_data(
    path: str | Path | None,
    tokenizer,
    config: Any,
    splits: Iterable[str] = SPLITS,
    embedding_rows: int | None = None,
    progress: Progress | None = None,
) -> tuple[TokenDataset, TokenDataset, TokenDataset]:
    """(train, valid, test) of a data folder, or of a hub dataset (needs `pip install slowft[datasets]`).

    Args:
        config: a `TrainConfig`: `max_seq_length`, `mask_prompt` and the names of the features are used.
        splits: those to load; the others come back empty.
        embedding_rows: token ids must be below this.
    Raises:
        DataError: no such folder, a malformed line, or a sample that cannot train; names file and line.
    """
    hub = getattr(config, "hf_dataset", None)
    if hub or (path is not None and not Path(path).expanduser().exists() and _looks_like_hub_id(str(path))):
        loaded = _load_from_hub(path, tokenizer, config)
        named = [(split, data, None) for split, data in zip(SPLITS, loaded)]
    else:
        if path is None:
            raise DataError("no data given. Use --data with a folder that holds train.jsonl")
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder. Give one that holds train.jsonl and valid.jsonl")
        named = [(split, *_read_jsonl(folder / f"{split}.jsonl", tokenizer, config)) for split in SPLITS]
    result = []
    for split, data, places in named:
        wanted = data if split in splits else []
        places = places if places is not None else [f"{split} sample {i + 1}" for i in range(len(data))]
        result.append(_tokenize(wanted, places, config, embedding_rows, progress, split))
    return tuple(result)


def check_size(dataset: TokenDataset, batch_size: int, name: str) -> None:
    """Raises DataError when a set has samples, but fewer than one batch takes."""
    if 0 < len(dataset) < batch_size:
        raise DataError(
            f"the {name} set has {len(dataset)} samples, --batch-size is {batch_size}. Lower it or add samples"
        )


def _looks_like_hub_id(path: str) -> bool:
    return not path.startswith((".", "/", "~")) and path.count("/") == 1


def _load_from_hub(path, tokenizer, config):
    from mlx_lm.tuner.datasets import load_custom_hf_dataset, load_hf_dataset

    # mlx-lm asks the config which sets to load, and has defaults for features that are not named
    names = SimpleNamespace(**{**vars(config), "train": True})
    try:
        if getattr(config, "hf_dataset", None):
            return load_custom_hf_dataset(names, tokenizer)
        return load_hf_dataset(str(path), tokenizer, names)
    except ImportError:
        raise DataError(
            f"{path or 'hf_dataset'} is not a folder here; a hub dataset needs: pip install 'slowft[datasets]'"
        ) from None
    except Exception as e:
        raise DataError(f"{path or 'hf_dataset'} cannot be loaded from the hub: {one_line(e)}") from None


def _read_jsonl(file: Path, tokenizer, config):
    """mlx-lm's dataset of a file's samples, and where each one stands."""
    from mlx_lm.tuner.datasets import create_dataset

    if not file.exists():
        return [], []
    samples, places = [], []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    sample = json.loads(line)
                except json.JSONDecodeError as e:
                    raise DataError(f"{file} line {number} is not JSON: {e.msg} at column {e.colno}") from None
                if not isinstance(sample, dict):
                    raise DataError(f'{file} line {number} is not an object such as {{"text": "..."}}')
                samples.append(sample)
                places.append(f"{file} line {number}")
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8 (byte {e.start}). Save it as UTF-8") from None
    except OSError as e:
        raise DataError(f"{file} cannot be read: {e.strerror}") from None
    if not samples:
        return [], []
    try:
        return create_dataset(samples, tokenizer, config), places
    except ValueError as e:
        if "Prompt masking" in str(e):
            raise DataError(f"{file} holds plain text, which has no prompt to mask. Leave out --mask-prompt") from None
        raise DataError(
            f"{places[0]} has the keys {', '.join(samples[0]) or '(none)'}; mlx-lm knows text, prompt with completion, "
            "or messages"
        ) from None


def _tokenize(data, places, config, embedding_rows, progress: Progress | None, split: str) -> TokenDataset:
    samples, n_cut = [], 0
    numbers: Iterable[int] = range(len(data))
    if progress is not None:
        numbers = progress(numbers, f"Tokenising {split}", len(data))
    for i in numbers:
        tokens, offset = _process(data, i, places[i])
        n_cut += len(tokens) > config.max_seq_length
        if len(tokens) and embedding_rows is not None and max(tokens) >= embedding_rows:
            raise DataError(
                f"{places[i]} gives token id {max(tokens)}, the model's embedding has {embedding_rows} rows: the "
                "tokenizer belongs to another model"
            )
        kept = np.array(tokens[: config.max_seq_length], np.int32)
        if max(1, offset) > len(kept) - 1:
            why = (
                f"its prompt alone has {offset} tokens and --max-seq-length is {config.max_seq_length}"
                if offset and len(tokens) > len(kept)
                else f"it has {len(tokens)} tokens, {offset} of them prompt"
            )
            raise DataError(f"{places[i]} has no token to train on: {why}. Remove it, or raise --max-seq-length")
        samples.append((kept, offset))
    return TokenDataset(samples, list(places[: len(samples)]), n_cut)


def _process(data, i: int, place: str):
    try:
        tokens, offset = data.process(data[i])
    except KeyError as e:
        raise DataError(f"{place} lacks the key {e}, which the first line has") from None
    except IndexError:  # mlx-lm looks at the last token of a text
        raise DataError(f"{place} is empty. Remove it") from None
    except (AttributeError, TypeError):
        raise DataError(
            f"{place} has a value of the wrong kind: a text, prompt or completion is a string, messages are a list of "
            "objects with role and content"
        ) from None
    except Exception as e:  # a chat template may refuse in its own words
        raise DataError(f"{place} cannot be tokenised: {one_line(e)}") from None
    return tokens, offset
