"""Fine-tune a language model with HD-PiSSA, LoRA, PiSSA, or all weights, through the same loop.

    python train.py                           # embedded GPT and data, all 8 shards in one process
    torchrun --nproc_per_node=2 train.py      # the same experiment on two processes
    torchrun --nproc_per_node=8 train.py --model DIR --data FILE.jsonl --rank 16 --lr 2e-5
    python train.py --method lora             # a baseline

The method is hd_pissa.py. Here is a run of it, from top to bottom: configuration, model, data,
loop, result. What a run wants beside these is in training/. Data is JSONL with "instruction" and
"response" (and optionally "domain") in every row; the loss covers the response alone.
Results: OUT/model.pt (plain state_dict) or OUT/model/ (Hugging Face files), OUT/log.jsonl.
"""

import argparse
import importlib.util
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import hd_pissa
import hd_pissa_extra
from data.rows import enough, load, preview, step_batches, table
from data.tokenizer import GPTTokenizer
from training import checkpoint, folder, models, processes, recipes, report
from training.baselines import Baseline
from training.dry_run import dry_run
from training.evaluate import evaluate, examiner, first_logits
from training.processes import Lost, Stopped, everywhere, fail, say
from training.svd_cache import cached_components

DATA = Path(__file__).resolve().parent / "data"

# ---- Configuration -------------------------------------------------------------------------------

# Peak learning rates and steps for the embedded model and data, found as data/README.md says.
LR = {"hd_pissa": 2e-2, "pissa": 1.6e-2, "lora": 3.2e-2, "full": 4e-3}
STEPS = 400

# Titles of --help, and flags: name, type or choices, default, help with unit and "off" value.
FLAGS = (
    "every day",
    ("method", ("hd_pissa", "pissa", "lora", "full"), "hd_pissa", "what is trained"),
    ("model", str, str(DATA / "base.pt"),
     '.pt of the small GPT, "scratch", or a Hugging Face model'),
    ("data", str, str(DATA / "multi_domain.jsonl"), "JSONL file, folder of data/prepare.py, or "
     "a list of such: 0.7:A,0.3:B with their shares of the rows"),
    ("recipe", tuple(recipes.RECIPES), None, "the paper's settings; a flag given beside it wins"),
    ("rank", int, 2, "r, components per shard and weight"),
    ("shards", int, 8, "K, over all processes; a multiple of their number"),
    ("lr", float, None, f"peak learning rate, for this --aggregate; embedded model: {LR}"),
    ("max_steps", int, None, f"optimizer steps; None: --epochs decides, else {STEPS}"),
    ("epochs", float, None, "passes over the data where --max_steps is not given; None = off"),
    ("batch_size", int, 64, "rows a step over all shards, a multiple of --shards"),
    ("device", ("auto", "cpu", "cuda"), "auto", "auto: a GPU for each process, or else CPUs"),
    ("out", str, None, "directory for the results; None: out/ and the --method"),
    "more: data and evaluation",
    ("tokenizer", str, None, "of the small GPT: a tiktoken name or file of ranks; None: data/'s"),
    ("format", str, None, "of the rows of files; None: recognised from the first ones"),
    ("loss", ("all", "last"), "all", "answers of a conversation that are trained on"),
    ("block_size", int, None, "tokens a row, longer ones are cut; None: the context, at most 1024"),
    ("eval_data", str, None, "as --data; None: 5 percent of its rows, at most 500, by hash"),
    ("eval_rows", int, 500, "held-out rows, and rows of each --eval file, evaluated at most"),
    ("eval", str, None, "JSONL files, by commas, with answers to generate and score; None = off"),
    ("eval_every", int, 0, "steps between such evaluations; 0 = before and after training alone"),
    ("eval_tokens", int, 256, "tokens of a generated answer, at most half the context"),
    ("execute_generated_code", bool, False, "run what is generated for rows answered by tests"),
    "more: method",
    ("targets", str, "all-linear", "all-linear, or comma-separated suffixes of module names"),
    ("init", ("hd_pissa", "top", "lora", "random"), "hd_pissa", "appendix C; random: from a seed"),
    ("also", str, "", "modules trained whole beside the adapters: comma-separated names"),
    ("alpha", float, None, "the adapter is scaled by alpha / rank; None = off (scale 1)"),
    ("dropout", float, 0.0, "probability on the adapter's input, 0 = off"),
    ("aggregate", ("mean", "sum"), "mean", "mean: the paper; sum: its published code"),
    ("exchange", ("auto", "all_gather", "all_reduce"), "auto", "factors (all_gather) or dense dU"),
    ("basis", ("cached", "resend"), "cached", "all A_i, B_i kept, or sent at every merge"),
    ("gradients", ("local", "global"), "local", "of a shard: from its part of the batch or all"),
    ("export_lora", bool, False, "write OUT/lora too, a PEFT adapter (Hugging Face models)"),
    ("lora_rank", int, None, "its rank; None: 2 K r, which leaves out second-order terms alone"),
    "more: optimization",
    ("schedule", ("cosine", "linear", "constant"), "cosine", "after the warm-up"),
    ("warmup", float, 0.03, "steps if 1 or more, else a share of all steps; 0 = off"),
    ("micro_batch_size", int, 32, "rows a forward, at most"),
    ("max_grad_norm", float, 0.0, "joint 2-norm over all shards, 0 = off"),
    ("seed", int, 0, "of row order and random draws"),
    ("skip_nonfinite", int, 0, "steps with a NaN or Inf that are dropped before it is an error"),
    "more: machine",
    ("dtype", ("float32", "bfloat16", "autocast", "float64"), "float32", "of the weights (paper: "
     "float32); bfloat16 keeps 16 more bits beside each; autocast: bfloat16 matmuls alone"),
    ("rounding", ("exact", "stochastic"), "exact", "of bfloat16 W: 16 more bits, or at random"),
    ("shard_weights", bool, False, "cut W over the processes by FSDP2; off: each holds all of it"),
    ("svd_cache", str, None, "directory that keeps decompositions for later runs; None = off"),
    ("bucket_mb", int, 256, "MiB of gathered factors per collective"),
    ("threads", int, None, "CPU threads a process; None: OMP_NUM_THREADS, else 1 for the small "
     "GPT, else the CPUs that may be used / local processes"),
    ("dry_run", bool, False, "print memory, traffic and work of this command, and stop"),
    "more: going on after a stop",
    ("resume", str, "auto", "auto: go on from the newest checkpoint in --out; never; or a path"),
    ("save_every", int, 0, "steps between checkpoints; 0 = off"),
    ("save_minutes", float, 15.0, "minutes between checkpoints; 0 = off (but for one at the end)"),
    ("keep", int, 2, "checkpoints that stay, so that one may be damaged"),
    ("check_every", int, 100, "steps between comparisons of W's bits over the processes; 0 = off"),
    ("timeout", float, 600.0, "seconds that a collective waits for the other processes"),
    ("heartbeat", float, 60.0, "seconds without a step until a process says so; 0 = off"),
)
ABOVE_ZERO = ("rank", "shards", "batch_size", "micro_batch_size", "eval_rows", "max_steps",
              "epochs", "eval_tokens", "block_size", "lora_rank", "threads", "timeout", "lr",
              "alpha", "keep")
