"""A worker of two: the gradient of its share of a step with partners from both, averaged. See test_distributed.py."""

import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bd_lightning.cli.build import instantiate
from bd_lightning.cli.config import compose, parse

FACTS = {"shape": (1, 4, 4), "num_classes": 2, "sigma_data": 0.7}
SIZE = 6


class Draws:
    """Stands for torch.randn: this rank's rows of what one process draws for the joined batch."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.generator, self.randn = rank, world, torch.Generator().manual_seed(3), torch.randn

    def __call__(self, *size, **options):
        rows, *rest = size[0] if isinstance(size[0], (tuple, list, torch.Size)) else size
        joined = self.randn(rows * self.world, *rest, generator=self.generator)
        return joined[self.rank * rows : (self.rank + 1) * rows]


class Loss(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.compute((x, torch.zeros(len(x), dtype=torch.long)), None)[0]["loss"]


def gradient(words: list[str], rank: int, world: int, gather: bool = True) -> torch.Tensor:
    """All gradients of one step, for rank of world; with one rank, those of the joined batch."""
    torch.manual_seed(0)
    config = compose(parse([*words, f"model.partners.gather={str(gather).lower()}"]))
    module = instantiate(config["model"], "model", FACTS).train()
    for p in module.parameters():  # heads start at zero
        torch.nn.init.normal_(p, std=0.1)
    data = 0.5 * torch.randn(2 * SIZE, *FACTS["shape"])
    size = 2 * SIZE // world
    step = Loss(module)
    if world > 1:
        step = DistributedDataParallel(step, find_unused_parameters=True)
    torch.randn, kept = Draws(rank, world), torch.randn
    try:
        step(data[rank * size : (rank + 1) * size]).backward()
    finally:
        torch.randn = kept
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


if __name__ == "__main__":
    rank, store, out, *settings = sys.argv[1:]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    gradients = [[gradient(words.split(), int(rank), 2, gather) for gather in (True, False)] for words in settings]
    if rank == "0":
        torch.save(gradients, out)
    distributed.destroy_process_group()
