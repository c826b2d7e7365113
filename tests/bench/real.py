"""A real 135M-parameter model on real rows: held-out loss before and after, four methods at equal tokens.

    python ../shared/real/make_smollm2.py smollm2 && python tests/bench/real.py smollm2

SmolLM2-135M-Instruct, K = 8 shards of rank 16 in one process, 5 % of the rows held out. Every method gets the
same rows and steps, and one learning rate that was not swept: the table says that the runs work, not which
method is best. Rows come from HD_PISSA_REAL (default ../shared/real). Finished runs stand in real.json and
are not done again, so that --steps 200 can be given an evening at a time.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

REAL = Path(os.environ.get("HD_PISSA_REAL", ROOT.parent / "shared" / "real"))
RATES = {"hd_pissa": 1e-3, "pissa": 5e-4, "lora": 1e-3, "full": 4e-5}
FLAGS = ("--rank 16 --shards 8 --batch_size 8 --micro_batch_size 8 --block_size 192 --max_steps {steps} "
         "--eval_rows 32 --save_minutes 0")  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", help="folder that make_smollm2.py wrote")
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    path = Path(__file__).with_suffix(".json")
    done = json.loads(path.read_text()) if path.exists() else []

    def run(data: str, method: str, lr: float) -> dict:
        flags = f"--data {data} --method {method} --lr {lr:g} {FLAGS.format(steps=args.steps)}"
        for row in done:
            if row["flags"] == flags:
                return row
        real = flags.replace(data, shlex.quote(str(REAL / data)))
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            result = train.main([*shlex.split(real), "--model", args.model, "--out", out,
                                 "--threads", str(args.threads)])  # fmt: skip
        before, after = (result[when]["all"]["loss"] for when in ("before", "after"))
        row = {"flags": flags, "data": data, "method": method, "lr": lr, "before": before, "after": after,
               "minutes": (time.perf_counter() - start) / 60}  # fmt: skip
        done.append(row)
        path.write_text(json.dumps(done, indent=1) + "\n")
        return row

    for data in ("commonsense_train_5k.jsonl", "gsm8k_train.jsonl"):
        for method, lr in RATES.items():
            run(data, method, lr)
    for row in done:
        print(f"{row['before']:.4f} -> {row['after']:.4f}  python train.py --model smollm2 {row['flags']}")


if __name__ == "__main__":
    main()
