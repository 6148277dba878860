"""Processes as `mlx.launch` starts them, on ports that are free, each running one small training run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

RUN = """
import json, os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import slowft
from slowft.cli.finetune import make_report
from test_resume import run, samples
rank, options = int(os.environ.get("MLX_RANK", 0)), json.loads(sys.argv[4])
own = options.pop("own", {}).get(str(rank), {})
seed = own.pop("data", 0)
at, number = own.pop("signal", (None, None))

def before(trainer):
    real = trainer.model.loss_and_grads
    steps = iter(range(1, 1000))
    def step(*args):
        result = real(*args)
        if next(steps) == at:
            os.kill(os.getpid(), number)
        return result
    object.__setattr__(trainer.model, "loss_and_grads", step)
    print("rows", trainer.rows, flush=True)

try:
    adapter = pathlib.Path(sys.argv[3].format(rank=rank))
    result = run(sys.argv[2], adapter, report=make_report(False), train=samples(22, seed), before=before, **options | own)
    print("result", json.dumps(result), flush=True)
except slowft.SlowftError as e:
    from slowft.training.machines import of_launch
    sys.exit(("told: " if of_launch().speaks else "not told: ") + str(e))
"""


def start(n: int, model: Path, adapter: str, **options) -> list[subprocess.Popen]:
    """`n` processes; in `adapter`, "{rank}" stands for each one's rank. Their outputs are pipes."""
    listeners = [socket.socket() for _ in range(n)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{listener.getsockname()[1]}"] for listener in listeners]
    for listener in listeners:
        listener.close()
    file = Path(model).parent / f"hosts{hosts[0][0].rpartition(':')[2]}.json"
    file.write_text(json.dumps(hosts))
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(model), str(adapter), json.dumps(options)]
    where = {"MLX_HOSTFILE": str(file)} if n > 1 else {}
    return [
        subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ | where | {"MLX_RANK": str(rank)})
        if n > 1
        else subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
        for rank in range(n)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 60) -> list[tuple[int, str, str]]:
    """(status, output, errors) of each."""
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
        return [(process.returncode, *both) for process, both in zip(processes, ended)]
    finally:
        for process in processes:
            process.kill()
