"""MoRA (Jiang et al. 2024, arXiv 2405.12130), which PEFT lacks: one square matrix M instead of A and B.

    q = floor(sqrt((m + n) r)), made even      M (q, q) has as many numbers as LoRA's A and B together
    X (T, m) -> (T, g, q)                       g = ceil(m / q) groups, the last filled up from the first
    group j is rotated by the angles j theta_k, theta_k = 10000^(-2k / q), as rotary embeddings are
    Y = X W + cut(concatenate_j(rotated group j  M))    repeated or cut to n outputs

The paper's rotation variant (its section 4.2), the one it recommends for small r. M starts at zero.
"""

import math

import torch
import torch.nn as nn

import hd_pissa

from .plain import Plain


def side(m: int, n: int, r: int) -> int:
    """q, the side of M for LoRA's budget of rank r: even, at least 2."""
    return max(2, math.isqrt((m + n) * r) // 2 * 2)


def rotated_groups(x: torch.Tensor, q: int) -> torch.Tensor:
    """(..., m) -> (..., g, q), group j rotated by j times the angles."""
    m = x.shape[-1]
    g = -(-m // q)
    x = torch.cat((x, x[..., :g * q - m]), dim=-1) if g * q > m else x      # (..., g q)
    x = x.unflatten(-1, (g, q))
    theta = 10000.0 ** (-torch.arange(0, q, 2, dtype=x.dtype) / q)          # (q / 2,)
    angle = torch.outer(torch.arange(g, dtype=x.dtype), theta)              # (g, q / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :q // 2], x[..., q // 2:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def mora(x: torch.Tensor, M: torch.Tensor, n: int) -> torch.Tensor:
    """(..., m) -> (..., n), linear in x and in M."""
    y = (rotated_groups(x, M.shape[0]) @ M).flatten(-2)                     # (..., g q)
    return torch.cat([y] * -(-n // y.shape[-1]), dim=-1)[..., :n]


def attach(model: nn.Module, r: int, K: int, seed: int = 0) -> Plain:
    """MoRA with LoRA's budget of rank r on every linear layer but the head."""
    model.requires_grad_(False)
    trained, hooks = {}, []
    for name, module in hd_pissa.find_layers(model, "all-linear")[0]:
        n, m = module.weight.shape
        q = side(m, n, r)
        M = torch.zeros((q, q), dtype=module.weight.dtype, requires_grad=True)

        def add(module, inputs, output, M=M, n=n):
            return output + mora(inputs[0], M, n)

        trained[name + ".M"] = M
        hooks.append((module, M, m, n, module.register_forward_hook(add)))

    @torch.no_grad()
    def finish():
        for module, M, m, n, hook in hooks:
            module.weight += mora(torch.eye(m, dtype=M.dtype), M, n).T      # dW (m, n), stored transposed
            hook.remove()

    return Plain(model, trained, K, seed, finish)
