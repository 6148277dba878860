"""Whatever is kept in memory or on disk, gradients are those of mlx-lm's whole model in memory."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.tuner.trainer import default_loss
from test_gradients import LORA, pair, save_quantized

import slowft
from architectures import ARCHITECTURES
from conftest import LLAMA, largest, largest_difference, random_batch, randomise, reference, save_random
from slowft.planning.schedule import Schedule
from slowft.weights import residency

CHAINS = [name for name in ARCHITECTURES if not name.startswith("gemma4")]


def every_product(model) -> tuple[tuple[str, ...], ...]:
    """The names of all linear layers of every block, by visit."""
    kinds = ("Linear", "QuantizedLinear", "SwitchLinear", "QuantizedSwitchLinear")
    blocks = model.engine.cut.blocks
    names = [
        [n.removesuffix(".linear") for n, m in b.module.named_modules() if type(m).__name__ in kinds] for b in blocks
    ]
    return tuple(tuple(names[index]) for index in model.engine.cut.order)


def assert_same_as(expected, streamed, batch, lengths, schedule: Schedule, tmp_path=None):
    loss, gradients = expected
    streamed.engine.follow(schedule, tmp_path)
    for _ in range(2):  # the second step finds what the first one left
        (streamed_loss, _), streamed_gradients = streamed.loss_and_grads(batch, lengths)
        assert streamed_loss.item() == loss.item()
        assert largest_difference(gradients, streamed_gradients) == 0.0


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_equal_in_memory_and_with_the_head_read_ahead(name, tmp_path):
    config = ARCHITECTURES[name]
    whole, streamed = pair(save_random(tmp_path / "m", config))
    batch, lengths = random_batch(config["vocab_size"])
    expected = reference(whole, batch, lengths)
    for schedule in (
        Schedule(in_memory=True, keep_head=True),
        Schedule(keep_head=True),
        Schedule(1, head_ahead=True),
        Schedule(2, head_ahead=True),
    ):
        assert_same_as(expected, streamed, batch, lengths, schedule)


@pytest.mark.parametrize("name", CHAINS)
def test_the_loops_give_what_autodiff_of_the_models_own_call_gives(name, tmp_path):
    """Both ways to stream: `engine.step`, and blocks as functions with gradients of their own in MLX's trace."""
    config = ARCHITECTURES[name]
    streamed = slowft.open_model(save_random(tmp_path / "m", config), compute_dtype="float32").add_lora(**LORA)
    randomise(streamed)
    streamed.train()
    batch, lengths = random_batch(config["vocab_size"])
    (loss, _), gradients = streamed.loss_and_grads(batch, lengths)
    traced_loss, traced_gradients = reference(streamed, batch, lengths)
    assert loss.item() == traced_loss.item()
    assert largest(gradients) > 0 and largest_difference(gradients, traced_gradients) == 0.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_with_kept_products(name, tmp_path):
    config = ARCHITECTURES[name]
    whole, streamed = pair(save_random(tmp_path / "m", config))
    batch, lengths = random_batch(config["vocab_size"])
    expected = reference(whole, batch, lengths)
    products = every_product(streamed)
    assert_same_as(expected, streamed, batch, lengths, Schedule(kept=products))
    some = tuple(names[:2] if i % 2 else () for i, names in enumerate(products))
    assert_same_as(expected, streamed, batch, lengths, Schedule(kept=some))


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("num_layers", [-1, 2])
def test_blocks_in_the_room_of_later_products(num_layers, slots, tmp_path):
    """Fewer reads, the same gradients; evaluations keep no more than before."""
    whole, streamed = pair(save_random(tmp_path / "m", LLAMA), num_layers=num_layers)
    batch, lengths = random_batch(256)
    expected = reference(whole, batch, lengths)
    block, cache = streamed.engine.cut.blocks[0].nbytes, streamed.engine.weights.cache
    schedule, read = Schedule(slots, kept=every_product(streamed)), {}
    for temporary in ((), (2 * block, 2 * block, block, 0), (4 * block, block // 2, 0, 0)):
        assert_same_as(expected, streamed, batch, lengths, replace(schedule, temporary_nbytes=temporary))
        before = streamed.stats.total.bytes_read
        for _ in range(4):
            streamed.loss_and_grads(batch, lengths)
        read[temporary] = streamed.stats.total.bytes_read - before
        assert cache.held_nbytes() < cache.capacity + max(temporary[:1], default=0) + 4096
        streamed.loss(batch, lengths)
        assert cache.held_nbytes() < cache.capacity + 4096
    without, *others = read.values()
    saved = 3 * block if num_layers < 0 else -2 * block  # (a read may begin in one step and end in the next)
    assert all(nbytes <= without - saved for nbytes in others)


@pytest.mark.parametrize("bits, mode, group_size", [(4, "affine", 32), (4, "mxfp4", 32)])
@pytest.mark.parametrize("dtype", ["float32", "files"])
def test_gradients_equal_on_quantized_bases(bits, mode, group_size, dtype, tmp_path, monkeypatch):
    """Dequantized on arrival, and (as on a GPU) multiplied with packed."""
    from conftest import in_memory
    from slowft.engine import model as engine_model

    dense = save_random(tmp_path / "dense", LLAMA)
    packed = save_quantized(tmp_path / "packed", dense, bits, mode, group_size)
    if dtype == "files":
        monkeypatch.setattr(engine_model, "compute_dtype_of", lambda name: None)
        whole = in_memory(packed, **LORA)
    streamed = slowft.open_model(packed).add_lora(**LORA)
    batch, lengths = random_batch(256)
    if dtype == "files":
        randomise(whole, streamed)
        whole.train(), streamed.train()
        expected = reference(whole, batch, lengths)
    else:
        randomise(streamed)
        (loss, _), gradients = streamed.loss_and_grads(batch, lengths)
        expected = loss, gradients
    for schedule in (Schedule(kept=every_product(streamed)), Schedule(in_memory=True, keep_head=True)):
        assert_same_as(expected, streamed, batch, lengths, schedule)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_the_same_for_every_schedule(dropout, tmp_path):
    _, streamed = pair(save_random(tmp_path / "m", LLAMA), dropout=dropout)
    batch, lengths = random_batch(256)
    results = []
    for schedule in (Schedule(), Schedule(in_memory=True, keep_head=True), Schedule(kept=every_product(streamed))):
        streamed.engine.follow(schedule)
        streamed.step = 5
        (loss, _), gradients = streamed.loss_and_grads(batch, lengths)
        results.append((loss.item(), gradients))
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert largest_difference(gradients, results[0][1]) == 0.0


@pytest.mark.parametrize(
    "lora", [{"num_layers": 2}, {"num_layers": 1, "keys": ["self_attn.q_proj", "lm_head"]}], ids=str
)
def test_few_trained_blocks(lora, tmp_path):
    whole, streamed = pair(save_random(tmp_path / "m", LLAMA), **lora)
    batch, lengths = random_batch(256)
    expected = reference(whole, batch, lengths)
    for schedule in (Schedule(kept=every_product(streamed)), Schedule(in_memory=True, keep_head=True)):
        assert_same_as(expected, streamed, batch, lengths, schedule)


def test_spilled_inputs_come_back_equal(tmp_path):
    whole, streamed = pair(save_random(tmp_path / "m", LLAMA))
    batch, lengths = random_batch(256)
    expected = reference(whole, batch, lengths)
    for spilled in (2, 4, 5):
        assert_same_as(expected, streamed, batch, lengths, Schedule(spilled=spilled), tmp_path)
        assert streamed.stats.last.bytes_written == (spilled - 1) * 3 * 24 * 64 * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_micro_batches_spill_and_accumulate(tmp_path):
    _, streamed = pair(save_random(tmp_path / "m", LLAMA))
    batches = [random_batch(256, rows=2, tokens=16 + i, seed=i) for i in range(3)]
    (loss, _), gradients = streamed.loss_and_grads(batches)
    for schedule in (
        Schedule(spilled=5),
        Schedule(in_memory=True, keep_head=True),
        Schedule(kept=every_product(streamed)),
    ):
        streamed.engine.follow(schedule, tmp_path)
        (other, _), other_gradients = streamed.loss_and_grads(batches)
        assert other.item() == loss.item()
        assert largest_difference(gradients, other_gradients) == 0.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pieces_agree(name, tmp_path):
    """Rows, tokens of feed-forward layers, queries, logits: in pieces, equal up to rounding."""
    config = ARCHITECTURES[name]
    whole, streamed = pair(save_random(tmp_path / "m", config))
    batch, lengths = random_batch(config["vocab_size"])
    loss, gradients = reference(whole, batch, lengths)
    n_targets = default_loss(whole, batch, lengths)[1].item()
    pieces = [Schedule(rows=1), Schedule(mlp_tokens=7, attention_queries=5), Schedule(head_tokens=11)]
    if streamed.engine.cut.is_chain:
        pieces += [Schedule(mlp_tokens=7, attention_queries=5, head_tokens=11, rows=2)]
    for schedule in pieces:
        streamed.engine.follow(schedule)
        (streamed_loss, ntoks), streamed_gradients = streamed.loss_and_grads(batch, lengths)
        assert ntoks.item() == n_targets
        assert streamed_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert largest_difference(gradients, streamed_gradients) <= 2e-5 * largest(gradients), schedule
        assert streamed.loss(batch, lengths)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_dropout_in_pieces_is_replayed(tmp_path):
    """With dropout, the loss in pieces is a function whose gradient is the one given: checked by finite differences."""
    _, streamed = pair(save_random(tmp_path / "m", LLAMA), dropout=0.4)
    streamed.engine.follow(Schedule(mlp_tokens=7, attention_queries=5))
    batch, lengths = random_batch(256)

    def loss_and_grads():
        streamed.step = 3
        (loss, _), gradients = streamed.loss_and_grads(batch, lengths)
        return loss.item(), gradients

    before, gradients = loss_and_grads()
    assert loss_and_grads()[0] == before
    layer = streamed.layers[1].mlp.gate_proj
    gradient = gradients["model"]["layers"][1]["mlp"]["gate_proj"]["lora_b"]
    step = 1e-2 / mx.linalg.norm(gradient).item()
    layer.lora_b = layer.lora_b + step * gradient
    expected = step * mx.square(gradient).sum().item()
    assert loss_and_grads()[0] - before == pytest.approx(expected, rel=0.05)


def test_a_head_that_stays_is_brought_when_nothing_freed_is_kept_beside_it(tmp_path, monkeypatch):
    """What a plan before it left to be used again would be in memory beside the head, and beyond the ceiling."""
    directory = save_random(tmp_path / "llama", LLAMA)
    model = slowft.open_model(directory).add_lora(**LORA)
    model.engine.follow(Schedule(cache_nbytes=1 << 30))
    model.loss_and_grads(*random_batch(LLAMA["vocab_size"]))
    assert mx.get_cache_memory() > 0
    beside, read_whole = [], residency.read_whole
    monkeypatch.setattr(
        residency, "read_whole", lambda *args: beside.append(mx.get_cache_memory()) or read_whole(*args)
    )
    model.engine.follow(Schedule(cache_nbytes=1 << 30, keep_head=True))
    assert beside and beside[0] == 0
