"""Kernel distance (KID, Bińkowski et al. 2018) with a confidence interval.

The squared maximum mean discrepancy of k(x, y) = (x·y / D + 1)³, estimated without bias. The spread that is often
printed beside a KID, over subsets that overlap, is no interval. Here both sets are cut into disjoint blocks: the
estimates of the blocks are independent, so their mean has Student's interval (Zaremba et al. 2013 use such a mean in a
test), whether the distributions differ or not. `recipes/studies/kid_coverage.py` measures how often it holds the true
value.
"""

from torch import Tensor

from dyndit.errors import InputError
from dyndit.stats import Interval, paired_interval

MIN_BLOCKS = 10  # fewer widen Student's interval
MAX_BLOCK_SIZE = 1000  # KID's usual subset: bounds memory and time
MIN_PICTURES = 2 * MIN_BLOCKS


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """a: (N, D), b: (M, D) -> (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def mmd2(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased estimate of the squared discrepancy (may be below 0). a: (N, D), b: (M, D), N, M ≥ 2 -> scalar."""
    return _mean_of_pairs(cubic_kernel(a, a)) + _mean_of_pairs(cubic_kernel(b, b)) - 2 * cubic_kernel(a, b).mean()


def kernel_distance(a: Tensor, b: Tensor, confidence: float = 0.95) -> Interval:
    """KID of two sets and its interval, which counts the noise of both.

    a: (N, D), b: (M, D), float64, rows in an order that says nothing. Raises InputError: fewer than MIN_PICTURES in
    one.
    """
    fewest, most = sorted((len(a), len(b)))
    if fewest < MIN_PICTURES:
        raise InputError(f"--metrics kid: {fewest} pictures, expected at least {MIN_PICTURES}")
    num_blocks = min(max(MIN_BLOCKS, -(-most // MAX_BLOCK_SIZE)), fewest // 2)
    blocks = zip(a.tensor_split(num_blocks), b.tensor_split(num_blocks), strict=True)
    return paired_interval([mmd2(*block).item() for block in blocks], confidence=confidence)


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    """Mean of a square matrix off its diagonal."""
    num = len(kernel)
    return (kernel.sum() - kernel.trace()) / (num * (num - 1))
