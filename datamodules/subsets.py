"""Random subsets with a fixed seed, for wherever data is cut short: the first rows may all be of one class."""

import torch


def random_subset(total: int, n: int, seed: int = 0) -> list[int]:
    """Indices of n rows out of `total`, at random and in ascending order; all of them if there are no more than n."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:n].sort().values.tolist()
