"""Fine-tune a language model with HD-PiSSA, or with LoRA, PiSSA or all weights through the same loop.

    python train.py                                    # embedded GPT and data, all 8 shards in one process
    torchrun --nproc_per_node=2 train.py               # the same experiment on two processes
    torchrun --nproc_per_node=8 train.py --model DIR --data FILE.jsonl --rank 16 --lr 2e-5
    python train.py --method lora                      # a baseline

The method is hd_pissa.py; here are the command line, the small GPT, the data and the baselines. Data is JSONL
with "instruction" and "response" (and optionally "domain") in every row; the loss covers the response alone.
Results: OUT/model.pt (plain state_dict) or OUT/model/ (Hugging Face files), OUT/log.jsonl, OUT/config.json.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import hd_pissa
import hd_pissa_extra
from data import checkpoint, models, recipes
from data.evaluate import evaluate, examiner, read_sets
from data.report import (
    append_log,
    cut_log,
    heartbeat,
    read_result,
    report_layers,
    report_losses,
    report_rank,
    sampled,
)
from data.report_html import write_report
from data.rows import enough, load, preview, step_batches, table
from data.svd_cache import cached_components
from data.tokenizer import GPTTokenizer
from hd_pissa_extra import everywhere, say

DATA = Path(__file__).resolve().parent / "data"

# ---- The small GPT: nanoGPT's shape, pre-norm, learned positions, tied head, no biases ---------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.attn_proj = nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.mlp_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        b, t, c = x.shape                                               # batch, tokens, width
        qkv = self.c_attn(self.ln_1(x)).view(b, t, 3, self.heads, -1)   # (b, t, 3, heads, c / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (b, heads, t, c / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # (b, heads, t, c / heads)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, block_size=128, layers=4, width=128, seed: int = 0):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(p, std=std, generator=generator)
        self.lm_head.weight = self.wte.weight

    @classmethod
    def from_state_dict(cls, state: dict) -> "GPT":
        """Rebuild the model whose plain state_dict this is; its sizes are the tensors' shapes."""
        layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        vocabulary, width = state["wte.weight"].shape
        model = cls(vocabulary, state["wpe.weight"].shape[0], layers, width)
        model.load_state_dict(state)
        return model

    def forward(self, x):
        h = self.wte(x) + self.wpe.weight[:x.shape[1]]                  # (b, t, width)
        for block in self.blocks:
            h = block(h)
        return self.lm_head(self.ln_f(h))                               # (b, t, vocabulary)


# ---- Models ------------------------------------------------------------------------------------------------


def load_model(name: str, seed: int, weights: bool = True, tokenizer: str | None = None):
    """(float32 model, tokenizer, context length) of "scratch", a .pt file or a Hugging Face name."""
    if not models.is_small(name):
        return models.hugging_face(name, weights, tokenizer)
    tokenizer = GPTTokenizer(tokenizer)
    model = (GPT(tokenizer.vocabulary, seed=seed) if name == "scratch"
             else GPT.from_state_dict(models.read_state(name)))
    if model.wte.weight.shape[0] != tokenizer.vocabulary:
        raise ValueError(f"--model {name} has {model.wte.weight.shape[0]} embeddings, the tokenizer "
                         f"{tokenizer.vocabulary} tokens; give the --tokenizer that its config.json names")
    return model, tokenizer, model.wpe.weight.shape[0]


# ---- Baselines: data-parallel LoRA, PiSSA and full fine-tuning, with the interface of hd_pissa.Adapters ----


