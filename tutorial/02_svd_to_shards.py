"""Chapter 2: one weight is cut by its SVD into K shards that have no direction in common."""

import torch
from lesson import check, save_figure

import hd_pissa

# %% fold: A weight with a slowly falling spectrum
m, n, K, r = 96, 128, 4, 4
g = torch.Generator().manual_seed(0)
left, right = (torch.linalg.qr(torch.randn((k, m), generator=g, dtype=torch.float64)).Q for k in (m, n))
sigma = torch.arange(1, m + 1).double() ** -0.3                         # known, so it can be an oracle
W = (left * sigma) @ right.T                                            # (m, n)

# %% The cut: device i takes the components ir .. (i+1)r - 1
U, S, Vt = torch.linalg.svd(W, full_matrices=False)                     # (m, d) (d,) (d, n), d = min(m, n)
cuts = [slice(i * r, (i + 1) * r) for i in range(K)]
A = [U[:, c] * S[c].sqrt() for c in cuts]                               # K of (m, r)
B = [S[c].sqrt()[:, None] * Vt[c] for c in cuts]                        # K of (r, n)
for i, c in enumerate(cuts):
    share = (A[i] @ B[i]).square().sum() / W.square().sum()
    print(f"device {i}: components {c.start:2} to {c.stop - 1:2}, {share:5.1%} of |W|^2")

# %% fold: Checks: what the shards are to each other, and to W
gram_A, gram_B = torch.hstack(A).T @ torch.hstack(A), torch.vstack(B) @ torch.vstack(B).T   # (Kr, Kr) both
check("A_i^T A_j = 0 = B_i B_j^T for i != j", torch.stack((gram_A, gram_B)),
      torch.stack((gram_A.diag().diag(), gram_B.diag().diag())), atol=1e-12)
check("A_i^T A_i = diag(S_i) = B_i B_i^T", torch.stack((gram_A.diag(), gram_B.diag())),
      sigma[:K * r].expand(2, -1), atol=1e-12)
rest = W - sum(a @ b for a, b in zip(A, B))
check("|W - sum_i A_i B_i|^2 = sum of sigma^2 beyond Kr", rest.square().sum(), sigma[K * r:].square().sum(),
      rtol=1e-12)


# %% What goes wrong if every device decomposes W for itself, approximately and with its own random numbers
def overlap(decompositions):
    """|U_i^T U_j| of what devices i and j take for the components ir .. (i+1)r - 1; 0 within a device."""
    own = torch.hstack([U[:, c] for U, c in zip(decompositions, cuts)])     # (m, Kr)
    return (own.T @ own).abs() * (torch.block_diag(*[torch.ones(r, r)] * K) == 0)


randomized = []
for i in range(K):
    torch.manual_seed(i)
    randomized.append(torch.svd_lowrank(W, q=K * r, niter=2)[0])
rough = overlap(randomized)
shared = rough[:, cuts[-1]].square().sum() / r
print(f"an svd_lowrank on every device: their components have cosines up to {rough.max():.2f},")
print(f"{shared:.0%} of the last device's directions lie in those of the others")
check("overlap of slices of one exact SVD", overlap([U] * K), torch.zeros(K * r, K * r), atol=1e-12)


# %% fold: The figure: who holds which component, and how rough decompositions overlap
def draw(axes):
    spectrum, grid = axes
    for i, c in enumerate(cuts):
        spectrum.bar(range(c.start, c.stop), S[c], color=f"C{i}", label=f"device {i}")
    spectrum.bar(range(K * r, 32), S[K * r:32], color="0.85", label="nobody's")
    spectrum.set(xlabel="component", ylabel="singular value", title="one exact SVD, dealt out")
    spectrum.legend()
    grid.pcolormesh(rough.flip(0), cmap="Greys", vmin=0, vmax=0.5)
    grid.set(title="|cosines|, an svd_lowrank each", aspect="equal", xlabel="device", ylabel="device")
    for x in range(r, K * r, r):
        grid.axhline(x, color="0.8", linewidth=0.5)
        grid.axvline(x, color="0.8", linewidth=0.5)
    grid.set_xticks([r * i + r / 2 for i in range(K)], range(K))
    grid.set_yticks([r * i + r / 2 for i in range(K)], reversed(range(K)))


save_figure(__file__, draw, columns=2)

# %% fold: Check: hd_pissa.py's factors: a component may have the opposite sign, in A_i and B_i at once
packed = hd_pissa.shard_factors(W, K, r, "hd_pissa", 1.0, 0)            # (K, m r + r n)
As, Bs = packed[:, :m * r].view(K, m, r), packed[:, m * r:].view(K, r, n)
check("A_i B_i of hd_pissa.shard_factors", As @ Bs, torch.stack([a @ b for a, b in zip(A, B)]), atol=1e-12)
