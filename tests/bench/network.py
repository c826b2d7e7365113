"""Cost of the exchange between two machines: merge_ and a whole step over a network of a given speed.

    python tests/bench/network.py                  # as root, two minutes on two quiet cores

The machines are two network namespaces, one thread each, joined by a cable that `tc` throttles. Prints a
table and writes network.json. Bytes are those that one machine receives in one merge_: computed, and counted
at the interface, with headers. The computed bytes at the cable's rate are the least time of an exchange.

The last rows ask how much of a step's exchange is hidden behind its work, in layers that each are a bucket:
the same step where nothing travels, its collectives alone one behind the other, and both together. Two
machines share two cores here, which the exchange needs as well as the work. So these rows come three times:
with work of the CPU, with work that leaves it free as a GPU's does (sleep in its place), and on a clock of
their own (tests/link.py), where no core is shared: what the order of the calls hides.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts import CABLE, two_hosts, unavailable  # noqa: E402
from link import AWAY, RANK, WIDTH, Clock, Link, exact, instead, training  # noqa: E402

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402

LAYERS, THIN, TOKENS = 4, 16, 512
EXCHANGES = "all_gather", "all_reduce"
HIDDEN = "1 Gbit/s"      # of the overlap
RATES = {"unthrottled": None, "1 Gbit/s": 1000.0, "100 Mbit/s": 100.0}
WARMUP, ROUNDS = 2, 11
# Rows of the overlap: layers and tokens such that work and exchange take about as long as each other.
OVERLAP = dict(layers=16, rank=RANK, tokens=128), {
    "local": {}, "local, one bucket": dict(bucket_mb=256), "whole batch": dict(gradients="global"),
    'whole batch, send="backward"': dict(gradients="global", send="backward")}  # fmt: skip


def payload(exchange: str) -> int:
    """Bytes that one of two machines receives in a merge_, without headers and the check of a few numbers.

    all_gather: dA, dB of the other machine's shard. all_reduce: dU, once; half as terms, half as sums.
    """
    return 4 * LAYERS * (THIN * 2 * WIDTH if exchange == "all_gather" else WIDTH * WIDTH)


def received() -> int:
    """Bytes that have come in over the cable so far, by the kernel; what TCP sends twice counts twice."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith(CABLE + ":"))


def medians(work, before=lambda: None) -> tuple[float, float]:
    """(seconds, bytes received) of `work`, medians over ROUNDS."""
    rows = []
    for _ in range(WARMUP + ROUNDS):
        before()
        bytes_before, start = received(), time.perf_counter()
        work()
        rows.append((time.perf_counter() - start, received() - bytes_before))
    return tuple(statistics.median(column) for column in zip(*rows[WARMUP:]))


def measure(exchange: str) -> dict:
    adapters, step = training(hd_pissa.attach, LAYERS, THIN, TOKENS, exchange=exchange)

    def increments():
        adapters.increments.normal_(std=1e-6)
        dist.barrier()  # the merge alone, not the wait for the other machine

    merge, counted = medians(adapters.merge_, increments)
    return {"merge": merge, "counted": counted, "step": medians(step)[0]}


def overlap(away: bool, options: dict) -> dict:
    """Seconds of a step, of its work and of its exchange alone; both begin when both machines are there."""
    shape = OVERLAP[0] | (dict(tokens=1, sleep=time.sleep) if away else {})
    adapters, step = training(hd_pissa_extra.attach, **shape, **({"bucket_mb": 0} | options))
    step()                              # the first merge compares the models
    calls = []

    def noted(name, real):
        def call(*tensors, **how):
            calls.append((name, [torch.empty_like(t) for t in tensors]))
            return real(*tensors, **how)
        return call

    def exchange():
        for work in [getattr(dist, name)(*tensors, async_op=True) for name, tensors in calls]:
            work.wait()

    with instead(noted):
        step()
    together = medians(step, dist.barrier)[0]
    alone = medians(exchange, dist.barrier)[0]
    dist.barrier()
    with instead(Link(Clock()).make):
        work = medians(step)[0]
    dist.barrier()
    return {"work": work, "exchange": alone, "step": together, "buckets": len(adapters.buckets)}


def worker(path: str, hidden: bool) -> None:
    """One of the two processes: all exchanges at the speed that the cable has now."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    result = {exchange: measure(exchange) for exchange in EXCHANGES}
    if hidden:
        result["overlap"] = {name: overlap(False, options) for name, options in OVERLAP[1].items()}
        with mock.patch.object(hd_pissa, "fold_", lambda *_: time.sleep(AWAY[2])):
            result["overlap"] |= {f"{name}, CPU free": overlap(True, options)
                                  for name, options in OVERLAP[1].items()}  # fmt: skip
    if hd_pissa.process_index() == 0:
        Path(path).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def row(label: str, got: dict) -> list:
    longer = max(got["work"], got["exchange"])
    milliseconds = [1e3 * got[key] for key in ("step", "work", "exchange")]
    return [label, None, None, None, None, *milliseconds, got["step"] / longer]


def bench() -> list:
    rows, hidden = [], []
    with two_hosts() as hosts, tempfile.TemporaryDirectory() as tmp:
        for name, rate in tqdm(RATES.items(), desc="network", unit="rate"):
            hosts.throttle(rate)
            path = Path(tmp) / "result.json"
            command = [Path(__file__).resolve(), "--worker", path, *["--overlap"] * (name == HIDDEN)]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes = [hosts.torchrun(host, command, **streams) for host in range(2)]
            printed = [process.communicate(timeout=600)[0] for process in processes]
            if any(process.returncode for process in processes):
                raise RuntimeError(f"{name} failed\n" + "\n".join(printed))
            told = json.loads(path.read_text())
            hidden += [row(f"{name}, {label}", got) for label, got in told.pop("overlap", {}).items()]
            for exchange, got in told.items():
                least = payload(exchange) * 8e-3 / rate if rate else None
                rows.append([f"{name}, {exchange}", payload(exchange) / 1e6, got["counted"] / 1e6, least,
                             1e3 * got["merge"], 1e3 * got["step"], None, None, None])  # fmt: skip
    for label, options in OVERLAP[1].items():
        got = exact(hd_pissa_extra.attach, OVERLAP[0]["layers"], 1e6 * RATES[HIDDEN],
                    **({"bucket_mb": 0} | options))  # fmt: skip
        hidden.append(row(f"{HIDDEN}, {label}, on the clock", got))
    return rows + hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--overlap", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.overlap)
    if reason := unavailable():
        parser.error(reason)
    title = (f"two machines, {LAYERS} layers {WIDTH} x {WIDTH}, r = {THIN}, K = 2, {TOKENS} tokens a machine"
             "; the last rows {layers} layers, r = {rank}, {tokens} tokens".format(**OVERLAP[0]))
    head = ("", "received, MB", "at the interface, MB", "bytes / rate, ms", "merge_, ms", "step, ms",
            "its work alone, ms", "its exchange alone, ms", "step over the larger")  # fmt: skip
    rows = bench()
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for label, *values in rows:
        cells = ("" if v is None else f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in values)
        print(f"| {label} | {' | '.join(cells)} |")
    result = {"title": title, "torch": torch.__version__, "columns": head, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
