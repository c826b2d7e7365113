"""All that has to be measured on a GPU, in one command of at most 8 minutes; no network is needed.

    python tests/bench/gpu.py                   # on a machine with a GPU: writes gpu.json after every row
    python tests/bench/gpu.py --rehearse        # every stage on the CPU at toy size, into a file of its own

Stages: tests marked gpu; the main job and its held-out loss; step time and peak memory of all methods at the
shapes of a 1B Llama; attach; SmolLM2-135M; the top kernels of a step. A stage that fails or lacks a package
says so in its place and the next one begins; what was measured before a cut stays. `tables.py` makes the
README's tables of it.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import step as bench  # noqa: E402

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402
import train  # noqa: E402

VARIANTS = ("frozen", "hd_pissa", "hd_pissa global", "hd_pissa seed", "hd_pissa stochastic", "lora", "pissa",
            "full", "published")  # fmt: skip
ARMS = {    # of SmolLM2-135M: 80 steps, lr of the sweep of tutorial/experiments/real.py
    "published": "--lr 1e-3", "whole batch": "--lr 1e-3 --gradients global --aggregate sum",
    "whole batch, basis from a seed": "--lr 1e-3 --gradients global --aggregate sum --init random",
    "LoRA": "--method lora --lr 1e-3",
}  # fmt: skip


class Late(Exception):
    """The time is over."""


class Results:
    """Rows by stage, written whenever one is added; `left` raises Late when the time is over."""

    def __init__(self, path: Path, minutes: float, **about):
        self.path, self.end, self.rows = path, time.monotonic() + 60 * minutes, {"about": about}

    def left(self) -> float:
        if (seconds := self.end - time.monotonic()) < 5:
            raise Late("not reached: the time was over")
        return seconds

    def add(self, stage: str, **row) -> None:
        self.rows.setdefault(stage, []).append(row)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(unfinished, self.path)
        tqdm.write(f"{stage}: {row}")


def needs(*packages: str) -> None:
    for name in packages:
        if not importlib.util.find_spec(name):
            raise ImportError(f"{name} is not installed")


def marked_tests(results, toy) -> None:
    """pytest -m gpu: NCCL with one process, bits of virtual devices, all dtypes."""
    needs("pytest")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=min(120, results.left()))
    results.add("tests", passed=done.returncode == 0, said=done.stdout.strip().splitlines()[-1:])


def quiet(*flags) -> dict:
    """result.json and the seconds of train.py with these flags."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.monotonic()
        result = train.main([*map(str, flags), "--out", f"{folder}/out", "--save_minutes", "0"])
        return {"seconds": time.monotonic() - start, "before": result["before"]["all"]["loss"],
                "after": result["after"]["all"]["loss"]}


def main_job(results, toy) -> None:
    """The embedded model on the GPU and on the CPU: how far apart are the losses?"""
    steps = ["--max_steps", 2, "--eval_rows", 16, "--batch_size", 16] if toy else ["--max_steps", 40]
    for device in dict.fromkeys((toy.device if toy else "cuda", "cpu")):
        results.left()
        results.add("main job", device=device, **quiet("--device", device, "--threads", 4, *steps))


