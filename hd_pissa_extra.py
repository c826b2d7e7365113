"""What long and large runs want beside hd_pissa.py, built on it: `attach` here takes what it takes there, and

    dtype=, FSDP2         W in bfloat16 with its exact rest beside it; W sharded over the processes
    decompose=            components by a Gram matrix, faster than a full SVD and checked (the default here)
    gradients="global"    every shard learns from the whole batch (not in the paper)
    dropout=              on the adapter's input, drawn in the backward (the paper's table 5)
    basis=, bucket_mb=    A_i, B_i of other processes gathered again at every merge; size of a collective
    accumulate=           sums of the increments, for `export_lora`: a finished run as a PEFT adapter
    experts               of a mixture, which transformers 5 keeps side by side in 3-D parameters
    more refusals         replicas and rates that part, threads, reentrant checkpointing, heads drawn anew,
                          weights that overlap, layers and increments that were replaced

hd_pissa.py knows nothing of this file. Notation as there.
"""

import collections
import contextlib
import copy
import functools
import math
import os
import threading
import types
import warnings
import weakref

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import hd_pissa
from hd_pissa import everywhere, gather_shards, world_size

# ---- W sharded by FSDP2 --------------------------------------------------------------------------

def own_rows(weight: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The stored weight's rows on this process, and which they are: all, unless FSDP2 has cut dim 0."""
    if not hasattr(weight, "to_local"):
        return weight, slice(0, weight.shape[0])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    if len(shape) == 2 and shape[1] != weight.shape[1]:
        raise ValueError(f"a weight of {tuple(weight.shape)} is sharded as {weight.placements}; only dim 0 "
                         "may be cut, as fully_shard does without shard_placement_fn")
    # torch.chunk's last parts may be empty: their offset may lie anywhere
    start = min(offset[0], weight.shape[0])
    return weight.to_local(), slice(start, start + shape[0])

def shard_over_processes(model: nn.Module, device: torch.device) -> None:
    """FSDP2 over all processes: one unit for each block of layers, one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if world_size() == 1:
        raise ValueError("--shard_weights needs several processes; start them with torchrun")
    if any(isinstance(module, MutedExperts) for module in model.modules()):
        raise ValueError("--shard_weights: experts cannot be sharded; name the other layers in --targets")
    mesh = init_device_mesh(device.type, (world_size(),))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for blocks in reversed(lists):      # inner ones first, as fully_shard wants it
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

def as_sharded(local: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of this process as one part of a tensor that is cut as `weight` is."""
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(local, weight.device_mesh, weight.placements, shape=weight.shape,
                              stride=weight.stride())

def reshard(model: nn.Module) -> None:
    """Let go of the whole weights that FSDP2 has gathered for a forward."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()

def fold_rows_(W: torch.Tensor, rows: slice, left: torch.Tensor, right: torch.Tensor, share: float) -> None:
    """W += share left[rows] right in place, for the `rows` of a stored weight that W holds.

    In the blocks of the whole weight that `hd_pissa.fold_` cuts, those held in part computed in whole: a
    matrix product rounds by its shape, and this way no sharding of W changes a bit.
    """
    for a in range(rows.start - rows.start % 1024, rows.stop, 1024):
        b = min(a + 1024, left.shape[0])
        here = slice(max(a, rows.start), min(b, rows.stop))
        part = W[here.start - rows.start:here.stop - rows.start]
        block = part if part.shape[0] == b - a else W.new_zeros((b - a, W.shape[1]))
        if block is not part:
            block[here.start - a:here.stop - a] = part
        block.addmm_(left[a:b], right, alpha=share)
        if block is not part:
            part.copy_(block[here.start - a:here.stop - a])

def gather_later(local: torch.Tensor):
    """Begin `gather_shards`, and return a function that waits for its result."""
    if world_size() == 1:
        return lambda: local
    out, local = local.new_empty((world_size() * local.shape[0], *local.shape[1:])), local.contiguous()
    work = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, local, async_op=True)

    def result(sent=local):             # what is sent must live until it has arrived
        work.wait()
        return out
    return result

def reduce_later(whole: torch.Tensor):
    """(K, ...) on each process -> its own (S, ...), summed over the processes once the function beside it,
    which waits for that, was called."""
    if world_size() == 1:
        return whole, lambda: None
    out = whole.new_empty((whole.shape[0] // world_size(), *whole.shape[1:]))
    work = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, whole, async_op=True)

    def wait(sent=whole):               # as in gather_later
        work.wait()
    return out, wait

def reduce_shards(whole: torch.Tensor) -> torch.Tensor:
    """The same, waited for."""
    out, wait = reduce_later(whole)
    wait()
    return out

def nan_if_not_finite(tensors) -> torch.Tensor | float:
    """0, or NaN where one of the tensors holds what is not finite."""
    return torch.stack(torch._foreach_norm(tensors, math.inf)).amax() * 0 if tensors else 0.0

def side_by_side(pairs) -> list[torch.Tensor]:
    """[(A, B), ...] of E layers as (E, ...) and (E, ...); of one layer without a copy."""
    return [side[0][None] if len(side) == 1 else torch.stack(side) for side in zip(*pairs)]

# ---- W in bfloat16, exactly ----------------------------------------------------------------------

TENSOR_CORES = "dtype" in torch.ops.aten.mm.overloads()     # since torch 2.8: bfloat16 in, float32 out

def split(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 W as a bfloat16 high half, rounded half up, and the int16 rest: exact, in W's 4 bytes.

    The forward runs on the high half; adding small updates to it alone would lose nearly all of them.
    Truncating instead of rounding would move W by up to a whole unit of bfloat16.
    """
    bits = W.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)

