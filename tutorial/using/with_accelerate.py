"""HD-PiSSA in a loop of Hugging Face Accelerate.

    python tutorial/using/with_accelerate.py
    torchrun --nproc_per_node=2 tutorial/using/with_accelerate.py

The model is prepared as for evaluation, without DDP: processes exchange increments in merge_, not gradients.
(A file called accelerate.py would be imported here in place of the library.)
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from shards import bind, deal  # noqa: E402

import hd_pissa  # noqa: E402


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, vocab_size=64))


def run(steps: int, save: str = "", load: str = "", **settings):
    """(accelerator, model, batches, norms) after steps of 2 micro-batches of 16 rows over all processes."""
    # Before attach: it starts the process group, whose processes attach counts.
    settings = dict(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2) | settings
    accelerator = Accelerator(**settings)
    if accelerator.scaler is not None:
        raise ValueError("mixed_precision='fp16' leaves out a step on one process, the others wait for it in "
                         "merge_; use 'bf16'")
    model = small_model().to(accelerator.device)
    adapters = hd_pissa.attach(model, rank=2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    bind(adapters, optimizer)
    rows = (torch.arange(96)[:, None] * 7 + 3 * torch.arange(12)) % 64
    loader = DataLoader(rows, 16 // accelerator.num_processes, drop_last=True)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    if load:
        accelerator.load_state(load)                # W, and with the optimizer what bind added
    seen, norms = [], []
    while len(norms) < steps:
        for batch in loader:                                                # rows of this process
            seen.append(batch)
            with accelerator.accumulate(model):
                for s, part in enumerate(deal(batch, adapters.S)):          # rows of each of its shards
                    with adapters.shard(s):
                        loss = model(input_ids=part, labels=part).loss
                    accelerator.backward(loss)
                if accelerator.sync_gradients:      # over all shards, which Accelerate's own would not clip
                    norms.append(float(adapters.clip_grad_norm_(1.0)))
                optimizer.step()
                optimizer.zero_grad()
            if len(norms) == steps:
                break
    if save:
        accelerator.save_state(save)
    return accelerator, model, seen, norms


def bare_loop(batches, S: int, device) -> LlamaForCausalLM:
    """The same training written out."""
    model = small_model().to(device)
    adapters = hd_pissa.attach(model, rank=2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    for i, batch in enumerate(batches):
        for s in range(S):
            with adapters.shard(s):
                (model(input_ids=deal(batch, S)[s], labels=deal(batch, S)[s]).loss / 2).backward()
        if i % 2:
            adapters.clip_grad_norm_(1.0)
            optimizer.step()
            adapters.merge_()
    return model


def main(out: str | None = None) -> None:
    torch.set_num_threads(1)
    accelerator, model, seen, norms = run(6)
    plain = bare_loop(seen, 4 // accelerator.num_processes, accelerator.device)
    equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        folder = broadcast_object_list([folder])[0]
        run(3, save=folder)                         # an epoch, and another one by a new model
        _, resumed, _, _ = run(3, load=folder)
        accelerator.wait_for_everyone()
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    accelerator.print(f"{accelerator.num_processes} processes, norms of the gradients {norms[0]:.3f} to "
                      f"{norms[-1]:.3f}\n"
                      f"CHECK the weights are those of a bare loop over the same rows, bit for bit: {equal}\n"
                      f"CHECK 3 steps, save_state and 3 more give the weights of 6, bit for bit: {same}")
    if out:
        model.save_pretrained(out, is_main_process=accelerator.is_main_process)
    accelerator.end_training()
    assert equal and same and norms[-1] < norms[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