@contextlib.contextmanager
def precision(dtype: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield "float32" if dtype == "tf32" else dtype
    finally:
        torch.set_float32_matmul_precision(before)


def shapes(toy) -> SimpleNamespace:
    small = dict(width=64, ffn=96, layers=2, device="cpu", rounds=1)
    large = dict(width=2048, ffn=5632, layers=22, device="cuda", rounds=5)
    return SimpleNamespace(shards=1, compile=False, dtype="float32", **(small if toy else large))


def quick(W, k, name="W"):
    """Any orthonormal components: the time of a step does not depend on which."""
    U, V = (torch.linalg.qr(torch.randn(side, k, device=W.device)).Q for side in W.shape)
    return U, torch.ones(k, device=W.device), V.T


def build(variant: str, args):
    """bench.step's variant, its weights made on the device and nothing decomposed."""
    options = {"decompose": quick} | ({"rounding": "stochastic"} if "stochastic" in variant else {})
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    owner, name, options = ((hd_pissa, "shard_factors", {"decompose": quick}) if variant == "published" else
                            (hd_pissa_extra, "attach", options))
    with torch.device(args.device), mock.patch.object(
            owner, name, functools.partial(getattr(owner, name), **options)):
        return bench.Step(variant, args)


def one_step(made, args, tokens: int) -> dict:
    """Median seconds of a step, and the highest allocated memory, building included."""
    length = min(512, tokens)
    generator, times = torch.Generator().manual_seed(0), []
    x = torch.randint(0, 8192, (tokens // length, length), generator=generator).to(args.device)
    for _ in range(args.rounds + 2):
        bench.synchronize(args)
        start = time.perf_counter()
        made(x)
        bench.synchronize(args)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
    return {"seconds": statistics.median(times[2:]), "peak": peak}


def step_times(results, toy) -> None:
    needs("transformers")
    tokens = (64,) if toy else (2048, 8192)
    plain = [(False, d, v) for d in ("bfloat16", "tf32", "float32") for v in VARIANTS
             if "stochastic" not in v or d == "bfloat16"]  # fmt: skip
    compiled = [(True, d, v) for d in ("bfloat16", "tf32") for v in ("frozen", "hd_pissa", "lora")]
    for compile, dtype, variant in plain + ([] if toy else compiled):
        if results.left() < 90 and compile:
            raise Late("compiled rows: not reached, the time was over")
        args, made = shapes(toy), None
        with precision(dtype) as args.dtype:
            args.compile = compile
            for t in tokens:            # shorter ones first: peak memory only grows
                row = dict(variant=variant, tokens=t, dtype=dtype, compiled=compile)
                try:
                    needs(*["peft"] * (variant in ("lora", "pissa")))
                    made = made or build(variant, args)
                    results.add("step", **row, **one_step(made, args, t))
                except Exception as e:
                    results.add("step", **row, failed=f"{type(e).__name__}: {e}"[:300])


def attach(results, toy) -> None:
    """Seconds to decompose a weight, and how much memory that takes."""
    device = "cpu" if toy else "cuda"
    for m, n in ((64, 96), (64, 64)) if toy else ((4096, 4096), (4096, 11008)):
        for init in ("hd_pissa", "random"):
            results.left()
            model = torch.nn.Sequential(torch.nn.Linear(m, n, bias=False, device=device))
            times = []
            for _ in range(2):
                start = time.perf_counter()
                adapters = hd_pissa_extra.attach(model, 2 if toy else 16, shards=8, init=init)
                bench.synchronize(SimpleNamespace(device=device))
                times.append(time.perf_counter() - start)
                adapters.detach_()
            results.add("attach", m=m, n=n, init=init, seconds=times[-1])


def smollm2(results, toy) -> None:
    """Arms of tutorial/results on the real model, as many as fit."""
    needs("transformers")
    model = os.environ.get("HD_PISSA_SMOLLM2", str(ROOT / "smollm2"))
    if not toy and not Path(model, "config.json").is_file():
        raise FileNotFoundError(f"no SmolLM2 at {model}; set HD_PISSA_SMOLLM2")
    flags = (f"--model {model} --batch_size 32 --micro_batch_size 4 --max_steps 80 --dtype autocast "
             "--device cuda --eval_rows 200").split()  # fmt: skip
    flags = "--max_steps 2 --eval_rows 16 --batch_size 16 --device cpu".split() if toy else flags
    for name, own in ARMS.items():
        results.left()
        results.add("SmolLM2", arm=name, flags=own, **quiet(*flags, *own.split()))


def profile(results, toy) -> None:
    """The kernels that a step of hd_pissa in bfloat16 spends its time in."""
    needs("transformers")
    args = shapes(toy)
    args.dtype = "bfloat16"
    made = build("hd_pissa", args)
    x = torch.randint(0, 8192, (1, 64) if toy else (4, 512)).to(args.device)
    made(x)
    with torch.profiler.profile() as seen:
        made(x)
        bench.synchronize(args)
    kind = "self_cpu_time_total" if toy else "self_device_time_total"
    top = sorted(seen.key_averages(), key=lambda event: -getattr(event, kind))
    for event in itertools.islice(top, 15):
        results.add("profile", name=event.key[:90], calls=event.count, ms=getattr(event, kind) / 1e3)


STAGES = {"tests": marked_tests, "main job": main_job, "step": step_times, "attach": attach,
          "profile": profile, "SmolLM2": smollm2}  # fmt: skip


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU at toy size")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no row begins")
    parser.add_argument("--json", type=Path, help="file of the results; default: gpu.json beside this file")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by commas")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --rehearse runs every stage on the CPU")
    if unknown := set(args.stages.split(",")) - {*STAGES}:
        parser.error(f"--stages {sorted(unknown)[0]!r}: there are {', '.join(STAGES)}")
    toy = SimpleNamespace(device="cpu") if args.rehearse else None
    path = args.json or HERE / ("gpu_rehearsal.json" if toy else "gpu.json")
    device = "cpu" if toy else torch.cuda.get_device_name()
    results = Results(path, args.minutes, device=device, torch=torch.__version__, rehearsed=bool(toy))
    for name in args.stages.split(","):
        try:
            results.left()
            STAGES[name](results, toy)
        except Late as e:
            results.add(name, failed=str(e))
        except (Exception, SystemExit) as e:        # an OOM, a missing package: the next stage may do
            results.add(name, failed=f"{type(e).__name__}: {e}"[:300])
    print(path)
    return results.rows


if __name__ == "__main__":
    main()
