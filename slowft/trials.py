"""The trials of `slowft doctor`, which need MLX. They are small, and each has a result that is known beforehand.

Comes in: the checks' names, a scratch directory. Goes out: `Check`s, as JSON lines of `python -m slowft.trials TRIAL
OPTIONS`, a process for each trial. A trial calls slowft's public API, and compares with mlx-lm alone.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import gc
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from . import platform
from .bench.shapes import write_random
from .doctor import REPORT, SETTINGS, Check, caught
from .errors import ConfigError, SlowftError
from .memory import computes_on_gpu, limits
from .models.imports import import_mlx_lm_without_tokenizers

SLOW_READING_BYTES_PER_S = 300e6
LORA = {"num_layers": -1, "rank": 8, "scale": 10.0}
LOGITS_TOKENS = 16  # tokens whose logits exist at once, in a step that has them cut
ROUNDING = 2**-6  # of a tensor's largest value: four times the spacing of bfloat16

# Configs of models with random weights, in bfloat16 unless quantized.
LARGE = {  # 25 MB a block: the process itself (100 to 200 MB) and two blocks take far less than 16 blocks
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
SMALL = LARGE | {  # 49 MB, so that there are ceilings between two blocks and all of them
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "vocab_size": 1024,
}
CONFIGS = {
    "llama": SMALL,
    # Two experts for each token: a GPU may add their gradients in any order, and the sum of two does not depend on it.
    "qwen3_moe": SMALL
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
    },
    "gemma3 4-bit": SMALL
    | {
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
        "quantization": {"group_size": 64, "bits": 4},
    },
}


# --- Speeds ----------------------------------------------------------------------------------------


def compute(names: Sequence[str], scratch: str) -> Iterator[Check]:
    """Which device MLX computes on, and how fast it multiplies."""
    for name, check in zip(names, (_device, _matrix_products)):
        yield from caught(name, check)


def _device(name: str) -> Check:
    info = mx.device_info()
    device, working_set = str(info.get("device_name", "no name")), info.get("max_recommended_working_set_size")
    figures = {"name": device, "is_cpu": not computes_on_gpu(), "working_set_nbytes": working_set}
    if not computes_on_gpu():
        verdict, todo = ("ok", "") if not platform.MACOS else ("note", "use a Mac, or a virtual machine, with Metal")
        return Check(name, f"CPU, {device}", verdict, todo, figures)
    recommended = f", recommended working set {working_set / 1e9:.1f} GB" if working_set else ""
    return Check(name, f"GPU, {device}{recommended}", figures=figures)


def _matrix_products(name: str) -> Check:
    rates = {"float32": _flops_per_s(mx.float32)}
    if computes_on_gpu():
        rates["bfloat16"] = _flops_per_s(mx.bfloat16)
    words = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    return Check(name, words, figures={f"{dtype}_flops_per_s": rate for dtype, rate in rates.items()})


def _flops_per_s(dtype: mx.Dtype) -> float:
    """The rate of matrix products, of a size that takes at least 0.05 s (512 takes 0.2 s on the reference BLAS)."""
    best = 0.0
    for n in (512, 1024, 2048, 4096):
        a, seconds = mx.ones((n, n), dtype), []
        mx.eval(a)
        for _ in range(3):  # the first product wakes the device
            begin = time.perf_counter()
            mx.eval(a @ a)
            seconds.append(time.perf_counter() - begin)
        best = max(best, 2 * n**3 / min(seconds))
        if min(seconds) > 0.05:
            break
    return best


def read(names: Sequence[str], scratch: str, layers: int) -> Iterator[Check]:
    """Write the model that is trained within a ceiling, and read it as training does."""
    from .planning.machine import READS_IN_FLIGHT, measure_reading

    def check(name: str) -> Check:
        model = write_random(Path(scratch) / "large", LARGE | {"num_hidden_layers": layers})
        rate = measure_reading([str(file) for file in model.glob("*.safetensors")], 0.7)
        if rate is None:
            text = "not measured: what was just written is read from the file cache, at the speed of memory"
            return Check(name, text, "note", "free some memory, or run it again", {"read_bytes_per_s": None})
        figures = {"read_bytes_per_s": rate, "reads_in_flight": READS_IN_FLIGHT}
        slow = rate < SLOW_READING_BYTES_PER_S
        todo = "keep models on a faster drive, or raise --grad-accumulation-steps" if slow else ""
        return Check(name, f"{rate / 1e9:.2f} GB/s", "note" if slow else "ok", todo, figures)

    yield from caught(*names, check)


# --- Memory ----------------------------------------------------------------------------------------


def train_within_ceiling(names: Sequence[str], scratch: str) -> Iterator[Check]:
    """Train a model in less memory than it takes on disk, and ask the operating system what the process used."""
    directory, tokens, steps = Path(scratch) / "large", 64, 4

    def train(model) -> int:
        model.train()
        optimizer, peak = optim.Adam(learning_rate=1e-4), 0
        for _ in range(steps):
            _, gradients = model.loss_and_grads(batch, lengths)
            optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), optimizer.state)
            del gradients
            peak = max(peak, platform.peak_memory(), model.stats.total.peak_memory)  # each step resets the count
        return peak

    def check(name: str) -> Check:
        nbytes = _nbytes(directory)
        memory, before, peak = _within([share * nbytes for share in (0.25, 0.4, 0.6, 0.8)], directory, train)
        figures = {"memory_nbytes": memory, "peak_nbytes": peak, "model_nbytes": nbytes, "before_nbytes": before}
        words = f"{peak / 1e6:.0f} MB at most, {memory / 1e6:.0f} MB were given; the model has {nbytes / 1e6:.0f} MB"
        if peak > memory:
            todo = f"give --memory {math.ceil(100 * (1 - memory / peak))}% less than there is, and {REPORT}"
            return Check(name, f"{(peak - memory) / 1e6:.0f} MB over: {words}", "failed", todo, figures)
        return Check(name, words, figures=figures)

    mx.random.seed(0)
    batch, lengths = mx.random.randint(0, LARGE["vocab_size"], (1, tokens + 1)), mx.array([[0, tokens]])
    mx.eval(batch, lengths)
    _import_mlx_lm()  # before the ceiling is set, so that the memory it takes counts as used
    yield from caught(*names, check)


def _import_mlx_lm() -> None:
    import mlx_lm.tuner.trainer
    import mlx_lm.utils  # noqa: F401


def _within(rooms: Sequence[float | None], directory: Path, use: Callable[[Any], Any]) -> tuple[int | None, int, Any]:
    """(The ceiling, bytes in use before, what `use` returns for the model, opened within the ceiling and with LoRA).

    Args:
        rooms: bytes that a ceiling leaves beside those in use; None for no ceiling. They are tried until one is enough.
    Raises:
        ConfigError: none of them is enough.
    """
    gc.collect()  # garbage must not count as in use, or the ceiling would leave more than `room`
    limits().give_back()
    platform.release_freed_memory()
    before = platform.memory_in_use()
    for room in rooms:
        memory = None if room is None else int(before + room)
        platform.reset_peak_memory()
        try:
            model = slowft.open_model(directory, memory=memory, spill_dir=directory)
            try:
                return memory, before, use(model.add_lora(**LORA))
            finally:
                model.close()
        except ConfigError as e:
            refusal = e
    raise refusal


def _nbytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


# --- Gradients -------------------------------------------------------------------------------------


def compare_gradients(names: Sequence[str], scratch: str, model: str) -> Iterator[Check]:
    """Loss and gradients of a small model, streamed at each setting of memory, against mlx-lm's in memory."""
    import_mlx_lm_without_tokenizers()  # the trial above imports all
    directory = write_random(Path(scratch) / "small", CONFIGS[model])
    mx.random.seed(3)
    batch = mx.random.randint(0, SMALL["vocab_size"], (2, 33))
    lengths = mx.array([[1, 32], [4, 25]])  # a prompt, and padding
    expected, again = _of_mlx_lm(directory, batch, lengths)
    own, tensor = _largest_difference(expected, again)
    if not math.isfinite(own):
        raise SlowftError(f"mlx-lm's own {tensor} is NaN or infinite when computed once more")

    nbytes = 2 * _nbytes(directory)  # about its size in float32
    # bytes beside those in use, for `_within`
    rooms: dict[str, list[float | None]] = dict(zip(SETTINGS, ([None], [nbytes, 2 * nbytes], [4 * nbytes + 5e8])))

    def use(opened) -> dict[str, Any]:
        if opened.memory is not None:
            schedule = opened.plan(*batch[:, 1:].shape).schedule
            if schedule.rows or schedule.mlp_tokens:
                raise ConfigError("sums over tokens would be computed in parts, and rounded in another way")
        _randomise(opened)
        opened.train()
        differences = []
        for _ in range(4):  # the first steps are measured, and the plan of the later ones follows from that
            (loss, _), gradients = opened.loss_and_grads(batch, lengths)
            differences.append(_largest_difference(expected, (loss, gradients)))
        figures = {}
        if opened.memory is None:  # then nothing has cut the logits yet
            opened.head_chunk_tokens = LOGITS_TOKENS
            (loss, _), gradients = opened.loss_and_grads(batch, lengths)
            of_cut_logits = _largest_difference(expected, (loss, gradients))
            if of_cut_logits[0] > ROUNDING:  # products of fewer rows are rounded in another way
                differences.append(of_cut_logits)
            figures["difference_of_cut_logits"] = of_cut_logits[0] if math.isfinite(of_cut_logits[0]) else None
        difference, tensor = max(differences)
        read_nbytes, peak = opened.stats.last.bytes_read, opened.stats.total.peak_memory
        return figures | {
            "difference": difference,
            "tensor": tensor,
            "read_nbytes": read_nbytes,
            "peak_nbytes": peak,
        }

    def check(name: str, setting: str) -> Check:
        memory, before, figures = _within(rooms[setting], directory, use)
        if memory is None:
            needed = figures["peak_nbytes"] - before
            rooms["small ceiling"] = [share * needed for share in (0.75, 1, 1.25, 1.5, 1.75, 2.5, 4)]
        return _compared(name, figures | {"memory_nbytes": memory, "before_nbytes": before, "of_mlx_lm_to_itself": own})

    for name, setting in zip(names, SETTINGS):
        yield from caught(name, lambda name, setting=setting: check(name, setting))
    shutil.rmtree(directory)


