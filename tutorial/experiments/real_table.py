"""What the runs on the real model say: an arm a row, then the pairs of PROTOCOL.md with their verdicts.

    python tutorial/experiments/real_table.py [--runs FILE]
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from tutorial.experiments import real, run  # noqa: E402
from tutorial.experiments.verdict import table, verdict  # noqa: E402

NAMES = {"published": "HD-PiSSA as published", "lora": "LoRA r=2", "whole": "whole batch, SVD basis",
         "lora r=16": "LoRA r=16", "dct": "whole batch, basis from a seed",
         "random": "whole batch, random basis", "full": "full fine-tuning", "hira": "HiRA r=2",
         "pissa r=16": "PiSSA r=16",
         "dct embedding": "whole batch, basis from a seed, with embedding",
         "lora r=16 embedding": "LoRA r=16, with embedding"}


class Arm:
    """The runs of one arm.

        sweep   {lr: validation loss on seed 0, infinite where it diverged}
        best    index in the grid of the best rate, None until it has worse neighbours
        tests   {seed: test loss} at the best rate, of the seeds that chose nothing
    """

    def __init__(self, name: str, done: dict):
        self.name, base = name, real.ARMS[name][0]
        mine = [r for r in done.values() if r["config"] == real.COMMON | base | {
            key: r["config"][key] for key in ("lr", "seed")}]
        self.sweep = {r["config"]["lr"]: real.loss_of(r) for r in
                      sorted(mine, key=lambda r: r["config"]["lr"]) if r["config"]["seed"] == real.SWEEP}
        self.best = real.sweep(name, done)[1]
        self.lr = None if self.best is None else real.complete(name, self.best, 0)["lr"]
        self.tuned = [r for r in mine if r["config"]["lr"] == self.lr]
        self.tests = {r["config"]["seed"]: math.inf if r["test"] is None else r["test"] for r in self.tuned
                      if r["config"]["seed"] != real.SWEEP}


def load(path: Path = real.RESULTS) -> dict[str, Arm]:
    done = run.read(path)
    return {name: Arm(name, done) for name in real.ARMS}


def compare(a: Arm, b: Arm):
    """The Verdict on a - b over their common seeds; None before both are tuned and have two of them."""
    seeds = sorted(set(a.tests) & set(b.tests))
    finite = all(math.isfinite(arm.tests[seed]) for arm in (a, b) for seed in seeds)
    if len(seeds) < 2 or not finite:
        return None
    return verdict([a.tests[seed] for seed in seeds], [b.tests[seed] for seed in seeds])


def rows(arms: dict[str, Arm]) -> list[str]:
    lines = ["| arm | rate | validation, seed 0 | test, other seeds | seeds | moments a device | "
             "with ZeRO-1 | factors held |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, arm in arms.items():
        if not arm.sweep:
            continue
        lr = min(arm.sweep, key=arm.sweep.get)
        rate = f"{lr:g}" if arm.best is not None else f"{lr:g}, sweep not finished"
        tests = list(arm.tests.values())
        test = f"{statistics.mean(tests):.3f}" if tests else "-"
        if len(tests) > 1 and all(map(math.isfinite, tests)):
            test += f" ± {statistics.stdev(tests):.3f}"
        held = next((r for r in arm.tuned if "moments" in r), None)
        numbers = [f"{held[key]:,}" if held else "-" for key in ("moments", "moments_zero1", "factors")]
        lines.append(f"| {NAMES[name]} | {rate} | {arm.sweep[lr]:.3f} | {test} | {len(tests)} | "
                     + " | ".join(numbers) + " |")
    return lines


def pairs(arms: dict[str, Arm]) -> list[str]:
    return table([(NAMES[a], NAMES[b], "", compare(arms[a], arms[b])) for a, b in real.PAIRS])


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--runs", type=Path, default=real.RESULTS, help="file of results, one JSON line a run")
    arms = load(p.parse_args(argv).runs)
    print("\n".join([*rows(arms), "", *pairs(arms)]))


if __name__ == "__main__":
    main()
