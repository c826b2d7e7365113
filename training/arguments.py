"""The flags of train.py: what each is for, its default, and what no model could be trained with.

    python train.py @flags.txt --max_steps 100      # flags of a file, in lines; # begins a comment
"""

import argparse
import importlib.util
import shlex
from pathlib import Path

from training import folder, models, recipes
from training.processes import fail

DATA = Path(__file__).resolve().parent.parent / "data"

# Peak learning rates and steps for the embedded model and data, found as data/README.md says.
LR = {"hd_pissa": 2e-2, "pissa": 1.6e-2, "lora": 3.2e-2, "full": 4e-3}
STEPS = 400

# Titles of --help, and flags: name, type or choices, default, help with unit and "off" value.
FLAGS = (
    "every day",
    ("method", ("hd_pissa", "pissa", "lora", "full"), "hd_pissa", "what is trained"),
    ("model", str, str(DATA / "base.pt"),
     '.pt of the small GPT, "scratch", or a Hugging Face model'),
    ("data", str, str(DATA / "multi_domain.jsonl"), "file of rows (JSONL, JSON, CSV, Parquet), folder of "
     "datasets or data/prepare.py, or a list of such: 0.7:A,0.3:B with their shares of the rows"),
    ("recipe", (*recipes.RECIPES, "best"), None, "the paper's settings, or the best ones that were measured; "
     "a flag given beside it wins"),
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
    ("packing", bool, False, "rows of a shard one after the other in blocks of --block_size, where none "
     "sees another; --micro_batch_size then counts blocks"),
    ("block_size", int, None, "tokens a row, longer ones are cut; None: the context, at most 1024"),
    ("eval_data", str, None, "as --data; None: 5 percent of its rows, at most 500, by hash"),
    ("eval_rows", int, 500, "held-out rows, and rows of each --eval file, evaluated at most"),
    ("eval", str, None, "JSONL files, by commas, with answers to generate and score; None = off"),
    ("eval_every", int, 0, "steps between evaluations, of the held-out loss too: the best model of them "
     "stays in OUT/best; 0 = before and after training alone"),
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
    ("send", ("step", "backward"), "step", "global gradients: once a step, from K times the increments' "
     "memory; or by every backward"),
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
    ("gradient_checkpointing", bool, False, "compute activations anew in the backward: less memory, same "
     "bits"),
    ("dtype", ("float32", "bfloat16", "autocast", "tf32", "float64"), "float32", "of the weights (paper: "
     "float32); bfloat16 keeps 16 more bits beside each; autocast, tf32: float32, with the matmuls of a step "
     "in bfloat16, or on a GPU in TF32"),
    ("rounding", ("exact", "stochastic"), "exact", "of bfloat16 W: 16 more bits, or at random"),
    ("shard_weights", bool, False, "cut W over the processes by FSDP2; off: each holds all of it"),
    ("svd_cache", str, None, "directory that keeps decompositions for later runs; None = off"),
    ("bucket_mb", int, 256, "MiB of gathered factors per collective"),
    ("threads", int, None, "CPU threads a process; None: OMP_NUM_THREADS, else 1 for the small "
     "GPT, else the CPUs that may be used / local processes"),
    ("save_dtype", ("trained", "base", "float32", "bfloat16", "float16"), "trained", "of the saved model; "
     "base: what its config.json says"),
    ("log", ("tensorboard",), None, "beside log.jsonl, in OUT/tensorboard; None = off"),
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
HD_PISSA = "init aggregate exchange basis gradients send svd_cache shard_weights rounding also".split()


class OneLineErrors(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def expanded(argv) -> list[str]:
    """The command line with the flags of a file in place of @FILE."""
    flags = []
    for arg in argv:
        try:
            flags += shlex.split(folder.read(Path(arg[1:])), comments=True) if arg[:1] == "@" else [arg]
        except (OSError, ValueError) as e:
            fail(f"{arg}: not a file of flags as in a shell ({getattr(e, 'strerror', None) or e}); mend it, "
                 "or give the flags themselves")
    return flags


def parse(argv) -> argparse.Namespace:
    """The flags of a command line, checked as far as that needs neither model nor data."""
    p = OneLineErrors(prog="train.py", usage="train.py [--FLAG VALUE ...]",
                      description="Fine-tune a language model. @FILE stands for the flags in it.",
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for flag in FLAGS:
        if isinstance(flag, str):
            group = p.add_argument_group(flag)
            continue
        name, kind, default, text = flag
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        how = {"action": "store_true"} if kind is bool else {"default": default, **how}
        group.add_argument(f"--{name}", help=text, **how)
    args = recipes.parse(p, expanded(argv))
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
    if args.log and not importlib.util.find_spec(args.log):
        p.error(f"--log {args.log} needs {args.log}: pip install {args.log}; log.jsonl and report.html are "
                "written without")
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
