"""Training ends with the adapter that mlx-lm trains, and mlx-lm loads what it saved."""

import json
import math
import os
import types

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import lora
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches

import slowft
from conftest import in_memory, largest_difference, random_batch
from slowft.data.store import TokenDataset
from slowft.data.tokenizer import load_tokenizer
from slowft.reports.base import Report

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew potions in the dark".split()


def write_data(folder, n_train=24, n_valid=8):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", n_train), ("valid", n_valid)):
        lines = [json.dumps({"text": " ".join(rng.choice(WORDS, rng.integers(4, 12)))}) for _ in range(n)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(tmp_path, **options) -> slowft.TrainConfig:
    defaults = dict(
        iters=6, batch_size=2, num_layers=-1, learning_rate=1e-3, adapter_path=str(tmp_path / "adapter"), val_batches=-1
    )
    return slowft.TrainConfig(**(defaults | options))


def open_with_data(directory, tmp_path, **options):
    settings = config(tmp_path, **options)
    model = slowft.open_model(directory)
    tokenizer = load_tokenizer(model.path, model.embedding_rows)
    return model, settings, slowft.load_data(write_data(tmp_path / "data"), tokenizer, settings)


def adapter(directory) -> dict:
    return mx.load(str(directory / "adapters.safetensors"))


@pytest.mark.parametrize("options", [{}, {"fine_tune_type": "dora"}, {"num_layers": 2, "optimizer": "adamw"}], ids=str)
def test_run_ends_with_the_adapter_of_mlx_lm_lora(options, llama_with_tokenizer, tmp_path):
    """`mlx_lm.lora` itself, in memory, uncompiled, on the same data and seed: every adapter tensor equal."""
    model, settings, (train, valid, _) = open_with_data(llama_with_tokenizer, tmp_path, **options)
    slowft.Trainer(model, settings).fit(train, valid)
    theirs = tmp_path / "mlx-lm"
    arguments = lora.CONFIG_DEFAULTS | {
        **{k: v for k, v in vars(settings).items() if k in lora.CONFIG_DEFAULTS and v is not None},
        "optimizer_config": {},
        "model": str(llama_with_tokenizer),
        "data": str(tmp_path / "data"),
        "adapter_path": str(theirs),
        "train": True,
    }
    mx.disable_compile()
    try:
        lora.run(types.SimpleNamespace(**arguments))
    finally:
        mx.enable_compile()
    assert largest_difference(adapter(tmp_path / "adapter"), adapter(theirs)) == 0.0


def test_mlx_lms_own_trainer_runs_on_a_streamed_model(llama_with_tokenizer, tmp_path):
    from mlx_lm.tuner.trainer import TrainingArgs, train

    adapters = {}
    _, _, (samples, _, _) = open_with_data(llama_with_tokenizer, tmp_path)
    for name in ("memory", "streamed"):
        lora = {"num_layers": -1, "rank": 4, "scale": 2.0}
        if name == "memory":
            model = in_memory(llama_with_tokenizer, **lora)
        else:
            model = slowft.open_model(llama_with_tokenizer).add_lora(**lora)
        mx.random.seed(5)
        model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.05, model.trainable_parameters()))
        mx.eval(model.trainable_parameters())
        np.random.seed(0)
        file = tmp_path / f"{name}.safetensors"
        mx.disable_compile()
        try:
            train(
                model,
                optim.Adam(1e-3),
                samples,
                samples,
                TrainingArgs(batch_size=2, iters=4, val_batches=1, max_seq_length=64, adapter_file=str(file)),
            )
        finally:
            mx.enable_compile()
        adapters[name] = mx.load(str(file))
    assert largest_difference(adapters["memory"], adapters["streamed"]) == 0.0


def test_saved_adapter_gives_mlx_lm_the_same_logits(llama_with_tokenizer, tmp_path):
    model, settings, (train, valid, _) = open_with_data(llama_with_tokenizer, tmp_path, learning_rate=1e-2)
    slowft.Trainer(model, settings).fit(train, valid)
    model.eval()
    whole, _ = mlx_lm.load(str(llama_with_tokenizer), adapter_path=str(tmp_path / "adapter"))
    bare, _ = mlx_lm.load(str(llama_with_tokenizer))
    batch, _ = random_batch(250)
    assert mx.array_equal(whole(batch), model(batch))
    assert not mx.allclose(bare(batch), model(batch), atol=1e-3)
    again = slowft.open_model(llama_with_tokenizer, adapter_path=tmp_path / "adapter")
    again.eval()
    assert mx.array_equal(again(batch), model(batch))
    assert largest_difference(again.trainable_parameters(), model.trainable_parameters()) == 0.0


