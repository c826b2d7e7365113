"""The verdict rule against printed tables of Student's t and against differences worked out by hand."""

import math

import pytest
from conftest import ROOT  # noqa: F401

from tutorial.experiments.verdict import t_inside, t_limit, verdict


@pytest.mark.parametrize("freedom, five, ten", [      # two-sided limits, from printed tables
    (1, 12.706, 6.314), (2, 4.303, 2.920), (3, 3.182, 2.353), (4, 2.776, 2.132), (5, 2.571, 2.015),
    (9, 2.262, 1.833), (10, 2.228, 1.812), (30, 2.042, 1.697)])
def test_limits_are_those_of_the_tables(freedom, five, ten):
    assert t_limit(0.95, freedom) == pytest.approx(five, abs=6e-4)
    assert t_limit(0.90, freedom) == pytest.approx(ten, abs=6e-4)


def test_probability_is_the_integral_of_the_density():
    for freedom in (1, 2, 3, 4, 7, 8):
        c = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        n, top = 4000, 2.5
        xs = [top * (i + 0.5) / n for i in range(n)]
        area = 2 * top / n * sum(c * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in xs)
        assert t_inside(top, freedom) == pytest.approx(area, abs=1e-6)


def from_differences(*d):
    return verdict([1 + x for x in d], [1.0] * len(d))


def test_the_three_words():
    # d = .03 .04 .05: mean .04, deviation .01, t = .04 sqrt(3) / .01 = 6.93 > 4.303
    found = from_differences(0.03, 0.04, 0.05)
    assert found.word == "decided" and found.t == pytest.approx(6.928, abs=1e-3) and found.pairs == 3
    # half-width of the 90 % interval: 2.920 x .01 / sqrt(3) = .01686
    assert (found.low, found.high) == pytest.approx((0.04 - 0.01686, 0.04 + 0.01686), abs=1e-5)
    # d = .00 .04 .08: mean .04, deviation .04, t = sqrt(3) < 4.303, and the interval reaches beyond .02
    assert from_differences(0.0, 0.04, 0.08).word == "undecided"
    # d = -.002 .000 .002: interval +- .0034
    assert from_differences(-0.002, 0.0, 0.002).word == "equivalent"


def test_a_sure_but_small_gap_is_not_decided():
    found = from_differences(0.0100, 0.0105, 0.0095)        # t = 34.6, interval .0092 to .0108
    assert found.t > found.limit and found.word == "equivalent"
    found = from_differences(0.0190, 0.0195, 0.0185, 0.0230)   # t = 19, interval beyond .02
    assert found.t > found.limit and 0.018 < found.gap < 0.02 < found.high and found.word == "undecided"


def test_a_level_pair_with_a_wide_interval_is_not_equivalent():
    found = from_differences(-0.03, 0.0, 0.03)
    assert found.gap == pytest.approx(0) and found.word == "undecided"


def test_sign_and_order():
    a, b = [1.00, 1.10, 1.20], [1.05, 1.14, 1.26]
    one, other = verdict(a, b), verdict(b, a)
    assert one.gap == pytest.approx(-0.05) and one.t == pytest.approx(-other.t) and one.word == other.word


def test_equal_differences_and_too_few():
    assert verdict([1.25, 2.25], [1.0, 2.0])[:3] == ("decided", 0.25, math.inf)
    assert verdict([1.0, 2.0], [1.0, 2.0]).word == "equivalent"
    assert verdict([1.0], [2.0]).word == "undecided" and verdict([], []).word == "undecided"


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="same seeds"):
        verdict([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="diverged"):
        verdict([1.0, math.inf], [1.0, 1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_limit(1.0, 2)
