"""What `slowft.planning.graph` predicts, against what the operating system measured while MLX ran the same."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes

from architectures import ARCHITECTURES
from conftest import must_run
from slowft import platform
from slowft.engine.budget import UNKNOWN
from slowft.engine.cores import Cores
from slowft.models.weights import placeholder
from slowft.planning.graph import CostUnknown, cost

ROWS, TOKENS = 2, 256
# hidden activations [ROWS, TOKENS, 512] in float32 are 1 MB
DENSE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 128,
}
SIZES = {
    "llama untied": DENSE,
    "qwen3 (query and key norms)": DENSE | {"head_dim": 64},
    "gemma2 (embedding scale, soft caps)": DENSE | {"head_dim": 64},
    "gpt2 (learned positions, layer norms, tied)": {
        "n_ctx": TOKENS,
        "n_positions": TOKENS,
        "n_embd": 512,
        "n_head": 8,
        "n_layer": 1,
        "num_hidden_layers": 1,
    },
    "phi3 (fused projections)": DENSE,
    "mixtral (experts)": DENSE | {"intermediate_size": 768},
    "gpt_oss (attention sinks, experts, sliding window)": DENSE
    | {
        "intermediate_size": 768,
        "head_dim": 64,
        "sliding_window": 128,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mamba2 (state space)": {
        "num_heads": 16,
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "state_size": 64,
        "num_hidden_layers": 1,
    },
}


class Kept:
    """A layer whose output is at hand: an `mx.custom_function`, which MLX does not export."""

    def __init__(self, layer: nn.Module, product: mx.array):
        mx.eval(product)
        self.function = mx.custom_function(lambda x: product)
        self.function.vjp(lambda x, cotangent, _: mx.vjp(layer, [x], [cotangent])[1][0])

    def __call__(self, x: mx.array) -> mx.array:
        return self.function(x)


WAYS = ("forward", "backward")
KEPT = "llama with a product kept from the forward pass"
SHARED = "llama with its work shared out among streams"


class Job:
    """A block or two of an architecture, its LoRA adapters trainable, forward or backward."""

    def __init__(self, name: str):
        config = ARCHITECTURES["llama untied" if name in (KEPT, SHARED) else name] | SIZES.get(name, DENSE)
        mx.random.seed(0)
        model_class, args_class = _get_classes(config)
        self.model = model_class(args_class.from_dict(config))
        self.model.freeze()
        linear_to_lora_layers(self.model, 2, {"rank": 8, "scale": 2.0, "dropout": 0.0})
        self.names = [name for name, _ in tree_flatten(self.model.trainable_parameters())]
        self.params = [array for _, array in tree_flatten(self.model.trainable_parameters())]
        self.tokens = mx.random.randint(0, config["vocab_size"], (ROWS, TOKENS))
        self.cotangent = mx.random.normal((ROWS, TOKENS, config["vocab_size"]))
        mx.eval(self.model.parameters(), self.tokens, self.cotangent)
        if name == KEPT:
            lora = self.model.model.layers[0].mlp.up_proj
            lora.linear = Kept(lora.linear, mx.zeros((ROWS, TOKENS, config["intermediate_size"])))
        device = mx.default_device()
        streams = [mx.default_stream(device), mx.new_stream(device)]
        self.cores = Cores(streams if name == SHARED else streams[:1])

    def call(self, *params: mx.array) -> mx.array:
        self.model.update(tree_unflatten(list(zip(self.names, params))))
        try:
            with self.cores.shared():
                return self.model(self.tokens)
        finally:  # no tracer stays in the model
            self.model.update(tree_unflatten(list(zip(self.names, self.params))))

    def backward(self, cotangent: mx.array, *params: mx.array) -> list[mx.array]:
        return mx.vjp(self.call, params, [cotangent])[1]

    def ways(self) -> dict[str, tuple[Callable, tuple[mx.array, ...]]]:
        return dict(zip(WAYS, [(self.call, tuple(self.params)), (self.backward, (self.cotangent, *self.params))]))


def resident_rise(function: Callable, args: tuple, runs: int = 5) -> int:
    """Bytes by which resident memory rises above where it was while MLX evaluates; the second least of a few runs.

    With work shared out among streams most runs take more, by the order in which these get to it; and one run in a busy
    suite took 9% less.

    Not `mx.get_peak_memory`: MLX schedules ahead of the computation, so it counts buffers that nobody has touched yet.
    """
    rises = []
    for _ in range(runs):
        platform.reset_peak_memory()
        before = platform.memory_in_use()
        outputs = function(*args)
        mx.eval(outputs)
        mx.synchronize()
        rises.append(platform.peak_memory() - before)
        del outputs
    return sorted(rises)[1]


def measure_all(names: list[str]) -> dict:
    """Run by the fixture in a process of its own, where every large buffer is a mapping that goes when it is freed."""
    mx.set_default_device(mx.cpu)
    mx.set_cache_limit(0)
    figures = {}
    for name in names:
        job = Job(name)
        for way, (function, args) in job.ways().items():
            predicted = cost(function, *args)
            figures[f"{name}, {way}"] = (predicted.peak_nbytes, resident_rise(function, args))
    return figures


@pytest.fixture(scope="module")
def figures() -> dict[str, tuple[int, int]]:
    """{job: (predicted, measured) bytes}, all from one process: importing mlx-lm takes 2 s."""
    if platform.MACOS:
        must_run("how Linux's heap gives pages back is what makes resident memory an exact measure")
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, *SIZES, KEPT, SHARED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("job", [*(f"{name}, {way}" for name in (*SIZES, SHARED) for way in WAYS), f"{KEPT}, backward"])
def test_peak_is_what_resident_memory_rises_by(figures, job):
    predicted, measured = figures[job]
    assert 0.98 <= predicted / measured <= 1.09, f"{predicted / 1e6:.1f} MB predicted, {measured / 1e6:.1f} measured"


def test_what_freed_buffers_take_if_all_are_kept():
    """Of sizes that differ by little or by more than a buffer is handed out for; against MLX's own count."""
    xs = [mx.random.normal((n, 1024)) for n in (100, 101, 102, 199, 201, 320, 330)]
    mx.eval(xs)

    def function(*xs):
        y = mx.zeros((1,))
        for x in xs:
            y = (mx.exp(x) @ mx.ones((1024, 1)) + y.sum()).sum()[None]
        return y

    limit = mx.set_cache_limit(1 << 30)
    try:
        mx.clear_cache()
        before = mx.get_active_memory()
        for _ in range(4):
            mx.eval(function(*xs))
            mx.synchronize()
        taken = mx.get_active_memory() + mx.get_cache_memory() - before
    finally:
        mx.set_cache_limit(limit)
        mx.clear_cache()
    of_function = cost(function, *xs)
    assert of_function.peak_nbytes < 0.9 * of_function.reserved_nbytes
    assert 0.9 * taken <= of_function.reserved_nbytes <= 1.1 * taken


