"""What is in memory while a step runs under a schedule: what is always there, and what each of its phases adds.

The phases of a step are the forward pass of each visit to a block, the head, the backward pass of each visit, and the
optimizer's update. In ordinary training all blocks and the head are one graph, which is one phase. The step's peak is
what is always there with the phase that adds most. What a pass itself needs comes from `Experience`: what was measured,
or else arithmetic's bound. Only calculates.
"""

import itertools
from dataclasses import dataclass

from ..weights.sources import pieces_nbytes
from .job import Job, LayerCost, Visit
from .measure import BACKWARD, FORWARD, GRAPH, HEAD, Experience
from .schedule import Schedule

SLACK_NBYTES = 8 << 20  # what the process takes besides: Python's heap, stacks, small arrays
SLACK_SHARE = 0.03  # and this share of all that the step adds to the process


@dataclass(frozen=True)
class Phases:
    """What is in memory in a step, name -> bytes: what is always there, and what each phase adds to it.

    In ordinary training the graph of all blocks and the head is in the place of `head`, and there are no visits.

    Attributes:
        forward, backward: the passes of each visit, in the order of visits; None where there is no backward pass.
    """

    always: dict[str, int]
    head: dict[str, int]
    forward: list[dict[str, int]]
    backward: list[dict[str, int] | None]
    optimizer: dict[str, int]


@dataclass(frozen=True)
class MemoryUse:
    """Says what steps take in memory.

    Args:
        process_nbytes: bytes that the process takes before the first step.
        experience: what was measured. An empty one leaves arithmetic's bounds.
    """

    process_nbytes: int
    experience: Experience

    def peak(self, job: Job, schedule: Schedule) -> int:
        """The most bytes that the process takes in a step."""
        return self.peak_and_parts(job, schedule)[0]

    def peak_and_parts(self, job: Job, schedule: Schedule) -> tuple[int, dict[str, int]]:
        """(the most bytes that the process takes in a step, what they are made of: name -> bytes)."""
        phases = self.phases(job, schedule)
        backward = [phase for phase in phases.backward if phase is not None]
        largest = max([phases.head, *phases.forward, *backward, phases.optimizer], key=nbytes_of)
        parts = phases.always | largest
        total = sum(parts.values())
        parts["slack"] = SLACK_NBYTES + int(SLACK_SHARE * (total - self.process_nbytes))
        return total + parts["slack"], {name: nbytes for name, nbytes in parts.items() if nbytes}

    def phases(self, job: Job, s: Schedule) -> Phases:
        """What is in memory in each phase of a step."""
        hidden, cache, always = job.hidden_nbytes, s.cache_nbytes or 0, self._always(job, s)
        # new parameters and a new state are made before the old ones are freed
        updated = job.trainable_nbytes + job.optimizer_nbytes
        optimizer = {"computing": updated, "gradients": job.trainable_nbytes, "freed buffers": cache}
        if s.in_memory:
            graph = {"computing": self.graph_nbytes(job, s) + 2 * hidden, "freed buffers": cache}
            return Phases(always, graph, [], [], optimizer)
        kept = [job.micro_batches * visit.kept(s.kept_at(position))[0] for position, visit in enumerate(job.visits)]
        kept = [*itertools.accumulate(kept), sum(kept)]  # of the visits so far; the last one is the head's
        temporary = s.temporary_nbytes or (0,) * len(job.visits)
        temporary = [*temporary, temporary[-1]]

        def phase(position: int, computing: int, weights: int, gradients: int = 0, output: int = 0) -> dict[str, int]:
            """The visit at `position` is computed, or the head, whose position comes after the last visit's."""
            return {
                "activations": _inputs_nbytes(job, s, position) + output,
                "computing": computing,
                "gradients": gradients,
                "weights": weights,
                "kept outputs": kept[position],
                "blocks ahead of outputs": temporary[position],
                "freed buffers": cache,
            }

        forward, backward = [], []
        gradients = sum(visit.trainable_nbytes for visit in job.visits)  # of all visits above this one
        group = max((int(share * layer.compute_nbytes) for layer, share in _groups(job, s)), default=0)
        for position, visit in enumerate(job.visits):
            weights, offloaded = _copied_weights_nbytes(visit, s, group), offloaded_layers(visit, s)
            computing = self.experience.nbytes(job, visit.kind, FORWARD, visit.forward_nbytes) + 2 * hidden
            computing += max((layer.input_nbytes + layer.output_nbytes for layer in offloaded), default=0)
            forward.append(phase(position, computing, weights, output=hidden))
            gradients -= visit.trainable_nbytes
            if not visit.comes_back:
                backward.append(None)
                continue
            computing = self.experience.nbytes(job, visit.kind, BACKWARD, visit.backward_nbytes) + 2 * hidden
            computing += sum(layer.input_nbytes for layer in offloaded)
            backward.append(phase(position, computing, weights, gradients))
        computing = self.head_nbytes(job, s) + 2 * hidden
        if not (s.keep_head or s.head_ahead):  # its weights are brought in pieces before anything is computed
            computing = max(computing, pieces_nbytes(job.head_stored_nbytes, job.head_compute_nbytes))
        head = phase(len(job.visits), computing, 0 if s.keep_head else job.head_compute_nbytes)
        optimizer["blocks ahead of outputs"] = temporary[0]
        return Phases(always, head, forward, backward, optimizer)

    def _always(self, job: Job, s: Schedule) -> dict[str, int]:
        """What is in memory in every phase, name -> bytes."""
        sizes = streamed_nbytes(job, s) + ([job.head_stored_nbytes] if s.head_ahead else [])
        slots = s.slots * max(sizes, default=0)
        groups = (int(share * layer.stored_nbytes) for layer, share in _groups(job, s))
        return {
            "process": self.process_nbytes,
            "optimizer": job.optimizer_nbytes,
            "all blocks": sum(visit.compute_nbytes for visit in job.blocks) if s.in_memory else 0,
            "head": job.head_compute_nbytes if s.keep_head else 0,
            "block buffers": slots,
            "resident blocks": min(s.resident_nbytes, max(0, sum(sizes) - slots)),
            # masks, the first block's input and a copy of it, the cotangent on its way down
            "trace": job.micro_batches * (2 * job.hidden_nbytes + job.side_nbytes),
            "groups of experts": 2 * max(groups, default=0),  # one in use, and the next one
        }

    def workspace_nbytes(self, job: Job) -> int:
        """The most bytes that a block's pass, or the optimizer, makes."""
        nbytes = self.experience.nbytes
        passes = [nbytes(job, visit.kind, FORWARD, visit.forward_nbytes) for visit in job.visits]
        passes += [nbytes(job, v.kind, BACKWARD, v.backward_nbytes) for v in job.visits if v.comes_back]
        return max(*passes, job.trainable_nbytes + job.optimizer_nbytes)

    def head_nbytes(self, job: Job, s: Schedule) -> int:
        """The most bytes that the head makes; in ordinary training, that the graph of all blocks and the head makes."""
        if s.in_memory:
            return self.graph_nbytes(job, s)
        return self.experience.nbytes(job, HEAD, FORWARD, job.head_arrays_nbytes(s.head_tokens))

    def graph_nbytes(self, job: Job, s: Schedule) -> int:
        """The most bytes that all blocks and the head make as one graph."""
        return self.experience.nbytes(job, GRAPH, FORWARD, job.graph_arrays_nbytes(s.head_tokens))


