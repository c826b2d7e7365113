"""The comparison of PROTOCOL.md on a real model: SmolLM2-135M-Instruct on data/multi_domain.jsonl.

    python tutorial/experiments/real.py --model DIR                          # every arm: sweeps, then seeds
    python tutorial/experiments/real.py --model DIR --arms published "lora"  # some of them
    python tutorial/experiments/real.py --model DIR --list                   # what is missing

DIR is a Hugging Face folder of the model. A run is one line in the file that --out names, written when it
ends; its key is the full configuration, and a run that is there is not made again. So the command can be
stopped at any time and continues.

The loop is a short one of its own, not hd_pissa.train: that one asks the model for the logits of every
position, and here the head, a fifth of the model, sees the response tokens alone. Adapters, shards and merge
are hd_pissa's; a test holds the loop against hd_pissa.train.
"""

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402
import train  # noqa: E402
from data.rows import read_rows, step_batches  # noqa: E402
from hd_pissa_extra import attach as attach_shards  # noqa: E402
from training.models import hugging_face  # noqa: E402
from tutorial.baselines import bases, embedding, plain  # noqa: E402
from tutorial.experiments import job, run  # noqa: E402

RESULTS = ROOT / "tutorial" / "results" / "real_runs.jsonl"
SOURCES = job.SOURCES[:4] + ("training/models.py", "tutorial/baselines/plain.py",
                             "tutorial/baselines/bases.py",
                             "tutorial/baselines/embedding.py", "tutorial/experiments/real.py")
SWEEP, SEEDS, BLOCK = 0, (1, 2, 3), 128
VALIDATION, TEST, POINTS = 200, 400, 3
COMMON = {"data": "multi_domain", "K": 8, "steps": 80, "batch": 32}
EMBEDDING = "embed_tokens"

WHOLE = {"method": "hd_pissa", "r": 2, "gradients": "global", "aggregate": "sum"}
# An arm: its configuration, and the index in the grid 1e-3 2^i of the middle one of its first three rates.
# In the order in which they are swept.
ARMS = {
    "published": ({"method": "hd_pissa", "r": 2, "gradients": "local", "aggregate": "mean",
                   "basis": "svd"}, 4),
    "lora": ({"method": "lora", "r": 2}, 3),
    "whole": (WHOLE | {"basis": "svd"}, 2),
    "lora r=16": ({"method": "lora", "r": 16}, 2),
    "dct": (WHOLE | {"basis": "dct"}, 2),
    "random": (WHOLE | {"basis": "random"}, 2),
    "full": ({"method": "full"}, -3),
    "hira": ({"method": "hira", "r": 2}, 4),
    "pissa r=16": ({"method": "pissa", "r": 16}, 1),
    "dct embedding": (WHOLE | {"basis": "dct", "also": EMBEDDING}, 2),
    "lora r=16 embedding": ({"method": "lora", "r": 16, "also": EMBEDDING}, 2),
}
# In the order in which seeds 1 to 3 are run: the pairs of PROTOCOL.md, one after the other; and one more, of
# HiRA, since its runs were there.
PAIRS = (("published", "lora"), ("whole", "published"), ("dct", "lora r=16"), ("dct", "whole"),
         ("dct", "random"), ("dct embedding", "lora r=16 embedding"), ("dct embedding", "full"),
         ("dct", "hira"))


def complete(arm: str, i: int, seed: int, quick: bool = False) -> dict:
    """The key of a run: arm `arm` at rate number `i` of the grid."""
    small = {"steps": 2, "batch": 16} if quick else {}
    return COMMON | small | ARMS[arm][0] | {"lr": float(f"{1e-3 * 2.0 ** i:.6g}"), "seed": seed}


# ---- Rows --------------------------------------------------------------------------------------------------


def split(rows: list[dict], validation: int = VALIDATION, test: int = TEST) -> tuple[list, list, list]:
    """(training, validation, test) rows, by the hash of the instruction: rows that share it stay together."""
    keys = [hashlib.blake2b(row["instruction"].encode(), digest_size=16).digest() for row in rows]
    order = sorted(set(keys))
    if len(order) <= validation + test:
        raise ValueError(f"{len(order)} different instructions leave nothing to train on beside {validation} "
                         f"and {test}; give more rows")
    place = {key: i for i, key in enumerate(order)}
    parts = [], [], []
    for row, key in zip(rows, keys):
        parts[1 if place[key] < validation else 2 if place[key] < validation + test else 0].append(row)
    return parts


def encode(rows: list[dict], tokenizer) -> list[tuple[list[int], int]]:
    """(tokens, prompt length) in the chat format without a system message, cut at BLOCK tokens."""
    encoded = []
    for row in rows:
        text = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer.hf(text, add_special_tokens=False)["input_ids"]
        if len(prompt) < BLOCK:
            encoded.append(((prompt + tokenizer.response(row["response"]))[:BLOCK], len(prompt)))
    return encoded


@functools.cache
def data(folder: str) -> tuple[list, list, list]:
    tokenizer = hugging_face(folder, weights=False)[1]
    return tuple(encode(part, tokenizer) for part in split(read_rows(str(train.DATA / "multi_domain.jsonl"))))


