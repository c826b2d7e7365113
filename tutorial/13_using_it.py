"""Chapter 13: hd_pissa in a loop of one's own, against the whole method written anew in 19 lines."""

import copy
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from lesson import check, save_figure

import hd_pissa

K, R, LR, STEPS, CLIP = 4, 2, 2e-2, 60, 0.1


def net():
    body = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20), nn.Tanh())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(20, 5))).double()


torch.manual_seed(0)
base = net()
inputs = torch.randn((STEPS, K, 32, 24), dtype=torch.float64)                   # a mini-batch for each shard
labels = (inputs @ torch.randn((24, 5), dtype=torch.float64)).argmax(-1)


# %% fold: A loop of one's own: `adapters` stands in five lines
def with_hd_pissa(model):
    adapters, losses = hd_pissa.attach(model, R, shards=K), []
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=LR, weight_decay=0.0)
    for step in range(STEPS):
        for i in range(K):
            with adapters.shard(i):
                losses.append(F.cross_entropy(model(inputs[step, i]), labels[step, i]))
                losses[-1].backward()
        adapters.clip_grad_norm_(CLIP)          # over all shards, on all processes
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return torch.stack(losses).detach().view(STEPS, K).mean(1), adapters


# %% The method anew, from chapters 2 to 4; it takes the gradient of the whole W
def anew(model):
    weights, shards, losses = [model.body[0].weight, model.body[2].weight], [], []      # stored as W^T
    for Wt in weights:
        U, S, Vt = torch.linalg.svd(Wt.detach().T, full_matrices=False)
        A, B = (U * S.sqrt())[:, :K * R].split(R, dim=1), (S.sqrt()[:, None] * Vt)[:K * R].split(R)
        shards.append([(a, b, torch.zeros_like(a), torch.zeros_like(b)) for a, b in zip(A, B)])
    increments = [increment for shard in shards for factors in shard for increment in factors[2:]]
    optimizer = torch.optim.AdamW(increments, lr=LR, weight_decay=0.0)
    for step in range(STEPS):
        for i in range(K):
            losses.append(F.cross_entropy(model(inputs[step, i]), labels[step, i]))
            for G, (A, B, dA, dB) in zip(torch.autograd.grad(losses[-1], weights), (x[i] for x in shards)):
                dA.grad, dB.grad = G.T @ B.T, A.T @ G.T
        nn.utils.clip_grad_norm_(increments, CLIP)
        optimizer.step()
        for Wt, shard in zip(weights, shards):
            Wt.data += sum((A + dA) @ (B + dB) - A @ B for A, B, dA, dB in shard).T / K
        torch._foreach_zero_(increments)
    return torch.stack(losses).detach().view(STEPS, K).mean(1)


# %% fold: Both, and what is left in the model
def draw(axes):
    axes.plot(losses, color="0.8", lw=5, label="hd_pissa")
    axes.plot(expected, color="C0", label="written anew")
    axes.set(xlabel="step", ylabel="loss, mean over the shards")
    axes.legend()


model, second, fresh = copy.deepcopy(base), copy.deepcopy(base), net()
(losses, adapters), expected = with_hd_pissa(model), anew(second)
save_figure(__file__, draw)
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; left out: {adapters.skipped}")
check("loss of every step", losses, expected, rtol=1e-9)
check("weights", *(nn.utils.parameters_to_vector(m.parameters()) for m in (model, second)), rtol=1e-9)
fresh.load_state_dict(model.state_dict())       # the keys are the plain model's
check("a plain model with these weights", fresh(inputs[0, 0]), model(inputs[0, 0]))
