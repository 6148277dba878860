"""A run that was stopped, whenever and however, goes on as if it had not been: to the same bits."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import faults
from conftest import LLAMA, save_random
from faults import Rule
from slowft import platform
from slowft.data.store import TokenDataset
from slowft.errors import AdapterError, ConfigError, Interrupted
from slowft.reports.base import Report
from slowft.training import checkpoint as checkpoints
from slowft.training import status
from slowft.training.config import TrainConfig
from slowft.training.stopping import Stop, parse_seconds


class Notes(Report):
    """Collects what a run says."""

    def __init__(self):
        self.notes, self.losses, self.valid = [], {}, {}

    def note(self, text):
        self.notes.append(text)

    def trained(self, info):
        self.losses[info["iteration"]] = info["train_loss"]

    def validated(self, info):
        self.valid[info["iteration"]] = info["val_loss"]


def samples(n: int, seed: int = 0) -> TokenDataset:
    rng = np.random.default_rng(seed)
    made = [(rng.integers(3, 90, rng.integers(5, 60)).astype(np.int32), 0) for _ in range(n)]
    return TokenDataset(made, [f"{seed} {i}" for i in range(n)])


TRAIN, VALID = samples(22), samples(6, 1)
OPTIONS = {
    "iters": 12,
    "batch_size": 2,
    "num_layers": -1,
    "grad_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lora_parameters": {"rank": 4, "dropout": 0.1, "scale": 2.0},
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-2, 6], "warmup": 2},
    "steps_per_report": 2,
    "steps_per_eval": 4,
    "save_every": 2,
}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("resume") / "llama", LLAMA)


def run(model_directory, adapter: Path, memory=None, report=None, train=TRAIN, valid=VALID, before=None, **options):
    """One run; returns what `fit` returned."""
    config = TrainConfig(adapter_path=str(adapter), **(OPTIONS | options))
    with slowft.open_model(model_directory, memory) as model:
        trainer = slowft.Trainer(model, config, report)
        if before is not None:
            before(trainer)
        return trainer.fit(train, valid)


def weights(adapter: Path) -> dict:
    return {name: np.array(array).tobytes() for name, array in mx.load(str(adapter / "adapters.safetensors")).items()}


@pytest.fixture(scope="module")
def whole(model_directory, tmp_path_factory) -> tuple[Path, Notes]:
    """A run that was never stopped."""
    adapter, notes = tmp_path_factory.mktemp("whole") / "adapter", Notes()
    run(model_directory, adapter, report=notes)
    return adapter, notes


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def killed_after(n: int):
    """Ends the run in the middle of its `n`th step."""

    def before(trainer):
        real, steps = trainer.model.loss_and_grads, iter(range(n))

        def step(*args):
            result = real(*args)
            if next(steps, None) is None:
                raise Killed
            return result

        object.__setattr__(trainer.model, "loss_and_grads", step)

    return before


@pytest.mark.parametrize("save_every", [2, 4])
@pytest.mark.parametrize("n", range(1, 6))
def test_a_run_goes_on_to_the_same_bits(n, save_every, whole, model_directory, tmp_path):
    adapter, notes = tmp_path / "adapter", Notes()
    with pytest.raises(Killed):
        run(model_directory, adapter, before=killed_after(n), save_every=save_every)
    if save_every == 4 and n == 1:
        with pytest.raises(AdapterError, match="has no checkpoint"):
            run(model_directory, adapter, resume=True, save_every=save_every)
        return
    run(model_directory, adapter, report=notes, resume=True, save_every=save_every)
    assert weights(adapter) == weights(whole[0])
    begun_at = min(notes.losses)
    for seen, expected in ((notes.losses, whole[1].losses), (notes.valid, whole[1].valid)):
        assert seen == {iteration: loss for iteration, loss in expected.items() if iteration >= begun_at}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adafactor"])
def test_every_optimizers_state_comes_back(optimizer, model_directory, tmp_path):
    more = {"optimizer": optimizer, "optimizer_config": {"sgd": {"momentum": 0.9}}}
    run(model_directory, tmp_path / "whole", **more)
    with pytest.raises(Killed):
        run(model_directory, tmp_path / "adapter", before=killed_after(3), **more)
    run(model_directory, tmp_path / "adapter", resume=True, **more)
    assert weights(tmp_path / "adapter") == weights(tmp_path / "whole")


def test_dora_in_bfloat16_goes_on(tmp_path):
    directory = save_random(tmp_path / "llama", LLAMA, mx.bfloat16)
    more = {"fine_tune_type": "dora"}
    run(directory, tmp_path / "whole", **more)
    with pytest.raises(Killed):
        run(directory, tmp_path / "adapter", before=killed_after(3), **more)
    run(directory, tmp_path / "adapter", resume=True, **more)
    assert weights(tmp_path / "adapter") == weights(tmp_path / "whole")


def test_the_work_is_cut_as_it_was_whatever_memory_the_second_half_has(tmp_path):
    """Begun with rows two by two; with much memory all four would go together, to other last bits."""
    config = LLAMA | {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 8}
    directory = save_random(tmp_path / "llama", config)
    rng = np.random.default_rng(0)
    rows = TokenDataset([(rng.integers(3, 90, 120).astype(np.int32), 0) for _ in range(12)], ["?"] * 12)
    more = {
        "train": rows,
        "valid": None,
        "batch_size": 4,
        "iters": 3,
        "save_every": 1,
        "lr_schedule": None,
        "grad_accumulation_steps": 1,
    }

    def cut(then=lambda trainer: None):
        return lambda trainer: (trainer.model.keep_cuts({"rows": 2}), then(trainer))

    run(directory, tmp_path / "whole", before=cut(), **more)
    for memory in (None, 2_000_000_000):
        adapter = tmp_path / f"adapter{memory}"
        with pytest.raises(Killed):
            run(directory, adapter, before=cut(killed_after(1)), **more)
        run(directory, adapter, memory=memory, resume=True, **more)
        assert weights(adapter) == weights(tmp_path / "whole")
    with pytest.raises(Killed):
        run(directory, tmp_path / "much", memory=2_000_000_000, before=killed_after(1), **more)
    with pytest.raises(ConfigError, match="give at least"):
        run(directory, tmp_path / "much", memory=200_000_000, resume=True, **more)
    run(directory, tmp_path / "much", memory=2_000_000_000, resume=True, **more)
    assert weights(tmp_path / "much") != weights(tmp_path / "whole")  # so that the above says something


def test_a_changed_model_data_file_or_option_is_named(whole, model_directory, tmp_path):
    adapter = tmp_path / "adapter"
    with pytest.raises(Killed):
        run(model_directory, adapter, before=killed_after(3))

    def refusal(directory=model_directory, **options) -> str:
        with pytest.raises(ConfigError) as error:
            run(directory, adapter, **({"resume": True} | options))
        return str(error.value)

    assert "another data" in refusal(train=samples(22, seed=5))
    assert "max_grad_norm (None, now 0.001)" in refusal(max_grad_norm=1e-3)
    other = save_random(tmp_path / "other", LLAMA)
    arrays = mx.load(str(other / "model.safetensors"))
    mx.save_safetensors(str(other / "model.safetensors"), {name: array * 2 for name, array in arrays.items()})
    assert "another model" in refusal(other)
    run(model_directory, adapter, resume=True, resume_anyway=True, max_grad_norm=1e-3)
    assert weights(adapter) != weights(whole[0])


def test_a_copy_of_the_model_is_the_same_model(whole, model_directory, tmp_path):
    import shutil

    with pytest.raises(Killed):
        run(model_directory, tmp_path / "adapter", before=killed_after(3))
    shutil.copytree(model_directory, tmp_path / "copy")
    run(tmp_path / "copy", tmp_path / "adapter", resume=True)
    assert weights(tmp_path / "adapter") == weights(whole[0])


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole, model_directory, tmp_path):
    adapter, notes = tmp_path / "adapter", Notes()
    with pytest.raises(Killed):
        run(model_directory, adapter, before=killed_after(4), keep_checkpoints=2)
    files = sorted((adapter / "checkpoints").glob("*.safetensors"))
    assert [file.name for file in files] == ["0000006.safetensors", "0000008.safetensors"]
    data = bytearray(files[1].read_bytes())
    data[-5] ^= 1
    files[1].write_bytes(data)
    run(model_directory, adapter, report=notes, resume=True, keep_checkpoints=2)
    assert any("0000008.safetensors is damaged" in note for note in notes.notes)
    assert weights(adapter) == weights(whole[0])


def test_mutated_checkpoints_are_an_error_or_the_same(model_directory, tmp_path):
    with pytest.raises(Killed):
        run(model_directory, tmp_path / "adapter", before=killed_after(2))
    (file,) = (tmp_path / "adapter" / "checkpoints").glob("*.safetensors")
    good, rng = file.read_bytes(), random.Random(0)
    expected = checkpoints.read(file)
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(3000, len(data)))
            data[at] = rng.randrange(256)
        file.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            found = checkpoints.read(file)
        except AdapterError:
            continue
        assert found.state == expected.state
        assert checkpoints.digest(found.arrays, "") == checkpoints.digest(expected.arrays, "")


def test_a_full_disk_loses_no_earlier_checkpoint(model_directory, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    with pytest.raises(Killed):
        run(model_directory, adapter, before=killed_after(2))
    before = {file.name: file.read_bytes() for file in (adapter / "checkpoints").iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slowft.platform, "sync_file", full)
    with pytest.raises(
        AdapterError, match="checkpoint in .*cannot be written: No space left on device.*Earlier ones are untouched"
    ):
        checkpoint = checkpoints.Checkpoints(adapter, 1)
        checkpoint.write(9, {"a": mx.zeros((2,))}, {})
        checkpoint.wait()
    with pytest.raises(AdapterError, match="No space left on device"):
        run(model_directory, adapter, resume=True)
    assert {file.name: file.read_bytes() for file in (adapter / "checkpoints").iterdir()} == before


def replaced(file: Path, content: bytes) -> None:
    other = file.with_name("other")
    other.write_bytes(content)
    os.replace(other, file)


CHANGES = {
    "another file was put in its place": replaced,
    "it was written to": lambda file, content: file.write_bytes(content),
    "bytes and has": lambda file, content: file.write_bytes(content[:-4096]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_shard_that_changes_while_training_is_named_and_nothing_is_lost(what, whole, model_directory, tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(model_directory, model)
    file = model / "model.safetensors"
    content, steps = file.read_bytes(), iter(range(3))

    def before(trainer):
        real = trainer.model.loss_and_grads

        def step(*args):
            if next(steps, None) is None:
                CHANGES[what](file, content)
            return real(*args)

        object.__setattr__(trainer.model, "loss_and_grads", step)

    with pytest.raises(slowft.ModelError, match=f"^{file} was changed while it was in use.*{what}.*Open it again$"):
        run(model, adapter, before=before)
    assert (adapter / "checkpoints" / "0000006.safetensors").exists()
    file.write_bytes(content)
    run(model, adapter, resume=True)
    assert weights(adapter) == weights(whole[0])


# --- Asked to stop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["step", "validation", "first validation"])
def test_a_signal_stops_after_the_step_with_a_checkpoint(where, number, whole, model_directory, tmp_path):
    adapter = tmp_path / "adapter"

    def before(trainer):
        name = "loss_and_grads" if where == "step" else "loss"
        real, calls = getattr(trainer.model, name), iter(range(1 if where == "first validation" else 4))

        def call(*args):
            if next(calls, None) is None:
                os.kill(os.getpid(), number)
            return real(*args)

        object.__setattr__(trainer.model, name, call)

    with pytest.raises(Interrupted, match="To go on: the same command with --resume") as stopped:
        run(model_directory, adapter, before=before, save_every=100)
    assert stopped.value.signal == number and status.read(adapter)["state"] == "stopped"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (status.read(adapter)["iteration"] == 0) == (where == "first validation")
    run(model_directory, adapter, resume=True, save_every=100)
    assert weights(adapter) == weights(whole[0])


def test_a_second_ctrl_c_stops_now(model_directory, tmp_path):
    def before(trainer):
        def call(*args):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

        object.__setattr__(trainer.model, "loss_and_grads", call)

    with pytest.raises(KeyboardInterrupt):
        run(model_directory, tmp_path / "adapter", before=before)


def test_a_run_in_another_thread_takes_no_signals(model_directory, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    results = []
    thread = threading.Thread(target=lambda: results.append(run(model_directory, tmp_path / "a", iters=2)))
    thread.start()
    thread.join()
    assert results[0]["train_loss"] and signal.getsignal(signal.SIGINT) is before


def test_time_that_is_over_ends_a_run_that_goes_on_later(whole, model_directory, tmp_path):
    adapter = tmp_path / "adapter"
    result = run(model_directory, adapter, max_time="0.001")
    assert "--max-time 0.001 is over after iteration 2" in result["stopped"]
    assert run(model_directory, adapter, resume=True)["train_loss"] == whole[1].losses[12]
    assert weights(adapter) == weights(whole[0])


def test_durations_are_read_as_people_write_them():
    assert [parse_seconds(text) for text in ("8h", "90m", "1h30m", "45", " 2D ")] == [28800, 5400, 5400, 45, 172800]
    for wrong in ("", "8x", "h", "-1", "0", "nan"):
        with pytest.raises(ConfigError, match="must be a time such as 8h"):
            parse_seconds(wrong)


@pytest.mark.parametrize(("is_mac", "clock"), [(False, "CLOCK_BOOTTIME"), (True, "CLOCK_MONOTONIC")])
def test_the_time_that_a_machine_sleeps_counts(is_mac, clock, monkeypatch):
    """Which is in this clock of each system and not in `time.monotonic`."""
    monkeypatch.setattr(platform, "MACOS", is_mac)
    now = {getattr(time, clock): 100.0}
    monkeypatch.setattr(time, "clock_gettime", lambda which: now[which])
    stop = Stop(3600)
    assert not stop.take([stop.asks])
    now[getattr(time, clock)] += 3601
    assert stop.take([stop.asks])


# --- Best, early, not a number ------------------------------------------------------------------------


def losing(monkeypatch, losses: list[float]) -> None:
    """Validation losses of the run, in turn."""
    left = iter(losses)
    monkeypatch.setattr(slowft.Trainer, "evaluate", lambda *_, **how: next(left))


def test_the_best_adapter_is_kept_and_no_better_one_ends_the_run(model_directory, tmp_path, monkeypatch):
    adapter, notes = tmp_path / "adapter", Notes()
    losing(monkeypatch, [5.0, 4.0, 3.0, 3.5, 3.2, 2.0])
    more = {"steps_per_eval": 2, "early_stop": 2, "keep": "best"}
    run(model_directory, adapter, report=notes, **more)
    assert any("validations in turn were no better than iteration 4" in note for note in notes.notes)
    assert any("adapters.safetensors is of iteration 4" in note for note in notes.notes)
    numbered = mx.load(str(adapter / "0000004_adapters.safetensors"))
    assert {name: np.array(array).tobytes() for name, array in numbered.items()} == weights(adapter)
    assert status.read(adapter)["best_iteration"] == 4 and status.read(adapter)["iteration"] == 8


def test_a_step_that_is_not_finite_is_named_and_not_applied(tmp_path):
    directory = save_random(tmp_path / "llama", LLAMA)
    weights_ = mx.load(str(directory / "model.safetensors"))
    name = "model.layers.2.mlp.down_proj.weight"
    weights_[name][0, 0] = float("nan")
    mx.save_safetensors(str(directory / "model.safetensors"), weights_)
    with pytest.raises(
        slowft.SlowftError, match="the loss is nan at iteration 1, first in micro-batch 1 of 2.*layers.2"
    ):
        run(directory, tmp_path / "adapter", valid=None)
    notes = Notes()
    run(directory, tmp_path / "adapter", valid=None, on_nan="skip", report=notes, iters=4)
    assert any("2 steps were skipped" in note for note in notes.notes)
    fresh = tmp_path / "fresh"
    run(directory, fresh, valid=None, on_nan="skip", iters=2)
    assert weights(tmp_path / "adapter") == weights(fresh)  # as it was initialised


def test_gradients_are_clipped_as_mlx_does(model_directory, tmp_path):
    seen = []

    def before(trainer):
        real = trainer.model.loss_and_grads
        object.__setattr__(trainer.model, "loss_and_grads", lambda *a: seen.append(real(*a)) or seen[-1])

    more = {"optimizer": "sgd", "iters": 2, "lr_schedule": None, "learning_rate": 1.0, "max_grad_norm": 0.01}
    run(model_directory, tmp_path / "none", **(more | {"learning_rate": 1e-30}))
    run(model_directory, tmp_path / "clipped", before=before, **more)
    start, end = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("none", "clipped"))
    moved = sum((mx.square(end[name] - start[name])).sum().item() for name in end) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


# --- Killed, for real ---------------------------------------------------------------------------------

RUN = """
import sys, json, pathlib
sys.path.insert(0, sys.argv[1])
import slowft
from slowft.models.imports import import_mlx_lm_without_tokenizers
import_mlx_lm_without_tokenizers()
from slowft.reports.base import Report
from test_resume import run

