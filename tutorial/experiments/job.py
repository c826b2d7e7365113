"""One training run: a configuration in, one JSON record out.

The loop is hd_pissa.train; data, tokenizer and model are train.py's. A run differs from `python train.py` in
that it measures the held-out loss on the way and knows more methods (tutorial/baselines).
"""

import contextlib
import functools
import hashlib
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402
import train  # noqa: E402
from data.rows import encode, hold_out, read_rows, step_batches  # noqa: E402
from training.evaluate import evaluate  # noqa: E402
from tutorial.baselines import bases, embedding, intermediate, loraplus, mora, plain, projected  # noqa: E402
from tutorial.experiments import local  # noqa: E402
from tutorial.experiments.arms import complete  # noqa: E402

SOURCES = ("hd_pissa.py", "hd_pissa_extra.py", "train.py", "training/baselines.py", "training/evaluate.py",
           "data/rows.py", "data/base.pt", "data/multi_domain.jsonl", "data/tokenizer.tiktoken")
RUNNER = ("tutorial/experiments/job.py", "tutorial/experiments/local.py", "tutorial/baselines/plain.py",
          "tutorial/baselines/mora.py", "tutorial/baselines/intermediate.py", "tutorial/baselines/bases.py",
          "tutorial/baselines/embedding.py", "tutorial/baselines/loraplus.py",
          "tutorial/baselines/projected.py")

EVALUATIONS = 5         # on the way, the last one at the end


def file_hash(names) -> str:
    h = hashlib.blake2b(digest_size=8)
    for name in names:
        h.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return h.hexdigest()


@functools.cache
def provenance() -> dict:
    """Versions, commit and hashes that a record carries."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import peft
        versions["peft"] = peft.__version__
    return {"commit": git.stdout.strip()[:12] or None, "source": file_hash(SOURCES),
            "runner": file_hash(RUNNER), **versions}


@functools.cache
def data(domain: str, rows: int):
    """(training rows of `domain`, held-out rows of all domains), encoded."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        tokenizer = train.GPTTokenizer()
        all_rows, held = hold_out(read_rows(str(train.DATA / "multi_domain.jsonl")))
        mine = [row for row in all_rows if domain in ("all", row["domain"])]
        return encode(mine, tokenizer, 128, "train"), encode(held[:rows], tokenizer, 128, "held out")


def attach(model, c: dict):
    """(adapters, optimizer) of a configuration."""
    method, r, beside = c["method"], c["r"], []
    also = [(name, p) for name, p in model.named_parameters() if "also" in c and c["also"] in name]
    if method == "hd_pissa":
        decompose = {"svd": hd_pissa_extra.components, "orthonormal": bases.orthonormal,
                     "interleaved": bases.interleaved(c["K"]),
                     "random": bases.drawn(), "drawn": bases.drawn(c["seed"]),
                     "dct": bases.dct(c["seed"])}[c["basis"]]
        adapters = hd_pissa_extra.attach(model, r, shards=c["K"], init=c["init"], aggregate=c["aggregate"],
                                         gradients=c["gradients"], seed=c["seed"], decompose=decompose)
        beside = [embedding.Shards(p, c["K"], r, decompose, name) for name, p in also]
    elif method == "full":
        adapters = plain.full(model, 8, c["seed"])
    elif method == "linear":
        adapters = plain.linear(model, 8, c["seed"], c.get("also"))
    elif method in ("galore", "apollo"):
        adapters = plain.linear(model, 8, c["seed"])
        kind = projected.GaLore if method == "galore" else projected.Apollo
        return adapters, kind(adapters.parameters(), c["lr"], r, seed=c["seed"])
    elif method == "mora":
        adapters = mora.attach(model, r, 8, c["seed"])
    elif method == "intermediate":
        adapters = intermediate.Intermediate(model, r, c["K"], c["seed"])
    else:
        adapters = plain.with_peft(model, method, r, 8, c["seed"], c.get("alpha"), c.get("rslora", False))
        beside = [embedding.LowRank(p, r, method, name, c["seed"]) for name, p in also]
    if c.get("optimizer") == "muon":
        return adapters, bases.Muon(adapters.parameters(), c["lr"])
    if "ratio" in c:
        return adapters, loraplus.adamw(adapters.named_parameters(), c["lr"], c["ratio"])
    parameters = adapters.parameters() + [p for one in beside for p in one.parameters()]
    optimizer = torch.optim.AdamW(parameters, c["lr"], (0.9, c.get("beta2", 0.999)), weight_decay=0.0,
                                  foreach=True)
    for one in beside:
        one.join(optimizer)
    if "shared" in c:
        local.SharedMoments(adapters, optimizer, c["shared"])
    if "feedback" in c:
        local.Feedback(model, adapters, optimizer, c["feedback"], c["seed"])
    return adapters, optimizer


