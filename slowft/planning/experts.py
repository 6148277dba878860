"""Whether an evaluation reads whole blocks, or only the experts that its tokens go to. Only calculates."""

from collections.abc import Iterable

GROUP_NBYTES = 32 << 20  # bytes of experts that are brought at once where no schedule says otherwise
# Experts on demand come at this share of the rate of whole blocks: requests are smaller, and each waits for the router.
# Measured with experts of 256 KB a matrix: 0.64 of 1.8 GB/s.
ON_DEMAND_RATE = 0.36
# Evaluations that need a larger share of the experts than this read whole blocks. With 0.82 of them that is faster on a
# fast drive (0.47 s instead of 0.73), and still slower on a slow one.
NEARLY_ALL = 0.75


def read_share(n: int, per_token: float, tokens: int) -> float:
    """The share of `n` experts that `tokens` tokens need on average, if each draws `per_token` of them evenly.

    Trained routers draw less evenly, so they need fewer.
    """
    return 1.0 - (1.0 - min(per_token / n, 1.0)) ** tokens


def is_read_on_demand(layers: Iterable[tuple[int, int, float]], tokens: int, passes: int, seen: float | None) -> bool:
    """Whether `passes` evaluations of `tokens` tokens in a row are faster if they read only the experts they need.

    A single one never reads more than whole blocks, so it reads on demand unless nearly all experts were needed before.

    Args:
        layers: (bytes, experts, experts that a token goes to) of each layer of experts of a block.
        seen: the share of the experts that so many tokens, or fewer, needed before; None if that is not known.
    """
    layers = list(layers)
    if passes == 1:
        return bool(layers) and (seen is None or seen < NEARLY_ALL)
    needed = passes * sum(nbytes * read_share(n, per_token, tokens) for nbytes, n, per_token in layers)
    return needed < ON_DEMAND_RATE * sum(nbytes for nbytes, _, _ in layers)
