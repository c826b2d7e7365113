"""Figure 8's question without training: what does the mute scalar gamma do to forward and gradients?

    python tutorial/experiments/mute.py [--quick] [--out DIR]

The paper's forward Y = X (W + gamma A B) and its rescaled gradients, in float32 and in its two readings:
the dense product A B added to W, as in the published code, or gamma (X A) B beside X W. Errors are against
float64 on the same weights: one batch of the embedded data, shard 0 of K = 8, r = 2, the base model. Where
gamma becomes too small depends on the size of the gradients and on subnormal numbers, so the second reading
is measured also with the loss divided by 1e4 and with subnormals flushed to zero. Writes mute.jsonl: per
gamma and setting the error of the logits and of the gradients, relative to their norms.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import hd_pissa  # noqa: E402
import train  # noqa: E402
from tutorial.experiments import job  # noqa: E402

GAMMAS = [10.0 ** -k for k in (2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44)]


def forward(module, x, A, B, gamma: float, reading: str):
    """The paper's muted forward of one layer in the model's dtype."""
    W = module.weight.T                                                     # (m, n)
    if reading == "dense":
        return x @ (W + gamma * (A @ B))
    return F.linear(x, module.weight) + gamma * ((x @ A) @ B)


# name: (reading, divisor of the loss, subnormals flushed to zero)
SETTINGS = {"dense": ("dense", 1.0, False), "skinny": ("skinny", 1.0, False),
            "skinny, loss / 1e4": ("skinny", 1e4, False), "skinny, flushed": ("skinny", 1.0, True)}


def gradients(model, factors: dict, batch, gamma: float, reading: str, divisor: float = 1.0):
    """(logits, {name: (g_A, g_B)}) of the paper's mechanism."""
    leaves, hooks = {}, []
    for name, (A, B) in factors.items():
        leaves[name] = (A.clone().requires_grad_(), B.clone().requires_grad_())
        hooks.append(model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, ab=leaves[name]: forward(module, inputs[0], *ab, gamma, reading)))
    x, y = batch
    logits = hd_pissa.logits_of(model, x)
    (F.cross_entropy(logits.flatten(0, 1), y.flatten()) / divisor).backward()
    for hook in hooks:
        hook.remove()
    return logits.detach(), {name: tuple(leaf.grad / gamma * divisor for leaf in ab)
                             for name, ab in leaves.items()}


def exact(model, batch, rank: int = 2, shards: int = 8):
    """(logits, gradients, factors of shard 0) of hd_pissa's mute in the model's dtype."""
    adapters = hd_pissa.attach(model, rank, shards=shards)
    x, y = batch
    with adapters.shard(0):
        logits = hd_pissa.logits_of(model, x)
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    factors = {slot.name: (slot.A[0].clone(), slot.B[0].clone()) for slot in adapters.slots}
    grads = {slot.name: tuple(leaf.grad.clone() for leaf in slot.leaves[0]) for slot in adapters.slots}
    adapters.detach_()
    return logits.detach(), grads, factors


def error(mine, reference) -> float:
    """Relative 2-norm error over all tensors together."""
    d = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(mine, reference))
    return (d / sum(float(b.double().square().sum()) for b in reference)) ** 0.5


def measure(gammas, rows: int) -> list[dict]:
    torch.set_num_threads(1)
    train_rows, _ = job.data("all", 16)
    batch = hd_pissa.pad([row[:2] for row in train_rows[:rows]], "cpu")
    model, _, _ = train.load_model(str(train.DATA / "base.pt"), 0)
    double, _, _ = train.load_model(str(train.DATA / "base.pt"), 0)
    logits32, grads32, factors = exact(model, batch)
    # The reference: the same float32 weights and factors, arithmetic in float64, gamma small but harmless.
    double = double.double()
    wide = {name: tuple(t.double() for t in ab) for name, ab in factors.items()}
    double.requires_grad_(False)
    logits64, grads64 = gradients(double, wide, batch, 1e-12, "skinny")
    flat = lambda grads: [g for pair in grads.values() for g in pair]       # noqa: E731
    records = [{"gamma": 0.0, "reading": "exact mute", "logits": error([logits32], [logits64]),
                "gradients": error(flat(grads32), flat(grads64)), "zeros": 0.0}]
    model.requires_grad_(False)
    for setting, (reading, divisor, flush) in SETTINGS.items():
        for gamma in gammas:
            torch.set_flush_denormal(flush)
            logits, grads = gradients(model, factors, batch, gamma, reading, divisor)
            torch.set_flush_denormal(False)
            lost = sum(int((a == 0).logical_and(b != 0).sum()) for a, b in zip(flat(grads), flat(grads64)))
            e = error(flat(grads), flat(grads64))
            records.append({"gamma": gamma, "reading": setting, "logits": error([logits], [logits64]),
                            "gradients": e if e == e and e < 1e30 else None,
                            "zeros": lost / sum(g.numel() for g in flat(grads64))})
    return records


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=ROOT / "tutorial" / "results", help="folder of mute.jsonl")
    p.add_argument("--quick", action="store_true", help="three values of gamma, four rows")
    args = p.parse_args(argv)
    records = measure(GAMMAS[::6], 4) if args.quick else measure(GAMMAS, 64)
    args.out.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (args.out / "mute.jsonl").unlink()
    for record in records:
        line = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
        print(line)
        with open(args.out / "mute.jsonl", "a") as f:
            f.write(json.dumps(line | job.provenance()) + "\n")


if __name__ == "__main__":
    main()
