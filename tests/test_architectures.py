"""Every model type of mlx-lm, A to K: streamed as in memory, or refused with its reason. L to Z are in another file,
so that two workers share them."""

import importlib.util
import json

import mlx.core as mx
import pytest

import slowft
from architectures import HELPERS, LORA, MODEL_TYPES, REFUSED
from conftest import random_batch
from matrix import TABLE, modules, refused_row, save, stand_in_for_hf_olmo, start, verify

TYPES = [name for name in MODEL_TYPES if name not in REFUSED and name.lower() < "l"]


def test_every_module_of_the_installed_mlx_lm_is_accounted_for():
    """A new mlx-lm with new models fails here: give each a configuration in architectures.py."""
    assert modules() == sorted({*MODEL_TYPES, *HELPERS})
    assert len(REFUSED) <= 3


@pytest.mark.parametrize("name", TYPES)
def test_streamed_as_in_memory(name, tmp_path):
    assert verify(tmp_path, name) in TABLE.read_text().splitlines(), "write it anew: python tests/matrix.py"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name, tmp_path):
    assert refused_row(name) in TABLE.read_text().splitlines(), "write it anew: python tests/matrix.py"
    with stand_in_for_hf_olmo(), pytest.raises(slowft.SlowftError, match=REFUSED[name][1]) as error:
        slowft.open_model(save(tmp_path / "m", name)).add_lora()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    importlib.util.find_spec("hf_olmo") is not None, reason="the package that mlx-lm's olmo needs is here"
)
def test_olmo_without_its_package_is_refused_not_left(tmp_path):
    """mlx-lm's module for it ends the process that imports it."""
    with stand_in_for_hf_olmo():
        save(tmp_path / "m", "olmo")
    with pytest.raises(slowft.SlowftError, match="without a package that is not installed"):
        slowft.open_model(tmp_path / "m")


def test_table_has_a_line_for_each_and_no_other():
    text = TABLE.read_text()
    assert text.startswith(start()), "write it anew: python tests/matrix.py"
    lines = text.removeprefix(start()).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == sorted(MODEL_TYPES, key=str.lower)


def test_lora_stays_off_layers_whose_weights_the_model_uses_itself(tmp_path):
    """gemma3n clips those of its altup; mlx-lm's default, every linear layer, fails there in the first step."""
    directory = save(tmp_path / "m", "gemma3n")
    streamed = slowft.open_model(directory).add_lora(num_layers=-1, rank=2).train()
    assert any("altup" in note for note in streamed.adapter_notes)
    batch, lengths = random_batch(96)
    (loss, _), _ = streamed.loss_and_grads(batch, lengths)
    assert mx.isfinite(loss).item()
    adapter = streamed.save_adapter(tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_parameters"]
    assert set(saved["keys"]) == set(LORA["gemma3n"][0]["keys"])
    again = slowft.open_model(directory, adapter_path=tmp_path / "a")
    assert again.adapter_notes == [] and adapter.exists()
    with pytest.raises(slowft.SlowftError, match="altup.prediction_coefs: the model uses its weight itself"):
        slowft.open_model(directory).add_lora(keys=["altup.prediction_coefs", "self_attn.q_proj"])
