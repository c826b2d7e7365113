"""Chapter 6: shards on one process and on two end with the same weights, bit for bit."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from lesson import check, save_figure

import hd_pissa

R, STEPS, ROWS, SIZES = 2, 20, 8, (32, 48, 16)  # components and rows of a shard; layer widths
CASES = 2, 4                                    # K: one shard a process, as in the paper, and two
g = torch.Generator().manual_seed(0)
TEACHER = torch.randn((SIZES[0], SIZES[2]), generator=g) / SIZES[0] ** 0.5
DATA = torch.randn((STEPS, max(CASES) * ROWS, SIZES[0]), generator=g)


# %% A run of K shards, however many of them live in this process
def train(K):
    """Losses (STEPS, shards of this process), the final weights, and how much AdamW holds here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*SIZES[:2]), nn.Tanh(), nn.Linear(*SIZES[1:]))
    adapters = hd_pissa.attach(model, R, shards=K)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-2, weight_decay=0.0)
    losses = torch.zeros((STEPS, adapters.S))
    for step, batch in enumerate(DATA):
        mini_batches = batch.split(ROWS)        # shard i trains on rows i ROWS .. (i + 1) ROWS - 1
        for s in range(adapters.S):
            X = mini_batches[adapters.first + s]
            with adapters.shard(s):
                loss = (model(X) - X @ TEACHER).square().mean()
                loss.backward()
            losses[step, s] = loss.detach()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, weights, sum(t.numel() for t in moments)


# %% fold: Figure, start of the processes, checks
def device(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save([train(K) for K in CASES], f"{folder}/{rank}.pt")


def draw(axes):
    """Four devices of one shard, and one device of four."""
    for panel, devices in zip(axes, (4, 1)):
        bars = [(i // (4 // devices), i % (4 // devices), 1, f"shard {i}", f"C{i}") for i in range(4)]
        bars += [(d, 4 // devices, 0.9, "merge", "0.4") for d in range(devices)]
        for lane, start, width, text, color in bars:
            panel.broken_barh([(start, width - 0.06)], (-lane - 0.4, 0.8), color=color)
            panel.text(start + width / 2 - 0.03, -lane, text, ha="center", va="center", color="w", fontsize=7)
        panel.set(xlim=(0, 5), ylim=(-3.6, 0.6), xticks=[], xlabel="time of a step (not to scale)",
                  yticks=[-d for d in range(devices)], yticklabels=[f"device {d}" for d in range(devices)])


if __name__ == "__main__":
    alone = [train(K) for K in CASES]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(device, (folder,), nprocs=2)
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    print("K  processes  AdamW's numbers in each  loss, first step  loss, last step")
    for case, K in enumerate(CASES):
        for processes in ([alone[case]], [rank[case] for rank in ranks]):
            mean = torch.cat([losses for losses, _, _ in processes], dim=1).mean(1)
            held = processes[0][2]
            print(f"{K}  {len(processes):9}  {held:23,}  {mean[0]:16.4f}  {mean[-1]:15.4f}")
    for case, K in enumerate(CASES):
        for rank in range(2):
            weights = ranks[rank][case][1]
            check(f"K = {K}: W of process {rank} of 2, against one process", weights, alone[case][1])
        check(f"AdamW's numbers, 2 S r (m + n): S = {K} and {K // 2}", [alone[case][2], ranks[0][case][2]],
              [2 * S * R * (sum(SIZES[:2]) + sum(SIZES[1:])) for S in (K, K // 2)])
        first, last = alone[case][0][[0, -1]].mean(1)
        check(f"K = {K}: the loss fell by a third", bool(last < first * 2 / 3), True)
    save_figure(__file__, draw, columns=2, size=(7.0, 2.6))
