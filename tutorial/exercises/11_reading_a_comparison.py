"""Checks of chapter 11's exercises: python tutorial/exercises/11_reading_a_comparison.py my_answers.py"""

import math

import torch
from grade import main

# {learning rate: held-out loss}, not in order, and what one reads off: the best rate, is it at the edge
SWEEPS = [
    ({0.004: 1.3, 0.001: 1.5, 0.002: 1.2}, (0.002, False)),
    ({0.002: 1.3, 0.008: 1.1, 0.004: 1.2}, (0.008, True)),
    ({0.008: 1.3, 0.002: 1.1, 0.004: 1.2}, (0.002, True)),
    ({0.016: math.inf, 0.004: 1.4, 0.008: 1.2}, (0.008, False)),        # diverged, so a worse neighbour
    ({0.016: math.nan, 0.004: 1.4, 0.008: 1.2}, (0.008, False)),        # diverged too
    ({math.e: 1.0}, (math.e, True)),
]


def check_1(answer):
    """Oracle: sweeps read by eye."""
    for sweep, wanted in SWEEPS:
        got = answer(dict(sweep))
        assert isinstance(got, tuple) and len(got) == 2, "return the pair (best rate, is it at the edge)"
        assert got[0] == wanted[0], f"of {sweep} the best rate is {wanted[0]}, not {got[0]}"
        where = "at the edge" if wanted[1] else "not at the edge"
        assert bool(got[1]) == wanted[1], f"of {sweep} the best rate is {where}"


def first_is_edge(sweep):
    """At the edge of the dictionary, not of the rates."""
    best = min(sweep, key=lambda rate: math.inf if math.isnan(sweep[rate]) else sweep[rate])
    return best, best in (next(iter(sweep)), list(sweep)[-1])


WRONG_1 = [first_is_edge, lambda sweep: (min(sweep, key=sweep.get), False)]


def check_2(answer):
    """Oracle: c^T C c / n for c = (1, -1), with torch's covariance matrix C, and with its diagonal."""
    for n in (3, 5):
        noise = torch.randn((3, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        losses = 1.2 + 0.03 * noise[:1] + torch.tensor([[0.003], [0.006]]) * noise[1:]
        C, c = torch.cov(losses), torch.tensor([1.0, -1.0], dtype=torch.float64)
        wanted = [float(c @ losses.mean(1)), *(math.sqrt(c @ V @ c / n) for V in (C.diag().diag(), C))]
        got = answer(*losses.tolist())
        assert isinstance(got, tuple) and len(got) == 3, "return (gap, standard error, paired standard error)"
        for what, x, y in zip(("gap of the means", "standard error", "paired standard error"), got, wanted):
            assert abs(x - y) < 1e-9, f"for {n} seeds the {what} is {y:.6f}, not {x:.6f}"


# {rate: loss} of A and of B, rates at which A is lower, who is lower when each has its best rate. By hand.
PAIRS = [
    ({0.01: 1.3, 0.02: 1.2, 0.04: 1.4}, {0.01: 1.1, 0.02: 1.3, 0.04: 3.0}, [0.02, 0.04], "B"),
    ({0.04: 1.2, 0.02: 1.0}, {0.01: 1.1, 0.02: 1.2, 0.04: math.inf}, [0.02, 0.04], "A"),
    ({0.01: 1.3, 0.02: 1.2, 0.08: 1.0}, {0.01: 1.2, 0.02: 1.2, 0.04: 1.1}, [], "A"),
]


def check_3(answer):
    """Oracle: pairs of sweeps read by eye."""
    for a, b, rates, winner in PAIRS:
        got = answer(dict(a), dict(b))
        assert isinstance(got, tuple) and len(got) == 2, "return the pair (list of rates, 'A' or 'B')"
        assert list(got[0]) == rates, f"A = {a} is lower than B = {b} at {rates}, not at {got[0]}"
        assert got[1] == winner, f"at its own best rate {winner} is lower, of A = {a} and B = {b}"


def any_rate(a, b):
    """A rate that was run for A alone compares nothing."""
    lower = sorted(rate for rate in a if a[rate] < b.get(rate, math.inf))
    return lower, "AB"[min(b.values()) < min(a.values())]


WRONG_3 = [any_rate, lambda a, b: (sorted(r for r in a if r in b and a[r] < b[r]), "A"),
           lambda a, b: ([r for r in a if r in b and a[r] < b[r]], "AB"[min(b.values()) < min(a.values())])]


if __name__ == "__main__":
    main(globals())
