"""Adapters for the token embedding, a weight with two uses here: it is looked up, and it is the output head.

The mute of hd_pissa.py sits in the forward of a linear layer. A weight with several uses has no such place,
but the chain rule needs none: the gradients of its factors are products with the weight's own gradient G,

    dL/dA_i = G B_i^T,    dL/dB_i = A_i^T G,    G = dL/dW of the whole batch, (m, n)

G is kept from the backward to the step; the optimizer has moments of the factors alone.
"""

import torch

import hd_pissa


class Factors:
    """A (m, k) and B (k, n) on one weight W (m, n), trained from the whole batch's gradient of W."""

    def __init__(self, W: torch.nn.Parameter, K: int, r: int, init: str, decompose=hd_pissa.components,
                 name: str = "W", seed: int = 0):
        m, n = W.shape
        seed = hd_pissa.seed_of(seed, name)
        rows = hd_pissa.shard_factors(W.detach(), K, r, init, 1.0, seed, decompose, name)   # (K, m r + r n)
        self.W = W.requires_grad_(True)
        self.A = rows[:, :r * m].view(K, m, r).transpose(0, 1).reshape(m, K * r).to(W)      # (m, Kr)
        self.B = rows[:, r * m:].reshape(K * r, n).to(W)                        # (Kr, n)

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Project before and merge after every step of an optimizer that holds `parameters`."""
        optimizer.register_step_pre_hook(lambda *_: self.project())
        optimizer.register_step_post_hook(lambda *_: self.merge_())

    @torch.no_grad()
    def project(self) -> None:
        G, (left, right) = self.W.grad, self.parameters()
        left.grad, right.grad = G @ self.B.T, self.A.T @ G                      # (m, Kr), (Kr, n)
        self.W.grad = None


class Shards(Factors):
    """HD-PiSSA, summed: A_i, B_i stay, W <- W + sum_i dU_i.

    A = [A_1 ... A_K] and B stand side by side, as do the increments: sum_i dA_i B_i = dA B, and AdamW goes
    entry by entry, so the K shards take the step that they would take alone.
    """

    def __init__(self, W, K, r, decompose, name):
        super().__init__(W, K, r, "hd_pissa", decompose, name)
        self.dA, self.dB = torch.zeros_like(self.A), torch.zeros_like(self.B)

    def parameters(self) -> list[torch.Tensor]:
        return [self.dA, self.dB]

    @torch.no_grad()
    def merge_(self) -> None:
        self.W.add_(self.dA @ self.B + (self.A + self.dA) @ self.dB)
        self.dA.zero_()
        self.dB.zero_()


class LowRank(Factors):
    """LoRA and PiSSA: A, B are trained, W = W_res + A B is written out anew after every step."""

    def __init__(self, W, r, method, name, seed):
        super().__init__(W, 1, r, {"lora": "lora", "pissa": "top"}[method], name=name, seed=seed)
        self.W_res = W.detach() - self.A @ self.B

    def parameters(self) -> list[torch.Tensor]:
        return [self.A, self.B]

    @torch.no_grad()
    def merge_(self) -> None:
        self.W.copy_(self.W_res + self.A @ self.B)
