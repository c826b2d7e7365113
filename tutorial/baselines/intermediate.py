"""The Intermediate Method (figure 2b of the paper): orthogonal adapters without the direct weight update.

Device i trains its own slice A_i, B_i (components ir .. (i+1)r - 1) against its own residual weight,

    Y = X (W_res,i + A_i B_i),  W_res,i = W - A_i B_i at the start,

on its own mini-batches with its own AdamW state, and never hears of the others. The paper leaves open how
the devices become one model; here, as in one round of federated averaging, by the mean of the K weights:

    W <- 1/K sum_i (W_res,i + A_i B_i)

All K devices live in one process; `shard(i)` switches.
"""

import contextlib

import torch
import torch.nn as nn

import hd_pissa

from .plain import Plain


class Intermediate(Plain):
    whole_batch = False             # each device minimises the mean over its own tokens

    def __init__(self, model: nn.Module, r: int, K: int, seed: int = 0, init: str = "hd_pissa"):
        model.requires_grad_(False)
        self.layers, self.current, trained = [], 0, {}
        for name, module in hd_pissa.find_layers(model, "all-linear")[0]:
            W = module.weight.detach().T                                    # (m, n)
            m = W.shape[0]
            flat = hd_pissa.shard_factors(W, K, r, init, 1.0, hd_pissa.seed_of(seed, name)).to(W)
            A = [row[:r * m].view(m, r).clone().requires_grad_() for row in flat]    # (m, r) each
            B = [row[r * m:].view(r, -1).clone().requires_grad_() for row in flat]          # (r, n) each
            start = [(a.detach().clone(), b.detach().clone()) for a, b in zip(A, B)]

            def own(module, inputs, output, A=A, B=B, start=start):
                # X W_res,i + X A_i B_i = X W - X A0 B0 + X A B, without K copies of the weight
                if self.current is None:
                    return output
                x, i = inputs[0], self.current
                return output + (x @ A[i]) @ B[i] - (x @ start[i][0]) @ start[i][1]

            self.layers.append((module, A, B, start, module.register_forward_hook(own)))
            for i in range(K):
                trained |= {f"{name}.shard{i}.A": A[i], f"{name}.shard{i}.B": B[i]}
        super().__init__(model, trained, K, seed)

    @contextlib.contextmanager
    def shard(self, i: int):
        before, self.current = self.current, i
        try:
            yield
        finally:
            self.current = before

    @torch.no_grad()
    def _add(self, share: float):
        for module, A, B, start, _ in self.layers:
            for a, b, (a0, b0) in zip(A, B, start):
                module.weight.add_((a @ b - a0 @ b0).T, alpha=share / self.K)

    @contextlib.contextmanager
    def result(self):
        kept = [module.weight.detach().clone() for module, *_ in self.layers]
        self._add(1.0)
        with self.shard(None):
            yield
        for (module, *_), W in zip(self.layers, kept):
            module.weight.data.copy_(W)

    def detach_(self):
        self._add(1.0)
        for *_, hook in self.layers:
            hook.remove()
