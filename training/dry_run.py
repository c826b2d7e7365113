"""What a train.py command would need, computed without its weights: memory, traffic, work, steps."""

import math
import os
import time
from pathlib import Path

import torch
import torch.nn as nn

import hd_pissa
import hd_pissa_extra
from data.rows import enough, lengths, load
from training.processes import say
from training.report import sampled


def saved_bytes(model: nn.Module, layers, x: torch.Tensor, autocast: bool) -> int:
    """Bytes that one forward keeps for its backward, counted by autograd's own hooks, parameters apart.

    A linear layer whose weight trains keeps its input and its weight, exactly as the muted layer does.
    """
    model.requires_grad_(False)
    for _, module in layers:
        module.weight.requires_grad_(True)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            seen[storage._cdata] = storage.nbytes()
        kept.append(storage)            # a freed storage's address would be given to the next
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            logits = hd_pissa.logits_of(model, x)
        nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="sum")
    # The backward begins with the logits and their gradient alive beside what was saved.
    return sum(seen.values()) + 2 * logits.numel() * logits.element_size()


def available(device: str) -> tuple[int, str]:
    """Bytes that a process has here, and of what: its GPU's memory, or its share of this machine's."""
    if device != "cpu" and torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", 0))
        return torch.cuda.get_device_properties(device).total_memory, "a GPU here"
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
    S, width = K // processes, 4 if args.dtype != "float64" else 8
    hd_pissa.check_arguments(r, K, args.alpha)
    hd_pissa_extra.check_arguments(args.dropout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, tokenizer, context = load_model(args.model, args.seed, False, args.tokenizer)
        least = r * (1 if args.init == "top" else K)
        layers, skipped = hd_pissa.find_layers(model, args.targets, least=least)
        by_name = {name: tuple(module.weight.shape) for name, module in layers}
        shapes = list(by_name.values())
        adapted = sum(a * b for a, b in shapes)
        everything = sum(p.numel() for p in model.parameters())
        dtype = torch.float32 if args.dtype == "autocast" else getattr(torch, args.dtype)
        cast = {id(p): nn.Parameter(p.detach().to(dtype)) for p in model.parameters()}      # tied stays tied
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = p if p is None else cast[id(p)]
        block = min(args.block_size or min(context, 1024), context)
        rows, held, _ = load(args.data, args.eval_data, args.eval_rows, tokenizer, block)
        enough(args, rows, held)
        sizes = lengths(rows)
        longest = int(sizes.max()) - 1
        x = torch.zeros((min(args.micro_batch_size, args.batch_size // K), longest), dtype=torch.long)
        activations = saved_bytes(model.train(), layers, x, args.dtype == "autocast")
    factors = r * sum(a + b for a, b in shapes)                         # numbers of one shard
    foreign = args.gradients == "global" or (args.exchange != "all_reduce" and args.basis == "cached")
    kept = K if foreign else S
    whole = everything * (2 if args.dtype == "bfloat16" else width)
    low = 2 * adapted if args.dtype == "bfloat16" else 0
    cut = processes if args.shard_weights else 1
    # gloo receives into a copy of its own; the largest layer's factors are concatenated for the fold.
    sent = min(args.bucket_mb * 2**20, K * factors * width) * (1 if args.basis == "cached" else 2)
    exchange = (2 * sent if processes > 1 else 0) + 2 * K * r * width * max(a + b for a, b in shapes)
    if args.exchange == "all_reduce":
        exchange = max(a * b for a, b in shapes) * width
    memory = {"W and all other weights": whole // cut, "low halves": low // cut,
              f"A_i, B_i of {kept} shards": kept * factors * width,
              f"increments, gradients, AdamW moments of {S} shards": 4 * S * factors * width,
              "sums of increments, for --export_lora": S * factors * width * args.export_lora,
              "copies of up to 8 weights, for the rank of dW at the end":
                  sum(math.prod(by_name[name]) for name in sampled(list(by_name))) * width,
              f"the larger of activations ({x.shape[0]} rows of {longest} tokens) and exchange":
                  max(activations, exchange)}
    there = (processes - 1) / processes
    gather = K * factors * width * there * (1 if args.basis == "cached" else 2)
    traffic = {"all_gather": gather, "all_reduce": 2 * there * adapted * width}
    start = time.perf_counter()
    torch.linalg.eigh(torch.eye(512) + torch.ones(512, 512) / 512)
    init = sum((min(s) / 512) ** 3 for s in shapes) * (time.perf_counter() - start) * 2 / processes

    per_epoch = len(sizes) // args.batch_size
    steps = args.max_steps or (max(1, round(args.epochs * per_epoch)) if args.epochs else default_steps)
    tokens = float(sizes.mean()) * args.batch_size * steps

    say(f"\n{args.model}: {everything:,} weights, {adapted:,} of them in {len(layers)} adapted "
                 f"layers; K={K} shards of rank {r} over {processes} processes, {S} each\n\n"
                 "memory of each process")
    for name, size in (memory | {"sum": sum(memory.values())}).items():
        say(f"  {name:70} {size / 2**20:12.1f} MiB")
    say("bytes received by each process a step")
    for name, size in traffic.items():
        say(f"  {name:70} {size / 2**20:12.1f} MiB")
    needed, (there, where) = sum(memory.values()), available(args.device)
    say(f"{'fits' if needed <= there else 'does not fit'}: the sum against {there / 2**20:.1f} MiB "
                 f"of {where}")
    if needed > there:
        say("  less: more processes with --shard_weights, a lower --rank, --micro_batch_size or "
                     "--block_size, --exchange all_reduce")
    say(f"decomposition: about {init:.0f} s on this CPU\nsteps: {steps}, about {tokens:,.0f} tokens")
    return {"memory": memory, "fits": needed <= there, "traffic": traffic, "init_seconds": init,
            "steps": steps, "tokens": tokens}
