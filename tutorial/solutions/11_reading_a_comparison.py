"""Solutions of chapter 11's exercises."""

import math
from statistics import mean, stdev, variance


def answer_1(sweep):
    finite = {rate: loss for rate, loss in sweep.items() if math.isfinite(loss)}
    best = min(finite, key=finite.get)
    return best, best in (min(sweep), max(sweep))       # a diverged neighbour is a worse neighbour


def answer_2(a, b):
    n, gaps = len(a), [x - y for x, y in zip(a, b)]
    return mean(gaps), math.sqrt((variance(a) + variance(b)) / n), stdev(gaps) / math.sqrt(n)


def answer_3(a, b):
    lower = sorted(rate for rate in a.keys() & b.keys() if a[rate] < b[rate])
    return lower, "A" if min(a.values()) < min(b.values()) else "B"