def batches(rows, c: dict, whole_batch: bool):
    """train.py's step batches. A gradient of the whole batch does not depend on the order of rows, so they
    are sorted by length there: less padding, the same rows. Shards with mini-batches of their own keep order.
    """
    for batch in step_batches(rows, c["batch"], c["seed"]):
        if "group" in c:
            batch = local.grouped(batch, c["K"], c["group"])
        yield sorted(batch, key=lambda row: len(row[0])) if whole_batch else batch


def rounded(values, digits: int = 4) -> list:
    return [float(f"{float(v):.{digits}g}") for v in values]


def run(config: dict) -> dict:
    """Train `config` and return its record; a run whose loss is not finite has "final": None."""
    c = complete(config)
    torch.set_num_threads(1)
    rows, held = data(c["domain"], c["rows"])
    model, _, _ = train.load_model(str(train.DATA / "base.pt"), 0)
    model = model.double() if c["dtype"] == "float64" else model
    names = [name for name, _ in hd_pissa.find_layers(model, "all-linear")[0]]
    start = {name: model.get_parameter(name + ".weight").detach().clone() for name in names}
    adapters, optimizer = attach(model, c)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    devices = c["K"] if c["method"] in ("hd_pissa", "intermediate") else 1
    every, curve, train_losses = max(1, c["steps"] // EVALUATIONS), [], []
    seconds, began = 0.0, time.perf_counter()
    record = {"config": c, **provenance(), "trained": trained // devices, "final": None}
    try:
        for step in hd_pissa.train(model, adapters, batches(rows, c, adapters.whole_batch), lr=c["lr"],
                                   max_steps=c["steps"], schedule=c["schedule"], micro_batch_size=32,
                                   optimizer=optimizer, progress=False):
            seconds += time.perf_counter() - began
            train_losses.append(step["loss"])
            if not math.isfinite(step["loss"]) or step["loss"] > 50:
                raise ValueError(f"not finite or far too high: loss {step['loss']} at {step['step']}")
            if step["step"] % every == 0 and step["step"] < c["steps"]:
                with getattr(adapters, "result", contextlib.nullcontext)():
                    now = evaluate(model, held, "cpu", 32)["all"]
                curve.append([step["step"], *rounded((now["loss"], now["exact_match"]), 6)])
            began = time.perf_counter()
    except ValueError as e:
        if "not finite" not in str(e) and "NaN" not in str(e):
            raise
        return record | {"diverged": " ".join(str(e).split())[:120]}
    # numbers of optimizer state that one device holds, and constants beside W
    moments = sum(t.numel() for state in optimizer.state.values() for t in state.values()
                  if isinstance(t, torch.Tensor) and t.numel() > 1) // devices
    constants = trained if c["method"] == "hd_pissa" else 0      # A_i, B_i of all shards: as many numbers
    for p in adapters.parameters():
        p.grad = None
    adapters.detach_()
    table = evaluate(model, held, "cpu", 32)
    record["final"] = {name: rounded((row["loss"], row["exact_match"]), 6) for name, row in table.items()}
    curve.append([c["steps"], *record["final"]["all"]])
    k = max(1, len(train_losses) // EVALUATIONS)
    record |= {"curve": curve, "train_loss": rounded([sum(train_losses[a:a + k]) / len(train_losses[a:a + k])
                                                      for a in range(0, len(train_losses), k)], 5),
               "moments": moments, "constants": constants, "seconds_per_step": round(seconds / c["steps"], 4)}
    spectra = {name: hd_pissa.update_spectrum(start[name], model.get_parameter(name + ".weight"))
               for name in names}
    record["effective_rank"] = [hd_pissa.effective_rank(S) for S in spectra.values()]
    last = [name for name in names if name.endswith("c_fc")][-1]
    record["spectrum"] = {"layer": last, "sigma": rounded(spectra[last])}
    return record
