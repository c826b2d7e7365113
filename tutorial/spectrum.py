"""Figure of the README: singular values of dW after fine-tuning with four methods.

    pip install -r requirements.txt -r requirements-extra.txt
    python tutorial/spectrum.py                # four runs of train.py, then spectrum.json and spectrum.svg
    python tutorial/spectrum.py --plot_only    # the figure again from spectrum.json

Each method runs on the embedded model and data with the default flags of train.py, so with its default
learning rate. The layer is the feed-forward input of the third block; another one with --layer.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hd_pissa  # noqa: E402
import train  # noqa: E402

METHODS = {"full": "full fine-tuning", "hd_pissa": "HD-PiSSA", "pissa": "PiSSA", "lora": "LoRA"}


def spectra(layer: str, max_steps: int) -> dict:
    """Singular values of dW of `layer` relative to the largest, per method, and the held-out losses."""
    base = torch.load(train.DATA / "base.pt", weights_only=True)[layer]
    result = {"layer": layer, "max_steps": max_steps, "rank": 2, "shards": 8, "methods": {}}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as out:
            run = train.main(["--method", method, "--max_steps", str(max_steps), "--out", out])
            after = torch.load(Path(out) / "model.pt", weights_only=True)[layer]
        S = hd_pissa.update_spectrum(base, after)
        result["methods"][method] = {
            "lr": train.LR[method], "effective_rank": hd_pissa.effective_rank(S),
            "loss": run["after"]["all"]["loss"],
            "relative_singular_values": [float(f"{v:.4g}") for v in S / S[0]]}
    return result


def plot(result: dict, path: Path) -> None:
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams["svg.hashsalt"] = "hd_pissa"
    r, K = result["rank"], result["shards"]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for (method, label), color in zip(METHODS.items(), ("0.5", "C0", "C1", "C2")):
        values = result["methods"][method]["relative_singular_values"]
        axes.loglog(range(1, len(values) + 1), [max(v, 1e-9) for v in values], label=label, color=color)
    for x, name in ((r, "r"), (2 * r, "2r"), (2 * K * r, "2Kr")):
        axes.axvline(x, color="0.8", zorder=0)
        axes.text(x, 1.3, f"{name} = {x}", ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="index of the singular value", ylabel="relative to the largest", ylim=(1e-8, 1))
    axes.set_title(f"Singular values of ΔW ({result['layer']}, r = {r}, K = {K})", pad=18)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layer", default="blocks.2.c_fc.weight", help="name in the model's state_dict")
    parser.add_argument("--max_steps", type=int, default=train.STEPS, help="optimizer steps of each run")
    parser.add_argument("--plot_only", action="store_true", help="draw from spectrum.json without running")
    args = parser.parse_args()
    data = HERE / "spectrum.json"
    if not args.plot_only:
        data.write_text(json.dumps(spectra(args.layer, args.max_steps)) + "\n")
    plot(json.loads(data.read_text()), HERE / "spectrum.svg")
