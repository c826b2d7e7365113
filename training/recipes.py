"""Presets of train.py, the paper's and the best that were measured: --recipe NAME; a flag beside it wins.

What the tables leave open stays at train.py's default: tokens a row, AdamW's betas and epsilon, no clipping.
"""

import json
import os

import torch

import hd_pissa
import hd_pissa_extra
from training import models
from training.processes import everywhere, say
from training.report import kind_of

LLAMA, MISTRAL = 2e-5, 5e-6         # table 4: the learning rate by the base model

# Table 4 with K = 8. "LoRA alpha equal to LoRA rank" is a scale of 1 at every r, which None says.
TABLE_4 = dict(method="hd_pissa", rank=16, shards=8, targets="all-linear", init="hd_pissa", alpha=None,
               dropout=0.0, aggregate="mean", gradients="local", schedule="cosine", warmup=0.03, epochs=1.0,
               batch_size=128, max_grad_norm=0.0, dtype="float32")
TABLE_5 = TABLE_4 | dict(rank=32, alpha=64.0, dropout=0.05, schedule="linear", warmup=100.0, batch_size=16,
                         targets="q_proj,k_proj,v_proj,up_proj,down_proj")
# name: settings, the set that the paper trains on, where they stand and what is to be said of them
RECIPES = {
    "paper-math": (TABLE_4, "metamathqa", "table 4"),
    "paper-code": (TABLE_4, "codefeedback", "table 4"),
    "paper-commonsense": (TABLE_5, "commonsense",
                          "table 5, with its 1 epoch. Section 5.2 says three: --epochs 3"),
    "paper-code-ablation": (TABLE_4 | dict(epochs=3.0), "codefeedback",
                            "table 4 with the 3 epochs of section 5.3 and appendix C, whose variants are "
                            "--shards 2 and 4, --init lora and top. Table 7 ends at step 2323: that is 3 "
                            "epochs of some 99K rows, fewer than table 6 counts"),
    "paper-multitask": (TABLE_4 | dict(rank=128), "multitask", "section 5.2, the rest as in table 4"),
}

# What was measured to be best (tutorial/results), each with its reason. Rates are every model's own: this one
# is the embedded model's.
BEST = {
    "gradients": ("global", "every shard learns from the whole batch: the largest gain of what was tried"),
    "aggregate": ("sum", "the K shards then take the step of one of rank K r"),
    "init": ("random", "a basis from the seed: nothing to decompose, to keep or to send"),
}
BEST_LR = 8e-3


def family(model: str) -> str:
    """The kind of model that its config.json names; for a hub id, its name."""
    try:
        with open(os.path.join(model, "config.json")) as file:
            return str(json.load(file)["model_type"]).lower()
    except (OSError, ValueError, KeyError, TypeError):
        return os.path.basename(model).lower()


def settings(args) -> dict:
    """The recipe's value of every flag that it sets, for this --model, --aggregate and --shards.

    The table's lr belongs to the mean over shards. A sum steps K times as far, so it gets lr / K.
    """
    if args.recipe == "best":
        values = {"method": "hd_pissa", **{flag: value for flag, (value, _) in BEST.items()}}
        return values | ({"lr": BEST_LR} if models.is_small(args.model) else {})
    values = RECIPES[args.recipe][0] | {"lr": MISTRAL if "mistral" in family(args.model) else LLAMA}
    if args.aggregate == "sum":
        values["lr"] /= args.shards
    return values


def parse(parser, argv):
    """`argv` parsed, with the recipe's values as defaults of the flags that it sets."""
    args = parser.parse_args(argv)
    if args.recipe:
        parser.set_defaults(**{flag: value for flag, value in settings(args).items() if flag != "lr"})
        parser.set_defaults(**settings(parser.parse_args(argv)))
        args = parser.parse_args(argv)
    return args


def report(args) -> None:
    """Print what the recipe resolved to, what the command line has changed, and what lr belongs to."""
    values = settings(args)
    if args.recipe == "best":
        say("--recipe best: what was measured to be best on the embedded model; not the paper's")
        for flag, (value, why) in BEST.items():
            say(f"  --{flag} {value}: {why}" if getattr(args, flag) == value else
                f"  --{flag} {getattr(args, flag)} (yours; the recipe: {value})")
        return
    _, data, source = RECIPES[args.recipe]
    say(f"--recipe {args.recipe}: {source}")
    for key, recipe in values.items():
        value = getattr(args, key)
        value = ",".join(value) if isinstance(value, list) else value
        say(f"  --{key} {value}" + ("" if value == recipe else f" (yours; the recipe: {recipe})"))
    scale = 1.0 if args.alpha is None else args.alpha / args.rank
    say(f"  alpha / r scales by {scale:g}. --lr {args.lr:g} belongs to --aggregate {args.aggregate}: the "
        f"paper takes the mean over shards; its code sums, which steps K = {args.shards} times as far")
    if not any(name in family(args.model) for name in ("llama", "mistral")):
        say(f"  the paper gives lr for LLaMA ({LLAMA:g}) and Mistral ({MISTRAL:g}), not for this --model")
    say(f"  --data {args.data}; the paper's: python data/prepare.py {data} --model {args.model}")


def check_fit(args, layers) -> None:
    """ValueError with the largest r of each kind of layer where K r exceeds min(m, n).

    layers      (name, module) pairs, as hd_pissa.find_layers gives them
    """
    K, largest = 1 if args.init == "top" else args.shards, {}
    for name, module in layers:
        kind, most = kind_of(name), min(module.weight.shape) // K
        largest[kind] = min(most, largest.get(kind, most))
    if args.method == "hd_pissa" and largest and args.rank > min(largest.values()):
        table = ", ".join(f"{kind} {most}" for most, kind in sorted((m, k) for k, m in largest.items()))
        raise ValueError(f"--recipe {args.recipe}: {K} shards of rank {args.rank} need {K * args.rank} "
                         f"components; the largest rank of each kind of layer is {table}. Use --rank "
                         f"{min(largest.values())}, fewer --shards, or --targets without the smallest")


def begin(args, load_model) -> None:
    """For a --recipe: report, then refuse what does not fit before a weight is read.

    load_model  train.py's
    """
    if not args.recipe:
        return
    report(args)

    def fits():
        with torch.device("cpu" if models.is_small(args.model) else "meta"):
            model = load_model(args.model, args.seed, False, args.tokenizer)[0]
        find = (hd_pissa_extra if args.method == "hd_pissa" else hd_pissa).find_layers      # also experts
        check_fit(args, find(model, args.targets)[0])

    everywhere(fits)