def _compared(name: str, figures: dict[str, Any]) -> Check:
    """The verdict: identical is expected. Up to twice the difference between mlx-lm's own two runs is no fault.

    On a GPU, a difference that rounding in 16 bits may make harms no training either, and is only noted.
    """
    difference, own = figures["difference"], figures["of_mlx_lm_to_itself"]
    if difference == 0:
        return Check(name, "identical to mlx-lm in memory", figures=figures)
    if math.isfinite(difference):
        words = f"largest relative difference to mlx-lm in memory: {difference:.1e}, in {figures['tensor']}"
    else:
        words = f"NaN or infinite where mlx-lm in memory is not, in {figures['tensor']}"
        figures = figures | {"difference": None}  # JSON has no infinity
    if difference <= 2 * own:
        words += f"; mlx-lm itself differs by {own:.1e} from one run to the next"
        return Check(name, words, "note", "nothing: results of this device vary", figures)
    if computes_on_gpu() and difference <= ROUNDING:
        words += ", as rounding makes"
        return Check(name, words, "note", f"train, and {REPORT}: the bits should be the same", figures)
    return Check(name, words, "failed", f"do not train with these versions on this machine, and {REPORT}", figures)


def _of_mlx_lm(directory: Path, batch: mx.array, lengths: mx.array) -> list[tuple[mx.array, dict]]:
    """(Loss, gradients) of the whole model in memory, twice, in the dtype in which slowft computes on this device."""
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(directory)
    if not computes_on_gpu():
        model.update(tree_map(_to_float32, model.parameters()))
        model = dequantize_model(model)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": LORA["rank"], "scale": LORA["scale"], "dropout": 0.0})
    _randomise(model)
    model.train()
    results = []
    for _ in range(2):
        (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, batch, lengths)
        mx.eval(loss, gradients)
        results.append((loss, gradients))
    return results


