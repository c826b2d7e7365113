"""HD-PiSSA (High-rank Distributed PiSSA) in one file.

Every linear weight W is cut by its SVD into K slices of r components. Device i trains slice i on
its own mini-batch, and the small updates of all devices are added to the one shared W:

    A_i = U[:, ir:(i+1)r] S^1/2    B_i = S^1/2 V^T[ir:(i+1)r]    fixed for the run   (section 4.1)
    Y = X W                        forward: the adapter is muted                     (section 4.3)
    dU_i = dA_i B_i + A_i dB_i + dA_i dB_i                  dA_i, dB_i from AdamW    (section 4.2)
    W <- W + 1/K sum_i dU_i                                 on every device alike    (section 4.2)

Data-parallel PiSSA gives every device the same top-r slice, and its update has rank up to 2r. Here
one update has rank up to 2Kr, at the optimizer memory of rank r. The trained tensors are the
increments dA_i, dB_i. They are zero at the start of every step: the output is then X W exactly,
their gradients are those of residual PiSSA, and after optimizer.step() they are the dA_i, dB_i
above. (The paper's "mute scalar" is not needed: at zero increments there is nothing to mute.)

    adapters = hd_pissa.attach(model, rank=16)      # torchrun: after dist.init_process_group()
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-5, weight_decay=0.0)
    for batch in loader:
        model(**batch).loss.backward()              # own rows; several shards: with adapters.shard(i)
        optimizer.step()            # fills dA_i, dB_i
        adapters.merge_()           # dU_i of all K shards into W; increments back to zero

Notation (the paper's letters; an nn.Linear stores W^T, a transformers Conv1D stores W):

    K         number of shards, "devices" in the paper   A, B    (m, r), (r, n) factors of a shard
    r         components per shard, the argument rank=   dA, dB  their increments in one step
    m, n      input, output features; W is (m, n)        P, Q    (m, 2Kr), (2Kr, n); P Q = sum dU_i
    X, Y      (T, m), (T, n) of T tokens                 s       alpha / r, PEFT's scaling
    U, S, Vt  (m, d), (d,), (d, n); d = min(m, n)        adapters.S   shards of this process

This file is complete; it needs torch and tqdm. hd_pissa_extra.py builds on it for large runs.
Paper: Wang et al., "HD-PiSSA: High-Rank Distributed Orthogonal Adaptation".
"""

import collections
import contextlib
import hashlib
import math
import os
import time
import warnings
import weakref

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from tqdm import tqdm

# ---- Processes: one process runs the same code, its collectives are the identity -----------------

def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

def process_index() -> int:
    return dist.get_rank() if world_size() > 1 else 0

def gather_shards(local: torch.Tensor) -> torch.Tensor:
    """(S, ...), the S shards of each process -> (K, ...) on every process, in shard order."""
    if world_size() == 1:
        return local
    out = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    # torch 2.13 renames the call and warns about the old name
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, local.contiguous())
    return out

def sent(tensor: torch.Tensor, device) -> torch.Tensor:
    """A CPU tensor on `device`: from pinned memory a GPU takes it while the host goes on."""
    pinned = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)

def everywhere(work) -> list:
    """What work() returns on each process, by index. Where it fails on one, all raise its ValueError."""
    result = error = None
    try:
        result = work()
    except Exception as e:
        error = e               # told to the others first: none waits in the next collective in vain
    said = [(result, error and (str(error) or repr(error)))] * world_size()
    if world_size() > 1:
        dist.all_gather_object(said, said[0])
    if error and not isinstance(error, (ValueError, OSError, RuntimeError)):
        raise error             # a fault of the program: here with its own traceback
    if message := next((message for _, message in said if message), None):
        raise ValueError(message) from error
    return [result for result, _ in said]

# ---- Orthogonal adapters initialization (section 4.1) --------------------------------------------

def components(W: torch.Tensor, k: int, name: str = "W"):
    """The k largest singular triplets of W (m, n): U (m, k), S (k,) descending, Vt (k, n), float64.

    Each goes to a shard of its own, so each must be right: randomized SVD mixes neighbours.
    """
    U, S, Vt = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return U[:, :k], S[:k], Vt[:k]

