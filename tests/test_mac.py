"""The main job under the double of a Mac (mac.py), against mlx-lm in memory under the same double.

These find what Python can see go wrong there. None of it was run on a Mac.
"""


import mlx.core as mx
import pytest
from test_gradients import save_quantized

import slowft
from architectures import ARCHITECTURES
from conftest import (
    LLAMA,
    in_memory,
    largest,
    largest_difference,
    randomise,
    save_random,
)
from mac import F_NOCACHE, F_PREALLOCATE
from slowft import platform
from slowft.memory import MetalLimits, limits
from slowft.planning.schedule import Schedule
from slowft.storage import reader

LORA = {"num_layers": -1, "rank": 4, "scale": 2.0}
MOE = ARCHITECTURES["mixtral (experts)"]
KINDS = ["dense", "experts", "quantized"]
MB = 1 << 20


@pytest.fixture
def directory(tmp_path, request):
    """A model of the kind that the test is parametrised with: in bfloat16, but for experts."""
    if request.param == "experts":  # of which MLX's CPU backend has no product in bfloat16
        return save_random(tmp_path / "m", MOE)
    dense = save_random(tmp_path / "m", LLAMA, mx.bfloat16)
    return save_quantized(tmp_path / "q", dense, 4, "affine", 32) if request.param == "quantized" else dense


def pair(directory, **lora):
    """(in memory, streamed) with the same random adapters, both in the model's own dtype."""
    lora = LORA | lora
    streamed = slowft.open_model(directory)
    whole = in_memory(directory, streamed._engine.compute_dtype, **lora)
    streamed.add_lora(**lora)
    randomise(whole, streamed)
    whole.train()
    streamed.train()
    return whole, streamed


def assert_equal(expected, got):
    (loss, gradients), ((streamed_loss, _), streamed_gradients) = expected, got
    assert largest(gradients) > 1e-4
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0


# --- The double ---------------------------------------------------------------------------------------


def test_the_double_tells_forward_passes_apart(mac):
    """What slowft is held to: a gradient's forward pass, recomputation included, and a plain one differ."""
    x = mx.random.normal((1, 2, 8, 4)).astype(mx.bfloat16)

    def attend(x):
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=0.5)

    def in_trace(of):
        return mx.vjp(lambda _: [attend(x)], [mx.array(0.0) if of is None else of], [mx.zeros_like(x)])[0][0]

    assert not mx.array_equal(attend(x), in_trace(None))
    assert mx.array_equal(in_trace(x), in_trace(None))


def test_the_double_gives_back_freed_buffers_with_the_next_allocation(mac):
    mx.clear_cache()
    mx.eval([mx.zeros((MB,), mx.uint8) + 1 for _ in range(16)])
    assert mx.get_cache_memory() >= 16 * MB
    mx.set_cache_limit(2 * MB)
    assert mx.get_cache_memory() >= 16 * MB
    mx.eval(mx.zeros((1,)))
    assert mx.get_cache_memory() <= 2 * MB


def test_nothing_that_runs_on_the_gpu_can_be_exported_in_the_double(mac):
    with pytest.raises(ValueError, match="Unable to serialize primitive"):
        mx.export_function(lambda _: None, lambda x: x + 1, mx.zeros((2,)))


# --- Platform and memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_the_models_own_dtype_and_packed_weights_are_computed_with(directory, mac):
    model = slowft.open_model(directory)
    assert model._engine.compute_dtype == model._cut.blocks[0].params[-1].source.result_dtype
    for unit in model._cut.blocks:
        assert unit.compute_nbytes == unit.nbytes  # nothing is cast or dequantized on arrival
    model.close()


def test_memory_is_the_physical_footprint(mac):
    in_use = platform.memory_in_use()
    platform.reset_peak_memory()
    before = platform.peak_memory()
    block = mx.ones((64 << 20,), mx.uint8)
    mx.eval(block)
    assert before >= in_use and platform.peak_memory() - before > 60 << 20
    assert mac.called("proc_pid_rusage") and mac.called("proc_reset_footprint_interval")


def test_files_are_read_past_the_cache_and_written_to_room_that_is_there(mac, tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    descriptors = reader.Reader()
    try:
        descriptors.descriptor(str(tmp_path / "file"))
    finally:
        descriptors.close()
    assert [F_NOCACHE, 1] in mac.called("fcntl")
    with open(tmp_path / "spill", "wb") as file:
        platform.preallocate(file.fileno(), 12345)
        platform.sync_file(file.fileno())
    assert (tmp_path / "spill").stat().st_size == 12345
    assert F_PREALLOCATE in [command for command, *_ in mac.called("fcntl")]


def test_limits_are_metals(mac):
    found = mac.memory_limit, mac.cache_limit
    assert isinstance(limits(), MetalLimits)
    limits().give_back()
    limits().keep_freed(64 * MB)
    limits().hold(100 * MB)
    assert mac.memory_limit == 164 * MB  # of arrays and freed buffers together
    limits().keep_freed(32 * MB)
    assert mac.memory_limit == 132 * MB

    mx.eval([mx.zeros((MB,), mx.uint8) + 1 for _ in range(16)])
    assert mx.get_cache_memory() >= 16 * MB
    limits().keep_freed(32 * MB, of_those_kept=4 * MB)  # now, not with the next allocation
    assert mx.get_cache_memory() <= 4 * MB and mac.cache_limit == 32 * MB
    limits().give_back()
    assert mx.get_cache_memory() == 0

    limits().wire(10 * MB)
    limits().wire(mac.memory_nbytes)
    assert mac.wired == [10 * MB, mac.recommended_nbytes]
    limits().restore()
    assert (mac.memory_limit, mac.cache_limit) == found and mac.wired[-1] == 0


def test_weights_that_stay_are_wired_and_no_others(mac, llama):
    model = slowft.open_model(llama).add_lora(**LORA)
    assert not any(mac.wired)
    model._engine.follow(Schedule(tail=1))
    assert mac.wired[-1] == model._cut.blocks[-1].compute_nbytes
    model._engine.follow(Schedule(resident_nbytes=100_000))
    assert mac.wired[-1] == 100_000
    model.close()
    assert mac.wired[-1] == 0
