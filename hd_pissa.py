"""HD-PiSSA (High-rank Distributed PiSSA) in one file.

Every linear weight W is cut by its SVD into K slices of r components. Device i trains slice i on its own
mini-batch, and the small updates of all devices are added to the one shared W:

    A_i = U[:, ir:(i+1)r] S^1/2     B_i = S^1/2 V^T[ir:(i+1)r]      fixed for the whole run  (section 4.1)
    Y = X W                         forward: the adapter is muted                            (section 4.3)
    dU_i = dA_i B_i + A_i dB_i + dA_i dB_i                          dA_i, dB_i from AdamW    (section 4.2)
    W <- W + 1/K sum_i dU_i                                         on every device alike    (section 4.2)

Data-parallel PiSSA gives every device the same top-r slice and its update has rank r; here one update has
rank up to 2Kr at the optimizer memory of rank r. The trained tensors are the increments dA_i, dB_i,
zero at the start of every step: then the output is X W exactly, their gradients are those of residual PiSSA,
and after optimizer.step() they are the dA_i, dB_i above. (The paper multiplies the adapter by a tiny "mute
scalar" in the forward and divides the gradients by it; at zero increments there is nothing to mute.)

    adapters = hd_pissa.attach(model, rank=16)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-5, weight_decay=0.0)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()            # fills dA_i, dB_i
        adapters.merge_()           # dU_i of all K shards into W; increments back to zero
        optimizer.zero_grad()

    python train.py                              one process holds all K shards in turn ("virtual devices")
    torchrun --nproc_per_node=2 train.py         gloo on CPUs
    torchrun --nproc_per_node=8 train.py         NCCL on GPUs, one shard each

Notation (the paper's letters; an nn.Linear stores W^T, a transformers Conv1D stores W):

    K         number of shards, "devices" in the paper        A, B      (m, r), (r, n) factors of a shard
    r         components per shard                            dA, dB    (m, r), (r, n) increments of one step
    m, n      input, output features; W is (m, n)             P, Q      (m, 2Kr), (2Kr, n); P Q = sum_i dU_i
    X, Y      (T, m), (T, n) input and output, T tokens       s         alpha / r, PEFT's scaling
    U, S, Vt  (m, d), (d,), (d, n), d = min(m, n)

Paper: Wang et al., "HD-PiSSA: High-Rank Distributed Orthogonal Adaptation".
"""

import contextlib
import hashlib
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- Processes: one process runs the same code, its collectives are the identity ---------------------------


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def say(*text) -> None:
    """Print on process 0 alone."""
    if rank() == 0:
        print(*text, flush=True)


def gather_shards(local: torch.Tensor) -> torch.Tensor:
    """(S, ...) of each process -> (K, ...) on every process, in shard order."""
    if world_size() == 1:
        return local
    out = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    # torch 2.13 renames the call and warns about the old name
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, local.contiguous())
    return out