def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 weight of its halves, inverse of `split`."""
    return ((high.contiguous().view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)

def compiled_kernels() -> dict:
    """`add_to_halves_`, `add_rounded_` and `pieces` as one kernel each, by Triton.

    Elementwise work on W is as slow as its traffic, and plain torch passes over W ten times. torch.compile
    makes such kernels too, but a call of them takes the host longer than it takes the GPU.
    """
    global tl                           # where Triton looks up the names of a kernel
    import triton
    import triton.language as tl

    @triton.jit
    def add(high, low, dU, share, size, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        here = i < size
        bits = tl.load(high + i, here).to(tl.int16, bitcast=True).to(tl.int32) << 16
        bits += tl.load(low + i, here).to(tl.int32)
        bits = (bits.to(tl.float32, bitcast=True) + share * tl.load(dU + i, here)).to(tl.int32, bitcast=True)
        top = (bits + 0x8000) >> 16
        tl.store(high + i, top.to(tl.int16).to(tl.bfloat16, bitcast=True), here)
        tl.store(low + i, (bits - (top << 16)).to(tl.int16), here)

    @triton.jit(do_not_specialize=["seed", "start"])        # they change from call to call
    def add_and_round(W, dU, share, seed, start, size, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        here = i < size
        bits = tl.load(W + i, here).to(tl.int16, bitcast=True).to(tl.int32) << 16
        value = bits.to(tl.float32, bitcast=True) + share * tl.load(dU + i, here)
        u = (start + i).to(tl.int32) ^ seed                 # `scramble`
        u = (u ^ ((u >> 16) & 0xFFFF)) * -2048144789
        u = (u ^ ((u >> 13) & 0x7FFFF)) * -1028477387
        u = (u ^ ((u >> 16) & 0xFFFF)) & 0xFFFF
        top = (value.to(tl.int32, bitcast=True) + u) >> 16
        tl.store(W + i, top.to(tl.int16).to(tl.bfloat16, bitcast=True), here)

    @triton.jit
    def cut(x, out, size, second: tl.constexpr, third: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        here, x, out = i < size, x + tl.program_id(1) * size, out + tl.program_id(1) * 3 * size
        value = tl.load(x + i, here)
        top = (value.to(tl.int32, bitcast=True) + 0x8000) >> 16
        value -= (top << 16).to(tl.float32, bitcast=True)
        first = top.to(tl.int16).to(tl.bfloat16, bitcast=True)
        top = (value.to(tl.int32, bitcast=True) + 0x8000) >> 16
        rest = top.to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(out + i, first, here)
        tl.store(out + size + i, rest if second else first, here)
        tl.store(out + 2 * size + i, rest if third else first, here)

    def launch(kernel, size, count, *args):
        with torch.cuda.device_of(args[0]):             # Triton launches on the current device
            kernel[(triton.cdiv(size, 1024), count)](*args, BLOCK=1024, enable_fp_fusion=False)

    def add_to_halves_(high, low, dU, share):
        launch(add, high.numel(), 1, high, low, dU.contiguous(), share, high.numel())

    def add_rounded_(W, dU, share, seed, start):
        launch(add_and_round, W.numel(), 1, W, dU.contiguous(), share, seed & 0x7FFFFFFF, start, W.numel())

    def pieces(x, order):
        (E, k, n), second, third = x.shape, order[1] == 1, order[2] == 1
        out = x.new_empty((E, 3 * k, n), dtype=torch.bfloat16)
        launch(cut, k * n, E, x.contiguous(), out, k * n, second, third)
        return out
    return {"add_to_halves_": add_to_halves_, "add_rounded_": add_rounded_, "pieces": pieces}

@functools.cache
def kernels() -> dict:
    """`compiled_kernels`, tried once; empty where there is no Triton, or it does not work."""
    from torch.utils._triton import has_triton
    try:
        made = compiled_kernels() if has_triton() else {}
        if made:
            made["pieces"](torch.zeros((1, 1, 1), device="cuda"), (0, 0, 1))
        return made
    except Exception as e:              # whatever Triton's compiler, the C compiler or the driver say
        said = f"{type(e).__name__}: {e}".splitlines()[0]
        warnings.warn(f"Triton does not work here ({said}), so merges take more passes over W; is there a C "
                      "compiler (CC)?", stacklevel=2)
        return {}

def add_to_halves_(high: torch.Tensor, low: torch.Tensor, dU: torch.Tensor, share: float) -> None:
    """high, low <- split(join(high, low) + share dU)."""
    if high.is_cuda and high.is_contiguous() and low.is_contiguous() and kernels():
        return kernels()["add_to_halves_"](high, low, dU, share)
    new_high, new_low = split(join(high, low) + share * dU)
    high.copy_(new_high)
    low.copy_(new_low)

def add_rounded_(W: torch.Tensor, dU: torch.Tensor, share: float, seed: int, start: int) -> None:
    """bfloat16 W <- W + share dU, rounded by `round_stochastically`."""
    if W.is_cuda and W.is_contiguous() and kernels():
        return kernels()["add_rounded_"](W, dU, share, seed, start)
    W.copy_(round_stochastically(W.float() + share * dU, seed, start))

def pieces(x: torch.Tensor, order: tuple[int, int, int]) -> torch.Tensor:
    """float32 (E, k, n) -> (E, 3k, n): its bfloat16 (0) and that of the rest (1) below each other, in an
    `order` that begins with 0; rounded as `split` does."""
    if x.is_cuda and kernels():
        return kernels()["pieces"](x, order)
    first = split(x)[0]
    parts = first, split(x - first.float())[0]
    return torch.cat([parts[i] for i in order], dim=1)

def product(left: torch.Tensor, right: torch.Tensor, rows: slice) -> torch.Tensor:
    """left[rows] right in float32; of bfloat16 pieces a b + a b' + a' b, by tensor cores.

    Off by 4e-6 of dW; W's own rounding to float32 is 3e-4 of it at the paper's rate. (TF32: 2e-4.)
    """
    if left.dtype == torch.bfloat16:
        return torch.mm(left[rows], right, out_dtype=torch.float32)
    return left[rows] @ right

class Slot(hd_pissa.Slot):
    """A layer whose W may be bfloat16, with its exact rest in `low`, or sharded by FSDP2 after attach."""

    dtypes = (torch.float32, torch.float64, torch.bfloat16)

    def __init__(self, *args):
        super().__init__(*args)
        W, V = self.W, [*self.adapters.slots, self][0].W
        if (W.is_inference() or W.device != V.device
                or (W.dtype == torch.float64) != (V.dtype == torch.float64)):
            raise ValueError(f"{self.name}.weight is {self.was}, the first {V.dtype} on {V.device}: load "
                             "weights on one device, in one precision, outside torch.inference_mode")
        subclass = type(W).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        if subclass and not hasattr(W, "fake_mode"):    # torchao's, say; not torch's own of shapes alone
            raise ValueError(f"{self.name}.weight is {self.was}, which makes a float tensor for every use; "
                             "an update would be lost with it. Load plain weights, or use "
                             f"exclude=['.{self.name}']")
        self.low, self.exact, self.dtype = None, self.adapters.rounding == "exact", self.module.weight.dtype
        if self.adapters.init == "random":
            self.mute = MuteFromSeed
        if self.module.weight.dtype == torch.bfloat16 and self.exact:
            self.low = torch.zeros_like(self.module.weight, dtype=torch.int16)
            self.note()

    def halve_(self) -> None:
        """Turn a float32 weight into halves, or for rounding="stochastic" into the high one alone."""
        self.module.weight.data, low = split(self.module.weight)
        self.was, self.dtype = self.kind(), self.module.weight.dtype
        if self.exact:
            self.low = low
            self.note()

    def local(self) -> tuple[torch.Tensor, slice]:
        """W as it is stored here and its rows. Low halves of another W than `note` saw are dropped."""
        W, rows = own_rows(self.module.weight)
        if self.low is not None and hasattr(self.module.weight, "to_local") > self.noted[2]:
            self.low = self.low[rows].to(W.device, copy=True)           # FSDP2 has sharded W since
            self.note()
        elif self.low is not None and self.noted[:2] != (W.data_ptr(), W._version):
            self.drop_low()
        return W, rows

    def drop_low(self) -> None:
        """The high halves are another weight's than the low ones."""
        if self.low.any():
            warnings.warn(f"{self.name}.weight was loaded or swapped after attach: it trains from here "
                          "on, without the 16 bits that were kept of the one before. To load both, "
                          "load the model first and the adapters' state after it", stacklevel=2)
        self.low.zero_()
        self.note()

    def note(self, sampled: torch.Tensor | None = None) -> None:
        """The low halves belong to the weight as it is now; `sampled` where that is not yet known."""
        W, _ = own_rows(self.module.weight)
        sharded = hasattr(self.module.weight, "to_local")
        self.noted = W.data_ptr(), W._version, sharded
        self.sampled = self.sample().clone() if sampled is None else sampled

    def probe(self) -> torch.Tensor:
        """Some 64 numbers of W as one whole number, float64: equal where replicas are. Slices are none."""
        if hasattr(self.W, "to_local") or self.fault():
            return torch.zeros((), dtype=torch.float64)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.W.element_size()]
        return self.sample().contiguous().view(bits).long().sum().remainder(2**52).double()

    def sample(self) -> torch.Tensor:
        """Some 64 numbers of W: `weight.data.copy_` changes them, and tells no version counter."""
        W, _ = own_rows(self.module.weight.detach())
        return W.flatten()[::max(1, W.numel() // 64)]

    def read(self, most: int | None = None) -> tuple[torch.Tensor, slice]:
        """W to its last bit, in float32 if it is halved, of the rows on this process (the first `most` of
        them), and which these are."""
        W, rows = self.local()
        W, rows = W[:most], slice(rows.start, min(rows.stop, rows.start + (most or rows.stop)))
        if self.low is not None:
            return join(W, self.low[:most]), rows
        return (W.float() if W.dtype == torch.bfloat16 else W), rows

    def write(self, W: torch.Tensor) -> None:
        """Put back what `read` gave."""
        local, rows = own_rows(self.module.weight)
        if self.low is not None:
            high, self.low = split(W)
            local.copy_(high)
            self.note(self.sampled)
        elif local.dtype == torch.bfloat16:
            local.copy_(round_stochastically(W, self.rounding_seed(), rows.start * W.shape[1]))

    def rounding_seed(self) -> int:
        return hd_pissa.seed_of("rounding", self.adapters.seed, self.adapters.step, self.name)

    def add_on_gpu_(self, W, low, dU, share: float, first: int) -> None:
        """bfloat16 W += share dU by one kernel, in rows from `first` on; plain torch takes many passes."""
        if low is None:
            add_rounded_(W, dU, share, self.rounding_seed(), first * W.shape[1])
        else:
            add_to_halves_(W, low, dU, share)
        torch.autograd.graph.increment_version(W)           # a kernel of Triton's does not tell

    def add_parts_(self, left, right, share) -> None:
        """On a GPU: dU in parts of up to 32 MiB, which stay in its cache, so that memory sees W twice.

        Parts are cut from the whole weight: a product rounds by its shape, and FSDP2's rows get the same.
        """
        (W, rows), n = self.local(), len(left)
        step = 1 << max(8, (2**23 // W.shape[1]).bit_length() - 1)
        for a in range(rows.start - rows.start % step, rows.stop, step):
            here = slice(max(a, rows.start), min(a + step, n, rows.stop))
            dU = product(left, right, slice(a, min(a + step, n)))[here.start - a:here.stop - a]
            own = slice(here.start - rows.start, here.stop - rows.start)
            self.add_on_gpu_(W[own], None if self.low is None else self.low[own], dU, share, here.start)
        if self.low is not None:
            self.note(self.sampled)

    def add_(self, left, right, share) -> None:
        if self.dtype == torch.bfloat16 and left.is_cuda:
            return self.add_parts_(left, right, share)
        sharded = hasattr(self.module.weight, "to_local")
        if self.dtype != torch.bfloat16 and not sharded:
            return super().add_(left, right, share)
        W, rows = self.read()
        if sharded:
            fold_rows_(W, rows, left, right, share)
        else:
            hd_pissa.fold_(W, left, right, share)
        self.write(W)

    def add_sum_(self, dU, share) -> torch.Tensor:
        W, rows = self.local()
        mesh, world = getattr(self.module.weight, "device_mesh", None), world_size()
        if mesh is not None and mesh.size() == world and mesh.ndim == 1:
            dU = reduce_shards(F.pad(dU, (0, 0, 0, -len(dU) % world)))[:len(W)]
        elif world > 1:
            dist.all_reduce(dU)         # of hybrid sharding or a part of the processes: the own rows of all
            dU = dU[rows]
        if self.dtype == torch.bfloat16 and W.is_cuda:
            self.add_on_gpu_(W, self.low, dU, share, rows.start)
            if self.low is not None:
                self.note(self.sampled)
            return dU
        W, _ = self.read()
        W.add_(dU, alpha=share)
        self.write(W)
        return dU

    def before_forward(self, x) -> None:
        """Also where another thread trains a shard, or this layer is recomputed for the wrong one."""
        super().before_forward(x)
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.jit.is_tracing():
            raise NotImplementedError("torch.func and torch.jit.trace cannot look into a muted layer; call "
                                      "adapters.detach_() first")
        adapters, backward = self.adapters, torch._C._current_graph_task_id() >= 0
        if x.device != (here := adapters.increments.device):
            raise ValueError(f"{self.name} runs on {x.device}, its adapter is on {here}: attach when the "
                             "model is where it trains")
        if adapters.owner not in (None, threading.get_ident()) and not backward:
            raise ValueError("another thread is inside adapters.shard(); train shards one after another")
        top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)     # from torch 2.8 on
        if (backward and adapters.owner is None and adapters.S > 1 and not adapters.whole_batch
                and torch.is_grad_enabled() and top and not top(True)):     # the other kind has hooks then
            raise ValueError("reentrant checkpointing recomputes this layer outside adapters.shard(): call "
                             "backward inside it, or use use_reentrant=False")
        halved, bias = self.module.weight.dtype == torch.bfloat16, getattr(self.module, "bias", None)
        wrong = [f"{what} {t.dtype}" for what, t in (("input", x), ("bias", bias))
                 if halved and t is not None and t.dtype != torch.bfloat16]
        if wrong and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{self.name} is bfloat16, its {' and '.join(wrong)}; run the model under "
                             "torch.autocast, or cast the rest of it too (parameters but those of also=, no "
                             "buffers)")

    def fault(self) -> str:
        """Also where the layer was replaced, or W is another module's too."""
        W, uses = self.W, self.adapters.uses
        if id(getattr(self, "owner", self.module)) not in self.adapters.there:
            return "is of a layer that was replaced"
        a = self.adapters.increments.data_ptr()
        b = a + self.adapters.increments.nbytes
        if not all(a <= p.data_ptr() < b for pair in self.leaves for p in pair):
            return "would miss increments that were replaced (p.data = ...); change them in place"
        if not hasattr(W, "to_local"):
            return super().fault() or ("is another module's too; tie before attach"
                                       if uses[hd_pissa.place(W)] > 1 else "")
        if W.dtype != self.dtype:
            return f"is {W.dtype}, was {self.dtype}; cast before attach"
        try:
            own_rows(W)
        except ValueError as e:
            return f"cannot be merged: {e}"
        return hd_pissa.TRAINABLE if W.requires_grad else ""

def stored(slot) -> tuple[torch.Tensor, slice]:
    """W of a slot to its last bit, of the rows on this process, and which these are."""
    return slot.read()

def whole(weight: torch.Tensor, low: torch.Tensor | None = None) -> torch.Tensor:
    """A weight as one plain tensor on every process, with its low half if it has one."""
    local, _ = own_rows(weight.detach())
    local = local if low is None else join(local, low)
    return as_sharded(local, weight).full_tensor() if hasattr(weight, "to_local") else local

# ---- Decomposition: cheaper than a full SVD (section 4.1) ----------------------------------------

@contextlib.contextmanager
def float32_products(precision: str = "ieee"):
    """Products of float32 matrices in float32 ("ieee"), or on a GPU in TF32 ("tf32"); afterwards as before.

    torch has two settings of this. The old one sets both, but since 2.9 raises where the new one alone was
    set and it is read; what multiplies follows the new one.
    """
    backends = [getattr(b, "matmul", None) for b in (torch.backends.cuda, torch.backends.mkldnn)]
    new = [(b, b.fp32_precision) for b in backends if hasattr(b, "fp32_precision")]
    old = "highest"
    with contextlib.suppress(RuntimeError):
        old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision({"ieee": "highest", "tf32": "high"}[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)
        for backend, value in new:
            backend.fp32_precision = value

def components(W: torch.Tensor, k: int, name: str = "W"):
    """`hd_pissa.components` by a Gram matrix where its result is right, by a full SVD elsewhere."""
    with float32_products():            # TF32 is too coarse for this, whatever was set
        found = gram_components(W, k, name) if W.dtype != torch.float64 else None
    return found or hd_pissa.components(W, k, name)

def checked(decompose):
    """`decompose`, whose result must be orthonormal."""
    def call(W, k, name):
        U, S, Vt = decompose(W, k, name)
        grams = [Q @ Q.T for Q in (U.T.double(), Vt.double())]      # TF32 would not do for this
        if max(torch.dist(G, torch.eye(k, device="cpu").to(G), p=math.inf) for G in grams) > 1e-4:
            raise ValueError(f"{name}: components not orthonormal, shards overlap; mend decompose=")
        return U, S, Vt
    return decompose and call

def gram_triplets(wide: torch.Tensor, G: torch.Tensor, k: int) -> tuple:
    """U (d, k), S (k,), Vt (k, max(m, n)) of `wide` by eigenvectors of G = wide wide^T, and their error."""
    E = torch.linalg.eigh(G).eigenvectors[:, -k:].flip(1)                       # (d, k), descending
    if wide.dtype == torch.float32:
        E = torch.linalg.qr(E).Q
        R, S, Vt = torch.linalg.svd(E.T @ wide, full_matrices=False)            # (k, k), (k,), (k, max(m, n))
        U = E @ R                                                               # (d, k)
        return U, S, Vt, ((wide @ Vt.T - U * S).norm(dim=0) / (10 * S).clamp_max(S[0])).max()
    SVt = E.T @ wide
    S = SVt.norm(dim=1)
    Vt = SVt / S.clamp_min(1e-300)[:, None]
    return E, S, Vt, torch.dist(Vt @ Vt.T, torch.eye(k, device="cpu").to(S), p=math.inf)

def gram_components(W: torch.Tensor, k: int, name: str = "W"):
    """The k largest singular triplets of float32 W (m, n) as `components` gives them, or None if inexact.

    The cheaper of two ways that passes its check: eigenvectors of the shorter side's Gram matrix in float32,
    their span refined by Rayleigh-Ritz; the same matrix in float64, since squaring W squares its condition
    and float32 loses the far tail. W without full rank passes neither.
    """
    M = W.detach().float()
    wide = M if M.shape[0] <= M.shape[1] else M.T                               # (d, max(m, n))
    for gram in (torch.float32, torch.float64):
        wide = wide.to(gram)
        G, error = wide @ wide.T, math.inf                                      # (d, d)
        # diag(R) of G times a random (d, k) follows the k largest eigenvalues: does float32 reach them?
        probe = torch.randn((len(G), k), generator=torch.Generator().manual_seed(0), device="cpu").to(G)
        R = torch.linalg.qr(G @ probe).R.diagonal().abs()
        if gram == torch.float32 and R.min() < 1e-3 * R.max():
            tqdm.write(f"{name}: squared singular values fall by {R.min() / R.max():.0e}: float64 Gram "
                       "matrix")
            continue
        with contextlib.suppress(torch.linalg.LinAlgError):                     # one that does not converge
            U, S, Vt, error = gram_triplets(wide, G, k)
        if error <= 1e-5:
            return (U, S, Vt) if wide.shape == M.shape else (Vt.T, S, U.T)
        tqdm.write(f"{name}: components by a {str(gram)[6:]} Gram matrix are off by {error:.0e}, next driver")
    return None

# ---- A basis from a seed, W in bfloat16 at two bytes: numbers that are made again, not kept -------

def scramble(x: torch.Tensor) -> torch.Tensor:
    """Uniform 32-bit integers from int32 ones, the same on every device: murmur3's finalizer."""
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return x

def seeded_columns(sizes: tuple, first: int, count: int, seed: int, device, dtype, drawn=()) -> list:
    """(count, size) for each size: columns first .. first + count - 1 of an orthonormal matrix, as rows.

        D C,   D random signs,   C[j, f] = (2/size)^1/2 cos(pi (2j + 1) f / (2 size))   the DCT,

    with the frequencies f in a random order. Signs and order come from `seed` alone, or from what
    `ingredients` gave before, for E layers of these sizes at once: (E, count, size).
    """
    made, last = [], first + count
    for size, draws in zip(sizes, zip(*(drawn or [ingredients(sizes, last, seed, device)]))):
        odd, table = cosines(size, torch.device(device), dtype)
        signs, f = (torch.stack(parts) for parts in zip(*(draw[:2] for draw in draws)))
        at = (odd * f[:, first:last, None]).remainder_(4 * size)        # (E, count, size)
        C = table.index_select(0, at.flatten()).view_as(at)
        for e, (_, _, zero) in enumerate(draws):
            if first <= zero < last:
                C[e, zero - first] *= math.sqrt(0.5)                    # the constant column is here
        C *= signs[:, None]
        made.append(C if drawn else C[0])
    return made

def ingredients(sizes: tuple[int, ...], count: int, seed: int, device) -> list:
    """What `seeded_columns` is made from: a byte a row, four a column, and where the constant column is."""
    generator, made = torch.Generator().manual_seed(seed), []
    like = dict(generator=generator, device="cpu")              # equal draws on every device
    for size in sizes:
        signs = 2 * torch.randint(0, 2, (size,), dtype=torch.int8, **like) - 1
        f = torch.randperm(size, **like)
        made.append((hd_pissa.sent(signs, device), hd_pissa.sent(f[:count].int(), device), int(f.argmin())))
    return made

@functools.lru_cache(64)
def cosines(size: int, device, dtype):
    table = torch.cos(torch.arange(4 * size, device=device, dtype=torch.float64) * (math.pi / (2 * size)))
    small = torch.int32 if size <= 2**15 else torch.int64       # for products with a frequency
    odd = 2 * torch.arange(size, device=device, dtype=small) + 1
    return odd, table.to(dtype) * math.sqrt(2 / size)

class Seeded:
    """A_i (k, m, r) and B_i (k, r, n) of shards first .. first + k - 1, made when they are asked for."""

    def __init__(self, slot, seed: int, first: int, k: int):
        self.slot, self.seed, self.first, self.k = slot, seed, first, k

    def drawn(self, device) -> list:
        """Kept with the layer, once for all shards: to draw takes longer than to make."""
        slot, kept = self.slot, vars(self.slot).setdefault("drawn", {})
        if device not in kept:
            seed = hd_pissa.seed_of("dct", self.seed, slot.name)
            kept[device] = ingredients((slot.m, slot.n), slot.adapters.K * slot.r, seed, device)
        return kept[device]

    def make(self, device, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = make_all([self], device, dtype)
        return A[0], B[0]

def make_all(seeded: list[Seeded], device, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, k, m, r) and (E, k, r, n) of E layers of equal sizes."""
    slot, at, k = seeded[0].slot, seeded[0].first, seeded[0].k
    A, B = (C.unflatten(1, (k, slot.r)) for C in seeded_columns(
        (slot.m, slot.n), at * slot.r, k * slot.r, 0, device, dtype, [one.drawn(device) for one in seeded]))
    root = slot.s ** -0.5               # s A_i B_i are slices of one orthogonal matrix, as S = 1 would give
    return A.mul_(root).mT, B.mul_(root)

class MuteFromSeed(hd_pissa.Mute):
    """The mute whose A, B (a Seeded, and None) are made in the backward and dropped again."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, dA, dB, *rest):
        ctx.made = dA.dtype
        return hd_pissa.Mute.forward(ctx, x, weight, bias, A, B, dA, dB, *rest)

    @staticmethod
    def backward(ctx, dY):
        seeded = ctx.A
        ctx.A, ctx.B = seeded.make(dY.device, ctx.made)
        grads = hd_pissa.Mute.backward(ctx, dY)
        ctx.A, ctx.B = seeded, None     # a graph that is kept may run backward again
        return grads

def round_stochastically(W: torch.Tensor, seed: int, start: int = 0) -> torch.Tensor:
    """float32 W as bfloat16: up or down with the probability that makes the mean exact.

    The bits are drawn from (seed, position): processes that hold other rows (`start` numbers before
    theirs) round alike.
    """
    bits = W.contiguous().view(torch.int32)
    at = torch.arange(start, start + bits.numel(), device=W.device).int().view(bits.shape)
    u = scramble(at ^ (seed & 0x7FFFFFFF)) & 0xFFFF
    return ((bits + u) >> 16).to(torch.int16).view(torch.bfloat16)      # towards or away from zero

# ---- Experts: matrices side by side in a 3-D parameter -------------------------------------------

def stacks(model: nn.Module):
    """(module's name, module, key, parameter) of 3-D parameters that may be matrices; no convolutions."""
    for name, module in model.named_modules():
        for key, p in () if isinstance(module, nn.modules.conv._ConvNd) else module._parameters.items():
            known = p is not None and not hasattr(p, "to_local")
            if known and p.dim() == 3 and min(p.shape) > 1:
                yield name, module, key, p

class Expert(nn.Module):
    """Stands in for the layer that one expert would be: `weight`, (m, n), is its part of the stack."""

    def __init__(self, owner: nn.Module, key: str, index: int):
        nn.Module.__init__(self)
        vars(self).update(owner=owner, key=key, index=index, seen=None)     # not as a submodule

    @property
    def stack(self):
        return self.owner._parameters.get(self.key)

    @property
    def weight(self):
        """Read anew, since somebody may have moved or replaced the stack; as before where it is none now."""
        stack, old = self.stack, self.seen
        if stack is None or hasattr(stack, "to_local"):
            return old
        W = stack.data[self.index]
        if old is None or (W.data_ptr(), W.dtype, W.device) != (old.data_ptr(), old.dtype, old.device):
            vars(self)["seen"] = nn.Parameter(W, requires_grad=False)
        return self.seen

class ExpertLinear(Expert, nn.Linear):
    """The same where the stack keeps (n, m), as nn.Linear does; only init="lora" tells the two apart."""

class ExpertSlot(Slot):
    """One expert's matrix, which its module calls as a part of the stack."""

    owner = property(lambda self: self.module.owner)
    W = property(lambda self: self.module.weight)

    def halve_(self) -> None:
        """The whole stack, since it has one dtype: of all its experts."""
        parts = [split(W) for W in self.module.stack.data]
        self.module.stack.data = torch.stack([high for high, _ in parts])
        for slot in self.owner.hd_pissa.slots[self.module.key]:
            slot.was, slot.dtype = slot.kind(), slot.W.dtype
            if slot.exact:
                slot.low = parts[slot.module.index][1]
                slot.note()

    def fault(self) -> str:
        if (stack := self.module.stack) is None:
            return "is no parameter any more; parametrize before attach"
        if hasattr(stack, "to_local"):
            return "is sharded, but experts cannot be; leave them out with exclude=, or out of fully_shard"
        if stack.requires_grad:
            return "was made trainable; only merge_ changes it"
        return super().fault()

def make_slot(name: str, module: nn.Module, *rest) -> Slot:
    return (ExpertSlot if isinstance(module, Expert) else Slot)(name, module, *rest)

class MuteExperts(torch.autograd.Function):
    """The stack as it is, for whatever the model multiplies it with; the backward gets dW of all its experts
    at once, from the tokens of each (zeros where it had none), and gives the gradients of residual PiSSA:

        g_A = s dW B_i^T      g_B = s A_i^T dW      (4.3), since dW = X^T dY

    dW is as large as the stack, until its backward ends. (transformers' eager loop makes one an expert and
    adds them up, grouped_mm and batched_mm make one.)
    """

    @staticmethod
    def forward(ctx, stack, slots, *leaves):
        ctx.slots, ctx.factors, ctx.like = slots, [(slot.A, slot.B) for slot in slots], leaves[0].dtype
        ctx.shapes = leaves[0].shape, leaves[-1].shape          # (m, r), (r, n), or with k in front
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx, dW):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("create_graph=True: muted experts have first derivatives alone; "
                                      "call adapters.detach_() for second ones")
        s, r = ctx.slots[0].s, ctx.slots[0].r
        with torch.autocast(dW.device.type, enabled=False):
            dW = dW if ctx.slots[0].conv1d else dW.mT                           # (E, m, n)
            A, B = zip(*ctx.factors)
            A, B = (make_all(A, dW.device, ctx.like) if B[0] is None else map(torch.stack, (A, B)))
            A, B = A.mul_(s), B.mul_(s)                                         # (E, k, m, r), (E, k, r, n)
            A, B = A.transpose(1, 2).flatten(2).to(dW.dtype), B.flatten(1, 2).to(dW.dtype)
            gA = (dW @ B.mT).unflatten(2, (-1, r)).transpose(1, 2)      # (E, m, kr) -> (E, k, m, r)
            gB = (A.mT @ dW).unflatten(1, (-1, r))                      # (E, kr, n) -> (E, k, r, n)
        # Each in memory of its own: somebody may change one of them in place.
        return None, None, *(g.reshape(shape).to(ctx.like, copy=True)
                             for side, shape in zip((gA, gB), ctx.shapes) for g in side)

class MutedExperts(hd_pissa.Muted):
    """Mixed in front of a module that owns stacks: in its forward, reading one gives the muted stack."""

    def forward(self, *args, **kwargs):
        plain, own = super(hd_pissa.Muted, self).forward, self.hd_pissa
        if torch.compiler.is_compiling():
            return plain(*args, **kwargs)
        own.first.before_forward(next(iter((*args, *kwargs.values()))))
        before, own.here.muted = getattr(own.here, "muted", None), {}
        try:
            return plain(*args, **kwargs)
        finally:
            own.here.muted = before

def read_stack(key: str, module: MutedExperts) -> torch.Tensor:
    """The parameter, as everybody else sees it; in its module's forward the muted one."""
    own, stack, made = module.hd_pissa, nn.Module.__getattr__(module, key), {}
    if not torch.compiler.is_compiling():
        made = getattr(own.here, "muted", None)
    if made is None or not torch.is_grad_enabled():
        return stack
    if key not in made:                 # once a forward: loops read it for every expert
        slots = own.slots[key]
        made[key] = MuteExperts.apply(stack, slots, *(s.dA for s in slots), *(s.dB for s in slots))
    return made[key]

@functools.cache
def muted_class(plain: type, keys: tuple[str, ...]) -> type:
    return type(f"Muted{plain.__name__}", (MutedExperts, plain),
                {key: property(functools.partial(read_stack, key)) for key in keys})

# ---- What is adapted, and what would stay as it is without a word --------------------------------

def ends(name: str, suffix: str) -> bool:
    return f".{name}" == suffix or f".{name}".endswith(f".{suffix}")

def uses_of(modules) -> collections.Counter:
    """How many of the modules hold the weight that lies at each place: more than one, and it is tied."""
    return collections.Counter(
        hd_pissa.place(p) for x in modules for p in x._parameters.values() if p is not None)

def suffixes(given) -> list[str]:
    """`targets` or `exclude` as a list."""
    single = isinstance(given, str) or not hasattr(given, "__iter__")
    names = [] if given is None else [given] if single else [*given]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{wrong[0]!r} (targets, exclude) must be the end of layers' names, a string")
    return names

def find_experts(model: nn.Module, targets: list, exclude: list, least: int):
    """(name, Expert) of each matrix in a stack, {name: reason} of stacks left out, suffixes that hit one."""
    found, skipped, used, uses = [], {}, set(), uses_of(model.modules())
    weights = sum(p.numel() for p in model.parameters())
    for path, module, key, p in stacks(model):
        name = f"{path}.{key}".lstrip(".")
        names = path, name, *(f"{name}.{i}" for i in range(len(p)))
        hits, outs = ({t for t in ts if any(ends(x, t) for x in names)} for ts in (targets, exclude))
        used |= hits | outs
        called = f"{type(module).__name__} {path if key != 'weight' else ''}".lower()
        every = "all-linear" in targets and "expert" in called
        small = min(p.shape[1:]) < least
        reasons = {"in exclude": outs, "a forward of its own": "forward" in vars(module),
                   f"a 3-D parameter (experts), {p.numel() / weights:.1%} of the model": not (every or hits),
                   "tied weight": uses[hd_pissa.place(p)] > 1,
                   f"fewer than K r = {least} components": small and not hits}
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            skipped[name] = reason
        elif small:
            raise ValueError(f"{name} is {(*p.shape,)}: K r = {least} components are needed, it has "
                             f"{min(p.shape[1:])}; lower rank or shards, or use exclude=[{name!r}]")
        else:
            kind = Expert if getattr(module, "is_transposed", False) else ExpertLinear
            found += [(f"{name}.{i}", kind(module, key, i)) for i in range(len(p))]
    return found, skipped, used

def heads_of(model: nn.Module, linear: dict) -> list[str]:
    """Layers of a transformers model that lie outside its base model, whatever their names."""
    inside = {id(module) for module in getattr(model, "base_model", model).modules()}
    told = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    return [] if told else [name for name, module in linear.items() if id(module) not in inside]

def overlapping(model: nn.Module) -> set[int]:
    """Ids of parameters and buffers some of whose numbers are another's too."""
    spans, ids, end, last = [], set(), 0, None
    for p in {id(p): p for p in (*model.parameters(), *model.buffers())}.values():
        if type(p) in (nn.Parameter, torch.Tensor) and not p.is_meta and p.numel():
            last_number = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride()))
            spans.append((p.data_ptr(), p.data_ptr() + (last_number + 1) * p.element_size(), id(p)))
    for a, b, i in sorted(spans):
        ids |= {i, last} if a < end else set()
        end, last = max((end, last), (b, i))
    return ids

def find_layers(model: nn.Module, targets="all-linear", exclude=(), least: int = 1, beside=frozenset()):
    """`hd_pissa.find_layers`, and (name, Expert) of each matrix in a stack, "<module>.<parameter>.<index>".

    A suffix selects a stack where it ends one of these names, or the parameter's or the module's: "experts".
    "all-linear" takes stacks that are called experts, by class or name. Raises ValueError where a target
    names only what cannot be adapted, and where something was drawn, not loaded, and would stay so: it is
    neither adapted nor `beside`, the ids of what trains whole.
    """
    targets, exclude, named = suffixes(targets), suffixes(exclude), dict(model.named_modules())
    linear = {name: module for name, module in named.items()
              if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"}
    found, stacked, used = find_experts(model, targets, exclude, least)
    names, leave = ([t for t in ts if t not in used or any(ends(x, t) for x in linear)]
                    for ts in (targets, exclude))
    # A layer of another kind may be excluded, as the remedy below prints it.
    leave = [t for t in leave if any(ends(x, t) for x in linear) or not any(ends(x, t) for x in named)]
    heads = [name for name in heads_of(model, linear) if not any(ends(name, t) for t in names)]
    layers, skipped = [], dict.fromkeys(linear, "not in targets")
    if names and linear or not found:           # not where experts alone are meant
        layers, skipped = hd_pissa.find_layers(model, names, [*leave, *(f".{x}" for x in heads)], least)
    skipped |= {name: "output head" for name in heads
                if name in skipped and not any(ends(name, t) for t in leave)}
    read = {id(x.out_proj) for x in named.values() if isinstance(x, nn.MultiheadAttention)}
    skipped |= {name: "nn.MultiheadAttention reads its weight and never calls it"
                for name, module in linear.items() if id(module) in read
                and skipped.get(name, "a weight").startswith("a weight")}
    shared = overlapping(model)
    taken = {hd_pissa.place(slot.W) for live in hd_pissa.LIVE.values() for slot in live.slots
             if hasattr(slot.module, "hd_pissa")}       # an attach that failed has left none
    for name, module in layers:
        if id(module.weight) in shared:
            skipped[name] = "tied weight"
        elif hd_pissa.place(module.weight) in taken:
            skipped[name] = "adapted already in another model"
    layers = [(name, module) for name, module in layers if name not in skipped]
    for t in names:
        lost = [name for name in skipped if ends(name, t) and not any(ends(name, x) for x in leave)]
        if lost and not any(ends(name, t) for name, _ in layers):
            raise ValueError(f"{t!r} (targets) names only what cannot be adapted, {lost[0]} "
                             f"({skipped[lost[0]]}); drop it")
    if not layers + found:
        raise ValueError(f"no layer to adapt, of {skipped}; name others in targets")
    fine = {id(p) for p in model.parameters() if getattr(p, "_is_hf_initialized", False)}
    fine |= beside | {id(module.weight) for _, module in layers} if fine else beside
    new = [name for name, module in named.items() if name and not any(ends(name, t) for t in exclude) and any(
        id(p) not in fine for p in module._parameters.values()
        if p is not None and p.dim() > 1)]
    if new and fine > beside:
        raise ValueError(f"{', '.join(new)}: a head that was drawn, not loaded, and would stay as it is; "
                         f"hd_pissa_extra.attach(also={new}) trains it whole, exclude={new} leaves it so")
    adapted = {name.rpartition(".")[0] for name, _ in found}
    return layers + found, {k: why for k, why in (skipped | stacked).items() if k not in adapted}

# ---- The same weights on all processes -----------------------------------------------------------

def checksum(tensor: torch.Tensor, start: int = 0) -> int:
    """sum_p bits[p] (2p + 1) mod 2^64 over positions p = start, start + 1, ..., as a signed number.

    Positions weigh, so that two swapped numbers show; sums of a tensor's parts add up to the whole's.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in tensor.detach().contiguous().flatten().view(bits).split(1 << 20):
        at = torch.arange(start, start + len(part), device=tensor.device)
        total, start = total + (part.long() * (2 * at + 1)).sum(), start + len(part)
    return int(total)

def arithmetic(device: torch.device) -> tuple[str, ...]:
    """A name, and what decides how a product rounds: libraries choose their kernels by these."""
    if device.type != "cuda":
        return "a CPU", torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"
    gpu = torch.cuda.get_device_properties(device)
    return (gpu.name, f"compute capability {gpu.major}.{gpu.minor}",
            f"{gpu.multi_processor_count} multiprocessors", f"torch {torch.__version__}")

def unlike_machines(device: torch.device) -> str:
    """Which process rounds products otherwise than process 0, "" if none does. All processes call it."""
    first, *others = everywhere(lambda: arithmetic(device))
    return next((f"process 0 computes on {', '.join(first)}, process {i} on {', '.join(other)}: their "
                 "products round differently, so their copies of W would drift apart"
                 for i, other in enumerate(others, 1) if other[1:] != first[1:]), "")

# ---- Adapters for long and large runs ------------------------------------------------------------

class Adapters(hd_pissa.Adapters):
    """hd_pissa.Adapters with the options of `attach` below. Each is one method of the core, extended."""

    Slot = staticmethod(make_slot)

    def __init__(self, model, found, skipped, config, exchange, seed, device, *, init, also, dropout,
                 gradients, send, basis, rounding, bucket_mb, accumulate):
        config.update(init=init, dropout=dropout, gradients=gradients)
        if init == "random":
            config.update(seed=seed)    # it is the basis
        self.dropout, self.whole_batch, self.resend = dropout, gradients == "global", basis == "resend"
        self.init, self.rounding, self.also, self.collected = init, rounding, also, False
        self.send, self.astray, self.travels = send, None, None
        self.owner, self.lock = None, threading.RLock()             # of the thread inside shard()
        self.groups = weakref.WeakKeyDictionary()                   # of optimizers
        self.states, self.loaded = weakref.WeakKeyDictionary(), 0.0     # of optimizers: see `moments`
        self.skip_nonfinite = 0                 # steps that `step_` may still leave out
        self.left = None                        # norm of the increments that an optimizer left
        self.there, self.uses = {}, {}                              # modules and weights: see Slot.fault
        self.agreed = repr((basis, bucket_mb, rounding, send, [*also]))     # by all processes
        super().__init__(model, found, skipped, config, exchange, seed, device)
        self.divide_by(self.K)
        self.applied, self.folded = torch.ones(()), torch.zeros(())
        self.sums = torch.zeros_like(self.increments) if accumulate else None   # of merged increments
        self.owners: dict[nn.Module, dict] = {}     # of stacks: {parameter: slots of its experts}
        self.backwards: dict[tuple, int] = {}   # by (layer, shard): dropout draws anew each time
        self.buckets = []
        for slot in self.slots:
            first = self.buckets[-1][0].start if self.buckets else -math.inf
            if (slot.start + slot.size - first) * self.K * self.basis.itemsize > bucket_mb * 2**20:
                self.buckets.append([])
            self.buckets[-1].append(slot)
        if self.whole_batch:
            self.catch()
        self.empty = init != "random"   # of a seed's there is nothing to decompose, send, keep or load

    def held(self) -> int:
        """Whole-batch gradients need A_i, B_i of all K shards at every backward; a seed makes all of them."""
        if self.init == "random":
            return 0
        return self.K if self.whole_batch else self.S if self.resend else super().held()

    def deal(self, init, decompose, progress) -> None:
        """Nothing without decompose=: a checkpoint is loaded later, or a seed makes A_i, B_i."""
        if decompose is not None:
            super().deal(init, decompose, progress)
            self.empty = False

    def select(self, i: int) -> None:
        super().select(i)
        for slot in self.slots:
            slot.mask = self.drop(slot, self.first + i) if self.dropout else None
            if self.whole_batch:
                (slot.A, slot.B), (slot.dA, slot.dB) = slot.views(self.basis), slot.caught
            if self.init == "random":
                first, k = (0, self.K) if self.whole_batch else (self.first + i, 1)
                slot.A, slot.B = Seeded(slot, self.seed, first, k), None

    @contextlib.contextmanager
    def shard(self, i: int):
        """As in hd_pissa.py, for one thread at a time."""
        if not self.lock.acquire(blocking=False):
            raise ValueError("shard() is in use by another thread; train shards one after another")
        owner, self.owner = self.owner, threading.get_ident()
        try:
            with super().shard(i):
                yield
        finally:
            self.owner = owner
            self.lock.release()

    def check(self, optimizer) -> None:
        super().check(optimizer)
        self.groups[optimizer] = groups_of(optimizer)

    def objection(self, optimizer) -> str:
        """As in hd_pissa.py, by what it does instead of its name.

        Increments begin every step at zero. So two copies of it train stand-ins with equal gradients:
        one lets them move on from 1, the other resets them to zero as merge_ does. Steps must be equal.
        """
        held = {id(p): p.device for group in optimizer.param_groups for p in group["params"]}
        own = held.keys() & self.increment_ids
        steps = [], []
        for start, made in zip((1.0, 0.0), steps):
            stand = {i: torch.full((4, 2), start, dtype=torch.float64, device=d, requires_grad=True)
                     for i, d in held.items()}
            probe = object.__new__(type(optimizer))
            new = {id(hooks): type(hooks)() for key, hooks in vars(optimizer).items() if "hooks" in key}
            state = collections.defaultdict(dict)
            if isinstance(optimizer, torch.optim.Adagrad):      # until torch 2.13 it begins with this state
                state |= {p: dict(step=p.new_zeros(()), sum=torch.zeros_like(p)) for p in stand.values()}
            new |= stand | {id(optimizer.state): state, id(optimizer): probe}
            try:
                vars(probe).update(copy.deepcopy(vars(optimizer), new), grad_scale=None, found_inf=None)
                for group in probe.param_groups:
                    group["lr"] = max(float(group["lr"]), 0.01)     # a warm-up may begin at 0
                for t in range(25):
                    before = {i: p.detach().clone() for i, p in stand.items()}
                    for p in stand.values():
                        p.grad = torch.linspace(1, 2 + t % 3, 8, device=p.device).to(p).view(4, 2)
                    type(probe).step(probe)
                    made += [stand[i].detach() - before[i] for i in own]
                    torch._foreach_mul_([p.detach() for p in stand.values()], start)
            except Exception as e:
                return f"takes no step on a copy ({e})"
        equal = any(map(torch.any, steps[0])) and all(
            torch.allclose(a, b, 1e-6, 0) for a, b in zip(*steps))
        return "" if equal else "has a rule that reads the parameter, or moves nothing"

    def before_step(self, optimizer) -> None:
        """Also where its groups have changed since it was checked, or it trains the model beside `also`."""
        super().before_step(optimizer)
        now, held = groups_of(optimizer), held_by([optimizer])
        if held & self.ids:
            if self.groups.get(optimizer, now) != now:
                self.look_at(optimizer)
            self.collect_()
            if self.states.get(optimizer) != id(optimizer.state):       # new, or load_state_dict
                self.states[optimizer] = id(optimizer.state)
                self.loaded += moments(self, optimizer)
        elif world_size() > 1 and held & {*map(id, self.model.parameters())}:
            raise ValueError(f"{type(optimizer).__name__} holds parameters of the adapted model: no one adds "
                             "up their gradients over processes, as attach(also=...) does")
        self.groups[optimizer] = now

    def after_step(self) -> None:
        super().after_step()
        if self.step < 16:
            self.left = torch.linalg.vector_norm(self.increments)

    def send_(self, tensors) -> None:
        """As in hd_pissa.py, but only what differs."""
        sums = everywhere(lambda: [checksum(t) for t in tensors]) if world_size() > 1 else []
        other = [t for t, of_all in zip(tensors, zip(*sums)) if len({*of_all}) > 1]
        super().send_(other)

    def step_(self, optimizer, told) -> list:
        """With `skip_nonfinite` steps left to drop, losses are read before the optimizer takes them in."""
        rows = gather_shards(told).tolist() if self.skip_nonfinite else []
        if all(math.isfinite(sum(row)) for row in rows):
            return super().step_(optimizer, told)
        leave_out(self, rows)
        return rows

    def __reduce__(self):
        warnings.warn("adapters are not copied with a model; state_dict() has A_i, B_i", stacklevel=2)
        return type(None), ()

    # -- experts

    def mute_experts(self) -> None:
        """Give every module that owns stacks its muted class; the stand-ins themselves are never called."""
        for slot in self.slots:
            if isinstance(slot, ExpertSlot):
                self.owners.setdefault(slot.owner, {}).setdefault(slot.module.key, []).append(slot)
        for owner, slots in self.owners.items():
            plain, first = type(owner), next(iter(slots.values()))[0]
            owner.hd_pissa = types.SimpleNamespace(plain_class=plain, slots=slots, first=first,
                                                   here=threading.local())
            owner.__class__ = muted_class(plain, tuple(slots))

    def detach_(self) -> None:
        super().detach_()
        self.collected = False          # what `also` named may train on
        while self.owners:
            owner, _ = self.owners.popitem()
            owner.__class__ = owner.hd_pissa.plain_class
            del owner.hd_pissa

    # -- parameters that train whole beside the adapters

    def named_parameters(self, first: int = 0):
        """Also the parameters of `also`, by their names in the model."""
        yield from super().named_parameters(first)
        yield from self.also.items()

    def sum_also(self) -> None:
        """Make the gradients of `also` those of the whole step batch.

        In local mode every shard's loss is a mean over its own tokens, and this is the mean over the K
        shards: exact where they have equally many tokens. In global mode it is the sum.
        """
        live = dict(self.model.named_parameters(remove_duplicate=False))
        spoilt = nan_if_not_finite([g for row in self.gradients() for g in row]) if world_size() > 1 else 0.0
        for name, p in self.also.items():
            if live.get(name) is not p:
                raise ValueError(f"{name} of also= was replaced after attach (fully_shard, assign=True), so "
                                 "it would not train; load it in place, or leave it out of fully_shard")
            if p.element_size() < 4:
                raise ValueError(f"{name} of also= was cast to {p.dtype}, where small updates are lost; "
                                 "leave it in float32")
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if world_size() > 1:
                dist.all_reduce(p.grad.add_(spoilt))        # all GradScalers leave such a step out, or none
            if not self.whole_batch:
                p.grad.div_(self.K)
            if not p.requires_grad:     # frozen since: by a gradient of zeros momentum would move it on
                p.grad = None

    # -- dropout on the adapter's input

    def drop(self, slot: Slot, shard: int):
        """A function of X: its mask, drawn in the backward by (seed, step, micro-step, shard, layer).

        Micro-steps are counted there: a forward that checkpointing recomputes must not advance them.
        """
        def draw(X):
            micro = self.backwards[slot.name, shard] = self.backwards.get((slot.name, shard), -1) + 1
            seed = hd_pissa.seed_of(self.seed, self.step, micro, shard, slot.name)
            generator, keep = torch.Generator(X.device).manual_seed(seed), 1 - self.dropout
            return torch.empty_like(X).bernoulli_(keep, generator=generator).div_(keep)
        return draw

    # -- whole-batch gradients

    def catch(self) -> None:
        """Let every backward add up the factor gradients of all K shards; they go to the shards' owners.

        Leaves of all shards catch them, zeros without memory. send="step": what is caught, K times the
        increments, lives until `collect_` sends it: micro-batches add up first. Until then an increment's
        gradient is its part of what this process has caught, so zero_grad means both. send="backward":
        each layer's is sent and dropped at once, in every micro-batch.
        """
        own = slice(self.first, self.first + self.S)
        for j, slot in enumerate(self.slots):
            zero = torch.zeros((), dtype=self.basis.dtype, device=self.device)
            shapes = (self.K, slot.m, self.r), (self.K, self.r, slot.n)
            slot.caught = [zero.expand(shape).detach().requires_grad_() for shape in shapes]
            tag = float(hd_pissa.seed_of(slot.name) % 2**16)
            for leaf, mine in zip(slot.caught, zip(*slot.leaves)):
                if self.send == "backward":
                    leaf.register_post_accumulate_grad_hook(_send(weakref.ref(self), j, tag))
                    continue
                leaf.register_hook(_before_catching(weakref.ref(leaf), mine))
                leaf.register_post_accumulate_grad_hook(_after_catching(weakref.ref(self), mine, own))
            for i in range(self.S):
                slot.caught[1].register_post_accumulate_grad_hook(self.note(i))

    @torch.no_grad()
    def arrive(self) -> None:
        """Wait for gradients that a backward has sent; add them to earlier ones unless those were dropped."""
        if self.travels is None:
            return
        (wait, rows, tag, places), self.travels = self.travels, None
        wait()
        off = (rows[:, -1] - tag * world_size()).abs().sum()
        self.astray = off if self.astray is None else self.astray + off
        for p, before, g in places:
            if before is not None and p.grad is before:
                before.add_(g)

    @torch.no_grad()
    def collect_(self) -> None:
        """Sum gradients over the processes: caught ones, each shard's at its owner, and those of `also`.

        optimizer.step(), clip_grad_norm_ and merge_ do so. Call it yourself before you read or change
        gradients of several processes in another way (GradScaler.unscale_, say).
        """
        summed = world_size() > 1 and self.whole_batch      # else increments have the caught ones
        if self.collected or not (summed or self.also):
            return                      # once a step on every process, whatever it has caught: none waits
        self.collected = True
        self.arrive()
        self.sum_also()
        for slots in self.buckets if summed and self.send == "step" else ():
            parts = []                                                  # (K, m r) and (K, r n) of each layer
            for slot in slots:
                for leaf, mine in zip(slot.caught, zip(*slot.leaves)):
                    g = leaf.grad if mine[0].grad is not None else None
                    if g is not None and g._version != leaf.caught_version:
                        raise ValueError(f"gradients of {slot.name} were changed before they were summed "
                                         "over the processes; call adapters.collect_() first")
                    parts.append((leaf if g is None else g).flatten(1))
                    leaf.grad = None
            # What is not finite here is so for all shards: all GradScalers leave such a step out, or none.
            parts.append(nan_if_not_finite(parts).expand(self.K, 1))
            own = reduce_shards(torch.cat(parts, dim=1))                # (S, columns + 1)
            own = own[:, :-1] + own[:, -1:]
            for slot in slots:
                for pair, gA, gB in zip(slot.leaves, *slot.views(own, slots[0].start)):
                    pair[0].grad, pair[1].grad = gA.clone(), gB.clone()

    def squares(self) -> torch.Tensor:
        """NaN also where a gradient of `also` is not finite: a GradScaler leaves that step out."""
        also = [p.grad for p in self.also.values() if p.grad is not None]
        return super().squares() + nan_if_not_finite(also)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Over all K shards and what `also` names."""
        self.collect_()
        also = [p.grad for p in self.also.values() if p.grad is not None]
        if not also:
            return super().clip_grad_norm_(max_norm)
        squares = torch.stack(torch._foreach_norm(also)).double().square().sum()
        norm = (super().clip_grad_norm_(math.inf).square() + squares).sqrt()
        if max_norm < math.inf:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0)
            for grad in (p.grad for p in self.parameters() if p.grad is not None):
                grad.mul_(scale.to(grad))
        return norm

    # -- the merge

    def refuse(self, told=None):
        """Also raise where processes or replicas are not alike, or W is no longer this model's.

        Numbers for that travel with what the processes agree about: optimizers' rules, some of W, whether
        low halves are W's, whether NaN was put into `also`, what moments were loaded, whether somebody has
        changed the increments since the optimizer's step.
        """
        if self.empty:
            raise ValueError("merge_: the adapters are empty: call load_state_dict after "
                             "attach(decompose=None)")
        # Weights that an evaluation has gathered whole are copies: they would get the update.
        reshard(self.model)
        self.collect_()                 # where this process has left the optimizer's step out
        first, self.there = not self.begun, {id(module): module for module in self.model.modules()}
        self.uses = uses_of(self.there.values())
        halves = [slot for slot in self.slots if slot.low is not None]
        for slot in halves:
            slot.local()
        rules = [(type(o).__name__, *(float(g["lr"]) for g in o.param_groups)) for o in self.stepped]
        rule = hd_pissa.seed_of(rules) % 2**52 if rules else 0
        looked_at = self.slots[self.step % len(self.slots)]
        columns = torch.tensor((rule, 0, 1, 0, self.loaded, 0, 0), dtype=torch.float64, device="cpu")
        columns = hd_pissa.sent(columns, self.device)           # what follows is computed where W is
        if self.astray is not None:
            columns[6] = self.astray
        columns[1] = looked_at.probe()
        if halves:
            then, now = (torch.cat(side) for side in zip(*((slot.sampled, slot.sample()) for slot in halves)))
            columns[2] = (then == now).all()
        if also := [p.grad for p in self.also.values() if p.grad is not None]:
            columns[3] = nan_if_not_finite(also).isnan() & bool(self.stepped)
        if self.left is not None:
            torch.ne(torch.linalg.vector_norm(self.increments), self.left, out=columns[5])
        columns = columns.expand(self.S, len(columns))
        told, waits = super().refuse(columns if told is None else torch.cat((told, columns), dim=1))
        ruled, probes, halved, spoilt, loaded, changed, astray = zip(*(row[-7:] for row in told))
        told = [row[:-7] for row in told]
        if not math.isfinite(sum(map(sum, told))):
            return told, True           # this step is left out, whatever else
        if len({*probes}) > 1 and not first:
            raise ValueError(f"merge_: {looked_at.name}.weight differs between processes: load weights on "
                             "all of them alike, before attach, and use equal devices and versions")
        if any(astray):
            raise ValueError("merge_: the processes ran their backwards in different orders, or through "
                             "different layers, so gradients were mixed, and are in the optimizer's state "
                             "now; use send=\"step\"")
        if any(spoilt):
            raise ValueError("merge_: a gradient of also= was not finite on one process, and others made "
                             "the step; with a GradScaler call adapters.collect_() before scaler.unscale_()")
        if len({*ruled} - (set() if self.also else {0})) > 1:      # who left a step out keeps the old `also`
            raise ValueError("merge_: processes stepped by different optimizers or rates, here by "
                             f"{rules}; give all the same, and step schedulers on all")
        moments = [value for value in loaded[::self.S] if value]        # one of each process
        if len({*moments}) < len(moments) and self.init != "top":       # whose shards may be equal
            raise ValueError("merge_: processes have loaded the same optimizer state, so shards go on with "
                             "moments of others; let every process save and load its own state_dict()")
        if any(changed) and hd_pissa.process_index() == 0:
            warnings.warn("increments were changed after optimizer.step(). What reads or remembers them "
                          "(Lookahead, averages) goes wrong, since every step begins at zero: use its inner "
                          "optimizer alone", stacklevel=3)
        if not halved[self.first]:
            self.halved()
        if first and self.begun:
            copies = self.exchange == "all_gather" and not all(hasattr(s.W, "to_local") for s in self.slots)
            if copies and (said := unlike_machines(self.device)) and hd_pissa.process_index() == 0:
                warnings.warn(f'{said}. Use equal machines and versions, or exchange="all_reduce", which '
                              "sends the sums, or FSDP2, which keeps one W", stacklevel=3)
            others = {id(p) for p in self.model.parameters() if p.requires_grad and p.grad is not None}
            if self.groups and (lacks := len((self.ids | others) - held_by(self.groups))):
                what = "increments" + " and other trained parameters" * bool(others)
                warnings.warn(f"{lacks} of {len(self.ids | others)} {what} are in no optimizer that has "
                              "stepped; build it from adapters.parameters() (also= adds others)",
                              stacklevel=3)
            self.send_(self.weights())      # somebody may have loaded weights on one process
        return told, waits

    def halved(self) -> list[Slot]:
        """Slots with low halves, which are those of W as it is now."""
        slots = [slot for slot in self.slots if slot.low is not None]
        for slot in slots:
            slot.local()
            if not torch.equal(slot.sampled, slot.sample()):
                slot.drop_low()
        return slots

    def exchange_and_fold(self) -> None:
        """As the core does, a bucket of layers at a time; the next one travels while one is folded."""
        factors = self.exchange == "all_gather"
        first, k = (0, self.K) if factors else (self.first, self.S)
        columns = [slice(slots[0].start, slots[-1].start + slots[-1].size) for slots in self.buckets]

        def begin(c: slice):
            """Functions that give the bucket's increments and basis, of all K shards where factors travel."""
            if not factors:
                return lambda: self.increments[:, c], lambda: self.own[:, c]
            resend = 0 < len(self.basis) < self.K                       # basis="resend"
            return (gather_later(self.increments[:, c]),   # (S, ...) -> (K, ...)
                    gather_later(self.basis[:, c]) if resend else lambda: self.basis[:, c])

        ahead = begin(columns[0])
        for slots, a, after in zip(self.buckets, (c.start for c in columns), [*columns[1:], None]):
            here, ahead = ahead, after and begin(after)
            increments, basis = (wait() for wait in here)
            for group in self.alike(slots, k):
                A, B = (make_all([Seeded(slot, self.seed, first, k) for slot in group], self.device,
                                 self.increments.dtype) if self.init == "random" else
                        side_by_side([slot.views(basis, a) for slot in group]))
                Pt, Q = hd_pissa.update_factors(
                    A, B, *side_by_side([slot.views(increments, a) for slot in group]))
                # (E, 2kr, m), (E, 2kr, n) of the E layers of a group
                fast = factors and TENSOR_CORES and group[0].dtype == torch.bfloat16 and Pt.is_cuda
                Pt3, Q3 = (pieces(Pt, (0, 0, 1)), pieces(Q, (0, 1, 0))) if fast else (Pt, Q)
                for slot, *four in zip(group, Pt, Q, Pt3, Q3):
                    self.fold(slot, *four)
        if self.sums is not None:
            self.sums += self.increments
        if halves := [slot for slot in self.slots if slot.low is not None]:      # copied by one kernel
            samples = [slot.sample() for slot in halves]
            for slot, sampled in zip(halves, torch.cat(samples).split([len(x) for x in samples])):
                slot.sampled = sampled
        # Experts were folded through views; autograd is told that their parameters have changed.
        torch.autograd.graph.increment_version(
            [owner._parameters[key] for owner, slots in self.owners.items() for key in slots])

    def alike(self, slots, k: int):
        """`slots` in groups of equal shapes, whose factors are put together by one kernel for all: as many
        as take 32 MiB on a GPU; on a CPU, where a kernel costs little, as stay in its cache."""
        groups, room = collections.defaultdict(list), 2**25 if self.device.type == "cuda" else 2**20
        for slot in slots:
            groups[slot.m, slot.n, slot.dtype].append(slot)
        for same in groups.values():
            step = max(1, room // (k * same[0].size * self.increments.itemsize))
            yield from (same[i:i + step] for i in range(0, len(same), step))

    def fold(self, slot, Pt, Q, Pt3, Q3) -> None:
        """W += share P Q; `applied` is the part that rounding let through, in one layer a step.

            applied = (W' - W) . dW / |dW|^2   in the first 8 rows that this process holds of a weight

        Pt3, Q3     what is multiplied: Pt and Q, or their bfloat16 pieces
        """
        factors, looked_at = self.exchange == "all_gather", self.slots[self.step % len(self.slots)]
        left, right = (Pt.T, Q) if slot.conv1d else (Q.T, Pt)
        if slot is looked_at:
            W, rows = slot.read(8)
            before = W.clone()
            dU = left[rows].double() @ right.double() if factors else None
        left, right = (Pt3.T, Q3) if slot.conv1d else (Q3.T, Pt3)
        added = (slot.add_ if factors else slot.add_sum_)(
            *((left, right) if factors else (left @ right,)), self.share)
        if slot is looked_at:
            dW = self.share * (dU if factors else added[:8]).double()
            self.folded = ((slot.read(8)[0] - before).double() * dW).sum() / dW.square().sum()

    def next_step(self) -> None:
        super().next_step()
        self.applied, self.folded = self.folded, torch.zeros(())       # 0 of a step that is left out
        self.collected, self.astray, self.loaded, self.left = False, None, 0.0, None
        self.backwards.clear()
        for slot in self.slots if self.whole_batch else ():
            for leaf in slot.caught:
                leaf.grad = None

    # -- state

    def tensors(self) -> dict[str, torch.Tensor]:
        """Also the low halves of this process's rows, and the sums of its shards' increments."""
        own = {slot.name + ".low": slot.low for slot in self.halved()}
        for slot in self.slots if self.sums is not None else ():
            for kind, factors in zip(("dA.sum", "dB.sum"), slot.views(self.sums)):
                own |= {f"{slot.name}.shard{self.first + i}.{kind}": f for i, f in enumerate(factors)}
        return own | super().tensors()

    def state_dict(self) -> dict:
        return super().state_dict() | {"mean_over": self.mean_over}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.divide_by(state["mean_over"])

    def divide_by(self, mean_over: int) -> None:
        """The K of aggregate="mean". It stays when a checkpoint's components are dealt to another K."""
        self.mean_over = mean_over
        self.share = self.s / (mean_over if self.config["aggregate"] == "mean" else 1)

    def resume(self, step: int, mean_over: int | None = None) -> None:
        """Go on after `step` merges, once `tensors` are filled; "mean" divides by `mean_over`, a former K."""
        super().resume(step)
        self.empty = False
        self.divide_by(mean_over or self.mean_over)
        for slot in self.slots:
            if slot.low is not None:
                slot.note()             # the low halves that came along belong to the W that was loaded

def _before_catching(ref, mine):
    def hook(grad):
        leaf = ref()
        if leaf.grad is None:
            return
        changed = world_size() > 1 and leaf.grad._version != leaf.caught_version
        if mine[0].grad is None or changed and not any(p.grad.any() for p in mine):
            leaf.grad = None            # zeroed by the user, after a backward that failed, say
            for p in mine:
                p.grad = None
        elif changed:
            raise ValueError("gradients were changed before they were summed over the processes; call "
                             "adapters.collect_() first")
    return hook

def _after_catching(ref, mine, own):
    def hook(leaf):
        _refuse_collected(ref)
        for p, part in zip(mine, leaf.grad[own]):
            p.grad = part
        leaf.caught_version = leaf.grad._version
    return hook

def _send(ref, j, tag):
    """Sum what layer j has caught, (K, ...), over the processes; the own shards' stay.

    It travels while the backward does the next layer, and has arrived when the backward ends. The tag is
    the layer's: has everybody sent the same?
    """
    def hook(_):
        _refuse_collected(ref)
        adapters, slot = ref(), ref().slots[j]
        grads = [leaf.grad for leaf in slot.caught]
        if any(g is None for g in grads):
            return              # g_A and g_B travel together: of two, the second would wait for the first
        for leaf in slot.caught:
            leaf.grad = None
        rows = torch.cat([g.flatten(1) for g in grads] + [grads[0].new_full((len(grads[0]), 1), tag)], dim=1)
        adapters.arrive()
        rows, wait = reduce_later(rows)                                                     # (S, ...)
        places = [(p, p.grad, g) for side, gs in zip(zip(*slot.leaves), slot.views(rows, slot.start))
                  for p, g in zip(side, gs)]
        adapters.travels = wait, rows, tag, places
        for p, before, g in places:
            p.grad = g if before is None else before
        torch.autograd.Variable._execution_engine.queue_callback(adapters.arrive)
    return hook

def _refuse_collected(ref):
    if (adapters := ref()) is not None and adapters.collected:
        raise ValueError("the gradients of this step were summed already; call adapters.merge_() first, or "
                         "adapters.next_step() to leave the step out")

def leave_out(adapters, rows) -> None:
    """Leave a step out that is not finite: one less of `skip_nonfinite`; ValueError where none is left."""
    adapters.next_step()
    bad = [i for i, (loss, *_) in enumerate(rows) if not math.isfinite(loss)]
    text = f"step {adapters.step}: not finite: loss of shards {bad} or a gradient"
    adapters.skip_nonfinite -= 1
    if adapters.skip_nonfinite < 0:
        raise ValueError(f"{text}. Lower lr, clip, or look at these rows of the batch")
    if hd_pissa.process_index() == 0:
        tqdm.write(f"{text}; the step is left out")

def held_by(optimizers) -> set[int]:
    """Ids of what they train."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}

def groups_of(optimizer) -> list:
    """What somebody may change after the check."""
    return [(len(g["params"]), g.get("weight_decay")) for g in optimizer.param_groups]

def moments(adapters, optimizer) -> float:
    """A number for an optimizer's moments of the increments; 0 if there are none, or all are as at first."""
    kept = [x for p, state in optimizer.state.items() if id(p) in adapters.increment_ids
            for x in state.values()]
    total = sum((x - x.flatten()[0]).double().abs().sum() for x in kept
                if isinstance(x, torch.Tensor) and x.numel() > 1)
    return float(total) if math.isfinite(total) else 0.0

def attach(model: nn.Module, rank: int, *, init: str = "hd_pissa", dropout: float = 0.0,
           gradients: str = "local", send: str = "step", basis: str = "cached",
           dtype: torch.dtype | None = None, rounding: str = "exact", device=None, bucket_mb: int = 256,
           accumulate: bool = False, also=(), decompose=components, **core) -> Adapters:
    """`hd_pissa.attach`, whose arguments it takes, with more of them. It adapts experts too (`find_layers`).

    init        also "random": A_i, B_i are slices of random orthonormal matrices, made again from the seed
                when they are needed, and never kept, sent or saved. No SVD (not in the paper)
    dropout     probability, on the adapter's input; 0 = off. As with init="random", torch.compile breaks its
                graph at every adapted layer (results are the same, fullgraph=True fails)
    gradients   "local" (the paper: a shard learns from its own mini-batch) or "global" (from the whole batch:
                losses add up over processes, so divide by all tokens of the step)
    send        of gradients of the whole batch. "step": micro-batches add up, in K times the memory of the
                increments, and are sent once; "backward": sent by every backward, in that memory once.
                The latter needs equal backwards on all processes: no layer that only some of them run
    basis       "cached": A_i, B_i of all K shards on every process; "resend": gathered at each merge
    dtype       torch.bfloat16: float32 weights become bfloat16; None = off
    rounding    of bfloat16 weights. "exact": 16 more bits of each are kept here; "stochastic": nothing is
                kept, W + dW is rounded up or down so that its mean is exact
    device      of the adapters and the decomposition: "cuda" for W on the CPU until FSDP2 moves it; None: W's
    bucket_mb   MiB of gathered factors per collective
    accumulate  keep the sums of all merged dA_i, dB_i, as large as the increments, for `export_lora`
    also        names, or parts of names between dots, of modules or parameters that train whole
                beside the adapters: a new head, embeddings, norms. They are among
                adapters.parameters(), and the same on every process

    Call it before fully_shard. Raises ValueError, on every process alike, for what cannot be trained.
    """
    also, beside = [also] if isinstance(also, str) else also, {}

    def find(model, targets, exclude, least):
        beside.update(also_parameters(model, also))
        own = frozenset(id(p) for p in beside.values())
        whole = [name for name, x in model.named_modules()
                 if isinstance(x, nn.Linear) and id(x._parameters.get("weight")) in own]
        whole += [f"{name}.{key}".lstrip(".") for name, _, key, p in stacks(model) if id(p) in own]
        return find_layers(model, targets, [*suffixes(exclude), *whole], least, own)

    def make(model, found, skipped, config, exchange, seed, place):
        check_arguments(dropout, gradients, basis, dtype, rounding, send)
        keys = {x.key for _, x in found if isinstance(x, Expert)}
        if keys and dropout:
            paths = [(name.split("."), isinstance(x, Expert)) for name, x in found]
            own = sorted({path[-3] if path[2:] else path[-2] for path, expert in paths if expert})
            rest = sorted({".".join(path[-1 - (path[-1] in keys):]) for path, expert in paths if not expert})
            raise ValueError("dropout: the input of one expert is not known; leave experts out: "
                             f"exclude={own}, or --targets {','.join(rest)}")
        for name, module in found if dtype is not None else ():
            W = module.weight
            if dtype != W.dtype and (W.dtype, dtype) != (torch.float32, torch.bfloat16):
                raise ValueError(f"dtype={dtype} for {name}.weight of {W.dtype}: only float32 weights can be "
                                 "turned, into torch.bfloat16; use dtype=None")
        adapters = Adapters(model, found, skipped, config, exchange, seed, torch.device(device or place),
                            init=init, also=beside, dropout=dropout, gradients=gradients, send=send,
                            basis=basis, rounding=rounding, bucket_mb=bucket_mb, accumulate=accumulate)
        adapters.agreed += repr((dtype, accumulate)) + " without decompose=" * (decompose is None)
        return adapters

    seeded, make.find_layers = init == "random", find
    adapters = hd_pissa.attach(model, rank, init="hd_pissa" if seeded else init, make=make,
                               decompose=None if seeded else checked(decompose), **core)
    ref = weakref.ref(adapters)
    for p in beside.values():
        p.requires_grad_(True).register_post_accumulate_grad_hook(lambda _: _refuse_collected(ref))
    adapters.mute_experts()
    for slot in adapters.slots:
        if dtype == torch.bfloat16 and slot.module.weight.dtype == torch.float32:
            slot.halve_()
    return adapters

def also_parameters(model: nn.Module, also) -> dict[str, nn.Parameter]:
    """{name: parameter} of what `also` names; ValueError for names that are not there, or lazy ones."""
    if lazy := [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
        raise ValueError(f"{lazy[0]} has no shape yet: run one forward before attach")
    named, chosen = dict(model.named_parameters(remove_duplicate=False)), set()
    for part in also:
        hits = {name for name in named if f".{part}." in f".{name}."}
        if not hits:
            there = dict.fromkeys(name.rpartition(".")[0] for name in named)
            raise ValueError(f"also={part!r} names no module or parameter; there are {', '.join(there)}")
        chosen |= hits
    unique = {id(p): (name, p) for name, p in reversed(named.items()) if name in chosen}
    for name, p in unique.values():
        if p.element_size() < 4:
            raise ValueError(f"{name} of also= is {p.dtype}, where small updates are lost; cast it to "
                             "float32")
    return dict(reversed(unique.values()))

def check_arguments(dropout=0.0, gradients="local", basis="cached", dtype=None, rounding="exact",
                    send="step") -> None:
    """Raise ValueError for arguments of `attach` here that no model could be trained with."""
    for name, value, known in (("gradients", gradients, ("local", "global")),
                               ("basis", basis, ("cached", "resend")),
                               ("send", send, ("step", "backward")),
                               ("rounding", rounding, ("exact", "stochastic"))):
        if value not in known:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: must be None or torch.bfloat16")

# ---- A run as a LoRA ---------------------------------------------------------------------------------------

@torch.no_grad()
def lora_factors(adapters, slot, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """P (m, 2Kr) and Q (2Kr, n), float64, of all that was merged into a layer, but for second-order terms.

        P Q = s/K sum_i [(sum_t dA_i) B_i + A_i (sum_t dB_i)],  since A_i and B_i are fixed

    `rank`: fewer components, the best ones, by an SVD of the product. Collective: every process calls it.
    """
    if getattr(adapters, "sums", None) is None:
        raise ValueError("no sums of the increments were kept; attach with accumulate=True (--export_lora)")
    columns = slice(slot.start, slot.start + slot.size)
    dA, dB = slot.views(gather_shards(adapters.sums[:, columns]).double(), slot.start)
    if adapters.init == "random":
        A, B = Seeded(slot, adapters.seed, 0, adapters.K).make(adapters.device, torch.float64)
    else:
        A, B = slot.views(gather_shards(adapters.own[:, columns]).double(), slot.start)
    P = adapters.share * torch.cat((dA, A)).mT.flatten(0, 1).T        # (2K, m, r) -> (m, 2Kr)
    Q = torch.cat((B, dB)).flatten(0, 1)                                # (2K, r, n) -> (2Kr, n)
    if rank is not None:
        (P, left), (Q, right) = torch.linalg.qr(P), torch.linalg.qr(Q.T)
        U, S, Vt = torch.linalg.svd(left @ right.T)
        P, Q = P @ (U[:, :rank] * S[:rank]), Vt[:rank] @ Q.T            # (m, rank), (rank, n), at most
        P, Q = F.pad(P, (0, rank - len(Q))), F.pad(Q, (0, 0, 0, rank - len(Q)))
    return P, Q

def weight_in(state: dict, name: str) -> torch.Tensor | None:
    """The weight of a layer, or an expert's part of its stack, in a state_dict that has it."""
    stack, _, index = name.rpartition(".")
    if stack in state and index.isdecimal():
        return state[stack][int(index)]
    return state.get(name + ".weight")

def lora_places(layers) -> tuple[dict[str, list[str]], dict[str, str]]:
    """A LoraConfig's targets for (name, module) pairs, and {layer or stack: where PEFT keeps its LoRA}.

    It wraps a module once for each of its stacks, one around the other in the order of its parameters.
    """
    names = [name for name, x in layers if not isinstance(x, Expert)]
    stacks = list(dict.fromkeys(name.rpartition(".")[0] for name, x in layers if isinstance(x, Expert)))
    owners = [stack.rpartition(".")[0] for stack in stacks]
    places = {stack: owner + ".base_layer" * owners[i + 1:].count(owner)
              for i, (stack, owner) in enumerate(zip(stacks, owners))}
    return dict(target_modules=names, target_parameters=stacks), {name: name for name in names} | places

EXPORT = ("adapter_model.safetensors", "adapter_config.json")       # what an export writes, in this order
MARK = {"format": "pt", "written_by": "hd_pissa_extra.export_lora"}

def check_ours(folder: str) -> None:
    """ValueError if a folder, or the one beside it that is filled first, holds what no export has written."""
    from safetensors import SafetensorError, safe_open
    for path in (folder, folder + ".tmp"):
        there = os.listdir(path) if os.path.isdir(path) else [path] * os.path.lexists(path)
        # a kill inside an export leaves files of safetensors' own beside ours
        foreign = sorted(name for name in {*there} - {*EXPORT} if path == folder or name[:4] != ".tmp")
        if there and not foreign and path == folder:
            try:
                with safe_open(os.path.join(path, EXPORT[0]), "pt") as file:
                    foreign = [] if file.metadata() == MARK else [EXPORT[0]]
            except (OSError, SafetensorError):
                foreign = there
        if foreign:
            raise ValueError(f"{path} holds {foreign[0]}, which no export has written; give a new or "
                             "an empty folder")

@torch.no_grad()
def export_lora(adapters, folder: str, base: dict, base_name: str = "", rank: int | None = None) -> float:
    """Write the run as a PEFT LoRA adapter of `rank` (None: 2Kr); its error |P Q - dW| / |dW|.

    base        state_dict of the weights that the run began with, base_name where PEFT finds them
    The adapter loads with PeftModel.from_pretrained(base_model, folder). Needs peft and safetensors.
    Raises ValueError on every process without attach(accumulate=True), where base is another model's, or
    where the folder holds anything but an earlier export.
    """
    folder = os.path.abspath(folder)        # without a slash behind it

    def check_base():
        try:
            import peft  # noqa: F401
            import safetensors  # noqa: F401
        except ImportError:
            raise ValueError("a LoRA export needs peft: pip install -r requirements-extra.txt") from None
        for slot in adapters.slots:
            W0 = weight_in(base, slot.name)
            if W0 is None or W0.shape != slot.module.weight.shape:
                raise ValueError(f"base has no {slot.name}.weight of {tuple(slot.module.weight.shape)}; give "
                                 "the state_dict that the run began with")

        if adapters.first == 0:
            check_ours(folder)

    everywhere(check_base)
    tensors, squares = {}, torch.zeros((1, 2), dtype=torch.float64, device=adapters.device)
    targets, places = lora_places([(slot.name, slot.module) for slot in adapters.slots])
    for slot in adapters.slots:
        P, Q = lora_factors(adapters, slot, rank)
        A, B, expert = P.T.float().contiguous(), Q.T.float().contiguous(), isinstance(slot, ExpertSlot)
        name = slot.name.rpartition(".")[0] if expert else slot.name
        key = f"base_model.model.{places[name]}.lora_"
        if expert:                          # PEFT's A are (E r, m), its B (n, r E): experts last
            stacked = [tensors.setdefault(f"{key}{side}.weight", torch.zeros(shape, device=A.device))
                       for side, shape in (("A", (len(slot.module.stack) * len(A), slot.m)),
                                           ("B", (slot.n, len(A) * len(slot.module.stack))))]
            stacked[0].unflatten(0, (-1, len(A)))[slot.module.index] = A
            stacked[1].unflatten(1, (len(A), -1))[:, :, slot.module.index] = B
        else:
            tensors |= {key + "A.weight": A, key + "B.weight": B}
        W, rows = stored(slot)
        dW = W.double() - weight_in(base, slot.name)[rows].to(P)
        left, right = (P, Q) if slot.conv1d else (Q.T, P.T)
        squares += torch.stack((left[rows] @ right - dW, dW)).square().sum((1, 2))
    rank = 2 * adapters.K * adapters.r if rank is None else rank

    def write():
        from peft import LoraConfig
        from safetensors.torch import save_file
        if adapters.first == 0:
            task = "CAUSAL_LM" if hasattr(adapters.model, "generate") else None
            unfinished = folder + ".tmp"
            for name in os.listdir(unfinished) if os.path.isdir(unfinished) else ():
                os.unlink(os.path.join(unfinished, name))
            LoraConfig(r=rank, lora_alpha=rank, base_model_name_or_path=base_name, task_type=task,
                       fan_in_fan_out=type(adapters.slots[0]) is Slot and adapters.slots[0].conv1d,
                       inference_mode=True, **targets).save_pretrained(unfinished)
            save_file(tensors, os.path.join(unfinished, EXPORT[0]), MARK)
            if not os.path.lexists(folder):
                os.rename(unfinished, folder)           # whole at once
            else:
                for name in EXPORT:
                    os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
                os.rmdir(unfinished)

    everywhere(write)
    wrong, whole = gather_shards(squares).sum(0).tolist()      # of slices, or equal replicas
    return math.sqrt(wrong / whole) if whole else 0.0
