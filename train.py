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
import base64
import contextlib
import datetime
import json
import math
import os
import sys
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import hd_pissa
from data.evaluate import evaluate
from data.prepare import encode, hold_out, read_rows, step_batches
from data.svd_cache import cached_components
from hd_pissa import everywhere, say

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


# ---- Models and tokenizers ---------------------------------------------------------------------------------


class GPTTokenizer:
    """The byte-pair ranks of data/ as a tiktoken Encoding, with a plain question and answer prompt."""

    def __init__(self, path=DATA / "tokenizer.tiktoken"):
        ranks = {}
        for line in Path(path).read_bytes().splitlines():
            token, index = line.split()
            ranks[base64.b64decode(token)] = int(index)
        pattern = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        self.eot = len(ranks)
        self.encoding = tiktoken.Encoding("hd_pissa", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={"<|endoftext|>": self.eot})
        self.vocabulary = self.eot + 1

    def prompt(self, instruction: str) -> list[int]:
        return self.encoding.encode_ordinary(f"Q: {instruction}\nA:")

    def response(self, response: str) -> list[int]:
        return self.encoding.encode_ordinary(" " + response) + [self.eot]


class HFTokenizer:
    """A Hugging Face tokenizer with its chat template, or the Alpaca prompt where it has none."""

    def __init__(self, path: str):
        from transformers import AutoTokenizer
        self.hf = AutoTokenizer.from_pretrained(path)
        if self.hf.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no eos token, so no response would ever end")

    def prompt(self, instruction: str) -> list[int]:
        if self.hf.chat_template:
            chat = [{"role": "user", "content": instruction}]
            text = self.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return self.hf(text, add_special_tokens=False)["input_ids"]
        text = ("Below is an instruction that describes a task. Write a response that appropriately "
                f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")
        return self.hf(text)["input_ids"]

    def response(self, response: str) -> list[int]:
        return self.hf(response, add_special_tokens=False)["input_ids"] + [self.hf.eos_token_id]


def load_model(name: str, seed: int, weights: bool = True) -> tuple[nn.Module, object, int]:
    """(float32 model, tokenizer, context length) of "scratch", a .pt file or a Hugging Face name."""
    if name == "scratch" or name.endswith(".pt"):
        tokenizer = GPTTokenizer()
        if name == "scratch":
            model = GPT(tokenizer.vocabulary, seed=seed)
        else:
            if not os.path.isfile(name):
                raise ValueError(f"--model {name}: no such file")
            model = GPT.from_state_dict(torch.load(name, map_location="cpu", weights_only=True))
        return model, tokenizer, model.wpe.weight.shape[0]
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError(f"--model {name} is not a .pt file, and Hugging Face models need transformers: "
                         "pip install -r requirements-extra.txt") from None
    if not os.path.isdir(name) and (name.startswith((".", "/")) or name.count("/") > 1):
        raise ValueError(f"--model {name}: no such directory")
    tokenizer = HFTokenizer(name)
    if weights:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
    return model, tokenizer, getattr(model.config, "max_position_embeddings", 1 << 20)


# ---- Baselines: data-parallel LoRA, PiSSA and full fine-tuning, with the interface of hd_pissa.Adapters ----


class Baseline:
    """One adapter per weight, or all weights, trained on the whole step batch: processes average gradients.

        lora, pissa     Y = X W_res + s (X A) B,  A (m, r), B (r, n) trained    (W_res = W, or W - s A B)
    """

    whole_batch, applied = True, 1.0

    def __init__(self, model, method: str, rank: int, K: int, targets, alpha, seed: int):
        hd_pissa.check_arguments(rank, K, alpha, 0.0)
        self.K, self.S = K, K // hd_pissa.world_size()
        self.first = hd_pissa.rank() * self.S
        self.s, self.factors, self.slots, self.skipped = 1.0 if alpha is None else alpha / rank, [], [], {}
        model.requires_grad_(method == "full")
        if method == "full":
            self._parameters = list(model.parameters())
            return
        found, self.skipped = hd_pissa.find_layers(model, targets)
        hd_pissa.check_layers(found, self.skipped, rank, 1, targets)
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
                return output + self.s * (inputs[0] @ A) @ B

            self.factors.append((W, A, B, module.register_forward_hook(residual)))
        self._parameters = [p for _, A, B, _ in self.factors for p in (A, B)]

    def parameters(self):
        return self._parameters

    def shard(self, i):
        return contextlib.nullcontext()         # one adapter, whichever rows come

    def check(self, optimizer):
        """Any optimizer works on plain parameters."""

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Sum the gradients over the processes, then clip: the first moment they must be whole."""
        if hd_pissa.world_size() > 1:
            for p in self._parameters:
                dist.all_reduce(p.grad)
        return nn.utils.clip_grad_norm_(self._parameters, max_norm)

    def merge_(self):
        """The optimizer has already changed what is trained."""

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
        ("model", str, str(DATA / "base.pt"), '.pt file of the small GPT, "scratch", or a Hugging Face name'),
        ("data", str, str(DATA / "multi_domain.jsonl"), "JSONL file, one row a line"),
        ("eval_data", str, None, "JSONL file; None: 5 percent of the rows of --data, at most 500, by hash"),
        ("eval_rows", int, 500, "held-out rows that are evaluated at most"),
        ("out", str, "out", "directory for the results"),
    ),
    "method": (
        ("method", ("hd_pissa", "pissa", "lora", "full"), "hd_pissa", "what is trained"),
        ("rank", int, 2, "r, components per shard and weight"),
        ("shards", int, 8, "K, over all processes; a multiple of their number"),
        ("targets", str, "all-linear", "all-linear, or comma-separated suffixes of module names"),
        ("init", ("hd_pissa", "top", "lora"), "hd_pissa", "factors of the shards (appendix C)"),
        ("alpha", float, None, "the adapter is scaled by alpha / rank; None = off (scale 1)"),
        ("dropout", float, 0.0, "probability on the adapter's input, 0 = off"),
        ("aggregate", ("mean", "sum"), "mean", "mean: the paper; sum: its published code"),
        ("exchange", ("auto", "all_gather", "all_reduce"), "auto", "factors (all_gather) or dense dU"),
        ("basis", ("cached", "resend"), "cached", "A_i, B_i of all shards kept, or sent at every merge"),
        ("gradients", ("local", "global"), "local", "of a shard, from its mini-batch or the whole batch"),
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
    ),
}


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
    args = p.parse_args(argv)
    for name in ("rank", "shards", "batch_size", "micro_batch_size", "eval_rows", "max_steps", "epochs",
                 "block_size", "threads", "timeout", "bucket_mb", "lr", "warmup", "max_grad_norm", "seed"):
        value, zero = getattr(args, name), name in ("warmup", "max_grad_norm", "seed", "bucket_mb")
        if value is not None and not (0 <= value if zero else 0 < value) or value in (math.inf, math.nan):
            p.error(f"--{name} {value}: must be a finite number, " + ("0 or more" if zero else "above 0"))
    if args.batch_size % args.shards:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --shards {args.shards}; use "
                f"--batch_size {max(1, args.batch_size // args.shards) * args.shards}")
    if args.method != "hd_pissa" and (args.shard_weights or args.dtype == "bfloat16"):
        p.error(f"--method {args.method} with --shard_weights or --dtype bfloat16: only hd_pissa adds its "
                "updates to sharded or halved weights; leave the flag out")
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
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=args.timeout))
    return device


def shard_over_processes(model: nn.Module, device: torch.device) -> None:
    """FSDP2 over all processes: one unit for each block of layers, one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if hd_pissa.world_size() == 1:
        raise ValueError("--shard_weights needs several processes; start them with torchrun")
    mesh = init_device_mesh(device.type, (hd_pissa.world_size(),))
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(weight: torch.Tensor, low: torch.Tensor | None = None) -> torch.Tensor:
    """A weight as one plain tensor on every process, with its low half if it has one."""
    local = weight.detach()
    if hasattr(weight, "to_local"):
        local = local.to_local()
    local = local if low is None else hd_pissa.join(local, low)
    if not hasattr(weight, "to_local"):
        return local
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(local, weight.device_mesh, weight.placements, shape=weight.shape,
                              stride=weight.stride()).full_tensor()


def run(args) -> dict:
    device = start_processes(args)
    if args.dry_run:
        from data.dry_run import dry_run
        return dry_run(args, load_model, STEPS)
    model, tokenizer, context = everywhere(lambda: load_model(args.model, args.seed))
    model = model.double() if args.dtype == "float64" else model
    model = model if args.shard_weights else model.to(device)
    block_size = min(args.block_size or min(context, 1024), context)
    rows = everywhere(lambda: read_rows(args.data))
    rows, held = (rows, everywhere(lambda: read_rows(args.eval_data))) if args.eval_data else hold_out(rows)
    rows = encode(rows, tokenizer, block_size, "train")
    held = encode(held[:args.eval_rows], tokenizer, block_size, "held out")
    if len(rows) < args.batch_size or not held:
        raise ValueError(f"{args.data}: {len(rows)} rows to train on, {len(held)} held out: too few for "
                         f"--batch_size {args.batch_size}; give more rows or a larger --block_size")
    if args.max_steps is None:
        args.max_steps = max(1, round(args.epochs * (len(rows) // args.batch_size))) if args.epochs else STEPS
    probe, _ = hd_pissa.pad([row[:2] for row in held[:8]], model.get_input_embeddings().weight.device
                            if hasattr(model, "get_input_embeddings") else device)
    base_logits = None
    if args.dtype != "bfloat16" and not args.shard_weights:
        with torch.no_grad():
            base_logits = hd_pissa.logits_of(model.eval(), probe)
    names = [name for name, _ in hd_pissa.find_layers(model, args.targets)[0]]
    # Rank of dW: a copy of up to 8 weights, evenly spaced over the model, taken before anything moves.
    watched = {name: model.get_parameter(name + ".weight").detach().to(device, copy=True)
               for name in names[::max(1, len(names) // 8)][:8]}
    if args.method == "hd_pissa":
        adapters = hd_pissa.attach(
            model, args.rank, shards=args.shards, targets=args.targets, init=args.init, alpha=args.alpha,
            dropout=args.dropout, aggregate=args.aggregate, exchange=args.exchange, basis=args.basis,
            gradients=args.gradients, seed=args.seed, bucket_mb=args.bucket_mb, device=device,
            dtype=torch.bfloat16 if args.dtype == "bfloat16" else None, progress=True,
            decompose=cached_components(args.svd_cache) if args.svd_cache else hd_pissa.components)
    else:
        adapters = Baseline(model, args.method, args.rank, args.shards, args.targets, args.alpha, args.seed)
    model = model.bfloat16() if args.dtype == "bfloat16" else model
    if args.shard_weights:
        shard_over_processes(model, device)
    report_layers(args, adapters, names)
    before = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate base")
    if args.method == "hd_pissa" and base_logits is not None:
        with torch.no_grad():
            same = torch.equal(hd_pissa.logits_of(model.eval(), probe), base_logits)
        if not same:
            raise RuntimeError("step-0 logits differ from the base model's: the forward is not X W")
        say(f"step-0 loss {before['all']['loss']:.6f}: logits equal the base model's bit for bit")

    out = Path(args.out)
    config = vars(args) | {"processes": hd_pissa.world_size(), "torch": torch.__version__}
    if hd_pissa.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (out / "log.jsonl").write_text("")
    belongs = f" (for aggregate={args.aggregate})" if args.method == "hd_pissa" else ""
    say(f"{args.method}: {args.max_steps} steps of {args.batch_size} rows, peak lr {args.lr:g}{belongs}")
    batches = step_batches(rows, args.batch_size, args.seed)
    for record in hd_pissa.train(model, adapters, batches, lr=args.lr, max_steps=args.max_steps,
                                 warmup=args.warmup, schedule=args.schedule, max_grad_norm=args.max_grad_norm,
                                 micro_batch_size=args.micro_batch_size, device=device,
                                 autocast=args.dtype == "autocast"):
        if hd_pissa.rank() == 0:
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
    lows = {slot.name: slot.low for slot in adapters.slots}
    adapters.detach_()
    after = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate result")
    if args.shard_weights:
        model.reshard()
    report_losses(before, after)
    spectra = report_rank(args, watched, model, lows)
    result = {"before": before, "after": after, "effective_rank": spectra}
    save(out, model, tokenizer, result)
    return result


def report_layers(args, adapters, names) -> None:
    kinds: dict[str, int] = {}
    for name in names:
        kinds[name.split(".")[-1]] = kinds.get(name.split(".")[-1], 0) + 1
    trained = "all weights" if args.method == "full" else ", ".join(f"{k} x{v}" for k, v in kinds.items())
    numbers = sum(p.numel() for p in adapters.parameters())
    say(f"trained: {trained}; {numbers:,} numbers with AdamW moments in this process")
    for name, why in adapters.skipped.items():
        say(f"skipped: {name} ({why})")


def report_losses(before, after) -> None:
    say(f"\n{'held out':14} {'rows':>5} {'loss before':>12} {'after':>8} {'exact match, before':>19} "
        f"{'after':>8}")
    for domain, a in before.items():
        b = after[domain]
        say(f"{domain:14} {a['rows']:5} {a['loss']:12.4f} {b['loss']:8.4f} {a['exact_match']:17.1f} % "
            f"{b['exact_match']:6.1f} %")


@torch.no_grad()
def rounding_floor(W: torch.Tensor, steps: int) -> float:
    """Largest singular value that rounding alone puts into W in `steps` in-place additions, estimated.

    One addition errs uniformly by up to half an ulp: deviation ulp / sqrt(12) an entry. A random (m, n)
    matrix of that deviation has norm (sqrt(m) + sqrt(n)) times it, and independent steps add in square.
    """
    ulp = torch.finfo(W.dtype).eps * torch.exp2(torch.frexp(W.double()).exponent - 1.0)
    return float(ulp.square().mean().sqrt() * math.sqrt(steps / 12) * sum(math.sqrt(d) for d in W.shape))


def report_rank(args, watched, model, lows) -> dict:
    """Print and return the rank of dW for the `watched` weights: {name: W before}."""
    K, r, table = args.shards, args.rank, {}
    edge = {"lora": r, "pissa": 2 * r, "hd_pissa": 2 * K * r}.get(args.method)
    say("\neffective rank of dW: singular values above 1 % of the largest "
        f"(LoRA {r}, PiSSA {2 * r}, HD-PiSSA about 2Kr = {2 * K * r})")
    for name, W in watched.items():
        after = whole(model.get_parameter(name + ".weight"), lows.get(name))
        S = hd_pissa.update_spectrum(W, after)
        floor = rounding_floor(after, args.max_steps) / float(S[0] or 1)
        table[name] = {"effective_rank": hd_pissa.effective_rank(S), "of": len(S), "rounding_floor": floor}
        text = f"  {name:34} {table[name]['effective_rank']:4} of {len(S)}"
        if edge is not None and edge < len(S) and S[0] > 0:
            table[name]["beyond_edge"] = float(S[edge] / S[0])
            text += f", sigma_{edge + 1}/sigma_1 = {float(S[edge] / S[0]):.1e} (rounding alone: {floor:.0e})"
        say(text)
    return table


def save(out: Path, model, tokenizer, result) -> None:
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if hd_pissa.rank() == 0:
        if isinstance(model, GPT):
            torch.save(state, out / "model.pt.tmp")
            os.replace(out / "model.pt.tmp", out / "model.pt")
            how = f"train.GPT.from_state_dict(torch.load({str(out / 'model.pt')!r}, weights_only=True))"
        else:
            model.save_pretrained(out / "model", state_dict=state)
            tokenizer.hf.save_pretrained(out / "model")
            how = f"transformers.AutoModelForCausalLM.from_pretrained({str(out / 'model')!r})"
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        say(f"\nthe result is a plain model under the base model's names:\n  {how}")
    if hd_pissa.world_size() > 1:
        dist.barrier()


def main(argv=None) -> dict:
    """Run a command line; exit status 2 and one sentence on stderr for what the user can put right."""
    args, parser = parse(sys.argv[1:] if argv is None else argv)
    try:
        return run(args)
    except (ValueError, OSError) as e:
        parser.error(" ".join(str(e).split()))


if __name__ == "__main__":
    try:
        main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
