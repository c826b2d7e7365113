"""What the runs say: per arm the sweep, the best learning rate, mean and deviation over seeds."""

import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from tutorial.experiments import real_table  # noqa: E402
from tutorial.experiments.arms import ARMS, complete  # noqa: E402
from tutorial.experiments.run import RESULTS, loss_of, read  # noqa: E402
from tutorial.experiments.verdict import Verdict, verdict  # noqa: E402


class Arm:
    """All runs of one configuration but for learning rate and seed.

        sweep   {lr: held-out loss, seed 0}, infinite where the run diverged
        best    the lr of the lowest loss, or None
        tuned   records of all seeds at `best`
    """

    def __init__(self, name: str, config: dict, records):
        self.name, self.config = name, complete(config)
        del self.config["lr"], self.config["seed"]
        same = [r for r in records if {k: v for k, v in r["config"].items() if k not in ("lr", "seed")}
                == self.config]
        self.runs = {(r["config"]["lr"], r["config"]["seed"]): r for r in same}
        self.sweep = {lr: loss_of(r) for (lr, seed), r in sorted(self.runs.items()) if seed == 0}
        finite = {lr: loss for lr, loss in self.sweep.items() if math.isfinite(loss)}
        self.best = min(finite, key=finite.get) if finite else None
        self.tuned = [r for (lr, _), r in sorted(self.runs.items()) if lr == self.best and r["final"]]

    @property
    def interior(self) -> bool:
        """The best learning rate has a worse neighbour on either side."""
        return self.best is not None and min(self.sweep) < self.best < max(self.sweep)

    @property
    def there(self) -> bool:
        """Swept until the best is inside; the page shows no arm before that."""
        return self.interior

    def values(self, what: int = 0, domain: str = "all") -> list[float]:
        """Held-out loss (what = 0) or exact match (1) of every seed at the best learning rate."""
        return [r["final"][domain][what] for r in self.tuned]

    def mean(self, what: int = 0, domain: str = "all") -> float:
        return statistics.mean(self.values(what, domain))

    def sd(self, what: int = 0, domain: str = "all") -> float:
        values = self.values(what, domain)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def first(self) -> dict:
        return self.tuned[0]


def load(folder: Path = RESULTS) -> dict:
    """{arm name: Arm}; "records", "mute", "speed": lists of lines; "real": the arms of the real model;
    "compared": empty, where the page notes what it has compared."""
    records = list(read(folder / "runs.jsonl").values())
    data = {name: Arm(name, spec[0], records) for name, spec in ARMS.items()}
    lines = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()] \
        if (folder / name).exists() else []     # noqa: E731
    return data | {"records": records, "mute": lines("mute.jsonl"), "speed": lines("speed.jsonl"),
                   "real": real_table.load(folder / "real_runs.jsonl"), "compared": {}}


def compare(a: Arm, b: Arm) -> Verdict:
    """PROTOCOL.md's rule on a - b, seed by seed; without seed 0, which chose the rates, where three others
    are there for both."""
    losses = [{r["config"]["seed"]: loss_of(r) for r in arm.tuned} for arm in (a, b)]
    common = sorted(losses[0].keys() & losses[1].keys())
    seeds = common[1:] if common[:1] == [0] and len(common) > 3 else common
    return verdict(*([loss[seed] for seed in seeds] for loss in losses))
