"""Cost of a training step against a frozen model, PEFT, the published forward and full fine-tuning.

    python tests/bench/step.py                     # 8 Llama layers of width 1024, 512 and 2048 tokens, CPU
    python tests/bench/step.py --device cuda --dtype bfloat16 --width 2048 --ffn 5632 --layers 22

"touch" is the frozen model with W += 0 after each backward: no method that adds to every W can cost less.
Variants alternate within one run, and the table gives medians and ratios of medians; peak memory is read in a
process of its own for each variant. Results are printed and written to step.json.

For all variants alike glibc keeps freed memory: by default it gives blocks back to the system and faults them
in again at every step, which costs more than what is compared here.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402


def llama(args) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=8192, hidden_size=args.width, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=4096,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.requires_grad_(False)
    # In every variant the layers below need gradients too, as in the middle of a deeper model.
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
    return model.to(args.device, getattr(torch, args.dtype))


class Published(nn.Module):
    """The forward as the published code writes it: the dense product of the factors, muted, in every call."""

    def __init__(self, linear: nn.Linear, r: int):
        super().__init__()
        self.linear = linear
        n, m = linear.weight.shape
        factors = hd_pissa.shard_factors(linear.weight.T, 1, r, "hd_pissa", 1.0, 0)[0].to(linear.weight)
        self.A = nn.Parameter(factors[: m * r].view(m, r).clone())
        self.B = nn.Parameter(factors[m * r :].view(r, n).clone())

    def forward(self, x):
        return self.linear(x) + 1e-16 * F.linear(x, (self.A @ self.B).T)


class Step:
    """One variant: forward, backward, and what its update consists of."""

    def __init__(self, variant: str, args):
        self.variant, self.model = variant, llama(args)
        self.adapters, parameters = None, []
        if variant.startswith("hd_pissa"):
            options = {"gradients": "global"} if "global" in variant else {}
            options |= {"init": "random"} if "seed" in variant else {}
            options |= {"rounding": "stochastic"} if "stochastic" in variant else {}
            self.adapters = hd_pissa_extra.attach(self.model, args.rank, shards=args.shards, **options)
            parameters = self.adapters.parameters()
        elif variant in ("lora", "pissa"):
            from peft import LoraConfig, get_peft_model

            init = {"lora": True, "pissa": "pissa_niter_4"}[variant]
            config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear",
                                init_lora_weights=init)
            self.model = get_peft_model(self.model, config)
            parameters = [p for p in self.model.parameters() if p.requires_grad]
        elif variant == "published":
            for module in list(self.model.model.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(module, name, Published(child, args.rank))
            parameters = [p for p in self.model.parameters() if p.requires_grad]
        elif variant == "full":
            parameters = [m.weight.requires_grad_(True) for m in self.model.model.modules()
                          if isinstance(m, nn.Linear)]  # fmt: skip
        self.touched = [m.weight for m in self.model.model.modules() if isinstance(m, nn.Linear)
                        and variant == "touch"]  # fmt: skip
        if args.compile:
            self.model = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(parameters, 1e-5, weight_decay=0.0) if parameters else None

    def __call__(self, x):
        shards = range(self.adapters.S) if self.adapters else [0]
        for s, rows in zip(shards, x.chunk(len(shards))):
            if self.adapters:
                self.adapters.select(s)
            logits = self.model(rows).logits
            F.cross_entropy(logits.flatten(0, 1).float(), rows.flatten()).backward()
        for W in self.touched:
            W.add_(0.0)
        if self.optimizer:
            self.optimizer.step()
            if self.variant == "published":
                self.fold()
            if self.adapters:
                self.adapters.merge_()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def fold(self):
        """The published update: the factors' change, one dense product a layer, factors put back."""
        for module in self.model.modules():
            if isinstance(module, Published):
                state = self.optimizer.state[module.A]["exp_avg"], self.optimizer.state[module.B]["exp_avg"]
                dA, dB = (1e-5 * s for s in state)  # of Adam's size; the work is what counts
                module.linear.weight += (dA @ module.B + module.A @ dB + dA @ dB).T


MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure(variants, tokens, args) -> dict[str, float]:
    """Median seconds a step; variants alternate, so that a slower minute slows all of them."""
    length = min(512, tokens)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 8192, (tokens // length, length), generator=g).to(args.device)
    steps = {variant: Step(variant, args) for variant in variants}
    times = {variant: [] for variant in variants}
    bar = tqdm(total=(args.rounds + 1) * len(variants), desc=f"{tokens} tokens", unit="step")
    for round in range(args.rounds + 1):
        for variant in variants:
            synchronize(args)
            start = time.perf_counter()
            steps[variant](x)
            synchronize(args)
            if round:
                times[variant].append(time.perf_counter() - start)
            bar.update()
    bar.close()
    return {variant: statistics.median(values) for variant, values in times.items()}


def peak(variant: str, args) -> float:
    """MiB at the highest point of three steps: the GPU allocator's, or the resident set's above the start."""
    x = torch.randint(0, 8192, (args.shards, 512), generator=torch.Generator().manual_seed(0)).to(args.device)
    step = Step(variant, args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step(x)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu() -> str:
    """Name of the processor, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("width", 1024), ("ffn", 2816), ("layers", 8), ("rounds", 7), ("threads", 2),
                          ("shards", 1), ("rank", 16)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--peak", help="only the peak memory of this variant, as a number")
    parser.add_argument("--variants", nargs="+",
                        default="frozen touch hd_pissa lora pissa published full".split())  # fmt: skip
    args = parser.parse_args()
    if not MALLOC.items() <= os.environ.items() and args.device == "cpu":       # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    torch.set_num_threads(args.threads)
    if args.dtype == "tf32":
        torch.backends.cuda.matmul.allow_tf32, args.dtype = True, "float32"
    if args.peak:
        print(peak(args.peak, args))
        return
    result = {"torch": torch.__version__, "device": cpu(), "shape": vars(args), "seconds": {}, "peak": {}}
    if args.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    # Memory first: a child's resident set is counted from its parent's at the fork.
    for variant in tqdm(args.variants, desc="peak memory", unit="process"):
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", variant]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result["peak"][variant] = float(done.stdout.split()[-1])
    for tokens in args.tokens:
        result["seconds"][tokens] = measure(args.variants, tokens, args)
    names = args.variants
    print("\nratio: hd_pissa over the variant\n")
    print(f"| tokens | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for tokens, seconds in result["seconds"].items():
        print(f"| {tokens}, s a step | " + " | ".join(f"{seconds[v]:.3f}" for v in names) + " |")
        ours = seconds.get("hd_pissa", math.nan)
        print(f"| {tokens}, ratio | " + " | ".join(f"{ours / seconds[v]:.3f}" for v in names) + " |")
    print("| peak memory, MiB | " + " | ".join(f"{result['peak'][v]:.0f}" for v in names) + " |")
    args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