class Baseline:
    """One adapter per weight, or all weights, trained on the whole step batch: processes add their gradients.

        lora, pissa     Y = X W_res + s (X A) B,  A (m, r), B (r, n) trained    (W_res = W, or W - s A B)
    """

    whole_batch, applied = True, 1.0

    def __init__(self, model, method: str, rank: int, K: int, targets, alpha, seed: int, dropout=0.0):
        hd_pissa_extra.check_arguments(rank, K, alpha, dropout)
        self.K, self.S, self.step, self.mean_over = K, K // hd_pissa.world_size(), 0, 1
        self.seed, self._parameters = seed, {}
        self.first = hd_pissa.rank() * self.S
        self.s, self.factors, self.slots, self.skipped = 1.0 if alpha is None else alpha / rank, [], [], {}
        model.requires_grad_(method == "full")
        if method == "full":
            self._parameters = dict(model.named_parameters())
            return
        found, self.skipped = hd_pissa.find_layers(model, targets)
        hd_pissa_extra.check_layers(found, self.skipped, rank, 1, targets)
        init = {"lora": "lora", "pissa": "top"}[method]
        for name, module in found:
            conv1d = not isinstance(module, nn.Linear)
            W = module.weight if conv1d else module.weight.T            # (m, n)
            flat = hd_pissa.shard_factors(W, 1, rank, init, self.s, hd_pissa.seed_of(seed, name))[0].to(W)
            A = flat[:rank * W.shape[0]].view(rank, -1).T.contiguous().requires_grad_()     # (m, r)
            B = flat[rank * W.shape[0]:].view(rank, -1).clone().requires_grad_()            # (r, n)
            if hd_pissa.world_size() > 1:
                for factor in (A, B):
                    dist.broadcast(factor.data, src=0)
            if method == "pissa":
                W.data.sub_(self.s * A.detach() @ B.detach())

            def residual(module, inputs, output, A=A, B=B):
                x = F.dropout(inputs[0], dropout, module.training) if dropout else inputs[0]
                return output + self.s * (x @ A) @ B

            self.factors.append((W, A, B, module.register_forward_hook(residual)))
            self._parameters |= {name + ".A": A, name + ".B": B}

    def parameters(self):
        return list(self._parameters.values())

    def named_parameters(self, first: int = 0):
        return self._parameters.items()

    def tensors(self) -> dict:
        return self._parameters if self.factors else {}         # all weights are the model's own

    def resume(self, step: int, mean_over: int):
        self.step = step

    def shard(self, i):
        return contextlib.nullcontext()         # one adapter, whichever rows come

    def check(self, optimizer):
        """Any optimizer works on plain parameters."""

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Sum the gradients over the processes, then clip: the first moment they must be whole."""
        if hd_pissa.world_size() > 1:
            for p in self.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm

    def merge_(self):
        """The optimizer has already changed what is trained."""
        self.next_step()

    def next_step(self):
        self.step += 1

    @torch.no_grad()
    def detach_(self):
        """W <- W_res + s A B, and plain modules again."""
        for W, A, B, hook in self.factors:
            W.data.add_(self.s * A @ B)
            hook.remove()


# ---- The run -----------------------------------------------------------------------------------------------


# Peak learning rates and steps for the embedded model and data (data/README.md says how they were found).
LR = {"hd_pissa": 2e-2, "pissa": 1.6e-2, "lora": 3.2e-2, "full": 4e-3}
STEPS = 400

# flag, type or choices, default, help with the unit and the value that means "off"
FLAGS = {
    "what to train": (
        ("recipe", tuple(recipes.RECIPES), None, "the paper's settings; a flag given beside it wins"),
        ("model", str, str(DATA / "base.pt"), '.pt file of the small GPT, "scratch", or a Hugging Face name'),
        ("tokenizer", str, None, "of the small GPT: a tiktoken name or file of ranks; None: data/'s"),
        ("data", str, str(DATA / "multi_domain.jsonl"), "JSONL file, folder of data/prepare.py, or a "
         "list of such: 0.7:A,0.3:B with their shares of the rows"),
        ("eval_data", str, None, "the same; None: 5 percent of the rows of --data, at most 500, by hash"),
        ("eval_rows", int, 500, "held-out rows, and rows of each --eval file, evaluated at most"),
        ("eval", str, None, "JSONL files, by commas, with answers to be generated and scored; None = off"),
        ("eval_every", int, 0, "steps between such evaluations; 0 = before and after training alone"),
        ("eval_tokens", int, 256, "tokens of a generated answer, at most half the context"),
        ("execute_generated_code", bool, False, "run what is generated for --eval rows answered by tests"),
        ("out", str, "out", "directory for the results"),
        ("resume", str, "auto", "auto: go on from the newest checkpoint in --out; never; or a path"),
    ),
    "method": (
        ("method", ("hd_pissa", "pissa", "lora", "full"), "hd_pissa", "what is trained"),
        ("rank", int, 2, "r, components per shard and weight"),
        ("shards", int, 8, "K, over all processes; a multiple of their number"),
        ("targets", str, "all-linear", "all-linear, or comma-separated suffixes of module names"),
        ("init", ("hd_pissa", "top", "lora", "random"), "hd_pissa", "factors of the shards "
         "(appendix C); random: orthonormal, of no SVD (not in the paper)"),
        ("alpha", float, None, "the adapter is scaled by alpha / rank; None = off (scale 1)"),
        ("dropout", float, 0.0, "probability on the adapter's input, 0 = off"),
        ("aggregate", ("mean", "sum"), "mean", "mean: the paper; sum: its published code"),
        ("exchange", ("auto", "all_gather", "all_reduce"), "auto", "factors (all_gather) or dense dU"),
        ("basis", ("cached", "resend"), "cached", "A_i, B_i of all shards kept, or sent at every merge"),
        ("gradients", ("local", "global"), "local", "of a shard, from its mini-batch or the whole batch"),
        ("export_lora", bool, False, "write OUT/lora too, a PEFT adapter of the run (Hugging Face models)"),
        ("lora_rank", int, None, "its rank; None: 2 K r, which leaves out second-order terms alone"),
    ),
    "optimization": (
        ("lr", float, None, f"peak learning rate, of this --method and --aggregate; embedded model: {LR}"),
        ("schedule", ("cosine", "linear", "constant"), "cosine", "after the warm-up"),
        ("warmup", float, 0.03, "steps if 1 or more, else a share of all steps; 0 = off"),
        ("max_steps", int, None, f"optimizer steps; None: --epochs decides, else {STEPS}"),
        ("epochs", float, None, "passes over the data, used where --max_steps is not given; None = off"),
        ("batch_size", int, 64, "rows a step over all shards, a multiple of --shards"),
        ("micro_batch_size", int, 32, "rows a forward, at most"),
        ("block_size", int, None, "tokens a row, longer ones are cut; None: the context, at most 1024"),
        ("max_grad_norm", float, 0.0, "joint 2-norm over all shards, 0 = off"),
    ),
    "machine": (
        ("dtype", ("float32", "bfloat16", "autocast", "float64"), "float32", "of the weights (the paper: "
         "float32); bfloat16 keeps 16 more bits beside each; autocast: float32 weights, bfloat16 matmuls"),
        ("shard_weights", bool, False, "cut W over the processes by FSDP2; off: each holds all of it"),
        ("svd_cache", str, None, "directory that keeps decompositions for later runs; None = off"),
        ("bucket_mb", int, 256, "MiB of gathered factors per collective"),
        ("dry_run", bool, False, "print memory, traffic and work of this command, and stop"),
        ("device", ("auto", "cpu", "cuda"), "auto", "auto: cuda if there is one"),
        ("threads", int, None, "CPU threads a process; None: cores / local processes"),
        ("timeout", float, 600.0, "seconds that a collective waits for the other processes"),
        ("seed", int, 0, "of row order and random draws"),
        ("save_every", int, 0, "steps between checkpoints; 0 = off"),
        ("save_minutes", float, 15.0, "minutes between checkpoints; 0 = off. One is written at the end too"),
        ("check_every", int, 100, "steps between comparisons of W's bits over the processes; 0 = off"),
        ("heartbeat", float, 60.0, "seconds without a step until a process says that it waits; 0 = off"),
        ("skip_nonfinite", int, 0, "steps dropped for a NaN or infinite loss or gradient before an error"),
    ),
}


OWN = ("init", "aggregate", "exchange", "basis", "gradients", "svd_cache", "shard_weights")   # hd_pissa's
ZERO = ("warmup", "max_grad_norm", "seed", "bucket_mb", "save_every", "save_minutes", "check_every",
        "eval_every", "heartbeat", "skip_nonfinite")          # numbers that may be 0


class OneLineErrors(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The flags of the command line, checked as far as that needs neither model nor data."""
    p = OneLineErrors(prog="train.py", description=__doc__.split("\n")[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, kind, default, text in flags:
            how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            how = {"action": "store_true"} if kind is bool else {"default": default, **how}
            group.add_argument(f"--{name}", help=text, **how)
    args = recipes.parse(p, argv)
    for name in ("rank", "shards", "batch_size", "micro_batch_size", "eval_rows", "max_steps", "epochs",
                 "eval_tokens", "block_size", "lora_rank", "threads", "timeout", "lr", *ZERO):
        value, zero = getattr(args, name), name in ZERO
        if value is not None and not (0 <= value if zero else 0 < value) or value in (math.inf, math.nan):
            p.error(f"--{name} {value}: must be a finite number, " + ("0 or more" if zero else "above 0"))
    if args.batch_size % args.shards:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --shards {args.shards}; use "
                f"--batch_size {max(1, args.batch_size // args.shards) * args.shards}")
    own = [f"--{name} {getattr(args, name)}" for name in OWN if getattr(args, name) != p.get_default(name)]
    own += ["--dtype bfloat16"] if args.dtype == "bfloat16" else []
    if args.method != "hd_pissa" and own:
        p.error(f"--method {args.method} with {own[0]}: only hd_pissa knows that; leave it out")
    if args.lora_rank and not args.export_lora:
        p.error(f"--lora_rank {args.lora_rank} without --export_lora: give both, or none")
    if args.export_lora and (args.method != "hd_pissa" or models.is_small(args.model)):
        p.error(f"--export_lora with --method {args.method} --model {args.model}: it writes what hd_pissa "
                "did to a Hugging Face model; leave it out")
    if args.export_lora and not importlib.util.find_spec("peft"):
        p.error("--export_lora needs peft: pip install -r requirements-extra.txt")
    if args.lora_rank and args.lora_rank > 2 * args.shards * args.rank:
        p.error(f"--lora_rank {args.lora_rank}: dW has rank 2 K r = {2 * args.shards * args.rank} but for "
                "its second-order terms; use that or less")
    if args.lr is None and args.model != str(DATA / "base.pt"):
        p.error("--lr: give the peak learning rate for this --model (the paper, with mean: 2e-5 for LLaMA)")
    if args.lr is None:
        args.lr = LR[args.method] / (args.shards if args.aggregate == "sum" else 1)     # K times the step
    args.targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    return args, p


def start_processes(args) -> torch.device:
    """Join the process group that torchrun announces; return this process's device."""
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and local_size > torch.cuda.device_count():
        raise ValueError(f"{local_size} processes share {torch.cuda.device_count()} GPUs; start one a GPU, "
                         "each holds several of the --shards")
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // local_size))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        hd_pissa_extra.join_processes("nccl" if cuda else "gloo", args.timeout)
    return device


def fit(args, config, model, adapters, optimizer, rows, start, extra, device, examine) -> None:
    """Train from step `start` with a log line a step and checkpoints; a signal ends it after a step's end."""
    out, caught, saved = Path(args.out), [], time.monotonic()

    def prepare():
        if hd_pissa.rank() == 0:
            if not start:
                shutil.rmtree(out / "checkpoint", ignore_errors=True)
            for name in ("result.json", "spectra.json", "report.html"):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / "lora", ignore_errors=True)         # of another run in the same folder
            (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            checkpoint.clean(out / "checkpoint")
            cut_log(out / "log.jsonl", start)

    everywhere(prepare)
    if not start:
        examine(model, 0)
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, lambda number, frame: caught.append(number))
    batches = step_batches(rows, args.batch_size, args.seed, start)
    try:
        with heartbeat(args.heartbeat, args.timeout) as beat:
            for record in hd_pissa.train(
                    model, adapters, batches, lr=args.lr, max_steps=args.max_steps, warmup=args.warmup,
                    schedule=args.schedule, max_grad_norm=args.max_grad_norm, device=device, start=start,
                    micro_batch_size=args.micro_batch_size, autocast=args.dtype == "autocast",
                    optimizer=optimizer, skip_nonfinite=args.skip_nonfinite):
                step = record["step"]
                beat(step)
                unwritten = append_log(out / "log.jsonl", record)
                # A signal that one process has caught, and log and clock of process 0, concern all of them.
                own = [max(caught, default=0), time.monotonic() - saved, unwritten is not None]
                own = torch.tensor([own], dtype=torch.float64, device=device)
                signals, waited, failed = hd_pissa.gather_shards(own).T.tolist()
                if any(failed):
                    raise ValueError(hd_pissa_extra.gather_text(str(unwritten or ""))[0])
                if args.check_every and step % args.check_every == 0:
                    checkpoint.check_replicas(adapters, device)
                if args.eval_every and step % args.eval_every == 0 and step < args.max_steps:
                    examine(model, step, lambda step=step: beat(step))
                due = (step == args.max_steps or args.save_every and step % args.save_every == 0
                       or args.save_minutes and waited[0] >= 60 * args.save_minutes)
                if due or any(signals):
                    checkpoint.save(out / "checkpoint", step, model, adapters, optimizer, config, extra,
                                    device)
                    saved = time.monotonic()
                if any(signals) and step < args.max_steps:
                    number = int(max(signals))
                    say(f"stopped by {signal.Signals(number).name} after step {step}, which is saved; the "
                        "same command continues")
                    raise SystemExit(128 + number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(args) -> dict:
    device = start_processes(args)
    recipes.begin(args, load_model)
    if args.dry_run:
        from data.dry_run import dry_run
        return dry_run(args, load_model, STEPS)
    model, tokenizer, context = everywhere(lambda: load_model(args.model, args.seed, True, args.tokenizer))
    sets = everywhere(lambda: read_sets(args.eval, args.eval_rows, args.execute_generated_code))
    examine = examiner(args, sets, tokenizer, context, device)
    model = model.double() if args.dtype == "float64" else model
    model = model if args.shard_weights else model.to(device)
    block_size = min(args.block_size or min(context, 1024), context)
    report, progress = {}, hd_pissa.rank() == 0
    rows, held, rows_hash = everywhere(lambda: load(args.data, args.eval_data, args.eval_rows, tokenizer,
                                                    block_size, report=report, progress=progress))
    enough(args, rows, held)
    say(f"{table(report)}\nfirst row, + before what the loss covers:\n{preview(rows[0], tokenizer)}")
    if args.max_steps is None:
        args.max_steps = max(1, round(args.epochs * (len(rows) // args.batch_size))) if args.epochs else STEPS

    out = Path(args.out)
    config = vars(args) | {"processes": hd_pissa.world_size(), "torch": torch.__version__, "rows": rows_hash}
    resumed, manifest = everywhere(lambda: checkpoint.find(args.resume, out)), None
    if resumed:
        manifest = checkpoint.read_manifest(resumed)
        checkpoint.same_run(manifest, config, resumed)
        result = read_result(out / "result.json")
        if result and resumed == out / "checkpoint" / f"step_{args.max_steps}":
            report_losses(result["before"], result["after"])
            say(f"\n{resumed} is the end of this run; choose another --out, or --resume never to train again")
            return result

    probe, _ = hd_pissa.pad([row[:2] for row in held[:8]], model.get_input_embeddings().weight.device
                            if hasattr(model, "get_input_embeddings") else device)
    base_logits = None
    if args.method == "hd_pissa" and args.dtype != "bfloat16" and not (args.shard_weights or resumed):
        with torch.no_grad():
            base_logits = hd_pissa.logits_of(model.eval(), probe)
    names = [name for name, _ in hd_pissa.find_layers(model, args.targets)[0]]
    # Rank of dW: a copy of up to 8 weights, taken before anything moves.
    watched = {name: model.get_parameter(name + ".weight").detach().to(device, copy=True)
               for name in sampled(names)}
    base = {}
    if args.export_lora:
        base = {name: checkpoint.weight_sum(model.get_parameter(name + ".weight").detach()) for name in names}
    if args.method == "hd_pissa":
        decompose = cached_components(args.svd_cache) if args.svd_cache else hd_pissa.components
        decompose = hd_pissa_extra.random_components if args.init == "random" else decompose
        adapters = hd_pissa.attach(
            model, args.rank, shards=args.shards, targets=args.targets, alpha=args.alpha,
            init="hd_pissa" if args.init == "random" else args.init, dropout=args.dropout,
            aggregate=args.aggregate, exchange=args.exchange, basis=args.basis, gradients=args.gradients,
            seed=args.seed, bucket_mb=args.bucket_mb, device=device, progress=True,
            dtype=torch.bfloat16 if args.dtype == "bfloat16" else None,
            decompose=None if resumed else decompose, accumulate=args.export_lora)
    else:
        adapters = Baseline(model, args.method, args.rank, args.shards, args.targets, args.alpha, args.seed,
                            args.dropout)
    if args.dtype == "bfloat16":
        for p in model.parameters():    # but no buffers: from_pretrained leaves rotary frequencies float32
            p.data = p.data.bfloat16()
    if args.shard_weights:
        hd_pissa_extra.shard_over_processes(model, device)
    report_layers(args, adapters, names)
    optimizer = torch.optim.AdamW(adapters.parameters(), args.lr, weight_decay=0.0, foreach=True)
    start = 0
    if resumed:
        start = checkpoint.load(resumed, manifest, model, adapters, optimizer, config, device)
        extra = manifest["extra"]
        was = {key: manifest["config"][key] for key in ("exchange", "device", "shards", "processes")}
        say(f"going on after step {start} of {resumed}" + "".join(
            f"; {key} was {value}, is {config[key]}" for key, value in was.items() if value != config[key]))
    else:
        before = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate base")
        if base_logits is not None:
            with torch.no_grad():
                same = torch.equal(hd_pissa.logits_of(model.eval(), probe), base_logits)
            if not same:
                raise RuntimeError("step-0 logits differ from the base model's: the forward is not X W")
            say(f"step-0 loss {before['all']['loss']:.6f}: logits equal the base model's bit for bit")
        extra = {"before": before, "base": base}

    belongs = f" (for aggregate={args.aggregate})" if args.method == "hd_pissa" else ""
    say(f"{args.method}: {args.max_steps} steps of {args.batch_size} rows, peak lr {args.lr:g}{belongs}")
    with checkpoint.alone(out):
        fit(args, config, model, adapters, optimizer, rows, start, extra, device, examine)
    lows = {slot.name: slot.low for slot in adapters.slots}
    adapters.detach_()
    after = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate result")
    exams = examine(model, args.max_steps)
    if args.shard_weights:
        model.reshard()
    report_losses(extra["before"], after)
    after_training = {name: hd_pissa_extra.whole(model.get_parameter(name + ".weight"), lows.get(name))
                      for name in watched}
    spectra = report_rank(args, watched, after_training)
    result = {"before": extra["before"], "after": after, "effective_rank": spectra, "eval": exams}
    if args.export_lora:
        result["lora_error"] = models.export(args, adapters, extra["base"], out / "lora", load_model)
    save(out, model, tokenizer, result)
    return result


def save(out: Path, model, tokenizer, result) -> None:
    state = models.whole_state(model)

    def write():
        if hd_pissa.rank() > 0:
            return
        if isinstance(model, GPT):
            torch.save(state, out / "model.pt.tmp")
            os.replace(out / "model.pt.tmp", out / "model.pt")
            how = f"train.GPT.from_state_dict(torch.load({str(out / 'model.pt')!r}, weights_only=True))"
        else:
            models.save_folder(out / "model", model, tokenizer, state)
            how = f"transformers.AutoModelForCausalLM.from_pretrained({str(out / 'model')!r})"
        (out / "result.json.tmp").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(out / "result.json.tmp", out / "result.json")
        write_report(out)
        say(f"\nthe result is a plain model under the base model's names:\n  {how}")

    everywhere(write)


def main(argv=None) -> dict:
    """Run a command line; exit status 2 and one sentence on stderr for what the user can put right."""
    args, parser = parse(sys.argv[1:] if argv is None else argv)
    try:
        return run(args)
    except (ValueError, OSError) as e:
        parser.error(" ".join(str(e).split()))
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        parser.error(f"a collective failed: {' '.join(str(e).split())}. Another process has died or the "
                     "network is cut; the same command continues from the last checkpoint")


if __name__ == "__main__":
    try:
        main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
