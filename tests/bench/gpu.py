"""All that has to be measured on a GPU, in one command of at most 8 minutes; no network is needed.

    python tests/bench/gpu.py                   # on a machine with a GPU: writes gpu.json after every row
    python tests/bench/gpu.py --rehearse        # every stage on the CPU at toy size, into a file of its own

Stages: tests marked gpu; the main job and its held-out loss; the fold alone; step time and peak memory of all
methods at the shapes of a 1B Llama; peak memory of 1B to 13B models; attach; the top kernels of a step; a run
of SmolLM2-135M against the CPU's; compiled steps. Each has a process of its own and a share of the time, and
what earlier ones left: after a hang, an error of CUDA's or a missing package the next one begins. What was
measured before a cut stays; --stages makes those rows again and keeps the rest. `about` says of each stage
which commit its rows are of. `tables.py` makes the README's tables.
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
import signal
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

VARIANTS = ("frozen", "hd_pissa", "hd_pissa global", "hd_pissa seed", "hd_pissa stochastic", "lora", "pissa",
            "full", "published")  # fmt: skip
ROUNDS = {"bfloat16": 5, "tf32": 3, "float32": 2}       # steps that a median is of
TOY = 256, 384, 3, 2, 2, 512        # as bench.hardware.MODELS says sizes
SPARE = 20      # seconds kept back: 10 for torch's import, 10 that `apart` may add to the last stage


class Late(Exception):
    """The time is over."""


class Results:
    """Rows by stage, written whenever one is added; `left` raises Late when the stage's time is over.

    until       when that is, by time.time(), which is the same in all processes
    """

    def __init__(self, path: Path, until: float = 0.0, **about):
        self.path, self.until = path, until
        self.rows = json.loads(path.read_text()) if path.exists() else {}
        self.rows.setdefault("about", about)

    def left(self) -> float:
        if (seconds := self.until - time.time()) < 5:
            raise Late("not reached: the time was over")
        return seconds

    def write(self) -> None:
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(unfinished, self.path)

    def add(self, stage: str, **row) -> None:
        self.rows.setdefault(stage, []).append(row)
        self.write()
        tqdm.write(f"{stage}: {row}")

    def measure(self, stage: str, work, **row) -> bool:
        """Add `row` with what work() returns, or why that failed; did it succeed?"""
        self.left()
        try:
            self.add(stage, **row, **work())
        except Late:
            raise
        except (Exception, SystemExit) as e:        # out of memory, a missing package: the next row may do
            self.add(stage, **row, failed=f"{type(e).__name__}: {e}"[:600])
            return False
        return True


def needs(*packages: str) -> None:
    for name in packages:
        if not importlib.util.find_spec(name):
            raise ImportError(f"{name} is not installed")


def marked_tests(results, toy) -> None:
    """pytest -m gpu: NCCL's collectives with one process, bits of virtual devices, all dtypes, TF32."""
    needs("pytest")
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py")]
    try:
        done = subprocess.run(command, capture_output=True, timeout=results.left())
        passed, said = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired as e:
        passed, said = False, (e.stdout or b"") + b"\nnot finished: the time was over"
    lines = said.decode(errors="replace").strip().splitlines()
    results.add("tests", passed=passed, said=lines[-1 if passed else -60:])


def quiet(*flags) -> dict:
    """result.json and the seconds of train.py with these flags; RuntimeError with what it said."""
    import train
    said = io.StringIO()
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said),
          contextlib.redirect_stderr(said)):
        start = time.monotonic()
        try:
            result = train.main([*map(str, flags), "--out", f"{folder}/out", "--save_minutes", "0"])
        except SystemExit:
            raise RuntimeError(said.getvalue()[-500:]) from None
        return {"seconds": time.monotonic() - start, "before": result["before"]["all"]["loss"],
                "after": result["after"]["all"]["loss"]}


