"""Experiments on the embedded model and data: learning-rate sweeps, seeds, results as JSON lines.

    python tutorial/experiments/run.py                     # everything that is not in tutorial/results yet
    python tutorial/experiments/run.py methods ablations   # some experiments
    python tutorial/experiments/run.py --list              # what there is, and what is missing
    python tutorial/experiments/run.py --quick --out DIR   # every experiment at toy size

Every arm is swept: learning rates on one grid of factor 2, from two below the guess to two above, seed 0, and
on until the best one has a worse neighbour on either side; then seeds 1 and 2 at the best, and four more for
the arms of the pairs that decide (`more seeds`). A run is one line
in runs.jsonl, its key is the full configuration, and a run that is there is not made again: the command can
be stopped at any time (SIGTERM, ctrl-c) and continues.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from tutorial.experiments.arms import (  # noqa: E402
    ARMS,
    EXPERIMENTS,
    FIXED,
    MORE,
    MORE_SEEDS,
    SEEDS,
    complete,
    grid,
)

RESULTS = ROOT / "tutorial" / "results"


def key(config: dict) -> str:
    return json.dumps(config, sort_keys=True)


def loss_of(record: dict) -> float:
    """Held-out loss at the end, infinite for a run that diverged."""
    return record["final"]["all"][0] if record.get("final") else math.inf


def read(path: Path) -> dict:
    """{key: record} of a file of results; a last line cut short by a kill is dropped."""
    records = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records[key(record["config"])] = record
    return records


def missing(name: str, done: dict, quick: bool) -> tuple[list[dict], int | None]:
    """(configurations that the arm needs next, grid index of its best rate when the sweep is complete)."""
    def small(config):
        return config | ({"steps": 2, "batch": max(16, config.get("K", 0)), "rows": 16} if quick else {})

    if name in FIXED:
        runs = [complete(small(config)) for config in FIXED[name]]
        return [c for c in (runs[:1] if quick else runs) if key(c) not in done], None
    base, guess, *points = ARMS[MORE.get(name, name)]
    config = lambda i, seed: complete(small(base) | {"lr": grid(i), "seed": seed})      # noqa: E731
    if quick:
        return [c for c in [config(guess, 0)] if key(c) not in done], guess
    half = (points[0] if points else 5) // 2
    tried = range(guess - half, guess + half + 1)
    while True:
        need = [config(i, 0) for i in tried if key(config(i, 0)) not in done]
        if need:
            need.sort(key=lambda c: abs(math.log(c["lr"] / grid(guess))))
            return need, None
        best = min(tried, key=lambda i: loss_of(done[key(config(i, 0))]))
        if tried[0] < best < tried[-1]:
            break
        tried = range(min(tried[0], best - 1), max(tried[-1], best + 1) + 1)
    seeds = SEEDS + (MORE_SEEDS if name in MORE else ())
    return [c for c in (config(best, seed) for seed in seeds) if key(c) not in done], best


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")          # progress bars; an exception travels as a record


def one(config: dict) -> dict:
    from tutorial.experiments import job
    try:
        return job.run(config)
    except Exception as e:      # one broken arm must not stop the others; it is reported and not stored
        return {"config": config, "error": f"{type(e).__name__}: {e}"}


def stop(number, frame):
    raise KeyboardInterrupt


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; none: all, in this order")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of runs.jsonl")
    p.add_argument("--workers", type=int, default=2, help="processes of one thread; 0: in this process")
    p.add_argument("--quick", action="store_true", help="two steps, one rate, one seed of every arm")
    p.add_argument("--list", action="store_true", help="print what is missing and stop")
    args = p.parse_args(argv)
    if unknown := [name for name in args.experiments if name not in EXPERIMENTS]:
        p.error(f"no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    arms = list(dict.fromkeys(a for e in args.experiments or EXPERIMENTS for a in EXPERIMENTS[e]))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.jsonl"
    done = read(path)
    if args.list:
        for arm in arms:
            need, best = missing(arm, done, args.quick)
            known = "" if best is None else f", best lr {grid(best):g}"
            print(f"{arm:26} {len(need)} runs to do now{known}")
        return done

    failed, running = {}, {}

    def take(record):
        running.pop(key(record["config"]), None)
        if "error" in record:
            failed[key(record["config"])] = record
            print(f"FAILED {record['config']}: {record['error']}", flush=True)
            return
        done[key(record["config"])] = record
        with open(path, "a") as f:
            f.write(json.dumps(record) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {loss_of(record):.4f}, {record.get('seconds_per_step', 0):.2f}",
              "s/step", *(f"{k}={v}" for k, v in record["config"].items()), flush=True)

    def next_run():
        for arm in arms:
            for c in missing(arm, done | failed_as_diverged(failed), args.quick)[0]:
                if key(c) not in running and key(c) not in failed:
                    return c
        return None

    if args.workers == 0:
        while c := next_run():
            take(one(c))
        return done
    signal.signal(signal.SIGTERM, stop)
    os.nice(15)
    fresh = {"max_tasks_per_child": 20} if sys.version_info >= (3, 11) else {}
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start_worker, **fresh)
    try:
        while True:
            while len(running) < args.workers and (c := next_run()):
                running[key(c)] = pool.submit(one, c)
            if not running:
                break
            for result in list(running.values()):
                if result.done():
                    take(result.result())
            time.sleep(0.2)
    except BrokenProcessPool:
        p.error("a worker was killed, by lack of memory perhaps; the same command continues (--workers 1)")
    except KeyboardInterrupt:
        print(f"stopped; {len(running)} runs under way are dropped, the same command continues", flush=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
    pool.shutdown()
    return done


def failed_as_diverged(failed: dict) -> dict:
    """A run that raised counts as infinitely bad while this command runs, so that its sweep can go on."""
    return {k: {"config": r["config"], "final": None} for k, r in failed.items()}


if __name__ == "__main__":
    main()
