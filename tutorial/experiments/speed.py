"""Seconds per optimizer step of every method, one thread, on an otherwise idle machine.

    python tutorial/experiments/speed.py [--quick] [--out DIR]

All K shards run in turn in one process, so this is the cost of the arithmetic, not of K devices side by
side. Every method sees the same batches with the same padding. Rounds are interleaved, so that a slow minute
hits all methods; the median of all steps goes to speed.jsonl, with quartiles and the load before the start.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import torch  # noqa: E402

import hd_pissa  # noqa: E402
import train  # noqa: E402
from tutorial.experiments import job  # noqa: E402
from tutorial.experiments.arms import ARMS, complete, grid  # noqa: E402

TIMED = ("full", "lora", "pissa", "dora", "hira", "mora", "hd", "hd global", "pissa r=16",
         "hd K=1", "hd K=2", "hd K=4", "hd K=16")


def step_times(name: str, steps: int, batch: int) -> list[float]:
    """Seconds of each of `steps` steps, the first one left out."""
    base, guess, *_ = ARMS[name]
    c = complete(base | {"lr": grid(guess) / 100, "batch": batch, "steps": steps + 1})
    rows, _ = job.data("all", 16)
    model, _, _ = train.load_model(str(train.DATA / "base.pt"), 0)
    adapters, optimizer = job.attach(model, c)
    times, began = [], time.perf_counter()
    batches = job.batches(rows, c, whole_batch=False)
    for _ in hd_pissa.train(model, adapters, batches, lr=c["lr"], max_steps=c["steps"], micro_batch_size=32,
                            optimizer=optimizer, progress=False):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return times[1:]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=ROOT / "tutorial" / "results", help="folder of speed.jsonl")
    p.add_argument("--quick", action="store_true", help="one round of one step")
    args = p.parse_args(argv)
    rounds, steps, batch = (1, 1, 16) if args.quick else (3, 8, 64)
    torch.set_num_threads(1)
    times, load = {name: [] for name in TIMED}, os.getloadavg()[0]
    for _ in range(rounds):
        for name in TIMED:
            times[name] += step_times(name, steps, batch)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "speed.jsonl", "w") as f:
        for name, seconds in times.items():
            seconds.sort()
            quartiles = seconds[len(seconds) // 4], seconds[3 * len(seconds) // 4]
            line = {"arm": name, "seconds_per_step": round(statistics.median(seconds), 4),
                    "quartiles": [round(q, 4) for q in quartiles],
                    "steps": len(seconds), "load": round(load, 1), **job.provenance()}
            print(line["arm"], line["seconds_per_step"], line["quartiles"])
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