ZERO_OR_MORE = ("warmup", "max_grad_norm", "seed", "bucket_mb", "save_every", "save_minutes",
                "check_every", "eval_every", "heartbeat", "skip_nonfinite")
MOST = {"lr": 1e3, "threads": 1024, "epochs": 1e6}                      # else 1e9
HD_PISSA = "init aggregate exchange basis gradients svd_cache shard_weights rounding also".split()


class OneLineErrors(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def parse(argv) -> argparse.Namespace:
    """The flags of the command line, checked as far as that needs neither model nor data."""
    p = OneLineErrors(prog="train.py", usage="train.py [--FLAG VALUE ...]",
                      description=__doc__.split("\n")[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for flag in FLAGS:
        if isinstance(flag, str):
            group = p.add_argument_group(flag)
            continue
        name, kind, default, text = flag
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        how = {"action": "store_true"} if kind is bool else {"default": default, **how}
        group.add_argument(f"--{name}", help=text, **how)
    args = recipes.parse(p, argv)
    for names, least in ((ABOVE_ZERO, "above 0"), (ZERO_OR_MORE, "0 or more")):
        for name in names:
            value, most = getattr(args, name), MOST.get(name, 1e9)
            if value is None or 0 < value <= most or value == 0 and names is ZERO_OR_MORE:
                continue
            p.error(f"--{name} {value}: must be a number {least} and at most {most:g}")
    if args.batch_size % args.shards:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --shards {args.shards}; use "
                f"--batch_size {max(1, args.batch_size // args.shards) * args.shards}")
    own = [name for name in HD_PISSA if getattr(args, name) != p.get_default(name)]
    own += ["dtype"] if args.dtype == "bfloat16" else []
    if args.method != "hd_pissa" and own:
        p.error(f"--method {args.method} with --{own[0]} {getattr(args, own[0])}: only hd_pissa "
                "knows that; leave it out")
    if args.lora_rank and not args.export_lora:
        p.error(f"--lora_rank {args.lora_rank} without --export_lora: give both, or none")
    if args.export_lora and (args.method != "hd_pissa" or models.is_small(args.model)):
        p.error(f"--export_lora with --method {args.method} --model {args.model}: it writes what "
                "hd_pissa did to a Hugging Face model; leave it out")
    if args.export_lora and not importlib.util.find_spec("peft"):
        p.error("--export_lora needs peft: pip install -r requirements-extra.txt")
    if args.lora_rank and args.lora_rank > 2 * args.shards * args.rank:
        p.error(f"--lora_rank {args.lora_rank}: dW has rank 2 K r = {2 * args.shards * args.rank} "
                "but for its second-order terms; use that or less")
    if args.lr is None and args.model != str(DATA / "base.pt"):
        p.error("--lr: give the peak learning rate for this --model (the paper, with mean: 2e-5 "
                "for LLaMA)")
    if args.lr is None:     # a sum steps K times as far as a mean
        args.lr = LR[args.method] / (args.shards if args.aggregate == "sum" else 1)
    for name in ("targets", "also"):
        parts = [part.strip() for part in getattr(args, name).split(",") if part.strip()]
        setattr(args, name, "all-linear" if parts == ["all-linear"] else parts)
    args.out = f"out/{args.method}" if args.out is None else args.out
    return args

# ---- Model: nanoGPT's shape, pre-norm, learned positions, tied head, no biases -------------------

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
        b, t, c = x.shape                                              # batch, tokens, width
        qkv = self.c_attn(self.ln_1(x)).view(b, t, 3, self.heads, -1)  # (b, t, 3, heads, c/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # each (b, heads, t, c/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)    # (b, heads, t, c/heads)
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


def load_small(path: str) -> GPT:
    """The small GPT in a .pt file that an earlier run has written."""
    state = models.read_state(path)
    with models.one_line(f"--model {path}", "give a model.pt that train.py has written"):
        return GPT.from_state_dict(state)


def load_model(name: str, seed: int, weights: bool = True, tokenizer: str | None = None):
    """(float32 model, its tokenizer, context) of "scratch", a .pt file or a Hugging Face name."""
    if not models.is_small(name):
        return models.hugging_face(name, weights, tokenizer)
    tokenizer = GPTTokenizer(tokenizer)
    model = GPT(tokenizer.vocabulary, seed=seed) if name == "scratch" else load_small(name)
    if model.wte.weight.shape[0] != tokenizer.vocabulary:
        raise ValueError(
            f"--model {name} has {model.wte.weight.shape[0]} embeddings, the tokenizer "
            f"{tokenizer.vocabulary} tokens; give the --tokenizer that its config.json names")
    return model, tokenizer, model.wpe.weight.shape[0]


def attach(args, model, device, resumed: bool):
    """The adapters of --method; from here on the model has its final dtype and place."""
    if args.method == "hd_pissa":
        decompose = hd_pissa_extra.components
        decompose = cached_components(args.svd_cache) if args.svd_cache else decompose
        adapters = hd_pissa_extra.attach(
            model, args.rank, shards=args.shards, targets=args.targets, also=args.also,
            alpha=args.alpha, init=args.init, dropout=args.dropout, rounding=args.rounding,
            aggregate=args.aggregate, exchange=args.exchange, basis=args.basis,
            gradients=args.gradients, seed=args.seed, bucket_mb=args.bucket_mb, device=device,
            dtype=torch.bfloat16 if args.dtype == "bfloat16" else None, progress=True,
            decompose=None if resumed else decompose, accumulate=args.export_lora)
    else:
        adapters = Baseline(model, args.method, args.rank, args.shards, args.targets, args.alpha,
                            args.seed, args.dropout)
    if args.dtype == "bfloat16":
        for p in model.parameters():    # but no buffers: rotary frequencies stay float32
            p.data = p.data.bfloat16()
    if args.shard_weights:
        hd_pissa_extra.shard_over_processes(model, device)
    return adapters

# ---- Data ----------------------------------------------------------------------------------------

def read_data(args, tokenizer, context: int):
    """(rows to train on, held-out rows, their hash); --max_steps is settled by their number."""
    block_size = min(args.block_size or min(context, 1024), context)
    told = {}
    rows, held, rows_hash = everywhere(lambda: load(
        args.data, args.eval_data, args.eval_rows, tokenizer, block_size, format=args.format,
        loss=args.loss, report=told, progress=hd_pissa.process_index() == 0))
    enough(args, rows, held)
    say(f"{table(told)}\nfirst row, + before what is trained:\n{preview(rows[0], tokenizer)}")
    if args.max_steps is None:
        epochs = args.epochs and max(1, round(args.epochs * (len(rows) // args.batch_size)))
        args.max_steps = epochs or STEPS
    return rows, held, rows_hash

# ---- Loop ----------------------------------------------------------------------------------------

def fit(args, config, model, adapters, optimizer, rows, start, extra, device, examine) -> None:
    """Train from step `start`: log lines, checkpoints; a signal ends it when a step has ended."""
    out, saved = Path(args.out), time.monotonic()
    batches = step_batches(rows, args.batch_size, args.seed, start)
    with (processes.signals_kept() as caught,
          processes.heartbeat(args.heartbeat, args.timeout) as beat):
        for record in hd_pissa.train(
                model, adapters, batches, lr=args.lr, max_steps=args.max_steps, start=start,
                warmup=args.warmup, schedule=args.schedule, max_grad_norm=args.max_grad_norm,
                micro_batch_size=args.micro_batch_size, autocast=args.dtype == "autocast",
                optimizer=optimizer, skip_nonfinite=args.skip_nonfinite, device=device):
            step = record["step"]
            beat(step)
            record["applied"] = float(adapters.applied)
            unwritten = folder.append_log(out / "log.jsonl", record, config)
            # A signal that one process has caught, clock and log of process 0: they concern all.
            own = [max(caught, default=0), time.monotonic() - saved, unwritten is not None]
            own = torch.tensor([own], dtype=torch.float64, device=device)
            signals, waited, failed = hd_pissa.gather_shards(own).T.tolist()
            if any(failed):
                raise ValueError(hd_pissa.everywhere(str(unwritten or "").strip)[0])
            if args.check_every and step % args.check_every == 0:
                checkpoint.check_replicas(adapters, device)
            if args.eval_every and step % args.eval_every == 0 and step < args.max_steps:
                examine(model, step, lambda step=step: beat(step))
            due = (step == args.max_steps or args.save_every and step % args.save_every == 0
                   or args.save_minutes and waited[0] >= 60 * args.save_minutes)
            stopped = int(max(signals)) if step < args.max_steps else 0
            if due or stopped:
                checkpoint.save(out / "checkpoint", step, model, adapters, optimizer, config,
                                extra | {"stopped": stopped}, device, args.keep)
                saved = time.monotonic()
            if stopped:
                raise Stopped(stopped, f"after step {step}, which is saved; the same command "
                              "continues")

# ---- Result --------------------------------------------------------------------------------------

def finish(args, model, tokenizer, adapters, held, watched, extra, device, examine) -> dict:
    """Take the adapters off, evaluate the plain model, write it all, and then print it."""
    out, lows = Path(args.out), {slot.name: slot.low for slot in adapters.slots}
    adapters.detach_()
    after = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate result")
    exams = examine(model, args.max_steps)
    if args.shard_weights:
        model.reshard()
    trained = {name: hd_pissa_extra.whole(model.get_parameter(name + ".weight"), lows.get(name))
               for name in watched}
    ranks, spectra = report.rank_of_update(args, watched, trained)
    result = {"before": extra["before"], "after": after, "effective_rank": ranks, "eval": exams}
    if args.export_lora:
        result["lora_error"] = models.export(args, adapters, extra["base"], out, load_model)
    first = hd_pissa.process_index() == 0
    everywhere(lambda: first and folder.write(out / "spectra.json", json.dumps(spectra)))
    save(out, model, tokenizer, result)
    report.report_losses(extra["before"], after)
    report.report_rank(args, ranks)
    report.report_files(out, isinstance(model, GPT))
    return result


def save(out: Path, model, tokenizer, result: dict) -> None:
    """The model as plain files, the report, and last result.json, which says that all is there."""
    state = models.whole_state(model)

    def write():
        if hd_pissa.process_index() > 0:
            return
        if isinstance(model, GPT):
            folder.put(out / "model.pt", lambda unfinished: torch.save(state, unfinished))
            files = {"model.pt": (out / "model.pt").stat().st_size}
        else:
            files = models.save_folder(out, model, tokenizer, state)
        report.report_page(out, result)
        folder.write(out / "result.json", json.dumps(result | {"files": files}, indent=1) + "\n")

    everywhere(write)

# ---- The run, stage by stage ---------------------------------------------------------------------

def run(args) -> dict:
    threads = processes.cpu_threads(args.threads, models.is_small(args.model))
    device = processes.start_processes(args.device, threads, args.timeout)
    recipes.begin(args, load_model)
    if args.dry_run:
        return dry_run(args, load_model, STEPS)
    with processes.stoppable(), folder.alone(Path(args.out)):
        folder.check_ours(Path(args.out), args.model)
        return run_in_folder(args, Path(args.out), device)


def run_in_folder(args, out: Path, device) -> dict:
    model, tokenizer, context = everywhere(
        lambda: load_model(args.model, args.seed, True, args.tokenizer))
    everywhere(lambda: models.check_savable(model, tokenizer))
    examine = examiner(args, tokenizer, context, device)
    model = model.double() if args.dtype == "float64" else model
    model = model if args.shard_weights else model.to(device)
    rows, held, rows_hash = read_data(args, tokenizer, context)
    config = vars(args) | {"processes": hd_pissa.world_size(), "torch": torch.__version__,
                           "rows": rows_hash, "weights": checkpoint.weights_of(model)}
    resumed = checkpoint.look(args.resume, out, config)                 # (path, manifest) or None
    if result := checkpoint.finished(args.resume, out, resumed, config):
        return result
    least = args.rank * (args.shards if args.method == "hd_pissa" and args.init != "top" else 1)
    beside = everywhere(lambda: hd_pissa_extra.also_parameters(model, args.also))
    layers = [(name, module) for name, module in hd_pissa.find_layers(
        model, args.targets, least=least)[0] if name + ".weight" not in beside]
    folder.check_room(out, *checkpoint.bytes_of(args, model, layers), args.keep, not resumed)

    start_of = {name: module.weight.detach() for name, module in layers}
    watched = {name: start_of[name].to(device, copy=True) for name in report.sampled([*start_of])}
    sums = {name: hd_pissa.checksum(W) for name, W in start_of.items() if args.export_lora}
    comparable = args.method == "hd_pissa" and args.dtype != "bfloat16" and not args.shard_weights
    logits = first_logits(model, held, device) if comparable and not resumed else None
    adapters = attach(args, model, device, bool(resumed))
    report.report_layers(args, adapters, [*start_of])
    optimizer = torch.optim.AdamW(adapters.parameters(), args.lr, weight_decay=0.0, foreach=True)
    if resumed:
        start, extra = checkpoint.go_on(*resumed, model, adapters, optimizer, config, device)
    else:
        before = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate base")
        start, extra = 0, {"before": before, "base": sums}
        if logits is not None:
            if not torch.equal(first_logits(model, held, device), logits):
                raise RuntimeError("step-0 logits differ from the base model's: not Y = X W")
            loss = before["all"]["loss"]
            say(f"step-0 loss {loss:.6f}: logits equal the base model's bit for bit")

    say(f"{args.method}: {args.max_steps} steps of {args.batch_size} rows, peak lr {args.lr:g}"
        + (f" (for aggregate={args.aggregate})" if args.method == "hd_pissa" else ""))
    everywhere(lambda: folder.begin(out, config, start))
    if not start:
        examine(model, 0)
    fit(args, config, model, adapters, optimizer, rows, start, extra, device, examine)
    return finish(args, model, tokenizer, adapters, held, watched, extra, device, examine)


def main(argv=None) -> dict:
    """Run a command line; one sentence and exit status 2 for what the user can put right."""
    for stream in (sys.stdout, sys.stderr):     # what a terminal cannot show ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        return run(args)
    except Stopped as e:
        say(f"stopped by {signal.Signals(e.number).name} {e.where}")
        raise SystemExit(128 + e.number) from None
    except (ValueError, OSError, Lost) as e:
        fail(" ".join(str(e).split()))
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        fail(f"a collective failed: {' '.join(str(e).split())}. Another process has died or the "
             "network is cut; the same command continues from the last checkpoint")


if __name__ == "__main__":
    main()
    # On success alone: after an error of one process NCCL would wait here for the others, and the
    # error's traceback would come after --timeout.
    if dist.is_initialized():
        dist.destroy_process_group()