def reduce_shards(whole: torch.Tensor) -> torch.Tensor:
    """(K, ...) on each process -> its own (S, ...), summed over the processes."""
    if world_size() == 1:
        return whole
    out = whole.new_empty((whole.shape[0] // world_size(), *whole.shape[1:]))
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, whole)
    return out


def gather_text(text: str) -> list[str]:
    """`text` of every process, by rank. As bytes: torch's object collectives pickle, and need NumPy."""
    if world_size() == 1:
        return [text]
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = gather_shards(torch.tensor([len(data)], device=device)).tolist()
    rows = gather_shards(F.pad(data, (0, 1 + max(sizes) - len(data)))[None])    # (processes, ...)
    return [bytes(row[:size]).decode() for row, size in zip(rows.tolist(), sizes)]


def everywhere(work):
    """work() on every process; if it fails on any, that error as ValueError on all, so that none hangs.

    Wrapped around what one process alone may fail at, before the collective where the others would wait.
    """
    result = error = None
    try:
        result = work()
    except (ValueError, OSError, RuntimeError) as e:
        error = e
    for message in filter(None, gather_text((str(error) or repr(error)) if error else "")):
        raise ValueError(message) from error
    return result


# ---- Orthogonal adapters initialization (section 4.1) ------------------------------------------------------


def components(W: torch.Tensor, k: int, name: str = "W") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest singular triplets of W (m, n): U (m, k), S (k,) descending, Vt (k, n).

    Single components are dealt out to shards, so each must be right, not their span alone: randomized SVD
    mixes neighbours. The cheapest of three exact ways that passes its check is taken: eigenvectors of the
    shorter side's Gram matrix in float32, its span refined by Rayleigh-Ritz; Gram in float64, because the
    condition is squared and the far tail needs it; full SVD, for rank-deficient W and for float64 W.
    """
    M = W.detach().float() if W.dtype != torch.float64 else W.detach()
    wide = M if M.shape[0] <= M.shape[1] else M.T                               # (d, max(m, n))
    for gram in (torch.float32, torch.float64)[:2 * (M.dtype == torch.float32)]:
        wide = wide.to(gram)
        G = wide @ wide.T                                                       # (d, d)
        # diag(R) of G times a random (d, k) follows the k largest eigenvalues: does float32 reach them?
        probe = torch.randn((len(G), k), generator=torch.Generator().manual_seed(0)).to(G)
        R = torch.linalg.qr(G @ probe).R.diagonal().abs()
        if gram == torch.float32 and R.min() < 1e-3 * R.max():
            tqdm.write(f"{name}: squared singular values fall by {R.min() / R.max():.0e}: float64 Gram matrix")
            continue
        E = torch.linalg.eigh(G).eigenvectors[:, -k:].flip(1)                   # (d, k), descending
        if gram == torch.float32:
            E = torch.linalg.qr(E).Q
            R, S, Vt = torch.linalg.svd(E.T @ wide, full_matrices=False)        # (k, k), (k,), (k, max(m, n))
            U = E @ R                                                           # (d, k)
            error = ((wide @ Vt.T - U * S).norm(dim=0) / (10 * S).clamp_max(S[0])).max()
        else:
            U, SVt = E, E.T @ wide
            S = SVt.norm(dim=1)
            Vt = SVt / S.clamp_min(1e-300)[:, None]
            error = torch.dist(Vt @ Vt.T, torch.eye(k).to(S), p=math.inf)
        if error <= 1e-5:
            return (U, S, Vt) if wide.shape == M.shape else (Vt.T, S, U.T)
        tqdm.write(f"{name}: components by a {str(gram)[6:]} Gram matrix are off by {error:.0e}, next driver")
    U, S, Vt = torch.linalg.svd(M.double(), full_matrices=False)
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
        for Q in (U.T, Vt):         # else shards overlap and each would repeat another's update
            assert torch.dist(Q @ Q.T, torch.eye(k).to(Q), p=math.inf) < 1e-4, name
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
    recomputed by activation checkpointing then cannot swap them for another shard's.
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
        mask = slot.dropout_mask() if slot.dropout > 0 and self.training else None
        factors = slot.At, slot.B, slot.dA, slot.dB
        return Mute.apply(x, self.weight, self.bias, *factors, slot.s, slot.conv1d, mask)


class Slot:
    """One adapted layer: its place in the flat buffers, and the factors of the shard its forward uses."""

    def __init__(self, name: str, module: nn.Module, r: int, s: float, dropout: float, adapters):
        self.name, self.module, self.plain_class, self.adapters = name, module, type(module), adapters
        self.conv1d = not isinstance(module, nn.Linear)
        self.m, self.n = module.weight.shape if self.conv1d else module.weight.T.shape
        self.r, self.s, self.dropout = r, s, dropout
        self.start, self.size = 0, r * (self.m + self.n)                # columns of A^T and B in a row
        self.At = self.B = self.dA = self.dB = None
        self.low = None             # int16 low halves of a bfloat16 weight
        self.leaves = []            # (dA, dB) of each local shard, for the optimizer
        self.backwards = {}         # global shard -> backward passes since the last merge

    def views(self, flat: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's (rows, r, m) and (rows, r, n) in rows of factors, whose columns begin at `offset`."""
        a, r = self.start - offset, self.r
        At, B = flat[:, a:a + self.size].split((r * self.m, r * self.n), dim=1)
        return At.unflatten(1, (r, self.m)), B.unflatten(1, (r, self.n))

    def own_low(self) -> torch.Tensor | None:
        """Low halves of the rows that this process holds."""
        local, rows = own_rows(self.module.weight)
        if self.low is not None and self.low.shape != local.shape:
            self.low = self.low[rows].to(local.device, copy=True)       # FSDP2 has sharded W since `attach`
        return self.low

    def dropout_mask(self):
        """A function of X that draws its mask from (seed, step, micro-step, shard, layer) in the backward.

        Micro-steps are counted there: a forward that checkpointing recomputes must not advance the count.
        """
        adapters, shard = self.adapters, self.adapters.first + self.adapters.current

        def draw(X):
            micro = self.backwards[shard] = self.backwards.get(shard, -1) + 1
            seed = seed_of(adapters.seed, adapters.step, micro, shard, self.name)
            generator, keep = torch.Generator(X.device).manual_seed(seed), 1 - self.dropout
            return torch.empty_like(X).bernoulli_(keep, generator=generator).div_(keep)

        return draw


# ---- Direct weight update (section 4.2) --------------------------------------------------------------------


def update_factors(At, B, dAt, dB) -> tuple[torch.Tensor, torch.Tensor]:
    """Pt (2Kr, m) and Q (2Kr, n) with Pt^T Q = sum_i dU_i, exactly.

        dU_i = dA_i B_i + A_i dB_i + dA_i dB_i = dA_i (B_i + dB_i) + A_i dB_i                  (section 4.2)

    At, dAt: (K, r, m). B, dB: (K, r, n). Any number of shards may stand in for K.
    """
    Pt = torch.stack((dAt, At)).flatten(0, 2)                           # (2, K, r, m) -> (2Kr, m)
    Q = torch.stack((B + dB, dB)).flatten(0, 2)                         # (2, K, r, n) -> (2Kr, n)
    return Pt, Q


def split(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 W as a bfloat16 high half, rounded half up, and the int16 rest: exact, in W's 4 bytes a number.

    The forward runs on the high half; adding small updates to it alone would lose nearly all of them.
    Truncating instead of rounding would move W by up to a whole unit of bfloat16.
    """
    bits = W.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 weight of its halves, inverse of `split`."""
    return ((high.contiguous().view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def own_rows(weight: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The stored weight's rows on this process, and which they are: all, unless FSDP2 has sharded dim 0."""
    if not hasattr(weight, "to_local"):
        return weight, slice(0, weight.shape[0])
    chunk = -(-weight.shape[0] // weight.device_mesh.size())            # as torch.chunk cuts
    start = min(weight.device_mesh.get_local_rank() * chunk, weight.shape[0])
    local = weight.to_local()
    return local, slice(start, start + local.shape[0])


def fold_(W: torch.Tensor, rows: slice, left: torch.Tensor, right: torch.Tensor, share: float) -> None:
    """W += share left[rows] right in place, for the `rows` of a stored weight that W holds.

    In fixed blocks of the whole weight: a matrix product rounds by its shape, and this way no sharding of W
    changes a bit. A block that is held in part is computed in whole.
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


def sum_over_processes(dU: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Manual all-reduce of dU, laid out as the stored weight; a reduce-scatter if that is sharded."""
    local, rows = own_rows(weight)
    if world_size() > 1 and local is weight:
        dist.all_reduce(dU)
    elif world_size() > 1:
        chunk = -(-dU.shape[0] // world_size())
        padded = F.pad(dU, (0, 0, 0, chunk * world_size() - dU.shape[0]))
        dU = reduce_shards(padded)[:local.shape[0]]
    return dU


class Adapters:
    """HD-PiSSA's state on one process: fixed A_i, B_i, increments, and the merge into W. Made by `attach`.

    A row of a flat buffer is one shard, all layers side by side: one collective then moves many layers.
    """

    def __init__(self, model, found, config, exchange, basis, device, seed, bucket_mb, accumulate):
        self.model, self.config, self.K, self.r = model, config, config["shards"], config["rank"]
        self.S, K = self.K // world_size(), self.K                      # shards of this process
        self.first = rank() * self.S                                    # global index of local shard 0
        self.aggregate, self.exchange, self.seed = config["aggregate"], exchange, seed
        self.mean_over = K              # stays when a checkpoint's components are dealt to other K
        self.step, self.idle, self.current, self.skipped = 0, 0, 0, {}
        self.s = 1.0 if config["alpha"] is None else config["alpha"] / self.r
        self.whole_batch, self.applied = config["gradients"] == "global", torch.ones(())
        self.slots = [Slot(name, module, self.r, self.s, config["dropout"], self) for name, module in found]
        wide = any(slot.module.weight.dtype == torch.float64 for slot in self.slots)
        dtype, self.device = torch.float64 if wide else torch.float32, device
        self.buckets, width = [], 0
        for slot in self.slots:
            slot.start, width = width, width + slot.size
            first = self.buckets[-1][0].start if self.buckets else -math.inf
            if (width - first) * K * dtype.itemsize > bucket_mb * 2**20:
                self.buckets.append([])
            self.buckets[-1].append(slot)
        # Folding factors and whole-batch gradients need A_i, B_i of all K shards here; else only the own.
        everything = self.whole_batch or exchange == "all_gather" and basis == "cached"
        self.kept = slice(0, K) if everything else slice(self.first, self.first + self.S)
        self.own = slice(self.first - self.kept.start, self.first - self.kept.start + self.S)
        self.basis = torch.zeros((self.kept.stop - self.kept.start, width), dtype=dtype, device=device)
        self.increments = torch.zeros((self.S, width), dtype=dtype, device=device)
        self.sums = torch.zeros_like(self.increments) if accumulate else None   # of all merged increments
        self.touched: set[int] = set()                                  # local shards with a gradient
        self.queue: list[Slot] = []                                     # whole-batch gradients still to send
        for slot in self.slots:
            for i, (dAt, dB) in enumerate(zip(*slot.views(self.increments))):
                # detach: a leaf of its own on the buffer's memory. dA lies transposed, as the merge reads it.
                slot.leaves.append((dAt.T.detach().requires_grad_(), dB.detach().requires_grad_()))
                slot.leaves[i][1].register_post_accumulate_grad_hook(lambda leaf, i=i: self.touched.add(i))
            if self.whole_batch:
                # Leaves of all K shards that only catch gradients: zeros without memory, as increments are.
                zero = torch.zeros((), dtype=dtype, device=device)
                slot.dA = zero.expand(slot.m, K * self.r).detach().requires_grad_()
                slot.dB = zero.expand(K * self.r, slot.n).detach().requires_grad_()
                for leaf in (slot.dA, slot.dB):
                    leaf.register_post_accumulate_grad_hook(self._scatter)

    def _scatter(self, leaf) -> None:
        # gradients="global": shard i's whole-batch gradient goes to its owner during the backward, in one
        # order on every process: a layer waits for those after it, and one without a gradient sends zeros.
        if not self.queue:
            self.queue = list(self.slots)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._send(unused=True))
        self._send(unused=False)

    @torch.no_grad()
    def _send(self, unused: bool) -> None:
        while self.queue:
            slot = self.queue[-1]
            grads = slot.dA.grad, slot.dB.grad                          # (m, Kr), (Kr, n)
            if not unused and any(grad is None for grad in grads):
                return
            gA, gB = (leaf if grad is None else grad for leaf, grad in zip((slot.dA, slot.dB), grads))
            whole = torch.cat((gA.T.reshape(self.K, -1), gB.reshape(self.K, -1)), dim=1)    # (K, r m + r n)
            slot.dA.grad = slot.dB.grad = None
            for (dA, dB), row in zip(slot.leaves, reduce_shards(whole)):
                for leaf, g in ((dA, row[:self.r * slot.m].view(self.r, -1).T),
                                (dB, row[self.r * slot.m:].view(self.r, -1))):
                    leaf.grad = g.clone() if leaf.grad is None else leaf.grad.add_(g)
            self.queue.pop()
        self.touched.update(range(self.S))

    def named_parameters(self, first: int = 0):
        """Pairs ("<module path>.shard<s>.dA", (m, r)) and ("....dB", (r, n)), s counted from `first`."""
        for i in range(self.S):
            for slot in self.slots:
                for kind, leaf in zip(("dA", "dB"), slot.leaves[i]):
                    yield f"{slot.name}.shard{first + i}.{kind}", leaf

    def parameters(self) -> list[torch.Tensor]:
        """The increments of this process, for any optimizer that `check` accepts."""
        return [leaf for _, leaf in self.named_parameters()]

    def _gradients(self, i: int) -> list[torch.Tensor]:
        return [p.grad for slot in self.slots for p in slot.leaves[i] if p.grad is not None]

    def _select(self, i: int) -> None:
        # Tensors are swapped, not an index: under torch.compile one graph then serves every shard.
        self.current, own = i, self.own.start + i
        for slot in self.slots:
            slot.At, slot.B = slot.views(self.basis if self.whole_batch else self.basis[own:own + 1])
            if not self.whole_batch:
                slot.dA, slot.dB = slot.leaves[i]

    @contextlib.contextmanager
    def shard(self, i: int):
        """The enclosed forward and its backward, wherever that runs, train this process's shard `i`."""
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
            squares[i] = sum(g.norm().double().square() for g in self._gradients(i))
        # Per shard first, then in shard order: the sum does not depend on how shards are dealt to processes.
        norm = gather_shards(squares).sum().sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0)    # else one NaN would hide where
        for i in range(self.S):
            for g in self._gradients(i):
                g.mul_(scale.to(g))
        return norm

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError for an optimizer whose step is not a function of gradients and its own state.

        Increments start every step at zero: weight decay would decay zeros, and a rule that reads the
        parameter (Adafactor's and LAMB's scale, LBFGS's line search, ASGD's average) would read nothing.
        """
        name, wanted = type(optimizer).__name__, {id(p) for p in self.parameters()}
        groups = [(wanted & {id(p) for p in group["params"]}, group) for group in optimizer.param_groups]
        held = set().union(*(ours for ours, _ in groups))
        if decay := next((g["weight_decay"] for ours, g in groups if ours and g.get("weight_decay")), None):
            raise ValueError(f"{name} has weight_decay={decay}, which does nothing to increments that start "
                             "at zero; pass weight_decay=0.0 (the paper's setting)")
        bases = {c.__name__.lower() for c in type(optimizer).__mro__}
        if bases & {"adafactor", "lbfgs", "asgd", "lamb", "lars"}:
            raise ValueError(f"{name} reads the parameter itself, and increments start every step at zero; "
                             "use an optimizer that depends on gradients alone, e.g. AdamW, SGD, RMSprop")
        if held != wanted:
            raise ValueError(f"{name} holds {len(held)} of the {len(wanted)} increments; build it from "
                             "adapters.parameters()")

    def _refuse(self) -> None:
        # A (K, 3) gather tells every process the state of every shard, so that all refuse alike.
        local = torch.zeros((self.S, 3), dtype=torch.float64, device=self.device)
        low, high = self.increments.aminmax(dim=1)
        local[:, 1] = torch.maximum(-low, high)                         # NaN and Inf survive
        for i in range(self.S):
            local[i, 0] = i in self.touched
            if not local[i, 1]:     # from zero gradients, or because no optimizer filled the increments?
                local[i, 2] = not self._gradients(i) or any(bool(g.any()) for g in self._gradients(i))
        touched, size, gradient = gather_shards(local).T.tolist()
        if without := [i for i in range(self.K) if not touched[i]]:
            raise ValueError(f"merge_: shards {without} of {self.K} got no gradient since the last merge. "
                             f"Every step trains each shard of a process:\n    for s in range({self.S}):\n"
                             "        with adapters.shard(s):\n            loss_of_mini_batch(s).backward()")
        if bad := [i for i in range(self.K) if not math.isfinite(size[i])]:
            raise ValueError(f"merge_: the increments of shards {bad} hold NaN or Inf; W is untouched. Lower "
                             "the learning rate or clip the gradients")
        self.idle = self.idle + 1 if not any(size) and any(gradient) else 0
        if self.idle >= 2:
            raise ValueError("merge_: all increments are zero in two successive merges although there are "
                             "gradients; call optimizer.step() before merge_(), build the optimizer from "
                             "adapters.parameters(), and use a learning rate above 0")

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
        self._refuse()
        for module in self.fsdp():
            module.reshard()                    # else an evaluation's gathered copy would get the update
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
                left, right = (Pt.T, Q) if slot.conv1d else (Q.T, Pt)
                self._fold(slot, left, right, self.share())
        if self.sums is not None:
            self.sums += self.increments
        self.next_step()

    def share(self) -> float:
        """What sum_i dU_i is multiplied by on its way into W."""
        return self.s / self.mean_over if self.aggregate == "mean" else self.s

    @torch.no_grad()
    def next_step(self) -> None:
        """Increments back to zero; alone, without merge_, it drops a step whose gradients are not finite."""
        self.increments.zero_()
        self.touched.clear()
        for slot in self.slots:
            slot.backwards.clear()
        self.step += 1

    def _fold(self, slot, left, right, share) -> None:
        (local, rows), low = own_rows(slot.module.weight), slot.own_low()
        W = local if low is None else join(local, low)
        sampled = slot is self.slots[self.step % len(self.slots)]
        before = W[:8].clone() if sampled else None
        if self.exchange == "all_gather":
            fold_(W, rows, left, right, share)
            wanted = left[rows][:8] @ right if sampled else None
        else:
            wanted = sum_over_processes(left @ right, slot.module.weight)       # of this process's shards
            W.add_(wanted, alpha=share)
        if low is not None:
            high, slot.low = split(W)
            local.copy_(high)
        if sampled:     # share of dW that rounding let through: (W' - W) . dW / |dW|^2 in 8 rows of a weight
            wanted = share * wanted[:8]
            self.applied = ((W[:8] - before) * wanted).sum() / wanted.square().sum()

    def fsdp(self) -> list[nn.Module]:
        """The modules on which FSDP2's fully_shard was called."""
        return [module for module in self.model.modules() if hasattr(module, "reshard")]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state: "<module path>.shard<i>.A" and ".B" of this process's shards, low halves, sums."""
        own = {slot.name + ".low": slot.own_low() for slot in self.slots if slot.low is not None}
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
        own, there = self.tensors(), state.get("config", {})
        wrong = {k: (v, there.get(k)) for k, v in self.config.items() if there.get(k) != v}
        missing = [name for name in own if name not in state or state[name].shape != own[name].shape]

        def check():
            if wrong or missing:
                raise ValueError(f"adapter state of another run: (here, there) = {wrong}, tensors missing or "
                                 f"of another shape: {missing[:3]}")

        everywhere(check)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.resume(state["step"], state["mean_over"])

    def resume(self, step: int, mean_over: int) -> None:
        """Go on after `step` merges, once `tensors` are filled; "mean" divides by `mean_over`, a former K."""
        if len(self.basis) > self.S:
            self.basis.copy_(gather_shards(self.basis[self.own]))
        self.step, self.mean_over = step, mean_over

    def detach_(self) -> None:
        """Make the modules plain again; W keeps everything merged so far, and stays frozen."""
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
        if isinstance(module, Muted):
            raise ValueError(f"{name} already has HD-PiSSA attached; call detach_() on the first adapters")
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


CHOICES = {"init": ("hd_pissa", "top", "lora"), "aggregate": ("mean", "sum"), "basis": ("cached", "resend"),
           "exchange": ("auto", "all_gather", "all_reduce"), "gradients": ("local", "global")}


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
    aggregate   "mean" (the paper, 1/K) or "sum" (the published code; with Adam a K times larger step)
    exchange    "all_gather" (factors), "all_reduce" (dense dU), "auto" (fewer bytes: all_gather)
    basis       "cached": A_i, B_i of all K shards on every process; "resend": gathered at each merge
    gradients   "local" (the paper: a shard learns from its own mini-batch) or "global" (from the whole batch:
                losses add up over processes, so divide by all tokens of the step; equal backwards everywhere)
    seed        of the random draws: dropout and the "lora" init
    dtype       torch.bfloat16 turns float32 weights into bfloat16 halves, their rest kept here (`split`);
                bfloat16 weights are always so completed. None: weights stay as they are
    device      of the adapters and the decomposition; None: the weights'. For a model that is too large for
                one device: weights on the CPU, this "cuda", then fully_shard moves them block by block
    bucket_mb   MiB of gathered factors per collective
    decompose   `components`, or a function with its arguments and result, for instance a cache on disk;
                None: A_i, B_i will come from load_state_dict
    accumulate  keep the sums of all merged dA_i, dB_i, as large as the increments, for `export_lora`

    Module classes change, names and state_dict keys do not. Call it after moving the model to its device and
    before fully_shard. Raises ValueError, on every process alike, for what cannot be trained.
    """
    K = world_size() if shards is None else shards

    def select():
        check_arguments(rank, K, alpha, dropout, init=init, aggregate=aggregate, exchange=exchange,
                        basis=basis, gradients=gradients)
        found, skipped = find_layers(model, targets)
        check_layers(found, skipped, rank, 1 if init == "top" else K, targets, dtype)
        return found, skipped

    found, skipped = everywhere(select)
    config = dict(rank=rank, shards=K, init=init, alpha=alpha, aggregate=aggregate, dropout=dropout,
                  gradients=gradients)
    layers = [(name, tuple(module.weight.shape), module.weight.dtype) for name, module in found]
    here, *others = gather_text(f"{config}, {exchange=}, {basis=}, {seed=}, {dtype=}, {layers=}")
    for i, there in enumerate(others, 1):
        if there != here:
            a = max(0, len(os.path.commonprefix((here, there))) - 30)
            raise ValueError(f"processes disagree: process 0 attaches ...{here[a:a + 80]}..., process {i} "
                             f"...{there[a:a + 80]}...; start all with the same command and model")
    exchange = "all_gather" if exchange == "auto" else exchange
    device = torch.device(device or found[0][1].weight.device)
    adapters = Adapters(model, found, config, exchange, basis, device, seed, bucket_mb, accumulate)
    adapters.skipped = skipped
    _deal(adapters, init, decompose, progress)
    model.requires_grad_(False)
    for slot in adapters.slots:
        W = slot.module.weight
        if W.dtype == torch.bfloat16:
            slot.low = torch.zeros_like(W, dtype=torch.int16)
        elif dtype == torch.bfloat16:
            W.data, slot.low = split(W)
        slot.module.hd_pissa = slot
        slot.module.__class__ = type(f"Muted{slot.plain_class.__name__}", (Muted, slot.plain_class), {})
    adapters._select(0)
    return adapters


def check_arguments(r, K, alpha, dropout, **choices) -> None:
    """Raise ValueError for what no model could be trained with."""
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(CHOICES[name])}")
    for name, value in (("rank", r), ("shards", K)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")
    if K % world_size():
        raise ValueError(f"shards={K} is not a multiple of the {world_size()} processes; use shards="
                         f"{max(1, K // world_size()) * world_size()} or another number of processes")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: gradients are scaled by alpha/rank, so nothing would train; use "
                         "alpha > 0, or None for a scale of 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")


def check_layers(found, skipped, r, K, targets, dtype=None) -> None:
    """Raise ValueError, with the layer's name, for a weight without K r components or of a wrong kind."""
    if not found:
        left_out = ", ".join(f"{name} ({why})" for name, why in list(skipped.items())[:8]) or "none"
        raise ValueError(f"targets={targets!r} match no layer; linear layers left out: {left_out}")
    largest = min(min(module.weight.shape) for _, module in found) // K
    for name, module in found:
        W = module.weight
        if hasattr(W, "to_local"):
            raise ValueError(f"{name}.weight is already sharded; call attach before fully_shard, which then "
                             "shards the adapted weights")
        if W.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"{name}.weight is {W.dtype}; load the model in float32, bfloat16 or float64")
        if dtype not in (None, W.dtype) and (W.dtype, dtype) != (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype} for {name}.weight of {W.dtype}: only float32 weights can be "
                             "turned, into torch.bfloat16; use dtype=None")
        if W.device != found[0][1].weight.device:
            raise ValueError(f"{name}.weight is on {W.device}, {found[0][0]}.weight on "
                             f"{found[0][1].weight.device}; one process trains on one device")
        if K * r > min(W.shape):
            remedy = f"the largest rank for these layers is {largest}" if largest else "use fewer shards"
            raise ValueError(f"{name} is {tuple(W.shape)}: {K} shards x rank {r} need {K * r} components, it "
                             f"has {min(W.shape)}; {remedy}")
        if not torch.isfinite(W).all():
            raise ValueError(f"{name}.weight holds NaN or Inf; the checkpoint is damaged, load it again")


@torch.no_grad()
def _deal(adapters: Adapters, init: str, decompose, progress: bool) -> None:
    # Each weight is decomposed by exactly one process and sent to the others: SVDs of one matrix on two
    # machines may differ in sign or order, and the shards would overlap.
    if decompose is None:
        return

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

    mine = everywhere(work)
    for j, slot in enumerate(adapters.slots):
        rows = mine.pop(j) if j in mine else adapters.basis.new_empty((adapters.K, slot.size))
        if world_size() > 1:
            dist.broadcast(rows, src=j % world_size())
        adapters.basis[:, slot.start:slot.start + slot.size] = rows[adapters.kept]


# ---- What an update looks like (section 6) -----------------------------------------------------------------


def update_spectrum(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Singular values of after - before, descending, float64. Both weights: (m, n) or (n, m)."""
    return torch.linalg.svdvals(after.detach().double() - before.detach().double())


def effective_rank(S: torch.Tensor, tolerance: float = 1e-2) -> int:
    """#{ sigma > tolerance * sigma_1 }. Counting nonzero singular values would count the rounding of W."""
    return int((S > tolerance * S[0]).sum()) if S[0] > 0 else 0


@torch.no_grad()
def lora_factors(adapters, slot, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """P (m, 2Kr) and Q (2Kr, n), float64, of all that was merged into a layer, but for second-order terms.

        P Q = s/K sum_i [(sum_t dA_i) B_i + A_i (sum_t dB_i)],  since A_i and B_i are fixed

    `rank`: fewer components, the best ones, by an SVD of the product. Collective: every process calls it.
    """
    if adapters.sums is None:
        raise ValueError("no sums of the increments were kept; attach with accumulate=True (--export_lora)")
    columns = slice(slot.start, slot.start + slot.size)
    factors = adapters.basis[adapters.own, columns], adapters.sums[:, columns]
    (At, B), (dAt, dB) = (slot.views(gather_shards(flat).double(), slot.start) for flat in factors)
    P = adapters.share() * torch.cat((dAt, At)).flatten(0, 1).T         # (2K, r, m) -> (m, 2Kr)
    Q = torch.cat((B, dB)).flatten(0, 1)                                # (2K, r, n) -> (2Kr, n)
    if rank is not None:
        (P, left), (Q, right) = torch.linalg.qr(P), torch.linalg.qr(Q.T)
        U, S, Vt = torch.linalg.svd(left @ right.T)
        P, Q = P @ (U[:, :rank] * S[:rank]), Vt[:rank] @ Q.T            # (m, rank), (rank, n), at most
        P, Q = F.pad(P, (0, rank - len(Q))), F.pad(Q, (0, 0, 0, rank - len(Q)))
    return P, Q


@torch.no_grad()
def export_lora(adapters: Adapters, folder: str, base: dict, base_name: str = "", rank=None) -> float:
    """Write the run as a PEFT LoRA adapter of `rank` (None: 2Kr); its error |P Q - dW| / |dW|.

    base        state_dict of the weights that the run began with, base_name where PEFT finds them
    The adapter loads with PeftModel.from_pretrained(base_model, folder). Needs peft and safetensors.
    Raises ValueError on every process without attach(accumulate=True), or where base is another model's.
    """
    tensors, squares = {}, torch.zeros((1, 2), dtype=torch.float64, device=adapters.device)
    for slot in adapters.slots:
        P, Q = lora_factors(adapters, slot, rank)
        tensors[f"base_model.model.{slot.name}.lora_A.weight"] = P.T.float().contiguous()
        tensors[f"base_model.model.{slot.name}.lora_B.weight"] = Q.T.float().contiguous()
        (local, rows), W0 = own_rows(slot.module.weight), base.get(slot.name + ".weight")
        if W0 is None or W0.shape != slot.module.weight.shape:
            raise ValueError(f"base has no {slot.name}.weight of {tuple(slot.module.weight.shape)}; give the "
                             "state_dict that the run began with")
        dW = (local if slot.low is None else join(local, slot.own_low())).double() - W0[rows].to(P)
        left, right = (P, Q) if slot.conv1d else (Q.T, P.T)
        squares += torch.stack((left[rows] @ right - dW, dW)).square().sum((1, 2))
    rank = 2 * adapters.K * adapters.r if rank is None else rank

    def write():
        try:
            from peft import LoraConfig
            from safetensors.torch import save_file
        except ImportError:
            raise ValueError("a LoRA export needs peft: pip install -r requirements-extra.txt") from None
        if adapters.first == 0:
            task = "CAUSAL_LM" if hasattr(adapters.model, "generate") else None
            LoraConfig(r=rank, lora_alpha=rank, base_model_name_or_path=base_name, task_type=task,
                       fan_in_fan_out=adapters.slots[0].conv1d, inference_mode=True,
                       target_modules=[slot.name for slot in adapters.slots]).save_pretrained(folder)
            save_file(tensors, os.path.join(folder, "adapter_model.safetensors"))

    everywhere(write)
    wrong, whole = gather_shards(squares).sum(0).tolist()       # over slices of W, or over equal replicas
    return math.sqrt(wrong / whole)


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


def not_finite(adapters) -> str:
    """Where gradients are NaN or infinite: the first increment on each process, by global shard."""
    bad = [name for name, p in adapters.named_parameters(adapters.first)
           if p.grad is not None and not p.grad.isfinite().all()]
    return ", ".join(filter(None, gather_text(bad[0] if bad else ""))) or "none"


def train(model, adapters, batches, *, lr: float, max_steps: int, warmup: float = 0.03,
          schedule: str = "cosine", max_grad_norm: float = 0.0, micro_batch_size: int = 8, device="cpu",
          autocast: bool = False, optimizer=None, start: int = 0, skip_nonfinite: int = 0,
          progress: bool = True):
    """Fine-tune `model` and yield a record a step: step, loss, lr, grad_norm, applied, tokens_per_second.

    adapters          from `attach`, or a baseline with the same interface (train.py)
    batches           step batches, each a list of B rows (tokens, prompt length), the same on every process;
                      shard i trains on rows iB/K .. (i+1)B/K - 1, wherever shard i lives
    lr                peak learning rate; it belongs to adapters.aggregate ("sum" steps K times further)
    warmup, schedule  as in lr_factor
    max_grad_norm     joint 2-norm over all shards; 0 = off
    micro_batch_size  rows a forward
    autocast          matmuls in bfloat16, weights as they are
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
    bar = tqdm(total=max_steps, initial=start, desc="train", unit="step",
               disable=not (progress and rank() == 0))
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
                with adapters.shard(i), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                    logits = logits_of(model, x)                        # (b, t, vocabulary)
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
            skipped += 1
            bad = [i for i, value in enumerate(sums) if not math.isfinite(value)]
            text = (f"step {step}: not finite: loss of shards {bad}, gradients of {not_finite(adapters)}; "
                    "W is untouched by this step")
            if skipped > skip_nonfinite:
                raise ValueError(f"{text}. Lower the learning rate, clip, or look at these rows of the batch")
            tqdm.write(text) if rank() == 0 else None
            adapters.next_step()
        optimizer.zero_grad(set_to_none=True)

        loss = sum(sums) / sum(counts)                                  # token mean over the step batch
        speed = sum(len(tokens) for tokens, _ in batch) / (time.perf_counter() - began)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr_now:.2e}, {speed:.0f} tokens/s", refresh=False)
        bar.update()
        yield dict(step=step, loss=loss, lr=lr_now, grad_norm=grad_norm,
                   applied=float(adapters.applied) if finite else 0.0, tokens_per_second=speed)
    bar.close()