def nbytes_of(phase: dict[str, int]) -> int:
    """All bytes that a phase adds."""
    return sum(phase.values())


def _inputs_nbytes(job: Job, s: Schedule, position: int) -> int:
    """Bytes of the inputs of visits that are in memory at the visit at `position`; the head's comes after the last."""
    # In a chain these are the inputs that the backward pass needs and that are not spilled. Else all before are there.
    n = max(position + 1 - max(s.spilled, job.first_kept), 0) if job.is_chain else position
    # Of spilled inputs, those of one visit are in memory, those that are being written, and the one read ahead.
    window = job.micro_batches + 3 if s.spilled else 0
    return (job.micro_batches * n + window) * job.hidden_nbytes


def _copied_weights_nbytes(visit: Visit, s: Schedule, group_nbytes: int) -> int:
    """Bytes of a block's weights in memory of their own. Of offloaded experts there is the group in use."""
    nbytes = visit.compute_nbytes if visit.is_copied else 0
    if not (offloaded := offloaded_layers(visit, s)):
        return nbytes
    return max(0, nbytes - sum(layer.compute_nbytes for layer in offloaded)) + group_nbytes


def _groups(job: Job, s: Schedule) -> list[tuple[LayerCost, float]]:
    """(layer, the share of it that is in memory at once) of each offloaded layer of experts."""
    layers = (layer for visit in job.visits for layer in offloaded_layers(visit, s))
    return [(layer, layer.group_share(s.group_nbytes)) for layer in layers]


def streamed_nbytes(job: Job, s: Schedule) -> list[int]:
    """Of each block that is streamed, the bytes on disk that come with it. In ordinary training none is."""
    if s.in_memory:
        return []
    return [v.stored_nbytes - sum(layer.stored_nbytes for layer in offloaded_layers(v, s)) for v in job.blocks]


def offloaded_layers(visit: Visit, s: Schedule) -> tuple[LayerCost, ...]:
    """The layers of experts that do not come with their block, but in groups."""
    return visit.layers if s.group_nbytes is not None else ()
