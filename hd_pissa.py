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
import functools
import hashlib
import math
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


def components(W: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest singular triplets of W (m, n): U (m, k), S (k,) descending, Vt (k, n), in float64.

    Exact, because single components are dealt out to shards and randomized SVD mixes neighbours. Below
    float64 the eigenvectors E of the shorter side's Gram matrix do: cheaper than a full SVD, and in float64
    because the condition is squared. If that is not orthonormal (rank-deficient W), full SVD it is.
    """
    M = W.detach().double()
    if W.dtype != torch.float64:
        wide = M if M.shape[0] <= M.shape[1] else M.T                           # (d, max(m, n))
        E = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -k:].flip(1)       # (d, k), descending
        R = E.T @ wide                                                         # (k, max(m, n)) = S V^T
        S = R.norm(dim=1)
        R = R / S.clamp_min(1e-300)[:, None]
        if torch.dist(R @ R.T, torch.eye(k).to(S), p=math.inf) < 1e-5:
            return (E, S, R) if wide is M else (R.T, S, E.T)
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    return U[:, :k], S[:k], Vt[:k]


def seed_of(*parts) -> int:
    """A 63-bit generator seed that depends on `parts` alone (Python's own hash changes between runs)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def shard_factors(W: torch.Tensor, K: int, r: int, init: str, s: float, seed: int) -> torch.Tensor:
    """A_i^T and B_i of all K shards of W (m, n), flattened side by side: (K, r m + r n).

        hd_pissa   A_i = U_i (S_i/s)^1/2, B_i = (S_i/s)^1/2 V_i^T, components ir .. (i+1)r - 1   (section 4.1)
        top        every shard the components 0 .. r - 1                                       (appendix C)
        lora       A_i Kaiming-uniform as in PEFT, another draw per shard, B_i = 0             (appendix C)

    Dividing S by s makes s A_i B_i the slice of W, as in PEFT.
    """
    m, n = W.shape
    if init == "lora":
        draws = [torch.Generator().manual_seed(seed_of(seed, i)) for i in range(K)]
        At = torch.stack([torch.rand((r, m), generator=g, dtype=torch.float64) for g in draws])
        At, B = (2 * At - 1) / math.sqrt(m), torch.zeros((K, r, n), dtype=torch.float64)    # (K, r, m)
    else:
        U, S, Vt = components(W, r if init == "top" else K * r)
        root = (S / s).sqrt()
        At = (U * root).T.reshape(-1, r, m).expand(K, r, m)                     # (m, Kr) -> (K, r, m)
        B = (root[:, None] * Vt).reshape(-1, r, n).expand(K, r, n)              # (Kr, n) -> (K, r, n)
    return torch.cat((At.flatten(1), B.flatten(1)), dim=1)                      # (K, r m + r n)


# ---- Muting mechanism (section 4.3) ------------------------------------------------------------------------


class Mute(torch.autograd.Function):
    """Y = X W forward; the backward gives dX and the gradients that residual PiSSA would have.

    Equation (1), Y = X (W_res,i + A_i B_i), is X W at dA = dB = 0: the forward computes nothing of the
    adapter and keeps nothing but its input. A and B travel as attributes, not as saved tensors: a forward
    recomputed by activation checkpointing then cannot swap them for another shard's.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, dA, dB, s, conv1d, mask):
        ctx.save_for_backward(x, weight)
        ctx.A, ctx.B, ctx.s, ctx.conv1d, ctx.mask = A, B, s, conv1d, mask
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
        # g_A = s X^T (dY B_i^T)      (4.3); computed as its transpose, which is how dA lies in memory
        gA = ((dY @ (ctx.s * ctx.B.T).to(dtype)).T @ X).T               # ((T, r)^T (T, m))^T -> (m, r)
        # g_B = s (X A_i)^T dY        (4.3)
        gB = (X @ (ctx.s * ctx.A).to(dtype)).T @ dY                     # (T, r)^T (T, n) -> (r, n)
        return dX, None, None, None, None, gA.to(ctx.A.dtype), gB.to(ctx.B.dtype), None, None, None


class Muted:
    """Mixed in front of nn.Linear or Conv1D by `attach`: the same module and weight, the muted forward."""

    def forward(self, x):
        slot = self.hd_pissa
        mask = slot.dropout_mask() if slot.dropout > 0 and self.training else None
        factors = slot.A, slot.B, slot.dA, slot.dB
        return Mute.apply(x, self.weight, self.bias, *factors, slot.s, slot.conv1d, mask)


class Slot:
    """One adapted layer: its place in the flat buffers, and the factors of the shard its forward uses."""

    def __init__(self, name: str, module: nn.Module, r: int, s: float, dropout: float, adapters):
        self.name, self.module, self.plain_class, self.adapters = name, module, type(module), adapters
        self.conv1d = not isinstance(module, nn.Linear)
        self.m, self.n = module.weight.shape if self.conv1d else module.weight.T.shape
        self.r, self.s, self.dropout = r, s, dropout
        self.start, self.size = 0, r * (self.m + self.n)                # columns of A^T and B in a row
        self.A = self.B = self.dA = self.dB = None
        self.backwards = {}         # global shard -> backward passes since the last merge

    def views(self, flat: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's (rows, r, m) and (rows, r, n) in rows of factors, whose columns begin at `offset`."""
        a, r = self.start - offset, self.r
        At, B = flat[:, a:a + self.size].split((r * self.m, r * self.n), dim=1)
        return At.unflatten(1, (r, self.m)), B.unflatten(1, (r, self.n))

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


class Adapters:
    """HD-PiSSA's state on one process: fixed A_i, B_i, increments, and the merge into W. Made by `attach`.

    A row of a flat buffer is one shard, all layers side by side: one collective then moves many layers.
    """

    def __init__(self, found, r, K, init, alpha, dropout, aggregate, exchange, seed, bucket_mb):
        self.K, self.S, self.aggregate, self.exchange = K, K // world_size(), aggregate, exchange
        self.first = rank() * self.S                                    # global index of local shard 0
        self.seed, self.step, self.idle, self.current, self.skipped = seed, 0, 0, 0, {}
        self.config = dict(rank=r, shards=K, init=init, alpha=alpha, aggregate=aggregate, dropout=dropout)
        self.s = 1.0 if alpha is None else alpha / r
        self.slots = [Slot(name, module, r, self.s, dropout, self) for name, module in found]
        wide = any(slot.module.weight.dtype == torch.float64 for slot in self.slots)
        dtype, self.device = torch.float64 if wide else torch.float32, self.slots[0].module.weight.device
        self.buckets, filled, width = [], math.inf, 0
        for slot in self.slots:
            slot.start, width, filled = width, width + slot.size, filled + K * slot.size * dtype.itemsize
            if filled > bucket_mb * 2**20:
                self.buckets.append([])
                filled = K * slot.size * dtype.itemsize
            self.buckets[-1].append(slot)
        # Folding factors needs A_i, B_i of all K shards on every process; the dense exchange only its own.
        self.kept = range(K) if exchange == "all_gather" else range(self.first, self.first + self.S)
        self.basis = torch.zeros((len(self.kept), width), dtype=dtype, device=self.device)
        self.increments = torch.zeros((self.S, width), dtype=dtype, device=self.device)
        self.leaves: list[dict[str, torch.Tensor]] = [{} for _ in range(self.S)]    # by local shard, name
        self.touched: set[int] = set()                                  # local shards with a gradient
        self._hooks = []
        for i, leaves in enumerate(self.leaves):

            def touch(leaf, i=i):
                self.touched.add(i)

            for slot in self.slots:
                # detach: a leaf of its own on the buffer's memory. dA lies transposed, as the merge reads it.
                dAt, dB = slot.views(self.increments[i:i + 1])
                leaves[slot.name + ".dA"] = dAt[0].T.detach().requires_grad_()      # (m, r)
                leaves[slot.name + ".dB"] = dB[0].detach().requires_grad_()         # (r, n)
                self._hooks.append(leaves[slot.name + ".dB"].register_post_accumulate_grad_hook(touch))

    def parameters(self) -> list[torch.Tensor]:
        """The increments of this process, for any optimizer that `check` accepts."""
        return [leaf for leaves in self.leaves for leaf in leaves.values()]

    def named_parameters(self):
        """Pairs ("<module path>.shard<s>.dA", (m, r)) and ("....dB", (r, n)), s counted in the process."""
        for i, leaves in enumerate(self.leaves):
            for name, leaf in leaves.items():
                path, kind = name.rsplit(".", 1)
                yield f"{path}.shard{i}.{kind}", leaf

    def _select(self, i: int) -> None:
        # Tensors are swapped, not an index: under torch.compile one graph then serves every shard.
        self.current, own = i, self.kept.index(self.first + i)
        for slot in self.slots:
            At, B = slot.views(self.basis[own:own + 1])
            slot.A, slot.B = At[0].T, B[0]                              # (m, r), (r, n)
            slot.dA, slot.dB = self.leaves[i][slot.name + ".dA"], self.leaves[i][slot.name + ".dB"]

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
        for i, leaves in enumerate(self.leaves):
            squares[i] = sum(p.grad.norm().double().square() for p in leaves.values() if p.grad is not None)
        # Per shard first, then in shard order: the sum does not depend on how shards are dealt to processes.
        norm = gather_shards(squares).sum().sqrt()
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(p.grad))
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
        local[:, 1] = torch.linalg.vector_norm(self.increments, math.inf, dim=1)    # NaN and Inf survive
        for i, leaves in enumerate(self.leaves):
            local[i, 0] = i in self.touched
            if not local[i, 1]:     # from zero gradients, or because no optimizer filled the increments?
                grads = [p.grad for p in leaves.values() if p.grad is not None]
                local[i, 2] = not grads or any(bool(g.any()) for g in grads)
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
        share = self.s / self.K if self.aggregate == "mean" else self.s
        for slots in self.buckets:
            a, b = slots[0].start, slots[-1].start + slots[-1].size     # the bucket's columns
            increments = self.increments[:, a:b]
            if self.exchange == "all_gather":
                increments = gather_shards(increments)                  # (S, b - a) -> (K, b - a)
            for slot in slots:
                W = slot.module.weight
                Pt, Q = update_factors(*slot.views(self.basis), *slot.views(increments, a))
                # sum_i dU_i = P Q, in the layout W is stored in: Conv1D (m, n), Linear (n, m)
                left, right = (Pt.T, Q) if slot.conv1d else (Q.T, Pt)
                if self.exchange == "all_gather":
                    W.addmm_(left.to(W.dtype), right.to(W.dtype), alpha=share)
                else:
                    dU = left @ right                                   # of this process's shards
                    if world_size() > 1:
                        dist.all_reduce(dU)
                    W.add_(dU, alpha=share)
        self.increments.zero_()
        self.touched.clear()
        for slot in self.slots:
            slot.backwards.clear()
        self.step += 1

    def _own_factors(self) -> dict[str, torch.Tensor]:
        own = {}
        for slot in self.slots:
            for i, At, B in zip(self.kept, *slot.views(self.basis)):
                if self.first <= i < self.first + self.S:
                    own[f"{slot.name}.shard{i}.A"], own[f"{slot.name}.shard{i}.B"] = At.T, B
        return own

    def state_dict(self) -> dict:
        """Config, step, and A_i, B_i of this process's shards by global index: "<module path>.shard<i>.A"."""
        factors = {name: tensor.clone() for name, tensor in self._own_factors().items()}
        return {"config": dict(self.config), "step": self.step, **factors}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take A_i, B_i and the step from `state`; ValueError if it is of another configuration or model."""
        there, own = state.get("config", {}), self._own_factors()
        wrong = {k: (v, there.get(k)) for k, v in self.config.items() if there.get(k) != v}
        missing = [name for name in own if name not in state or state[name].shape != own[name].shape]

        def check():
            if wrong or missing:
                raise ValueError(f"adapter state of another run: (here, there) = {wrong}, tensors missing or "
                                 f"of another shape: {missing[:3]}")

        everywhere(check)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        if self.exchange == "all_gather":
            self.basis.copy_(gather_shards(self.basis[self.first:self.first + self.S]))
        self.step = state["step"]

    def detach_(self) -> None:
        """Make the modules plain again; W keeps everything merged so far, and stays frozen."""
        for hook in self._hooks:
            hook.remove()
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


def attach(model: nn.Module, rank: int, *, shards: int | None = None, targets="all-linear",
           init: str = "hd_pissa", alpha: float | None = None, dropout: float = 0.0, aggregate: str = "mean",
           exchange: str = "auto", seed: int = 0, bucket_mb: int = 256, progress: bool = False) -> Adapters:
    """Cut the targeted weights of `model` into K shards of `rank` components, mute them, freeze all else.

    rank        r, components per shard and weight                                             (section 4.1)
    shards      K, the total over all processes and a multiple of their number (default: one per process)
    targets     "all-linear" (every Linear and Conv1D but the output head and tied weights), or name suffixes
    init        "hd_pissa" (disjoint slices), "top" (every shard the top r), "lora" (random A, zero B)
    alpha       s = alpha / rank scales the adapter as in PEFT; None: s = 1
    dropout     probability, on the adapter's input; 0 = off
    aggregate   "mean" (the paper, 1/K) or "sum" (the published code; with Adam a K times larger step)
    exchange    "all_gather" (factors), "all_reduce" (dense dU), "auto" (fewer bytes: all_gather)
    seed        of the random draws: dropout and the "lora" init
    bucket_mb   MiB of gathered factors per collective

    Module classes change, names and state_dict keys do not. Raises ValueError, on every process alike, for
    arguments or weights that cannot be trained.
    """
    K = world_size() if shards is None else shards

    def select():
        check_arguments(rank, K, init, alpha, dropout, aggregate, exchange)
        found, skipped = find_layers(model, targets)
        check_layers(found, skipped, rank, 1 if init == "top" else K, targets)
        return found, skipped

    found, skipped = everywhere(select)
    exchange = "all_gather" if exchange == "auto" else exchange
    adapters = Adapters(found, rank, K, init, alpha, dropout, aggregate, exchange, seed, bucket_mb)
    adapters.skipped = skipped
    _deal(adapters, init, progress)
    model.requires_grad_(False)
    for slot in adapters.slots:
        slot.module.hd_pissa = slot
        slot.module.__class__ = type(f"Muted{slot.plain_class.__name__}", (Muted, slot.plain_class), {})
    adapters._select(0)
    return adapters


def check_arguments(r, K, init, alpha, dropout, aggregate, exchange) -> None:
    """Raise ValueError for what no model could be trained with."""
    for name, value, allowed in (("init", init, "hd_pissa top lora"), ("aggregate", aggregate, "mean sum"),
                                 ("exchange", exchange, "auto all_gather all_reduce")):
        if value not in allowed.split():
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed.split())}")
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


def check_layers(found, skipped, r, K, targets) -> None:
    """Raise ValueError, with the layer's name, for a weight without K r components or of a wrong kind."""
    if not found:
        left_out = ", ".join(f"{name} ({why})" for name, why in list(skipped.items())[:8]) or "none"
        raise ValueError(f"targets={targets!r} match no layer; linear layers left out: {left_out}")
    largest = min(min(module.weight.shape) for _, module in found) // K
    for name, module in found:
        W = module.weight
        if W.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}.weight is {W.dtype}: small updates are added to W itself, which needs "
                             "float32 or float64; load the model with dtype=torch.float32")
        if K * r > min(W.shape):
            remedy = f"the largest rank for these layers is {largest}" if largest else "use fewer shards"
            raise ValueError(f"{name} is {tuple(W.shape)}: {K} shards x rank {r} need {K * r} components, it "
                             f"has {min(W.shape)}; {remedy}")
        if not torch.isfinite(W).all():
            raise ValueError(f"{name}.weight holds NaN or Inf; the checkpoint is damaged, load it again")


