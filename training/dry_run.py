"""What a train.py command would need, computed without its weights: memory, traffic, work, steps."""

import collections
import contextlib
import math
import os
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import hd_pissa
import hd_pissa_extra
from data.rows import enough, lengths, load
from training.models import check_layers, rows_apart
from training.processes import say
from training.report import sampled

SPARE = 4 * 2**30       # of a GPU's memory: CUDA itself, fragments between tensors, a step's small ones


class Grouped(TorchDispatchMode):
    """The product of a mixture's experts, whose rule for tensors without numbers knows bfloat16 alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if getattr(function, "overloadpacket", None) is getattr(torch.ops.aten, "_grouped_mm", ""):
            return args[0].new_empty((len(args[0]), args[1].shape[-1]))     # (T, m) (E, m, n) -> (T, n)
        return function(*args, **(kwargs or {}))


class Fused(torch.autograd.Function):
    """What a GPU's kernels of attention keep: no number for a pair of tokens."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        y = v.new_empty((len(q), q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y


def attention_of_a_gpu(query, key, value, attn_mask=None, *args, enable_gqa=False,
                       attend=nn.functional.scaled_dot_product_attention, **options):
    """torch (up to 2.13) has kernels for 16 bits and float32; in float32 none lets queries share heads of
    keys. Elsewhere it keeps a number, or several, for every pair of tokens and every head."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if query.dim() == 4 and (query.itemsize == 2 or query.dtype == torch.float32 and not enable_gqa):
        return Fused.apply(query, key, value, None if attn_mask is None else attn_mask.to(query.dtype))
    with sdpa_kernel(SDPBackend.MATH):
        return attend(query, key, value, attn_mask, *args, enable_gqa=enable_gqa, **options)


def saved_bytes(model: nn.Module, layers, x: torch.Tensor, autocast: bool, *, also=(), columns: int = 0,
                packed: bool = False, checkpointed: bool = False,
                gpu: bool = False) -> tuple[int, int] | None:
    """Bytes that one forward of the muted model keeps for its backward, by autograd's own hooks, and bytes
    that are alive beside them while the backward passes the head, or a stack of experts.

    layers      (name, module) pairs that are muted, as `hd_pissa_extra.attach` does; parameters do not count
    also        parameters that train whole
    columns     of A_i in one backward of an expert: r, or K r
    packed      rows stand one behind the other in x
    checkpointed    of a block its input alone is kept, and the rest while the backward passes it
    gpu             attention as a GPU's kernels compute it
    None where the forward asks for numbers that tensors of shapes alone do not have.
    """
    from torch._subclasses import fake_tensor
    model.requires_grad_(False)
    stacks = {id(module.stack): module.stack for _, module in layers
              if isinstance(module, hd_pissa_extra.Expert)}
    for p in (*stacks.values(), *also):
        p.requires_grad_()              # a stack's backward gets dW, whole, and makes of it g_A and g_B
    for module in (module for _, module in layers if not isinstance(module, hd_pissa_extra.Expert)):
        conv1d, zero = not isinstance(module, nn.Linear), torch.zeros(())
        m, n = module.weight.shape if conv1d else module.weight.T.shape
        A, B = zero.expand(1, m, 1), zero.expand(1, 1, n)
        leaves = [factor[0].detach().requires_grad_() for factor in (A, B)]
        module.forward = lambda x, f=(module, A, B, *leaves, conv1d): hd_pissa.Mute.apply(
            x, f[0].weight, f[0].bias, *f[1:5], 1.0, f[5], None)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen, kept, inputs, inside = {}, [], [], []
    blocks = [x for x in model.modules() if any(
        kind.__name__ == "GradientCheckpointingLayer" for kind in type(x).__mro__)]     # of transformers
    blocks = blocks or [block for x in model.modules() if isinstance(x, nn.ModuleList) for block in x]

    def enter(_, args, kwargs):
        inputs.append(next(iter((*args, *kwargs.values()))).nbytes)
        inside.append(sum(seen.values()))

    def leave(*_):
        inside[-1] = sum(seen.values()) - inside[-1]

    for block in blocks if checkpointed else ():
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        kept.append(storage)            # a freed storage's address would be given to the next
        return tensor

    attention = mock.patch.object(nn.functional, "scaled_dot_product_attention", attention_of_a_gpu)
    try:
        with (Grouped(), rows_apart(packed),
              attention if gpu else contextlib.nullcontext(),
              torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                logits = hd_pissa.logits_of(model, x)
            nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="sum")
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
        return None                     # a loop over the experts that have tokens
    # The gradients before and behind the softmax; or dW of a stack, A and B as it wants them, g_A and g_B.
    factors = [columns * len(W) * sum(W.shape[1:]) * 2 * W.itemsize for W in stacks.values()]
    dW = [W.nbytes + size for W, size in zip(stacks.values(), factors)]
    return (sum(seen.values()) - sum(inside) + sum(inputs),
            max(2 * logits.nbytes, max(inside, default=0) + max(dW, default=0)))


def lora(factors: int, K: int, times: int, zero: int) -> dict[str, float]:
    """Numbers a device of LoRA with AdamW on K devices: what it holds, and receives in a step.

    factors     numbers of A and B at rank r; times: 1 for rank r, K for rank K r
    zero        0: every device holds all; ZeRO's stage 1 spreads moments, 2 also gradients, 3 also A, B
    """
    n, there = times * factors, (K - 1) / K
    return {"factors": n / K if zero == 3 else n, "increments": 0, "gradients": n / K if zero >= 2 else n,
            "moments": 2 * n / K if zero >= 1 else 2 * n, "received": (3 if zero == 3 else 2) * there * n}


def hd_pissa_numbers(factors: int, K: int, processes: int, *, gradients="local", send="step",
                     micro_batches=1, init="hd_pissa", exchange="auto", basis="cached") -> dict[str, float]:
    """The same of HD-PiSSA: K shards over `processes`, without W and its low halves."""
    S, there = K // processes, (processes - 1) / processes
    whole = gradients == "global"
    every = whole or exchange != "all_reduce" and basis == "cached"
    # What is caught lives until it is sent; the own part is replaced by the sums.
    caught = K * factors if whole and processes > 1 and send == "step" else 0
    sent = whole * (1 if send == "step" else micro_batches)
    gathers = (basis == "resend" and init != "random" and not whole) + 1 + sent
    return {"factors": 0 if init == "random" else (K if every else S) * factors, "increments": S * factors,
            "gradients": max(caught, S * factors), "moments": 2 * S * factors,
            "received": gathers * there * K * factors}


def units(model: nn.Module) -> tuple[int, int, int]:
    """Numbers of weights that FSDP2 gathers at once: of the rest, of the largest block, of all blocks.

    The units of hd_pissa_extra.shard_over_processes: every block of a ModuleList, and what is in none.
    """
    unit_of = dict.fromkeys(model.parameters())
    for blocks in (x for x in model.modules() if isinstance(x, nn.ModuleList)):     # inner ones come last
        for block in blocks:
            unit_of |= dict.fromkeys(block.parameters(), block)
    sizes = collections.Counter()
    for p, block in unit_of.items():
        sizes[block] += p.numel()
    rest = sizes.pop(None, 0)
    return rest, max(sizes.values(), default=0), sum(sizes.values())


def needs(shapes, everything: int, gathered, activations, *, rank: int, shards: int, processes: int,
          dtype="float32", rounding="exact", shard_weights=False, exchange="auto", basis="cached",
          bucket_mb=256, micro_batches=1, gpu=False, export_lora=False, watched=0, also=0, **options):
    """Bytes that a process holds, by what they are, and `hd_pissa_numbers` of these options.

    shapes          of the adapted weights; everything: numbers of all weights; gathered: `units`
    activations     `saved_bytes`; watched: numbers of W copied to the CPU for the rank of dW at the end
    also            numbers that train whole
    """
    S, width = shards // processes, 8 if dtype == "float64" else 4
    factors, adapted = rank * sum(a + b for a, b in shapes), sum(a * b for a, b in shapes)
    own = hd_pissa_numbers(factors, shards, processes, exchange=exchange, basis=basis,
                           micro_batches=micro_batches, **options)
    each = 2 if dtype == "bfloat16" else width                          # bytes of a weight
    roots = (own["increments"] + also) * width                          # of AdamW's second moments, in a step
    low = 2 * adapted if dtype == "bfloat16" and rounding == "exact" else 0
    cut, (rest, largest, _) = processes if shard_weights else 1, gathered
    whole = (rest + largest) * each + max(0, largest * each - activations[1])   # a second one behind the head
    # gloo receives into a copy of its own, a GPU folds one bucket while it receives the next; the factors of
    # the largest layer are concatenated for the fold, or of several equal ones in 32 MiB on a GPU.
    sent = min(bucket_mb * 2**20, shards * factors * width) * (1 if basis == "cached" else 2)
    together = 4 * min(2**25, shards * factors * width) if gpu else 0
    fold = (2 * sent if processes > 1 else 0) + max(
        together, 2 * shards * rank * width * max(a + b for a, b in shapes))
    if exchange == "all_reduce":
        fold = max(a * b for a, b in shapes) * width
    if dtype == "bfloat16":             # W in float32 with what splits it, or on a GPU a part of dU
        fold += 2**26 if gpu else 18 * max(a * b for a, b in shapes) // cut
    return {"W and all other weights": everything * each // cut, "low halves": low // cut,
            "A_i, B_i": own["factors"] * width, f"increments of {S} shards": own["increments"] * width,
            "gradients": own["gradients"] * width, "AdamW moments": own["moments"] * width,
            "weights that FSDP2 gathers: two blocks and the rest": whole * (cut > 1),
            "sums of increments, for --export_lora": S * factors * width * export_lora,
            "gradients and AdamW moments of --also": 3 * also * width,
            "copies of up to 8 weights, for the rank of dW at the end": watched * width * (not gpu),
            "the larger of activations and exchange": max(sum(activations), fold, roots)}, own


def available(device: str) -> tuple[int, str]:
    """Bytes that a process has here, and of what: its GPU's memory, or its share of this machine's."""
    if device != "cpu" and torch.cuda.is_available():       # a run on more GPUs may be planned on one
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", 0)) if processes <= gpus else 0
        return torch.cuda.get_device_properties(index).total_memory, (
            "a GPU here" if processes <= gpus else f"GPU 0 (GPUs here: {gpus}, processes: {processes})")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")       # a container's
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return memory // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "a process on this machine"


def dry_run(args, load_model, default_steps: int) -> dict:
    """Print and return the needs of each process; `load_model` makes fake tensors, no weight is loaded."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    if args.method != "hd_pissa":
        raise ValueError(f"--dry_run describes --method hd_pissa, not {args.method}")
    processes, r, K = hd_pissa.world_size(), args.rank, args.shards
    S, width, (room, where) = K // processes, 4 if args.dtype != "float64" else 8, available(args.device)
    hd_pissa.check_arguments(r, K, args.alpha)
    hd_pissa_extra.check_arguments(args.dropout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, tokenizer, context = load_model(args.model, args.seed, False, args.tokenizer)
        least = r * (1 if args.init == "top" else K)
        also = hd_pissa_extra.also_parameters(model, args.also)
        layers = [(name, module) for name, module in
                  hd_pissa_extra.find_layers(model, args.targets, least=least)[0]
                  if not {name + ".weight", name.rpartition(".")[0]} & also.keys()]
        by_name = {name: tuple(module.weight.shape) for name, module in layers}
        shapes = list(by_name.values())
        adapted = sum(a * b for a, b in shapes)
        everything = sum(p.numel() for p in model.parameters())
        dtype = torch.float32 if args.dtype in ("autocast", "tf32") else getattr(torch, args.dtype)
        cast = {id(p): nn.Parameter(p.detach().to(dtype)) for p in model.parameters()}      # tied stays tied
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = p if p is None else cast[id(p)]
        block = min(args.block_size or min(context, 1024), context)
        rows, held, _ = load(args.data, args.eval_data, args.eval_rows, tokenizer, block,
                             format=args.format, loss=args.loss)
        enough(args, rows, held)
        sizes = lengths(rows)
        longest = (block if args.packing else int(sizes.max())) - 1
        x = torch.zeros((min(args.micro_batch_size, args.batch_size // K), longest), dtype=torch.long)
        gathered = units(model)
        activations = saved_bytes(
            model.train(), layers, x, args.dtype == "autocast", packed=args.packing, gpu="GPU" in where,
            also=[cast[id(p)] for p in also.values()], checkpointed=args.gradient_checkpointing,
            columns=r * (K if args.gradients == "global" else 1))
    check_layers(args, model, layers)
    what = "unknown: the forward depends on its tokens" if activations is None else (
        f"{x.shape[0]} rows of {longest} tokens")
    factors = r * sum(a + b for a, b in shapes)                         # numbers of one shard
    beside = sum(p.numel() for p in also.values())                      # and what trains whole
    micro_batches = -(-args.batch_size // K // args.micro_batch_size)
    spare = SPARE if "GPU" in where else 0
    memory, own = needs(
        shapes, everything, gathered, activations or (0, 0), rank=r, shards=K, processes=processes,
        dtype=args.dtype, rounding=args.rounding, shard_weights=args.shard_weights, gradients=args.gradients,
        send=args.send, micro_batches=micro_batches, init=args.init, exchange=args.exchange, basis=args.basis,
        bucket_mb=args.bucket_mb, export_lora=args.export_lora, gpu="GPU" in where, also=beside,
        watched=sum(math.prod(by_name[name]) for name in sampled([*by_name])))
    memory[f"the larger of activations ({what}) and exchange"] = memory.pop(
        "the larger of activations and exchange")
    share = (processes - 1) / processes
    each = 2 if args.dtype == "bfloat16" else width
    sums = 2 * share * beside * width                                   # of the gradients of --also
    traffic = {"all_gather": own["received"] * width + sums,
               "all_reduce": 2 * share * adapted * width + sums
               + (args.gradients == "global") * share * K * factors * width}
    if args.shard_weights:              # every forward gathers all units, every backward all blocks again
        traffic["either, for --shard_weights"] = (
            share * S * micro_batches * (gathered[0] + 2 * gathered[2]) * each)
    start = time.perf_counter()
    torch.linalg.eigh(torch.eye(512) + torch.ones(512, 512) / 512)
    init = 2 * (time.perf_counter() - start) * sum((min(s) / 512) ** 3 for s in shapes) / processes
    init = 0.0 if args.init in ("random", "lora") else init

    per_epoch = len(sizes) // args.batch_size
    steps = args.max_steps or (max(1, round(args.epochs * per_epoch)) if args.epochs else default_steps)
    tokens = float(sizes.mean()) * args.batch_size * steps

    say(f"\n{args.model}: {everything:,} weights, {adapted:,} of them in {len(layers)} adapted "
                 f"layers; K={K} shards of rank {r} over {processes} processes, {S} each\n\n"
                 "memory of each process")
    for name, size in (memory | {"sum": sum(memory.values())}).items():
        say(f"  {name:70} {size / 2**20:12.1f} MiB")
    say(f"beside LoRA with AdamW on {K} devices: A and B, increments, gradients, moments a device; received "
        "a step")
    rows = {f"this run on {processes} processes": own}
    rows |= {f"LoRA of rank {times * r}" + (f", ZeRO-{zero}" if zero else ""): lora(factors, K, times, zero)
             for times, zero in ((1, 0), (K, 0), (K, 1), (K, 2), (K, 3))}
    for name, numbers in rows.items():
        say(f"  {name:40}" + "".join(f"{n * width / 2**20:11.1f}" for n in numbers.values()) + " MiB")
    say("bytes received by each process a step, by --exchange")
    for name, size in traffic.items():
        say(f"  {name:70} {size / 2**20:12.1f} MiB")
    fits = sum(memory.values()) <= room - spare
    known = "" if activations else ", without activations,"
    say(f"{'fits' if fits else 'does not fit'}: the sum{known} against {room / 2**20:.1f} MiB of {where}"
        + (f", of which {spare / 2**20:.0f} are held back" if spare else ""))
    if not fits:
        mixture = any(isinstance(module, hd_pissa_extra.Expert) for _, module in layers)
        say(f"  less: more processes{'' if mixture else ' with --shard_weights'}, a lower --rank, "
            "--micro_batch_size or --block_size, --exchange all_reduce")
    say(f"decomposition: about {init:.0f} s on this CPU\nsteps: {steps}, about {tokens:,.0f} tokens")
    return {"memory": memory, "fits": fits, "traffic": traffic, "init_seconds": init,
            "steps": steps, "tokens": tokens}
