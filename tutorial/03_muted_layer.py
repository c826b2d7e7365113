"""Chapter 3: the gradients of an adapter that the forward leaves out, found in four ways."""

import torch
from lesson import check, save_figure

import hd_pissa

# %% fold: A layer Y = X W, one slice of its SVD, and a fake loss sum(Y * dY) whose gradient at Y is dY
T, m, n, r = 8, 12, 10, 2                                   # tokens, inputs, outputs, components
g = torch.Generator().manual_seed(0)
X, W, dY = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((T, m), (m, n), (T, n)))
U, S, Vt = torch.linalg.svd(W, full_matrices=False)
A, B = U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vt[:r]              # (m, r) (r, n)


def gradients(forward, *leaves):
    """What autograd says of sum(forward(leaves) * dY)."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad((forward(*leaves) * dY).sum(), leaves)


# %% 1. Autograd's answer, for residual PiSSA
W_res = W - A @ B                                           # without muting, another one on every device
g_A, g_B, dX = gradients(lambda A, B, X: X @ (W_res + A @ B), A, B, X)

check("<P, Q R> = <Q^T P, R> = <P R^T, Q>", [((X.T @ dY) * W).sum(), ((dY @ W.T) * X).sum()],
      [(dY * (X @ W)).sum()] * 2, rtol=1e-12)               # moving a factor; <P, Q> = sum(P * Q)

# %% 2. By hand: no W_res, no product A B, nothing of the adapter in the forward
check("g_A = X^T (dY B^T)", X.T @ (dY @ B.T), g_A, rtol=1e-12)              # (m, T) (T, r) -> (m, r)
check("g_B = (X A)^T dY", (X @ A).T @ dY, g_B, rtol=1e-12)                  # (T, r)^T (T, n) -> (r, n)
check("dX = dY W^T", dY @ W.T, dX, rtol=1e-12)                              # (T, n) (n, m) -> (T, m)

# %% 3. The increments as the leaves, at zero: the layer is X W and the gradients are those
at_zero = gradients(lambda dA, dB: X @ (W + (A + dA) @ (B + dB) - A @ B), 0 * A, 0 * B)
check("gradients of dA, dB at zero", torch.cat([t.flatten() for t in at_zero]),
      torch.cat((g_A.flatten(), g_B.flatten())), rtol=1e-12)
layer = torch.nn.Linear(m, n, bias=False, dtype=torch.float64)
layer.weight.data = W.T.clone()
plain = layer(X)
adapters = hd_pissa.attach(torch.nn.Sequential(layer), rank=r)
check("the muted layer's output, bit for bit", layer(X), plain)
(layer(X) * dY).sum().backward()
(dA, dB), own = adapters.parameters(), adapters.state_dict()    # signs may differ; products do not
check("hd_pissa's g_A B", dA.grad @ own["0.shard0.B"], g_A @ B, rtol=1e-10)
check("hd_pissa's A g_B", own["0.shard0.A"] @ dB.grad, A @ g_B, rtol=1e-10)


# %% fold: 4. The published way, in float32: Y = X (W + gamma A B), gradients divided by gamma
def published(gamma, size, flush):
    """Relative errors of Y and of g_A, if dY is `size` times as large, and denormals are flushed or not."""
    torch.set_flush_denormal(flush)
    x, w, a, b, d = (t.float() for t in (X, W, A, B, size * dY))
    y = x @ (w + gamma * (a.requires_grad_() @ b))
    (y * d).sum().backward()
    torch.set_flush_denormal(False)
    got, right = (y.detach().double(), a.grad.double() / gamma / size), (X @ W, g_A)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, right)]


gammas, cases = [10.0**-k for k in range(1, 37)], ((1.0, False), (1e-6, False), (1e-6, True))
errors = torch.tensor([[published(gamma, *case) for gamma in gammas] for case in cases])    # (3, 36, 2)
curves = {"output Y": errors[0, :, 0], "g_A, dY of 1": errors[0, :, 1], "g_A, dY of 1e-6": errors[1, :, 1],
          "the same, denormals flushed": errors[2, :, 1]}
print("gamma   error of", *(f"{name:>{len(name) + 3}}" for name in curves))
for k in (2, 4, 8, 16, 31, 32, 36):
    texts = ("-" if e[k - 1] < 1e-6 else f"1e{e[k - 1].log10().round():+03.0f}" for e in curves.values())
    print(f"1e-{k:02}           ", *(f"{text:>{len(name) + 3}}" for name, text in zip(curves, texts)))
check("gamma from 1e-8 to 1e-28 in float32", errors[:, 7:28], torch.zeros(3, 21, 2), atol=1e-6)


def draw(axes):
    for (name, e), style in zip(curves.items(), ("k", "C0", "C1", "C3")):
        axes.loglog(gammas, e.clamp(min=3e-7), style, label=name)
    axes.axvline(1e-16, ymax=0.4, color="0.8", zorder=0)
    axes.set(xlabel="gamma (the paper: 1e-16)", ylabel="largest relative error", ylim=(1e-7, 3))
    axes.legend(loc="upper center")


save_figure(__file__, draw)
