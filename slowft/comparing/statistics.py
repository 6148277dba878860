"""Computes the uncertainty of shares: Wilson's interval (1927), and the exact test of paired yes and no.

Comes in: counts. Goes out: figures. The exact form of McNemar's test is the sign test on the pairs that differ
(Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13:91, 2013).
"""

import math

Z = 1.959963984540054  # the normal distribution's quantile for 95%, two-sided


def wilson(k: int, n: int, z: float = Z) -> tuple[float, float]:
    """The interval (low, high) of a share that was k of n in a sample; (0, 1) if the sample is empty."""
    if n == 0:
        return 0.0, 1.0
    p, zz = k / n, z * z
    middle, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low, high = (middle - half) / (1 + zz / n), (middle + half) / (1 + zz / n)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p: the probability of so uneven a split of the pairs that differ, if both ways are equally likely."""
    n, few = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)
