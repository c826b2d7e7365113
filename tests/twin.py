"""The reference twin: K devices simulated densely in one process, equation by equation, without hd_pissa.

Slow and plain on purpose: its own full SVD, its own AdamW, an explicit (m, n) matrix dU_i per device. The
model is Y = tanh(X W_1 + b_1) W_2 with squared error; gradients of W come from autograd, and
g_A = s dW B^T, g_B = s A^T dW from the chain rule.
"""

import torch


def forward(x, weights, bias):
    return torch.tanh(x @ weights[0] + bias) @ weights[1]


def loss_of(x, y, weights, bias):
    return (forward(x, weights, bias) - y).square().mean()


def slices(W, K, r, s=1.0):
    """[(A_i, B_i)] with A_i = U_i (S_i / s)^1/2 and B_i = (S_i / s)^1/2 V_i^T, from a full SVD."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root = (S / s).sqrt()
    return [((U * root)[:, i * r : (i + 1) * r], (root[:, None] * Vt)[i * r : (i + 1) * r]) for i in range(K)]


def adamw(grad, state, lr, betas=(0.9, 0.999), eps=1e-8):
    """The increment of one AdamW step without weight decay, with bias correction; state: [m, v, t]."""
    state[0] = betas[0] * state[0] + (1 - betas[0]) * grad
    state[1] = betas[1] * state[1] + (1 - betas[1]) * grad * grad
    state[2] += 1
    m_hat, v_hat = state[0] / (1 - betas[0] ** state[2]), state[1] / (1 - betas[1] ** state[2])
    return -lr * m_hat / (v_hat.sqrt() + eps)


def run(
    weights, bias, data, K, r, lr, aggregate="mean", alpha=None, factors=None, optimizer=adamw, clip=None
):
    """Weights after len(data) steps; data[t][i] = (x, y) of device i; factors[layer][i] = (A, B)."""
    weights, s = [W.clone() for W in weights], 1.0 if alpha is None else alpha / r
    factors = factors or [slices(W, K, r, s) for W in weights]
    state = {(j, i, k): [0.0, 0.0, 0] for j in range(len(weights)) for i in range(K) for k in "AB"}
    for batch in data:
        grads = {}
        for i, (x, y) in enumerate(batch):
            leaves = [W.clone().requires_grad_() for W in weights]
            for j, dW in enumerate(torch.autograd.grad(loss_of(x, y, leaves, bias), leaves)):
                A, B = factors[j][i]
                grads[j, i, "A"], grads[j, i, "B"] = s * dW @ B.T, s * A.T @ dW
        if clip is not None:
            norm = sum(g.square().sum() for g in grads.values()).sqrt()
            grads = {k: g * min(1.0, clip / (norm + 1e-6)) for k, g in grads.items()}
        for j in range(len(weights)):
            total = torch.zeros_like(weights[j])
            for i in range(K):
                A, B = factors[j][i]
                dA = optimizer(grads[j, i, "A"], state[j, i, "A"], lr)
                dB = optimizer(grads[j, i, "B"], state[j, i, "B"], lr)
                total += s * (dA @ B + A @ dB + dA @ dB)  # dU_i
            weights[j] = weights[j] + (total / K if aggregate == "mean" else total)
    return weights
