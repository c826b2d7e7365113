"""Memory that a process holds, and bytes it receives in a step, against the formula of `train.py --dry_run`.

    python tests/bench/memory.py                   # 1 and 8 processes, some minutes; writes memory.json

Each row trains 24 linear layers of 1024 x 1024, two steps of two micro-batches, K = 8, r = 64, in a process
of its own. What is held: the resident set at its largest moment, after the optimizer's step, less what the
process had before the model was made. Then increments, moments and gradients are alive together.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

# Freed memory goes back to the system at once, so that the resident set is what tensors hold.
for name, value in {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}.items():
    os.environ[name] = value

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import spawned  # noqa: E402

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402
from training import dry_run  # noqa: E402

LAYERS, WIDTH, K, R, MICRO = 24, 1024, 8, 64, 2
SEED = dict(gradients="global", init="random", aggregate="sum")
ROWS = {     # name: bits of W beside float32's 4 bytes, options of attach or the stage of ZeRO, processes
    "LoRA of rank K r": dict(zero=0),
    "LoRA of rank K r, ZeRO-2": dict(zero=2),
    "LoRA of rank K r, ZeRO-3": dict(zero=3),
    "HD-PiSSA local, cached": dict(),
    "HD-PiSSA local, resent": dict(basis="resend"),
    "HD-PiSSA whole batch, cached": dict(gradients="global"),
    "whole batch, basis from a seed": SEED,
    "whole batch, basis from a seed, sent by every backward": dict(SEED, send="backward"),
    "the same, W in bfloat16 halves": dict(SEED, send="backward", dtype="bfloat16"),
    "the same, W in bfloat16 at two bytes": dict(SEED, send="backward", dtype="bfloat16",
                                                 rounding="stochastic"),
}


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def quick(W, k, name="W"):
    """Orthonormal components without an SVD: how they were found does not change what they take."""
    U, Vt = hd_pissa_extra.seeded_columns((*W.shape,), 0, k, 7, W.device, torch.float32)
    return U.T, torch.ones(k), Vt


class Adapter(nn.Module):
    """LoRA's A (m, K r) and B (K r, n) of one layer."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.randn(WIDTH, K * R) / 32)
        self.B = nn.Parameter(torch.zeros(K * R, WIDTH))

    def forward(self, x):
        return (x @ self.A) @ self.B


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleList(Adapter() for _ in base)

    def forward(self, x):
        for layer, adapter in zip(self.base, self.adapters):
            x = layer(x) + adapter(x)
        return x


def received(work) -> int:
    """Bytes that reach this process while work() runs, as a ring of the processes would bring them."""
    total, world = 0, hd_pissa.world_size()
    kinds = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single",
             "all_reduce")
    kept = {name: getattr(dist, name) for name in kinds if hasattr(dist, name)}

    def counted(name):
        def call(*args, **more):
            nonlocal total
            whole = max((t for t in (*args, *more.values()) if isinstance(t, torch.Tensor)), key=torch.numel)
            rounds = 2 if name == "all_reduce" else 1
            total += rounds * whole.numel() * whole.element_size() * (world - 1) // world
            return kept[name](*args, **more)
        return call

    for name in kept:
        setattr(dist, name, counted(name))
    try:
        work()
    finally:
        for name, original in kept.items():
            setattr(dist, name, original)
    return total


def train(model, parameters, merge, shard=lambda i: contextlib.nullcontext(), S=1, steps=2):
    """(resident bytes at the largest moment, bytes received in the last step)."""
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.0, foreach=False)
    x, held, got = torch.ones(1, WIDTH, dtype=next(model.parameters()).dtype), [], []

    def step():
        for i in range(S):
            for _ in range(MICRO):
                with shard(i):
                    model(x).float().square().mean().backward()
        held.append(resident())
        optimizer.step()
        held.append(resident())
        merge()

    for _ in range(steps):
        got.append(received(step))
    return max(held), got[-1]


def measure(name: str, layers: int = LAYERS) -> tuple[int, int]:
    options = dict(ROWS[name])
    zero, dtype = options.pop("zero", None), getattr(torch, options.pop("dtype", "float32"))
    before = resident()
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    model.to_empty(device="cpu").requires_grad_(False)
    for layer in model:
        nn.init.normal_(layer.weight, std=1 / 32, generator=torch.Generator().manual_seed(0))
    if zero is not None:
        model = LoRA(model)
        if zero:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            mesh = init_device_mesh("cpu", (hd_pissa.world_size(),))
            for adapter in model.adapters:
                fully_shard(adapter, mesh=mesh, reshard_after_forward=zero == 3)
                adapter.set_reshard_after_backward(zero == 3)
        parameters = [p for adapter in model.adapters for p in adapter.parameters()]
        held, got = train(model, parameters, lambda: [setattr(p, "grad", None) for p in parameters])
    else:
        if dtype == torch.bfloat16 and options.get("rounding") == "stochastic":
            model.to(dtype)
        adapters = hd_pissa_extra.attach(model, R, shards=K, decompose=quick, dtype=dtype, bucket_mb=16,
                                         **options)
        held, got = train(model, adapters.parameters(), adapters.merge_, adapters.shard, adapters.S)
    return held - before, got


def worker(name: str) -> tuple[int, int]:
    measure(name, layers=1)             # libraries, threads and buffers of collectives that stay
    return measure(name)


def formula(name: str, processes: int) -> tuple[int, int | None]:
    """The same two numbers, by the functions behind --dry_run."""
    options, factors, weights = dict(ROWS[name]), R * 2 * WIDTH * LAYERS, LAYERS * WIDTH * WIDTH
    if "zero" in options:
        numbers, width = dry_run.lora(factors, K, K, options["zero"] if processes > 1 else 0), 4
    else:
        width = 4 if options.pop("dtype", None) is None or options.get("rounding") is None else 2
        for other in ("rounding", "aggregate"):
            options.pop(other, None)
        numbers = dry_run.hd_pissa_numbers(factors, K, processes, micro_batches=MICRO, **options)
    held = sum(numbers[key] for key in ("factors", "increments", "gradients", "moments"))
    return 4 * held + width * weights, None if "zero" in ROWS[name] else 4 * numbers["received"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, K])
    parser.add_argument("--out", default=str(HERE / "memory.json"), help="JSON file")
    args = parser.parse_args()
    rows, spawned.TIMEOUT = [], 900
    cases = [(name, world) for world in args.processes for name in ROWS
             if world > 1 or not (ROWS[name].get("zero") or ROWS[name].get("send") or "basis" in ROWS[name])]
    for name, world in tqdm(cases, unit="row"):
        with tempfile.TemporaryDirectory() as folder:
            held, got = max(spawned.spawn(world, worker, Path(folder), name))
        expected, received_ = formula(name, world)
        rows.append({"row": name, "processes": world, "held": held, "formula": expected,
                     "ratio": held / expected, "received": got, "received_formula": received_})
        print(f"{name:56} {world} processes: {held / 2**20:7.1f} MiB, formula {expected / 2**20:7.1f}, ratio "
              f"{held / expected:.3f}; received {got / 2**20:.2f} MiB a step"
              + ("" if received_ is None else f", formula {received_ / 2**20:.2f}"))
        Path(args.out).write_text(json.dumps(
            {"device": f"CPU, {platform.machine()}", "torch": torch.__version__.split("+")[0], "rows": rows},
            indent=1) + "\n")


if __name__ == "__main__":
    main()
