"""What `import slowft` gives, and how models are opened and closed with it."""

import ast
from pathlib import Path

import pytest

import slowft
from conftest import random_batch


def test_names_that_editors_see_are_those_that_can_be_imported():
    tree = ast.parse(Path(slowft.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(alias.asname, f"slowft.{node.module}") for node in block.body for alias in node.names}
    assert {name for name, _ in seen} == set(slowft.__all__) - {"__version__"}
    for name, module in seen:
        assert getattr(slowft, name).__module__ == module
    assert (Path(slowft.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'open_modell'"):
        _ = slowft.open_modell


def test_a_model_is_closed_at_the_end_of_its_with(llama):
    batch, lengths = random_batch(256)
    with slowft.open_model(llama) as model:
        assert model.loss(batch, lengths)[0].item() > 0
    with pytest.raises(slowft.SlowftError, match="closed"):
        model.loss(batch, lengths)


def test_expected_adapters_count_in_plans_and_take_no_memory(llama):
    with slowft.open_model(llama) as planned, slowft.open_model(llama) as model:
        planned.expect_lora(num_layers=-1, rank=8)
        model.add_lora(num_layers=-1, rank=8)
        of_both = [m.plan(2, 24).job.trainable_nbytes for m in (planned, model)]
        assert of_both[0] == of_both[1] > 0
        with pytest.raises(slowft.ConfigError, match="attached already"):
            planned.add_lora()
