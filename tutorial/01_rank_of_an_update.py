"""Chapter 1: one weight is fine-tuned in three ways; the singular values of what each added to it."""

import torch
from lesson import check, save_figure

import hd_pissa

# %% fold: A weight W, and data of a layer that differs from W by a matrix of full rank
m, n, r, T, STEPS = 24, 32, 3, 512, 300
g = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


W = draw(m, n) / m**0.5
X = draw(T, m)                                                      # (T, m) inputs
Y = X @ (W + 0.2 * draw(m, n) / m**0.5) + 0.1 * draw(T, n)          # (T, n) what the layer should give

# %% Three methods: the tensors that each trains, and the weight that it makes of them
U, S, Vt = torch.linalg.svd(W, full_matrices=False)
A_lora, B_lora = draw(m, r) / m**0.5, torch.zeros((r, n), dtype=torch.float64)
A_top, B_top = U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vt[:r]      # A_top B_top: the top r of W
methods = {
    "full": ([W], lambda W: W),
    "PiSSA": ([A_top, B_top], lambda A, B: (W - A_top @ B_top) + A @ B),
    "LoRA": ([A_lora, B_lora], lambda A, B: W + A @ B),
}

# %% Train each with Adam, then look at dW = (weight after) - W
dW, spectra, trained = {}, {}, {}
print("        loss   sigma over sigma_1, number", *(f"{k:5}" for k in (1, r, r + 1, 2 * r, 2 * r + 1)))
for name, (start, weight) in methods.items():
    trained[name] = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.Adam(trained[name], lr=1e-3)
    for _ in range(STEPS):
        loss = (X @ weight(*trained[name]) - Y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dW[name] = (weight(*trained[name]) - W).detach()
    spectra[name] = torch.linalg.svdvals(dW[name])                          # (d,), descending
    relative = spectra[name] / spectra[name][0]
    print(f"{name:6} {loss:.3f} {'':29}", *(f"{relative[k]:5.2f}" for k in (0, r - 1, r, 2 * r - 1, 2 * r)))


# %% fold: The figure: where each spectrum ends
def draw_spectra(axes):
    for name, s in spectra.items():
        axes.semilogy(range(1, len(s) + 1), (s / s[0]).clamp(min=1e-12), "o-", markersize=3, label=name)
    for x, text in ((r, "r"), (2 * r, "2r")):
        axes.axvline(x, color="0.8", zorder=0)
        axes.text(x - 0.15, 1e-5, text, ha="right")
    axes.set(xlabel="index of the singular value", ylabel="relative to the largest (below 1e-12: 1e-12)")
    axes.legend()


save_figure(__file__, draw_spectra)

# %% fold: Checks: the ranks, and the two factorizations that explain them
for name, rank in (("LoRA", r), ("PiSSA", 2 * r), ("full", min(m, n))):
    check(f"rank of dW, {name}: {rank}", torch.linalg.matrix_rank(dW[name], rtol=1e-10), rank)
    check(f"effective rank, {name}: {rank}", hd_pissa.effective_rank(spectra[name]), rank)
(A, B), (P, Q) = ([tensor.detach() for tensor in trained[name]] for name in ("LoRA", "PiSSA"))
check("dW of LoRA = A B", dW["LoRA"], A @ B, atol=1e-12)
PQ = torch.hstack((P, A_top)) @ torch.vstack((Q, -B_top))                   # (m, 2r) (2r, n)
check("dW of PiSSA = [A, A_top] [B; -B_top]", dW["PiSSA"], PQ, atol=1e-12)
dA, dB = P - A_top, Q - B_top
check("A B - A_top B_top = dA B_top + A_top dB + dA dB", dA @ B_top + A_top @ dB + dA @ dB, dW["PiSSA"],
      atol=1e-12)
left, s, right = torch.linalg.svd(dW["full"], full_matrices=False)
rest = dW["full"] - (left[:, :r] * s[:r]) @ right[:r]                       # what r components leave
print(f"the nearest matrix of rank {r} to full dW leaves {rest.norm() / dW['full'].norm():.0%} of its norm")
check("|rest|^2 = sum of sigma_k^2 for k > r", rest.square().sum(), s[r:].square().sum(), rtol=1e-12)
