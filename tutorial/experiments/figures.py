"""All figures, the results page and the main README's table from tutorial/results/*.jsonl.

    python tutorial/experiments/figures.py [--results DIR]
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from tutorial.experiments import page, table  # noqa: E402
from tutorial.experiments.arms import LONG, MEDIUM, SHORT  # noqa: E402

COLOURS = {"full": "black", "lora": "tab:orange", "pissa": "tab:green", "hd": "tab:blue",
           "hd global": "tab:red", "pissa r=16": "tab:olive",
           "global random": "tab:purple", "global random embedding": "tab:pink"}


SUMMARY = re.compile(r"(<!-- results: summary -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)     # in README.md


def legend(ax, size: int):
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=size)


def lengths(data, name: str) -> list:
    """(steps, arm) of the arm at every length of run that is there."""
    arms = [(SHORT, data[name])] + [(steps, data.get(f"{name}, {word}")) for steps, word in
                                    ((MEDIUM, "medium"), (LONG, "long"))]
    return [(steps, arm) for steps, arm in arms if arm and arm.there]


def rate(ax, data):
    """Held-out loss against the learning rate, seed 0."""
    for name, colour in COLOURS.items():
        sweep = {lr: loss for lr, loss in data[name].sweep.items() if math.isfinite(loss)}
        if sweep:
            ax.plot(sweep.keys(), sweep.values(), "o-", ms=3, color=colour, label=page.label(name))
    ax.set(xscale="log", yscale="log", xlabel="peak learning rate",
           ylabel="held-out loss (nats per response token)")
    legend(ax, 7)


def length(ax, data):
    """Tuned held-out loss against the number of steps, a run each; thin: on the way of the longest."""
    for name, colour in COLOURS.items():
        arms = lengths(data, name)
        if not arms:
            continue
        ax.errorbar([steps for steps, _ in arms], [arm.mean() for _, arm in arms],
                    [0 if math.isnan(arm.sd()) else arm.sd() for _, arm in arms], fmt="o-", ms=3, capsize=2,
                    color=colour, label=page.label(name))
        curve = arms[-1][1].first["curve"]
        ax.plot([c[0] for c in curve], [c[1] for c in curve], ":", lw=0.8, color=colour)
    ax.set(xscale="log", yscale="log", xlabel="steps of 64 rows", ylabel="held-out loss")
    ax.set_xticks([SHORT, MEDIUM, LONG], [str(steps) for steps in (SHORT, MEDIUM, LONG)])
    ax.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
    legend(ax, 7)


def bars(ax, data, names):
    there = [name for name in names if data[name].there]
    if not set(there) - set(COLOURS):
        return
    ax.barh(range(len(there)), [data[name].mean() for name in there],
            xerr=[0 if math.isnan(data[name].sd()) else data[name].sd() for name in there], height=0.6,
            color=["tab:blue" if name == "hd" else "tab:gray" for name in there])
    ax.set_yticks(range(len(there)), [page.label(name) for name in there], fontsize=7)
    ax.invert_yaxis()
    ax.set(xlabel="held-out loss, tuned")
    if there:
        low = min(data[name].mean() for name in there)
        ax.set_xlim(left=0.9 * low)


def devices(ax, data):
    """Held-out loss against K at fixed total batch."""
    arms = [(K, data[name]) for K, name in page.DEVICES_TRIED if data[name].there]
    if len(arms) < 2:
        return
    ax.errorbar([K for K, _ in arms], [arm.mean() for _, arm in arms],
                [0 if math.isnan(arm.sd()) else arm.sd() for _, arm in arms], fmt="o-", ms=3, capsize=2)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="K, total batch fixed", ylabel="held-out loss, tuned")


def ranks(ax, data):
    """Held-out loss against r."""
    for family, colour in (("lora", "tab:orange"), ("pissa", "tab:green"), ("hd", "tab:blue")):
        arms = [(r, arm) for r, arm in page.by_rank(data, family)]
        if len(arms) > 1:
            ax.plot([r for r, _ in arms], [arm.mean() for _, arm in arms], "o-", ms=3, color=colour,
                    label=page.label(family).partition(" r=")[0])
    ax.set_xscale("log", base=2)
    ax.set(xlabel="r", ylabel="held-out loss, tuned")
    legend(ax, 7)


def spectrum(ax, data):
    """Singular values of dW of one layer at each method's best learning rate."""
    for name, colour in COLOURS.items():
        if data[name].there and name not in ("pissa r=16", "global random", "global random embedding"):
            S = data[name].first["spectrum"]["sigma"]
            ax.semilogy(range(1, len(S) + 1), [s / S[0] for s in S], color=colour, label=page.label(name))
    ax.set(xlabel="index", ylabel="singular value / largest", ylim=(1e-8, 2))
    legend(ax, 7)