def seed_of(*parts) -> int:
    """A 63-bit generator seed that depends on `parts` alone (Python's own hash changes by run)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

def shard_factors(W, K: int, r: int, init: str, s: float, seed: int, decompose=components, name="W"):
    """A_i and B_i of all K shards of W (m, n), flattened side by side: (K, m r + r n).

        hd_pissa  A_i = U_i (S_i/s)^1/2, B_i = (S_i/s)^1/2 V_i^T, components ir..(i+1)r-1      (4.1)
        top       every shard the components 0 .. r-1                                   (appendix C)
        lora      A_i Kaiming-uniform as in PEFT, another draw per shard, B_i = 0       (appendix C)

    Dividing S by s makes s A_i B_i the slice of W, as in PEFT. decompose: `components` or its like.
    """
    m, n = W.shape
    if init == "lora":
        draws = [torch.Generator().manual_seed(seed_of(seed, i)) for i in range(K)]
        like = dict(dtype=torch.float64, device="cpu")      # equal draws on every device
        A = torch.stack([torch.rand((r, m), generator=g, **like) for g in draws]).mT    # (K, m, r)
        A, B = (2 * A - 1) / math.sqrt(m), torch.zeros((K, r, n), **like)
    else:
        k = r if init == "top" else K * r
        U, S, Vt = decompose(W, k, name)
        if not S[-1] > (zero := 2 * torch.finfo(W.dtype).eps * S[0]):
            raise ValueError(f"{name}.weight has rank {int((S > zero).sum())}, {k} components are needed: "
                             f"a shard of zeros never trains; use exclude=[{'.' + name!r}]")
        root = (S / s).sqrt()
        A = (U * root).unflatten(1, (-1, r)).transpose(0, 1).expand(K, m, r)    # (m, Kr) -> (K, m, r)
        B = (root[:, None] * Vt).unflatten(0, (-1, r)).expand(K, r, n)          # (Kr, n) -> (K, r, n)
    return torch.cat((A.flatten(1), B.flatten(1)), dim=1)                       # (K, m r + r n)

# ---- Muting mechanism (section 4.3) --------------------------------------------------------------

class Mute(torch.autograd.Function):
    """Y = X W forward; the backward gives dX and the gradients that residual PiSSA would have.

    A (k, m, r) and B (k, r, n) are the factors of one shard (k = 1) or of several. They are attributes,
    not saved tensors: those checkpointing replaces by a recomputed forward's, maybe of another shard.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, dA, dB, s, conv1d, mask=None):
        ctx.save_for_backward(x, weight)
        ctx.A, ctx.B, ctx.s, ctx.conv1d, ctx.mask = A, B, s, conv1d, mask
        ctx.shapes = dA.shape, dB.shape                 # (m, r), (r, n), or with k in front
        # Y = X W      (4.3), by the very call of the plain frozen layer: logits are equal bit for bit
        Y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight) if conv1d else F.linear(x, weight, bias)
        # (..., n), and no view: on a view made in here autograd refuses in-place ops, a ReLU's say
        return torch.ops.aten._unsafe_view(Y, (*x.shape[:-1], Y.shape[-1]))

    @staticmethod
    def backward(ctx, dY):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("create_graph=True: a muted layer has first derivatives alone; "
                                      "call adapters.detach_() for second ones")
        (x, weight), dtype, dX, db = ctx.saved_tensors, dY.dtype, None, None    # autocast: dY's dtype
        with torch.autocast(dY.device.type, enabled=False):
            if ctx.needs_input_grad[0]:                                     # dX = dY W^T
                dX = dY @ (weight.T if ctx.conv1d else weight).to(dtype)    # (..., n) -> (..., m)
            dY = dY.reshape(-1, dY.shape[-1])                               # (T, n)
            X = x.reshape(-1, x.shape[-1]).to(dtype)                        # (T, m)
            if ctx.needs_input_grad[2]:
                db = dY.sum(0)                          # a bias that trains beside the adapters
            if ctx.mask is not None:
                X = X * ctx.mask(X)                     # dropout on the adapter's input alone
            A, B = (ctx.A, ctx.B) if ctx.s == 1 else (ctx.s * ctx.A, ctx.s * ctx.B)
            # (k, m, r) -> (kr, m), cast and laid out by one kernel
            At = A.mT.flatten(0, 1).to(dtype, memory_format=torch.contiguous_format).contiguous()
            B = B.flatten(0, 1).to(dtype)                                   # (k, r, n) -> (kr, n)
            # g_A = s X^T (dY B_i^T)      (4.3), as its transpose: a CPU is slow where the result is narrow
            gA = (dY @ B.T).T @ X                                           # (kr, T) (T, m) -> (kr, m)
            gA = gA.unflatten(0, ctx.B.shape[:2]).mT                        # (k, m, r)
            # g_B = s (X A_i)^T dY        (4.3)
            gB = (X @ At.T).T @ dY                                          # (kr, T) (T, n) -> (kr, n)
            gA, gB = (g.reshape(shape).to(ctx.A.dtype) for g, shape in zip((gA, gB), ctx.shapes))
        return dX, None, db, None, None, gA, gB, None, None, None

class Muted:
    """Mixed in front of nn.Linear or Conv1D by `attach`: the same module and W, the muted forward."""

    def forward(self, *args, **kwargs):
        slot, (x,) = self.hd_pissa, (*args, *kwargs.values())      # Linear calls it input, Conv1D x
        if not torch.compiler.is_compiling():
            slot.before_forward(x)
        return slot.mute.apply(x, self.weight, self.bias, slot.A, slot.B, slot.dA, slot.dB, slot.s,
                               slot.conv1d, slot.mask if self.training else None)

    def __reduce_ex__(self, protocol):
        """Pickled or copied it is the plain layer: W holds all that was merged."""
        state = {key: value for key, value in self.__getstate__().items() if key != "hd_pissa"}
        return object.__new__, (self.hd_pissa.plain_class,), state

# ---- Direct weight update (section 4.2) ----------------------------------------------------------

def update_factors(A, B, dA, dB) -> tuple[torch.Tensor, torch.Tensor]:
    """P^T (2Kr, m) and Q (2Kr, n) with P Q = sum_i dU_i, exactly.

        dU_i = dA_i B_i + A_i dB_i + dA_i dB_i = dA_i (B_i + dB_i) + A_i dB_i        (section 4.2)

    A and dA are (K, m, r), B and dB (K, r, n), or (E, K, ...) of E layers. K may be any number of shards.
    """
    return (torch.stack((dA.mT, A.mT), -4).flatten(-4, -2),         # P^T: (2, K, r, m) -> (2Kr, m)
            torch.stack((B + dB, dB), -4).flatten(-4, -2))          # Q:   (2, K, r, n) -> (2Kr, n)

def fold_(W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, share: float) -> None:
    """W += share left right in place, without an (m, n) temporary.

    In blocks of 1024 rows: rounding depends on a product's shape, and FSDP2's part of W gets equal bits.
    """
    for a in range(0, len(left), 1024):
        W[a:a + 1024].addmm_(left[a:a + 1024], right, alpha=share)

TRAINABLE = "was made trainable; only merge_ changes it (train it otherwise after adapters.detach_())"
UNMERGED = ("increments were filled and not merged, so nothing would reach W; call adapters.merge_() after "
            "every optimizer.step(), before the next forward")

