"""One model type of mlx-lm streamed against the same in memory, and the table of all of them.

    python tests/matrix.py

writes docs/architectures.md.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import pkgutil
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
from mlx_lm import __version__ as mlx_lm_version

from architectures import HELPERS, LORA, MODEL_TYPES, REFUSED, ROUNDED
from conftest import in_memory, largest, largest_difference, random_batch, randomise, reference, save_random
from slowft.models.seams import CutModel
from slowft.planning.schedule import Schedule

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"


def modules() -> list[str]:
    """Every module of the installed mlx_lm.models."""
    return sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))


def config_of(name: str) -> dict:
    return {"model_type": name, "vocab_size": 96} | MODEL_TYPES[name]


def lora_of(name: str) -> dict:
    return {"num_layers": -1, "rank": 2, "scale": 2.0} | LORA.get(name, ({},))[0]


def save(directory: Path, name: str) -> Path:
    """A random model of this type. What mlx-lm initialises as zeros or ones is random too, so that it counts."""
    save_random(directory, config_of(name))
    file = str(directory / "model.safetensors")
    weights = mx.load(file)
    mx.random.seed(5)
    for key, array in weights.items():
        if mx.issubdtype(array.dtype, mx.floating) and array.size > 1 and not key.endswith("signs"):
            if mx.all(array == array.reshape(-1)[0]).item():
                weights[key] = array + 0.1 * mx.random.normal(array.shape, array.dtype)
    mx.eval(weights)
    mx.save_safetensors(file, weights, {"format": "mlx"})
    return directory


@contextmanager
def stand_in_for_hf_olmo() -> Iterator[None]:
    """While this is entered, mlx-lm's olmo, which only looks whether hf_olmo is there, can be imported."""
    sys.modules["hf_olmo"] = types.ModuleType("hf_olmo")
    try:
        yield
    finally:
        del sys.modules["hf_olmo"]
        sys.modules.pop("mlx_lm.models.olmo", None)


def batch_of():
    return random_batch(96, rows=2, tokens=12)


def expected(directory: Path, name: str):
    """(loss, gradients, adapters) by mlx-lm in memory."""
    whole = in_memory(directory, **lora_of(name)).train()
    randomise(whole)
    loss, gradients = reference(whole, *batch_of())
    assert largest(gradients) > 1e-4 and loss.item() == loss.item()  # something to compare
    return loss, gradients, whole.trainable_parameters()


def opened(directory: Path, name: str, adapters: dict, **options):
    streamed = slowft.open_model(directory, compute_dtype="float32", **options).add_lora(**lora_of(name))
    streamed.update(adapters)
    return streamed.train()


def assert_equal(name: str, streamed, loss, gradients) -> None:
    (streamed_loss, _), streamed_gradients = streamed.loss_and_grads(*batch_of())
    assert_same(name, (loss, gradients), (streamed_loss, streamed_gradients))


def assert_same(name: str, expected, found) -> None:
    assert found[0].item() == expected[0].item()
    tolerance = ROUNDED[name][0] * largest(expected[1]) if name in ROUNDED else 0.0
    assert largest_difference(expected[1], found[1]) <= tolerance


def every_product(streamed) -> tuple[tuple[str, ...], ...]:
    kinds = ("Linear", "QuantizedLinear", "SwitchLinear", "QuantizedSwitchLinear")
    names = [
        [n.removesuffix(".linear") for n, m in b.module.named_modules() if n and type(m).__name__ in kinds]
        for b in streamed.engine.cut.blocks
    ]
    return tuple(tuple(names[index]) for index in streamed.engine.cut.order)


def verify(directory: Path, name: str) -> str:
    """Loss and gradients are those in memory, by every way to stream. Returns the type's row of the table."""
    loss, gradients, adapters = expected(save(directory / "model", name), name)
    streamed = opened(directory / "model", name, adapters)
    assert_equal(name, streamed, loss, gradients)
    if streamed.engine.cut.is_chain:
        for schedule in (Schedule(spilled=2, kept=every_product(streamed)), Schedule(in_memory=True)):
            streamed.engine.follow(schedule, directory)
            assert_equal(name, streamed, loss, gradients)
        streamed.engine.follow(Schedule())
        traced_loss, traced_gradients = reference(streamed, *batch_of())
        assert_same(name, (loss, gradients), (traced_loss, traced_gradients))
    row = row_of(name, streamed.engine.cut)
    streamed.close()
    return row


# --- The table --------------------------------------------------------------------------------------


def row_of(name: str, cut: CutModel) -> str:
    kinds = dict.fromkeys(type(unit.module).__name__ for unit in cut.blocks)
    verified = "identical"
    notes = [LORA[name][1]] if name in LORA else []
    if name in ROUNDED:
        verified = "equal up to rounding"
        notes.append(ROUNDED[name][1])
    if len(cut.order) > len(cut.blocks):
        notes.append("blocks are visited more than once")
    if cut.state_objects:
        notes.append(f"values carried by {', '.join(sorted(cls.__name__ for cls in cut.state_objects))}")
    elif not cut.plain_blocks and not any(unit.module.__class__.__name__ == "Linear" for unit in cut.blocks):
        notes.append("blocks hand on more than a hidden state")
    elif cut.plain_blocks and not cut.is_chain and len(cut.order) == len(cut.blocks):
        notes.append("blocks are handed more than the output of the one before")
    ways = "loops and autodiff" if cut.is_chain else "autodiff"
    return _row(name, ", ".join(kinds), verified, ways, notes)


def refused_row(name: str) -> str:
    return _row(name, "", "refused", "", [REFUSED[name][0]])


def _row(name: str, kinds: str, verified: str, ways: str, notes: list[str]) -> str:
    return f"| {name} | {kinds} | {verified} | {ways} | {'; '.join(notes)} |"


def start() -> str:
    return f"""# Every architecture in mlx-lm {mlx_lm_version}

Written by `python tests/matrix.py`; `tests/test_architectures*.py` verify every line. For each model type a tiny random
model is trained for a step, streamed and in memory by mlx-lm alone: "identical" means that loss and all LoRA gradients
are the same to the last bit. Where blocks form a chain, a step is streamed by two loops over them (with nothing kept;
with outputs of layers kept and inputs spilled; with everything in memory) and by MLX's autodiff of the model's own
call; the others by the latter alone. Everything ran on Linux, CPU backend, float32.

Other names mlx-lm knows for these types, such as mistral for llama, are its `MODEL_REMAPPING`. Modules that are no
models: {", ".join(f"{name} ({what})" for name, what in HELPERS.items())}.

| model type | blocks | verified | streamed by | notes |
|---|---|---|---|---|
"""


def write() -> None:
    rows = []
    for name in sorted({*MODEL_TYPES, *REFUSED}, key=str.lower):
        if name in REFUSED:
            rows.append(refused_row(name))
            continue
        with tempfile.TemporaryDirectory() as directory:
            rows.append(verify(Path(directory), name))
    TABLE.write_text(start() + "\n".join(rows) + "\n")


if __name__ == "__main__":
    write()
