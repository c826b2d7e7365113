"""The rule of PROTOCOL.md: is one arm ahead of another, are they equivalent, or is it undecided?"""

import math
import statistics
from typing import NamedTuple

MARGIN = 0.02           # nats per response token: a smaller gap is called nothing


class Verdict(NamedTuple):
    """What paired losses say about a - b; t is infinite where all differences are equal and not zero."""

    word: str           # "decided", "equivalent" or "undecided"
    gap: float          # mean of a - b
    t: float
    limit: float        # |t| beyond it is significant at 5 %, two-sided
    low: float          # 90 % interval of the gap
    high: float
    pairs: int

    @property
    def outcome(self) -> str:
        """"ahead" or "behind" where it is decided, as a's loss is lower or higher; else the word."""
        return self.word if self.word != "decided" else "ahead" if self.gap < 0 else "behind"


def t_inside(t: float, freedom: int) -> float:
    """Probability that |T| < t of Student's t with a whole number of degrees of freedom: a finite sum."""
    angle = math.atan(t / math.sqrt(freedom))
    square, first = math.cos(angle) ** 2, freedom % 2
    term, total = 1.0, 0.0
    for k in range(first, freedom - 1, 2):          # 1 + 1/2 c^2 + 1.3/(2.4) c^4 ..., or 1 + 2/3 c^2 + ...
        total += term
        term *= square * (k + 1) / (k + 2)
    if not first:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)


def t_limit(inside: float, freedom: int) -> float:
    """t with probability `inside` between -t and t: 0.95 for a two-sided test at 5 %."""
    if not 0 < inside < 1 or freedom < 1:
        raise ValueError(f"t_limit({inside}, {freedom}): give a probability between 0 and 1 and one degree "
                         "of freedom or more")
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < inside:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < inside else (low, middle)
    return high


def verdict(a, b, margin: float = MARGIN) -> Verdict:
    """Compare the losses `a` with `b`, in the order of their common seeds."""
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} losses against {len(b)}: give both arms' losses on the same seeds")
    if not all(map(math.isfinite, a + b)):
        raise ValueError("a loss is not finite: report the run that diverged, and leave the pair out")
    differences = [x - y for x, y in zip(a, b)]
    n = len(differences)
    gap = statistics.mean(differences) if n else math.nan
    if n < 2:
        return Verdict("undecided", gap, math.nan, math.nan, math.nan, math.nan, n)
    error = statistics.stdev(differences) / math.sqrt(n)
    t = gap / error if error else math.copysign(math.inf, gap) if gap else 0.0
    limit, reach = t_limit(0.95, n - 1), t_limit(0.90, n - 1) * error
    if abs(t) > limit and abs(gap) >= margin:
        word = "decided"
    elif -margin <= gap - reach and gap + reach <= margin:
        word = "equivalent"
    else:
        word = "undecided"
    return Verdict(word, gap, t, limit, gap - reach, gap + reach, n)


def table(rows, what: str = "") -> list[str]:
    """Markdown of comparisons: rows of (a, b, anything that tells them apart, Verdict or None)."""
    lines = [f"| a | b |{what and f' {what} |'} gap a − b | t | limit | 90 % interval | seeds | verdict |",
             f"| --- | --- |{what and ' --- |'} --- | --- | --- | --- | --- | --- |"]
    for a, b, which, found in rows:
        names = f"| {a} | {b} |" + (f" {which} |" if what else "")
        if found is None or found.pairs < 2:
            lines.append(f"{names} - | - | - | - | {found.pairs if found else 0} | not run yet |")
        else:
            lines.append(f"{names} {found.gap:+.3f} | {found.t:.1f} | {found.limit:.1f} | "
                         f"{found.low:+.3f} to {found.high:+.3f} | {found.pairs} | {said(found)} |")
    return lines


def said(found: Verdict) -> str:
    """The verdict as a table says it, in bold where it is decided."""
    return f"**decided: a is {found.outcome}**" if found.word == "decided" else found.word