class Slot:
    """One adapted layer: its W, its place in the flat buffers, the factors that train now.

    Here W is whole on every process, float32 or float64; hd_pissa_extra stores it in other ways.
    """

    mute, dtypes, mask = Mute, (torch.float32, torch.float64), None

    def __init__(self, name: str, module: nn.Module, adapters, start: int):
        self.name, self.module, self.adapters, self.start = name, module, adapters, start
        self.plain_class, self.conv1d = type(module), not isinstance(module, nn.Linear)
        self.m, self.n = module.weight.shape if self.conv1d else module.weight.T.shape
        self.r, self.s, self.size = adapters.r, adapters.s, adapters.r * (self.m + self.n)
        self.was, W = self.kind(), self.W
        if W.dtype not in self.dtypes or hasattr(W, "to_local"):
            raise ValueError(f"{name}.weight is {self.was}: load float32 weights, and attach before they "
                             "are sharded (bfloat16, FSDP2: hd_pissa_extra.attach)")
        if not W.is_meta and not torch.isfinite(W).all():
            raise ValueError(f"{name}.weight holds NaN or Inf; the file is damaged, load it again")

    def views(self, flat: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A (k, m, r) and B (k, r, n) of this layer, in k rows of a flat buffer that begins at `offset`."""
        A, B = flat[:, self.start - offset:][:, :self.size].split((self.r * self.m, self.r * self.n), 1)
        return A.view(-1, self.m, self.r), B.view(-1, self.r, self.n)

    W = property(lambda self: self.module._parameters.get("weight"))    # None once it is parametrized

    def kind(self) -> str:
        W = self.W
        return "no parameter" if W is None else f"{type(W).__name__} {W.dtype} {W.device} {(*W.shape,)}"

    def fault(self) -> str:
        """Why dU would not reach W, or "". Asked before every merge: somebody may have changed W."""
        if self.kind() != self.was:
            return (f"is {self.kind()}, was {self.was}; cast, move, parametrize and load before attach "
                    "(fully_shard after hd_pissa_extra.attach)")
        return TRAINABLE if self.W.requires_grad else ""

    def before_forward(self, x: torch.Tensor) -> None:
        """Raise ValueError where a step was not merged, or W trains otherwise: nothing would reach it."""
        if self.adapters.increments._version != self.adapters.merged:
            raise ValueError(UNMERGED)
        if self.W is not None and self.W.requires_grad:
            raise ValueError(f"{self.name}.weight {TRAINABLE}")

    def add_(self, left: torch.Tensor, right: torch.Tensor, share: float) -> None:
        """W += share left right, for factors of all shards."""
        fold_(self.module.weight, left, right, share)

    def add_sum_(self, dU: torch.Tensor, share: float) -> None:
        """W += share times the sum of dU over the processes."""
        if world_size() > 1:
            dist.all_reduce(dU)
        self.module.weight.add_(dU, alpha=share)

# ---- The adapters --------------------------------------------------------------------------------

LIVE = weakref.WeakValueDictionary()    # the Adapters that are attached, in an order that all processes have
# Their steps depend on gradients and state alone, without weight decay. Another belongs here if its step
# is the same whatever the parameter's values are; hd_pissa_extra.attach tries that out.
OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "Lion", "Muon", "NAdam", "RAdam", "RMSprop",
              "Rprop", "SGD", "AcceleratedOptimizer")      # (whose inner one is looked at when it steps)

class Adapters:
    """HD-PiSSA's state on one process: fixed A_i, B_i, increments, the merge. Made by `attach`.

    A row of a flat buffer is one shard, all layers side by side: one collective moves them all.
    """

    Slot, agreed, whole_batch = Slot, "", False     # each shard learns from its own mini-batch

    def __init__(self, model, found, skipped, config: dict, exchange: str, seed: int, device):
        self.model, self.skipped, self.config, self.seed = model, skipped, config, seed
        self.K, self.r, alpha = config["shards"], config["rank"], config["alpha"]
        self.s = 1.0 if alpha is None else alpha / self.r
        self.share = self.s / (self.K if config["aggregate"] == "mean" else 1)  # of sum_i dU_i in W
        self.exchange, self.device = "all_gather" if exchange == "auto" else exchange, device
        self.S = self.K // world_size()                 # shards of this process
        self.first = process_index() * self.S           # global index of local shard 0
        self.step, self.current = 0, 0                  # merges so far; the local shard that trains now
        self.seen, self.idle = [0] * self.S, set()      # see note; shards whose last step was all zeros
        self.begun, self.slots, width = False, [], 0    # begun: W has moved
        for name, module in found:
            self.slots.append(self.Slot(name, module, self, width))
            width += self.slots[-1].size
        like = dict(dtype=torch.promote_types(found[0][1].weight.dtype, torch.float32), device=device)
        self.basis = torch.zeros((self.held(), width), **like)      # A_i, B_i of a shard in each row
        self.own = self.basis[self.first:][:self.S] if len(self.basis) == self.K else self.basis
        self.increments = torch.zeros((self.S, width), **like)
        self.merged = self.increments._version      # torch's count of changes at the last merge
        self.known, self.stepped, self.vain = weakref.WeakSet(), [], set()      # see before_step
        for slot in self.slots:
            A, B = slot.views(self.own)
            slot.factors = [(A[i:i + 1], B[i:i + 1]) for i in range(self.S)]        # (1, m, r), (1, r, n)
            # detach: a leaf of its own on the buffer's memory
            slot.leaves = [(dA.detach().requires_grad_(), dB.detach().requires_grad_())
                           for dA, dB in zip(*slot.views(self.increments))]         # (m, r), (r, n)
            for i, (_, dB) in enumerate(slot.leaves):
                dB.register_post_accumulate_grad_hook(self.note(i))
        self.increment_ids = {id(p) for slot in self.slots for pair in slot.leaves for p in pair}
        self.ids = {*map(id, self.parameters())}
        LIVE[id(self)] = self

    def __repr__(self):
        adapted, why = sum(x.m * x.n for x in self.slots), collections.Counter(self.skipped.values())
        share = adapted / sum(p.numel() for p in self.model.parameters())
        return (f"HD-PiSSA: {len(self.slots)} layers, {adapted:,} weights ({share:.1%} of the model); "
                f"{self.K} shards of rank {self.r}, {self.S} here, each trains {self.increments.shape[1]:,} "
                f"numbers. Left out: {'; '.join(f'{n} x {w}' for w, n in why.items()) or 'nothing'}")

    def note(self, i: int):
        """A hook that counts gradients of local shard i, one a layer and backward. It must not hold self."""
        seen, many = self.seen, 500 * len(self.slots)
        def count(_):
            seen[i] += 1
            if seen[i] == many:
                warnings.warn("500 backwards without adapters.merge_(): does the optimizer hold "
                              "adapters.parameters(), does the loop merge?", stacklevel=2)
        return count

    def held(self) -> int:
        """Shards whose A_i, B_i stay here: folding factors needs all of them, a dense dU the own."""
        return self.K if self.exchange == "all_gather" else self.S

    def deal(self, init: str, decompose, progress: bool) -> None:
        """Fill A_i, B_i. Each weight is decomposed by exactly one process and sent to the others.

        SVDs of one matrix on two machines may differ: in order, and shards overlap; in sign, and dA_i of
        one meets -B_i of the other.
        """
        mine = {}
        def work():
            if decompose is None:
                raise ValueError("decompose=None: A_i, B_i stay empty; hd_pissa_extra.attach takes it")
            own = range(process_index(), len(self.slots), world_size())
            for j in tqdm(own, desc="SVD", unit="layer", disable=not progress or process_index() > 0):
                slot = self.slots[j]
                W, seed = slot.module.weight.to(self.device), seed_of(self.seed, slot.name)
                if W.is_meta:
                    raise ValueError(f"{slot.name}.weight is on the meta device: load the weights first")
                with torch.autocast(self.device.type, enabled=False):
                    mine[j] = shard_factors(W if slot.conv1d else W.T, self.K, self.r, init, self.s, seed,
                                            decompose, slot.name).to(self.basis)
        everywhere(work)
        for j, slot in enumerate(self.slots):
            rows = mine.pop(j) if j in mine else self.basis.new_empty((self.K, slot.size))
            if world_size() > 1:
                dist.broadcast(rows, src=j % world_size())
            rows = rows if len(self.basis) == self.K else rows[self.first:][:self.S]
            self.basis[:, slot.start:slot.start + slot.size] = rows

    def named_parameters(self, first: int = 0):
        """Pairs ("<module path>.shard<s>.dA", (m, r)), ("....dB", (r, n)), s counted from `first`."""
        for i in range(self.S):
            for slot in self.slots:
                for kind, leaf in zip(("dA", "dB"), slot.leaves[i]):
                    yield f"{slot.name}.shard{first + i}.{kind}", leaf

    def parameters(self) -> list[torch.Tensor]:
        """The increments of this process, for any optimizer that `check` accepts."""
        return [leaf for _, leaf in self.named_parameters()]

    def select(self, i: int) -> None:
        """Let later forwards train local shard i. Tensors are swapped: one compiled graph serves all."""
        self.current = i
        for slot in self.slots:
            (slot.A, slot.B), (slot.dA, slot.dB) = slot.factors[i], slot.leaves[i]

    @contextlib.contextmanager
    def shard(self, i: int):
        """The enclosed forward (and backward, where checkpointing recomputes) trains shard `i`."""
        if not 0 <= i < self.S:
            raise ValueError(f"shard({i}): this process holds shards 0..{self.S - 1} ({self.K} shards over "
                             f"{world_size()} processes)")
        before = self.current
        self.select(i)
        try:
            yield
        finally:
            self.select(before)

    def gradients(self) -> list[list[torch.Tensor]]:
        """Those that there are, for each local shard."""
        return [[p.grad for slot in self.slots for p in slot.leaves[i] if p.grad is not None]
                for i in range(self.S)]

    def squares(self) -> torch.Tensor:
        """Squared 2-norms of the gradients of all K shards, (K,) float64."""
        own = torch.zeros(self.S, dtype=torch.float64, device=self.device)
        for i, row in enumerate(self.gradients()):
            own[i] = torch.stack(torch._foreach_norm(row)).double().square().sum() if row else 0.0
        return gather_shards(own)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients of all K shards to a joint 2-norm of at most `max_norm`; the norm before."""
        norm = self.squares().sum().sqrt()      # of shards in their order, however they are dealt out
        if max_norm < math.inf:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0)   # a NaN stays where it is
            for row in filter(None, self.gradients()):
                torch._foreach_mul_(row, scale.to(row[0]))
        return norm

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError, on every process, for an optimizer that cannot train increments."""
        def look():
            if lacks := self.ids - {id(p) for group in optimizer.param_groups for p in group["params"]}:
                raise ValueError(f"{type(optimizer).__name__} lacks {len(lacks)} of the {len(self.ids)} "
                                 "increments; build it from adapters.parameters()")
            return self.look_at(optimizer)
        if len(said := {*everywhere(look)}) > 1:
            raise ValueError(f"processes have different optimizers: {' and '.join(sorted(said))}")

    def look_at(self, optimizer) -> str:
        """A description of it; ValueError unless its step depends on gradients and its state alone."""
        name, groups = type(optimizer).__name__, optimizer.param_groups
        held = {id(p): group.get("weight_decay") for group in groups for p in group["params"]}
        if world_size() > 1 and (others := held.keys() - {i for live in LIVE.values() for i in live.ids}):
            raise ValueError(f"{name} holds {len(others)} tensors beside the increments: no one adds up "
                             "their gradients over processes, as hd_pissa_extra.attach(also=...) does")
        own = held.keys() & self.increment_ids
        decays = any(held[i] for i in own) and "has weight_decay, which reads the parameter"
        if own and (why := decays or self.objection(optimizer)):
            raise ValueError(f"{name} {why}. Increments begin every step at zero: use AdamW with "
                             f"weight_decay=0.0 (the paper's), or another of {', '.join(OPTIMIZERS)}")
        self.known.add(optimizer)
        return repr([name, [{k: v for k, v in group.items() if k != "params"} for group in groups]])

    def objection(self, optimizer) -> str:
        """Why its rule may be wrong for increments, or ""."""
        return "" if type(optimizer).__name__ in OPTIMIZERS else (
            "may have a rule that reads the parameter (hd_pissa_extra.attach tries it out)")

    def before_step(self, optimizer) -> None:
        """Look at an optimizer before its first step on increments, and at whether its last was merged."""
        grads = {id(p): p.grad for group in optimizer.param_groups for p in group["params"]}
        if self.ids & grads.keys():
            if optimizer not in self.known:
                self.look_at(optimizer)
            if optimizer in self.stepped:
                raise ValueError(UNMERGED)
            self.stepped.append(optimizer)
        elif any(self.seen) and all(g is None for g in grads.values()):
            self.vain.add(sum(self.seen))       # a set: only steps between which ours grew are counted
            if len(self.vain) > 3:
                raise ValueError(f"{type(optimizer).__name__} steps, but holds no increments, whose "
                                 "gradients wait; build the optimizer from adapters.parameters()")

    def after_step(self) -> None:
        torch.autograd.graph.increment_version(self.increments)     # fused optimizers do not do so

    def weights(self) -> list[torch.Tensor]:
        """Parameters and buffers of the model that are whole on every process."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        whole = everywhere(lambda: [t.layout is torch.strided and not (t.is_meta or hasattr(t, "to_local"))
                                    for t in tensors])
        return [t for t, of_all in zip(tensors, zip(*whole)) if all(of_all)]

    @torch.inference_mode()
    def send_(self, tensors: list[torch.Tensor]) -> None:
        """Give all processes those of process 0, as DDP does with a model, and say how many differed."""
        other = []                      # what is equal is not written: it may be expanded, or read-only
        for tensor in tensors if world_size() > 1 else ():
            own = tensor.detach().to(self.device).contiguous()
            bits = own.flatten().view(torch.uint8)                      # any dtype, every backend
            dist.broadcast(received := bits.clone(), src=0)
            if not torch.equal(bits, received):
                other.append((tensor, received.view(own.dtype).view(own.shape)))
        differed = max(everywhere(lambda: len([tensor.copy_(whole) for tensor, whole in other])))
        if differed and process_index() == 0:
            warnings.warn(f"{differed} parameters and buffers differed between processes; all have those of "
                          "process 0 now", stacklevel=3)

    @torch.no_grad()
    def merge_(self, told=None) -> list:
        """W <- W + (s/K) sum_i dU_i on every process, dA_i = dB_i = 0 (section 4.2; "sum": no 1/K).

        Shards are summed in the same order everywhere, so replicas of W stay equal bit for bit.
        Raises ValueError, on every process and before W changes, where that would not train.

        told    (S, c), numbers that travel with what the processes agree about, one wait for both. Returned
                as rows of all K shards; where one of them is not finite, nothing was merged
        """
        with torch.autocast(self.device.type, enabled=False):
            told, waits = self.refuse(told)
            if not waits:
                self.exchange_and_fold()
                self.next_step()
        return told

    def refuse(self, told=None) -> tuple[list, bool]:
        """Raise where a merge would lose a step or spoil W. Returns `told` of all shards, and whether W is to
        stay as it is: no optimizer has stepped on the gradients yet, or `told` is not finite."""
        if self.S * world_size() != self.K:
            raise ValueError(f"merge_: {self.S} of {self.K} shards on each of {world_size()} processes; call "
                             "torch.distributed.init_process_group before attach")
        faults = "; ".join(f"{slot.name}.weight {why}" for slot in self.slots if (why := slot.fault()))
        moved = bool(self.stepped) or self.increments._version != self.merged
        flags = [[n > 0 or bool(row), bool(faults), moved] for n, row in zip(self.seen, self.gradients())]
        largest = torch.linalg.vector_norm(self.increments, math.inf, dim=1)    # (S,); NaN, Inf survive
        own = [sent(torch.tensor(flags, dtype=torch.float64, device="cpu"), self.device),
               largest[:, None].double(), *([] if told is None else [told])]
        # A (K, 4 + c) gather tells every process the state of every shard, so that all refuse alike.
        table = gather_shards(torch.cat(own, dim=1)).tolist()                   # waits once
        trained, faulty, moved, size, *_ = zip(*table)
        told, shards = [row[4:] for row in table], range(self.K)
        if any(faulty):
            raise ValueError("merge_: " + max(everywhere(lambda: faults)))      # "" where there are none
        if not math.isfinite(sum(map(sum, told))):
            return told, True
        if without := [i for i in shards if not trained[i] and not size[i]]:
            raise ValueError(f"merge_: shards {without} of {self.K} got no gradient since the last merge. "
                             f"Every step trains each shard of a process:\n    for s in range({self.S}):\n"
                             "        with adapters.shard(s):\n            loss_of_mini_batch(s).backward()")
        if bad := [i for i in shards if not math.isfinite(size[i])]:
            raise ValueError(f"merge_: the increments of shards {bad} hold NaN or Inf; W is untouched, the "
                             "optimizer's state is not: go on from a checkpoint, or with next_step() and a "
                             "new optimizer. Lower the learning rate or clip")
        # Idle: gradients, but increments of zero. Not with Inf or NaN, for which a GradScaler drops a step.
        squares = [0.0] * self.K if all(size) else self.squares().tolist()
        finite, before = math.isfinite(sum(squares)), self.idle
        self.idle = {i for i in shards if finite and size[i] == 0 < squares[i]}
        if still := sorted(before & self.idle):
            raise ValueError(f"merge_: the increments of shards {still} are zero in two successive merges "
                             "although there are gradients; merge only where optimizer.step() ran, on every "
                             "process, with all of adapters.parameters() and a learning rate above 0")
        if any(size) and not self.begun:        # the first update
            self.begun, reached = True, everywhere(lambda: {
                slot.name for slot in self.slots for _, dB in slot.leaves if dB.grad is not None or dB.any()})
            dead = [slot.name for slot in self.slots if slot.name not in set().union(*reached)]
            if dead and process_index() == 0:
                warnings.warn(f"{len(dead)} of {len(self.slots)} adapted layers got no gradient, {dead[:4]}: "
                              "the model does not call them; leave them out with exclude=", stacklevel=3)
        return told, len(self.idle) == self.K and not any(moved)

    def step_(self, optimizer, told: torch.Tensor) -> list:
        """optimizer.step() and merge_(told), rows that begin with a loss; ValueError if one is not finite."""
        optimizer.step()
        told = self.merge_(told)        # waits for them, once a step
        if not math.isfinite(sum(map(sum, told))):
            self.next_step()
            bad = [i for i, (loss, *_) in enumerate(told) if not math.isfinite(loss)]
            raise ValueError(f"step {self.step}: not finite: loss of shards {bad} or a gradient; W is "
                             "untouched. Lower lr, clip, or look at these rows of the batch")
        return told

    def exchange_and_fold(self) -> None:
        """W += share sum_i dU_i: gather the factors and multiply, or multiply and sum the products."""
        factors = self.exchange == "all_gather"
        increments = gather_shards(self.increments) if factors else self.increments     # as basis
        for slot in self.slots:
            Pt, Q = update_factors(*slot.views(self.basis), *slot.views(increments))
            # sum_i dU_i = P Q, in the layout W is stored in: Conv1D (m, n), Linear (n, m)
            left, right = (Pt.T, Q) if slot.conv1d else (Q.T, Pt)
            if factors:
                slot.add_(left, right, self.share)
            else:
                slot.add_sum_(left @ right, self.share)

    @torch.no_grad()
    def next_step(self) -> None:
        """Zero the increments and drop gradients; without merge_ before it, this step is left out."""
        self.increments.zero_()
        self.merged, self.step = self.increments._version, self.step + 1
        self.seen[:] = [0] * self.S     # in place: hooks hold this list
        for p in self.parameters():
            p.grad = None               # a loop that zeroes the model alone would add to them
        self.stepped, self.vain = [], set()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state: "<module path>.shard<i>.A" and ".B" of this process's shards, i over all."""
        return {f"{slot.name}.shard{self.first + i}.{kind}": factor for slot in self.slots
                for kind, rows in zip("AB", slot.views(self.own)) for i, factor in enumerate(rows)}

    def state_dict(self) -> dict:
        """A copy of `tensors`, the configuration and the number of merges. W is the model's own."""
        return {"config": dict(self.config), "step": self.step,
                **{name: tensor.clone() for name, tensor in self.tensors().items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take A_i, B_i and the step of `state`; ValueError if another run or model has written it."""
        own, old = self.tensors(), state.get("config", {})
        wrong = [f"{k} is {v} here, {old.get(k)} there" for k, v in self.config.items() if old.get(k) != v]
        wrong += [k for k, t in own.items() if k not in state or state[k].shape != t.shape]
        wrong += ["step"] * ("step" not in state)
        if any(said := everywhere(lambda: ", ".join(wrong[:3]))):
            raise ValueError(f"adapter state of another run or model ({max(said)}); attach as that run did")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.resume(state["step"])

    def resume(self, step: int) -> None:
        """Go on after `step` merges, once `tensors` are filled."""
        if len(self.basis) > self.S:
            self.basis.copy_(gather_shards(self.own))
        self.next_step()
        self.step, self.begun, self.idle = step, False, set()

    def detach_(self) -> None:
        """Make the modules plain again. W keeps what was merged and stays frozen."""
        if self.increments._version != self.merged:
            raise ValueError(f"{UNMERGED}; adapters.next_step() leaves the step out")
        for slot in self.slots if LIVE.pop(id(self), None) else ():
            slot.module.__class__ = slot.plain_class
            del slot.module.hd_pissa

def before_step(optimizer, *_) -> None:
    for adapters in list(LIVE.values()):
        adapters.before_step(optimizer)

def after_step(optimizer, *_) -> None:
    for adapters in [live for live in LIVE.values() if optimizer in live.stepped]:
        adapters.after_step()

register_optimizer_step_pre_hook(before_step)
register_optimizer_step_post_hook(after_step)

# ---- Attaching -----------------------------------------------------------------------------------

CHOICES = {"init": ("hd_pissa", "top", "lora"), "exchange": ("auto", "all_gather", "all_reduce"),
           "aggregate": ("mean", "sum"), "schedule": ("cosine", "linear", "constant")}
HEADS = {"lm_head", "head", "output", "score", "classifier"}
MUTED: dict[type, type] = {}    # one muted class a plain class: torch.compile sees one kind of layer

def check_arguments(rank: int, shards: int, alpha=None, **choices) -> None:
    """Raise ValueError for arguments of `attach` that no model could be trained with."""
    world, started = world_size(), int(os.environ.get("WORLD_SIZE", 1))
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(CHOICES[name])}")
    if not all(isinstance(x, int) and x >= 1 for x in (rank, shards)):
        raise ValueError(f"{rank=}, {shards=}: must be whole numbers, 1 or more")
    if not (alpha is None or isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
        raise ValueError(f"{alpha=}: gradients are scaled by alpha / rank; use more than 0, or None")
    if shards % world:
        raise ValueError(f"{shards=} is not a multiple of the {world} processes; use "
                         f"shards={max(1, shards // world) * world} or another number of processes")
    if world == 1 < started and not dist.is_initialized():
        raise ValueError(f"WORLD_SIZE={started}, but no process group: each process would train alone; "
                         "call torch.distributed.init_process_group before attach")

def place(p: torch.Tensor) -> int:
    """Where a parameter lies: modules that hold one there are tied. (Else its id.)"""
    return type(p) is nn.Parameter and p.data_ptr() or id(p)

def find_layers(model: nn.Module, targets="all-linear", exclude=(), least: int = 1):
    """[(name, module)] of the linear layers that `targets` selects, {name: reason} of those left out.

    targets, exclude    ends of names that begin at a dot, one or a list (".proj" is the outermost proj
                        alone); targets also "all-linear"
    least               components that a layer must have; "all-linear" leaves out those with fewer
    """
    targets, exclude = ({x} if isinstance(x, str) else {*x} for x in (targets, exclude))
    found, used = [], set()
    skipped = {f"{name}.{key}": "a 3-D parameter (experts: hd_pissa_extra.attach)"
               for name, x in model.named_modules() if not isinstance(x, nn.modules.conv._ConvNd)
               for key, p in x._parameters.items() if p is not None and p.dim() == 3 and min(p.shape) > 1}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
              or (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    last = [name for name, module in linear.items() if isinstance(module, nn.Linear)][-1:]
    if head is None and last and HEADS & {last[0].split(".")[i] for i in (0, -1)}:
        head = linear[last[0]]              # it ends the model
    uses = collections.Counter(
        place(p) for x in model.modules() for p in x._parameters.values() if p is not None)
    for name, module in linear.items():
        hits, outs = ({t for t in ts if f".{name}" == t or f".{name}".endswith(f".{t}")}
                      for ts in (targets, exclude))
        used |= hits | outs
        W, kind = module._parameters.get("weight"), type(module)
        own = "forward" in vars(module) or isinstance(module, nn.Linear) and (
            kind.forward is not nn.Linear.forward or kind.__name__ == "NonDynamicallyQuantizableLinear")
        plain = not own and W is not None and W.dim() == 2
        size = min(W.shape) if plain else 0
        reasons = {"in exclude": outs, "not in targets": not ("all-linear" in targets or hits),
                   "a weight or a forward of its own kind": not plain,
                   "tied weight": plain and uses[place(W)] > 1, "output head": module is head and not hits,
                   f"fewer than K r = {least} components": size < least and not hits}
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            skipped[name] = reason
        elif size < least:
            raise ValueError(f"{name} is {(*W.shape,)}: K r = {least} components are needed, it "
                             f"has {size}; lower rank or shards, or use exclude=[{'.' + name!r}]")
        else:
            found.append((name, module))
    if unused := sorted((targets - {"all-linear"} | exclude) - used):
        raise ValueError(f"{unused[0]!r} (targets, exclude) ends no linear layer's name; they end in "
                         f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}")
    if not found:
        left_out = ", ".join(f"{name} ({why})" for name, why in [*skipped.items()][:8]) or "none"
        most = max((min(linear[x].weight.shape) for x, why in skipped.items() if "fewer" in why), default=0)
        raise ValueError(f"no layer to adapt, of {left_out}. Name others in targets"
                         + f"; K r may be {most} at most" * (most > 0))
    return found, skipped

@torch.inference_mode(False)
@torch.no_grad()
def attach(model: nn.Module, rank: int, *, shards: int | None = None, targets="all-linear", exclude=(),
           init: str = "hd_pissa", alpha: float | None = None, aggregate: str = "mean",
           exchange: str = "auto", seed: int = 0, decompose=components, progress: bool = False,
           make=Adapters) -> Adapters:
    """Cut the targeted weights of `model` into K shards of `rank` components, mute them, freeze the rest.

    rank        r, components per shard and weight                                     (section 4.1)
    shards      K, the total over all processes and a multiple of their number (default: one each)
    targets     "all-linear" (every Linear and Conv1D but the output head, tied weights and layers
                without K r components), or a list of name suffixes; exclude: suffixes left out
    init        "hd_pissa" (disjoint slices), "top" (every shard the top r), "lora" (random A, zero B)
    alpha       s = alpha / rank scales the adapter as in PEFT; None: s = 1
    aggregate   "mean" (the paper, 1/K) or "sum" (the published code; a K times larger step)
    exchange    "all_gather" (factors), "all_reduce" (dense dU), "auto" (fewer bytes: all_gather)
    seed        of the random draws; decompose: `components` or a function like it, a cache say
    make        `Adapters` or its like; hd_pissa_extra.attach makes its own

    Module classes change, names and state_dict keys do not. Raises ValueError, on every process alike.
    """
    if world_size() > 1 and (gpus := [p.device for p in model.parameters() if p.is_cuda]):
        torch.cuda.set_device(gpus[0])      # NCCL sends text by the current one: 0, unless somebody set it
    shards = world_size() if shards is None else shards
    config, made = dict(rank=rank, shards=shards, init=init, alpha=alpha, aggregate=aggregate), []
    def build():
        check_arguments(rank, shards, alpha, init=init, aggregate=aggregate, exchange=exchange)
        if names := [name for name, module in model.named_modules() if isinstance(module, Muted)
                     or type(module).__module__.startswith("peft.")]:
            raise ValueError(f"{names[0] or 'the model'} has adapters of HD-PiSSA or PEFT already; call "
                             "detach_() on the former, merge_and_unload() on the latter")
        least = rank * (1 if init == "top" else shards)
        found, skipped = getattr(make, "find_layers", find_layers)(model, targets, exclude, least)
        made.append(make(model, found, skipped, config, exchange, seed, found[0][1].weight.device))
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [*config.items(), exchange, f"{seed=}", made[0].agreed,
                *(name for name, _ in found), *((name, (*t.shape,), t.dtype) for name, t in tensors), "end"]
    for here, *there in zip(*everywhere(build)):        # "end" differs where a list is shorter
        if {*there} - {here}:
            raise ValueError(f"processes disagree: process 0 attaches {here}, others {there}; start all with "
                             "the same command and model")
    adapters, = made
    adapters.send_(adapters.weights())
    adapters.deal(init, decompose, progress)
    model.requires_grad_(False)
    for slot in adapters.slots:
        plain, module = slot.plain_class, slot.module
        MUTED.setdefault(plain, type(f"Muted{plain.__name__}", (Muted, plain), {}))
        module.hd_pissa, module.__class__ = slot, MUTED[plain]
    adapters.select(0)
    return adapters

# ---- What an update looks like (section 6) -------------------------------------------------------

def update_spectrum(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Singular values of after - before, descending, float64. Both weights: (m, n) or (n, m)."""
    return torch.linalg.svdvals(after.detach().double() - before.detach().double())

def effective_rank(S: torch.Tensor, tolerance: float = 1e-2) -> int:
    """#{ sigma > tolerance * sigma_1 }. Counting nonzero ones would count the rounding of W."""
    return int((S > tolerance * S[0]).sum()) if S[0] > 0 else 0

# ---- The loop ------------------------------------------------------------------------------------

def lr_factor(step: int, max_steps: int, warmup: float, schedule: str) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then the schedule.

    warmup: steps if 1 or more, below 1 a share of max_steps, 0 = off. It begins at 1/warmup, not 0.
    """
    ramp = round(warmup) if warmup >= 1 else math.ceil(warmup * max_steps)
    if step < ramp:
        return (step + 1) / ramp
    done = (step - ramp) / max(1, max_steps - ramp)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]

def targets_of(row) -> list[int]:
    """What each token of a row (tokens, prompt length or [(start, stop), ...], ...) is to predict.

    -100, which cross_entropy leaves out, where the next token is no part of an answer.
    """
    tokens, where = row[:2]
    y = [-100] * (len(tokens) - 1)
    for a, b in [(where, len(tokens))] if hasattr(where, "__index__") else where:
        if max(a, 1) < b:
            y[max(a, 1) - 1:b - 1] = tokens[max(a, 1):b]
    return y

def pad(rows, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (b, t) of `rows`, padded on the right: causal attention needs no mask there."""
    x = pad_sequence([torch.tensor(row[0][:-1], device="cpu") for row in rows], True)
    y = pad_sequence([torch.tensor(targets_of(row), device="cpu") for row in rows], True, -100)
    return sent(torch.stack((x, y)), device).unbind()

def logits_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(b, t) -> (b, t, vocabulary), float32 or wider, of a model that returns a tensor or `.logits`."""
    out = model(x)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

def train(model, adapters, batches, *, lr: float, max_steps: int, warmup: float = 0.03,
          schedule: str = "cosine", max_grad_norm: float = 0.0, micro_batch_size: int = 8, device="cpu",
          autocast=False, optimizer=None, start: int = 0, progress=True):
    """Fine-tune `model` and yield a record a step: step, loss, lr, grad_norm, tokens_per_second.

    adapters          from `attach`, or a baseline with the same interface
    batches           step batches, each a list of B rows as `targets_of` reads, alike on every process;
                      shard i trains on rows iB/K .. (i+1)B/K - 1, wherever shard i lives
    lr                peak learning rate; it belongs to aggregate= ("sum" steps K times further)
    max_grad_norm     joint 2-norm over all shards; 0 = off
    micro_batch_size  rows a forward; autocast: its matmuls in bfloat16, weights as they are
    optimizer         its groups keep their own peak rates; None: AdamW without weight decay
    start             steps done before, when a run goes on; `batches` begins behind them

    A shard minimises the mean over its own response tokens; with `whole_batch`, that of the step batch.
    """
    check_arguments(1, world_size(), schedule=schedule)     # the schedule alone; attach has seen the others
    if not (0 < lr < math.inf and max_grad_norm >= 0 and min(max_steps, micro_batch_size) >= 1):
        raise ValueError(f"{lr=} must be above 0 (the paper: 2e-5), {max_grad_norm=} 0 (off) or more, "
                         f"{max_steps=} and {micro_batch_size=} 1 or more")
    optimizer = optimizer or torch.optim.AdamW(adapters.parameters(), lr, weight_decay=0.0, foreach=True)
    adapters.check(optimizer)
    peaks = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    K, S, device, step = adapters.K, adapters.S, torch.device(device), start
    model.train()
    bar = tqdm(zip(range(start + 1, max_steps + 1), batches), "train", max_steps, initial=start, unit="step",
               disable=process_index() > 0 or not progress)
    for step, batch in bar:
        began, size = time.perf_counter(), len(batch) // K
        if not model.training:          # whoever takes the records may evaluate in between
            model.train()
        counts = [len(y) - y.count(-100) for y in map(targets_of, batch)]   # tokens with loss of each row
        if size * K != len(batch) or not all(counts):
            raise ValueError(f"step {step}: {len(batch)} rows for {K} shards, {counts.count(0)} of them cut "
                             "before their response; every shard needs as many, and whole ones")

        # Local backward: each shard of this process on its own mini-batch.
        told = torch.zeros((S, 3), dtype=torch.float64, device=device)      # loss, norm, hash of rows
        for i, shard in enumerate(range(adapters.first, adapters.first + S)):
            own = slice(shard * size, (shard + 1) * size)
            tokens = sum(counts) if adapters.whole_batch else sum(counts[own])
            for a in range(0, size, micro_batch_size):
                x, y = pad(batch[own][a:a + micro_batch_size], device)
                # The model's own dropout draws from torch's generator: by step, shard and row, nothing
                # else. It is put back: a data loader that draws from it deals alike on every process.
                with adapters.shard(i), torch.random.fork_rng([device] if device.type == "cuda" else []):
                    torch.manual_seed(seed_of(adapters.seed, step, shard, a))
                    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                        # logits (b, t, vocabulary), without a name: the backward lets go of them
                        loss = F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten(),
                                               reduction="sum")
                    (loss / tokens).backward()
                told[i, 0] += loss.detach()
        told[:, 1] = adapters.clip_grad_norm_(max_grad_norm or math.inf)
        told[:, 2] = seed_of([hash(tuple(map(int, row[0]))) for row in batch]) % 2**52

        # AdamW turns gradients into dA_i, dB_i; all shards go into the one W.
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * lr_factor(step - 1, max_steps, warmup, schedule)
        losses, norms, alike = zip(*adapters.step_(optimizer, told))        # of all K shards
        if len({*alike}) > 1:
            raise ValueError(f"step {step}: the processes have different rows; give all of them the same "
                             "batches, each takes its shards' rows itself")
        optimizer.zero_grad(set_to_none=True)

        loss, rate = sum(losses) / sum(counts), float(optimizer.param_groups[0]["lr"])      # token mean
        speed = sum(len(row[0]) for row in batch) / (time.perf_counter() - began)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {speed:.0f} tokens/s", refresh=False)
        yield dict(step=step, loss=loss, lr=rate, grad_norm=norms[0], tokens_per_second=speed)
    if step < max_steps:
        warnings.warn(f"batches ended after step {step} of {max_steps}", stacklevel=2)
