"""GaLore and APOLLO: full fine-tuning whose Adam sees a projected gradient, so that its moments are small.

Both step a weight W from its own gradient G, here turned so that G is (d, l) with d <= l:

    GaLore (arXiv 2403.03507)   P (d, k): the k leading left singular vectors of G, taken anew every `gap`
                                steps;  N = Adam(P^T G);  W <- W - lr P N
    APOLLO (arXiv 2412.05270)   P (k, d): random, from a seed, anew every `gap` steps;  N = Adam(P G);
                                W <- W - lr G diag(s),  s_j = |N_j| / |(P G)_j| for every column j, and the
                                whole step at most 1.01 times as long as the last one

k is the largest that keeps the state within that of AdamW on adapters of rank r, 2 r (d + l) numbers: two
moments of (k, l), and for GaLore P. The papers' constant scale is left out: the learning rate is swept.
"""

import torch

import hd_pissa


class Projected(torch.optim.Optimizer):
    """What both share: the turn to (d, l), Adam on (k, l), the budget. A subclass says what a step is."""

    def __init__(self, params, lr: float, r: int, gap: int = 30, seed: int = 0, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, dict(lr=lr))
        self.r, self.gap, self.seed, self.betas, self.eps = r, gap, seed, betas, eps
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dim() != 2:
                raise ValueError(f"a parameter of shape {tuple(p.shape)}: these optimizers project matrices; "
                                 "give biases and norms another optimizer")

    def rank(self, d: int, l: int) -> int:     # noqa: E741  the letters of the docstring
        return max(1, min(d, 2 * self.r * (d + l) // self.numbers(d, l)))

    def adam(self, state: dict, R: torch.Tensor) -> torch.Tensor:
        """Bias-corrected direction of Adam for the gradient R; the moments are in `state`."""
        b1, b2 = self.betas
        t = state["step"] = state.get("step", 0) + 1
        M, V = (state.setdefault(name, torch.zeros_like(R)) for name in ("M", "V"))
        M.lerp_(R, 1 - b1)
        V.lerp_(R.square(), 1 - b2)
        return (M / (1 - b1 ** t)) / ((V / (1 - b2 ** t)).sqrt() + self.eps)

    @torch.no_grad()
    def step(self, closure=None):
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                wide = p.shape[0] <= p.shape[1]
                G = p.grad if wide else p.grad.T                                # (d, l)
                step = self.direction(self.state[p], G, self.rank(*G.shape), index)
                p.sub_(step if wide else step.T, alpha=group["lr"])
                index += 1


class GaLore(Projected):
    @staticmethod
    def numbers(d: int, l: int) -> int:        # noqa: E741
        return 2 * l + d                                                        # for each of k: moments and P

    def direction(self, state, G, k, index):
        if state.get("step", 0) % self.gap == 0:
            state["P"] = torch.linalg.svd(G, full_matrices=False).U[:, :k].contiguous()     # (d, k)
        return state["P"] @ self.adam(state, state["P"].T @ G)


class Apollo(Projected):
    @staticmethod
    def numbers(d: int, l: int) -> int:        # noqa: E741
        return 2 * l                                                            # P comes from a seed

    def direction(self, state, G, k, index):
        seed = hd_pissa.seed_of("apollo", self.seed, index, state.get("step", 0) // self.gap)
        P = torch.randn((k, len(G)), generator=torch.Generator().manual_seed(seed)).to(G) / k ** 0.5
        R = P @ G                                                               # (k, l)
        s = self.adam(state, R).norm(dim=0) / (R.norm(dim=0) + self.eps)        # (l,)
        step = G * s
        norm = step.norm()
        if "norm" in state:
            step *= (1.01 * state["norm"] / (norm + self.eps)).clamp(max=1.0)
        state["norm"] = step.norm()
        return step