def main_job(results, toy) -> None:
    """The embedded model on the GPU and on the CPU: how far apart are the losses?"""
    steps = ["--max_steps", 2, "--eval_rows", 16, "--batch_size", 16] if toy else ["--max_steps", 40]
    places = [("cuda", "float32"), ("cpu", "float32"), ("cuda", "tf32"), ("cuda", "bfloat16")]
    for device, dtype in places[1:2] if toy else places:
        flags = "--device", device, "--dtype", dtype, "--threads", 4, *steps
        results.measure("main job", lambda flags=flags: quiet(*flags), device=device, dtype=dtype)


@contextlib.contextmanager
def precision(dtype: str):
    """The dtype of the weights, while float32 products are done as `dtype` says."""
    import hd_pissa_extra
    with hd_pissa_extra.float32_products("tf32" if dtype == "tf32" else "ieee"):
        yield "float32" if dtype == "tf32" else dtype


def shapes(toy) -> SimpleNamespace:
    """Of a 1B Llama; of a third of its layers where the GPU has less than 40 GB."""
    small = dict(width=64, ffn=96, layers=2, device="cpu")
    large = dict(width=2048, ffn=5632, layers=22, device="cuda")
    if not toy and torch.cuda.get_device_properties(0).total_memory < 40e9:
        large["layers"] = 8
    return SimpleNamespace(shards=1, rank=16, compile=False, dtype="float32", **(small if toy else large))


@functools.cache
def orthonormal(side: int, k: int, device) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(side, k, device=device)).Q


def quick(W, k, name="W"):
    """Any orthonormal components: the time of a step does not depend on which."""
    U, V = (orthonormal(side, k, W.device) for side in W.shape)
    return U, torch.ones(k, device=W.device), V.T


def build(variant: str, args, compile: bool = False):
    """bench.step's variant, its weights made on the device and nothing decomposed.

    compile     its blocks one by one: they are alike, so that one of them is compiled and not all 22
    """
    import step

    import hd_pissa
    import hd_pissa_extra
    needs(*["peft"] * (variant in ("lora", "pissa")))
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    owner, name = (hd_pissa, "shard_factors") if variant == "published" else (hd_pissa_extra, "attach")
    fast = functools.partial(getattr(owner, name), decompose=quick)
    with torch.device(args.device), mock.patch.object(owner, name, fast):
        made = step.Step(variant, args)
    for block in made.model.modules():
        if compile and type(block).__name__ == "LlamaDecoderLayer":
            block.compile(backend="inductor" if args.device == "cuda" else "aot_eager")
    return made


