"""What a benchmark measures: a model and the shape of a step, as the workers and the results get it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """A number of optimizer steps over random tokens.

    Attributes:
        model: the model's directory. name: the model's name in results.
        batch_size, tokens: a micro-batch's `[B, T]`. micro_batches: how many of them a step has.
        num_layers: blocks with LoRA, counted from the last; -1: all.
        keys: linear layers with LoRA; None: all.
        steps: steps that are measured, after those that warm up.
        memory: slowft's ceiling in bytes; None: half of the machine's memory.
    """

    model: str
    name: str
    batch_size: int = 4
    tokens: int = 128
    micro_batches: int = 1
    num_layers: int = -1
    rank: int = 8
    keys: tuple[str, ...] | None = None
    steps: int = 3
    memory: int | None = None

    @property
    def tokens_of_step(self) -> int:
        return self.batch_size * self.tokens * self.micro_batches

    def with_(self, **changes: Any) -> "Workload":
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The fields that results have: all but the path."""
        return {key: value for key, value in asdict(self).items() if key != "model"}

    def batches(self) -> list[np.ndarray]:
        """Random tokens, int32 `[B, T + 1]`, of each micro-batch. All trainers get the same."""
        config = json.loads((Path(self.model) / "config.json").read_text())
        vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
        random = np.random.default_rng(0)
        shape = self.batch_size, self.tokens + 1
        return [random.integers(0, vocab, shape, np.int32) for _ in range(self.micro_batches)]

    @property
    def files(self) -> list[Path]:
        """The model's weight files."""
        return sorted(Path(self.model).glob("model*.safetensors"))


def from_dict(values: dict[str, Any]) -> Workload:
    keys = values.get("keys")
    return Workload(**(values | {"keys": None if keys is None else tuple(keys)}))