def test_flops_and_bytes_of_a_chain_of_products_by_hand():
    rows, inner, middle, out = 32, 64, 128, 16
    a, b, c = (placeholder(shape, mx.float32) for shape in ((rows, inner), (inner, middle), (middle, out)))
    of_chain = cost(lambda a: mx.sin(a @ b) @ c, a)
    assert of_chain.flops == 2 * rows * inner * middle + 2 * rows * middle * out
    first = 4 * (rows * inner + inner * middle + rows * middle)
    sine = 4 * 2 * rows * middle
    second = 4 * (rows * middle + middle * out + rows * out)
    assert [op[:2] for op in of_chain.ops] == [
        (2 * rows * inner * middle, first),
        (0, sine),
        (2 * rows * middle * out, second),
    ]
    assert of_chain.output_nbytes == 4 * rows * out
    assert of_chain.peak_nbytes == 4 * (rows * middle + rows * out)  # the sine takes the first product's buffer
    assert of_chain.allocated_nbytes == of_chain.peak_nbytes
    of_six = cost(lambda a: a @ b @ c @ c.T @ c @ c.T @ c, a)
    assert of_six.allocated_nbytes == 3 * of_chain.allocated_nbytes > of_six.peak_nbytes
    # each operation takes the longer of its two times; narrow products are slower in proportion
    widths = min(rows, inner, middle), min(rows, middle, out)
    slowed = (op[0] * 128 / width for op, width in zip((of_chain.ops[0], of_chain.ops[2]), widths))
    at_once = replace(UNKNOWN, matmul_flops_per_s=1e30, bytes_per_s=1e30, functions_per_s=1e30)
    assert replace(at_once, matmul_flops_per_s=1.0).seconds(*of_chain.work) == pytest.approx(sum(slowed))
    assert replace(at_once, bytes_per_s=1.0).seconds(*of_chain.work) == first + sine + second


