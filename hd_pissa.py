"""HD-PiSSA (High-rank Distributed PiSSA) in one file.

Every linear weight W is cut by its SVD into K slices of r components. Device i trains slice i on its own
mini-batch, and the small updates of all devices are added to the one shared W:

    A_i = U[:, ir:(i+1)r] S^1/2     B_i = S^1/2 V^T[ir:(i+1)r]      fixed for the whole run  (section 4.1)
    Y = X W                         forward: the adapter is muted                            (section 4.3)
    dU_i = dA_i B_i + A_i dB_i + dA_i dB_i                          dA_i, dB_i from AdamW    (section 4.2)
    W <- W + 1/K sum_i dU_i                                         on every device alike    (section 4.2)

Data-parallel PiSSA gives every device the same top-r slice and its update has rank up to 2r; here one update
has rank up to 2Kr at the optimizer memory of rank r. The trained tensors are the increments dA_i, dB_i,
zero at the start of every step: then the output is X W exactly, their gradients are those of residual PiSSA,
and after optimizer.step() they are the dA_i, dB_i above. (The paper multiplies the adapter by a tiny "mute
scalar" in the forward and divides the gradients by it; at zero increments there is nothing to mute.)

    adapters = hd_pissa.attach(model, rank=16)      # under torchrun: after dist.init_process_group()
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-5, weight_decay=0.0)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()            # fills dA_i, dB_i
        adapters.merge_()           # dU_i of all K shards into W; increments back to zero
        optimizer.zero_grad()

    python train.py                              one process holds all K shards in turn ("virtual devices")
    torchrun --nproc_per_node=8 train.py         one shard each, over NCCL on GPUs, over gloo on CPUs

Notation (the paper's letters; an nn.Linear stores W^T, a transformers Conv1D stores W):

    K         number of shards, "devices" in the paper        A, B      (m, r), (r, n) factors of a shard
    r         components per shard, the argument rank=        dA, dB    (m, r), (r, n) increments of one step
    m, n      input, output features; W is (m, n)             P, Q      (m, 2Kr), (2Kr, n); P Q = sum_i dU_i
    X, Y      (T, m), (T, n) input and output, T tokens       s         alpha / r, PEFT's scaling
    U, S, Vt  (m, d), (d,), (d, n), d = min(m, n)             At, dAt   transposes, as they lie in memory

This file works alone, unchecked. hd_pissa_extra.py beside it adds refusals with a remedy, faster
decompositions, W in bfloat16 or sharded by FSDP2, gradients="global", dropout and LoRA files.
Paper: Wang et al., "HD-PiSSA: High-Rank Distributed Orthogonal Adaptation".
"""

import contextlib
import hashlib
import math
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

try:
    import hd_pissa_extra as extra
except ModuleNotFoundError:
    extra = None                # copied alone: float32 or float64 W, whole on every process, nothing checked

# ---- Processes: one process runs the same code, its collectives are the identity ---------------------------


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_shards(local: torch.Tensor) -> torch.Tensor:
    """(S, ...), the S shards of each process -> (K, ...) on every process, in shard order."""
    if world_size() == 1:
        return local
    out = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    # torch 2.13 renames the call and warns about the old name
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, local.contiguous())
    return out


# ---- Orthogonal adapters initialization (section 4.1) ------------------------------------------------------


