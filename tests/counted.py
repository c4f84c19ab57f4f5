"""What runs, without a clock: names of the operations, and the bytes that they write."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Counts operations inside its context; views are none."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(one, torch.Tensor)]
        if not func.is_view and (tensors or out is None):
            self.names.append(str(func))
            self.bytes += sum(one.numel() * one.element_size() for one in tensors)
        return out
