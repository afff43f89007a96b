"""Row lengths as instruction data has them: many short rows, a long tail; the same numbers on every machine."""

import math
import random
from statistics import NormalDist


def row_lengths(count: int = 256, mean: int = 120, longest: int = 512, spread: float = 0.8, seed: int = 0) -> list[int]:
    """Token counts at the quantiles of a log-normal with `mean`, cut at `longest`, in an order drawn by `seed`.

    `spread`: standard deviation of the logarithm. Cutting the tail lowers the mean by about one per cent.
    """
    location = math.log(mean) - spread**2 / 2
    quantiles = (NormalDist(location, spread).inv_cdf((rank + 0.5) / count) for rank in range(count))
    lengths = [min(round(math.exp(value)), longest) for value in quantiles]
    random.Random(seed).shuffle(lengths)
    return lengths
