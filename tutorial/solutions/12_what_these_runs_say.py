"""Solutions of chapter 12's exercises."""

import math
from statistics import mean, stdev


def answer_1(kind, r, K, sizes):
    n = r * sum(m + n for m, n in sizes)
    if kind.startswith("LoRA"):
        return (2 * n / K if "ZeRO" in kind else 2 * n), n, 2 * (K - 1) * n / K
    return 2 * n, K * n, (K - 1) * n * (2 if kind == "whole batch" else 1)


def answer_2(d, limit, reach):
    gap, error = mean(d), stdev(d) / math.sqrt(len(d))
    if abs(gap) > limit * error and abs(gap) >= 0.02:
        return "decided"
    return "equivalent" if abs(gap) + reach * error <= 0.02 else "undecided"


def answer_3(lines, a, b):
    losses = []
    for wanted in (a, b):
        runs = {}
        for line in lines:
            config = dict(line["config"])
            key = config.pop("lr"), config.pop("seed")
            if config == wanted:
                runs[key] = line["final"]["all"][0] if line["final"] else math.inf
        best = min((lr for lr, seed in runs if seed == 0), key=lambda lr: runs[lr, 0])
        losses.append({seed: loss for (lr, seed), loss in runs.items() if lr == best})
    return [losses[0][seed] - losses[1][seed] for seed in sorted(losses[0].keys() & losses[1].keys())]
