"""HD-PiSSA in a training script of nanoGPT's shape: what changes is marked with <-.

    python tutorial/using/nanogpt.py
    torchrun --nproc_per_node=2 tutorial/using/nanogpt.py

Such a script joins the process group by hand, draws random blocks from a token file, steps through
micro-batches and saves model and optimizer in one file. Gone are the DDP wrapper with its gradient
synchronisation, the weight-decay groups, and the float16 scaler, which may skip a step on one process alone.
"""

import contextlib
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from shards import bind  # noqa: E402

import hd_pissa  # noqa: E402
import train  # noqa: E402

batch_size, block_size, micro_steps = 4, 32, 2      # rows a micro-batch; micro-batches of each shard a step
max_iters, warmup_iters, learning_rate, grad_clip = 10, 2, 1e-2, 1.0
rank, shards = 2, 4                                 # <- HD-PiSSA: r and K


class GPT(train.GPT):
    """Logits and loss, as nanoGPT's model returns them."""

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def get_lr(it: int) -> float:
    """Linear warm-up from 1/warmup_iters, then a cosine to a tenth."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / warmup_iters
    done = (it - warmup_iters) / (max_iters - warmup_iters)
    return learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def main(out: str | None = None, init_from: str | None = None, stop: int = max_iters) -> float:
    """Train to step `stop`, from the checkpoint `init_from` if given, save to `out`; the validation loss."""
    torch.set_num_threads(1)
    ddp = "RANK" in os.environ
    if ddp:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if "cuda" in device:
        torch.cuda.set_device(device)               # collectives run on the current device
    master_process = not ddp or dist.get_rank() == 0
    ctx = torch.autocast("cuda", torch.bfloat16) if "cuda" in device else contextlib.nullcontext()

    tokenizer = train.GPTTokenizer()
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    tokens = torch.tensor(tokenizer.encoding.encode_ordinary(text))
    data = {"train": tokens[:-len(tokens) // 10], "val": tokens[-len(tokens) // 10:]}

    def get_batch(split: str, *seed):
        generator = torch.Generator().manual_seed(hd_pissa.seed_of(split, *seed))
        starts = torch.randint(len(data[split]) - block_size, (batch_size,), generator=generator)
        x = torch.stack([data[split][i:i + block_size] for i in starts.tolist()])
        y = torch.stack([data[split][i + 1:i + 1 + block_size] for i in starts.tolist()])
        return x.to(device), y.to(device)

    model = GPT.from_state_dict(torch.load(train.DATA / "base.pt", weights_only=True)).to(device)
    adapters = hd_pissa.attach(model, rank, shards=shards)                                      # <-
    optimizer = torch.optim.AdamW(adapters.parameters(), learning_rate, weight_decay=0.0)       # <-
    bind(adapters, optimizer)                       # merges after every step                   # <-
    # No DDP(model): processes exchange increments in merge_, and W stays equal everywhere      # <-
    iter_num = 0
    if init_from:
        checkpoint = torch.load(init_from, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        iter_num = checkpoint["iter_num"]

    @torch.no_grad()
    def estimate_loss() -> float:
        model.eval()
        losses = [float(model(*get_batch("val", k))[1]) for k in range(8)]
        model.train()
        return sum(losses) / len(losses)

    before = estimate_loss()
    for it in range(iter_num, stop):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it)
        for s in range(adapters.S):                                                             # <-
            for micro_step in range(micro_steps):
                X, Y = get_batch("train", it, adapters.first + s, micro_step)   # <- own rows for every shard
                with adapters.shard(s), ctx:                                                    # <-
                    logits, loss = model(X, Y)
                (loss / micro_steps).backward()
        grad_norm = float(adapters.clip_grad_norm_(grad_clip))                                  # <-
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = estimate_loss()

    checksum = torch.stack([p.double().sum() for p in model.parameters()])[None]
    equal = bool((hd_pissa.gather_shards(checksum) == checksum).all())
    checkpoint = {"model": model.state_dict(), "iter_num": stop,
                  "optimizer": optimizer.state_dict()}      # on every process: it gathers      # <-
    if master_process:
        print(f"validation loss {before:.4f} -> {after:.4f}, norm of the last gradient {grad_norm:.3f}\n"
              f"CHECK W is the same on all {hd_pissa.world_size()} processes: {equal}")
        if out:
            torch.save(checkpoint, out)
    if ddp:
        dist.destroy_process_group()
    assert equal and after < before
    return after


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
