"""Loss and gradients of a streamed model are those of mlx-lm's whole model in memory, to the last bit."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.utils import dequantize_model, load_model, save_config

import slowft
from architectures import ARCHITECTURES
from conftest import (
    LLAMA,
    attach_in_memory,
    in_memory,
    largest,
    largest_difference,
    random_batch,
    randomise,
    reference,
    save_random,
)
from slowft.planning.plan import LOGITS_NBYTES

LORA = {"num_layers": -1, "rank": 4, "scale": 2.0}


def pair(directory, compute_dtype="float32", **lora):
    """(in memory, streamed) with the same random adapters, both computing in float32."""
    lora = LORA | lora
    whole, streamed = in_memory(directory, **lora), slowft.open_model(directory, compute_dtype=compute_dtype)
    streamed.add_lora(**lora)
    randomise(whole, streamed)
    whole.train()
    streamed.train()
    return whole, streamed


def assert_step_equals(whole, streamed, batch, lengths):
    loss, gradients = reference(whole, batch, lengths)
    (streamed_loss, _), streamed_gradients = streamed.loss_and_grads(batch, lengths)
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0


def save_quantized(directory, dense, bits, mode, group_size):
    """A quantized copy of the model in `dense`, as mlx-lm writes it."""
    model, config = load_model(dense)
    nn.quantize(model, group_size, bits, mode=mode)
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    save_config(config | {"quantization": quantization}, directory / "config.json")
    return directory


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_in_memory(name, tmp_path):
    config = ARCHITECTURES[name]
    whole, streamed = pair(save_random(tmp_path / "m", config))
    batch, lengths = random_batch(config["vocab_size"])
    loss, gradients = reference(whole, batch, lengths)
    assert largest(gradients) > 1e-4  # something to compare

    (streamed_loss, ntoks), streamed_gradients = streamed.loss_and_grads(batch, lengths)
    assert ntoks.item() == default_loss(whole, batch, lengths)[1].item()
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0

    # an ordinary mlx-lm model: MLX's own transformation of mlx-lm's own loss
    loss, streamed_gradients = reference(streamed, batch, lengths)
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunked_head_agrees(name, tmp_path):
    config = ARCHITECTURES[name]
    whole, streamed = pair(save_random(tmp_path / "m", config))
    batch, lengths = random_batch(config["vocab_size"])
    loss, gradients = reference(whole, batch, lengths)
    streamed.head_chunk_tokens = 7
    (streamed_loss, _), streamed_gradients = streamed.loss_and_grads(batch, lengths)
    assert streamed_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert largest_difference(gradients, streamed_gradients) <= 1e-5 * largest(gradients)
    assert streamed.loss(batch, lengths)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_large_logits_exist_whole_where_memory_allows(tmp_path):
    """Then gradients are those of training in memory to the last bit; in chunks up to rounding."""
    config = LLAMA | {"vocab_size": 30_000, "num_hidden_layers": 2}
    directory = save_random(tmp_path / "m", config)
    batch, lengths = random_batch(config["vocab_size"], rows=2, tokens=300)
    assert 4 * 2 * 300 * config["vocab_size"] > LOGITS_NBYTES
    whole = in_memory(directory, **LORA)
    models = [slowft.open_model(directory, compute_dtype="float32", memory=memory) for memory in (None, "3GB", "1GB")]
    for streamed in models:
        streamed.add_lora(**LORA)
    randomise(whole, *models)
    loss, gradients = reference(whole.train(), batch, lengths)
    *_, scarce = models
    for streamed in models:
        if streamed is scarce:  # planned when the others are closed; there is room for what this process takes besides
            least = streamed.planner(2, 300).least().peak_nbytes
            streamed.plan(2, 300, memory=least + 150_000_000, follow=True)
        (streamed_loss, _), streamed_gradients = streamed.train().loss_and_grads(batch, lengths)
        difference = largest_difference(gradients, streamed_gradients)
        if streamed is scarce:
            assert streamed.followed_plan.schedule.head_tokens is not None
            assert 0 < difference <= 1e-5 * largest(gradients)
        else:
            assert streamed_loss.item() == loss.item() and difference == 0
        streamed.close()


def test_weights_used_past_the_seam_are_kept_in_memory(tmp_path, monkeypatch):
    """A model that multiplies by its embedding's weight itself still gives the right gradients."""
    from mlx_lm.models import llama

    def head_by_hand(self, inputs, cache=None, input_embeddings=None):
        return self.model(inputs, cache) @ self.model.embed_tokens.weight.T

    monkeypatch.setattr(llama.Model, "__call__", head_by_hand)
    whole, streamed = pair(save_random(tmp_path / "m", ARCHITECTURES["llama tied"]))
    batch, lengths = random_batch(128)
    assert_step_equals(whole, streamed, batch, lengths)


