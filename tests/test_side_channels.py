"""Values that blocks hand on other than as their output: gradients follow, or the model is refused."""

import pytest
from mlx_lm.models import llama
from test_gradients import assert_step_equals, pair

import slowft
from conftest import LLAMA, random_batch, save_random


class Notes:
    """What blocks hand on in an object: a sum, and how many added to it."""

    def __init__(self):
        self.total, self.n = None, 0


def write_into_list(notes, x):
    notes.append(x)
    return sum(notes[1:], notes[0]) / len(notes)


def write_into_dict(notes, x):
    seen = notes.setdefault("seen", [])  # a container in a container
    seen.append(x)
    return sum(seen[1:], seen[0]) / len(seen)


def write_into_object(notes, x):
    notes.total = x if notes.total is None else notes.total + x
    notes.n += 1
    return notes.total / notes.n


@pytest.fixture
def handing_on(monkeypatch):
    """Gives a function that makes every block of a Llama write into one `make()`, and use what the others wrote."""
    call = llama.TransformerBlock.__call__

    def install(make, write, is_returned=False):
        def block(self, x, mask=None, cache=None, notes=None):
            out = call(self, x + 0.1 * write(notes, x), mask, cache)
            return (out, notes) if is_returned else out

        def blocks(self, inputs, *_):
            h, notes = self.embed_tokens(inputs), make()
            for layer in self.layers:
                out = layer(h, "causal", notes=notes)
                h, notes = out if is_returned else (out, notes)
            return self.norm(h)

        monkeypatch.setattr(llama.TransformerBlock, "__call__", block)
        monkeypatch.setattr(llama.LlamaModel, "__call__", blocks)

    return install


@pytest.mark.parametrize("is_returned", [False, True])
@pytest.mark.parametrize("make, write", [(list, write_into_list), (dict, write_into_dict), (Notes, write_into_object)])
def test_what_blocks_write_carries_gradients(make, write, is_returned, handing_on, tmp_path):
    handing_on(make, write, is_returned)
    whole, streamed = pair(save_random(tmp_path / "m", LLAMA))
    assert not streamed.engine.cut.is_chain
    assert_step_equals(whole, streamed, *random_batch(256))


def test_block_that_writes_into_an_array_it_is_handed_is_refused(tmp_path, monkeypatch):
    call = llama.TransformerBlock.__call__

    def write(self, x, *args, **kwargs):
        out = call(self, x, *args, **kwargs)
        x[:, 0] = out[:, 0]
        return out

    monkeypatch.setattr(llama.TransformerBlock, "__call__", write)
    with pytest.raises(slowft.SlowftError, match="writes into an array that it is handed"):
        slowft.open_model(save_random(tmp_path / "m", LLAMA))


def test_block_that_is_handed_a_layer_is_refused(tmp_path, monkeypatch):
    call = llama.TransformerBlock.__call__

    def handed(self, x, *args, norm=None, **kwargs):
        return norm(call(self, x, *args, **kwargs))

    def blocks(self, inputs, *_):
        h = self.embed_tokens(inputs)
        for layer in self.layers:
            h = layer(h, norm=self.norm)
        return h

    monkeypatch.setattr(llama.TransformerBlock, "__call__", handed)
    monkeypatch.setattr(llama.LlamaModel, "__call__", blocks)
    with pytest.raises(slowft.SlowftError, match="is handed or returns a RMSNorm"):
        slowft.open_model(save_random(tmp_path / "m", LLAMA))


@pytest.mark.parametrize("of_input", [False, True])
def test_block_may_keep_what_it_makes_of_its_weights_alone(of_input, tmp_path, monkeypatch):
    call = llama.TransformerBlock.__call__

    def keep(self, x, *args, **kwargs):
        self._scaled = 2 * self.input_layernorm.weight + (x.mean() if of_input else 0)
        return call(self, x * self._scaled, *args, **kwargs)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", keep)
    directory = save_random(tmp_path / "m", LLAMA)
    if of_input:
        with pytest.raises(slowft.SlowftError, match="keeps arrays on itself"):
            slowft.open_model(directory)
    else:
        whole, streamed = pair(directory)
        assert_step_equals(whole, streamed, *random_batch(256))


def test_block_that_changes_its_weights_with_every_call_is_refused(tmp_path, monkeypatch):
    call = llama.TransformerBlock.__call__

    def decay(self, *args, **kwargs):
        self.input_layernorm.weight = self.input_layernorm.weight * 0.9
        return call(self, *args, **kwargs)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", decay)
    with pytest.raises(slowft.SlowftError, match="keeps arrays on itself"):
        slowft.open_model(save_random(tmp_path / "m", LLAMA))


def test_block_that_keeps_arrays_in_training_only_is_refused_then(tmp_path, monkeypatch):
    call = llama.TransformerBlock.__call__

    def remember(self, x, *args, **kwargs):
        if self.training:
            self.last_input = x
        return call(self, x, *args, **kwargs)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", remember)
    streamed = slowft.open_model(save_random(tmp_path / "m", LLAMA)).add_lora(rank=2).train()
    with pytest.raises(slowft.SlowftError, match="keeps arrays on itself"):
        streamed.loss_and_grads(*random_batch(256))