def tail(ax, data):
    """sigma_{2Kr+1} / sigma_1 against lr, float32 and float64."""
    for steps, style in ((25, "--"), (100, "-")):
        for dtype, colour in (("float32", "tab:blue"), ("float64", "tab:red")):
            points = sorted((lr, value) for (lr, s, d), value in page.tails(data).items()
                            if (s, d) == (steps, dtype))
            if points:
                ax.loglog(*zip(*points), "o" + style, ms=3, color=colour, label=f"{dtype}, {steps} steps")
    ax.set(xlabel="learning rate", ylabel="beyond 2Kr: largest singular value / σ₁")
    legend(ax, 7)


def domains(ax, data):
    """Effective rank of dW after full fine-tuning on one domain, mean over layers."""
    found = page.domain_ranks(data)
    for j, lr in enumerate(sorted({lr for _, lr in found})):
        mine = [(d, ranks) for (d, there), ranks in found.items() if there == lr]
        ax.bar([i + 0.35 * j for i in range(len(mine))], [statistics.mean(ranks) for _, ranks in mine], 0.33,
               label=f"lr {lr:g}")
        ax.set_xticks([i + 0.17 for i in range(len(mine))], [d for d, _ in mine], fontsize=7)
    ax.set(ylabel="effective rank of ΔW, of 128")
    legend(ax, 7)


def mute(ax, data):
    """Errors of forward and gradients against gamma."""
    for setting, colour in (("dense", "tab:gray"), ("skinny", "tab:blue"),
                            ("skinny, loss / 1e4", "tab:green"), ("skinny, flushed", "tab:red")):
        points = [(r["gamma"], r["gradients"]) for r in data["mute"]
                  if r["reading"] == setting and r["gradients"]]
        if points:
            ax.loglog(*zip(*points), "o-", ms=2, lw=0.8, color=colour, label="gradients, " + setting)
    points = [(r["gamma"], r["logits"]) for r in data["mute"] if r["reading"] == "skinny"]
    if points:
        ax.loglog(*zip(*points), "k--", lw=0.8, label="logits")
    ax.set(xlabel="γ", ylabel="relative error")
    legend(ax, 6)


ABLATIONS = ("hd", "hd top", "hd lora init", "intermediate", "lora", "pissa")
BEYOND = ("hd", "hd interleaved", "pissa r=16", "hd global", "global orthonormal", "global orthonormal muon",
          "global random", "global random embedding", "full")
FIGURES = {
    "rate": rate, "length": length, "devices": devices, "ranks": ranks, "spectrum": spectrum, "tail": tail,
    "domains": domains, "mute": mute,
    "ablations": lambda ax, data: bars(ax, data, ABLATIONS),
    "beyond": lambda ax, data: bars(ax, data, BEYOND),
}


def draw(data, folder: Path) -> list[Path]:
    """Write every figure as SVG, the same bytes for the same data and matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise SystemExit('figures need matplotlib: pip install ".[tutorial]"') from None
    matplotlib.rcParams |= {"svg.hashsalt": "hd-pissa", "svg.fonttype": "none", "font.size": 8}
    written = []
    for name, function in FIGURES.items():
        figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
        function(ax, data)
        if ax.has_data():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            written.append(folder / f"{name}.svg")
        else:
            (folder / f"{name}.svg").unlink(missing_ok=True)        # of data that are gone
        plt.close(figure)
    return written


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--results", type=Path, default=table.RESULTS,
                   help="folder of *.jsonl; page and figures go there")
    args = p.parse_args(argv)
    data = table.load(args.results)
    written = draw(data, args.results)
    text = page.page(data, {path.name for path in written})
    (args.results / "README.md").write_text(text)
    if args.results == table.RESULTS:
        readme = ROOT / "README.md"
        text = page.summary(data)
        readme.write_text(SUMMARY.sub(lambda block: block[1] + text + block[2], readme.read_text()))
    print(f"{len(written)} figures and README.md in {args.results}")


if __name__ == "__main__":
    main()