# ---- Loss and step -----------------------------------------------------------------------------------------


def response_loss(model, x, y) -> torch.Tensor:
    """Sum of token losses where y >= 0. The output head sees those positions alone."""
    hidden = model.get_decoder()(input_ids=x, use_cache=False).last_hidden_state        # (b, t, width)
    there = y >= 0                                                                      # (b, t)
    logits = model.get_output_embeddings()(hidden[there])                               # (tokens, vocabulary)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y[there],
                           reduction="sum")


def evaluate(model, rows, autocast: bool = True) -> float:
    """Mean loss in nats per response token."""
    order, total, count = sorted(range(len(rows)), key=lambda j: len(rows[j][0])), 0.0, 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for a in range(0, len(rows), 50):
            x, y = hd_pissa.pad([rows[j] for j in order[a:a + 50]], "cpu")
            total += float(response_loss(model, x, y).detach())
            count += int((y >= 0).sum())
    return total / count


def gradients(model, adapters, batch, micro_batch: int = 16, autocast: bool = True) -> float:
    """Fill the gradients of one step of `batch`; the mean loss before it.

    Local gradients: shard i sees its own rows and the mean over their response tokens. A gradient of the
    whole batch does not depend on the order of its rows: sorted by length there is less padding.
    """
    local = not adapters.whole_batch
    size = len(batch) // adapters.K if local else micro_batch
    batch = batch if local else sorted(batch, key=lambda row: len(row[0]))
    parts = [batch[a:a + size] for a in range(0, len(batch), size)]
    counts = [sum(len(tokens) - prompt for tokens, prompt in part) for part in parts]
    total = 0.0
    for i, part in enumerate(parts):
        x, y = hd_pissa.pad(part, "cpu")
        with adapters.shard(i if local else 0):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = response_loss(model, x, y)
            (loss / (counts[i] if local else sum(counts))).backward()
        total += float(loss.detach())
    return total / sum(counts)


# ---- Arms --------------------------------------------------------------------------------------------------


def decomposition(basis: str, seed: int):
    """`decompose=` of a basis; what is drawn depends on the seed."""
    known = {"svd": hd_pissa_extra.components, "random": bases.drawn(seed), "dct": bases.dct(seed)}
    return known[basis]


def attach(model, c: dict):
    """(adapters, optimizer) of a configuration."""
    method, r, K, beside = c["method"], c.get("r"), c["K"], []
    also = [(name, p) for name, p in model.named_parameters() if "also" in c and c["also"] in name]
    if method == "hd_pissa":
        decompose = decomposition(c["basis"], c["seed"])
        adapters = attach_shards(model, r, shards=K, aggregate=c["aggregate"], gradients=c["gradients"],
                                 seed=c["seed"], decompose=decompose)
        beside = [embedding.Shards(p, K, r, decompose, name) for name, p in also]
    elif method == "full":
        adapters = plain.full(model, K, c["seed"])
    elif method == "hira":
        adapters = plain.with_peft(model, method, r, K, c["seed"])
    else:
        adapters = train.Baseline(model, method, r, K, "all-linear", None, c["seed"])
        beside = [embedding.LowRank(p, r, method, name, c["seed"]) for name, p in also]
    parameters = adapters.parameters() + [p for one in beside for p in one.parameters()]
    optimizer = torch.optim.AdamW(parameters, c["lr"], weight_decay=0.0, foreach=True)
    adapters.check(optimizer)
    for one in beside:
        one.join(optimizer)
    return adapters, optimizer


