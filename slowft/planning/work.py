"""What a step reads, computes and writes at each visit under a schedule. `timeline` turns this into seconds.

Takes a `Job`, a `Schedule`, the machine's rates and what was measured in this run. Gives `Read`s through the block
buffers and a `Work` for each visit. Only calculates.
"""

from .experts import read_share
from .job import Job, Visit
from .measure import ARRIVAL, BACKWARD, FORWARD, GRAPH, HEAD, Experience, Rates
from .phases import offloaded_layers, streamed_nbytes
from .schedule import Schedule
from .timeline import Read, Work, reads_of


def flops_per_s(job: Job, kind: str, direction: str, rates: Rates, experience: Experience) -> float:
    """Floating point operations a second of such passes: as measured in this run, else by the machine's rates."""
    usual = {HEAD: rates.head, GRAPH: rates.backward}.get(kind)
    usual = usual or (rates.forward if direction == FORWARD else rates.backward)
    return experience.per_s(job, kind, direction) or usual


def works_of(job: Job, s: Schedule, rates: Rates, experience: Experience) -> list[Work]:
    """The work of each visit of a step: forward, at the head, and backward. Ordinary training is one visit."""
    m = job.micro_batches
    if s.in_memory:
        seconds = m * job.graph_flops / flops_per_s(job, GRAPH, FORWARD, rates, experience)
        return [Work(seconds, seconds)]
    forward, backward = [], []
    for position, visit in enumerate(job.visits):
        arrival_s = 0.0
        if visit.is_copied:
            arrival_s = visit.compute_nbytes / (experience.per_s(job, visit.kind, ARRIVAL) or rates.cast)
        spilled = m * job.hidden_nbytes if job.first_kept <= position < s.spilled else 0
        experts = _experts_nbytes(job, s, visit)
        seconds = arrival_s + m * visit.forward_flops / flops_per_s(job, visit.kind, FORWARD, rates, experience)
        forward.append(Work(arrival_s if visit.is_copied else seconds, seconds, experts, spilled))
        if visit.comes_back:
            flops = visit.backward_flops - visit.kept(s.kept_at(position))[1]
            seconds = arrival_s + m * flops / flops_per_s(job, visit.kind, BACKWARD, rates, experience)
            # experts are read twice: for the recomputation, and for the cotangents
            backward.append(Work(arrival_s if visit.is_copied else seconds, seconds, 2 * experts + spilled))
    return [*forward, _head_work(job, s, rates, experience), *reversed(backward)]


def _head_work(job: Job, s: Schedule, rates: Rates, experience: Experience) -> Work:
    seconds = job.micro_batches * job.head_flops / flops_per_s(job, HEAD, FORWARD, rates, experience)
    is_copied = job.head_compute_nbytes != job.head_stored_nbytes
    cast_s = 0.0 if s.keep_head or not is_copied else job.head_compute_nbytes / rates.cast
    spilled = job.micro_batches * job.hidden_nbytes if len(job.visits) < s.spilled else 0
    # in pieces each is read, cast, and copied to where the layer is whole, while nothing is computed
    read = 0 if s.keep_head or s.head_ahead else job.head_stored_nbytes
    cast_s *= 2 if read else 1
    freed_s = cast_s if is_copied else cast_s + seconds
    return Work(freed_s, cast_s + seconds, read + spilled, spilled, inline_rate=1.0)


def _experts_nbytes(job: Job, s: Schedule, visit: Visit) -> int:
    """Bytes of offloaded experts that the forward pass of a visit reads. They come anew for each micro-batch."""
    tokens = job.rows * job.tokens
    return sum(
        int(job.micro_batches * read_share(layer.n, layer.per_token, tokens) * layer.stored_nbytes)
        for layer in offloaded_layers(visit, s)
    )


def reads_of_blocks(job: Job, s: Schedule) -> tuple[Read, ...]:
    """Reads of a step through the block buffers: of blocks, and of the head where it is read ahead."""
    blocks = streamed_nbytes(job, s)
    if not blocks:
        return ()
    sizes = blocks + [job.head_stored_nbytes] * s.head_ahead
    numbers = {visit.block: number for number, visit in enumerate(job.blocks)}
    temporary = s.temporary_nbytes or (0,) * len(job.visits)
    forward = [(numbers[visit.block], nbytes) for visit, nbytes in zip(job.visits, temporary)]
    head = len(blocks) if s.head_ahead else None, temporary[-1]
    backward = [place for place, visit in zip(reversed(forward), reversed(job.visits)) if visit.comes_back]
    order, temporary = zip(*forward, head, *backward)
    capacities = [s.resident_nbytes + nbytes for nbytes in temporary]
    if len(set(blocks)) == 1:  # the capacity is a number of places, of which each block and the head take one
        footprints, capacities = [1] * len(sizes), [s.slots + nbytes // sizes[0] for nbytes in capacities]
    else:
        footprints, capacities = sizes, [s.slots * max(sizes) + nbytes for nbytes in capacities]
    return reads_of(order, sizes, footprints, capacities, s.slots)
