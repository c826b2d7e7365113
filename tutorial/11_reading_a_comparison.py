"""Chapter 11: sweeps, seeds and pairs from the raw lines of results/, and the rule that judges a gap."""

import json
import math
from statistics import covariance, mean, stdev, variance

from lesson import HERE, check, save_figure

from tutorial.experiments.verdict import t_limit, verdict

COMMON = dict(steps=120, batch=64, domain="all", rows=400, schedule="cosine", dtype="float32")
HD = dict(method="hd_pissa", r=2, K=8, init="hd_pissa", basis="svd", optimizer="adamw")
METHODS = {"LoRA r=2": dict(method="lora", r=2), "PiSSA r=2": dict(method="pissa", r=2),
           "HD-PiSSA": HD | dict(gradients="local", aggregate="mean"),
           "whole batch": HD | dict(gradients="global", aggregate="sum"),
           "PiSSA r=16": dict(method="pissa", r=16)}
LORA, PISSA, LOCAL, WHOLE, WIDE = METHODS
runs = {}                               # {configuration without rate and seed: {(rate, seed): run}}
for line in (HERE / "results" / "runs.jsonl").read_text().splitlines():
    run = json.loads(line)
    run["loss"] = run["final"]["all"][0] if run["final"] else math.inf          # diverged
    key = run["config"].pop("lr"), run["config"].pop("seed")
    runs.setdefault(json.dumps(run["config"], sort_keys=True), {})[key] = run


# %% An arm: a sweep on seed 0, then more seeds at its best rate. A rule: what a gap between two arms says.
class Arm:
    def __init__(self, runs):
        self.curves = {rate: run["curve"] for (rate, seed), run in sorted(runs.items()) if seed == 0}
        self.sweep = {rate: runs[rate, 0]["loss"] for rate in self.curves}
        self.best = min(self.sweep, key=self.sweep.get)
        self.losses = [runs[self.best, seed]["loss"] for seed in (0, 1, 2)]


def judge(a, b, margin=0.02):
    """(gap, its paired standard error, verdict) of the losses of two methods on the same seeds."""
    d = [x - y for x, y in zip(a, b)]
    gap, error = mean(d), stdev(d) / len(d)**0.5
    if abs(gap) > t_limit(0.95, len(d) - 1) * error and abs(gap) >= margin:
        return gap, error, "decided"
    if abs(gap) + t_limit(0.90, len(d) - 1) * error <= margin:
        return gap, error, "equivalent"
    return gap, error, "undecided"


# %% fold: What is printed: rates, then pairs of methods
arms = {name: Arm(runs[json.dumps(COMMON | config, sort_keys=True)]) for name, config in METHODS.items()}
print("one rate for all", *(f"{name:>10}" for name in (LORA, PISSA, LOCAL)), "  lowest")
for rate in sorted(set.intersection(*(set(arms[name].sweep) for name in (LORA, PISSA, LOCAL)))):
    loss = {name: arms[name].sweep[rate] for name in (LORA, PISSA, LOCAL)}
    print(f"{rate:16}", *(f"{x:10.3f}" for x in loss.values()), f"  {min(loss, key=loss.get)}")
print("\nbest rate   at step 120   at step 24")
for name, arm in arms.items():
    early = min(curve[0][1:2] + [rate] for rate, curve in arm.curves.items() if curve)[1]
    print(f"{name:11}  {arm.best:10}  {early:11}")
print("\na - b on seeds 0, 1, 2           gap    s.e.  paired      t  verdict")
found, errors, by_hand = {}, [], []
for a, b in ((LOCAL, LORA), (LOCAL, PISSA), (WHOLE, LOCAL), (WHOLE, WIDE)):
    x, y = arms[a].losses, arms[b].losses
    gap, error, word = found[f"{a} - {b}"] = judge(x, y)
    both = variance(x) + variance(y)
    print(f"{a + ' - ' + b:27}  {gap:+.4f}  {(both / 3)**0.5:.4f}  {error:.4f}  {gap / error:+5.1f}  {word}")
    errors, by_hand = [*errors, error], [*by_hand, ((both - 2 * covariance(x, y)) / 3)**0.5]


# %% fold: Figure and checks
def draw(axes):
    for name, arm in arms.items():
        axes[0].semilogx(*zip(*arm.sweep.items()), "o-", ms=3, label=name)
    axes[0].set(xlabel="learning rate", ylabel="held-out loss, seed 0", ylim=(1.05, 1.6))
    axes[0].legend(fontsize=7)
    for y, (gap, error, word) in enumerate(found.values()):
        axes[1].errorbar(gap, -y, xerr=t_limit(0.90, 2) * error, fmt="o", ms=4, capsize=2, label=word)
    axes[1].axvspan(-0.02, 0.02, color="0.9")
    axes[1].set(xlabel="gap, 90 % interval (grey: 0.02)", xticks=(-0.08, -0.04, 0, 0.04),
                yticks=range(0, -len(found), -1), yticklabels=found)


print()
save_figure(__file__, draw, columns=2, size=(8.0, 3.2))
exact = [p * (2 / (1 - p * p))**0.5 for p in (0.95, 0.90)]      # two degrees of freedom, in closed form
check("paired standard error from variances and covariance", errors, by_hand, rtol=1e-9)
check(f"limits of three pairs: {exact[0]:.2f}, and {exact[1]:.2f} at 90 %",
      [t_limit(p, 2) for p in (0.95, 0.9)], exact, rtol=1e-9)
words = [verdict(arms[a].losses, arms[b].losses).word for a, b in (name.split(" - ") for name in found)]
check("verdicts of the results page's rule", [w == f[2] for w, f in zip(words, found.values())], [True] * 4)
check("best rate inside its sweep", all(min(a.sweep) < a.best < max(a.sweep) for a in arms.values()), True)
