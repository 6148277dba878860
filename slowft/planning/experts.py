"""Whether a pass over few tokens does better to read the experts it needs than blocks whole.

Only calculates.
"""

from collections.abc import Iterable

# Of the rate of whole blocks: smaller requests, each asked for when the router has spoken, and hidden behind nothing.
# An estimate, not measured.
ON_DEMAND_RATE = 0.6


def read_share(n: int, per_token: float, tokens: int) -> float:
    """Of `n` experts, the share that `tokens` tokens go to on average, `per_token` each, drawn evenly.

    Trained routers draw less evenly, so they need fewer.
    """
    return 1.0 - (1.0 - min(per_token / n, 1.0)) ** tokens


def is_read_on_demand(layers: Iterable[tuple[int, int, float]], tokens: int, passes: int = 1) -> bool:
    """Whether a pass over `tokens` tokens, `passes` times in a row, is faster with only the experts read that it needs.

    Args:
        layers: (bytes, experts, experts that a token goes to) of each layer of experts of a block.
    """
    layers = list(layers)
    needed = passes * sum(nbytes * read_share(n, per_token, tokens) for nbytes, n, per_token in layers)
    return needed < ON_DEMAND_RATE * sum(nbytes for nbytes, _, _ in layers)
