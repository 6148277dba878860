"""Several machines train as one would: processes of one machine, over MLX's ring, as `mlx.launch` starts them."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import os
import random
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

from conftest import LLAMA, save_random
from launched import Group, hosts_file, train
from slowft.errors import ConfigError, PeerLost
from slowft.training import machines, peers
from test_distillation import write_cache
from test_resume import run, samples, weights

SGD = {"optimizer": "sgd", "learning_rate": 0.5, "lr_schedule": None, "batch_size": 6}
PLAIN = SGD | {"lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_random(tmp_path_factory.mktemp("several") / "llama", LLAMA))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The adapter of two machines that were never disturbed, with dropout."""
    directory = tmp_path_factory.mktemp("whole")
    ended = Group(directory, 2, train, model, str(directory / "a{rank}"), {}).finish()
    assert [status for status, _ in ended] == [0, 0], ended
    return directory / "a0"


def results(ended: list[tuple[int | None, str]]) -> list:
    assert all(status == 0 for status, _ in ended), ended
    return [json.loads(text.split("result ")[1]) for _, text in ended]


def test_three_are_one_with_the_joint_batch_and_all_the_same(model, tmp_path):
    """Rows have 5 to 59 tokens, so that no machine has as many as another; clipped, with an unequal last step, and with
    what a teacher holds for probable of them."""
    cache = write_cache(tmp_path / "teacher", samples(22), 256)
    options = PLAIN | {"max_grad_norm": 0.5, "iters": 7, "teacher_cache": str(cache)}
    alone = run(model, tmp_path / "alone", train=samples(22), **options)
    many = results(Group(tmp_path, 3, train, model, str(tmp_path / "a{rank}"), options).finish())
    assert many[0] == many[1] == many[2]  # checksums of the adapters too
    for name, loss in alone.items():
        assert many[0][1][name] == pytest.approx(loss, rel=1e-6)
    one, joint = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("alone", "a0"))
    for name, array in one.items():
        assert mx.abs(joint[name] - array).max().item() <= 1e-6 * mx.abs(array).max().item(), name
    assert not list(tmp_path.glob("a[12]/*"))  # the first one saves


def test_one_killed_at_random_ends_in_a_checkpoint_from_which_they_go_on(whole, model, tmp_path):
    """The first, whose checkpoint is then on the other's disk alone, or the other; in a step or anywhere."""
    rng = random.Random(os.environ.get("SLOWFT_SEED", 1))
    for victim in (0, 1):
        adapter = str(tmp_path / f"{victim}-a{{rank}}")
        options = {"save_every": 100}
        if victim == 0:
            options["own"] = {0: {"signal": (rng.randint(2, 5), signal.SIGKILL)}}
        group = Group(tmp_path, 2, train, model, adapter, options)
        if victim == 1:
            while "train loss" not in group.out[0].read_text():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            group.processes[1].kill()
        ended = group.finish(30)
        assert ended[victim][0] == -signal.SIGKILL, ended
        status, said = ended[1 - victim]
        assert status == 1 and f"Error: machine {victim + 1} of 2 (rank {victim}) was lost after iteration " in said, (
            ended
        )
        assert "the process has ended. With all machines there, the same command with --resume goes on" in said
        ended = Group(tmp_path, 2, train, model, adapter, {"save_every": 100, "resume": True}).finish()
        results(ended)
        assert "Going on after iteration" in ended[0][1]
        assert weights(tmp_path / f"{victim}-a0") == weights(whole)


def test_ctrl_c_on_one_stops_all_with_one_checkpoint(whole, model, tmp_path):
    adapter = str(tmp_path / "a{rank}")
    options = {"save_every": 100, "own": {1: {"signal": (2, signal.SIGINT)}}}
    ended = Group(tmp_path, 2, train, model, adapter, options).finish()
    assert [status for status, _ in ended] == [130, 130], ended
    assert "Error: Interrupted after iteration 4. To go on: the same command with --resume" in ended[0][1]
    assert [file.name for file in tmp_path.glob("a?/checkpoints/*")] == ["0000004.safetensors"]
    with pytest.raises(ConfigError, match=r"another number of machines \(2, now 1\)"):
        run(model, tmp_path / "a0", resume=True)
    results(Group(tmp_path, 2, train, model, adapter, {"save_every": 100, "resume": True}).finish())
    assert weights(tmp_path / "a0") == weights(whole)


def test_other_data_is_refused_by_name(model, tmp_path):
    ended = Group(tmp_path, 2, train, model, str(tmp_path / "a{rank}"), {"own": {1: {"data": 5}}}).finish()
    assert [status for status, _ in ended] == [1, 1]
    assert "Error: machine 2 of 2 has another data than the first." in ended[0][1]
    assert "Error:" not in ended[1][1]  # said once


# --- A machine that goes, or never comes -----------------------------------------------------------------


