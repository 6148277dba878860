"""A GPU that macOS stops in the middle of its work: what was whole is kept, and one line says what to do."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from conftest import LLAMA, random_batch, save_random
from slowft.errors import GpuError, gpu_error
from slowft.training import checkpoint as checkpoints
from test_cli import finetune  # noqa: F401  (a fixture)
from test_resume import Notes, model_directory, run, weights, whole  # noqa: F401  (two are fixtures)

# As Metal words it (https://github.com/ml-explore/mlx/issues/3267), and MLX 0.32 (mlx/backend/metal/device.cpp).
FAILED = "[METAL] Command buffer execution failed: "
INTERACTIVITY = "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"


class Gpu:
    """Fails once, in the `left`-th evaluation from now on that code of `module` asks for. `seen` counts those."""

    def __init__(self, monkeypatch):
        self.module, self.left, self.seen, self.reason = "slowft.", None, 0, INTERACTIVITY
        for name in ("eval", "async_eval"):
            monkeypatch.setattr(mx, name, self._failing(getattr(mx, name)))

    def fail(self, left: int, module: str = "slowft.") -> None:
        self.left, self.module = left, module

    def _failing(self, evaluate):
        def call(*arrays):
            if sys._getframe(1).f_globals["__name__"].startswith(self.module):
                self.seen += 1
                if self.left is not None:
                    self.left -= 1
                    if self.left < 0:
                        self.left = None
                        raise RuntimeError(f"{FAILED}{self.reason}.")
            return evaluate(*arrays)

        return call


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (FAILED + INTERACTIVITY + ".", "Let the display sleep"),
        (FAILED + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).", "display sleep"),
        (FAILED + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).", "a lower --memory"),
        ("[metal::malloc] Resource limit (499000) exceeded.", "a lower --memory"),
        (FAILED + "Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault).", "restart"),
    ],
)
def test_what_metal_says_is_one_line_with_advice(said, advice):
    found = gpu_error(RuntimeError(said))
    assert advice in str(found) and len(str(found).splitlines()) == 1
    assert said.removeprefix(FAILED).rstrip(".") in str(found)


@pytest.mark.parametrize("error", [RuntimeError("[eval] something else"), ValueError(FAILED + "no"), OSError(5, "?")])
def test_other_errors_are_none_of_the_gpus(error):
    assert gpu_error(error) is None


# --- The model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["evaluation", "step", "decoding"])
def test_wherever_it_fails_the_next_pass_is_as_if_it_had_not(what, mac, gpu, tmp_path):
    """Under the double, as there results are waited for only when the next block is in place."""
    batch, lengths = random_batch(256)

    def go() -> list[mx.array]:
        found: list[mx.array] = []
        if what == "evaluation":
            found += model.loss(batch, lengths)
        elif what == "decoding":
            rows = [(batch[:1, :5], model.new_cache(), mx.array([4]), False)]
            model.decode(rows, lambda _, first, logits: found.append(mx.array(logits)))
        else:
            (loss, _), gradients = model.loss_and_grads(batch, lengths)
            found += [loss, *(array for _, array in tree_flatten(gradients))]
        mx.eval(found)
        return found

    with slowft.open_model(save_random(tmp_path / "m", LLAMA, mx.bfloat16)) as model:
        model.add_lora(num_layers=2, rank=4)
        expected, before = go(), gpu.seen
        assert len(go()) == len(expected)
        n = gpu.seen - before
        for left in range(n):
            gpu.fail(left)
            with pytest.raises(RuntimeError, match="Impacting Interactivity"):
                go()
            assert mx.isnan(model.lm_head.weight).all()  # weights that came for the pass are gone
            assert all(mx.array_equal(*both) for both in zip(go(), expected))
    assert n >= 15


# --- Training -------------------------------------------------------------------------------------------


def failing(gpu: Gpu, where: str, n: int):
    """Has the GPU fail in the `n`th step, in the update after its gradients, or in the `n`th validation."""

    def before(trainer):
        owner, name = (trainer, "evaluate") if where == "validation" else (trainer.model, "loss_and_grads")
        real, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == n and where != "update":
                gpu.fail(5, "slowft.weights.residency")  # of a block's pass
            found = real(*args, **kwargs)
            if len(calls) == n and where == "update":
                gpu.fail(0, "slowft.training.fitting")
            return found

        object.__setattr__(owner, name, call)

    return before


@pytest.mark.parametrize(
    ("where", "n", "saved_at"),
    [
        ("step", 4, 6),
        ("step", 5, 8),  # right after a validation, which the run that goes on does again
        ("step", 1, None),
        ("validation", 3, 8),  # the first is before training, the next are after iterations 4 and 8
        ("update", 4, 4),  # adapter and optimizer are of no whole step then
    ],
)
def test_a_run_goes_on_to_the_same_bits(where, n, saved_at, gpu, whole, model_directory, tmp_path):  # noqa: F811
    adapter, notes, save_every = tmp_path / "adapter", Notes(), 4 if where == "update" else 100
    with pytest.raises(GpuError) as caught:
        run(model_directory, adapter, save_every=save_every, before=failing(gpu, where, n))
    said = str(caught.value)
    assert said.startswith("macOS ended work on the GPU") and len(said.splitlines()) == 1
    if saved_at is None:
        assert "The same command begins again" in said and not adapter.exists()
        return
    status = json.loads((adapter / "status.json").read_text())
    assert status["state"] == "failed" and status["error"] == said
    assert f"The same command with --resume goes on after iteration {saved_at}." in said
    assert [file.name for file in (adapter / "checkpoints").iterdir()] == [f"{saved_at:07d}.safetensors"]
    run(model_directory, adapter, report=notes, resume=True, save_every=save_every)
    assert weights(adapter) == weights(whole[0])
    for seen, expected in ((notes.losses, whole[1].losses), (notes.valid, whole[1].valid)):
        assert seen == {i: loss for i, loss in expected.items() if i >= saved_at}
    # what a validation does to the run's own account is done once
    assert progress(adapter) == progress(whole[0])


def progress(adapter) -> dict:
    newest = max((adapter / "checkpoints").glob("*.safetensors"))
    return checkpoints.read(newest).state["progress"]


def test_a_gpu_that_takes_nothing_more_leaves_the_checkpoints_there_are(gpu, model_directory, tmp_path, monkeypatch):  # noqa: F811
    def refuse(*_):
        raise RuntimeError(f"{FAILED}Ignored (for causing prior/excessive GPU errors).")

    def before(trainer):
        failing(gpu, "step", 4)(trainer)
        monkeypatch.setattr("slowft.training.fitting.check_finite", lambda model: gpu.left is None and refuse())

    gpu.fail(10**9)
    with pytest.raises(GpuError, match="with --resume goes on after iteration 4"):
        run(model_directory, tmp_path / "adapter", save_every=4, before=before)


# --- Commands -------------------------------------------------------------------------------------------


def failed_commands(command, data):
    model = ["--model", command.model, "--memory", "1GB"]
    yield ["finetune", *model, "--data", data, *command.small]
    yield ["finetune", *model, "--data", data, *command.small, "--test", "--adapter-path", ""]  # trains nothing
    yield ["generate", *model, "--prompt", "Why?", "--max-tokens", 4]
    yield ["score", *model, "--data", data]
    suite = command.directory / "suite.yaml"
    suite.write_text(
        f"variants: [{{name: base, model: {command.model}}}]\nmemory: 1GB\n"
        'defaults: {prompt: "Of {{ x }}", max_tokens: 4}\nscenarios: [{variables: {x: one}}]\n'
    )
    yield ["compare", suite]


def test_every_command_ends_in_one_line_with_status_1(finetune, gpu):  # noqa: F811
    gpu.reason = "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    for words in failed_commands(finetune, finetune.data):
        gpu.fail(4, "slowft.weights.residency")
        outcome = finetune.bare(*words)
        (line,) = outcome.err.splitlines()
        assert (outcome.status, gpu.left) == (1, None), words
        assert line.startswith("Error: the GPU ran out of memory (Insufficient Memory") and "lower --memory" in line
