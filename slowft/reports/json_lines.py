"""A run as JSON lines on standard output, one object per event, for programs to read."""

import json
import math
import sys

from .base import Report
from .plan import as_dict


class JsonReport(Report):
    """Events: machines (if there are several), plan, begin, train, valid, test, saved, note, generated.

    Keys are mlx-lm's. Sizes are in GB (in bytes where a key of the plan ends in nbytes), times in seconds. NaN is null.
    """

    def __init__(self, out=None):
        self._out = out or sys.stdout

    def _write(self, event: str, **fields) -> None:
        fields = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        print(json.dumps({"event": event, **fields}), file=self._out, flush=True)

    def begin(self, config, model):
        self._write("begin", model=str(model.path), blocks=len(model.layers), iters=config.iters)

    def joined(self, machines, rows):
        self._write("machines", machines=machines, rows=rows)

    def planned(self, plan, note="", caching=None):
        self._write("plan", **as_dict(plan, caching))

    def trained(self, info):
        self._write("train", **info)

    def validated(self, info):
        self._write("valid", **info)

    def tested(self, info):
        self._write("test", **info)

    def saved(self, file):
        self._write("saved", file=str(file))

    def note(self, text):
        self._write("note", text=text)

    def generated(self, generation, seconds, file):
        self._write(
            "generated",
            file=str(file),
            answers=generation.prompts,
            tokens=generation.tokens,
            readings=generation.passes,
            tokens_per_reading=generation.tokens_per_reading,
            tokens_per_sec=generation.tokens / max(generation.seconds, 1e-9),
            seconds=seconds,
            drafted=generation.drafted,
            accepted=generation.accepted,
            gain=generation.gain,
        )


class CallbackReport(Report):
    """Hands losses to one of mlx-lm's training callbacks (Weights & Biases, SwanLab)."""

    def __init__(self, callback):
        self._callback = callback

    def trained(self, info):
        self._callback.on_train_loss_report(info)

    def validated(self, info):
        self._callback.on_val_loss_report(info)