def memory(c: dict, optimizer) -> dict:
    """Numbers that one of K devices holds beside W.

    trained     that its optimizer steps
    moments     optimizer state; zero1: where the state of replicated numbers is spread over the devices
    factors     A and B of all shards, or LoRA's own; a basis from a seed is made again when it is needed
    """
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    state = sum(t.numel() for state in optimizer.state.values() for t in state.values()
                if isinstance(t, torch.Tensor) and t.numel() > 1)
    devices = c["K"] if c["method"] == "hd_pissa" else 1
    factors = 0 if c["method"] == "full" or c.get("basis") == "dct" else trained
    return {"trained": trained // devices, "trained_in_all": trained, "moments": state // devices,
            "moments_zero1": state // c["K"], "factors": factors}


@functools.cache
def provenance(folder: str) -> dict:
    import peft
    import transformers
    weights = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights.update(file.read_bytes())
    job_says = job.provenance()
    return {"commit": job_says["commit"], "source": job.file_hash(SOURCES), "model": weights.hexdigest(),
            "rows": job.file_hash(["data/multi_domain.jsonl"]), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def one(c: dict, folder: str, quick: bool = False) -> dict:
    """Make the run `c`; its record. One whose loss is not finite has "validation": None."""
    torch.set_num_threads(1)
    rows, validation, test = data(folder)
    validation, test = (validation[:8], test[:8]) if quick else (validation, test)
    began, model = time.perf_counter(), hugging_face(folder)[0].train()
    model.set_attn_implementation("eager")          # short rows: a quarter less time than fused
    record, curve, losses = {"config": c, **provenance(folder), "validation": None, "test": None}, [], []
    adapters, optimizer = attach(model, c)
    attached = time.perf_counter()
    for step, batch in zip(range(c["steps"]), step_batches(rows, c["batch"], c["seed"])):
        losses.append(gradients(model, adapters, batch))
        if not math.isfinite(losses[-1]) or losses[-1] > 50:
            return record | {"diverged": f"loss {losses[-1]} before step {step + 1}"}
        for group in optimizer.param_groups:
            group["lr"] = c["lr"] * hd_pissa.lr_factor(step, c["steps"], 0.03, "cosine")
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in (c["steps"] // 4, c["steps"] // 2):
            curve.append([step + 1, round(evaluate(model, validation), 5)])
    seconds = time.perf_counter() - attached
    held = memory(c, optimizer)
    adapters.detach_()
    final = evaluate(model, validation)
    if not math.isfinite(final):
        return record | {"diverged": f"loss {final} at the end"}
    record["validation"] = round(final, 6)
    if c["seed"] != SWEEP:
        record["test"] = round(evaluate(model, test), 6)
    k = max(1, c["steps"] // 8)
    bins = [losses[a:a + k] for a in range(0, len(losses), k)]
    return record | {"curve": curve + [[c["steps"], round(final, 5)]], **held,
                     "train_loss": [round(sum(b) / len(b), 5) for b in bins],
                     "seconds": round(seconds, 1), "seconds_attach": round(attached - began, 1)}


# ---- Which runs --------------------------------------------------------------------------------------------


def loss_of(record: dict) -> float:
    return math.inf if record["validation"] is None else record["validation"]


def sweep(arm: str, done: dict, quick: bool = False) -> tuple[list[dict], int | None]:
    """(rates that the arm needs next on seed 0, index of its best rate once that is inside)."""
    guess = ARMS[arm][1]
    tried = [guess] if quick else list(range(guess - POINTS // 2, guess + POINTS // 2 + 1))
    while True:
        keys = {i: run.key(complete(arm, i, SWEEP, quick)) for i in tried}
        need = [i for i in tried if keys[i] not in done]
        if need:
            return [complete(arm, i, SWEEP, quick) for i in sorted(need, key=lambda i: abs(i - guess))], None
        best = min(tried, key=lambda i: loss_of(done[keys[i]]))
        if quick or tried[0] < best < tried[-1]:
            return [], best
        tried = list(range(min(tried[0], best - 1), max(tried[-1], best + 1) + 1))


def missing(arms, done: dict, quick: bool = False) -> list[dict]:
    """Runs that can be made now, the next one first: all sweeps, then seeds in the order of the pairs."""
    sweeps = {arm: sweep(arm, done, quick) for arm in arms}
    need = [c for runs, _ in sweeps.values() for c in runs]
    ordered = dict.fromkeys([arm for pair in PAIRS for arm in pair] + list(ARMS))
    for arm in ordered:
        best = sweeps[arm][1] if arm in sweeps else None
        for seed in SEEDS[:1] if quick else SEEDS:
            if best is not None and run.key(c := complete(arm, best, seed, quick)) not in done:
                need.append(c)
    return need


def append(path: Path, record: dict) -> None:
    """One line, on the disk before this returns; a line that a kill has cut short is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write(json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def apart(c: dict, folder: str, quick: bool) -> dict:
    """`one` in a process of its own, which ends with this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), run.start_worker) as pool:
        result = pool.submit(one, c, folder, quick)
        try:
            return result.result()
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise SystemExit("stopped; the run under way is dropped, the same command continues") from None


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True, help="Hugging Face folder of SmolLM2-135M-Instruct")
    p.add_argument("--out", type=Path, default=RESULTS, help="file of results, one JSON line a run")
    p.add_argument("--arms", nargs="*", default=list(ARMS), help=f"of {', '.join(ARMS)}; none: all")
    p.add_argument("--same_process", action="store_true",
                   help="make the runs in this process; otherwise each has its own, and so its memory ends")
    p.add_argument("--quick", action="store_true", help="two steps of 16 rows, one rate, seeds 0 and 1")
    p.add_argument("--list", action="store_true", help="print what can be run next and stop")
    args = p.parse_args(argv)
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        p.error(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if not (Path(args.model) / "config.json").is_file():
        p.error(f"--model {args.model}: no config.json there; give the folder of a whole model")
    done = run.read(args.out)
    if args.list:
        for c in missing(args.arms, done, args.quick):
            print(json.dumps(c))
        return done
    if not args.same_process:
        signal.signal(signal.SIGTERM, run.stop)
    try:
        while need := missing(args.arms, done, args.quick):
            record = (one if args.same_process else apart)(need[0], args.model, args.quick)
            append(args.out, record)
            done[run.key(record["config"])] = record
            print(time.strftime("%H:%M:%S"), record["validation"], record["test"], record.get("seconds"),
                  *(f"{k}={v}" for k, v in record["config"].items() if k not in COMMON), flush=True)
    except KeyboardInterrupt:           # SIGTERM too
        sys.exit("stopped; the run under way is dropped, the same command continues")
    return done


if __name__ == "__main__":
    main()
