"""Chapter 12: what the runs in results/ say of HD-PiSSA and its peers, each with what it costs a device."""

import statistics

import torch
from lesson import HERE, check, save_figure

from tutorial.experiments import page, table

K, R = 8, 2
MODEL = torch.load(HERE.parent / "data/base.pt", weights_only=True)
SIZES = [W.shape for name, W in MODEL.items() if name.startswith("blocks") and W.dim() == 2]
ARMS = ("full", "linear", "lora", "lora r=16", "pissa r=16", "hira", "apollo", "hd", "hd group=2",
        "hd group=4", "hd global", "global random", "global dct", "lora r=16 embedding",
        "global random embedding", "global dct embedding")
# (a, b): the verdicts on a at 120 and 480 steps that the text rests on
PAIRS = {("hd", "lora"): "behind behind", ("hd", "pissa"): "equivalent undecided", ("hd", "dora"): "behind",
         ("hd", "hira"): "behind", ("hd", "mora"): "behind", ("hd", "hd top"): "undecided",
         ("hd", "hd lora init"): "equivalent", ("hd", "intermediate"): "ahead", ("hd K=2", "hd"): "undecided",
         ("hd global", "hd"): "ahead ahead", ("hd global", "lora"): "ahead ahead",
         ("hd global", "lora r=16"): "behind behind", ("lora r=16", "pissa r=16"): "ahead undecided",
         ("global random", "hd global"): "ahead ahead", ("global random", "lora"): "ahead ahead",
         ("global random", "lora r=16"): "undecided undecided", ("global random", "hira"): "undecided",
         ("global random", "linear"): "equivalent undecided", ("hd", "full"): "behind behind",
         ("linear", "full"): "behind behind", ("linear embedding", "full"): "undecided",
         ("global random embedding", "full"): "undecided behind",
         ("global random embedding", "lora r=16 embedding"): "undecided undecided",
         ("global random embedding", "lora embedding"): "ahead ahead", ("global dct", "lora r=16"): "",
         ("global dct", "hd global"): "", ("global dct embedding", "lora r=16 embedding"): "",
         ("apollo", "lora"): "ahead", ("galore", "lora"): "behind", ("global dct", "apollo"): "undecided",
         ("apollo r=16", "lora r=16"): "undecided", ("hd group=2", "hd"): "ahead",
         ("hd group=2", "lora"): "equivalent", ("hd group=4", "hd"): "ahead",
         ("hd group=4", "lora"): "undecided", ("hd shared moments", "hd"): "equivalent",
         ("hd feedback", "hd"): "behind",
         ("hd feedback all", "hd"): "behind"}


# %% Numbers of one of K devices: LoRA whose moments ZeRO-1 spreads over them, and shards of rank r
def lora(r):
    factors = r * sum(m + n for m, n in SIZES)
    return {"moments": 2 * factors // K, "held": factors, "received": 2 * (K - 1) * factors // K}


def shards(r, gradients):
    own = r * sum(m + n for m, n in SIZES)
    return {"moments": 2 * own, "held": K * own,
            "received": {"local": 1, "global": 2}[gradients] * (K - 1) * own}


# %% fold: What is printed: costs and losses, then pairs with their verdicts
data = table.load()
there = [name for name in ARMS if data[name].there]
print(f"{'KiB a device':39} {'moments':>7}  ZeRO-1  factors  received  loss at 120 and at 480 steps")
for name in there:
    held = [4 * n / 1024 for n in page.memory(data[name]).values()]
    losses = [page.pm(arm) for s in ("", ", long") if (arm := data.get(name + s)) and arm.there]
    print(f"{page.label(name):39} {held[0]:7.0f}  {held[1]:6.0f}  {held[2]:7.0f}  {held[3]:8.0f} ", *losses)
print(f"\n{'a':37}  {'b':31}  {'120 steps':17}  480 steps")
said = []
for (a, b), quoted in PAIRS.items():
    arms = [[data.get(name + s) for name in (a, b)] for s in ("", ", long")]
    found = [table.compare(*pair) for pair in arms if all(arm and arm.there for arm in pair)]
    said.append([v.outcome for v in found][:len(quoted.split())] == quoted.split())
    if found:
        print(f"{page.label(a):37}  {page.label(b):31}  "
              + "  ".join(f"{v.gap:+.3f} {v.outcome:10}" for v in found).rstrip())


# %% fold: Figure and checks
def draw(axes):
    for name in there:
        cost, arm, long = page.memory(data[name])["zero1"] / 256, data[name], data.get(name + ", long")
        if long and long.there:
            axes[0].semilogx(cost, long.mean(), "o", ms=4, label=page.label(name))
        rank = statistics.median(arm.first["effective_rank"])
        axes[1].semilogx(rank, arm.mean(), "o" if long and long.there else "kx", ms=4)
    axes[0].set(xlabel="KiB of moments a device, with ZeRO-1", ylabel="held-out loss, 480 steps")
    axes[0].legend(fontsize=5.5)
    axes[1].set(xlabel="effective rank of dW", ylabel="held-out loss, 120 steps")


print()
save_figure(__file__, draw, columns=2, size=(8.0, 3.4))
peer, local, whole = lora(K * R), shards(R, "local"), shards(R, "global")
for name, numbers in (("lora r=16", peer), ("hd", local), ("hd global", whole)):
    recorded = page.memory(data[name]) | {"moments": page.memory(data[name])["zero1"]}
    check(f"what a device has of {page.label(name)}", list(numbers.values()), [recorded[k] for k in numbers])
check("optimizer state of rank Kr, spread over K devices", peer["moments"], local["moments"])
check(f"verdicts that the text rests on: {len(said)} pairs", said, [True] * len(said))
