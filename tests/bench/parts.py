"""Cost of the parts: memory against --dry_run, bytes, the merge as K grows, whole-batch gradients, attach.

    python tests/bench/parts.py                    # all five, half an hour on two cores, mostly full SVDs

Prints tables and writes parts.json. Where processes are compared, each has one thread.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import spawned  # noqa: E402
from spawned import received_bytes, spawn  # noqa: E402

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402


def layers(*shapes, decay=0.0) -> nn.Sequential:
    """Bias-free Linear layers (m, n); with `decay`, singular values fall so far that float32 is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in shapes))
    for layer in model:
        nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
        if decay:
            scale = torch.full((layer.weight.shape[0],), 10.0**-decay)
            scale[:128] = torch.logspace(0, -decay, 128)
            layer.weight.data *= scale[:, None]
    return model


ATTACH = {
    "2048 x 2048": [(2048, 2048)] * 4,
    "4096 x 11008": [(4096, 11008)] * 2,
}


def attach_seconds(shapes, decay):
    """(attach, full SVD of every layer) on this rank, both from a barrier to the last rank's end."""
    model, out = layers(*shapes, decay=decay), []
    for work in (
        lambda: hd_pissa_extra.attach(model, 16, shards=8),
        lambda: [torch.linalg.svd(layer.weight.detach(), full_matrices=False) for layer in model],
    ):
        dist.barrier()
        start = time.perf_counter()
        work()
        dist.barrier()
        out.append(time.perf_counter() - start)
    return out


def bench_attach(tmp):
    rows = []
    for name, shapes in tqdm(ATTACH.items(), desc="attach", unit="shape"):
        for decay, driver in ((0.0, "float32 accepted"), (3.0, "float64 fallback")):
            ours, full = spawn(2, attach_seconds, tmp, shapes, decay)[0]
            rows.append((f"{name}, {len(shapes)} layers, {driver}", ours, full, ours / full))
    return ("attach on 2 processes, K r = 128", ("", "attach, s", "full SVD on each, s", "ratio"), rows)


def merge_seconds(K, exchange):
    model = layers(*[(1024, 1024)] * 4)
    adapters = hd_pissa.attach(model, 16, shards=K, exchange=exchange)
    times = []
    for _ in range(12):
        adapters.increments.normal_(std=1e-6)
        start = time.perf_counter()
        adapters.merge_()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def merges(Ks):
    return [[1e3 * merge_seconds(K, exchange) for exchange in ("all_gather", "all_reduce")] for K in Ks]


def bench_merge(tmp):
    rows = []
    for processes in tqdm((1, 2), desc="merge", unit="run"):
        Ks = [K for K in (1, 2, 4, 8, 16) if K >= processes]
        times = spawn(processes, merges, tmp, Ks)[0]
        rows += [(f"{processes} processes, K = {K}", *row) for K, row in zip(Ks, times)]
    return ("merge_ of 4 layers 1024 x 1024, r = 16", ("", "all_gather, ms", "all_reduce, ms"), rows)


def bytes_of_a_merge():
    out = []
    for options in ({}, {"basis": "resend"}, {"exchange": "all_reduce"}):
        adapters = hd_pissa_extra.attach(layers((4096, 4096)), 16, shards=8, init="lora", **options)
        adapters.increments.normal_(std=1e-6)
        out.append(received_bytes(adapters.merge_))
    return out


def bench_bytes(tmp):
    """Counted at the collectives, with the 8 x 4 numbers by which processes agree; random factors do here."""
    rows = []
    for processes in tqdm((2, 8), desc="bytes", unit="run"):
        cached, resent, dense = spawn(processes, bytes_of_a_merge, tmp)[0]
        for name, value in (("all_gather, cached", cached), ("all_gather, resent", resent)):
            rows.append((f"{name}, {processes} processes", value / 2**20, dense / 2**20, dense / value))
    return ("received by a process in a step, 4096 x 4096, r = 16, K = 8",
            ("", "MiB", "dense all_reduce, MiB", "times fewer"), rows)


def bench_global(tmp):
    """One process with 8 shards of 512 tokens; the extra work is a backward of rank 128 instead of 16."""
    runs, x = {}, torch.randn(512, 4096)
    for gradients in ("local", "global"):
        model = layers((4096, 4096), (4096, 4096))
        adapters = hd_pissa_extra.attach(model, 16, shards=8, gradients=gradients)
        runs[gradients] = model, adapters, torch.optim.AdamW(adapters.parameters(), weight_decay=0.0), []
    for _ in tqdm(range(6), desc="gradients", unit="round"):
        for model, adapters, optimizer, times in runs.values():
            start = time.perf_counter()
            for s in range(8):
                with adapters.shard(s):
                    model(x.detach().requires_grad_(True)).square().mean().backward()
            optimizer.step()
            adapters.merge_()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
    local, whole = (statistics.median(run[3][1:]) for run in runs.values())
    row = ("2 layers 4096 x 4096, K = 8, r = 16, 4096 tokens", local, whole, whole / local)
    return ('gradients="global"', ("", "local, s", "global, s", "ratio"), [row])


def resident(field):
    """MiB of this process by the kernel: VmRSS now, VmHWM the highest so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+)", status, re.M)[1]) / 1024


def run_once(flags, out):
    """Highest resident set of train.py in this process, MiB above what a run of the small model leaves."""
    import train

    train.main(["--max_steps", "2", "--eval_rows", "8", "--out", out + "/small"])  # libraries, their buffers
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    train.main([*flags, "--out", out + "/wide"])
    return resident("VmHWM") - before


def bench_memory(tmp):
    """A GPT of width 1024 and 8 layers, K = 8: what --dry_run says and what the process then takes."""
    import train

    model = train.GPT(train.GPTTokenizer().vocabulary, block_size=128, layers=8, width=1024)
    torch.save(model.state_dict(), tmp / "wide.pt")
    del model
    flags = ["--model", str(tmp / "wide.pt"), "--rank", "16", "--shards", "8", "--lr", "1e-4",
             "--max_steps", "6", "--micro_batch_size", "8", "--eval_rows", "8"]  # fmt: skip
    # Freed blocks go back to the system; by default glibc keeps those below a threshold that it moves.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"
    rows = []
    for processes in tqdm((1, 2, 8), desc="memory", unit="run"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                   str(processes), ROOT / "train.py", *flags, "--dry_run"]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        said = float(re.search(r"^  sum +([\d.]+) MiB", text, re.M)[1])
        took = spawn(processes, run_once, tmp, flags, str(tmp / str(processes)))[0]
        rows.append((f"GPT width 1024, 8 layers, K = 8 on {processes} processes", said, took, took / said))
    return ("peak memory", ("", "--dry_run, MiB", "measured, MiB", "ratio"), rows)


def main() -> None:
    benches = {"memory": bench_memory, "bytes": bench_bytes, "merge": bench_merge, "global": bench_global,
               "attach": bench_attach}  # fmt: skip
    spawned.TIMEOUT = 600
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(benches), help=", ".join(benches))
    args = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in args.parts:
        with tempfile.TemporaryDirectory() as tmp:
            title, head, rows = benches[name](Path(tmp))
        print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        for label, *values in rows:
            print(f"| {label} | " + " | ".join(f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in values) + " |")
        result[name] = {"torch": torch.__version__, "columns": head, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
