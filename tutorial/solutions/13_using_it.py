"""Solutions of chapter 13's exercises."""

import torch

import hd_pissa


def answer_1(names):
    return ["q_proj", "v_proj"]     # suffixes match whole parts between dots, so not_q_proj stays out


def answer_2(before, after):
    matrices = [(before[name], after[name]) for name in before if before[name].dim() == 2]
    spectra = [hd_pissa.update_spectrum(a, b) for a, b in matrices if not torch.equal(a, b)]
    return [hd_pissa.effective_rank(S) for S in spectra]


def answer_3(W, batches, K, r, lr):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    A = [(U * S.sqrt())[:, i * r:(i + 1) * r] for i in range(K)]
    B = [(S.sqrt()[:, None] * Vt)[i * r:(i + 1) * r] for i in range(K)]
    increments = [torch.zeros_like(factor) for factor in A + B]         # dA_0 .. dA_K-1, dB_0 .. dB_K-1
    optimizer = torch.optim.AdamW(increments, lr=lr, weight_decay=0.0)
    for X, Y in batches:
        for i in range(K):
            dY = (X[i] @ W - Y[i]) * 2 / Y[i].numel()
            increments[i].grad = X[i].T @ (dY @ B[i].T)
            increments[K + i].grad = (X[i] @ A[i]).T @ dY
        optimizer.step()
        for i in range(K):
            dA, dB = increments[i], increments[K + i]
            W = W + (dA @ B[i] + A[i] @ dB + dA @ dB) / K
        for increment in increments:
            increment.zero_()
    return W
