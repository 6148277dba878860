"""A step that takes minutes is not lost by a kill: its finished blocks are found again, and give the same bits."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from conftest import LLAMA, save_random
from slowft.engine import engine
from slowft.engine.chain import Chain
from slowft.engine.engine import Engine
from slowft.engine.journal import StepJournal
from slowft.errors import Interrupted
from slowft.training import fitting
from slowft.training.checkpoint import Checkpoints
from slowft.weights.journal import Journal
from test_resume import VALID, Killed, Notes, killed_after, run, weights

OPTIONS = {"iters": 4, "save_every": 100, "memory": 400_000_000, "valid": None, "steps_per_report": 100}
VISITS = 9  # of four blocks there and back, and the head


@pytest.fixture
def journalled(monkeypatch):
    """Every step is long, and streams. `journalled(spilled)` also spills."""
    monkeypatch.setattr(fitting, "JOURNALLED_STEP_S", -1.0)
    monkeypatch.setattr(fitting, "JOURNALLED_NBYTES_PER_S", 1e12)
    follow = Engine.follow

    def streaming(spilled: int = 0) -> None:
        changes = {"in_memory": False, "keep_head": False, "spilled": spilled}
        monkeypatch.setattr(Engine, "follow", lambda self, s, *more: follow(self, replace(s, **changes), *more))

    streaming()
    return streaming


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("journal") / "llama", LLAMA)


@pytest.fixture(scope="module")
def whole(model_directory, tmp_path_factory) -> dict:
    """The adapter of a run that was never stopped, and was not journalled."""
    adapter = tmp_path_factory.mktemp("whole") / "adapter"
    run(model_directory, adapter, **OPTIONS)
    return weights(adapter)


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """What is computed: "3" a block forward, "-3" backward, "head"; of each step's first micro-batch."""
    found: list[str] = []
    forward, backward, head = Chain.forward, Chain.backward, Chain.loss_and_cotangent

    def noting(what: str, batch, result):
        found.extend([what] if batch.index == 0 else [])
        return result

    def forward_(self, i, batch, *args, **kwargs):
        return noting(f"{i}", batch, forward(self, i, batch, *args, **kwargs))

    monkeypatch.setattr(Chain, "forward", forward_)
    monkeypatch.setattr(Chain, "backward", lambda self, i, b, *more: noting(f"-{i}", b, backward(self, i, b, *more)))
    monkeypatch.setattr(Chain, "loss_and_cotangent", lambda self, b, *more: noting("head", b, head(self, b, *more)))
    return found


STEP = ["0", "1", "2", "3", "head", "-3", "-2", "-1", "-0"]


def killed_before(n: int, monkeypatch) -> None:
    """The process ends when it would write its `n`th piece."""
    real, left = Journal.write, iter(range(n))

    def write(self, *piece):
        if next(left, None) is None:
            self.finish_writing()
            raise Killed
        real(self, *piece)

    monkeypatch.setattr(Journal, "write", write)


# inputs h.1.0 to h.2.0; up to c.4.1; g.4; c.3.0; c.3.0 to g.2; c.1.0 to g.0, and the next step's h.1.0 to h.4.1; g.3
WAYS = [(3, "1"), (7, "head"), (3, "-3"), (1, "-3"), (6, "-1"), (4 + 8, "head"), (6, "-2")]


@pytest.mark.parametrize("spilled", [0, 3])
def test_only_what_is_missing_is_computed_again(
    spilled, model_directory, whole, journalled, computed, tmp_path, monkeypatch
):
    """A step has 21 pieces: 2 inputs of each block but the first, and of the head; then 2 cotangents and gradients."""
    journalled(spilled)
    # new pieces of a run until it is killed -> where the next one begins
    at = 0
    for is_first, (n, begins) in zip([True] + 6 * [False], WAYS):
        computed.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_before(n, patch)
            run(model_directory, tmp_path, resume=not is_first, **OPTIONS)
        assert computed == (STEP + STEP)[at : at + len(computed)]
        at = STEP.index(begins)
    computed.clear()
    run(model_directory, tmp_path, resume=True, **OPTIONS)
    assert computed == STEP[at:]
    assert weights(tmp_path) == whole
    assert not (tmp_path / "checkpoints" / "journal").exists()


