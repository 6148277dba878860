"""Rates with their uncertainty: Wilson's interval of a share, and the exact test of paired yes and no.

Comes in: counts. Goes out: figures. (Wilson 1927; McNemar's test in its exact form is the sign test on the pairs that
differ: Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13:91, 2013.)
"""

import math

Z = 1.959963984540054  # of 95%, two-sided


def wilson(k: int, n: int, z: float = Z) -> tuple[float, float]:
    """(low, high) of the share of which k of n were seen; of none, anything."""
    if n == 0:
        return 0.0, 1.0
    p, zz = k / n, z * z
    middle, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low, high = (middle - half) / (1 + zz / n), (middle + half) / (1 + zz / n)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p: how probable so uneven a share of pairs that differ is, if either way is as likely."""
    n, few = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)
