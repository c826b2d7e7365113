"""W in bfloat16 at two bytes against exact halves and float32: held-out loss, and how much of dW arrives.

    python tests/bench/rounding.py                 # 24 runs of 40 steps; it goes on where it stopped

Matrix products are bfloat16 in all runs, so W alone differs. `applied` is measured in one layer a step, in
the first 8 rows of its weight: (W' - W) . dW / |dW|^2, 1 where everything arrives.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT, OUT = Path(__file__).resolve().parents[2], Path(__file__).with_suffix(".json")
WEIGHTS = {"float32": ["--dtype", "autocast"], "bfloat16, exact halves": ["--dtype", "bfloat16"],
           "bfloat16 at two bytes": ["--dtype", "bfloat16", "--rounding", "stochastic"]}
RATES = {"the paper's rate": ["--lr", "2e-5"], "the tuned rate": []}
SEEDS = (0, 1, 2, 3)


def run(flags: list[str]) -> dict:
    """Held-out losses of one run, mean and standard deviation of `applied` over its steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--threads", "1", "--device", "cpu", "--max_steps", "40",
                   "--out", folder, *flags]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        result = json.loads((Path(folder) / "result.json").read_text())
        log = (Path(folder) / "log.jsonl").read_text().splitlines()
        applied = [json.loads(line)["applied"] for line in log]
    return {"before": result["before"]["all"]["loss"], "after": result["after"]["all"]["loss"],
            "applied": statistics.mean(applied), "spread": statistics.stdev(applied)}


def main() -> None:
    runs = json.loads(OUT.read_text()) if OUT.exists() else {}
    todo = [(rate, kind, seed) for rate in RATES for kind in WEIGHTS for seed in SEEDS]
    for rate, kind, seed in tqdm(todo, unit="run"):
        name = f"{rate}, {kind}, seed {seed}"
        if name not in runs:
            runs[name] = run([*RATES[rate], *WEIGHTS[kind], "--seed", str(seed)])
            OUT.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
