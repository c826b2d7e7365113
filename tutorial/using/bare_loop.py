"""HD-PiSSA in a bare PyTorch loop on any nn.Module: merge by hand, or let the optimizer do it.

    python tutorial/using/bare_loop.py
    torchrun --nproc_per_node=2 tutorial/using/bare_loop.py
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from shards import bind  # noqa: E402

import hd_pissa  # noqa: E402


def small_model() -> nn.Module:
    torch.manual_seed(0)                # every process starts with the same weights, as from a checkpoint
    return nn.Sequential(nn.Embedding(64, 48), nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 64))


def mini_batch(step: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one shard: the step and the shard's number over all processes decide, so K alone matters."""
    x = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(1000 * step + shard))
    return x, (5 * x + 3) % 64


def run(bound: bool, steps=range(30), state=None) -> tuple[nn.Module, list[float], dict]:
    model, losses = small_model(), []
    adapters = hd_pissa.attach(model, rank=2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-2, weight_decay=0.0)
    adapters.check(optimizer)                       # refuses optimizers that read the parameter
    if bound:
        bind(adapters, optimizer)                   # it merges, and saves A_i, B_i beside its moments
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in steps:
        for s in range(adapters.S):                 # the shards of this process; one of them needs no loop
            x, y = mini_batch(step, adapters.first + s)
            with adapters.shard(s):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                loss.backward()
        adapters.clip_grad_norm_(1.0)               # joint norm over the K shards of all processes
        optimizer.step()                            # fills dA_i, dB_i; if bound, merge_ follows
        if not bound:
            adapters.merge_()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}      # on every process
    adapters.detach_()                              # plain modules again
    return model, losses, state


def main() -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:                        # before attach, which asks how many processes there are
        dist.init_process_group("gloo")
    plain, losses, _ = run(bound=False)
    _, _, state = run(bound=True, steps=range(15))
    bound, _, _ = run(bound=True, steps=range(15, 30), state=state)
    equal = all(torch.equal(a, b) for a, b in zip(bound.parameters(), plain.parameters()))
    S = hd_pissa.update_spectrum(small_model()[1].weight, plain[1].weight)
    if hd_pissa.process_index() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}\n"
              f"effective rank of dW: {hd_pissa.effective_rank(S)} of {len(S)}; 2 K r = 16\n"
              f"CHECK 30 steps merged by hand are 15, a checkpoint and 15 more, bit for bit: {equal}")
    if dist.is_initialized():
        dist.destroy_process_group()
    assert equal and losses[-1] < losses[0]


if __name__ == "__main__":
    main()
