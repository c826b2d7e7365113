"""Other fixed bases and another optimizer for the direct weight update, for hd_pissa_extra.attach.

`decompose=` takes a function with the arguments of hd_pissa_extra.components; shard i gets components
ir .. (i+1)r - 1 of whatever it returns, and A_i = U S^1/2, B_i = S^1/2 Vt.
"""


import torch

import hd_pissa
import hd_pissa_extra


def orthonormal(W, k, name="W"):
    """The SVD basis without its scale: A_i, B_i have orthonormal columns and rows."""
    U, S, Vt = hd_pissa_extra.components(W, k, name)
    return U, torch.ones_like(S), Vt


def interleaved(K: int):
    """Shard i gets components i, i + K, i + 2K, ... instead of a block: shards of nearly equal size."""
    def decompose(W, k, name="W"):
        U, S, Vt = hd_pissa_extra.components(W, k, name)
        order = torch.arange(k).view(-1, K).T.flatten()
        return U[:, order], S[order], Vt[order]
    return decompose


def drawn(*seed):
    """Random orthonormal U and V, S = 1, drawn from the layer and `seed`; without one, always alike."""
    def decompose(W, k, name="W"):
        generator = torch.Generator().manual_seed(hd_pissa.seed_of("basis", *seed, name))
        U, V = (torch.linalg.qr(torch.randn((side, k), generator=generator, dtype=torch.float64)).Q
                for side in W.shape)                                        # (m, k), (n, k)
        return U.to(W), torch.ones(k).to(W), V.T.to(W)
    return decompose


def dct(seed: int):
    """The basis of hd_pissa_extra's init="random" as one that is kept: the same numbers, S = 1."""
    def decompose(W, k, name="W"):
        U, V = hd_pissa_extra.seeded_columns((*W.shape,), 0, k, hd_pissa.seed_of("dct", seed, name), W.device,
                                             torch.float64)             # (k, m), (k, n)
        return U.T.to(W), torch.ones(k).to(W), V.to(W)
    return decompose


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is orthogonalised: one moment instead of AdamW's two.

        M <- beta M + (1 - beta) g,  step = lr sqrt(max(m, r)) U V^T of the look-ahead (1 - beta) g + beta M

    U V^T is computed exactly by SVD: the matrices are thin. sqrt(max(m, r)) makes an entry about lr in size,
    as Adam's is, so learning rates are comparable.
    """

    def __init__(self, params, lr: float, beta: float = 0.95):
        super().__init__(params, dict(lr=lr, beta=beta, weight_decay=0.0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta = group["beta"]
            for p in group["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                moment.lerp_(p.grad, 1 - beta)
                look = p.grad.lerp(moment, beta)                            # Nesterov's look-ahead
                U, S, Vt = torch.linalg.svd(look, full_matrices=False)
                keep = (S > 1e-6 * S[0]).to(S)
                p.sub_((U * keep) @ Vt, alpha=group["lr"] * max(p.shape) ** 0.5)
