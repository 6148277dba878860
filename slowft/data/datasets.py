"""Finds, reads, renders and tokenises the data of a run, and names every bad sample before any work is lost.

Comes in: what `--data` says, a tokenizer, the options. Goes out: a `TokenDataset` for each split that is asked for.
Files that were tokenised before in the same way are not tokenised again: their tokens are on disk.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import platform
from ..errors import ConfigError, DataError, SlowftWarning, printable, reason_of
from . import store
from .files import SPLITS, Found, Source, find
from .rendering import Renderer
from .samples import BadSample, form_of, understand
from .store import TokenDataset, TokenWriter, digest_of

FORMAT = 1  # version of the stored records, and of how samples become tokens. Sets of another version are not used
SHOWN = 20  # bad samples that a report names one by one
STORED_NBYTES = 1 << 20  # files smaller than this are tokenised as fast as their stored tokens are found

Progress = Callable[[Iterable, str, int], Iterable]  # (items, description, number of items) -> the same items


def load_data(
    path: str | Path | None,
    tokenizer,
    config: Any,
    splits: Iterable[str] = SPLITS,
    embedding_rows: int | None = None,
    progress: Progress | None = None,
) -> tuple[TokenDataset, TokenDataset, TokenDataset]:
    """(train, valid, test) of a data folder, a file, or a hub dataset (needs `pip install 'slowft[datasets]'`).

    Args:
        config: a `TrainConfig`: `max_seq_length`, `mask_prompt`, `train_on`, `valid_split`, `skip_bad_samples` and the
            names of the features are used.
        splits: the splits to load. The others are returned empty, and are not checked.
        embedding_rows: token ids must be below this.
    Raises:
        DataError: there is no such data, or samples cannot be trained on; names file, line and reason of each.
        ConfigError: `valid_split` is set, and there is a validation set.
    """
    sources, notes = find(path, config)
    asked_for = set(splits)
    share = getattr(config, "valid_split", None)
    if share is not None and sources["valid"]:
        raise ConfigError("--valid-split has no effect: there is a validation set already. Leave the option out")
    loading = _Loading(tokenizer, config, embedding_rows, progress)
    result = {split: TokenDataset() for split in SPLITS}
    for split in SPLITS:
        if split not in asked_for or not sources[split]:
            continue
        if split == "train" and share is not None:
            result["train"], result["valid"] = loading.load(sources[split], ("train", "valid"), share)
        else:
            (result[split],) = loading.load(sources[split], (split,))
    loading.raise_for_bad_samples()
    for note in dict.fromkeys([*notes, *(note for data in result.values() for note in data.summary.notes)]):
        warnings.warn(note, SlowftWarning, stacklevel=2)
    return result["train"], result["valid"], result["test"]


def no_training_samples(data: Any) -> DataError:
    """The error of data, a file or a folder, without any."""
    is_file = isinstance(data, str) and Path(data).expanduser().is_file()
    return DataError(f"{data} has no training samples. Put them into {'it, one a line' if is_file else 'train.jsonl'}")


def check_size(dataset: TokenDataset, batch_size: int, name: str) -> None:
    """Raises DataError if a set has samples, but fewer than one batch takes."""
    if 0 < len(dataset) < batch_size:
        raise DataError(
            f"the {name} set has {len(dataset)} samples, --batch-size is {batch_size}. Lower it or add samples"
        )


class _Loading:
    """Loads one split after the other, and collects what is wrong with all of them."""

    def __init__(self, tokenizer, config: Any, embedding_rows: int | None, progress: Progress | None):
        self._tokenizer, self._config, self._rows, self._progress = tokenizer, config, embedding_rows, progress
        self._skips = bool(getattr(config, "skip_bad_samples", False))
        self._bad: list[str] = []  # the first `SHOWN` bad samples
        self._n_bad = 0

    def load(self, source: Source, names: tuple[str, ...], share: float = 0.0) -> list[TokenDataset]:
        """The source as a dataset. With two names, about `share` of the samples go to the second one."""
        directory, key = platform.cache_directory() / "tokens", None
        if source.files and source.nbytes > STORED_NBYTES:
            key = self._key(source, share)
            stored = [store.load(directory, f"{key}-{name}") for name in names]
            if all(dataset is not None for dataset in stored):
                return stored
        writers = [TokenWriter(directory) for _ in names]
        n_bad = self._n_bad
        try:
            self._fill(source, names[0], writers, share)
            if self._n_bad > n_bad and not self._skips:
                return [TokenDataset() for _ in names]
            key = key or self._key(source, share) if any(writer.is_on_disk for writer in writers) else ""
            return [writer.finish(f"{key}-{name}") for name, writer in zip(names, writers)]
        finally:
            for writer in writers:
                writer.abandon()

    def raise_for_bad_samples(self) -> None:
        """Raises DataError if there are bad samples and they are not to be left out; names them."""
        if not self._n_bad or self._skips:
            return
        if self._n_bad == 1:
            raise DataError(self._bad[0])
        more = f"\n  and {self._n_bad - len(self._bad)} more" if self._n_bad > len(self._bad) else ""
        listed = "".join(f"\n  {bad}" for bad in self._bad)
        raise DataError(
            f"{self._n_bad} samples cannot be trained on. Correct or remove them, or leave them out with "
            f"--skip-bad-samples:{listed}{more}"
        )

    def _fill(self, source: Source, name: str, writers: list[TokenWriter], share: float) -> None:
        c = self._config
        notes: list[str] = []
        train_on = getattr(c, "train_on", None)
        renderer = Renderer(self._tokenizer, c.max_seq_length, bool(c.mask_prompt), train_on, notes.append)
        samples, n_bad, first = _of_one_form(source.read()), self._n_bad, ""
        if self._progress is not None:
            samples = self._progress(samples, f"Tokenising {name}", source.n_samples)
        for sample in samples:
            try:
                self._add(sample, renderer, writers, share)
            except (BadSample, RecursionError) as e:
                why = "is nested too deeply" if isinstance(e, RecursionError) else printable(str(e))
                self._n_bad += 1
                first = first or f"{sample.place} {why}"
                if len(self._bad) < SHOWN:
                    self._bad.append(f"{sample.place} {why}")
            except DataError as e:
                raise DataError(f"{sample.place}: {e}") from None
        if share:
            _check_both_have_samples(writers)
        n_skipped = self._n_bad - n_bad
        if n_skipped and self._skips:
            notes.append(f"{n_skipped} bad samples are left out, such as: {first}")
        for writer in writers:
            writer.summary.notes, writer.summary.n_skipped = notes, n_skipped

    def _add(self, sample: Found, renderer: Renderer, writers: list[TokenWriter], share: float) -> None:
        if sample.reason:
            raise BadSample(sample.reason)
        side = 0
        for i, rendered in enumerate(renderer.render(understand(sample.sample, sample.features, sample.is_document))):
            if self._rows is not None and (largest := max(rendered.tokens)) >= self._rows:
                raise BadSample(
                    f"gives token id {largest}, the model's embedding has {self._rows} rows: the tokenizer belongs to "
                    "another model"
                )
            if share and not i:  # all pieces of a document go to the same side
                side = _is_held_back(rendered.tokens, share)
            writers[side].add(rendered.tokens, rendered.pairs, sample.file, sample.unit, sample.number)
            writers[side].summary.n_cut += rendered.is_cut

    def _key(self, source: Source, share: float) -> str:
        """A hash of all that decides the tokens: the files' contents, the tokenizer, the options."""
        c = self._config
        options = [FORMAT, c.max_seq_length, bool(c.mask_prompt), getattr(c, "train_on", None), share, self._skips]
        options += [vars(source.features), self._rows, [str(file) for file in source.files]]
        key = hashlib.sha256(json.dumps(options, default=str).encode())
        key.update(_fingerprint(self._tokenizer))
        for file in source.files:
            try:
                with open(file, "rb") as data:
                    key.update(hashlib.file_digest(data, "sha256").digest())
            except OSError as e:
                raise DataError(f"{file} cannot be read: {reason_of(e)}") from None
        return key.hexdigest()[:32]


