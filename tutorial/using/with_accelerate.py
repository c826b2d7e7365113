"""HD-PiSSA in a loop of Hugging Face Accelerate.

    python tutorial/using/with_accelerate.py
    torchrun --nproc_per_node=2 tutorial/using/with_accelerate.py

The model is prepared as for evaluation, without DDP: processes exchange increments in merge_, not gradients.
(A file called accelerate.py would be imported here in place of the library.)
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hd_pissa  # noqa: E402


def main(out: str | None = None) -> None:
    torch.set_num_threads(1)
    # Before attach: it starts the process group, whose processes attach counts.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, vocab_size=64))
    model.to(accelerator.device)
    adapters = hd_pissa.attach(model, rank=2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: adapters.merge_())
    rows = (torch.arange(96)[:, None] * 7 + 3 * torch.arange(12)) % 64
    loader = DataLoader(rows, 16 // accelerator.num_processes, shuffle=True, drop_last=True,
                        generator=torch.Generator().manual_seed(0))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer, loader = accelerator.prepare(optimizer, loader)

    def loss_of_all() -> float:
        with torch.no_grad():
            x = rows.to(accelerator.device)
            return float(model(input_ids=x, labels=x).loss)

    before = loss_of_all()
    for _ in range(2):
        for batch in loader:                                            # rows of this process
            for s, part in enumerate(batch.chunk(adapters.S)):          # rows of each of its shards
                with adapters.shard(s):
                    loss = model(input_ids=part, labels=part).loss
                accelerator.backward(loss)
            adapters.clip_grad_norm_(1.0)           # over all processes' shards, which Accelerate's would not
            optimizer.step()
            optimizer.zero_grad()

    W = torch.cat([p.detach().flatten() for p in model.parameters()])[None]
    equal = bool((hd_pissa.gather_shards(W) == W).all())
    after = loss_of_all()
    accelerator.print(f"loss {before:.4f} -> {after:.4f}\n"
                      f"CHECK W is the same on all {accelerator.num_processes} processes: {equal}")
    if out:
        model.save_pretrained(out, is_main_process=accelerator.is_main_process)
    accelerator.end_training()
    assert equal and after < before


if __name__ == "__main__":
    main(*sys.argv[1:])
