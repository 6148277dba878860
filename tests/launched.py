"""Processes as `mlx.launch` starts them, on ports that are free, each with its share of one small run.

They are forked from one that has imported everything, where forking is safe: starting costs two seconds of a core each.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import atexit
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

from slowft.cli.finetune import make_report
from slowft.errors import SlowftError
from slowft.training.machines import checksum, of_launch


def context():
    """Of multiprocessing."""
    if sys.platform == "darwin":  # Metal does not live through a fork
        return multiprocessing.get_context("spawn")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["launched", "test_resume", "mlx_lm.tuner.trainer", "mlx_lm.models.llama"])
    return found


def hosts_file(directory: Path, n: int) -> Path:
    """As mlx.launch writes it."""
    listeners = [socket.socket() for _ in range(n)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{listener.getsockname()[1]}"] for listener in listeners]
    for listener in listeners:
        listener.close()
    file = directory / f"hosts-{hosts[0][0].rpartition(':')[2]}.json"
    file.write_text(json.dumps(hosts))
    return file


class Group:
    """`n` processes that run `work(rank)`, a function of a module's top level. They print to files `out[rank]`."""

    def __init__(self, directory: Path, n: int, work, *args):
        hosts = hosts_file(directory, n)
        self.out = [hosts.with_suffix(f".{rank}.txt") for rank in range(n)]
        self.processes = [
            context().Process(target=_child, args=(rank, str(hosts), str(out), work, args))
            for rank, out in enumerate(self.out)
        ]
        for process in self.processes:
            process.start()
        for out in self.out:
            out.touch()

    def finish(self, seconds: float = 60) -> list[tuple[int | None, str]]:
        """(exit status, what was printed) of each; None: it hangs, and is killed."""
        ended = []
        for process, out in zip(self.processes, self.out):
            process.join(seconds)
            ended.append((process.exitcode, out.read_text()))
            process.kill()
        return ended


def _child(rank: int, hosts: str, out: str, work, args) -> None:
    os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": hosts}
    with open(out, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = open(out, "a", buffering=1)  # noqa: SIM115  (until the process ends)
    try:
        work(rank, *args)
    except SlowftError as e:  # as the command does
        print("Error:" if of_launch().speaks else "not shown:", e)
        status = 128 + getattr(e, "signal", -127)
    else:
        status = 0
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    os._exit(status)


def train(rank: int, model: str, adapter: str, options: dict) -> None:
    """A run of `test_resume`'s; `{rank}` in `adapter`, and `options["own"][rank]`, are one machine's own."""
    from test_resume import run, samples

    own = options.pop("own", {}).get(rank, {})
    data, (at, number) = own.pop("data", 0), own.pop("signal", (None, None))
    trainers = []

    def before(trainer):
        real, steps = trainer.model.loss_and_grads, iter(range(1, 1000))

        def step(*args):
            result = real(*args)
            if next(steps) == at:
                os.kill(os.getpid(), number)
            return result

        object.__setattr__(trainer.model, "loss_and_grads", step)
        trainers.append(trainer)

    where = Path(adapter.format(rank=rank))
    result = run(model, where, None, make_report(False), samples(22, data), before=before, **(options | own))
    print("result", json.dumps([checksum(trainers[0].model), result]))