def test_a_block_that_remembers_is_refused(tmp_path, monkeypatch):
    from mlx_lm.models import llama

    call = llama.TransformerBlock.__call__

    def remember(self, x, *args, **kwargs):
        self.last_input = x
        return call(self, x, *args, **kwargs)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", remember)
    with pytest.raises(slowft.SlowftError, match="keeps arrays on itself"):
        slowft.open_model(save_random(tmp_path / "m", LLAMA))


def test_head_that_looks_back_is_not_computed_alone(tmp_path, monkeypatch):
    """Where logits depend on more than the last block, the model's own call computes them, and gradients agree."""
    from mlx_lm.models import llama

    call = llama.LlamaModel.__call__

    def add_embedding(self, inputs, *args, **kwargs):
        return call(self, inputs, *args, **kwargs) + self.embed_tokens(inputs)

    monkeypatch.setattr(llama.LlamaModel, "__call__", add_embedding)
    whole, streamed = pair(save_random(tmp_path / "m", LLAMA))
    batch, lengths = random_batch(LLAMA["vocab_size"])
    assert_step_equals(whole, streamed, batch, lengths)


@pytest.mark.parametrize(
    "lora",
    [
        {"num_layers": 2},
        {"num_layers": 1, "keys": ["self_attn.q_proj"]},
        {"use_dora": True},
        {"num_layers": 2, "keys": ["mlp.down_proj", "lm_head"]},
        {"num_layers": 2, "keys": ["self_attn.v_proj", "model.embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_for_every_place_of_adapters(lora, tied, tmp_path):
    if tied and "lm_head" in lora.get("keys", ()):
        lora = lora | {"keys": ["mlp.down_proj", "model.embed_tokens"]}  # which is the head then
    directory = save_random(tmp_path / "m", LLAMA | {"tie_word_embeddings": tied})
    whole, streamed = pair(directory, **lora)
    batch, lengths = random_batch(LLAMA["vocab_size"])
    assert_step_equals(whole, streamed, batch, lengths)


def test_dora_magnitudes_are_the_norms_of_the_weights(llama):
    whole, streamed = in_memory(llama, **LORA, use_dora=True), slowft.open_model(llama)
    streamed.add_lora(**LORA, use_dora=True)
    magnitudes = {n: a for n, a in tree_flatten(whole.trainable_parameters()) if n.endswith(".m")}
    streamed_magnitudes = dict(tree_flatten(streamed.trainable_parameters()))
    assert magnitudes
    for name, array in magnitudes.items():
        assert mx.array_equal(array, streamed_magnitudes[name]), name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_sixteen_bit_files_compute_in_float32(dtype, shards, tmp_path):
    whole, streamed = pair(save_random(tmp_path / "m", LLAMA, dtype, shards))
    batch, lengths = random_batch(LLAMA["vocab_size"])
    assert_step_equals(whole, streamed, batch, lengths)


def test_compute_dtype_bfloat16_keeps_the_files_dtype(tmp_path):
    directory = save_random(tmp_path / "m", LLAMA, mx.bfloat16)
    whole, streamed = in_memory(directory, mx.bfloat16, **LORA), slowft.open_model(directory, compute_dtype="bfloat16")
    streamed.add_lora(**LORA)
    randomise(whole, streamed)
    batch, lengths = random_batch(LLAMA["vocab_size"])
    assert_step_equals(whole, streamed, batch, lengths)


@pytest.mark.parametrize("bits, mode, group_size", [(4, "affine", 32), (8, "affine", 64), (4, "mxfp4", 32)])
def test_quantized_base_equals_its_dequantized_weights(bits, mode, group_size, tmp_path):
    """Against mlx-lm in memory on the weights as `mx.dequantize` gives them in float32."""
    packed = save_quantized(tmp_path / "packed", save_random(tmp_path / "dense", LLAMA), bits, mode, group_size)
    whole, _ = load_model(packed)
    scales_to_float32 = tree_map(lambda p: p.astype(mx.float32) if p.dtype == mx.float16 else p, whole.parameters())
    whole.update(scales_to_float32)
    whole = dequantize_model(whole)
    whole.update(tree_map(lambda p: p.astype(mx.float32), whole.parameters()))
    whole.freeze()
    attach_in_memory(whole, **LORA)
    streamed = slowft.open_model(packed, compute_dtype="float32")
    streamed.add_lora(**LORA)
    randomise(whole, streamed)
    batch, lengths = random_batch(LLAMA["vocab_size"])
    loss, gradients = reference(whole, batch, lengths)
    (streamed_loss, _), streamed_gradients = streamed.loss_and_grads(batch, lengths)
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0


@pytest.mark.parametrize("bits, mode, group_size", [(4, "affine", 32), (8, "affine", 64), (4, "mxfp4", 32)])
def test_quantized_base_stays_packed_on_a_gpu(bits, mode, group_size, tmp_path, monkeypatch):
    """What a GPU does (no compute dtype: files' own, packed weights multiplied as they are), on the CPU backend."""
    dense = save_random(tmp_path / "dense", LLAMA, mx.bfloat16)
    packed = save_quantized(tmp_path / "packed", dense, bits, mode, group_size)
    monkeypatch.setattr("slowft.engine.model.compute_dtype_of", lambda name: None)
    whole, _ = load_model(packed)
    whole.freeze()
    attach_in_memory(whole, **LORA)
    streamed = slowft.open_model(packed).add_lora(**LORA)
    randomise(whole, streamed)
    batch, lengths = random_batch(LLAMA["vocab_size"])
    assert_step_equals(whole, streamed, batch, lengths)


def test_micro_batches_are_normalised_by_their_tokens_together(llama):
    whole, streamed = pair(llama)
    batches = [random_batch(256, rows, tokens, seed=rows) for rows, tokens in ((3, 24), (1, 40), (2, 9))]
    loss_sum, gradient_sum, tokens = 0.0, None, 0
    for batch, lengths in batches:
        (loss, ntoks), gradients = nn.value_and_grad(whole, default_loss)(whole, batch, lengths)
        weighted = tree_map(lambda g, n=ntoks: g * n, gradients)
        gradient_sum = weighted if gradient_sum is None else tree_map(mx.add, gradient_sum, weighted)
        loss_sum, tokens = loss_sum + loss.item() * ntoks.item(), tokens + ntoks.item()
    expected = tree_map(lambda g: g / tokens, gradient_sum)
    (loss, ntoks), gradients = streamed.loss_and_grads(batches)
    assert ntoks.item() == tokens
    assert loss.item() == pytest.approx(loss_sum / tokens, rel=1e-6)
    assert largest_difference(expected, gradients) <= 1e-6 * largest(expected)


def test_one_micro_batch_in_a_list_is_the_batch_itself(llama):
    _, streamed = pair(llama)
    batch, lengths = random_batch(256)
    (loss, _), gradients = streamed.loss_and_grads(batch, lengths)
    (loss_of_list, _), gradients_of_list = streamed.loss_and_grads([(batch, lengths)])
    assert loss.item() == loss_of_list.item()
    assert largest_difference(gradients, gradients_of_list) == 0.0


# --- Dropout ----------------------------------------------------------------------------------------


class SeededBlocks:
    """Sets slowft's documented seeds before each block of a model in memory: the reference for dropout."""

    def __init__(self, model):
        self.seed, self.step, self.micro_batch = 0, 0, 0
        for i, block in enumerate(model.layers):
            cls = type(block)

            def call(this, *args, cls=cls, i=i, **kwargs):
                mx.random.seed(slowft.dropout_seed(self.seed, self.step, i, self.micro_batch))
                return cls.__call__(this, *args, **kwargs)

            block.__class__ = type(cls.__name__, (cls,), {"__call__": call})


def test_ten_steps_with_dropout_end_with_the_same_adapter(llama):
    whole, streamed = pair(llama, dropout=0.2)
    keys = SeededBlocks(whole)
    optimizers = optim.AdamW(1e-2), optim.AdamW(1e-2)
    streamed.seed = keys.seed = 11
    for step in range(10):
        keys.step = step
        batch, lengths = random_batch(256, seed=step)
        _, gradients = reference(whole, batch, lengths)
        optimizers[0].update(whole, gradients)
        _, gradients = streamed.loss_and_grads(batch, lengths)
        optimizers[1].update(streamed, gradients)
        mx.eval(whole.trainable_parameters(), streamed.trainable_parameters())
    assert largest_difference(whole.trainable_parameters(), streamed.trainable_parameters()) == 0.0


def test_dropout_differs_between_steps_and_micro_batches(llama):
    _, streamed = pair(llama, dropout=0.5)
    batch, lengths = random_batch(256)

    def loss_at(step: int, n: int = 1) -> float:
        streamed.step = step
        return streamed.loss_and_grads([(batch, lengths)] * n)[0][0].item()

    assert loss_at(0) == loss_at(0)
    assert loss_at(0) != loss_at(1)
    assert loss_at(0) != loss_at(0, n=2)  # the second micro-batch has masks of its own


def test_two_micro_batches_with_dropout_equal_in_memory(llama):
    whole, streamed = pair(llama, dropout=0.3)
    keys = SeededBlocks(whole)
    batches = [random_batch(256, seed=s) for s in (5, 6)]
    total = sum(default_loss(whole, *b)[1].item() for b in batches)
    expected = None
    for i, (batch, lengths) in enumerate(batches):
        keys.micro_batch = i
        (_, ntoks), gradients = nn.value_and_grad(whole, default_loss)(whole, batch, lengths)
        part = tree_map(lambda g, n=ntoks: g * (n.item() / total), gradients)
        mx.eval(part)
        expected = part if expected is None else tree_map(mx.add, expected, part)
    _, gradients = streamed.loss_and_grads(batches)
    assert largest_difference(expected, gradients) <= 1e-6 * largest(expected)


# --- An ordinary model --------------------------------------------------------------------------------


def test_logits_equal_in_memory(llama):
    whole, streamed = pair(llama)
    batch, _ = random_batch(256)
    assert mx.array_equal(whole(batch), streamed(batch))


def test_generation_with_a_key_value_cache_equals_in_memory(llama_with_tokenizer):
    from mlx_lm.generate import generate_step

    whole, streamed = in_memory(llama_with_tokenizer), slowft.open_model(llama_with_tokenizer)
    prompt = mx.array([5, 17, 99, 4])
    expected = [token for token, _ in generate_step(prompt, whole, max_tokens=12)]
    assert [token for token, _ in generate_step(prompt, streamed, max_tokens=12)] == expected


def test_gradient_of_the_input_embeddings_equals_in_memory(llama):
    """A gradient nobody trains by still flows through all blocks, below the lowest adapter too."""
    whole, streamed = pair(llama, num_layers=1)
    batch, _ = random_batch(256)
    mx.random.seed(4)
    embeddings = mx.random.normal((*batch.shape, 64))
    gradients = [
        mx.grad(lambda e, m=m: (m(batch, input_embeddings=e) ** 2).sum())(embeddings) for m in (whole, streamed)
    ]
    assert mx.array_equal(*gradients) and mx.abs(gradients[0]).max().item() > 1e-3


def test_a_model_called_twice_in_one_loss_equals_in_memory(llama):
    whole, streamed = pair(llama)
    (batch, lengths), (other, _) = random_batch(256), random_batch(256, seed=9)

    def loss(model):
        return default_loss(model, batch, lengths)[0] + (mx.softmax(model(other)) ** 2).sum()

    (value, gradients), (streamed_value, streamed_gradients) = (
        nn.value_and_grad(m, loss)(m) for m in (whole, streamed)
    )
    assert value.item() == streamed_value.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0


def test_derivatives_that_would_come_out_as_zero_are_refused(llama):
    _, streamed = pair(llama)
    batch, lengths = random_batch(256)

    def penalty(model):
        gradients = nn.value_and_grad(model, lambda m: default_loss(m, batch, lengths)[0])(model)[1]
        return sum((array**2).sum() for _, array in tree_flatten(gradients))

    with pytest.raises(slowft.SlowftError, match="second derivatives"):
        mx.eval(nn.value_and_grad(streamed, penalty)(streamed))
    embeddings = mx.random.normal((*batch.shape, 64))
    with pytest.raises(slowft.SlowftError, match="forward-mode"):
        mx.jvp(lambda e: streamed(batch, input_embeddings=e), [embeddings], [embeddings])


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_partly_frozen_adapters_equal_in_memory(frozen, llama, tmp_path):
    whole, streamed = pair(llama)
    for model in (whole, streamed):
        model.freeze(keys=[frozen], strict=False)
    batch, lengths = random_batch(256)
    loss, gradients = reference(whole, batch, lengths)
    for streamed_loss, streamed_gradients in (
        reference(streamed, batch, lengths),
        (streamed.loss_and_grads(batch, lengths)[0][0], streamed.loss_and_grads(batch, lengths)[1]),
    ):
        assert streamed_loss.item() == loss.item()
        assert largest_difference(gradients, streamed_gradients) == 0.0
    streamed.save_adapter(tmp_path / "a")
    again = slowft.open_model(llama, adapter_path=tmp_path / "a")
    assert mx.array_equal(again(batch), streamed(batch))


def test_one_frozen_block_equals_in_memory(llama):
    whole, streamed = pair(llama)
    for model in (whole, streamed):
        model.layers[0].freeze()
        model.layers[2].freeze()
    batch, lengths = random_batch(256)
    assert_step_equals(whole, streamed, batch, lengths)


def test_base_weights_cannot_be_trained(llama):
    _, streamed = pair(llama)
    streamed.layers[0].unfreeze()
    with pytest.raises(slowft.SlowftError, match="base weights stay on disk"):
        streamed.loss_and_grads(*random_batch(256))


def test_compiled_model_says_how_to_turn_it_off(llama):
    streamed = slowft.open_model(llama)
    with pytest.raises(slowft.SlowftError, match=r"mx\.disable_compile"):
        mx.compile(lambda tokens: streamed(tokens))(mx.array([[1, 2, 3]]))


def test_step_without_trained_token_is_an_error(llama):
    _, streamed = pair(llama)
    with pytest.raises(slowft.SlowftError, match="no token"):
        streamed.loss_and_grads(mx.array([[1, 2, 3]]), mx.array([[9, 2]]))


def test_a_function_that_fails_while_traced_leaves_the_model_usable(llama):
    whole, streamed = pair(llama)
    batch, lengths = random_batch(256)
    with pytest.raises(slowft.SlowftError, match="outside of"):
        nn.value_and_grad(streamed, default_loss)(streamed, batch + 500, lengths)
    assert_step_equals(whole, streamed, batch, lengths)


def test_a_closed_model_says_so(llama):
    _, streamed = pair(llama)
    streamed.close()
    streamed.close()
    for use in (lambda: streamed(mx.array([[1, 2]])), lambda: streamed.loss_and_grads(*random_batch(256))):
        with pytest.raises(slowft.SlowftError, match="closed"):
            use()


def test_models_that_are_dropped_close_their_files(llama):
    import gc
    import os

    def open_files() -> int:
        return len(os.listdir("/dev/fd"))

    before = open_files()
    for _ in range(5):
        slowft.open_model(llama).loss(*random_batch(256))
    gc.collect()
    assert open_files() <= before + 1


@pytest.mark.parametrize(
    "arguments",
    [
        ([],),
        (mx.array([1, 2, 3]), mx.array([[1, 2]])),
        (mx.array([[1.0, 2.0]]), mx.array([[1, 2]])),
        (mx.array([[1, 2, 3]]), mx.array([1, 2])),
        ([mx.array([[1, 2, 3]])],),
    ],
    ids=["nothing", "one axis", "floats", "lengths of one axis", "no lengths"],
)
def test_batches_of_the_wrong_shape_are_named(arguments, llama):
    _, streamed = pair(llama)
    with pytest.raises(slowft.SlowftError, match="batch|lengths"):
        streamed.loss_and_grads(*arguments)


def test_what_would_lose_the_weights_is_refused(llama, tmp_path):
    import copy
    import pickle

    streamed = slowft.open_model(llama)
    for act in (copy.deepcopy, pickle.dumps, lambda m: m.save_weights(str(tmp_path / "w.safetensors"))):
        with pytest.raises(slowft.SlowftError):
            act(streamed)
    assert not (tmp_path / "w.safetensors").exists()


def test_failure_in_a_step_leaves_the_model_usable(llama):
    whole, streamed = pair(llama)
    batch, lengths = random_batch(256)
    with pytest.raises(slowft.SlowftError, match="token id 256"):
        streamed.loss_and_grads([(batch, lengths), (mx.full((1, 8), 256), mx.array([[1, 7]]))])
    assert_step_equals(whole, streamed, batch, lengths)