def test_accumulated_gradient_is_normalised_by_all_tokens(llama_with_tokenizer, tmp_path):
    """One optimizer step over four micro-batches equals one over their union, summed by tokens, in memory."""
    options = {"iters": 4, "grad_accumulation_steps": 4, "optimizer": "sgd", "learning_rate": 0.5}
    model, settings, (train, _, _) = open_with_data(llama_with_tokenizer, tmp_path, **options)
    whole = in_memory(llama_with_tokenizer)
    mx.random.seed(settings.seed)
    from mlx_lm.tuner.utils import linear_to_lora_layers

    linear_to_lora_layers(whole, -1, settings.lora_parameters)
    data = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(llama_with_tokenizer, None)
    np.random.seed(settings.seed)
    batches = list(zip(range(4), iterate_batches(CacheDataset(TextDataset(data, tokenizer)), 2, 2048)))
    batches = [batch for _, batch in batches]
    total = sum(default_loss(whole, *b)[1].item() for b in batches)

    def loss(model):
        return sum(default_loss(model, *b)[0] * default_loss(model, *b)[1] for b in batches) / total

    _, gradients = nn.value_and_grad(whole, loss)(whole)
    optim.SGD(0.5).update(whole, gradients)
    slowft.Trainer(model, settings).fit(train)
    ours = dict(tree_flatten(model.trainable_parameters()))
    for name, array in tree_flatten(whole.trainable_parameters()):
        assert mx.allclose(array, ours[name], rtol=1e-5, atol=1e-6), name


def test_checkpoints_are_numbered_and_complete(llama_with_tokenizer, tmp_path):
    model, settings, (train, valid, _) = open_with_data(llama_with_tokenizer, tmp_path, save_every=2)
    slowft.Trainer(model, settings).fit(train, valid)
    names = sorted(os.listdir(tmp_path / "adapter"))
    assert names == [
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
        "0000006_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "checkpoints",
        "status.json",
    ]
    entries = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert entries["lora_parameters"] == {"rank": 8, "scale": 20.0, "dropout": 0.0}
    assert entries["fine_tune_type"] == "lora" and entries["num_layers"] == -1


def test_a_failed_save_keeps_the_earlier_adapter(llama_with_tokenizer, tmp_path, monkeypatch):
    model, settings, (train, _, _) = open_with_data(llama_with_tokenizer, tmp_path)
    trainer = slowft.Trainer(model, settings)
    trainer.fit(train)
    folder = tmp_path / "adapter"
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    model.seed = trainer.config.seed = 7  # so that the configuration to be written is another one

    def disk_full(file, arrays, *args):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", disk_full)
    with pytest.raises(slowft.SlowftError, match="No space left"):
        trainer.save(numbered=99)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_evaluation_is_mlx_lms(llama_with_tokenizer, tmp_path):
    from mlx_lm.tuner.trainer import evaluate

    model, settings, (train, valid, _) = open_with_data(llama_with_tokenizer, tmp_path)
    whole = in_memory(llama_with_tokenizer)
    expected = evaluate(whole, valid, batch_size=2, num_batches=-1)
    assert slowft.Trainer(model, settings).evaluate(valid) == pytest.approx(expected, rel=1e-5)


def test_validation_loss_falls(llama_with_tokenizer, tmp_path):
    model, settings, (train, valid, _) = open_with_data(llama_with_tokenizer, tmp_path, iters=30, learning_rate=1e-2)
    result = slowft.Trainer(model, settings).fit(train, valid)
    assert result["valid_loss"] < result["valid_loss_before"] - 0.3


def test_resumed_adapter_file_is_where_training_starts(llama_with_tokenizer, tmp_path):
    model, settings, (train, _, _) = open_with_data(llama_with_tokenizer, tmp_path)
    slowft.Trainer(model, settings).fit(train)
    file = tmp_path / "adapter" / "adapters.safetensors"
    again = slowft.open_model(llama_with_tokenizer)
    slowft.Trainer(again, config(tmp_path, resume_adapter_file=str(file))).attach()
    assert largest_difference(again.trainable_parameters(), model.trainable_parameters()) == 0.0


def test_learning_rate_schedule_is_mlx_lms(llama_with_tokenizer, tmp_path):
    from mlx_lm.tuner.utils import build_schedule

    schedule = {"name": "cosine_decay", "warmup": 2, "arguments": [1e-3, 6]}
    told = []

    class Rates(Report):
        def trained(self, info):
            told.append(info["learning_rate"])

    model, settings, (train, _, _) = open_with_data(
        llama_with_tokenizer, tmp_path, lr_schedule=schedule, steps_per_report=1
    )
    slowft.Trainer(model, settings, Rates()).fit(train)
    expected = build_schedule(schedule)
    assert told == pytest.approx([expected(mx.array(step)).item() for step in range(6)], rel=1e-5)


def test_nan_loss_stops_before_the_adapter_is_touched(llama_with_tokenizer, tmp_path):
    model, settings, (train, _, _) = open_with_data(llama_with_tokenizer, tmp_path)
    slowft.Trainer(model, settings).attach()
    model.update(tree_map(lambda p: p * float("nan"), model.trainable_parameters()))
    with pytest.raises(slowft.SlowftError, match="loss is nan at iteration 1"):
        slowft.Trainer(model, settings).fit(train)
    assert not (tmp_path / "adapter").exists()


def test_samples_of_ones_own_need_no_files(llama, tmp_path):
    """The trainer takes any sequence of (tokens, offset)."""
    samples = TokenDataset([(np.arange(1, 20 + i, dtype=np.int32), 0) for i in range(8)], [str(i) for i in range(8)])
    model = slowft.open_model(llama)
    result = slowft.Trainer(model, config(tmp_path)).fit(samples, [(list(range(30)), 0)] * 4)
    assert math.isfinite(result["train_loss"]) and math.isfinite(result["valid_loss"])
