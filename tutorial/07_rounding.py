"""Chapter 7: a bfloat16 weight stands still under small steps; 16 more bits beside it keep every one."""

import torch
from lesson import HERE, check, save_figure

import hd_pissa
from hd_pissa_extra import join, split

K, R, LR, STEPS = 8, 2, 2e-5, 200       # the paper's learning rate, which belongs to the mean over K
MODEL = torch.load(HERE.parent / "data/base.pt", weights_only=True)
START = MODEL["blocks.2.c_fc.weight"].T.bfloat16()     # (m, n), real weights, as most models are published
m, n = START.shape


def updates():
    """STEPS updates dW (m, n) of AdamW's size: entries of dA_i, dB_i are +-lr, their signs mostly steady."""
    g = torch.Generator().manual_seed(0)
    factors = hd_pissa.shard_factors(START, K, R, "hd_pissa", 1.0, 0).float().split((R * m, R * n), dim=1)
    A, B = factors[0].unflatten(1, (m, R)), factors[1].unflatten(1, (R, n))     # (K, m, r), (K, r, n)
    steady = [torch.randint(2, t.shape, generator=g) * 2 - 1 for t in (A.mT, B)]
    for _ in range(STEPS):
        dAt, dB = (LR * s * (torch.rand(s.shape, generator=g) - 0.25).sign() for s in steady)
        Pt, Q = hd_pissa.update_factors(A, B, dAt.mT, dB)
        yield Pt.T @ Q / K


def truncate(W):
    """The high half without rounding: the low 16 bits of float32 cut off."""
    return (W.view(torch.int32) >> 16 << 16).view(torch.float32)


def nearest(W):
    """The nearest bfloat16, ties away from zero, by arithmetic on values instead of bits."""
    unit = torch.exp2(torch.frexp(W.double()).exponent.clamp_min(-125) - 8.0)      # spacing of bfloat16 at W
    return (W.sign() * torch.floor(W.double().abs() / unit + 0.5) * unit).float()


def draw(axes):
    axes.plot(path[:, 0], color="0.6", lw=4, label="float32, and both halves")
    axes.step(range(STEPS), path[:, 2], color="C0", where="post", label="high half, which the forward sees")
    axes.plot(path[:, 1], "--", color="C3", label="bfloat16 alone")
    axes.set(xlabel="step", ylabel="one entry of W")
    axes.legend()


# %% Three ways of adding the same steps
wide, plain, (high, low) = START.float(), START.clone(), split(START.float())
meant, path = torch.zeros((m, n), dtype=torch.float64), []
unit = nearest(START.float() * (1 + 2**-7)).sub(START.float()).abs()
for step, dW in enumerate(updates(), 1):
    wide = wide + dW                                    # float32, the paper's
    plain = (plain.float() + dW).bfloat16()             # bfloat16: the sum is rounded to the nearest
    high, low = split(join(high, low) + dW)             # two halves: nothing is lost
    meant += dW
    path.append(torch.stack([W[:8].float() for W in (wide, plain, high)]))
    if step == 1:
        print(f"median |W| {START.abs().median():.1e}, its bfloat16 spacing {unit.median():.1e}, "
              f"median |dW| of a step {dW.abs().median():.1e}")
        moved = [float((W - START.float()).norm() / dW.norm()) for W in (truncate(wide), high.float())]
        print(f"step 1 moves W by {moved[0]:.1f} |dW| if cut to bfloat16, by {moved[1]:.1f} |dW| if rounded")
    if step in (1, 20, 200):
        share = [float(((W.double() - START.double()) * meant).sum() / meant.square().sum())
                 for W in (wide, plain, high, join(high, low))]
        print(f"{step:4} steps, applied share of dW: float32 {share[0]:.3f}, bfloat16 {share[1]:.3f}, "
              f"high half {share[2]:.3f}, both halves {share[3]:.3f}")

# %% fold: Checks and figure
check("both halves are the float32 weight", join(high, low).view(torch.int32), wide.view(torch.int32))
check("float32 applied every step", share[0], 1.0, rtol=1e-3)
check("bfloat16 alone lost nearly every step", share[1] < 0.1, True)
edges = {"ties": [0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000], "beside ties": [0x3F807FFF, 0xBF808001],
         "subnormals": [0x00000001, 0x00008000, 0x807FFFFF], "carries": [0x3FFFFFFF, 0xBFFF8000]}
for name, patterns in edges.items():
    W = torch.tensor(patterns).to(torch.int32).view(torch.float32)
    check(f"{name}: join is the inverse of split", join(*split(W)).view(torch.int32), W.view(torch.int32))
    check(f"{name}: high half by arithmetic", split(W)[0].float(), nearest(W))
path = torch.stack(path).flatten(2)                     # steps, ways, entries: of those above the median
farthest = (path[-1, 0] - path[0, 0]).abs() * (path[0, 0].abs() > 2e-2)
path = path[:, :, farthest.argmax()]                    # the one that moved farthest
save_figure(__file__, draw)
