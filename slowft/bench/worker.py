"""A process that runs one task and reports it: one JSON object a line, the last of them the result or the error.

    python -m slowft.bench.worker '{"task": "slowft", "workload": {...}}'

Only those lines go to standard output. Whatever libraries print goes to standard error.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import platform
from ..errors import SlowftError
from . import slowllama
from .cgroup import Group
from .workload import Workload, from_dict

Progress = Callable[[int], None]  # called with the number of steps done, including those that warm up


def measure_machine(workload: Workload, progress: Progress) -> dict[str, Any]:
    """The rates at which this machine computes and reads, measured as slowft does with this model."""
    model = slowft.open_model(workload.model)
    try:
        from ..planning.machine import known, matmul_flops_per_s, measure_reading

        dtype = model.engine.compute_dtype
        machine = known(dtype)
        return {
            "device": machine.device,
            "cores": machine.cores,
            "memory_nbytes": machine.memory_nbytes,
            "compute_dtype": machine.compute_dtype,
            "matmul_flops_per_s": matmul_flops_per_s(dtype),
            "read_bytes_per_s": measure_reading(model.engine.files),
        }
    finally:
        model.close()


def run_slowft(workload: Workload, progress: Progress, trace: str | None = None) -> dict[str, Any]:
    """Steps under a plan for the workload's memory, after one that warms up. The last one is traced to file `trace`."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from ..engine.budget import default_memory
    from ..reports.plan import as_dict, choices

    memory = workload.memory or default_memory()
    model = slowft.open_model(workload.model, memory=memory)
    mx.random.seed(0)
    model.add_lora(workload.num_layers, rank=workload.rank, keys=workload.keys)
    model.train()
    lengths = [[1, workload.tokens]] * workload.batch_size
    batches = [(mx.array(batch), mx.array(lengths)) for batch in workload.batches()]
    model.plan(workload.batch_size, workload.tokens, workload.micro_batches, follow=True)
    optimizer, steps, losses = optim.Adam(1e-4), [], []
    for i in range(workload.steps + 1):
        platform.reset_peak_memory()
        begin = time.perf_counter()
        with model.trace(trace) if trace and i == workload.steps else nullcontext():
            (loss, _), gradients = model.loss_and_grads(batches)
            optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), optimizer.state)
            del gradients
        losses.append(loss.item())
        last = model.stats.last
        steps.append(
            {
                "step_s": time.perf_counter() - begin,
                "read_nbytes": last.bytes_read,
                "written_nbytes": last.bytes_written,
                "wait_s": last.wait_s,
                "compute_s": last.compute_s,
                "peak_nbytes": max(platform.peak_memory(), last.peak_memory),
            }
        )
        progress(i + 1)
    plan = model.followed_plan  # corrected by what the first steps measured
    result = {
        "first": steps[0],
        "steps": steps[1:],
        "losses": losses,
        "plan": as_dict(plan),
        "kept": choices(plan),
        "flops": flops_of(plan),
        "device": str(mx.device_info().get("device_name", mx.default_device())),
    }
    model.close()
    return result


def flops_of(plan) -> int:
    """Floating point operations of a step under the plan, without those that kept outputs save."""
    s, job = plan.schedule, plan.job
    flops = job.head_flops
    for position, visit in enumerate(job.visits):
        if plan.is_ordinary:
            flops += visit.graph_flops if visit.comes_back else visit.forward_flops
            continue
        flops += visit.forward_flops + (visit.backward_flops if visit.comes_back else 0)
        flops -= visit.kept(s.kept[position])[1] if position < len(s.kept) else 0
    return job.micro_batches * flops


def run_mlx_lm(workload: Workload, progress: Progress, grad_checkpoint: bool) -> dict[str, Any]:
    """Steps of mlx-lm's own trainer with the model in memory, in the dtype in which slowft computes on this machine.

    Two steps warm up: the first one creates Adam's state, and therefore the second one is compiled again.
    """
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_map
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import dequantize_model, load_model

    from ..memory import computes_on_gpu

    model, _ = load_model(Path(workload.model), lazy=True)
    if not computes_on_gpu():
        model = dequantize_model(model)
        model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    model.freeze()
    keys = {} if workload.keys is None else {"keys": workload.keys}
    n_layers = len(model.layers) if workload.num_layers == -1 else workload.num_layers
    linear_to_lora_layers(model, n_layers, {"rank": workload.rank, "scale": 20.0, "dropout": 0.0, **keys})
    mx.eval(model.parameters())
    steps, n, warm_up = [], workload.micro_batches, 2
    seconds, losses = [], []

    class Clock(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            seconds.append(1 / info["iterations_per_second"])
            losses.append(info["train_loss"])
            if len(seconds) % n == 0:
                peak = platform.peak_memory()
                platform.reset_peak_memory()
                steps.append({"step_s": sum(seconds[-n:]), "peak_nbytes": peak})
                progress(len(steps))

    data = [(row.tolist(), 0) for batch in workload.batches() for row in batch]
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArgs(
            batch_size=workload.batch_size,
            iters=(workload.steps + warm_up) * n,
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=workload.tokens + 1,
            adapter_file=f"{scratch}/adapters.safetensors",
            grad_checkpoint=grad_checkpoint,
            grad_accumulation_steps=n,
        )
        train(model, optim.Adam(1e-4), data, args=args, training_callback=Clock())
    step_losses = [sum(losses[i : i + n]) / n for i in range(0, len(losses), n)]
    return {"first": steps[0], "steps": steps[warm_up:], "losses": step_losses}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": measure_machine,
    "slowft": run_slowft,
    "mlx-lm": run_mlx_lm,
    "slowllama": slowllama.run,
    "write slowllama's files": slowllama.write,
}


def run(
    task: str, workload: Workload, progress: Progress = lambda step: None, group: Group | None = None, **options
) -> dict[str, Any]:
    """The task's result, from a process of its own.

    Args:
        group: the control group that the process runs in.
    Raises:
        SlowftError: the task failed; says why.
    """
    message = json.dumps({"task": task, "workload": asdict(workload), "options": options})
    command = [sys.executable, "-m", "slowft.bench.worker", message]
    command = command if group is None else group.entered(command)
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for line in process.stdout:
                last = json.loads(line)
                if "step" in last:
                    progress(last["step"])
        except BaseException:
            process.terminate()
            raise
        finally:
            process.stdout.close()
            status = process.wait()
        if "result" in last:
            return last["result"]
        if "error" in last:
            raise SlowftError(f"{task}: {last['error']}")
        if status == -9:
            raise SlowftError(f"{task}: killed, most likely for want of memory")
        errors.seek(0)
        reason = (errors.read().strip().splitlines() or [f"status {status}"])[-1]
        raise SlowftError(f"{task}: failed: {reason}")


def main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(**values) -> None:
        print(json.dumps(values), file=lines, flush=True)

    message = json.loads(sys.argv[1])
    task, workload = message["task"], from_dict(message["workload"])
    if "slowllama" not in task:  # transformers would import PyTorch if it is installed, and only slowllama needs it
        sys.modules["torch"] = None
    try:
        result = TASKS[task](workload, lambda step: report(step=step), **message["options"])
    except SlowftError as e:
        report(error=str(e))
        sys.exit(1)
    report(result=result)


if __name__ == "__main__":
    main()