def _fingerprint(tokenizer) -> bytes:
    """A hash of the tokenizer and its chat template."""
    parts = [type(tokenizer._tokenizer).__name__, str(getattr(tokenizer, "chat_template", None))]
    parts.append(f"{sorted(tokenizer.eos_token_ids)} {tokenizer.bos_token_id} {tokenizer.eos_token_id}")
    backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
    parts.append(backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _of_one_form(samples: Iterable[Found]) -> Iterator[Found]:
    """Mark samples that lack a key of their file's first sample as bad: mlx-lm reads a file by its first line."""
    forms: dict[str, tuple[str, ...]] = {}
    for found in samples:
        if not found.reason:
            try:
                form = forms.get(found.file)
                lacks = [key for key in form or () if key not in found.sample]
                if lacks:
                    found.reason = f"lacks the key '{lacks[0]}', which the first sample has"
                elif form is None:
                    forms[found.file] = form_of(found.sample, found.features)
            except BadSample as e:
                found.reason = str(e)
        yield found


def _is_held_back(tokens: list[int], share: float) -> int:
    """1 for about this share of all samples, by their hash, so that the same sample always gets the same result."""
    number = int.from_bytes(digest_of(np.asarray(tokens, np.int32)), "little")
    return int(number < share * 2**64)


def _check_both_have_samples(writers: list[TokenWriter]) -> None:
    train, valid = writers
    if not valid.lengths or not train.lengths:
        lacks = "validation" if not valid.lengths else "training"
        raise DataError(
            f"--valid-split leaves no {lacks} samples of {len(train.lengths) + len(valid.lengths)}. Choose another "
            "share, or write a valid.jsonl"
        )