def _to_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _randomise(model: nn.Module) -> None:
    """Give the model always the same random adapter. A fresh one has zeros, so half of its gradients are zero."""
    mx.random.seed(2)
    shapes = sorted((name, array.shape) for name, array in tree_flatten(model.trainable_parameters()))
    model.update(tree_unflatten([(name, 0.05 * mx.random.normal(shape)) for name, shape in shapes]))
    mx.eval(model.trainable_parameters())


def _largest_difference(expected: tuple[mx.array, dict], actual: tuple[mx.array, dict]) -> tuple[float, str]:
    """(The largest difference relative to the largest value of its tensor, that tensor's name).

    The loss counts as a tensor. The difference is infinite if a value is NaN.

    Raises:
        SlowftError: names or shapes of tensors differ, or a tensor has no value to compare with.
    """
    a, b = (dict(tree_flatten({"loss": loss, "gradients": gradients})) for loss, gradients in (expected, actual))
    if {name: array.shape for name, array in a.items()} != {name: array.shape for name, array in b.items()}:
        raise SlowftError(f"gradients of {len(b) - 1} tensors, of mlx-lm {len(a) - 1}, or of other names or shapes")
    differences = []
    for name, array in a.items():
        largest = mx.abs(array).max().item()
        if not 0 < largest < math.inf:
            raise SlowftError(f"there is nothing to compare with: the largest of mlx-lm's {name} is {largest}")
        difference = mx.abs(array - b[name]).max().item() / largest
        differences.append((math.inf if math.isnan(difference) else difference, name))
    return max(differences)


TRIALS: dict[str, Callable[..., Iterator[Check]]] = {
    "compute": compute,
    "read": read,
    "train_within_ceiling": train_within_ceiling,
    "compare_gradients": compare_gradients,
}


def main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print, and standard output has results only
    sys.modules["torch"] = None  # keeps transformers from importing PyTorch, which is not needed
    trial, options = sys.argv[1:]
    for check in TRIALS[trial](**json.loads(options)):
        print(json.dumps(asdict(check)), file=lines, flush=True)


if __name__ == "__main__":
    main()
