"""What long and large runs want beside hd_pissa.py: other storage of W, fast drivers, refusals, LoRA files.

hd_pissa.py is the method and works without this file. Here, each section for itself:

    agreement             an error on one process is raised on all of them
    W sharded by FSDP2    each process folds P Q into its own rows
    W in bfloat16         its exact float32 value in two halves of 16 bits
    decomposition         eigenvectors of a Gram matrix instead of a full SVD, checked; or random ones
    dropout               on the adapter's input, drawn in the backward (the paper's table 5)
    gradients="global"    every shard learns from the whole batch (not in the paper)
    refusals              a mistake gets one sentence with its remedy
    LoRA                  a finished run as a PEFT adapter of rank 2Kr or less

Notation as in hd_pissa.py.
"""

import datetime
import math
import os
import shutil

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import hd_pissa

# ---- Agreement: all processes fail alike, so that none hangs -----------------------------------------------


def join_processes(backend: str, timeout: float) -> None:
    """init_process_group for what torchrun has started; a collective waits `timeout` seconds.

    After a restart torchrun's store still has the addresses at which killed workers listened: gloo would call
    there. On one machine restarts are counted alike everywhere, so each gets keys of its own.
    """
    wait = datetime.timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    alike = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alike else "any"
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank,
                            world_size=world_size, timeout=wait)


def say(*text) -> None:
    """Print on process 0 alone."""
    if hd_pissa.rank() == 0:
        print(*text, flush=True)


def gather_text(text: str) -> list[str]:
    """`text` of every process, by rank. As bytes: torch's object collectives pickle, and need NumPy."""
    if hd_pissa.world_size() == 1:
        return [text]
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = hd_pissa.gather_shards(torch.tensor([len(data)], device=device)).tolist()
    rows = hd_pissa.gather_shards(F.pad(data, (0, 1 + max(sizes) - len(data)))[None])   # (processes, ...)
    return [bytes(row[:size]).decode() for row, size in zip(rows.tolist(), sizes)]


def everywhere(work):
    """work() on every process; if it fails on any, that error as ValueError on all, so that none hangs.

    Wrapped around what one process alone may fail at, before the collective where the others would wait.
    """
    result = error = None
    try:
        result = work()
    except Exception as e:
        error = e
    for message in filter(None, gather_text((str(error) or repr(error)) if error else "")):
        if error and not isinstance(error, (ValueError, OSError, RuntimeError)):
            raise error                 # a fault in the program: here with its own traceback
        raise ValueError(message) from error
    return result


# ---- W sharded by FSDP2 ------------------------------------------------------------------------------------


