"""Baselines through the same loop: data-parallel LoRA, PiSSA and full fine-tuning."""

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import hd_pissa
import hd_pissa_extra


class Baseline:
    """One adapter per weight, or all weights, trained on the whole step batch by all processes.

        lora, pissa     Y = X W_res + s (X A) B,  A (m, r), B (r, n) trained
                        (W_res = W for lora, W - s A B for pissa)
        full            all weights of the model

    With the interface of hd_pissa.Adapters, as far as hd_pissa.train and a checkpoint use it.
    """

    whole_batch, applied, skip_nonfinite = True, torch.ones(()), 0

    def __init__(self, model, method: str, rank: int, K: int, targets, alpha, seed: int,
                 dropout: float = 0.0):
        hd_pissa.check_arguments(rank, K, alpha)
        hd_pissa_extra.check_arguments(dropout)
        self.K, self.S, self.step, self.mean_over = K, K // hd_pissa.world_size(), 0, 1
        self.seed, self.first = seed, hd_pissa.process_index() * self.S
        self.s = 1.0 if alpha is None else alpha / rank
        self.factors, self.slots, self.skipped, self._parameters = [], [], {}, {}
        model.requires_grad_(method == "full")
        if method == "full":
            self._parameters = dict(model.named_parameters())
            return
        found, self.skipped = hd_pissa.find_layers(model, targets, least=rank)
        init = {"lora": "lora", "pissa": "top"}[method]
        for name, module in found:
            W = module.weight.T if isinstance(module, nn.Linear) else module.weight     # (m, n)
            flat = hd_pissa.shard_factors(W, 1, rank, init, self.s, hd_pissa.seed_of(seed, name),
                                          hd_pissa_extra.components, name)
            A, B = flat[0].to(W).split((rank * W.shape[0], rank * W.shape[1]))
            A = A.view(-1, rank).clone().requires_grad_()                               # (m, r)
            B = B.view(rank, -1).clone().requires_grad_()                               # (r, n)
            if hd_pissa.world_size() > 1:
                for factor in (A, B):
                    dist.broadcast(factor.data, src=0)
            if method == "pissa":
                W.data.sub_(self.s * A.detach() @ B.detach())

            def residual(module, inputs, output, A=A, B=B):
                x = F.dropout(inputs[0], dropout, module.training) if dropout else inputs[0]
                return output + self.s * (x @ A) @ B

            self.factors.append((W, A, B, module.register_forward_hook(residual)))
            self._parameters |= {name + ".A": A, name + ".B": B}

    def parameters(self):
        return list(self._parameters.values())

    def named_parameters(self, first: int = 0):
        return self._parameters.items()

    def tensors(self) -> dict:
        return self._parameters if self.factors else {}         # all weights are the model's own

    def resume(self, step: int, mean_over: int):
        self.step = step

    def shard(self, i):
        return contextlib.nullcontext()         # one adapter, whichever rows come

    def check(self, optimizer):
        """Any optimizer works on plain parameters."""

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Sum the gradients over the processes, then clip: the first moment they must be whole."""
        if hd_pissa.world_size() > 1:
            for p in self.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm

    def merge_(self):
        """There is nothing to merge: the optimizer has moved what is trained."""
        self.next_step()

    def step_(self, optimizer, told: torch.Tensor) -> list:
        """optimizer.step(); no merge protects what it moves, so the losses `told` are read before."""
        rows = hd_pissa.gather_shards(told).tolist()
        if not all(math.isfinite(sum(row)) for row in rows):
            hd_pissa_extra.leave_out(self, rows)
            return rows
        optimizer.step()
        self.next_step()
        return rows

    def next_step(self):
        self.step += 1

    @torch.no_grad()
    def detach_(self):
        """W <- W_res + s A B, and plain modules again."""
        for W, A, B, hook in self.factors:
            W.data.add_(self.s * A @ B)
            hook.remove()
