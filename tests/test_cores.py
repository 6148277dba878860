"""Work shared out among streams gives the very bits of MLX's plain operations and of mlx-lm in memory."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations
from mlx_lm.tuner.trainer import default_loss

from architectures import ARCHITECTURES
from conftest import in_memory, largest, largest_difference, random_batch, randomise, reference, save_random
from slowft import platform
from slowft.engine import cores
from slowft.planning.schedule import Schedule

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU computes on all of itself")


@pytest.fixture
def parts(monkeypatch) -> list[int]:
    """Everything is shared out, however small; gives how many parts each call was computed in."""
    counts: list[int] = []
    in_parts = cores.in_parts

    def counted(function, *args):
        calls: list[None] = []
        output = in_parts(lambda *part: (calls.append(None), function(*part))[1], *args)
        counts.append(len(calls))
        return output

    monkeypatch.setattr(platform, "cores", lambda: 2)
    monkeypatch.setattr(cores, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(cores, "in_parts", counted)
    return counts


@pytest.fixture
def two_streams():
    return [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)]


@pytest.mark.parametrize(
    "name",
    [
        "llama untied",
        "gemma2 (embedding scale, soft caps)",
        "gemma3 (local and global attention)",
        "gpt2 (learned positions, layer norms, tied)",
        "gpt_oss (attention sinks, experts, sliding window)",
    ],
)
def test_gradients_and_evaluation_equal_in_memory(name, parts, tmp_path):
    config = ARCHITECTURES[name]
    whole = in_memory(save_random(tmp_path / "m", config), num_layers=-1)
    model = slowft.open_model(tmp_path / "m")
    mx.random.seed(1)
    model.add_lora(num_layers=-1, rank=4, scale=2.0)
    randomise(whole, model)
    batch, lengths = random_batch(config["vocab_size"])
    loss, gradients = reference(whole, batch, lengths)
    evaluated = default_loss(whole, batch, lengths)[0].item()
    assert largest(gradients) > 1e-4
    assert not parts

    for keeps_all in (False, True):
        model.engine.follow(Schedule(in_memory=keeps_all))
        (streamed_loss, _), streamed = model.loss_and_grads(batch, lengths)
        assert streamed_loss.item() == loss.item()
        assert largest_difference(gradients, streamed) == 0.0
    assert model.loss(batch, lengths)[0].item() == evaluated
    assert 2 in parts
    model.close()


def masks(rows: int, heads: int, queries: int, keys: int) -> dict:
    mx.random.seed(5)
    see = mx.random.uniform(shape=(rows, heads, queries, keys)) > 0.3
    return {
        "none": None,
        "causal": "causal",
        "of queries and keys": see[0, 0],
        "of rows": see[:, :1],
        "of heads": see[0],
        "of all": see,
        "added, of all": mx.random.normal(see.shape),
        "added, of queries": mx.random.normal(see.shape[2:]),
    }


@pytest.mark.parametrize("mask", masks(1, 1, 1, 1))
@pytest.mark.parametrize("rows, heads, groups", [(2, 4, 2), (3, 6, 3), (1, 4, 4), (1, 4, 1)])
def test_attention_is_mlxs_to_the_last_bit(rows, heads, groups, mask, parts, two_streams):
    mask = masks(rows, heads, 7, 9)[mask]
    q, k, v = (mx.random.normal(shape) for shape in [(rows, heads, 7, 8), (rows, groups, 9, 8), (rows, groups, 9, 16)])
    sinks, cotangent = mx.random.normal((heads,)), mx.random.normal((rows, heads, 7, 16))

    floats = [mask] if isinstance(mask, mx.array) and mask.dtype == mx.float32 else []

    def attention(q, k, v, *rest):
        m = rest[0] if floats else mask
        given = {"sinks": rest[-1]} if len(rest) > len(floats) else {}
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=m, **given)

    def all_of_it() -> list[mx.array]:
        results = []
        for besides in ((), (sinks,)):
            outputs, gradients = mx.vjp(attention, [q, k, v, *floats, *besides], [cotangent])
            results += outputs + gradients
        mx.eval(results)
        return results

    plain = all_of_it()
    assert not parts
    with cores.shared(two_streams):
        shared = all_of_it()
    assert all(mx.array_equal(a, b).item() for a, b in zip(plain, shared, strict=True))
    whole = groups == rows == 1 or (isinstance(mask, mx.array) and mask.dtype == mx.float32 and mask.ndim == 2)
    assert bool(parts) != whole


def test_activations_and_softmax_are_mlxs_to_the_last_bit(parts, two_streams):
    x, y, cotangent = mx.random.normal((3, 3, 5, 8)) * 4  # an odd number of tokens

    def all_of_it() -> list[mx.array]:
        functions = {
            "silu": nn.silu,
            "gelu": nn.GELU(),
            "swiglu": lambda x: activations.swiglu(x, y),
            "softmax": lambda x: mx.softmax(x, axis=-1, precise=True),
            "softmax, last axis by its number": lambda x: mx.softmax(x, 2),
            "exp": mx.exp,
        }
        results = []
        for function in functions.values():
            outputs, gradients = mx.vjp(function, [x], [cotangent])
            results += [function(x), *outputs, *gradients]  # (untraced, what is compiled runs compiled)
        mx.eval(results)
        return results

    plain = all_of_it()
    with cores.shared(two_streams):
        shared = all_of_it()
    assert parts == [2] * 12
    assert all(mx.array_equal(a, b).item() for a, b in zip(plain, shared, strict=True))


def test_what_is_not_by_tokens_stays_whole(parts, two_streams):
    x, y = mx.random.normal((2, 4, 6, 8))
    with cores.shared(two_streams):
        mx.softmax(x, axis=1)
        mx.softmax(x)
        activations.swiglu(x, y[:1])
        nn.log_softmax(x, axis=1)
        mx.exp(x[0, 0])
    assert not parts


def test_only_the_thread_that_shares_and_only_meanwhile(parts, two_streams):
    x = mx.random.normal((4, 8))
    mx.eval(x)
    originals = mx.softmax, mx.fast.scaled_dot_product_attention, nn.silu, activations.swiglu
    with pytest.raises(ValueError, match="midway"), cores.shared(two_streams):
        assert mx.softmax is not originals[0] and activations.swiglu is not originals[3]
        thread = threading.Thread(target=lambda: mx.eval(nn.silu(x)))
        thread.start()
        thread.join()
        assert not parts
        raise ValueError("midway")
    assert (mx.softmax, mx.fast.scaled_dot_product_attention, nn.silu, activations.swiglu) == originals
    nn.silu(x)
    assert not parts


def test_one_stream_changes_nothing():
    softmax = mx.softmax
    with cores.shared([mx.default_stream(mx.cpu)]):
        assert mx.softmax is softmax