class Begun(Report):
    def begin(self, config, model):
        print("begun", flush=True)

options = json.loads(sys.argv[4])
if options.pop("spills"):
    from dataclasses import replace
    from slowft.engine.engine import Engine
    from slowft.training import fitting

    follow = Engine.follow
    spilling = {"spilled": 5, "in_memory": False, "keep_head": False}
    fitting.JOURNALLED_STEP_S, fitting.JOURNALLED_NBYTES_PER_S = -1.0, 1e12
    Engine.follow = lambda self, schedule, *more: follow(self, replace(schedule, **spilling), *more)
run(sys.argv[2], pathlib.Path(sys.argv[3]), report=Begun(), **options)
"""
KILLS = int(os.environ.get("SLOWFT_KILLS", 8))  # 100 take five minutes


def test_killed_at_any_moment_and_resumed_until_done_it_ends_with_the_same_adapter(
    whole, model_directory, tmp_path, tmp_path_factory
):
    """SIGKILL at moments drawn from a seed, from the first step on; some with another ceiling after the kill.

    On Linux, a third of the runs spill and are killed in the middle of that, or of writing a finished block. Another
    third, which spill and journal their steps too, have a slow disk.
    """
    library = None if slowft.platform.MACOS else faults.build(tmp_path)
    spilled = Rule("write", "*#*", error=-signal.SIGKILL)  # into a file without a name
    slow = Rule("[rw]*", ns_per_byte=50)  # 20 MB/s
    rng, adapter, kills, killed_with_a_checkpoint, takes_s = random.Random(0), tmp_path / "adapter", 0, 0, None
    killed_spilling = 0
    while True:
        has_checkpoint = any((adapter / "checkpoints").glob("[0-9]*.safetensors"))
        options = {"resume": has_checkpoint, "memory": rng.choice([None, 400_000_000, 800_000_000]), "spills": False}
        environment, is_timed = None, True
        if library is not None and takes_s is not None and kills % 3 and kills < KILLS:
            written = spilled if kills % 2 else replace(spilled, pattern="*/journal/*")
            rule = slow if kills % 3 == 1 else replace(written, first=rng.randint(1, 40))
            environment = faults.environment(library, tmp_path_factory.getbasetemp(), rule)
            options |= {"memory": options["memory"] or 400_000_000, "spills": True}
            is_timed = rule is slow
        command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(model_directory), str(adapter)]
        process = subprocess.Popen([*command, json.dumps(options)], stdout=-1, stderr=-1, text=True, env=environment)
        assert process.stdout.readline() == "begun\n", process.stderr.read()[-2000:]
        begin = time.perf_counter()
        if kills < KILLS and takes_s is not None and is_timed:
            time.sleep(rng.uniform(0, 0.8 * takes_s))
            process.kill()
        _, err = process.communicate(timeout=120)
        takes_s = takes_s or time.perf_counter() - begin  # of the first, which is not killed
        if process.returncode == -signal.SIGKILL:
            kills += 1
            killed_with_a_checkpoint += has_checkpoint
            killed_spilling += not is_timed
            continue
        assert process.returncode == 0, err[-2000:]
        assert weights(adapter) == weights(whole[0])
        if kills >= KILLS:
            break
        for file in (adapter / "checkpoints").iterdir():  # it was done too soon: once more from the beginning
            file.unlink()
    assert killed_with_a_checkpoint >= KILLS / 4
    assert library is None or killed_spilling >= KILLS / 5


def test_status_tells_of_a_run_that_was_killed(tmp_path, capsys, monkeypatch):
    from slowft.cli.main import main

    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    writer = status.Status(tmp_path)
    numbers = {"iteration": 3, "iters": 10, "train_loss": 1.5, "valid_loss": None, "best_iteration": None}
    sizes = {"memory_nbytes": 10**9, "peak_nbytes": 2 * 10**9, "read_nbytes": 10**10, "written_nbytes": 0}
    writer.write("running", iterations_per_second=0.5, seconds_left=14.0, **numbers, **sizes)

    def told(*options) -> str:
        monkeypatch.setattr("sys.argv", ["slowft", "status", str(tmp_path), *options])
        main()
        return capsys.readouterr().out

    assert "running, iteration 3 of 10" in told() and "14 s left" in told() and "train loss 1.500" in told()
    found = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(found | {"pid": int(done.stdout)}))
    assert "killed, iteration 3 of 10" in told() and "--resume" in told()
    assert json.loads(told("--json"))["state"] == "killed"
    with pytest.raises(AdapterError, match="no run writes its adapter there"):
        status.read(tmp_path / "nowhere")


def test_a_gentle_process_gives_way():
    if slowft.platform.MACOS:
        pytest.skip("its background class is not told to the process")
    code = "import slowft.platform as p, os; p.be_gentle(); print(os.nice(0))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "19"
