"""Measure the kernel distance (KID, Bińkowski et al. 2018) with a confidence interval.

KID is the squared maximum mean discrepancy of k(x, y) = (x·y / D + 1)³, estimated without bias. The usual spread over
overlapping subsets is not an interval. Here both sets are cut into disjoint blocks with independent estimates. So the
mean has Student's interval (Zaremba et al. 2013 use such a mean in a test), for equal and for different distributions.
`recipes/studies/kid_coverage.py` measures how often the interval holds the true value.
"""

from torch import Tensor

from dyndit.errors import InputError
from dyndit.stats import Interval, paired_interval

MIN_BLOCKS = 10  # fewer widen Student's interval
MAX_BLOCK_SIZE = 1000  # KID's usual subset: bounds memory and time
MIN_PICTURES = 2 * MIN_BLOCKS


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Evaluate k on all pairs.  a: (N, D), b: (M, D) -> (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def mmd2(a: Tensor, b: Tensor) -> Tensor:
    """Estimate the squared discrepancy without bias (may be below 0). a: (N, D), b: (M, D), N, M ≥ 2 -> scalar."""
    return _mean_of_pairs(cubic_kernel(a, a)) + _mean_of_pairs(cubic_kernel(b, b)) - 2 * cubic_kernel(a, b).mean()


def kernel_distance(a: Tensor, b: Tensor, confidence: float = 0.95) -> Interval:
    """Measure the KID of two sets and its interval, with the noise of both sets.

    a: (N, D), b: (M, D), float64, rows in random order. Raises InputError: a set has fewer than MIN_PICTURES rows.
    """
    fewest, most = sorted((len(a), len(b)))
    if fewest < MIN_PICTURES:
        raise InputError(f"--metrics kid: {fewest} pictures, expected at least {MIN_PICTURES}")
    num_blocks = min(max(MIN_BLOCKS, -(-most // MAX_BLOCK_SIZE)), fewest // 2)
    blocks = zip(a.tensor_split(num_blocks), b.tensor_split(num_blocks), strict=True)
    return paired_interval([mmd2(*block).item() for block in blocks], confidence=confidence)


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    """Return the mean of a square matrix off its diagonal."""
    num = len(kernel)
    return (kernel.sum() - kernel.trace()) / (num * (num - 1))
