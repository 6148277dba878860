"""One run of a `Trainer`: what happens in a step and after it, and how a run goes on from a checkpoint.

Comes in: a trainer, an optimizer, the data. Goes out: what `Trainer.fit` returns. The loop over steps is `Fit.go`.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten

from .. import platform
from ..data.batches import BatchStream
from ..data.store import TokenDataset
from ..engine.budget import STEPS_TO_LEARN_FROM
from ..errors import AdapterError, GpuError, Interrupted, ModelError, PeerLost, SlowftError, gpu_error
from ..memory import limits
from ..weights.journal import Journal
from .checkpoint import Checkpoint, Checkpoints, check_finite
from .machines import checksum
from .status import Status
from .stopping import Stop, StopAsked, parse_seconds

# Finished blocks of a step are journalled if the step takes longer than this, and if that writes at most this many
# bytes a second: 40 MB/s are 3.5 TB a day, and a laptop's SSD lasts for some hundreds of TB.
JOURNALLED_STEP_S = 120.0
JOURNALLED_NBYTES_PER_S = 40e6


class Fit:
    """One call of `Trainer.fit`.

    A checkpoint has the state right after an optimizer step. The run that goes on from it repeats what follows that
    step (reports, validation, saving adapters) from the same random state, so the results are the same.

    Attributes:
        stop: whether the run is asked to end.
        checkpoints, journal: where the run's state, and the finished blocks of a step, are written.
        progress: where the run is.
    """

    def __init__(self, trainer, optimizer, train: TokenDataset, valid: TokenDataset | None):
        c = trainer.config
        self._trainer, self._optimizer, self._valid = trainer, optimizer, valid
        self._config, self._model, self._report = c, trainer.model, trainer.report
        self._machines = trainer.machines
        self._identity = trainer.identity(train, valid)
        self._batches = BatchStream(train, trainer.order(train), c.max_seq_length, trainer.lessons)
        self._step_s: list[float] = []
        self.stop = Stop(None if c.max_time is None else parse_seconds(c.max_time))
        self.checkpoints = Checkpoints(trainer.directory, c.keep_checkpoints)
        self.journal = Journal(self.checkpoints.directory / "journal")
        self._is_journalling = False
        self._status = Status(trainer.directory)
        self._begin_s, self._began_at = time.perf_counter(), 0
        self.progress = Progress()
        self._model.seed, self._model.step = c.seed + (self._machines.rank << 32), 0  # each machine has its own dropout
        np.random.seed(c.seed)
        self._repeats_after_step = trainer.checkpoint is not None  # see above
        self._cuts = [self._model.cuts]
        self._window = _Window(self._model)
        self._moment: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None
        self._saved_at: int | None = None
        if trainer.checkpoint is not None:
            self._go_on_from(trainer.checkpoint)

    def go(self) -> dict[str, Any]:
        """Train until the last step, or until asked to stop. Returns what `Trainer.fit` does."""
        c, p = self._config, self.progress
        is_over = self._repeats_after_step and self._after_step()
        while p.iteration < c.iters and not is_over:
            n = min(c.grad_accumulation_steps, c.iters - p.iteration)
            if p.iteration == 0:
                self._note_moment()
                if not self._is_journalling and self._takes_long():
                    self._is_journalling = True
                    self._write_checkpoint()
            micro_batches = [next(self._batches) for _ in range(n)]
            if p.iteration == 0 and self._valid is not None:
                try:
                    p.valid_loss_before = p.valid_loss = self._validate()
                except StopAsked:
                    self._stop()
                    break
                self._window = _Window(self._model)
            try:
                self._step(micro_batches)
            except StopAsked:
                self._stop(in_step=True)
                break
            is_over = self._after_step()
        if p.stopped is None:
            if c.keep != "best" or p.best_iteration is None:
                self._report.saved(self._trainer.save())
            self.checkpoints.wait()
            self.journal.clear()
            self._machines.gather(None)  # no machine ends before everything is saved
        self._note_summary()
        self.status("finished" if p.stopped is None else "stopped")
        if self.stop.signal is not None and p.stopped is not None:
            raise Interrupted(p.stopped, self.stop.signal)
        result = {"train_loss": p.train_loss, "valid_loss_before": p.valid_loss_before, "valid_loss": p.valid_loss}
        return result | ({} if p.stopped is None else {"stopped": p.stopped})

    def _step(self, micro_batches: list[tuple[mx.array, mx.array]]) -> None:
        c, model, p, n = self._config, self._model, self.progress, len(micro_batches)
        model.train()
        begin = time.perf_counter()
        (loss, n_tokens), gradients = self._loss_and_grads(micro_batches)
        loss, n_tokens, are_finite = self._agree(loss.item(), n_tokens.item(), gradients)
        if not are_finite:
            self._refuse(loss, micro_batches, gradients)
            p.skipped_steps += 1
        else:
            gradients = self._joint(gradients)
            if c.max_grad_norm is not None:
                gradients, _ = clip_grad_norm(gradients, c.max_grad_norm)
            self._moment = None  # until the next is noted, adapter and optimizer are of no whole step
            self._optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), self._optimizer.state)
            p.trained_tokens += n_tokens
            p.losses.append([p.iteration + n, loss, n_tokens])
            self._window.add(n, loss, n_tokens, time.perf_counter() - begin)
        self._trainer.trained_tokens = p.trained_tokens
        p.previous, p.iteration = p.iteration, p.iteration + n
        self._step_s.append(time.perf_counter() - begin)
        self._report.advance(n, loss, model)

    def _loss_and_grads(self, micro_batches: list[tuple[mx.array, mx.array]]):
        """Loss and gradients of a step. A journalled step that was interrupted goes on after its last finished block.

        Raises:
            StopAsked: a stop is asked for, and the step is journalled.
        """
        engine = self._model.engine
        if not self._is_journalling:
            engine.journal_steps(None)
            return self._model.loss_and_grads(micro_batches)
        self.checkpoints.wait()  # the journal of the step before is needed until its checkpoint is on the drive
        had_problem = self.journal.problem
        engine.journal_steps(self.journal, json.dumps(self._identity), self._stop_if_asked)
        try:
            result = self._model.loss_and_grads(micro_batches)
        except ModelError:  # the model's files were changed meanwhile, so the finished blocks are wrong
            self.journal.clear()
            raise
        if self.journal.problem != had_problem:
            self._report.note(f"Warning: {self.journal.problem}")
        if engine.blocks_found:
            self._report.note(f"{engine.blocks_found} block passes of this step were finished before")
        return result

    def _takes_long(self) -> bool:
        """Whether the next step takes so long that its finished blocks are journalled."""
        engine, plan = self._model.engine, self._model.followed_plan
        if plan is None or self._machines.size > 1 or not engine.cut.is_chain or engine.schedule.in_memory:
            return False
        if self._repeats_after_step and self.journal.is_there:  # the run so far journalled this step
            return True
        job, seconds = plan.job, plan.step_s
        n_arrays = job.micro_batches * (2 * len(job.visits) - job.lowest_trained)
        nbytes = n_arrays * job.hidden_nbytes + job.trainable_nbytes
        return seconds > JOURNALLED_STEP_S and nbytes <= JOURNALLED_NBYTES_PER_S * seconds

    def _stop_if_asked(self) -> None:
        if self.stop.take([self.stop.asks]):
            raise StopAsked

    def _agree(self, loss: float, n_tokens: int, gradients) -> tuple[float, int, bool]:
        """(loss, tokens, whether all is finite) of all machines' rows together, from those of this machine's rows.

        Raises:
            SlowftError: the machines' adapters are not the same any more.
        """
        if self._machines.size == 1:
            return loss, n_tokens, math.isfinite(loss) and _are_finite(gradients)
        is_finite = n_tokens == 0 or (math.isfinite(loss) and _are_finite(gradients))
        own = loss if n_tokens else 0.0, n_tokens, is_finite, checksum(self._model), self._model.cuts
        losses, tokens, finite, checksums, cuts = zip(*self._machines.gather(own))
        if len(set(checksums)) > 1:
            raise SlowftError(
                f"the machines' adapters are not the same before iteration {self.progress.iteration + 1} (checksums "
                f"{', '.join(f'{sum_:08x}' for sum_ in checksums)}). Go on from the last checkpoint with --resume"
            )
        self._cuts, total = list(cuts), sum(tokens)
        self._weight = n_tokens / total if total else math.nan
        joint = sum(loss * n for loss, n in zip(losses, tokens)) / total if total else math.nan
        return joint, total, all(finite) and math.isfinite(joint)

    def _joint(self, gradients):
        """The gradients of all machines' rows together: the mean of the machines', weighted by their tokens."""
        if self._machines.size == 1:
            return gradients
        names, own = zip(*tree_flatten(gradients))
        weighted = [gradient.astype(mx.float32).reshape(-1) * self._weight for gradient in own]
        if not self._weight:  # without tokens, gradients are NaN
            weighted = [mx.zeros_like(gradient) for gradient in weighted]
        joint = self._machines.sum(mx.concatenate(weighted))
        ends = np.cumsum([gradient.size for gradient in own]).tolist()
        parts = [part.reshape(one.shape).astype(one.dtype) for part, one in zip(mx.split(joint, ends[:-1]), own)]
        return tree_unflatten(list(zip(names, parts)))

    def _after_step(self) -> bool:
        """Do what is due after a step: checkpoint, report, validation, adapters. Returns whether the run is over."""
        c, p = self._config, self.progress
        self._note_moment()
        self._model.budget.remember()
        is_last = p.iteration == c.iters
        self._is_journalling = self._takes_long()
        if not self._repeats_after_step and (self._due(c.save_every) or is_last or self._is_journalling):
            self._write_checkpoint()
        if not self._is_journalling and self.journal.is_there:
            self.checkpoints.wait()
            self.journal.clear()
        self._repeats_after_step = False
        if self.stop.take(self._machines.gather(self.stop.asks)) and not is_last:
            return self._stop()
        if (self._due(c.steps_per_report) or is_last) and self._window.tokens:
            info = self._window.summary(p.iteration, self._optimizer.learning_rate.item(), p.trained_tokens)
            p.train_loss = info["train_loss"]
            self._report.trained(info)
            self._window = _Window(self._model)
        self.status("running")
        if self._valid is not None and (self._due(c.steps_per_eval) or is_last):
            try:
                p.valid_loss = self._validate()
            except StopAsked:
                return self._stop()
            if p.best_loss is None or p.valid_loss < p.best_loss:
                p.best_loss, p.best_iteration, p.validations_since = p.valid_loss, p.iteration, 0
                if c.keep == "best":
                    self._report.saved(self._trainer.save())
            else:
                p.validations_since += 1
        if self._due(c.save_every):
            self._report.saved(self._trainer.save(numbered=p.iteration, is_current=c.keep != "best"))
        if c.early_stop is not None and p.validations_since >= c.early_stop and not is_last:
            self._report.note(
                f"Stopped early: {p.validations_since} validations in turn were no better than iteration "
                f"{p.best_iteration} (loss {p.best_loss:.3f})"
            )
            return True
        return False

    def _note_moment(self) -> None:
        """What a checkpoint holds besides adapter and optimizer: whenever it is written, it is of this moment."""
        _, keys, position, has_gauss, gauss = np.random.get_state()
        w = self._window
        self._moment = (
            {"random": keys, "permutation": self._batches.permutation},
            {
                "progress": replace(self.progress),
                "cuts": self._cuts if self._machines.size > 1 else self._model.cuts,
                "step": self._model.step,
                "at": self._batches.at,
                "random": [position, has_gauss, gauss],
                "window": [w.iterations, w.tokens, w.loss_sum, w.seconds],
            },
        )

    def _due(self, every: int) -> bool:
        return self.progress.iteration // every > self.progress.previous // every

    def _validate(self) -> float:
        """The loss on the validation set.

        Raises:
            StopAsked: a stop is asked for meanwhile. Before the first step the time limit is ignored: a run whose time
                was over by then would come no further however often it was resumed.
        """
        begin, c = time.perf_counter(), self._config
        loss = self._trainer.evaluate(self._valid, c.val_batches, self.stop, only_signals=not self.progress.iteration)
        self._report.validated(
            {"iteration": self.progress.iteration, "val_loss": loss, "val_time": time.perf_counter() - begin}
        )
        return loss

    def _stop(self, in_step: bool = False) -> bool:
        """End the run with a checkpoint of the last whole step. Returns True.

        Args:
            in_step: the stop comes within a journalled step. The checkpoint is written then, and the journal is kept.
        """
        p = self.progress
        if not in_step:
            self._write_checkpoint()
        self.checkpoints.wait()
        if not in_step and p.iteration > self._began_at:  # else it may have an earlier run's blocks of the next step
            self.journal.clear()
        self._machines.gather(None)  # no machine ends before the checkpoint is written
        why = f"--max-time {self._config.max_time} is over" if self.stop.signal is None else "Interrupted"
        part = " and some blocks of the next step" if in_step else ""
        p.stopped = f"{why} after iteration {p.iteration}{part}. To go on: the same command with --resume"
        if self.stop.signal is None:
            self._report.note(p.stopped)
        return True

    def _refuse(self, loss: float, micro_batches, gradients) -> None:
        """Handle a step whose loss or gradients are not finite: say where they are not.

        Raises:
            SlowftError: unless such steps are skipped.
        """
        p, c = self.progress, self._config
        self.journal.clear()
        where = self._machines.gather(self._where_not_finite(loss, micro_batches, gradients))
        if self._machines.size > 1:
            where = [f"{place} on machine {rank + 1}" for rank, place in enumerate(where) if place]
        where = next(filter(None, where), None)
        what = f"the loss is {loss}" if not math.isfinite(loss) else "gradients are not finite"
        message = f"{what} at iteration {p.iteration + 1}" + (f", first in {where}" if where else "")
        if c.on_nan == "skip":
            self._report.note(f"Warning: {message}. The step is skipped")
            return
        fix = "Lower --learning-rate, or check the weights for NaN"
        if self._model.engine.compute_dtype == mx.float16:
            fix = "float16 overflows above 65504: --compute-dtype bfloat16 or float32 helps. Else lower --learning-rate"
        raise SlowftError(f"{message}; nothing was saved since the last checkpoint. {fix}")

    def _where_not_finite(self, loss: float, micro_batches, gradients) -> str | None:
        """Where this machine's rows are not finite, found by a forward pass. None if only another machine's are not."""
        if self._machines.size > 1 and _are_finite(gradients):
            return None
        return self._model.first_not_finite(micro_batches) or _first_gradient(gradients)

    # --- Checkpoints --------------------------------------------------------------------------------

    def save_after(self, lost: PeerLost) -> PeerLost:
        """A machine was lost: write what the last whole step left, and say how to go on."""
        p = self.progress
        limits().abandon()
        if p.iteration and self._machines.leads(lost.loss):
            self._write_checkpoint(lost)
            self.checkpoints.wait()
        what = self._machines.describe(lost.loss, f" after iteration {p.iteration}")
        how = f"with --resume goes on from {self.checkpoints.directory}" if p.iteration else "begins again"
        said = f"{what}. With all machines there, the same command {how}"
        self._machines.end_soon(said)
        return PeerLost(said, lost.loss)

    def save_after_failure(self, failed: GpuError) -> GpuError:
        """The GPU did not finish a step: write what the last whole one left, and say how to go on."""
        p = self.progress
        if p.iteration and self._moment is not None:
            try:
                self._write_checkpoint()
                self.checkpoints.wait()
            except RuntimeError as e:  # it takes nothing more
                if gpu_error(e) is None:
                    raise
        how = "begins again" if self._saved_at is None else f"with --resume goes on after iteration {self._saved_at}"
        what = f"{failed.what}, in the step after iteration {p.iteration}"
        return GpuError(what, f"The same command {how}. {failed.advice}")

    def _write_checkpoint(self, lost: PeerLost | None = None) -> None:
        check_finite(self._model)
        if not self._machines.leads(None if lost is None else lost.loss):
            return
        of_data, state = self._moment
        progress: Progress = state["progress"]
        arrays = {f"adapter.{name}": array for name, array in tree_flatten(self._model.trainable_parameters())}
        arrays |= {f"optimizer.{name}": array for name, array in tree_flatten(self._optimizer.state)}
        keys, permutation = of_data["random"], of_data["permutation"]
        arrays |= {"random": mx.array(keys), "permutation": mx.array(permutation.astype(np.int64))}
        state = state | {"identity": self._identity, "progress": asdict(progress)}
        self.checkpoints.write(progress.iteration, arrays, state, only_adds=self._machines.rank > 0)
        self._saved_at = progress.iteration

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        arrays, state = checkpoint.arrays, checkpoint.state

        def with_prefix(prefix: str) -> list[tuple[str, mx.array]]:
            return [(name.removeprefix(prefix), a) for name, a in arrays.items() if name.startswith(prefix)]

        expected = {name: (a.shape, a.dtype) for name, a in tree_flatten(self._model.trainable_parameters())}
        if {name: (a.shape, a.dtype) for name, a in with_prefix("adapter.")} != expected:
            raise AdapterError(
                f"{checkpoint.file} holds another adapter: other layers, rank or dtype than are trained now"
            )
        self._model.update(tree_unflatten(with_prefix("adapter.")))
        self._optimizer.state = tree_unflatten(with_prefix("optimizer."))
        position, has_gauss, gauss = state["random"]
        np.random.set_state(("MT19937", np.array(arrays["random"]), position, has_gauss, gauss))
        self._batches.permutation, self._batches.at = np.array(arrays["permutation"]), state["at"]
        self._model.step = state["step"]
        if isinstance(state["cuts"], list):
            self._cuts = state["cuts"]
        self.progress = Progress(**state["progress"])
        self._trainer.trained_tokens, self._began_at = self.progress.trained_tokens, self.progress.iteration
        self._saved_at = self._began_at
        w = self._window
        w.iterations, w.tokens, w.loss_sum, w.seconds = state["window"]
        self._report.note(f"Going on after iteration {self.progress.iteration}, from {checkpoint.file}")

    # --- Status and notes ---------------------------------------------------------------------------

    def status(self, state: str, lost: PeerLost | None = None, **fields: Any) -> None:
        """Write the run's status beside its adapter."""
        if not self._machines.leads(None if lost is None else lost.loss):
            return
        p, c, total = self.progress, self._config, self._model.stats.total
        done, seconds = p.iteration - self._began_at, time.perf_counter() - self._begin_s
        left = seconds / done * (c.iters - p.iteration) if done else None
        self._status.write(
            state,
            iteration=p.iteration,
            iters=c.iters,
            machines=self._machines.size,
            train_loss=p.train_loss,
            valid_loss=p.valid_loss,
            best_iteration=p.best_iteration,
            iterations_per_second=done / seconds,
            seconds_left=left if state == "running" else None,
            memory_nbytes=platform.memory_in_use(),
            peak_nbytes=total.peak_memory,
            read_nbytes=total.bytes_read,
            written_nbytes=total.bytes_written,
            **fields,
        )

    def _note_summary(self) -> None:
        model, p, step_s = self._model, self.progress, self._step_s
        if self._config.keep == "best" and p.best_iteration is not None:
            self._report.note(
                f"adapters.safetensors is of iteration {p.best_iteration}, whose validation loss was the lowest "
                f"({p.best_loss:.3f})"
            )
        if p.skipped_steps:
            self._report.note(f"Warning: {p.skipped_steps} steps were skipped: loss or gradients were not finite")
        if (plan := model.followed_plan) is not None and len(step_s) > STEPS_TO_LEARN_FROM:
            median = sorted(step_s[STEPS_TO_LEARN_FROM:])[(len(step_s) - STEPS_TO_LEARN_FROM) // 2]
            peak, planned, given = (n / 1e9 for n in (model.stats.total.peak_memory, plan.peak_nbytes, model.memory))
            self._report.note(
                f"A step took {median:.3g} s, and the process {peak:.2f} GB at most; planned were "
                f"{plan.step_s:.3g} s and {planned:.2f} GB, within {given:.2f} GB"
            )


@dataclass
class Progress:
    """Where a run is. The last step began at iteration `previous`. `losses` has [iteration, loss, tokens] per step."""

    iteration: int = 0
    previous: int = 0
    trained_tokens: int = 0
    skipped_steps: int = 0
    train_loss: float | None = None
    valid_loss_before: float | None = None
    valid_loss: float | None = None
    best_loss: float | None = None
    best_iteration: int | None = None
    validations_since: int = 0
    stopped: str | None = None
    losses: list[list[float]] = field(default_factory=list)


def _are_finite(gradients) -> bool:
    return mx.stack([mx.isfinite(gradient).all() for _, gradient in tree_flatten(gradients)]).all().item()


def _first_gradient(gradients) -> str | None:
    """The gradient that is not finite and is the last in the model, which the backward pass computes first."""
    names = [name for name, gradient in tree_flatten(gradients) if not mx.isfinite(gradient).all().item()]
    return f"the gradient of {names[-1]}" if names else None


class _Window:
    """Sums over the steps since the last report."""

    def __init__(self, model):
        self._model, self._begin = model, model.stats.total
        self.iterations = self.tokens = 0
        self.loss_sum = self.seconds = 0.0

    def add(self, iterations: int, loss: float, tokens: int, seconds: float) -> None:
        self.iterations += iterations
        self.tokens += tokens
        self.loss_sum += loss * tokens
        self.seconds += seconds

    def summary(self, iteration: int, learning_rate: float, trained_tokens: int) -> dict[str, Any]:
        now = self._model.stats.total
        return {
            "iteration": iteration,
            "train_loss": self.loss_sum / self.tokens,
            "learning_rate": learning_rate,
            "iterations_per_second": self.iterations / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "trained_tokens": trained_tokens,
            "read_gb": (now.bytes_read - self._begin.bytes_read) / 1e9,
            "wait_share": (now.wait_s - self._begin.wait_s) / self.seconds,
            "memory_gb": platform.memory_in_use() / 1e9,
            "peak_memory": now.peak_memory / 1e9,
        }
