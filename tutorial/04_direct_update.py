"""Chapter 4: K devices train K shards of one W; averaged gradients against averaged or summed updates."""

from functools import partial

import torch
from lesson import check, save_figure

import hd_pissa

# %% fold: A layer Y = X W, and for every step a mini-batch for each of K devices
m, n, K, r, T, STEPS, LR = 24, 32, 4, 2, 64, 200, 1e-3
draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W0 = draw(m, n) / m**0.5
target = W0 + 0.2 * draw(m, n) / m**0.5
data = [[(X, X @ target + 0.1 * draw(T, n)) for X in draw(K, T, m)] for _ in range(STEPS)]
U, S, Vt = torch.linalg.svd(W0, full_matrices=False)
A = (U * S.sqrt())[:, :K * r].T.reshape(K, r, m).mT                         # (K, m, r): A[i] is A_i
B = (S.sqrt()[:, None] * Vt)[:K * r].reshape(K, r, n)                       # (K, r, n)


# %% K devices in one process. AdamW's increment depends on the gradient and its own two averages alone.
def train(A, B, how, lr=LR, steps=STEPS):
    """W after each step. how: average the "gradients" first, or apply the "mean" or the "sum" of all dU_i."""
    W, path, averages = W0, [], [torch.zeros_like(t) for t in (A, A, B, B)]
    for t, batch in enumerate(data[:steps], 1):
        G = torch.stack([X.T @ (2 * (X @ W - Y) / Y.numel()) for X, Y in batch])    # (K, m, n), one a device
        grads, increments = (G @ B.mT, A.mT @ G), []                                # chapter 3
        if how == "gradients":
            grads = [gradient.mean(0).expand_as(gradient) for gradient in grads]
        for gradient, mean, square in zip(grads, averages[::2], averages[1::2]):
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            increments.append(-lr * mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8))
        dA, dB = increments
        dU = dA @ B + A @ dB + dA @ dB                                              # (K, m, n)
        W = W + (dU.sum(0) if how == "sum" else dU.mean(0))
        path.append(W)
    return torch.stack(path)                                                        # (steps, m, n)


# %% fold: The SVD leaves the sign of a component open. A method must not depend on it.
sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0]).double().view(K, 1, r)
for how in ("gradients", "mean", "sum"):
    once, flipped = (train(*factors, how, steps=1)[0] - W0 for factors in ((A, B), (A * sign, sign.mT * B)))
    print(f"{how:10} one step changes by {(once - flipped).norm() / once.norm():4.0%} if signs are flipped")

# %% fold: The loss on each step's own mini-batches, before the step
loss = {}
for how, lr in (("gradients", LR), ("mean", LR), ("sum", LR), ("mean", K * LR)):
    before = [W0, *train(A, B, how, lr)]
    losses = [sum((X @ W - Y).square().mean() for X, Y in batch) / K for W, batch in zip(before, data)]
    loss[f"{how}, lr {lr:.0e}"] = losses
    print(f"{how:10} lr {lr:.0e}   loss {losses[0]:.3f}, of the last 20 steps {sum(losses[-20:]) / 20:.4f}")

def draw_losses(axes):
    for (name, losses), style in zip(loss.items(), ("C3", "C0", "C1", "k:")):
        axes.plot(losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss on the step's mini-batches", ylim=(0, None))
    axes.legend()


save_figure(__file__, draw_losses)

# %% fold: Checks. Oracle of the whole method: hd_pissa.py, with torch's AdamW and autograd
small = [train(A, B, how, lr, steps=1)[0] - W0 for how, lr in (("mean", K * 1e-6), ("sum", 1e-6))]
check("mean at K lr = sum at lr, up to lr^2", *small, rtol=1e-4)
for how in ("mean", "sum"):
    layer = torch.nn.Linear(m, n, bias=False, dtype=torch.float64)
    layer.weight.data = W0.T.clone()
    adapters = hd_pissa.attach(torch.nn.Sequential(layer), rank=r, shards=K, aggregate=how)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=LR, weight_decay=0.0)
    for batch in data[:20]:
        for i, (X, Y) in enumerate(batch):
            with adapters.shard(i):
                (layer(X) - Y).square().mean().backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    check(f"W after 20 steps, {how}", train(A, B, how, steps=20)[-1], layer.weight.T, rtol=1e-10)
