"""Chapter 9: the exact rank of T updates, what the effective rank says instead, and the LoRA in between."""

import torch
import torch.nn as nn
from lesson import check, save_figure

import hd_pissa

K, R, M, N = 4, 2, 48, 60               # one step: 2 K R = 16; all: min(M, N) = 48
g = torch.Generator().manual_seed(0)
W0 = torch.randn((M, N), generator=g, dtype=torch.float64) / M**0.5
TEACHER = W0 + torch.randn((M, N), generator=g, dtype=torch.float64) / M**0.5
DATA = torch.randn((100, K, 32, M), generator=g, dtype=torch.float64)


# %% A run, the LoRA that its increments add up to, and what is left: second-order terms
def train(lr, steps):
    """dW (M, N), the LoRA P Q of rank 2Kr from sums of increments, and the sum of second-order terms."""
    model = nn.Linear(M, N, bias=False, dtype=torch.float64)
    model.weight.data = W0.T.clone()
    adapters = hd_pissa.attach(nn.Sequential(model), R, shards=K)
    fixed, sums, second = adapters.state_dict(), dict.fromkeys(range(2 * K), 0.0), 0.0
    A, B = ([fixed[f"0.shard{i}.{kind}"] for i in range(K)] for kind in "AB")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=lr, weight_decay=0.0)
    for batch in DATA[:steps]:
        for i, X in enumerate(batch):
            with adapters.shard(i):
                (model(X) - X @ TEACHER).square().mean().backward()
        optimizer.step()
        increments = [p.detach().clone() for p in adapters.parameters()]        # dA_0, dB_0, dA_1, ...
        second = second + sum(dA @ dB for dA, dB in zip(increments[::2], increments[1::2])) / K
        sums = {j: sums[j] + p for j, p in enumerate(increments)}
        adapters.merge_()
        optimizer.zero_grad()
    P = torch.cat([sums[2 * i] for i in range(K)] + A, dim=1) / K               # (M, 2Kr)
    Q = torch.cat(B + [sums[2 * i + 1] for i in range(K)])                      # (2Kr, N)
    return model.weight.detach().T - W0, P, Q, second


# %% fold: Figure, what is printed, checks
def draw(axes):
    for (lr, T), S in spectra.items():
        axes.semilogy(range(1, M + 1), S / S[0], label=f"lr {lr:g}, {T} steps")
    axes.semilogy(range(1, M + 1), floor / floor[0], "k:", label="lr 2e-05, 1 step, W in float32")
    axes.axvline(2 * K * R, color="0.8", zorder=0)
    axes.set(ylim=(1e-9, 2), xlabel="index of the singular value of dW (grey line: 2Kr)",
             ylabel="relative to the largest")
    axes.legend()


for T in (1, 2, 3, 4, 5, 8):
    rank = torch.linalg.matrix_rank(train(0.05, T)[0], rtol=1e-11)
    check(f"rank of {T} updates is {rank}, min((T + 1) K r, m, n)", rank, min((T + 1) * K * R, M, N))
print("\nlr     steps  effective rank  sigma_17 / sigma_1  |P Q - dW| / |dW|")
spectra, tail, error, weyl = {}, {}, {}, []
for lr in (1e-2, 1e-3, 1e-4):
    for T in (10, 100):
        dW, P, Q, second = train(lr, T)
        spectra[lr, T] = S = hd_pissa.update_spectrum(W0, W0 + dW)
        weyl.append(bool(S[2 * K * R] <= torch.linalg.matrix_norm(second, 2) * (1 + 1e-9)))
        tail[lr, T], error[lr, T] = float(S[2 * K * R] / S[0]), float((P @ Q - dW).norm() / dW.norm())
        row = hd_pissa.effective_rank(S), tail[lr, T], error[lr, T]
        print(f"{lr:<6} {T:5}  {row[0]:14}  {row[1]:18.1e}  {row[2]:17.1e}")
before, after = W0.float(), (W0 + train(2e-5, 1)[0]).float()
floor, whole = hd_pissa.update_spectrum(before, after), torch.linalg.matrix_rank(after - before)
print(f"one step at lr 2e-5, W in float32: matrix_rank {whole}, effective {hd_pissa.effective_rank(floor)}\n")
check("first and second order together are dW", P @ Q + second, dW, rtol=1e-9)
check("sigma_{2Kr+1} <= |second order|_2", weyl, [True] * len(weyl))
check("inner size of P Q", P.shape[1], 2 * K * R)
for name, values in (("tail", tail), ("error of the LoRA", error)):
    check(f"{name} at a tenth of the lr", values[1e-3, 10] / values[1e-4, 10], 10.0, rtol=0.1)
save_figure(__file__, draw)
