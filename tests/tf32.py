"""TF32 as a GPU has it, simulated: a float32 product keeps 10 bits of its factors where torch is set so."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}     # arguments of each product
OLD = not hasattr(torch.backends, "fp32_precision")                             # before torch 2.9


def wanted() -> bool:
    """What cuBLAS is told: by the newer setting where torch has it."""
    if OLD:
        return torch.get_float32_matmul_precision() != "highest"
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def rounded(x: torch.Tensor, nearest: bool) -> torch.Tensor:
    """float32 x with 10 bits of mantissa: to the nearest, or cut off. Hardware does the one or the other."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000 if nearest else bits) & ~0x1FFF).view(torch.float32)


def coarse(func, args, nearest: bool = True) -> tuple:
    """The arguments of an operation as tensor cores would see them; `args` itself where they are not used."""
    places = FACTORS.get(func._schema.name.split("::")[1].rstrip("_"), ())
    if not places or args[places[0]].dtype != torch.float32 or not wanted():
        return args
    return tuple(rounded(a, nearest) if i in places else a for i, a in enumerate(args))


class TF32(TorchDispatchMode):
    """Every product in the block; `seen` counts those that were coarse."""

    def __init__(self, nearest: bool = True):
        super().__init__()
        self.nearest, self.seen = nearest, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        told = coarse(func, args, self.nearest)
        self.seen += told is not args
        return func(*told, **kwargs or {})
