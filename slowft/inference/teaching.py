"""A teacher's cache: what `slowft score --top-k` does behind its options.

Comes in: a `TrainConfig` of the options that training has too, an adapter, a directory. Goes out: the directory, as
`data/teacher.py` has it, of all that is trained of the training set and the validation set. Samples go through the
model the longest first, as in scoring, and are written as they come.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.datasets import load_data
from ..data.teacher import TeacherWriter, counted, samples_of
from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from ..errors import ConfigError, DataError, SlowftError
from ..models.adapters import digest
from .decoder import opened
from .passes import Row, batches_of, log_probabilities

# Of samples that are in memory at once: 4 million token ids are 16 MB. Each such part ends a reading of the weights.
PART_TOKENS = 4 << 20


class TeachingSession:
    """One cache to be written.

    Args:
        settings: a `TrainConfig`: `model`, `data`, `memory` and what samples are read and rendered by.
        adapters: directories by name, one at most: of the adapter that the teacher has.
        top_k: of how many tokens log-probabilities are kept.
        output: the cache's directory.
        report: is told notes, and of tokenising.
        emulation: (base that was tuned, or None; its deltas; top-p): the teacher is then the sum.

    Attributes:
        is_whole: the cache is there already.
    """

    def __init__(
        self,
        settings: Any,
        adapters: Mapping[str, str],
        top_k: int,
        output: str | Path,
        report: Any,
        emulation: tuple[str | None, Sequence[str], float | None] = (None, (), None),
    ):
        if len(adapters) > 1:
            raise ConfigError(f"a teacher has one adapter at most, got {len(adapters)}. Write a cache for each")
        if top_k < 1:
            raise ConfigError(f"--top-k must be 1 or more, got {top_k}")
        self._top_k = top_k
        adapter = next(iter(adapters.values()), None)
        self.model = opened(
            settings.model,
            *emulation,
            default_memory() if settings.memory is None else settings.memory,
            adapter,
            compute_dtype=settings.compute_dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        try:
            about: dict[str, Any] = {"top_k": top_k, "teacher": self.model.fingerprint()}
            about["adapter"] = None if adapter is None else digest(Path(adapter).expanduser())
            about["emulated"] = getattr(self.model, "about", None)
            if self.model.n_logits < top_k:
                raise ConfigError(f"--top-k is {top_k}, the model has {self.model.n_logits} tokens. Choose fewer")
            code = settings.trust_remote_code, settings.chat_template
            tokenizer = load_tokenizer(self.model.path, self.model.embedding_rows, *code)
            what = tokenizer, settings, ("train", "valid"), self.model.embedding_rows, report.progress
            train, valid, _ = load_data(settings.data, *what)
            if not len(train):
                raise DataError(f"{settings.data} has no training samples. Put them into train.jsonl")
            for name, dataset in (("training", train), ("validation", valid)):
                if dataset.n_cut:
                    report.note(
                        f"Warning: {dataset.n_cut} of {len(dataset)} {name} samples are cut to "
                        f"{settings.max_seq_length} tokens"
                    )
            self._datasets = [dataset for dataset in (train, valid) if len(dataset)]
            self._samples, self._places = samples_of(self._datasets)
            self._writer = TeacherWriter(Path(output).expanduser(), about, self._samples, tokenizer.get_vocab())
            self.model.budget.measure_anew()  # with tokenizer and samples in memory
        except BaseException:
            self.model.close()
            raise
        self.is_whole = self._writer.is_whole
        self._parts = [] if self.is_whole else list(self._left())
        self._n_read = self.model.stats.total.bytes_read

    @property
    def n_visits(self) -> int:
        """The sum of what `run` calls `on_visit` with."""
        blocks = self.model.block_passes([True])
        return sum((len(batches_of(self._lengths(*part))) - first) * blocks for *part, first in self._parts)

    def run(self, on_visit: Callable[[int], object] = lambda n: None) -> None:
        """Write what is not there yet."""
        if self.is_whole:
            return
        if self._parts:
            begin, end, first = self._parts[0]
            self._writer.go_on_from(begin + sum(map(len, batches_of(self._lengths(begin, end))[:first])))
        for begin, end, first in self._parts:
            rows = [self._row(number) for number in range(begin, end)]
            ends = set(np.cumsum([len(numbers) for numbers in batches_of(self._lengths(begin, end))]).tolist())
            what = self.model, rows, [True], self._top_k, (), on_visit, first
            for number, _, found in log_probabilities(*what):
                if np.isnan(found.top).any():
                    raise SlowftError(
                        f"{self._where(begin + number)} has a log-probability that is no number. Check the weights of "
                        "model and adapter for NaN"
                    )
                self._writer.add(found.top_ids, np.concatenate([found.top, found.others[:, None]], axis=1))
                if number + 1 in ends:
                    self._writer.sync()
        self._writer.finish()

    def work(self) -> dict[str, Any]:
        """What there is, and what it took: samples, bytes read, how many times the model's size that is."""
        total = self.model.stats.total
        n_read = total.bytes_read - self._n_read
        return {
            "samples": len(self._samples),
            "tokens": int(self._samples["tokens"].sum()),
            "top_k": self._top_k,
            "was_done": self.is_whole,
            "read_gb": n_read / 1e9,
            "readings": n_read / self.model.nbytes_on_disk,
            "peak_memory": total.peak_memory / 1e9,
        }

    def close(self) -> None:
        self._writer.close()
        self.model.close()

    def _left(self) -> Iterator[tuple[int, int, int]]:
        """(first sample of a part, end of it, micro-batches of it to leave out) of parts in which something is to do.

        The last micro-batch that is there was perhaps not synced when a run was stopped: it is written again.
        """
        n = int(np.count_nonzero(self._samples["tokens"]))
        tokens, begin, parts = np.cumsum(self._lengths(0, n)), 0, []
        while begin < n:
            before = int(tokens[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(tokens, before + PART_TOKENS, side="right")))
            ends = begin + np.cumsum([len(numbers) for numbers in batches_of(self._lengths(begin, end))])
            parts.append((begin, end, int(np.count_nonzero(ends <= self._writer.there))))
            begin = end
        newest = max((i for i, (_, _, there) in enumerate(parts) if there), default=0)
        for begin, end, there in parts[newest:]:
            yield begin, end, max(0, there - 1)

    def _lengths(self, begin: int, end: int) -> np.ndarray:
        return np.array([self._datasets[d].lengths[i] for d, i in self._places[begin:end]], np.int64)

    def _row(self, number: int) -> Row:
        d, i = self._places[number]
        tokens, pairs = self._datasets[d].sample(int(i))
        trained = counted(pairs, len(tokens))
        starts = np.flatnonzero(np.diff(trained, prepend=-1) != 1)
        ends = np.append(starts[1:], len(trained)) - 1
        return Row(tokens, list(zip(trained[starts].tolist(), trained[ends].tolist())))

    def _where(self, number: int) -> str:
        d, i = self._places[number]
        return self._datasets[d].where(int(i))
