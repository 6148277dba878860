"""Every model type of mlx-lm, L to Z (see test_architectures.py), and every kind of them within a memory ceiling."""

import pytest

from architectures import MODEL_TYPES, REFUSED
from matrix import TABLE, assert_equal, expected, opened, save, verify

TYPES = [name for name in MODEL_TYPES if name not in REFUSED and name.lower() >= "l"]

# One of each kind.
KINDS = {
    "hunyuan": "blocks return tuples: keys and values of other blocks",
    "gemma4_text": "per-layer inputs, keys and values of other blocks, experts",
    "afm7": "keys and values handed on in a cache, two lists of blocks",
    "kimi_k3": "residuals handed on in an object, delta attention, experts",
    "deepseek_v41": "a dict and a cache that blocks write into",
    "deepseek_v3": "multi-latent attention, experts: a chain",
    "granitemoehybrid": "state space and attention: a chain",
    "iquestloopcoder": "the model's call goes past its blocks",
}


@pytest.mark.parametrize("name", TYPES)
def test_streamed_as_in_memory(name, tmp_path):
    assert verify(tmp_path, name) in TABLE.read_text().splitlines(), "write it anew: python tests/matrix.py"


@pytest.mark.parametrize("name", KINDS)
def test_plan_fits_the_kind(name, tmp_path):
    """Within a ceiling the plan keeps what this kind of block allows, and the step's numbers stay the same."""
    loss, gradients, adapters = expected(save(tmp_path / "m", name), name)
    streamed = opened(tmp_path / "m", name, adapters, memory="4GB")
    for _ in range(3):  # the first ones are measured
        assert_equal(name, streamed, loss, gradients)
    schedule = streamed.engine.schedule
    assert schedule.in_memory == streamed.engine.cut.is_chain
    assert schedule.resident_nbytes or schedule.in_memory  # there is room: something is kept
    streamed.close()