@torch.no_grad()
def _deal(adapters: Adapters, init: str, progress: bool) -> None:
    # Each weight is decomposed by exactly one process and sent to the others: SVDs of one matrix on two
    # machines may differ in sign or order, and the shards would overlap.
    K = adapters.K

    def decompose():
        own, mine = range(rank(), len(adapters.slots), world_size()), {}
        for j in tqdm(own, desc="SVD", unit="layer", disable=not (progress and rank() == 0)):
            slot = adapters.slots[j]
            W = slot.module.weight if slot.conv1d else slot.module.weight.T      # (m, n)
            mine[j] = shard_factors(W, K, slot.r, init, slot.s, seed_of(adapters.seed, slot.name))
        return mine

    mine = everywhere(decompose)
    for j, slot in enumerate(adapters.slots):
        rows = mine.pop(j).to(adapters.basis) if j in mine else adapters.basis.new_empty((K, slot.size))
        if world_size() > 1:
            dist.broadcast(rows, src=j % world_size())
        adapters.basis[:, slot.start:slot.start + slot.size] = rows[adapters.kept.start:adapters.kept.stop]


# ---- What an update looks like (section 6) -----------------------------------------------------------------


def update_spectrum(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Singular values of after - before, descending, float64. Both weights: (m, n) or (n, m)."""
    return torch.linalg.svdvals(after.detach().double() - before.detach().double())


def effective_rank(S: torch.Tensor, tolerance: float = 1e-2) -> int:
    """#{ sigma > tolerance * sigma_1 }. Counting nonzero singular values would count the rounding of W."""
    return int((S > tolerance * S[0]).sum()) if S[0] > 0 else 0


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
    """(b, t) -> (b, t, vocabulary), for a model that returns a tensor or a Hugging Face output."""
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def train(model, adapters, batches, *, lr: float, max_steps: int, warmup: float = 0.03,
          schedule: str = "cosine", betas=(0.9, 0.999), eps: float = 1e-8, max_grad_norm: float = 0.0,
          micro_batch_size: int = 8, device="cpu", progress: bool = True):
    """Fine-tune `model` and yield one log record a step: step, loss, lr, grad_norm, tokens_per_second.

    adapters          from `attach`, or a baseline with the same methods and `whole_batch` set (train.py)
    batches           step batches, each a list of B rows (tokens, prompt length), the same on every process;
                      shard i trains on rows iB/K .. (i+1)B/K - 1, wherever shard i lives
    lr                peak learning rate; it belongs to adapters.aggregate ("sum" steps K times further)
    warmup, schedule  as in lr_factor
    max_grad_norm     joint 2-norm over all shards; 0 = off
    micro_batch_size  rows a forward

    A shard minimises the mean over its own response tokens; with `whole_batch`, that of the whole step batch.
    Raises ValueError, on every process alike, for a shard without response tokens or a loss not finite.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}: nothing would train; use a learning rate above 0 (the paper: 2e-5)")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr, betas, eps, weight_decay=0.0, foreach=True)
    adapters.check(optimizer)
    factor = functools.partial(lr_factor, max_steps=max_steps, warmup=warmup, schedule=schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    K, S, first = adapters.K, adapters.S, adapters.first
    whole_batch = getattr(adapters, "whole_batch", False)
    bar = tqdm(total=max_steps, desc="train", unit="step", disable=not (progress and rank() == 0))
    model.train()
    for step, batch in zip(range(1, max_steps + 1), batches):
        start, size = time.perf_counter(), len(batch) // K
        mini = [batch[i * size:(i + 1) * size] for i in range(K)]
        counts = [sum(len(tokens) - prompt for tokens, prompt in rows) for rows in mini]
        if size * K != len(batch) or 0 in counts:
            raise ValueError(f"step {step}: {len(batch)} rows with {counts} response tokens per shard; "
                             f"each of the {K} shards needs the same number of rows and a response token")

        # Local backward: each shard of this process on its own mini-batch.
        losses = torch.zeros(S, dtype=torch.float64, device=device)
        for i in range(S):
            # whole_batch: processes are averaged later, so the sum over them must carry their number here.
            norm = counts[first + i] if not whole_batch else sum(counts) / world_size()
            for a in range(0, size, micro_batch_size):
                x, y = pad(mini[first + i][a:a + micro_batch_size], device)
                with adapters.shard(i):
                    logits = logits_of(model, x)                        # (b, t, vocabulary)
                    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
                    (loss / norm).backward()
                losses[i] += loss.detach()
        sums = gather_shards(losses).tolist()
        if bad := [i for i, value in enumerate(sums) if not math.isfinite(value)]:
            raise ValueError(f"step {step}: the loss of shards {bad} is not finite; W is untouched by this "
                             "step. Lower the learning rate, or look at these rows of the batch")

        # AdamW turns gradients into dA_i, dB_i; all shards go into the one W.
        grad_norm = adapters.clip_grad_norm_(max_grad_norm or math.inf)
        lr_now = scheduler.get_last_lr()[0]
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()

        loss = sum(sums) / sum(counts)                                  # token mean over the step batch
        speed = sum(len(tokens) for tokens, _ in batch) / (time.perf_counter() - start)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr_now:.2e}, {speed:.0f} tokens/s", refresh=False)
        bar.update()
        yield dict(step=step, loss=loss, lr=lr_now, grad_norm=float(grad_norm), tokens_per_second=speed)
    bar.close()
