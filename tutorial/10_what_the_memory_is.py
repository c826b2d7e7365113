"""Chapter 10: factors that are made again, W at two bytes, gradients sent once a step, and the whole bill."""

import math
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lesson import check, received, save_figure

import hd_pissa_extra
from training.dry_run import hd_pissa_numbers, lora

R, N = 4, 64            # of one shard in each of two processes; W is (N, N)
CASES = [(send, micro_batches) for send in ("step", "backward") for micro_batches in (1, 4)]


# %% An orthonormal basis by formula, and a rounding whose mean is exact
def column(f, signs):
    """Column f of D C: D the random signs on a diagonal, C the discrete cosine transform."""
    j = torch.arange(len(signs), dtype=torch.float64)
    c = math.sqrt(2 / len(signs)) * torch.cos(math.pi * (2 * j + 1) * f / (2 * len(signs)))
    return signs * (c if f else c / math.sqrt(2))


def stochastic(W, generator):
    """float32 W as one of its two bfloat16 neighbours, drawn so that the mean is exact."""
    bits, low = W.view(torch.int32), torch.randint(1 << 16, W.shape, generator=generator)
    return ((bits + low.int()) >> 16).to(torch.int16).view(torch.bfloat16)


def bill(K):
    """Numbers of one of K devices for one weight, over r (m + n); last: received in a step, 1 micro-batch."""
    gather = K - 1                                          # increments of the other shards
    return {"local, kept": (K, 1, 1, 2, gather), "local, from a seed": (0, 1, 1, 2, gather),
            "whole batch, sent once a step": (0, 1, K, 2, 2 * gather),
            "whole batch, by each backward": (0, 1, 1, 2, 2 * gather),
            "LoRA of rank Kr, ZeRO-1": (K, 0, K, 2, 2 * gather),
            "LoRA of rank Kr, ZeRO-2": (K, 0, 1, 2, 2 * gather),
            "LoRA of rank Kr, ZeRO-3": (1, 0, 1, 2, 3 * gather)}


# %% fold: Two processes count the bytes of a step of one and of four micro-batches
def step(micro_batches, model, adapters, optimizer):
    for X in torch.randn((micro_batches, 8, N), generator=torch.Generator().manual_seed(0)):
        model(X).square().mean().backward()
    optimizer.step()
    adapters.merge_()


def device(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    counted = []
    for send, micro_batches in CASES:
        torch.manual_seed(0)
        model = torch.nn.Linear(N, N, bias=False)
        adapters = hd_pissa_extra.attach(model, R, init="random", gradients="global", send=send)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3, weight_decay=0.0)
        counted.append(received(lambda: step(micro_batches, model, adapters, optimizer)))     # noqa: B023
    torch.save((counted, adapters.basis.numel(), adapters.increments.numel()), f"{folder}/{rank}.pt")

# %% fold: Figure, what is printed, checks
def draw(axes):
    parts = torch.tensor(list(bill(8).values())).T[:4] * unit
    for name, part, end in zip(("factors", "increments", "gradients", "moments"), parts, parts.cumsum(0)):
        axes[0].barh(list(bill(8)), part, left=end - part, label=name)
    axes[0].set(ylim=(6.6, -0.6), xlabel="GB a device beside W: LLaMA-2-7B, K = 8, r = 16")
    axes[1].loglog(steps, noise, "o", ms=3, label="simulated")
    axes[1].loglog(steps, [math.sqrt((u - d) / (t * d)) for t in steps], label="by formula")
    axes[1].set(xlabel="steps", ylabel="random part of dW / dW")
    axes[0].legend(fontsize=7), axes[1].legend(fontsize=7)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(device, (folder,), nprocs=2)
        counted, *kept = torch.load(f"{folder}/0.pt")
    unit = 16 * 32 * (4 * 8192 + 3 * 15104) * 4e-9      # GB: r (m + n) of all linear layers, float32
    print("GB a device, K = 8, r = 16     factors  increments  gradients  moments   sum  received")
    for name, numbers in bill(8).items():
        a, b, c, d, e = (unit * x for x in numbers)
        print(f"{name:29}  {a:7.2f}  {b:10.2f}  {c:9.2f}  {d:7.2f}  {a + b + c + d:.2f}  {e:8.2f}")
    g, W = torch.Generator().manual_seed(0), torch.full((100_000,), 1 / 64).bfloat16()
    u, d, steps, noise = 2**-13, 2**-13 / 160, (1, 10, 100, 1000), []       # u: W's spacing, d: a step
    for t in range(1, steps[-1] + 1):
        W = stochastic(W.float() + d, g)
        moved = W.double() - 1 / 64
        if t in steps:
            noise.append(float(moved.std() / (t * d)))
            print(f"{t:5} steps of u / 160: {moved.mean() / (t * d):.2f} of dW is applied on average, "
                  f"{noise[-1]:.2f} of it is noise")
    for (send, n), count in zip(CASES, counted):
        print(f'send="{send}", micro-batches {n}: {count:,} bytes received in a step')
    save_figure(__file__, draw, columns=2, size=(8.6, 3.0))
    signs = (torch.randint(2, (N,), generator=g) * 2 - 1).double()
    basis = torch.stack([column(f, signs) for f in range(N)], dim=1)
    check("(D C)^T D C = I", basis.T @ basis, torch.eye(N), atol=1e-12)
    made, = hd_pissa_extra.seeded_columns((N,), 0, N, 5, "cpu", torch.float64)      # of seed 5, in its order
    apart = torch.cdist(made.abs(), basis.T.abs(), compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    check("columns of hd_pissa_extra, but for signs", apart, torch.zeros(N), atol=1e-12)
    check("numbers kept of the basis, and of increments", kept, [0, R * 2 * N])
    check("mean of stochastic rounding", moved.mean(), 1000 * d, rtol=1e-2)
    check("variance of stochastic rounding", moved.var(), 1000 * d * (u - d), rtol=2e-2)
    check("bytes of a step, (sends + 1) (K - 1) r (m + n) numbers", counted,
          [(sends + 1) * R * 2 * N * 4 for sends in (1, 1, 1, 4)], atol=200)
    forms = ("hd_pissa", "local"), ("random", "local"), ("random", "global")
    sizes = [hd_pissa_numbers(1, 8, 8, init=init, gradients=gradients) for init, gradients in forms]
    sizes += [lora(1, 8, 8, stage) for stage in (1, 2, 3)]
    check("the bill of train.py --dry_run", [bill(8)[name] for name in bill(8) if "each" not in name],
          [list(size.values()) for size in sizes])