def own_rows(weight: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The stored weight's rows on this process, and which they are: all, unless FSDP2 has sharded dim 0."""
    if not hasattr(weight, "to_local"):
        return weight, slice(0, weight.shape[0])
    chunk = -(-weight.shape[0] // weight.device_mesh.size())            # as torch.chunk cuts
    start = min(weight.device_mesh.get_local_rank() * chunk, weight.shape[0])
    local = weight.to_local()
    return local, slice(start, start + local.shape[0])


def shard_over_processes(model: nn.Module, device: torch.device) -> None:
    """FSDP2 over all processes: one unit for each block of layers, one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if hd_pissa.world_size() == 1:
        raise ValueError("--shard_weights needs several processes; start them with torchrun")
    mesh = init_device_mesh(device.type, (hd_pissa.world_size(),))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for blocks in reversed(lists):      # inner ones first, as fully_shard wants it
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(weight: torch.Tensor, low: torch.Tensor | None = None) -> torch.Tensor:
    """A weight as one plain tensor on every process, with its low half if it has one."""
    local, _ = own_rows(weight.detach())
    local = local if low is None else join(local, low)
    if not hasattr(weight, "to_local"):
        return local
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(local, weight.device_mesh, weight.placements, shape=weight.shape,
                              stride=weight.stride()).full_tensor()


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


def reduce_shards(whole: torch.Tensor) -> torch.Tensor:
    """(K, ...) on each process -> its own (S, ...), summed over the processes."""
    if hd_pissa.world_size() == 1:
        return whole
    out = whole.new_empty((whole.shape[0] // hd_pissa.world_size(), *whole.shape[1:]))
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, whole)
    return out


def reduce_rows(dU: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Rows of the sum of dU over the processes, those that a sharded W holds here: a reduce-scatter."""
    world = hd_pissa.world_size()
    chunk = -(-dU.shape[0] // world)
    return reduce_shards(F.pad(dU, (0, 0, 0, chunk * world - dU.shape[0])))[:W.shape[0]]


# ---- W in bfloat16, exactly --------------------------------------------------------------------------------


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


def halve_(slot) -> None:
    """Turn a slot's float32 weight into halves, or complete a bfloat16 one by low halves of zero."""
    W = slot.module.weight
    if W.dtype == torch.bfloat16:
        slot.low = torch.zeros_like(W, dtype=torch.int16)
    else:
        W.data, slot.low = split(W)


def own_low(slot) -> torch.Tensor | None:
    """Low halves of the rows that this process holds."""
    local, rows = own_rows(slot.module.weight)
    if slot.low is not None and slot.low.shape != local.shape:
        slot.low = slot.low[rows].to(local.device, copy=True)           # FSDP2 has sharded W since `attach`
    return slot.low


def stored(slot) -> tuple[torch.Tensor, slice]:
    """W to its last bit, in float32 if it is halved, of the rows on this process, and which these are."""
    (local, rows), low = own_rows(slot.module.weight), own_low(slot)
    return (local if low is None else join(local, low)), rows


def store_(slot, W: torch.Tensor) -> None:
    """Put float32 rows of this process back as halves."""
    high, slot.low = split(W)
    own_rows(slot.module.weight)[0].copy_(high)


# ---- Decomposition: cheaper than a full SVD (section 4.1) --------------------------------------------------


def random_components(W: torch.Tensor, k: int, name: str = "W"):
    """Random orthonormal U (m, k) and Vt (k, n), S = 1, for attach(decompose=random_components): no SVD.

    Drawn from a seed that the layer's name makes, for every process alike. Not from the paper; measured in
    tutorial/results.
    """
    generator = torch.Generator().manual_seed(hd_pissa.seed_of("basis", name))
    U, V = (torch.linalg.qr(torch.randn((side, k), generator=generator, dtype=torch.float64)).Q
            for side in W.shape)                                                # (m, k), (n, k)
    return U.to(W), torch.ones(k).to(W), V.T.to(W)


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
        G = wide @ wide.T                                                       # (d, d)
        # diag(R) of G times a random (d, k) follows the k largest eigenvalues: does float32 reach them?
        probe = torch.randn((len(G), k), generator=torch.Generator().manual_seed(0)).to(G)
        R = torch.linalg.qr(G @ probe).R.diagonal().abs()
        if gram == torch.float32 and R.min() < 1e-3 * R.max():
            tqdm.write(f"{name}: squared singular values fall by {R.min() / R.max():.0e}: float64 Gram "
                       "matrix")
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
    return None


# ---- Dropout on the adapter's input ------------------------------------------------------------------------


def dropout_mask(slot):
    """A function of X that draws its mask from (seed, step, micro-step, shard, layer) in the backward.

    Micro-steps are counted there: a forward that checkpointing recomputes must not advance the count.
    """
    adapters, shard = slot.adapters, slot.adapters.first + slot.adapters.current

    def draw(X):
        micro = adapters.backwards[slot.name, shard] = adapters.backwards.get((slot.name, shard), -1) + 1
        seed = hd_pissa.seed_of(adapters.seed, adapters.step, micro, shard, slot.name)
        generator, keep = torch.Generator(X.device).manual_seed(seed), 1 - slot.dropout
        return torch.empty_like(X).bernoulli_(keep, generator=generator).div_(keep)

    return draw


# ---- Whole-batch gradients ---------------------------------------------------------------------------------


def drop_unsent(adapters) -> None:
    """Forget what a backward that failed in its middle has left, else the next one would add to it."""
    adapters.unsent.clear()
    for slot in adapters.slots:
        slot.dA.grad = slot.dB.grad = None


def gather_whole_batch(adapters) -> None:
    """Make every backward give the factor gradients of all K shards, and bring each sum to its shard's owner.

    A reduce-scatter a layer, during the backward and in one order on every process: a layer waits for those
    behind it, and one without a gradient sends zeros. No process holds two layers' gradients at rank K r.
    """
    K, r, queue = adapters.K, adapters.r, []
    adapters.unsent = queue
    for slot in adapters.slots:
        # Leaves of all K shards that only catch gradients: zeros without memory, as increments are.
        zero = torch.zeros((), dtype=adapters.basis.dtype, device=adapters.device)
        slot.dA = zero.expand(slot.m, K * r).detach().requires_grad_()
        slot.dB = zero.expand(K * r, slot.n).detach().requires_grad_()

    @torch.no_grad()
    def send(unused: bool) -> None:
        while queue:
            slot = queue[-1]
            grads = slot.dA.grad, slot.dB.grad                          # (m, Kr), (Kr, n)
            if not unused and any(grad is None for grad in grads):
                return
            gA, gB = (leaf if grad is None else grad for leaf, grad in zip((slot.dA, slot.dB), grads))
            whole = torch.cat((gA.T.reshape(K, -1), gB.reshape(K, -1)), dim=1)          # (K, r m + r n)
            slot.dA.grad = slot.dB.grad = None
            for (dA, dB), row in zip(slot.leaves, reduce_shards(whole)):
                for leaf, g in ((dA, row[:r * slot.m].view(r, -1).T), (dB, row[r * slot.m:].view(r, -1))):
                    leaf.grad = g.clone() if leaf.grad is None else leaf.grad.add_(g)
            queue.pop()
        adapters.touched.update(range(adapters.S))

    def caught(leaf) -> None:
        if not queue:
            queue.extend(adapters.slots)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: send(unused=True))
        send(unused=False)

    for slot in adapters.slots:
        for leaf in (slot.dA, slot.dB):
            leaf.register_post_accumulate_grad_hook(caught)


# ---- Refusals ----------------------------------------------------------------------------------------------


CHOICES = {"init": ("hd_pissa", "top", "lora"), "aggregate": ("mean", "sum"), "basis": ("cached", "resend"),
           "exchange": ("auto", "all_gather", "all_reduce"), "gradients": ("local", "global")}


def check_arguments(rank, shards, alpha=None, dropout=0.0, **choices) -> None:
    """Raise ValueError for arguments of `attach` that no model could be trained with."""
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(CHOICES[name])}")
    for name, value in (("rank", rank), ("shards", shards)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")
    processes = hd_pissa.world_size()
    if processes == 1 < int(os.environ.get("WORLD_SIZE", 1)) and not dist.is_initialized():
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but no process group: each process would "
                         "train alone; call torch.distributed.init_process_group before attach")
    if shards % processes:
        raise ValueError(f"shards={shards} is not a multiple of the {processes} processes; use shards="
                         f"{max(1, shards // processes) * processes} or another number of processes")
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
        if torch.float64 in (W.dtype, found[0][1].weight.dtype) and W.dtype != found[0][1].weight.dtype:
            raise ValueError(f"{name}.weight is {W.dtype}, {found[0][0]}.weight {found[0][1].weight.dtype}; "
                             "use float64 for all of them or for none")
        if W.device != found[0][1].weight.device:
            raise ValueError(f"{name}.weight is on {W.device}, {found[0][0]}.weight on "
                             f"{found[0][1].weight.device}; one process trains on one device")
        if K * r > min(W.shape):
            remedy = f"the largest rank for these layers is {largest}" if largest else "use fewer shards"
            raise ValueError(f"{name} is {tuple(W.shape)}: {K} shards x rank {r} need {K * r} components, it "
                             f"has {min(W.shape)}; {remedy}")
        if not torch.isfinite(W).all():
            raise ValueError(f"{name}.weight holds NaN or Inf; the checkpoint is damaged, load it again")


def check(model, found, skipped, targets, config: dict, exchange, basis, seed, dtype) -> None:
    """Raise ValueError, on every process, for what `attach` could not train or where processes disagree."""
    r, K = config["rank"], config["shards"]

    def own():
        check_arguments(**config, exchange=exchange, basis=basis)
        for name, module in model.named_modules():
            if isinstance(module, hd_pissa.Muted):
                raise ValueError(f"{name} already has HD-PiSSA attached; call detach_() on the first "
                                 "adapters")
        check_layers(found, skipped, r, 1 if config["init"] == "top" else K, targets, dtype)

    everywhere(own)
    layers = [(name, tuple(module.weight.shape), module.weight.dtype) for name, module in found]
    here, *others = gather_text(f"{config}, {exchange=}, {basis=}, {seed=}, {dtype=}, {layers=}")
    for i, there in enumerate(others, 1):
        if there != here:
            a = max(0, len(os.path.commonprefix((here, there))) - 30)
            raise ValueError(f"processes disagree: process 0 attaches ...{here[a:a + 80]}..., process {i} "
                             f"...{there[a:a + 80]}...; start all with the same command and model")


def check_optimizer(adapters, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer whose step is not a function of gradients and its own state.

    Increments start every step at zero: weight decay would decay zeros, and a rule that reads the
    parameter (Adafactor's and LAMB's scale, LBFGS's line search, ASGD's average) would read nothing.
    """
    name, wanted, held = type(optimizer).__name__, {id(p) for p in adapters.parameters()}, set()
    for group in optimizer.param_groups:
        ours = wanted & {id(p) for p in group["params"]}
        held |= ours
        if ours and group.get("weight_decay"):
            raise ValueError(f"{name} has weight_decay={group['weight_decay']}, which does nothing to "
                             "increments that start at zero; pass weight_decay=0.0 (the paper's setting)")
    bases = {c.__name__.lower() for c in type(optimizer).__mro__}
    if bases & {"adafactor", "lbfgs", "asgd", "lamb", "lars"}:
        raise ValueError(f"{name} reads the parameter itself, and increments start every step at zero; "
                         "use an optimizer that depends on gradients alone, e.g. AdamW, SGD, RMSprop")
    if held != wanted:
        raise ValueError(f"{name} holds {len(held)} of the {len(wanted)} increments; build it from "
                         "adapters.parameters()")


def before_merge(adapters) -> None:
    """Raise ValueError, on every process, for a shard without gradient or increments that cannot be meant.

    Also drops the copies of sharded weights that an evaluation has gathered: they would get the update.
    """
    K, S = adapters.K, adapters.S
    # A (K, 3) gather tells every process the state of every shard, so that all refuse alike.
    local = torch.zeros((S, 3), dtype=torch.float64, device=adapters.device)
    low, high = adapters.increments.aminmax(dim=1)
    local[:, 1] = torch.maximum(-low, high)                             # NaN and Inf survive
    for i in range(S):
        local[i, 0] = i in adapters.touched
        if not local[i, 1]:         # from zero gradients, or because no optimizer filled the increments?
            grads = [p.grad for slot in adapters.slots for p in slot.leaves[i] if p.grad is not None]
            local[i, 2] = not grads or any(bool(g.any()) for g in grads)
    touched, size, gradient = hd_pissa.gather_shards(local).T.tolist()
    if without := [i for i in range(K) if not touched[i]]:
        raise ValueError(f"merge_: shards {without} of {K} got no gradient since the last merge. "
                         f"Every step trains each shard of a process:\n    for s in range({S}):\n"
                         "        with adapters.shard(s):\n            loss_of_mini_batch(s).backward()")
    if bad := [i for i in range(K) if not math.isfinite(size[i])]:
        raise ValueError(f"merge_: the increments of shards {bad} hold NaN or Inf; W is untouched. Lower "
                         "the learning rate or clip the gradients")
    adapters.idle = adapters.idle + 1 if not any(size) and any(gradient) else 0
    if adapters.idle >= 2:
        raise ValueError("merge_: all increments are zero in two successive merges although there are "
                         "gradients; call optimizer.step() before merge_(), build the optimizer from "
                         "adapters.parameters(), and use a learning rate above 0")
    reshard(adapters.model)


def check_state(adapters, own: dict, state: dict) -> None:
    """Raise ValueError, on every process, where `state` is not the adapter state of this run."""
    there = state.get("config", {})
    wrong = {k: (v, there.get(k)) for k, v in adapters.config.items() if there.get(k) != v}
    missing = [name for name in own if name not in state or state[name].shape != own[name].shape]

    def check():
        if wrong or missing:
            raise ValueError(f"adapter state of another run: (here, there) = {wrong}, tensors missing or "
                             f"of another shape: {missing[:3]}; attach as that run did, or begin anew")

    everywhere(check)


def refuse_nonfinite(adapters, step: int, losses: list[float], tolerated: bool) -> None:
    """Name the shards and layers of a step that is not finite; ValueError unless it is `tolerated`."""
    bad = [name for name, p in adapters.named_parameters(adapters.first)
           if p.grad is not None and not p.grad.isfinite().all()]
    where = ", ".join(filter(None, gather_text(bad[0] if bad else ""))) or "none"
    shards = [i for i, value in enumerate(losses) if not math.isfinite(value)]
    text = (f"step {step}: not finite: loss of shards {shards}, gradients of {where}; W is untouched by this "
            "step")
    if not tolerated:
        raise ValueError(f"{text}. Lower the learning rate, clip, or look at these rows of the batch")
    if hd_pissa.rank() == 0:
        tqdm.write(text)


# ---- A run as a LoRA ---------------------------------------------------------------------------------------


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
    (At, B), (dAt, dB) = (slot.views(hd_pissa.gather_shards(flat).double(), slot.start) for flat in factors)
    P = adapters.share() * torch.cat((dAt, At)).flatten(0, 1).T         # (2K, r, m) -> (m, 2Kr)
    Q = torch.cat((B, dB)).flatten(0, 1)                                # (2K, r, n) -> (2Kr, n)
    if rank is not None:
        (P, left), (Q, right) = torch.linalg.qr(P), torch.linalg.qr(Q.T)
        U, S, Vt = torch.linalg.svd(left @ right.T)
        P, Q = P @ (U[:, :rank] * S[:rank]), Vt[:rank] @ Q.T            # (m, rank), (rank, n), at most
        P, Q = F.pad(P, (0, rank - len(Q))), F.pad(Q, (0, 0, 0, rank - len(Q)))
    return P, Q


@torch.no_grad()
def export_lora(adapters, folder: str, base: dict, base_name: str = "", rank: int | None = None) -> float:
    """Write the run as a PEFT LoRA adapter of `rank` (None: 2Kr); its error |P Q - dW| / |dW|.

    base        state_dict of the weights that the run began with, base_name where PEFT finds them
    The adapter loads with PeftModel.from_pretrained(base_model, folder). Needs peft and safetensors.
    Raises ValueError on every process without attach(accumulate=True), or where base is another model's.
    """
    def check_base():
        for slot in adapters.slots:
            W0 = base.get(slot.name + ".weight")
            if W0 is None or W0.shape != slot.module.weight.shape:
                raise ValueError(f"base has no {slot.name}.weight of {tuple(slot.module.weight.shape)}; give "
                                 "the state_dict that the run began with")

    everywhere(check_base)
    tensors, squares = {}, torch.zeros((1, 2), dtype=torch.float64, device=adapters.device)
    for slot in adapters.slots:
        P, Q = lora_factors(adapters, slot, rank)
        tensors[f"base_model.model.{slot.name}.lora_A.weight"] = P.T.float().contiguous()
        tensors[f"base_model.model.{slot.name}.lora_B.weight"] = Q.T.float().contiguous()
        W, rows = stored(slot)
        dW = W.double() - base[slot.name + ".weight"][rows].to(P)
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
            unfinished = f"{folder}.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            LoraConfig(r=rank, lora_alpha=rank, base_model_name_or_path=base_name, task_type=task,
                       fan_in_fan_out=adapters.slots[0].conv1d, inference_mode=True,
                       target_modules=[slot.name for slot in adapters.slots]).save_pretrained(unfinished)
            save_file(tensors, os.path.join(unfinished, "adapter_model.safetensors"))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)

    everywhere(write)
    wrong, whole = hd_pissa.gather_shards(squares).sum(0).tolist()      # of slices, or equal replicas
    return math.sqrt(wrong / whole) if whole else 0.0