def joined(n: int) -> list[peers.Peers]:
    """`n` of one process."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    address = listener.getsockname()
    listener.close()
    found: list = [None] * n

    def join(rank):
        found[rank] = peers.Peers(rank, n, address)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def end(one: peers.Peers) -> None:
    for connection in one.connections.values():
        with suppress(OSError):  # it may have gone
            connection.shutdown(socket.SHUT_RDWR)
    one.wait(5, lambda: all(connection.fileno() == -1 for connection in one.connections.values()))


def test_all_learn_who_was_lost():
    first, second, third = joined(3)
    end(second)
    for other in (first, third):
        assert other.wait(5, lambda other=other: other.loss is not None) and other.loss.rank == 1
    assert "the process has ended" in third.loss.why
    end(first)
    assert third.loss.rank == 1  # what came first


def test_one_that_failed_says_why():
    first, second = joined(2)
    thread = threading.Thread(target=second.leave, args=("no room in /x",))
    thread.start()
    assert first.wait(5, lambda: first.loss is not None) and first.loss == peers.Loss(1, "no room in /x", said=True)
    end(first)
    thread.join(1)
    assert not thread.is_alive()


def test_a_network_that_goes_silent_is_noticed_by_the_system():
    """Without a word from the other side the connection ends after 30 s (measured once, in a network of its own)."""
    first, second = joined(2)
    for connection in (first.connections[1], second.connections[0]):
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if not slowft.platform.MACOS:
            names = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
            idle, interval, count = (connection.getsockopt(socket.IPPROTO_TCP, name) for name in names)
            assert idle + interval * count == 30
    end(first)


def test_one_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(peers, "JOIN_S", 0.2)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    address = listener.getsockname()
    with pytest.raises(PeerLost, match=r"machine 2 of 3 \(rank 1\) could not join"):
        peers.Peers(1, 3, address)
    with pytest.raises(PeerLost, match="machine 1 of 3 cannot listen"):
        peers.Peers(0, 3, address)
    listener.close()
    with pytest.raises(PeerLost, match="machine 2, 3 of 3 did not come within"):
        peers.Peers(0, 3, address)


# --- Planned -------------------------------------------------------------------------------------------


def test_a_plan_of_several_machines_is_that_of_ones_share_and_the_sum(model):
    """Rows are split, reads are not: each reads all of its own copy."""
    from slowft.planning.several import LINK_NBYTES_S, shared

    with slowft.open_model(model) as opened:
        opened.add_lora(num_layers=-1)
        trainable = sum(array.nbytes for _, array in tree_flatten(opened.trainable_parameters()))
        nbytes, planner_of = 2 * 10**9, lambda rows: opened.planner(rows, 64)
        found = [shared(n, 12, nbytes, planner_of, machines.COPIES) for n in (2, 4, 8)]
        for one, n in zip(found[:2], (2, 4)):
            alone = opened.plan(12 // n, 64, memory=nbytes - 3 * trainable)
            assert one.rows == 12 // n and one.read_nbytes == alone.read_nbytes
            assert one.sum_s == pytest.approx(2 * (n - 1) / n * trainable / LINK_NBYTES_S)
            assert one.step_s == pytest.approx(alone.step_s + one.sum_s)
            assert one.peak_nbytes == alone.peak_nbytes + 3 * trainable
    assert found[2].rows is None and found[2].reason == "a batch of 12 cannot be shared by 8 machines"


# --- Alone -----------------------------------------------------------------------------------------------


def test_alone_nothing_of_mlxs_engine_begins(monkeypatch, tmp_path):
    monkeypatch.setattr(mx.distributed, "init", None)
    for name in ("MLX_RANK", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    assert machines.of_launch().size == 1 and machines.launched() is None
    assert machines.Machines().gather([1]) == [[1]]
    (tmp_path / "hosts").write_text("\n")  # what mlx.launch -n 1 writes
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert machines.launched() is None


def test_what_launched_is_understood_or_refused(monkeypatch, tmp_path):
    file = hosts_file(tmp_path, 3)
    monkeypatch.setenv("MLX_HOSTFILE", str(file))
    monkeypatch.setenv("MLX_RANK", "2")
    backend, rank, size, (host, port) = machines.launched()
    assert (backend, rank, size) == ("ring", 2, 3) and [f"{host}:{port}"] == json.loads(file.read_text())[0]
    (tmp_path / "devices").write_text('[[null, "rdma_en2"], ["rdma_en2", null]]')
    with monkeypatch.context() as patch:
        patch.setenv("MLX_IBV_DEVICES", str(tmp_path / "devices"))
        patch.setenv("MLX_JACCL_COORDINATOR", "10.0.0.1:32323")
        assert machines.launched() == ("jaccl", 2, 2, ("10.0.0.1", 32323))
    file.write_text("{")
    with pytest.raises(ConfigError, match="MLX_RANK is set, but not what mlx.launch sets"):
        machines.launched()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--backend ring or jaccl"):
        machines.launched()


def test_a_batch_that_cannot_be_shared_is_refused():
    from slowft.training.config import TrainConfig
    from slowft.training.trainer import rows_of

    assert rows_of(TrainConfig(batch_size=6), machines.Machines(1, 3)) == 2
    with pytest.raises(ConfigError, match="cannot be shared by 3. Choose 6 or 3"):
        rows_of(TrainConfig(batch_size=4), machines.Machines(1, 3))
    with pytest.raises(ConfigError, match="cannot be shared by 8. Choose 8$"):
        rows_of(TrainConfig(batch_size=4), machines.Machines(1, 8))


def test_a_machine_whose_rows_have_no_token_adds_nothing(model, tmp_path):
    """Its loss and gradients are 0 / 0."""

    class Two(machines.Machines):
        """The other one has 8 tokens, a loss of 2, and gradients of 3."""

        def gather(self, values):
            is_of_step = isinstance(values, tuple) and len(values) > 2
            return [values, (2.0, 8, True, *values[3:]) if is_of_step else values]

        def sum(self, vector):
            assert not vector.any().item()
            return vector + 3

    before = {}

    def without_tokens(trainer):
        def step(micro_batches):
            before.update(tree_flatten(trainer.model.trainable_parameters()))
            nan = tree_map(lambda array: array * float("nan"), trainer.model.trainable_parameters())
            return (mx.array(float("nan")), mx.array(0)), nan

        trainer.machines = Two(0, 2)
        object.__setattr__(trainer.model, "loss_and_grads", step)

    found = run(model, tmp_path / "a", valid=None, before=without_tokens, **PLAIN | {"iters": 1})
    assert found["train_loss"] == 2.0
    after = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert mx.allclose(after[name], array - 0.5 * 3)