def test_a_step_whose_checkpoint_is_missing_is_only_applied(model_directory, whole, journalled, computed, tmp_path):
    with pytest.raises(Killed):
        run(model_directory, tmp_path, before=killed_after(0), **OPTIONS)
    computed.clear()
    run(model_directory, tmp_path, resume=True, **OPTIONS)
    assert computed == STEP
    assert weights(tmp_path) == whole


def test_blocks_below_the_lowest_trained_leave_only_the_newest(tmp_path, journalled, computed, monkeypatch):
    """And what a GPU's run does: a piece is written when the next is handed in."""
    directory = save_random(tmp_path / "llama", LLAMA, mx.bfloat16)
    more = OPTIONS | {"num_layers": 2, "compute_dtype": "bfloat16"}
    run(directory, tmp_path / "whole", **more)
    monkeypatch.setattr(engine, "StepJournal", lambda *args, lags: StepJournal(*args, lags=True))
    adapter, journal = tmp_path / "adapter", tmp_path / "adapter" / "checkpoints" / "journal"
    computed.clear()
    for n, then in ((3, "0"), (2, "1"), (4, "2")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_before(n, patch)
            run(directory, adapter, resume=then != "0", **more)
        assert computed[0] == then
        computed.clear()
        if n == 3:
            assert sorted(file.name for file in journal.glob("*")) == ["h.1.0", "h.1.1", "h.2.0"]
        elif n == 2:
            assert sorted(file.name for file in journal.glob("*")) == ["h.2.0", "h.2.1", "h.3.0"]
    run(directory, adapter, resume=True, **more)
    assert weights(adapter) == weights(tmp_path / "whole")


def test_an_adapter_outside_the_blocks_goes_on(tmp_path, journalled, monkeypatch):
    directory = save_random(tmp_path / "llama", LLAMA | {"tie_word_embeddings": False})
    keys = ["self_attn.q_proj", "lm_head", "model.embed_tokens"]
    more = OPTIONS | {"lora_parameters": {"rank": 4, "dropout": 0.1, "scale": 2.0, "keys": keys}}
    run(directory, tmp_path / "whole", **more)
    adapter, is_begun = tmp_path / "adapter", False
    for n in (6, 5, 11, 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_before(n, patch)
            run(directory, adapter, resume=is_begun, **more)
        is_begun = True
    run(directory, adapter, resume=True, **more)
    assert weights(adapter) == weights(tmp_path / "whole")


def test_what_is_torn_or_of_another_step_is_computed_again(
    model_directory, whole, journalled, computed, tmp_path, monkeypatch
):
    def killed(n: int, **options) -> list[Path]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_before(n, patch)
            run(model_directory, tmp_path, **(OPTIONS | options))
        return sorted((tmp_path / "checkpoints" / "journal").glob("*"))

    def begun_at(n: int, **options) -> tuple[str, list[Path]]:
        computed.clear()
        files = killed(n, resume=True, **options)
        return computed[0], files

    files = killed(8)
    files[-1].write_bytes(files[-1].read_bytes()[:-1])  # h.4.1
    assert begun_at(1)[0] == "3"
    content = bytearray(files[-3].read_bytes())  # h.3.1
    content[-100] ^= 1
    files[-3].write_bytes(content)
    begun, files = begun_at(9)
    assert begun == "2"  # what comes after it is of no use, and not written again
    assert [file.name for file in files][:2] == ["c.3.0", "c.3.1"]
    files[1].write_bytes(b"")
    assert begun_at(0)[0] == "2"  # there is no h.3 any more
    begun, files = begun_at(2, resume_anyway=True, max_grad_norm=1.0)  # another run's step
    assert begun == "0" and "h.1.0" in [file.name for file in files]
    assert begun_at(2)[0] == "0"
    run(model_directory, tmp_path, resume=True, **OPTIONS)
    assert weights(tmp_path) == whole


def test_a_full_disk_is_said_once_and_the_run_goes_on(model_directory, whole, journalled, tmp_path, monkeypatch):
    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    notes = Notes()
    monkeypatch.setattr(slowft.weights.journal, "write_all", full)
    run(model_directory, tmp_path, report=notes, **OPTIONS)
    (said,) = [note for note in notes.notes if "No space left on device" in note]
    assert "journal: writing finished blocks failed" in said and "The run goes on without" in said
    assert weights(tmp_path) == whole
    assert not (tmp_path / "checkpoints" / "journal").exists()


def test_ctrl_c_finishes_the_block(model_directory, journalled, computed, tmp_path, monkeypatch):
    real, steps = Chain.backward, iter(range(2))

    def backward(self, position, batch, *args):
        if position == 2 and batch.index == 0 and next(steps) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, position, batch, *args)

    more = OPTIONS | {"valid": VALID, "steps_per_eval": 2, "steps_per_report": 2}
    run(model_directory, tmp_path / "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="iteration 2 and some blocks of the next"):
        patch.setattr(Chain, "backward", backward)
        run(model_directory, tmp_path / "adapter", **more)
    computed.clear()
    run(model_directory, tmp_path / "adapter", resume=True, **more)
    assert [what for what in computed if what[0] == "-"] == ["-1", "-0"]
    ends = [Checkpoints(tmp_path / name, 1).newest()[0] for name in ("whole", "adapter")]
    assert ends[0].state["progress"] == ends[1].state["progress"]  # losses, and what validation led to
    assert weights(tmp_path / "adapter") == weights(tmp_path / "whole")


@pytest.mark.parametrize("limit", [{"STEP_S": 120.0}, {"NBYTES_PER_S": 1e4}])
def test_steps_that_are_short_or_write_much_are_not_journalled(
    limit, journalled, model_directory, tmp_path, monkeypatch
):
    for name, value in limit.items():
        monkeypatch.setattr(fitting, f"JOURNALLED_{name}", value)
    monkeypatch.setattr(Journal, "write", None)
    run(model_directory, tmp_path, **(OPTIONS | {"iters": 2}))


# --- The pieces themselves ----------------------------------------------------------------------------


def test_arrays_come_back_as_they_lay_in_memory(tmp_path):
    mx.random.seed(0)
    base = mx.random.normal((3, 1, 5))
    arrays = [base, base.transpose(2, 1, 0), mx.expand_dims(base[0, 0], -2), mx.array(2.5), base.astype(mx.bfloat16).T]
    arrays += [mx.arange(6).reshape(2, 3), mx.as_strided(base.reshape(-1), (1, 15), (1, 1))]
    mx.eval(arrays)
    journal = Journal(tmp_path / "journal")
    journal.write("piece", arrays)
    for found, array in zip(journal.read("piece"), arrays, strict=True):
        assert found.dtype == array.dtype and mx.array_equal(found, array)
        assert memoryview(found).strides == memoryview(array).strides
    journal.write("gaps", [mx.broadcast_to(base, (2, 3, 1, 5))])
    assert "has gaps" in journal.problem and not journal.is_there
    journal.close()


def test_a_damaged_piece_is_none(tmp_path):
    journal, rng = Journal(tmp_path), random.Random(0)
    journal.write("piece", [mx.arange(50), mx.zeros((3, 4), mx.float16)])
    journal.finish_writing()
    (file,) = tmp_path.glob("*")
    good = file.read_bytes()
    for _ in range(200):
        data = bytearray(good)
        at = rng.randrange(len(data))
        data[at] = (data[at] + rng.randrange(1, 256)) % 256
        file.write_bytes(data if rng.random() < 0.7 else good[:at])
        found = journal.read("piece")  # the same, where a space of its description became a tab
        assert found is None or [a.tolist() for a in found] == [list(range(50)), [[0.0] * 4] * 3]
    file.write_bytes(good)
    assert journal.read("piece")[0].tolist() == list(range(50))
    journal.close()
