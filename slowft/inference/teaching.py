"""Writes a teacher's cache, as `slowft score --top-k` does.

Comes in: a `TrainConfig` of the options that training has too, an adapter, a directory. Goes out: a cache in the format
of `data/teacher.py`, with all places of the training and validation sets that are trained. The longest samples go
through the model first, as in scoring, and are written in that order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.datasets import load_data, no_training_samples
from ..data.teacher import TeacherWriter, counted, samples_of
from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from ..errors import ConfigError, SlowftError, check_least
from ..models.adapters import digest
from .decoder import opened
from .passes import Row, batches_of, log_probabilities

# Tokens of the samples that are in memory at once: 4 million ids are 16 MB. Parts do not share readings of the weights.
PART_TOKENS = 4 << 20


class TeachingSession:
    """An opened teacher and the cache that it writes.

    Args:
        settings: a `TrainConfig`: `model`, `data`, `memory` and the options of reading and rendering samples.
        adapters: directories by name: none, or that of the teacher's adapter.
        top_k: number of tokens whose log-probabilities are kept at each place.
        output: the cache's directory.
        report: shows notes, and the progress of tokenising.
        emulation: (base that was tuned, or None; its deltas; top-p): the teacher is then the emulated model.

    Attributes:
        is_whole: the cache was complete before.
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
        check_least(1, top_k=top_k)
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
            n_ids = self.model.embedding_rows
            tokenizer = load_tokenizer(self.model.path, n_ids, settings.trust_remote_code, settings.chat_template)
            splits = ("train", "valid")
            train, valid, _ = load_data(settings.data, tokenizer, settings, splits, n_ids, report.progress)
            if not len(train):
                raise no_training_samples(settings.data)
            for name, dataset in (("training", train), ("validation", valid)):
                if dataset.n_cut:
                    report.note(
                        f"Warning: {dataset.n_cut} of {len(dataset)} {name} samples are cut to "
                        f"{settings.max_seq_length} tokens"
                    )
            self._datasets = [dataset for dataset in (train, valid) if len(dataset)]
            self._samples, self._places = samples_of(self._datasets)
            self._writer = TeacherWriter(Path(output).expanduser(), about, self._samples, tokenizer.get_vocab())
            self.model.budget.measure_anew()  # tokenizer and samples are in memory now
        except BaseException:
            self.model.close()
            raise
        self.is_whole = self._writer.is_whole
        self._parts = [] if self.is_whole else list(self._unfinished_parts())
        self._n_read = self.model.stats.total.bytes_read

    @property
    def n_visits(self) -> int:
        """The sum of the numbers that `run` calls `on_visit` with."""
        blocks = self.model.block_passes([True])
        return sum((len(batches_of(self._lengths(*part))) - first) * blocks for *part, first in self._parts)

    def run(self, on_visit: Callable[[int], object] = lambda n: None) -> None:
        """Write what is missing in the cache."""
        if self.is_whole:
            return
        if self._parts:
            begin, end, first = self._parts[0]
            self._writer.go_on_from(begin + sum(map(len, batches_of(self._lengths(begin, end))[:first])))
        for begin, end, first in self._parts:
            rows = [self._row(number) for number in range(begin, end)]
            ends = set(np.cumsum([len(numbers) for numbers in batches_of(self._lengths(begin, end))]).tolist())
            scored = log_probabilities(self.model, rows, [True], self._top_k, (), on_visit, first)
            for number, _, of_row in scored:
                if np.isnan(of_row.top).any():
                    raise SlowftError(
                        f"{self._where(begin + number)} has a log-probability that is no number. Check the weights of "
                        "model and adapter for NaN"
                    )
                self._writer.add(of_row.top_ids, np.concatenate([of_row.top, of_row.others[:, None]], axis=1))
                if number + 1 in ends:
                    self._writer.sync()
        self._writer.finish()

    def work(self) -> dict[str, Any]:
        """What the cache holds, GB read, readings of the whole model that this equals, and peak memory in GB."""
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

    def _unfinished_parts(self) -> Iterator[tuple[int, int, int]]:
        """(first sample, end, number of micro-batches that are written already) of each part that is not finished.

        The newest micro-batch in the cache may not have been synced when a run was stopped. It is written again.
        """
        n = int(np.count_nonzero(self._samples["tokens"]))
        tokens, begin, parts = np.cumsum(self._lengths(0, n)), 0, []
        while begin < n:
            before = int(tokens[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(tokens, before + PART_TOKENS, side="right")))
            ends = begin + np.cumsum([len(numbers) for numbers in batches_of(self._lengths(begin, end))])
            parts.append((begin, end, int(np.count_nonzero(ends <= self._writer.there))))
            begin = end
        newest = max((i for i, (_, _, n_written) in enumerate(parts) if n_written), default=0)
        for begin, end, n_written in parts[newest:]:
            yield begin, end, max(0, n_written - 1)

    def _lengths(self, begin: int, end: int) -> np.ndarray:
        """Tokens of each of these samples."""
        return np.array([self._datasets[d].lengths[i] for d, i in self._places[begin:end]], np.int64)

    def _row(self, number: int) -> Row:
        """A sample in which the tokens count that are trained."""
        d, i = self._places[number]
        tokens, pairs = self._datasets[d].sample(int(i))
        trained = counted(pairs, len(tokens))
        starts = np.flatnonzero(np.diff(trained, prepend=-1) != 1)
        ends = np.append(starts[1:], len(trained)) - 1
        return Row(tokens, list(zip(trained[starts].tolist(), trained[ends].tolist())))

    def _where(self, number: int) -> str:
        d, i = self._places[number]
        return self._datasets[d].where(int(i))
