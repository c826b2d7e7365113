"""A real 135M-parameter model on real rows: four methods at equal tokens, and what they leave on the disk.

    python ../shared/real/make_smollm2.py smollm2 && python tests/bench/real.py smollm2

SmolLM2-135M-Instruct, K = 8 shards of rank 16 in one process, 5 % of the rows held out. Every method gets the
same rows and steps, and one learning rate that was not swept: the table says that the runs work, not which
method is best. hd_pissa's runs also compare the saved folder with the model in memory, export a LoRA, and on
commonsense rows let lm-evaluation-harness score base and result on ARC-Easy. Rows come from HD_PISSA_REAL
(default ../shared/real). Finished runs stand in real.json and are not done again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import hd_pissa  # noqa: E402
import train  # noqa: E402
from training import models  # noqa: E402

REAL = Path(os.environ.get("HD_PISSA_REAL", ROOT.parent / "shared" / "real"))
RATES = {"hd_pissa": 1e-3, "pissa": 5e-4, "lora": 1e-3, "full": 4e-5}
FLAGS = ("--rank 16 --shards 8 --batch_size 8 --micro_batch_size 8 --block_size 192 --max_steps {steps} "
         "--eval_rows 32 --save_minutes 0")  # fmt: skip
CHOICES = [f"the correct answer is answer{i}" for i in (1, 2, 3, 4)]
TASK = """task: arc_easy_local
dataset_path: json
dataset_kwargs:
  data_files: rows.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{instruction}}}}"
target_delimiter: ""
doc_to_choice: {choices}
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def harness(model: str, work: Path, limit: int) -> float:
    """lm-evaluation-harness' accuracy of a model folder on ARC-Easy rows with four answers, in percent."""
    rows = [json.loads(line) for line in (REAL / "commonsense_test_ARC-Easy.jsonl").read_text().splitlines()]
    rows = [{"instruction": row["instruction"], "label": int(row["answer"][-1]) - 1} for row in rows
            if "Answer4" in row["instruction"]][:limit]  # fmt: skip
    work.mkdir()
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "arc_easy_local.yaml").write_text(TASK.format(choices=json.dumps(CHOICES)))
    where = f"pretrained={os.path.abspath(model)},dtype=float32"
    command = ["lm-eval", "run", "--model", "hf", "--model_args", where, "--device", "cpu",
               "--include_path", ".", "--tasks", "arc_easy_local", "--apply_chat_template", "--batch_size",
               "4", "--output_path", "scores"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    subprocess.run(command, cwd=work, check=True, env={**os.environ, **offline})
    (file,) = (work / "scores").rglob("results*.json")
    return 100 * json.loads(file.read_text())["results"]["arc_easy_local"]["acc,none"]


def logits_of_rows(model, tokenizer) -> torch.Tensor:
    """Logits of eight GSM8K test questions."""
    lines = (REAL / "gsm8k_test.jsonl").read_text().splitlines()[:8]
    prompts = [tokenizer.prompt(json.loads(line)["instruction"]) for line in lines]
    x, _ = hd_pissa.pad([(prompt, len(prompt) - 1) for prompt in prompts], "cpu")
    with torch.no_grad():
        return hd_pissa.logits_of(model.eval(), x)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", help="folder that make_smollm2.py wrote")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--limit", type=int, default=100, help="rows for lm-evaluation-harness")
    args = p.parse_args()
    path = Path(__file__).with_suffix(".json")
    done = json.loads(path.read_text()) if path.exists() else []
    in_memory, save_folder = [], models.save_folder

    def keeping(out, model, tokenizer, state):
        in_memory[:] = [logits_of_rows(model, tokenizer)]
        return save_folder(out, model, tokenizer, state)

    models.save_folder = keeping

    def run(data: str, method: str, lr: float) -> None:
        flags = f"--data {data} --method {method} --lr {lr:g} {FLAGS.format(steps=args.steps)}"
        flags += " --export_lora" if method == "hd_pissa" else ""
        if any(row["flags"] == flags for row in done):
            return
        real = flags.replace(data, shlex.quote(str(REAL / data)))
        with tempfile.TemporaryDirectory() as work:
            out, start = Path(work) / "out", time.perf_counter()
            result = train.main([*shlex.split(real), "--model", args.model, "--out", str(out),
                                 "--threads", str(args.threads)])  # fmt: skip
            before, after = (result[when]["all"]["loss"] for when in ("before", "after"))
            row = {"flags": flags, "data": data, "method": method, "lr": lr, "steps": args.steps,
                   "before": before, "after": after, "minutes": (time.perf_counter() - start) / 60}
            if method == "hd_pissa":
                saved, tokenizer, _ = train.load_model(str(out / "model"), 0)
                difference = (logits_of_rows(saved, tokenizer) - in_memory[0]).abs().max()
                row |= {"logits": float(difference), "lora_error": result["lora_error"]}
                del saved
            if method == "hd_pissa" and "commonsense" in data:
                names = {"harness_base": args.model, "harness": str(out / "model")}
                row |= {"harness_rows": args.limit} | {
                    name: harness(model, Path(work) / name, args.limit) for name, model in names.items()}
        done.append(row)
        path.write_text(json.dumps(done, indent=1) + "\n")

    for data in ("commonsense_train_5k.jsonl", "gsm8k_train.jsonl"):
        for method, lr in RATES.items():
            run(data, method, lr)
    for row in done:
        print(f"{row['before']:.4f} -> {row['after']:.4f}  python train.py --model smollm2 {row['flags']}")


if __name__ == "__main__":
    main()
