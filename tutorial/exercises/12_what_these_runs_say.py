"""Checks of chapter 12's exercises: python tutorial/exercises/12_what_these_runs_say.py my_answers.py"""

from statistics import mean

from grade import main

from training.dry_run import hd_pissa_numbers, lora
from tutorial.experiments.verdict import t_limit, verdict

KINDS = {"LoRA": lambda n, K: lora(n, K, 1, 0), "LoRA, ZeRO-1": lambda n, K: lora(n, K, 1, 1),
         "local": lambda n, K: hd_pissa_numbers(n, K, K),
         "whole batch": lambda n, K: hd_pissa_numbers(n, K, K, gradients="global")}


def check_1(answer):
    """Oracle: the formulas of train.py --dry_run, which tests compare with measured memory."""
    for r, K, sizes in ((2, 8, [(16, 48), (64, 32)]), (16, 4, [(40, 24)])):
        for kind, numbers in KINDS.items():
            wanted = numbers(r * sum(map(sum, sizes)), K)
            got = answer(kind, r, K, sizes)
            assert isinstance(got, tuple) and len(got) == 3, "return (moments, factors held, received)"
            for what, x, key in zip(("moments", "factors", "received numbers"), got,
                                    ("moments", "factors", "received")):
                assert x == wanted[key], f"{kind}, r = {r}, K = {K}: the {what} are {wanted[key]:g}, not {x}"


def check_2(answer):
    """Oracle: tutorial/experiments/verdict.py."""
    for d in ((0.03, 0.04, 0.05), (-0.03, -0.04, -0.05), (0.0, 0.04, 0.08), (-0.002, 0.0, 0.002),
              (0.0100, 0.0105, 0.0095), (0.0190, 0.0195, 0.0185, 0.0230), (-0.03, 0.0, 0.03)):
        wanted, n = verdict(d, [0.0] * len(d)), len(d) - 1
        got = answer(list(d), t_limit(0.95, n), t_limit(0.90, n))
        assert got == wanted.word, (f"differences {d}: gap {wanted.gap:.4f}, t {wanted.t:.1f}, interval "
                                    f"{wanted.low:.4f} to {wanted.high:.4f}, so {wanted.word}, not {got}")


def by_significance_alone(d, limit, reach):
    gap = mean(d)
    error = (sum((x - gap)**2 for x in d) / (len(d) - 1) / len(d))**0.5
    return "decided" if abs(gap) > limit * error else "equivalent"


WRONG_2 = [by_significance_alone, lambda *_: "undecided"]


def run(method, lr, seed, loss):
    return {"config": {"method": method, "r": 2, "lr": lr, "seed": seed},
            "final": None if loss is None else {"all": [loss, 0.0]}}


# a is best at 0.02 on seed 0, though lower elsewhere on others; b at 0.04, and has no seed 2
LINES = [run("a", 0.01, 0, 1.3), run("a", 0.02, 0, 1.1), run("a", 0.04, 0, None), run("a", 0.01, 1, 0.2),
         run("a", 0.02, 1, 1.25), run("a", 0.02, 2, 1.0), run("b", 0.02, 0, 1.2), run("b", 0.04, 0, 1.0),
         run("b", 0.04, 1, 1.5), run("b", 0.02, 2, 0.5), run("c", 0.02, 0, 0.1)]
WANTED = [1.1 - 1.0, 1.25 - 1.5]


def check_3(answer):
    """Oracle: eleven lines read by eye."""
    got = answer(LINES, {"method": "a", "r": 2}, {"method": "b", "r": 2})
    assert isinstance(got, list) and len(got) == len(WANTED), \
        "seeds 0 and 1 are there for both at their best rates, so return a list of two differences"
    for seed, x, y in zip((0, 1), got, WANTED):
        assert abs(x - y) < 1e-12, f"on seed {seed} a - b is {y:.2f} at their own best rates, not {x:.2f}"


if __name__ == "__main__":
    main(globals())
