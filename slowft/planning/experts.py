"""Whether an evaluation does better to read the experts that it was routed to than blocks whole.

Only calculates.
"""

from collections.abc import Iterable

GROUP_NBYTES = 32 << 20  # of experts brought at once where nothing else is said
# Of the rate of whole blocks: smaller requests, each asked for when the router has spoken. Measured with experts of
# 256 KB a matrix: 0.64 of 1.8 GB/s.
ON_DEMAND_RATE = 0.36
# Of experts: evaluations that need more read whole blocks. On a fast drive that is faster already (0.82 of them: 0.47 s
# for 0.73), on a slow one still slower.
NEARLY_ALL = 0.75


def read_share(n: int, per_token: float, tokens: int) -> float:
    """Of `n` experts, the share that `tokens` tokens go to on average, `per_token` each, drawn evenly.

    Trained routers draw less evenly, so they need fewer.
    """
    return 1.0 - (1.0 - min(per_token / n, 1.0)) ** tokens


def is_read_on_demand(layers: Iterable[tuple[int, int, float]], tokens: int, passes: int, seen: float | None) -> bool:
    """Whether an evaluation of `tokens` tokens, `passes` times in a row, is faster if it reads only what it needs.

    A single one never reads more than whole blocks, so there it is for the router to say.

    Args:
        layers: (bytes, experts, experts that a token goes to) of each layer of experts of a block.
        seen: share of the experts that as many tokens or fewer went to before, if that is known.
    """
    layers = list(layers)
    if passes == 1:
        return bool(layers) and (seen is None or seen < NEARLY_ALL)
    needed = passes * sum(nbytes * read_share(n, per_token, tokens) for nbytes, n, per_token in layers)
    return needed < ON_DEMAND_RATE * sum(nbytes for nbytes, _, _ in layers)