def components(W: torch.Tensor, k: int, name: str = "W") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest singular triplets of W (m, n): U (m, k), S (k,) descending, Vt (k, n).

    Single components are dealt out to shards, so each must be right, not their span alone: randomized SVD
    mixes neighbours. `extra` tries the cheaper eigenvectors of a Gram matrix, and checks what they give.
    """
    if extra and W.dtype != torch.float64 and (found := extra.gram_components(W, k, name)):
        return found
    U, S, Vt = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return U[:, :k], S[:k], Vt[:k]


def seed_of(*parts) -> int:
    """A 63-bit generator seed that depends on `parts` alone (Python's own hash changes between runs)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def shard_factors(W, K: int, r: int, init: str, s: float, seed: int, decompose=components, name="W"):
    """A_i^T and B_i of all K shards of W (m, n), flattened side by side: (K, r m + r n).

        hd_pissa   A_i = U_i (S_i/s)^1/2, B_i = (S_i/s)^1/2 V_i^T, components ir .. (i+1)r - 1   (section 4.1)
        top        every shard the components 0 .. r - 1                                       (appendix C)
        lora       A_i Kaiming-uniform as in PEFT, another draw per shard, B_i = 0             (appendix C)

    Dividing S by s makes s A_i B_i the slice of W, as in PEFT. `decompose`: `components` or a cache of it.
    """
    m, n = W.shape
    if init == "lora":
        draws = [torch.Generator().manual_seed(seed_of(seed, i)) for i in range(K)]
        At = torch.stack([torch.rand((r, m), generator=g, dtype=torch.float64) for g in draws])
        At, B = (2 * At - 1) / math.sqrt(m), torch.zeros((K, r, n), dtype=torch.float64)    # (K, r, m)
    else:
        k = r if init == "top" else K * r
        U, S, Vt = decompose(W, k, name)
        if max(torch.dist(Q @ Q.T, torch.eye(k).to(Q), p=math.inf) for Q in (U.T, Vt)) > 1e-4:
            raise ValueError(f"{name}: components not orthonormal, shards would overlap; mend decompose=")
        root = (S / s).sqrt()
        At = (U * root).T.reshape(-1, r, m).expand(K, r, m)                     # (m, Kr) -> (K, r, m)
        B = (root[:, None] * Vt).reshape(-1, r, n).expand(K, r, n)              # (Kr, n) -> (K, r, n)
    return torch.cat((At.flatten(1), B.flatten(1)), dim=1)                      # (K, r m + r n)


# ---- Muting mechanism (section 4.3) ------------------------------------------------------------------------


class Mute(torch.autograd.Function):
    """Y = X W forward; the backward gives dX and the gradients that residual PiSSA would have.

    Equation (1), Y = X (W_res,i + A_i B_i), is X W at dA = dB = 0: the forward computes nothing of the
    adapter and keeps nothing but its input. At (k, r, m) and B (k, r, n) hold the factors of one shard, or of
    all K side by side for gradients="global". They travel as attributes, not as saved tensors: a forward
    recomputed by activation checkpointing cannot swap them for another shard's. dA, dB only take gradients.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, At, B, dA, dB, s, conv1d, mask):
        ctx.save_for_backward(x, weight)
        ctx.At, ctx.B, ctx.s, ctx.conv1d, ctx.mask = At, B, s, conv1d, mask
        # Y = X W      (4.3), by the very call of the plain layer, so that logits are equal bit for bit
        if conv1d:
            return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dY):
        x, weight = ctx.saved_tensors
        dtype = dY.dtype                                                # under autocast: the matmuls' dtype
        dX = None
        if ctx.needs_input_grad[0]:
            # dX = dY W^T
            dX = dY @ (weight.T if ctx.conv1d else weight).to(dtype)    # (..., n) (n, m) -> (..., m)
        dY = dY.reshape(-1, dY.shape[-1])                               # (T, n)
        X = x.reshape(-1, x.shape[-1]).to(dtype)                        # (T, m)
        if ctx.mask is not None:
            X = X * ctx.mask(X)                                         # dropout on the adapter's input alone
        At, B = (ctx.s * ctx.At.flatten(0, 1)).to(dtype), (ctx.s * ctx.B.flatten(0, 1)).to(dtype)
        # g_A = s X^T (dY B_i^T)      (4.3); computed as its transpose, which is how dA lies in memory
        gA = ((dY @ B.T).T @ X).T                                       # ((T, kr)^T (T, m))^T -> (m, kr)
        # g_B = s (X A_i)^T dY        (4.3)
        gB = (X @ At.T).T @ dY                                          # (T, kr)^T (T, n) -> (kr, n)
        return dX, None, None, None, None, gA.to(ctx.At.dtype), gB.to(ctx.B.dtype), None, None, None


class Muted:
    """Mixed in front of nn.Linear or Conv1D by `attach`: the same module and weight, the muted forward."""

    def forward(self, x):
        slot = self.hd_pissa
        mask = extra.dropout_mask(slot) if slot.dropout > 0 and self.training else None
        factors = slot.At, slot.B, slot.dA, slot.dB
        return Mute.apply(x, self.weight, self.bias, *factors, slot.s, slot.conv1d, mask)


MUTED: dict[type, type] = {}    # one muted class per plain class: torch.compile then sees one kind of layer


class Slot:
    """One adapted layer: its place in the flat buffers, and the factors of the shard its forward uses."""

    def __init__(self, name: str, module: nn.Module, r: int, s: float, dropout: float, start: int, adapters):
        self.name, self.module, self.plain_class, self.adapters = name, module, type(module), adapters
        self.conv1d = not isinstance(module, nn.Linear)
        self.m, self.n = module.weight.shape if self.conv1d else module.weight.T.shape
        self.r, self.s, self.dropout = r, s, dropout
        self.start, self.size = start, r * (self.m + self.n)            # columns of A^T and B in a row
        self.At = self.B = self.dA = self.dB = None
        self.low = None             # int16 low halves of a bfloat16 weight
        self.leaves = []            # (dA, dB) of each local shard, for the optimizer

    def views(self, flat: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's (rows, r, m) and (rows, r, n) in rows of factors, whose columns begin at `offset`."""
        a, r = self.start - offset, self.r
        At, B = flat[:, a:a + self.size].split((r * self.m, r * self.n), dim=1)
        return At.unflatten(1, (r, self.m)), B.unflatten(1, (r, self.n))


# ---- Direct weight update (section 4.2) --------------------------------------------------------------------


def update_factors(At, B, dAt, dB) -> tuple[torch.Tensor, torch.Tensor]:
    """Pt (2Kr, m) and Q (2Kr, n) with Pt^T Q = sum_i dU_i, exactly.

        dU_i = dA_i B_i + A_i dB_i + dA_i dB_i = dA_i (B_i + dB_i) + A_i dB_i                  (section 4.2)

    At, dAt: (K, r, m). B, dB: (K, r, n). Any number of shards may stand in for K.
    """
    Pt = torch.stack((dAt, At)).flatten(0, 2)                           # (2, K, r, m) -> (2Kr, m)
    Q = torch.stack((B + dB, dB)).flatten(0, 2)                         # (2, K, r, n) -> (2Kr, n)
    return Pt, Q


def fold_(W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, share: float) -> None:
    """W += share left right in place, without an (m, n) temporary.

    In blocks of 1024 rows: a matrix product rounds by its shape, and processes that hold some rows of a
    sharded W compute the same blocks.
    """
    for a in range(0, len(left), 1024):
        W[a:a + 1024].addmm_(left[a:a + 1024], right, alpha=share)


class Adapters:
    """HD-PiSSA's state on one process: fixed A_i, B_i, increments, and the merge into W. Made by `attach`.

    A row of a flat buffer is one shard, all layers side by side: one collective then moves many layers.
    """

    def __init__(self, model, found, config, exchange, basis, device, seed, bucket_mb, accumulate):
        self.model, self.config, self.K, self.r = model, config, config["shards"], config["rank"]
        self.S, K = self.K // world_size(), self.K                      # shards of this process
        self.first = rank() * self.S                                    # global index of local shard 0
        self.aggregate, self.exchange, self.seed, self.device = config["aggregate"], exchange, seed, device
        self.mean_over = K              # stays when a checkpoint's components are dealt to other K
        self.step, self.idle, self.current, self.skipped = 0, 0, 0, {}
        self.s = 1.0 if config["alpha"] is None else config["alpha"] / self.r
        self.whole_batch, self.applied = config["gradients"] == "global", torch.ones(())
        dtype = torch.float64 if any(x.weight.dtype == torch.float64 for _, x in found) else torch.float32
        self.slots, self.buckets, width = [], [], 0
        for name, module in found:
            slot = Slot(name, module, self.r, self.s, config["dropout"], width, self)
            width += slot.size
            first = self.buckets[-1][0].start if self.buckets else -math.inf
            if (width - first) * K * dtype.itemsize > bucket_mb * 2**20:
                self.buckets.append([])
            self.buckets[-1].append(slot)
            self.slots.append(slot)
        # Folding factors and whole-batch gradients need A_i, B_i of all K shards here; else only the own.
        everything = self.whole_batch or exchange == "all_gather" and basis == "cached"
        self.kept = slice(0, K) if everything else slice(self.first, self.first + self.S)
        self.own = slice(self.first - self.kept.start, self.first - self.kept.start + self.S)
        self.basis = torch.zeros((self.kept.stop - self.kept.start, width), dtype=dtype, device=device)
        self.increments = torch.zeros((self.S, width), dtype=dtype, device=device)
        self.sums = torch.zeros_like(self.increments) if accumulate else None   # of all merged increments
        self.touched: set[int] = set()          # local shards with a gradient since the last merge
        self.backwards: dict[tuple, int] = {}   # how many, by (layer, shard): dropout draws anew each time
        for slot in self.slots:
            for i, (dAt, dB) in enumerate(zip(*slot.views(self.increments))):
                # detach: a leaf of its own on the buffer's memory. dA lies transposed, as the merge reads it.
                slot.leaves.append((dAt.T.detach().requires_grad_(), dB.detach().requires_grad_()))
                slot.leaves[i][1].register_post_accumulate_grad_hook(lambda leaf, i=i: self.touched.add(i))
        if self.whole_batch:
            extra.gather_whole_batch(self)

    def named_parameters(self, first: int = 0):
        """Pairs ("<module path>.shard<s>.dA", (m, r)) and ("....dB", (r, n)), s counted from `first`."""
        for i in range(self.S):
            for slot in self.slots:
                for kind, leaf in zip(("dA", "dB"), slot.leaves[i]):
                    yield f"{slot.name}.shard{first + i}.{kind}", leaf

    def parameters(self) -> list[torch.Tensor]:
        """The increments of this process, for any optimizer that `check` accepts."""
        return [leaf for _, leaf in self.named_parameters()]

    def _select(self, i: int) -> None:
        # Tensors are swapped, not an index: under torch.compile one graph then serves every shard.
        self.current, own = i, self.own.start + i
        for slot in self.slots:
            slot.At, slot.B = slot.views(self.basis if self.whole_batch else self.basis[own:own + 1])
            if not self.whole_batch:
                slot.dA, slot.dB = slot.leaves[i]

    @contextlib.contextmanager
    def shard(self, i: int):
        """The enclosed forward (and backward, where reentrant checkpointing recomputes) trains shard `i`."""
        if not 0 <= i < self.S:
            raise ValueError(f"shard({i}): this process holds shards 0..{self.S - 1} ({self.K} shards over "
                             f"{world_size()} processes)")
        before = self.current
        self._select(i)
        try:
            yield
        finally:
            self._select(before)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients of all K shards to a joint 2-norm of at most `max_norm`; return what it was."""
        squares = torch.zeros(self.S, dtype=torch.float64, device=self.device)
        for i in range(self.S):
            leaves = [p for slot in self.slots for p in slot.leaves[i] if p.grad is not None]
            squares[i] = sum(p.grad.norm().double().square() for p in leaves)
        # Per shard first, then in shard order: the sum does not depend on how shards are dealt to processes.
        norm = gather_shards(squares).sum().sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0)    # else one NaN would hide where
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(scale.to(p))
        return norm

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError for an optimizer whose step depends on more than gradients and its own state."""
        if extra:
            extra.check_optimizer(self, optimizer)

    @torch.no_grad()
    def merge_(self) -> None:
        """W <- W + (s/K) sum_i dU_i on every process, dA_i = dB_i = 0     (section 4.2; "sum": no 1/K).

        1. agree that every shard has a gradient and finite increments, else raise everywhere
        2. exchange   all_gather: K r (m + n) increments a weight; all_reduce: the m n numbers of dU, twice
        3. fold       one matrix product of inner size 2Kr a weight, added in place
        4. zero the increments

        Shards are summed in the same order everywhere, so replicas of W stay equal bit for bit.
        Raises ValueError for a shard without gradient, non-finite increments, or zero increments twice.
        """
        if extra:
            extra.before_merge(self)
        gather = gather_shards if self.exchange == "all_gather" else lambda local: local
        for slots in self.buckets:
            a, b = slots[0].start, slots[-1].start + slots[-1].size     # the bucket's columns
            increments, basis = gather(self.increments[:, a:b]), self.basis[:, a:b]     # (S, ...) -> (K, ...)
            if self.exchange == "all_reduce":
                basis = basis[self.own]
            elif len(basis) < self.K:
                basis = gather(basis)           # basis="resend"
            for slot in slots:
                Pt, Q = update_factors(*slot.views(basis, a), *slot.views(increments, a))
                # sum_i dU_i = P Q, in the layout W is stored in: Conv1D (m, n), Linear (n, m)
                self._fold(slot, *((Pt.T, Q) if slot.conv1d else (Q.T, Pt)))
        if self.sums is not None:
            self.sums += self.increments
        self.next_step()

    def _fold(self, slot, left, right) -> None:
        W, rows, share = slot.module.weight, slice(None), self.share()
        sharded, sampled = hasattr(W, "to_local"), slot is self.slots[self.step % len(self.slots)]
        if sharded or slot.low is not None:
            W, rows = extra.stored(slot)        # in float32, and only this process's rows
        before = W[:8].clone() if sampled else None
        if self.exchange == "all_gather":
            extra.fold_rows_(W, rows, left, right, share) if sharded else fold_(W, left, right, share)
            dU = left[rows][:8] @ right if sampled else None
        else:
            dU = left @ right                                           # of this process's shards
            if sharded:
                dU = extra.reduce_rows(dU, W)
            elif world_size() > 1:
                dist.all_reduce(dU)
            W.add_(dU, alpha=share)
        if slot.low is not None:
            extra.store_(slot, W)
        if sampled:     # share of dW that rounding let through: (W' - W) . dW / |dW|^2 in 8 rows of a weight
            dW = share * dU[:8]
            self.applied = ((W[:8] - before) * dW).sum() / dW.square().sum()

    def share(self) -> float:
        """What sum_i dU_i is multiplied by on its way into W."""
        return self.s / self.mean_over if self.aggregate == "mean" else self.s

    @torch.no_grad()
    def next_step(self) -> None:
        """Increments back to zero; alone, without merge_, it drops a step whose gradients are not finite."""
        self.increments.zero_()
        self.touched.clear()
        self.backwards.clear()
        if self.whole_batch:
            extra.drop_unsent(self)             # of a backward that has failed
        self.step += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state: "<module path>.shard<i>.A" and ".B" of this process's shards, low halves, sums."""
        own = {slot.name + ".low": extra.own_low(slot) for slot in self.slots if slot.low is not None}
        for flat, a, b in ((self.basis[self.own], "A", "B"), (self.sums, "dA.sum", "dB.sum")):
            for slot in self.slots if flat is not None else ():
                for i, At, B in zip(range(self.first, self.K), *slot.views(flat)):
                    own[f"{slot.name}.shard{i}.{a}"], own[f"{slot.name}.shard{i}.{b}"] = At.T, B
        return own

    def state_dict(self) -> dict:
        """A copy of `tensors`, the configuration and the number of merges."""
        return {"config": dict(self.config), "step": self.step, "mean_over": self.mean_over,
                **{name: tensor.clone() for name, tensor in self.tensors().items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take A_i, B_i and the step from `state`; ValueError if it is of another configuration or model."""
        own = self.tensors()
        if extra:
            extra.check_state(self, own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.resume(state["step"], state["mean_over"])

    def resume(self, step: int, mean_over: int) -> None:
        """Go on after `step` merges, once `tensors` are filled; "mean" divides by `mean_over`, a former K."""
        if len(self.basis) > self.S:
            self.basis.copy_(gather_shards(self.basis[self.own]))
        self.next_step()
        self.step, self.mean_over, self.idle = step, mean_over, 0

    def detach_(self) -> None:
        """Make the modules plain again; W keeps what was merged (bfloat16: rounded) and stays frozen."""
        for slot in self.slots:
            slot.module.__class__ = slot.plain_class
            del slot.module.hd_pissa


# ---- Attaching ---------------------------------------------------------------------------------------------


def find_layers(model: nn.Module, targets) -> tuple[list[tuple[str, nn.Module]], dict[str, str]]:
    """The (name, module) pairs that `targets` selects, and {name: reason} for the linear layers left out."""
    named, found, skipped = dict(model.named_modules()), [], {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        head = next((named[k] for k in ("lm_head", "head", "output", "score") if k in named), None)
    weights = [id(p) for module in named.values() for p in module._parameters.values()]
    for name, module in named.items():
        linear = isinstance(module, nn.Linear)
        if not linear and type(module).__name__ != "Conv1D":
            continue
        if targets != "all-linear" and not any(f".{name}".endswith(f".{t}") for t in targets):
            skipped[name] = "not in targets"
        elif (linear and type(module).forward is not nn.Linear.forward) or "weight" not in module._parameters:
            skipped[name] = "a forward or a weight of its own kind"
        elif weights.count(id(module.weight)) > 1:
            skipped[name] = "tied weight"
        elif module is head and targets == "all-linear":
            skipped[name] = "output head"
        else:
            found.append((name, module))
    return found, skipped


@torch.no_grad()
def _deal(adapters: Adapters, init: str, decompose, progress: bool) -> None:
    # Each weight is decomposed by exactly one process and sent to the others. SVDs of one matrix on two
    # machines may differ: in order, and shards overlap; in sign, and dA_i of one meets the other's -B_i.
    def work():
        own, mine = range(rank(), len(adapters.slots), world_size()), {}
        for j in tqdm(own, desc="SVD", unit="layer", disable=not (progress and rank() == 0)):
            slot = adapters.slots[j]
            W = slot.module.weight.to(adapters.device)
            W = W if slot.conv1d else W.T                               # (m, n)
            seed = seed_of(adapters.seed, slot.name)
            factors = shard_factors(W, adapters.K, slot.r, init, slot.s, seed, decompose, slot.name)
            mine[j] = factors.to(adapters.basis)
        return mine

    mine = extra.everywhere(work) if extra else work()
    for j, slot in enumerate(adapters.slots):
        rows = mine.pop(j) if j in mine else adapters.basis.new_empty((adapters.K, slot.size))
        if world_size() > 1:
            dist.broadcast(rows, src=j % world_size())
        adapters.basis[:, slot.start:slot.start + slot.size] = rows[adapters.kept]


def attach(model: nn.Module, rank: int, *, shards: int | None = None, targets="all-linear",
           init: str = "hd_pissa", alpha: float | None = None, dropout: float = 0.0, aggregate: str = "mean",
           exchange: str = "auto", basis: str = "cached", gradients: str = "local", seed: int = 0,
           dtype: torch.dtype | None = None, device=None, bucket_mb: int = 256, decompose=components,
           accumulate: bool = False, progress: bool = False) -> Adapters:
    """Cut the targeted weights of `model` into K shards of `rank` components, mute them, freeze all else.

    rank        r, components per shard and weight                                             (section 4.1)
    shards      K, the total over all processes and a multiple of their number (default: one per process)
    targets     "all-linear" (every Linear and Conv1D but the output head and tied weights), or name suffixes
    init        "hd_pissa" (disjoint slices), "top" (every shard the top r), "lora" (random A, zero B)
    alpha       s = alpha / rank scales the adapter as in PEFT; None: s = 1
    dropout     probability, on the adapter's input; 0 = off
    aggregate   "mean" (the paper, 1/K) or "sum" (the published code; a K times larger step)
    exchange    "all_gather" (factors), "all_reduce" (dense dU), "auto" (fewer bytes: all_gather)
    basis       "cached": A_i, B_i of all K shards on every process; "resend": gathered at each merge
    gradients   "local" (the paper: a shard learns from its own mini-batch) or "global" (from the whole batch:
                losses add up over processes, so divide by all tokens of the step; as many backwards on each)
    seed        of the random draws: dropout and the "lora" init
    dtype       torch.bfloat16: float32 weights become bfloat16, their exact rest is kept here; None = off
    device      of the adapters and the decomposition: "cuda" for W on the CPU until FSDP2 moves it; None: W's
    bucket_mb   MiB of gathered factors per collective
    decompose   `components`, or a function like it, for instance a cache; None: load_state_dict follows
    accumulate  keep the sums of all merged dA_i, dB_i, as large as the increments, for `export_lora`

    Module classes change, names and state_dict keys do not. Call it after moving the model to its device and
    before fully_shard. Raises ValueError, on every process alike, for what cannot be trained.
    """
    config = dict(rank=rank, shards=world_size() if shards is None else shards, init=init, alpha=alpha,
                  aggregate=aggregate, dropout=dropout, gradients=gradients)
    found, skipped = find_layers(model, targets)
    if extra:
        extra.check(model, found, skipped, targets, config, exchange, basis, seed, dtype)
    elif dropout or gradients == "global" or torch.bfloat16 in (dtype, *(x.weight.dtype for _, x in found)):
        raise ValueError("dropout, gradients='global' and bfloat16 need hd_pissa_extra.py on the import path")
    exchange = "all_gather" if exchange == "auto" else exchange
    device = torch.device(device or found[0][1].weight.device)
    adapters = Adapters(model, found, config, exchange, basis, device, seed, bucket_mb, accumulate)
    adapters.skipped = skipped
    if decompose is not None:
        _deal(adapters, init, decompose, progress)
    model.requires_grad_(False)
    for slot in adapters.slots:
        if torch.bfloat16 in (dtype, slot.module.weight.dtype):
            extra.halve_(slot)
        slot.module.hd_pissa = slot
        muted = type(f"Muted{slot.plain_class.__name__}", (Muted, slot.plain_class), {})
        slot.module.__class__ = MUTED.setdefault(slot.plain_class, muted)
    adapters._select(0)
    return adapters


# ---- What an update looks like (section 6) -----------------------------------------------------------------


def update_spectrum(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Singular values of after - before, descending, float64. Both weights: (m, n) or (n, m)."""
    return torch.linalg.svdvals(after.detach().double() - before.detach().double())


def effective_rank(S: torch.Tensor, tolerance: float = 1e-2) -> int:
    """#{ sigma > tolerance * sigma_1 }. Counting nonzero singular values would count the rounding of W."""
    return int((S > tolerance * S[0]).sum()) if S[0] > 0 else 0


def export_lora(adapters, folder: str, base: dict, base_name: str = "", rank: int | None = None) -> float:
    """Write a run with attach(accumulate=True) as a PEFT LoRA of `rank` (None: 2Kr); |P Q - dW| / |dW|."""
    return extra.export_lora(adapters, folder, base, base_name, rank)


# ---- The loop ----------------------------------------------------------------------------------------------


def lr_factor(step: int, max_steps: int, warmup: float, schedule: str) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then "cosine", "linear" or "constant".

    warmup: steps if 1 or more, below 1 a share of max_steps, 0 = off. The first step has 1/warmup, never 0.
    """
    ramp = round(warmup) if warmup >= 1 else math.ceil(warmup * max_steps)
    if step < ramp:
        return (step + 1) / ramp
    done = (step - ramp) / max(1, max_steps - ramp)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]


def pad(rows, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (b, t) of `rows`, each (tokens, prompt length of 1 or more); no loss is -100.

    Padding stands on the right of causal attention, so no real token sees it and no attention mask is needed.
    """
    length = max(len(tokens) for tokens, _ in rows) - 1
    x = torch.zeros((len(rows), length), dtype=torch.long)
    y = torch.full((len(rows), length), -100, dtype=torch.long)
    for i, (tokens, prompt) in enumerate(rows):
        x[i, :len(tokens) - 1] = torch.tensor(tokens[:-1])
        y[i, prompt - 1:len(tokens) - 1] = torch.tensor(tokens[prompt:])
    return x.to(device), y.to(device)


def logits_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(b, t) -> (b, t, vocabulary), float32 or wider, of a model that returns a tensor or `.logits`."""
    out = model(x)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def train(model, adapters, batches, *, lr: float, max_steps: int, warmup: float = 0.03,
          schedule: str = "cosine", max_grad_norm: float = 0.0, micro_batch_size: int = 8, device="cpu",
          autocast: bool = False, optimizer=None, start: int = 0, skip_nonfinite: int = 0,
          progress: bool = True):
    """Fine-tune `model` and yield a record a step: step, loss, lr, grad_norm, applied, tokens_per_second.

    adapters          from `attach`, or a baseline with the same interface (train.py)
    batches           step batches, each a list of B rows (tokens, prompt length), the same on every process;
                      shard i trains on rows iB/K .. (i+1)B/K - 1, wherever shard i lives
    lr                peak learning rate; it belongs to adapters.aggregate ("sum" steps K times further);
                      warmup and schedule as in lr_factor
    max_grad_norm     joint 2-norm over all shards; 0 = off
    micro_batch_size  rows a forward; autocast: its matmuls in bfloat16, weights as they are
    optimizer         None: AdamW (foreach) without weight decay, the paper's
    start             steps done before, when a run goes on; `batches` begins behind them
    skip_nonfinite    steps with a NaN or infinite loss or gradient that are dropped before an error

    A shard minimises the mean over its own response tokens; with `whole_batch`, that of the whole step batch.
    Raises ValueError, on every process alike, for a shard without response tokens or a value not finite.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}: nothing would train; use a learning rate above 0 (the paper: 2e-5)")
    optimizer = optimizer or torch.optim.AdamW(adapters.parameters(), lr, weight_decay=0.0, foreach=True)
    adapters.check(optimizer)
    K, S, first, skipped = adapters.K, adapters.S, adapters.first, 0
    bar = tqdm(total=max_steps, initial=start, desc="train", unit="step", disable=rank() > 0 or not progress)
    model.train()
    for step, batch in zip(range(start + 1, max_steps + 1), batches):
        began, size = time.perf_counter(), len(batch) // K
        mini = [batch[i * size:(i + 1) * size] for i in range(K)]
        counts = [sum(len(tokens) - prompt for tokens, prompt in rows) for rows in mini]
        if size * K != len(batch) or 0 in counts:
            raise ValueError(f"step {step}: {len(batch)} rows with {counts} response tokens per shard; "
                             f"each of the {K} shards needs the same number of rows and a response token")

        # Local backward: each shard of this process on its own mini-batch.
        losses = torch.zeros(S, dtype=torch.float64, device=device)
        for i in range(S):
            norm = sum(counts) if adapters.whole_batch else counts[first + i]
            for a in range(0, size, micro_batch_size):
                # The model's own dropout draws from torch's generator: by step, shard and row, nothing else.
                torch.manual_seed(seed_of(adapters.seed, step, first + i, a))
                x, y = pad(mini[first + i][a:a + micro_batch_size], device)
                with adapters.shard(i):
                    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                        logits = logits_of(model, x)                    # (b, t, vocabulary)
                        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
                    (loss / norm).backward()
                losses[i] += loss.detach()
        sums, lr_now = gather_shards(losses).tolist(), lr * lr_factor(step - 1, max_steps, warmup, schedule)
        grad_norm = float(adapters.clip_grad_norm_(max_grad_norm or math.inf))

        # AdamW turns gradients into dA_i, dB_i; all shards go into the one W.
        if finite := math.isfinite(grad_norm + sum(sums)):
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            optimizer.step()
            adapters.merge_()
        else:
            if not extra:
                raise ValueError(f"step {step}: a loss or gradient is not finite; W is untouched; lower lr")
            skipped += 1
            extra.refuse_nonfinite(adapters, step, sums, tolerated=skipped <= skip_nonfinite)
            adapters.next_step()
        optimizer.zero_grad(set_to_none=True)

        loss = sum(sums) / sum(counts)                                  # token mean over the step batch
        speed = sum(len(tokens) for tokens, _ in batch) / (time.perf_counter() - began)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr_now:.2e}, {speed:.0f} tokens/s", refresh=False)
        bar.update()
        yield dict(step=step, loss=loss, lr=lr_now, grad_norm=grad_norm,
                   applied=float(adapters.applied) if finite else 0.0, tokens_per_second=speed)
    bar.close()