def synchronize(args) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def one_step(made, args, tokens: int, results) -> dict:
    """Median seconds of a step, and the highest allocated memory in one, what stays included."""
    length = min(512, tokens)
    generator, times = torch.Generator().manual_seed(0), []
    x = torch.randint(0, 8192, (tokens // length, length), generator=generator).to(args.device)
    for i in range(args.rounds + 2):            # two to warm up: they compile and choose kernels
        if i == 2 and args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results.left()
        synchronize(args)
        start = time.perf_counter()
        made(x)
        synchronize(args)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
    return {"seconds": statistics.median(times[2:]), "peak": peak}


def step_times(results, toy, compile: bool = False) -> None:
    """Every method; what matters most first, since the time may end anywhere."""
    needs("transformers")
    tokens = (64,) if toy else (2048, 8192)
    variants = ("frozen", "hd_pissa", "lora") if compile else VARIANTS
    for dtypes in ("bfloat16",), ("tf32",) if compile else ("tf32", "float32"):     # each of one build
        for variant in variants if "bfloat16" in dtypes else (v for v in variants if "stochastic" not in v):
            args, made = shapes(toy), None
            for dtype, t in itertools.product(dtypes, tokens):      # shorter ones fit where longer do not
                def work(t=t, variant=variant, args=args):
                    nonlocal made
                    made = made or build(variant, args, compile)
                    return one_step(made, args, t, results)

                args.rounds = 1 if toy else ROUNDS[dtype]
                with precision(dtype) as args.dtype:
                    if not results.measure("compiled" if compile else "step", work, variant=variant,
                                           tokens=t, dtype=dtype, layers=args.layers):
                        break                   # what an error has left half done is measured no more


def attach(results, toy) -> None:
    """Seconds to decompose a weight, and the memory that takes beside it."""
    import hd_pissa_extra
    args = shapes(toy)

    def work(m, n, init):
        model = torch.nn.Sequential(torch.nn.Linear(m, n, bias=False, device=args.device))
        for _ in range(2):                      # the first one loads libraries
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize(args)
            start = time.perf_counter()
            adapters = hd_pissa_extra.attach(model, 2 if toy else 16, shards=8, init=init)
            synchronize(args)
            seconds = time.perf_counter() - start
            adapters.detach_()
        peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
        return {"seconds": seconds, "peak": peak}

    for m, n in ((64, 96), (64, 64)) if toy else ((4096, 4096), (4096, 11008)):
        for init in ("hd_pissa", "random"):
            results.measure("attach", functools.partial(work, m, n, init), m=m, n=n, init=init)


def fold(results, toy) -> None:
    """merge_ alone, K = 8, four LLaMA-2-7B weights; beside it the time to copy as many bytes as W has."""
    import hd_pissa_extra
    m, n, device = (64, 96, "cpu") if toy else (4096, 11008, "cuda")
    args = SimpleNamespace(device=device)

    def work(dtype, r):
        with precision(dtype) as of_W:
            model = torch.nn.Sequential(*(torch.nn.Linear(*side, bias=False, device=device)
                                          for side in ((m, n), (n, m)) * 2))
            adapters = hd_pissa_extra.attach(model, r, shards=8, decompose=quick, dtype=getattr(torch, of_W))
            times, copies, W = [], [], torch.empty(4 * m * n, device=device)
            x = torch.ones(1, m, device=device, dtype=model[0].weight.dtype)
            for _ in range(2 if toy else 7):
                for s in range(8):
                    with adapters.shard(s):
                        model(x).sum().backward()
                adapters.increments.data.normal_(0, 1e-5)
                synchronize(args)
                start = time.perf_counter()
                adapters.merge_()
                synchronize(args)
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
                W.copy_(W.clone())          # 2 reads, 2 writes
                synchronize(args)
                copies.append((time.perf_counter() - start) / 2)
                adapters.increments.grad = None
            seconds, copied = statistics.median(times[1:]), statistics.median(copies[1:])
            return {"seconds": seconds, "passes": 2 * seconds / copied,
                    "TFLOP a second": 2 * 16 * r * 4 * m * n / seconds / 1e12}

    for r in (2,) if toy else (16, 128):
        for dtype in ("bfloat16", "float32", "tf32"):
            results.measure("fold", functools.partial(work, dtype, r), dtype=dtype, r=r)


def memory(results, toy) -> None:
    """Steps of train() whose rows have 1024 tokens: the allocator's peak. tables.py puts beside it what
    --dry_run computes. 7B first: 1B has been measured."""
    import hardware

    import hd_pissa
    import hd_pissa_extra
    needs("transformers")
    hardware.MODELS["toy"] = TOY
    tries = [("toy", {"dtype": "bfloat16"})] if toy else [
        ("LLaMA-2-7B", {"dtype": "bfloat16"}), ("LLaMA-2-7B", hardware.TWO_BYTES),
        ("LLaMA-2-7B", {"dtype": "autocast"}), ("LLaMA-2-13B", hardware.TWO_BYTES), ("Llama-3.2-1B", {})]
    device = "cpu" if toy else "cuda"

    def work(name, options):
        own = dict(options)
        kind = own.pop("dtype", "float32")
        own |= {"decompose": quick} if "init" not in own else {}
        gc.collect()
        if not toy:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.device(device):
            model = hardware.build(name, hardware.MODELS[name][2], kind).requires_grad_(False)
        adapters = hd_pissa_extra.attach(
            model, 16, shards=8, dtype=torch.bfloat16 if kind == "bfloat16" else None, **own)
        rows = [(list(range(1024 - i, 2049 - 2 * i)), 1) for i in range(8)]
        rows = [([token % 512 for token in tokens], prompt) for tokens, prompt in rows]
        *_, last = hd_pissa.train(model, adapters, [rows] * 3, lr=1e-5, max_steps=3, micro_batch_size=1,
                                  device=device, autocast=kind == "autocast", progress=False)
        return {"tokens a second": last["tokens_per_second"],
                "peak, GiB": None if toy else torch.cuda.max_memory_allocated() / 2**30}

    for name, options in tries:
        results.measure("memory", functools.partial(work, name, options), model=name,
                        options=hardware.flags(options) or "(none)")


def smollm2(results, toy) -> None:
    """Runs of tutorial/experiments/real.py that its file has from a CPU: configuration, rows and loop are its
    own, only the device is another. The whole batch comes first: 2 forwards a step, the published form 8."""
    needs("transformers", "peft")
    import hardware

    import hd_pissa
    from tutorial.experiments import job, real, run
    folder = os.environ.get("HD_PISSA_SMOLLM2", str(ROOT / "smollm2"))
    if not toy and not Path(folder, "config.json").is_file():
        raise FileNotFoundError(f"no SmolLM2 at {folder}; set HD_PISSA_SMOLLM2")
    device, done, hardware.MODELS["toy"] = "cpu" if toy else "cuda", run.read(real.RESULTS), TOY
    load, pad, autocast = real.hugging_face, hd_pissa.pad, torch.autocast

    def loaded(folder, weights=True):
        model, *rest = [hardware.build("toy", 2, "float32")] if toy else load(folder, weights)
        return model.to(device), *rest

    def cast(kind, *given, **more):
        return autocast(device if kind == "cpu" else kind, *given, **more)

    def work(c):
        with contextlib.ExitStack() as patched:
            for owner, name, new in (
                    (real, "hugging_face", loaded), (job, "provenance", lambda: {"commit": None}),
                    (hd_pissa, "pad", lambda rows, _: pad(rows, device)), (torch, "autocast", cast),
                    *[(real, "data", lambda _: ([(list(range(9)), 4)] * 64,) * 3)] * bool(toy)):
                patched.enter_context(mock.patch.object(owner, name, new))
            here = real.one(c, folder, quick=bool(toy))
        there = done.get(run.key(c), dict.fromkeys(here))
        losses = {f"{key}{of}": record[key] for key in ("validation", "test")
                  for of, record in (("", here), (", CPU", there))}
        return {"seconds": here.get("seconds"), **losses, "commit, CPU": there["commit"],
                "the same weights": here["model"] == there["model"]}

    for arm in ("whole", "published"):
        c = real.complete(arm, real.sweep(arm, done)[1], real.SEEDS[0], quick=bool(toy))
        results.measure("SmolLM2", functools.partial(work, c), arm=arm, lr=c["lr"], seed=c["seed"])


def profile(results, toy) -> None:
    """The kernels that a step of hd_pissa in bfloat16 spends its time in."""
    needs("transformers")
    args = shapes(toy)
    args.dtype = "bfloat16"
    made = build("hd_pissa", args)
    x = torch.randint(0, 8192, (1, 64) if toy else (4, 512)).to(args.device)
    for _ in range(2):
        made(x)
    with torch.profiler.profile() as seen:
        made(x)
        synchronize(args)
    kind = "self_cpu_time_total" if toy else "self_device_time_total"
    place = torch.autograd.DeviceType.CPU if toy else torch.autograd.DeviceType.CUDA
    top = sorted((event for event in seen.key_averages() if event.device_type == place),
                 key=lambda event: -getattr(event, kind))
    results.add("profile", name="all", calls=sum(event.count for event in top),
                ms=sum(getattr(event, kind) for event in top) / 1e3)
    for event in itertools.islice(top, 15):
        results.add("profile", name=event.key[:90], calls=event.count, ms=getattr(event, kind) / 1e3)


# Stage: what it runs, its seconds of 8 minutes less SPARE, and where its rows go. On an H200 (55ad55d) pytest
# took 36 s, the main job's rows 59, 38 of 50 rows of steps some 150 (69 of them steps), attach and profile at
# most 30 each. The fold had 2 of 6 rows after 30 s, memory 1 of 5 after 70, SmolLM2's published form none.
STAGES = {"tests": (marked_tests, 50, "tests"), "main job": (main_job, 55, "main job"),
          "fold": (fold, 30, "fold"), "step": (step_times, 140, "step"), "memory": (memory, 55, "memory"),
          "attach": (attach, 15, "attach"), "profile": (profile, 15, "profile"),
          "SmolLM2": (smollm2, 50, "SmolLM2"),
          "compiled": (functools.partial(step_times, compile=True), 50, "compiled")}  # fmt: skip


def stage(name: str, results, toy) -> None:
    """One stage, in this process."""
    work, _, rows = STAGES[name]
    try:
        results.left()
        work(results, toy)
    except Late as e:
        results.add(rows, failed=f"{name}: {e}")
    except (Exception, SystemExit) as e:
        results.add(rows, failed=f"{name}: {type(e).__name__}: {e}"[:600])


def apart(command, seconds: float) -> str:
    """Run a stage in a process of its own; why it ended, where that is not as it should."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(seconds)
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return "it was still at work when its time was over, and was ended"
    finally:            # also when this command is stopped: nothing of the stage stays on the GPU
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def commit_here() -> str | None:
    """The checkout's commit, -dirty where programs differ from it; None where git does not tell."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    with contextlib.suppress(OSError):
        if head := git("rev-parse", "--short=7", "HEAD").stdout.strip():
            return head + "-dirty" * bool(git("diff", "--quiet", "HEAD", "--", "*.py").returncode)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU at toy size")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which the command has ended")
    parser.add_argument("--json", type=Path, help="file of the results; default: gpu.json beside this file")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by commas")
    parser.add_argument("--commit", help="of these files, where git does not tell it")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    toy = SimpleNamespace() if args.rehearse else None
    path = args.json or HERE / ("gpu_rehearsal.json" if toy else "gpu.json")
    if args.stage:
        results = Results(path, args.until)
        stage(args.stage, results, toy)
        sys.stdout.flush()
        os._exit(0)         # all is written; a profile once had all its rows and then did not end in time
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --rehearse runs every stage on the CPU")
    names = args.stages.split(",")
    if unknown := {*names} - {*STAGES}:
        parser.error(f"--stages {sorted(unknown)[0]!r}: there are {', '.join(STAGES)}")
    device = "cpu" if toy else torch.cuda.get_device_properties(0).name
    about = {"device": device, "torch": torch.__version__, "rehearsed": bool(toy), "stages": {}}
    if len(names) == len(STAGES) or path.exists() and json.loads(path.read_text())["about"] | {
            "stages": {}} != about:
        path.unlink(missing_ok=True)
    results = Results(path, **about)
    results.rows["about"].setdefault("stages", {})      # a file of an earlier form
    for name in names:
        results.rows.pop(STAGES[name][2], None)
    results.write()
    commit = args.commit or commit_here()
    until, scale = time.time(), (60 * args.minutes - SPARE) / sum(STAGES[name][1] for name in names)
    for name in names:
        began, results, rows = time.time(), Results(path), STAGES[name][2]
        of = {"commit": commit, "date": time.strftime("%Y-%m-%d")}
        results.rows["about"]["stages"][rows] = of
        results.write()
        until += scale * STAGES[name][1]
        command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--until", str(until),
                   "--json", str(path), *["--rehearse"] * args.rehearse]
        fault = apart(command, max(0.0, until - began) + 10)
        results = Results(path)
        if fault:
            results.add(rows, failed=f"{name}: {fault}")
        results.rows["about"]["stages"][rows] = of | {"seconds": round(time.time() - began)}
        results.write()
    print(path)
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