def test_operand_with_gaps_is_copied_for_a_product():
    x, w = placeholder((256, 1024), mx.float32), placeholder((512, 128), mx.float32)
    assert cost(lambda x: x[:, ::2] @ w, x).peak_nbytes == 4 * (256 * 128 + 256 * 512)
    assert cost(lambda x: x[:, ::2].T.T @ w, x).peak_nbytes == 4 * (256 * 128 + 256 * 512)
    assert cost(lambda w: w.T @ x[:128].T.T.reshape(512, 256), w).peak_nbytes == 4 * 128 * 256  # a transpose is no gap


def test_flops_of_other_products():
    x = placeholder((8, 24, 64), mx.float32)
    w, scales, biases = mx.quantize(mx.zeros((128, 64)), 32, 4)
    mx.eval(w, scales, biases)
    quantized = cost(lambda x: mx.quantized_matmul(x, w, scales, biases, group_size=32, bits=4), x)
    assert quantized.flops == 2 * 8 * 24 * 64 * 128
    experts, chosen = placeholder((4, 64, 96), mx.float32), mx.zeros((8, 2), mx.uint32)
    gathered = cost(lambda x, i: mx.gather_mm(x[:, None, :1], experts, rhs_indices=i), x, chosen)
    assert gathered.flops == 2 * 8 * 2 * 64 * 96
    depthwise = cost(lambda x: mx.conv1d(x, placeholder((64, 3, 1), mx.float32), groups=64), x)
    assert depthwise.flops == 2 * 8 * 22 * 64 * 3


def test_what_is_captured_or_only_looked_at_costs_nothing():
    weight = placeholder((512, 512), mx.float32)
    of_views = cost(lambda tree: [tree["x"].T[None], mx.broadcast_to(weight, (4, 512, 512))], {"x": weight, "n": 3})
    assert (of_views.peak_nbytes, of_views.output_nbytes, of_views.ops) == (0, 0, ())
    assert of_views.allocated_nbytes == 0


def test_random_state_is_left_as_it_was():
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    dropout = nn.Dropout(0.5)
    of_mask = cost(lambda x: dropout(x), placeholder((256, 256), mx.float32))
    assert of_mask.peak_nbytes == pytest.approx((1 + 4) * 256 * 256, rel=0.01)  # booleans, and their product
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_what_cannot_be_seen_is_refused_and_errors_of_the_function_pass_through():
    x = placeholder((64, 64), mx.float32)
    with pytest.raises(CostUnknown, match="Contiguous"):
        cost(lambda x: mx.contiguous(x.T) + 1, x)
    with pytest.raises(CostUnknown, match="CustomTransforms"):  # checkpoint has a primitive without vmap
        cost(lambda x: mx.vjp(mx.checkpoint(mx.sin), [mx.checkpoint(mx.cos)(x)], [x])[1], x)
    with pytest.raises(ValueError, match=r"\[matmul\]") as raised:
        cost(lambda x: x @ x[:2], x)
    assert raised.type is ValueError


if __name__ == "__main__":
    print(json.dumps(measure_all(sys.argv[1:])))
    sys.exit()
