"""HD-PiSSA under the Hugging Face Trainer: one process with virtual devices, or torchrun.

    python tutorial/using/trainer.py
    torchrun --nproc_per_node=2 tutorial/using/trainer.py

Trainer knows the model's own parameters alone, and none of them trains. One hook of the optimizer clips as
it would do, another merges; a short training step gives every shard its own rows; a callback keeps what a
checkpoint needs beside W. README.md here says what was found out about it.
"""

import functools
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hd_pissa  # noqa: E402


class ShardedTrainer(Trainer):
    """Every shard of this process trains on its own part of the rows, with the mean over its own tokens."""

    def __init__(self, *args, adapters, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapters = adapters
        # As for evaluation, so without DDP, which refuses a model of which nothing trains.
        prepare = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.prepare_model = prepare

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss, S = 0.0, self.adapters.S
        for s in range(S):
            rows = {name: tensor.chunk(S)[s] for name, tensor in inputs.items()}
            with self.adapters.shard(s):
                loss += super().training_step(model, rows) / S  # num_items_in_batch counts all shards' tokens
        return loss


def hook(optimizer, adapters, max_grad_norm: float = 0.0) -> None:
    """Clip before a step, merge after it; merge_ drops the gradients, as Trainer zeroes the model's alone."""
    def before(*_):
        adapters.clip_grad_norm_(max_grad_norm or math.inf)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: adapters.merge_())


class KeepShards(TrainerCallback):
    """A file of each process in a checkpoint: A_i, B_i and moments, of which Trainer keeps process 0's."""

    def __init__(self, adapters, optimizer):
        self.adapters, self.optimizer = adapters, optimizer

    def file(self, args, state) -> Path:
        name = f"hd_pissa_{hd_pissa.process_index()}.pt"
        return Path(args.output_dir, f"checkpoint-{state.global_step}", name)

    def on_save(self, args, state, control, **kwargs):
        kept = {"adapters": self.adapters.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(kept, self.file(args, state))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:                       # resumed; Trainer has read W and the schedule
            kept = torch.load(self.file(args, state), weights_only=True)
            self.adapters.load_state_dict(kept["adapters"])
            self.optimizer.load_state_dict(kept["optimizer"])


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, vocab_size=64))


def small_data(rows: int = 96) -> list[dict]:
    x = (torch.arange(rows)[:, None] * 7 + 3 * torch.arange(12)) % 64
    return [{"input_ids": row, "labels": row} for row in x]


def make(folder, shards: int = 4, max_grad_norm: float = 1.0, **settings):
    """(trainer, adapters) of the small model on the small data, 16 rows a step over all processes."""
    # First of all: under torchrun these arguments start the process group, and attach counts its processes.
    args = TrainingArguments(**dict(
        output_dir=str(folder), per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=8, warmup_steps=2, dataloader_drop_last=True, save_strategy="no", logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available()) | settings)
    model = small_model().to(args.device)           # before attach: A_i, B_i live where the weights do
    adapters = hd_pissa.attach(model, rank=2, shards=shards)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    hook(optimizer, adapters, max_grad_norm)
    return ShardedTrainer(model, args, train_dataset=small_data(), optimizers=(optimizer, None),
                          callbacks=[KeepShards(adapters, optimizer)], adapters=adapters), adapters


def bare_loop(batches, rates, device, shards: int = 4, max_grad_norm: float = 1.0) -> LlamaForCausalLM:
    """The same training written out: `batches` of this process, a learning rate for each."""
    model = small_model().to(device)
    adapters = hd_pissa.attach(model, rank=2, shards=shards)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    for inputs, lr in zip(batches, rates):
        optimizer.param_groups[0]["lr"] = lr
        for s in range(adapters.S):
            with adapters.shard(s):
                rows = {name: tensor.chunk(adapters.S)[s] for name, tensor in inputs.items()}
                model(**rows).loss.backward()
        adapters.clip_grad_norm_(max_grad_norm)
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return model


def main(out: str | None = None) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer, adapters = make(folder)
        seen, collate = [], trainer.data_collator
        trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
        trainer.train()
        trainer.save_model(out or folder)           # a plain folder: W is the fine-tuned weight
        trainer.accelerator.wait_for_everyone()
        log = [line for line in trainer.state.log_history if "loss" in line]
        plain = bare_loop(seen, [line["learning_rate"] for line in log], trainer.args.device)
        model, x = trainer.model.eval(), small_data(4)[3]["input_ids"][None].to(trainer.args.device)
        equal, same = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters())), True
        if hd_pissa.process_index() == 0:                    # the process that has written the folder
            saved = LlamaForCausalLM.from_pretrained(out or folder).to(trainer.args.device)
            same = torch.equal(saved(x).logits, model(x).logits)
            print(f"loss {log[0]['loss']:.4f} -> {log[-1]['loss']:.4f}: {hd_pissa.world_size()} processes, "
                  f"{adapters.K} shards\n"
                  f"CHECK the weights are those of a bare loop over the same rows, bit for bit: {equal}\n"
                  f"CHECK the saved folder gives the same logits, bit for bit: {same}")
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    assert equal and same and log[-1]["loss"] < log[0]["loss"]


if __name__ == "__main__":
    main(*sys.argv[1:])
