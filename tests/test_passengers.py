"""Rows with the adapter, without it, and with others share one pass over the weights, and no row changes another."""

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import default_loss
from test_gradients import LORA, pair

import slowft
from architectures import ARCHITECTURES
from conftest import LLAMA, in_memory, random_batch, randomise, save_random

NAMES = ["llama tied", "gemma3 (local and global attention)", "mixtral (experts)", "mamba2 (state space)"]


@pytest.mark.parametrize(
    "name, lora",
    [
        (name, lora)
        for name in NAMES
        for lora in ({}, {"use_dora": True}, {"num_layers": 1})
        if not (name.startswith("mixtral") and "use_dora" in lora)  # mlx-lm has no DoRA for layers of experts
    ],
    ids=str,
)
def test_base_and_tuned_in_one_pass_equal_two_models_in_memory(name, lora, tmp_path):
    config = ARCHITECTURES[name]
    tuned, streamed = pair(save_random(tmp_path / "m", config), **lora)
    base = in_memory(tmp_path / "m")
    streamed.eval(), tuned.eval()
    batches = [random_batch(config["vocab_size"], rows=rows, tokens=tokens) for rows, tokens in ((3, 24), (2, 17))]
    passengers = [slowft.MicroBatch(*batch, adapter=adapter) for adapter in (False, True) for batch in batches]
    losses = streamed.loss(passengers)
    expected = [default_loss(model, *batch) for model in (base, tuned) for batch in batches]
    assert [(loss.item(), n.item()) for loss, n in losses] == [(loss.item(), n.item()) for loss, n in expected]
    assert losses[0][0].item() != losses[2][0].item()
    # and what is trained is as it was
    assert [streamed.loss(*batch)[0].item() for batch in batches] == [loss.item() for loss, _ in expected[2:]]


def test_passengers_read_each_block_once(llama):
    _, streamed = pair(llama)
    streamed.eval()
    batch, lengths = random_batch(256)

    def bytes_read(*adapters) -> int:
        before = streamed.stats.total.bytes_read
        streamed.loss([slowft.MicroBatch(batch, lengths, adapter) for adapter in adapters])
        return streamed.stats.total.bytes_read - before

    bytes_read(True)
    rows = streamed.embedding_nbytes // LLAMA["vocab_size"] * len(set(batch[:, :-1].reshape(-1).tolist()))
    one = bytes_read(True)
    assert one > 4 * streamed.engine.cut.blocks[0].nbytes // 2
    # embedding rows are looked up for each; a read may begin in one pass and end in the next
    assert bytes_read(True, False, True) <= one + 2 * rows + 2 * streamed.engine.cut.blocks[0].nbytes


def test_adapters_by_name_equal_models_of_their_own(tmp_path):
    """Of any rank, on any layers, beside one that is being trained."""
    directory = save_random(tmp_path / "m", LLAMA)
    others = {"small": {"rank": 2, "num_layers": 2}, "queries": {"rank": 6, "keys": ["self_attn.q_proj"]}}
    batch, lengths = random_batch(256)
    expected = {}
    for name, lora in others.items():
        model = slowft.open_model(directory).add_lora(**LORA | lora)
        mx.random.seed(len(name))
        model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.1, model.trainable_parameters()))
        model.save_adapter(tmp_path / name)
        expected[name] = model.loss(batch, lengths)[0].item()
        model.close()
    streamed = slowft.open_model(directory).add_lora(**LORA, keys=["mlp.up_proj"])
    randomise(streamed)
    alone, trainable = streamed.loss(batch, lengths)[0].item(), str(streamed.trainable_parameters())
    for name in others:
        streamed.add_adapter(name, tmp_path / name)
    assert str(streamed.trainable_parameters()) == trainable
    names = [True, "small", False, "queries", "small"]
    losses = [loss.item() for loss, _ in streamed.loss([slowft.MicroBatch(batch, lengths, n) for n in names])]
    assert losses[1] == losses[4] == expected["small"] and losses[3] == expected["queries"]
    assert losses[0] == alone and losses[2] == default_loss(in_memory(directory), batch, lengths)[0].item()
    with pytest.raises(slowft.SlowftError, match="no adapter is named 'large'"):
        streamed.loss([slowft.MicroBatch(batch, lengths, "large")])
