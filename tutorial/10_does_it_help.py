"""Chapter 10: the results page again from the raw lines, and how a ranking depends on the protocol."""

import json
import math
import re
from statistics import covariance, mean, median, stdev, variance

from lesson import HERE, check, save_figure

COMMON = dict(steps=120, batch=64, domain="all", rows=400, schedule="cosine", dtype="float32")
HD = dict(method="hd_pissa", r=2, K=8, init="hd_pissa", basis="svd", optimizer="adamw")
METHODS = {"full fine-tuning": dict(method="full", r=None),
           "LoRA r=2": dict(method="lora", r=2), "PiSSA r=2": dict(method="pissa", r=2),
           "HD-PiSSA K=8 r=2": HD | dict(gradients="local", aggregate="mean"),
           "HD-PiSSA, whole-batch gradients": HD | dict(gradients="global", aggregate="sum"),
           "PiSSA r=16": dict(method="pissa", r=16)}
FULL, *RANK_2, WHOLE, WIDE = METHODS
LORA, PISSA, LOCAL = RANK_2
runs = {}                               # {configuration without rate and seed: {(rate, seed): run}}
for line in (HERE / "results" / "runs.jsonl").read_text().splitlines():
    run = json.loads(line)
    run["loss"] = run["final"]["all"][0] if run["final"] else math.inf          # diverged
    key = run["config"].pop("lr"), run["config"].pop("seed")
    runs.setdefault(json.dumps(run["config"], sort_keys=True), {})[key] = run


# %% An arm: a sweep on seed 0, then more seeds at its best rate
class Arm:
    def __init__(self, runs):
        self.curves = {rate: run["curve"] for (rate, seed), run in sorted(runs.items()) if seed == 0}
        self.sweep = {rate: runs[rate, 0]["loss"] for rate in self.curves}
        self.best = min(self.sweep, key=self.sweep.get)
        self.first = runs[self.best, 0]
        self.losses = x = [run["loss"] for (rate, _), run in sorted(runs.items()) if rate == self.best]
        self.row = (self.best, mean(x), stdev(x), len(x)) if len(x) > 2 else None       # when finished


def draw(axes):
    for name, arm in arms.items():
        axes[0].semilogx(*zip(*arm.sweep.items()), "o-", ms=3)
        axes[1].errorbar(ranks[name], arm.row[1], arm.row[2], fmt="o", ms=4, capsize=2, label=name)
    axes[0].set(xlabel="learning rate", ylabel="held-out loss, seed 0", ylim=(0.9, 1.6))
    axes[1].set(xlabel="effective rank of dW", ylabel="held-out loss at its own rate", xscale="log")
    axes[1].legend(fontsize=7, loc="lower left")


finished = [arm for arm in map(Arm, runs.values()) if arm.row]
arms = {name: Arm(runs[json.dumps(COMMON | config, sort_keys=True)]) for name, config in METHODS.items()}
found = {name: arm.row for name, arm in arms.items()}
ranks = {name: median(arm.first["effective_rank"]) for name, arm in arms.items()}
print(f"{'method':31}   rate    held-out loss   rank of dW  optimizer  best at step 24")
for name, (rate, loss, sd, _) in found.items():
    early = min(curve[0][1:2] + [rate] for rate, curve in arms[name].curves.items() if curve)[1]
    memory = f"{arms[name].first['moments'] / 256:5.0f} KiB"
    print(f"{name:31}  {rate}   {loss:.3f} +- {sd:.3f}  {ranks[name]:10}  {memory}  {early:15}")
print("\none rate for all", *(f"{name:>17}" for name in RANK_2), "  lowest")
for rate in sorted(set.intersection(*(set(arms[name].sweep) for name in RANK_2))):
    loss = {name: arms[name].sweep[rate] for name in RANK_2}
    print(f"{rate:16}", *(f"{x:17.3f}" for x in loss.values()), f"  {min(loss, key=loss.get)}")
print(f"\n{'a - b on seeds 0, 1, 2':50}      gap    s.e.  paired      t")
errors, by_hand, sharded = [], [], arms[WIDE].first["moments"] / HD["K"]
for names in ((LOCAL, LORA), (LOCAL, PISSA), (WHOLE, LOCAL), (WHOLE, WIDE)):
    a, b = (arms[name].losses[:3] for name in names)
    gaps, both = [x - y for x, y in zip(a, b)], variance(a) + variance(b)
    gap, error = mean(gaps), stdev(gaps) / 3**0.5
    print(f"{' - '.join(names):50}  {gap:+.4f}  {(both / 3)**0.5:.4f}  {error:.4f}  {gap / error:+5.1f}")
    errors, by_hand = [*errors, error], [*by_hand, ((both - 2 * covariance(a, b)) / 3) ** 0.5]
limit = 0.95 * (2 / (1 - 0.95**2)) ** 0.5       # two degrees of freedom: P(|t| < x) = x / (2 + x^2)^1/2
print(f"chance alone stays within +-{limit:.2f} in 95 % of cases (Student's t, three pairs)\n")
save_figure(__file__, draw, columns=2)
check("paired standard error from variances and covariance", errors, by_hand, rtol=1e-9)
check("optimizer state of rank Kr, spread over K devices", sharded, arms[WHOLE].first["moments"])
check("best rate inside its sweep", all(min(a.sweep) < a.best < max(a.sweep) for a in finished), True)
table = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \| [^|]+ \| (\d+) \|",
                   (HERE / "results" / "README.md").read_text(), re.M)
page = [tuple(map(float, row)) for _, *row in table if int(row[-1]) >= 3]
nearest = [min((arm.row for arm in finished), key=lambda row: math.dist(row, shown)) for shown in page]
check("rows of the results page with three seeds", nearest, page, atol=5.01e-4)
first = {name: tuple(map(float, row)) for name, *row in reversed(table)}      # the names recur below
check("methods of the results page", list(found.values()), [first[name] for name in found], atol=5.01e-4)
