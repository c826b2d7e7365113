"""HD-PiSSA in a LightningModule: clipping, accumulation, precision and checkpoints stay Trainer's own.

    python tutorial/using/with_lightning.py
    torchrun --nproc_per_node=2 tutorial/using/with_lightning.py

(A file called lightning.py would be imported here in place of the library.)
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from shards import bind, deal  # noqa: E402

import hd_pissa_extra  # noqa: E402


class NoDDP(DDPStrategy):
    """Processes without the DDP wrapper: it refuses a model of which nothing trains."""

    def configure_ddp(self):
        pass


class HDPissaModule(lightning.LightningModule):
    def __init__(self, model, rank: int, shards: int, lr: float):
        super().__init__()
        self.model, self.rank, self.shards, self.lr = model, rank, shards, lr

    def setup(self, stage):
        strategy = self.trainer.strategy
        if stage != "fit":
            return
        if self.trainer.world_size > 1 and not isinstance(strategy, NoDDP) or (
                self.trainer.precision not in ("32-true", "bf16-mixed", "64-true")):
            raise ValueError(f"{type(strategy).__name__}, precision {self.trainer.precision}: use NoDDP() as "
                             "strategy of several processes, and precision 32-true or bf16-mixed")
        if hasattr(self, "adapters"):               # fit() again, or a Tuner before it: W as it is now is cut
            self.adapters.next_step()
            self.adapters.detach_()
        # Here the process group runs, whose processes attach counts, and no checkpoint is loaded yet.
        self.model.to(strategy.root_device)
        self.adapters = hd_pissa_extra.attach(self.model, self.rank, shards=self.shards)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.adapters.parameters(), self.lr, weight_decay=0.0)
        bind(self.adapters, optimizer)
        return optimizer

    def training_step(self, batch, _):
        losses = []
        for s, rows in enumerate(deal(batch, self.adapters.S)):
            with self.adapters.shard(s):
                losses.append(self.model(input_ids=rows, labels=rows).loss)
        self.log("loss", torch.stack(losses).mean().detach(), sync_dist=True)
        return torch.stack(losses).sum()            # each shard's gradient is that of its own loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if gradient_clip_algorithm == "value":
            raise ValueError("gradient_clip_algorithm='value' is not known here; use 'norm'")
        self.log("grad_norm", self.adapters.clip_grad_norm_(gradient_clip_val or torch.inf))


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, vocab_size=64))


def fit(folder, rows=None, epochs: int = 2, ckpt_path=None, **settings):
    """(module, trainer) after `epochs` of 6 steps of 16 rows over all processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rows = (torch.arange(96)[:, None] * 7 + 3 * torch.arange(12)) % 64 if rows is None else rows
    module = HDPissaModule(small_model(), rank=2, shards=4, lr=1e-2)
    trainer = lightning.Trainer(**dict(
        default_root_dir=folder, max_epochs=epochs, gradient_clip_val=1.0, devices=world,
        accelerator="gpu" if torch.cuda.is_available() else "cpu", strategy=NoDDP() if world > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False) |
        settings)
    trainer.fit(module, DataLoader(rows, 16 // world, drop_last=True), ckpt_path=ckpt_path)
    return module, trainer


def bare_loop(batches, S: int, steps_of: int = 1, clip: float = 1.0) -> LlamaForCausalLM:
    """The same training written out, on the batches of this process; `steps_of` of them make a step."""
    model = small_model().to(batches[0].device)
    adapters = hd_pissa_extra.attach(model, rank=2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
    for i, batch in enumerate(batches):
        for s, rows in enumerate(deal(batch, S)):
            with adapters.shard(s):
                (model(input_ids=rows, labels=rows).loss / steps_of).backward()
        if (i + 1) % steps_of == 0:
            adapters.clip_grad_norm_(clip)
            optimizer.step()
            adapters.merge_()
    return model


def main(out: str | None = None) -> None:
    torch.set_num_threads(1)
    seen, step = [], HDPissaModule.training_step
    HDPissaModule.training_step = functools.wraps(step)(
        lambda self, batch, i: seen.append(batch) or step(self, batch, i))
    with tempfile.TemporaryDirectory() as folder:
        module, trainer = fit(folder)
        HDPissaModule.training_step = step
        plain = bare_loop(seen, module.adapters.S)
        # Lightning has moved its model to the CPU
        equal = all(torch.equal(a, b) for a, b in zip(module.model.parameters(), plain.cpu().parameters()))
        # An epoch, a checkpoint, and one more by another module. (In the middle of an epoch Lightning begins
        # with its first rows again, and says so, unless the loader has a state_dict of its own.)
        path = trainer.strategy.broadcast(f"{folder}/half.ckpt")
        _, half = fit(folder, epochs=1)
        half.save_checkpoint(path)
        resumed, _ = fit(folder, ckpt_path=path)
        same = all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters()))
        if out and trainer.is_global_zero:
            module.model.save_pretrained(out)
        if trainer.is_global_zero:
            print(f"loss {float(trainer.callback_metrics['loss']):.4f}, norm of the last gradient "
                  f"{float(trainer.callback_metrics['grad_norm']):.3f}: {trainer.world_size} processes\n"
                  f"CHECK the weights are those of a bare loop over the same rows, bit for bit: {equal}\n"
                  f"CHECK 6 steps, a checkpoint and 6 more give the weights of 12, bit for bit: {same}")
        trainer.strategy.barrier()
    assert equal and same and float(trainer.callback_metrics["loss"]) < 4.12       # it begins at 4.14


if __name__ == "__main__":
    main(*sys.argv[1:])
