"""Checks of chapter 3's exercises: python tutorial/exercises/03_muted_layer.py my_answers.py"""

import torch
from grade import main
from torch.utils.flop_counter import FlopCounterMode

T, M, N, R = 40, 24, 20, 2


def draw(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def compare(got, expected, names):
    assert isinstance(got, tuple) and len(got) == len(names), f"return the tuple ({', '.join(names)})"
    for name, a, b in zip(names, got, expected):
        assert a.shape == b.shape, f"{name} is {tuple(a.shape)}, must be {tuple(b.shape)}"
        error = float((a - b).abs().max() / b.abs().max())
        assert error < 1e-10, f"{name} is off by {error:.1e} of its largest entry from what autograd gives"


def check_1(answer):
    """Oracle: autograd on the scaled PiSSA layer."""
    X, dY, W, A, B = draw((T, M), (T, N), (M, N), (M, R), (R, N))
    for s in (0.5, 2.0):
        leaves = [t.clone().requires_grad_() for t in (A, B)]
        Y = X @ (W - s * A @ B) + s * (X @ leaves[0]) @ leaves[1]
        compare(answer(X, dY, A, B, s), torch.autograd.grad((Y * dY).sum(), leaves), ("g_A", "g_B"))


def check_2(answer):
    """Oracle: autograd on increments at zero, the mask on their input."""
    X, dY, W, A, B, noise = draw((T, M), (T, N), (M, N), (M, R), (R, N), (T, M))
    D = (noise > 0) / 0.5
    x, dA, dB = (t.clone().requires_grad_() for t in (X, 0 * A, 0 * B))
    Y = x @ W + (D * x) @ ((A + dA) @ (B + dB) - A @ B)
    expected = torch.autograd.grad((Y * dY).sum(), (x, dA, dB))
    compare(answer(X, D, dY, W, A, B), expected, ("dX", "g_A", "g_B"))


def check_3(answer):
    """Oracles: X W to the bit, autograd on increments at zero, and torch's counter of operations."""
    X, dY, W, A, B = draw((T, M), (T, N), (M, N), (M, R), (R, N))
    mine, oracle = ([t.clone().requires_grad_() for t in (X, 0 * A, 0 * B)] for _ in range(2))
    x, dA, dB = oracle
    expected = torch.autograd.grad(((x @ (W + (A + dA) @ (B + dB) - A @ B)) * dY).sum(), oracle)
    with FlopCounterMode(display=False) as forward:
        Y = answer(mine[0], W, A, B, *mine[1:])
    assert isinstance(Y, torch.Tensor) and torch.equal(Y, X @ W), "Y must be X W to the last bit"
    with FlopCounterMode(display=False) as backward:
        Y.backward(dY)
    for name, leaf in zip(("X", "dA", "dB"), mine):
        assert leaf.grad is not None, f"the backward left {name}.grad empty"
    compare(tuple(leaf.grad for leaf in mine), expected, ("X.grad", "dA.grad", "dB.grad"))
    plain, thin = 2 * T * M * N, 4 * T * R * (M + N)
    used = forward.get_total_flops()
    assert used <= plain, f"the forward takes {used} operations, X W alone {plain}"
    used = backward.get_total_flops()
    assert used <= plain + thin, f"the backward takes {used} operations; {plain + thin} do, mind the brackets"


def through_the_product(X, W, A, B, dA, dB):
    """Right numbers, but a dense product in the forward."""
    return X @ W + X @ ((A + dA) @ (B + dB) - A @ B)


class Dense(torch.autograd.Function):
    """Right numbers, but g_A and g_B by way of X^T dY."""

    @staticmethod
    def forward(ctx, X, W, A, B, dA, dB):
        ctx.save_for_backward(X, W, A, B)
        return X @ W

    @staticmethod
    def backward(ctx, dY):
        X, W, A, B = ctx.saved_tensors
        G = X.T @ dY
        return dY @ W.T, None, None, None, G @ B.T, A.T @ G


WRONG_3 = [through_the_product, Dense.apply, lambda X, W, A, B, dA, dB: X @ W]


if __name__ == "__main__":
    main(globals())
