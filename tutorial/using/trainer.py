"""HD-PiSSA under the Hugging Face Trainer: one process with virtual devices, or torchrun.

    python tutorial/using/trainer.py
    torchrun --nproc_per_node=2 tutorial/using/trainer.py

`HDPissaMixin` stands in front of Trainer or of a class made from it, such as TRL's SFTTrainer (sft.py).
README.md here says what it changes and why.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from shards import bind, deal  # noqa: E402

import hd_pissa  # noqa: E402


def collate_dealt(collate, S: int, rows: list) -> list:
    """A batch of its own for every shard, so that nothing collated, packed rows say, is ever cut."""
    return [collate(part) for part in deal(rows, S)]


class HDPissaMixin:
    """Trains the increments of `adapters` where Trainer would train the model's parameters."""

    def __init__(self, *args, adapters, **kwargs):
        super().__init__(*args, **kwargs)
        accelerator, self.adapters = self.accelerator, adapters
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        if self.model is not adapters.model or self.args.n_gpu > 1 or self.args.fp16 or (
                kind not in ("NO", "MULTI_CPU", "MULTI_GPU")):
            raise ValueError(f"fp16={self.args.fp16}, {self.args.n_gpu} GPUs a process, {kind}: HD-PiSSA "
                             "needs the model that attach got, bf16 or float32, one GPU a process "
                             "(torchrun), and no FSDP, DeepSpeed or peft_config")
        self.args.average_tokens_across_devices = False         # a shard learns from its own tokens
        accelerator.dataloader_config.dispatch_batches = False  # a batch is dealt where it is used
        # As for evaluation, so without DDP, which refuses a model of which nothing trains.
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.clip_grad_norm_ = lambda _, max_norm, norm_type=2: adapters.clip_grad_norm_(max_norm)
        if self.optimizer is not None:
            bind(adapters, self.optimizer)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            group = dict(params=self.adapters.parameters(), weight_decay=self.args.weight_decay)
            self.optimizer = kind([group], **settings)
            bind(self.adapters, self.optimizer)
        return self.optimizer

    def get_train_dataloader(self):
        for p in self.adapters.parameters():    # auto_find_batch_size begins anew after a step that has run
            p.grad = None                       # out of memory, and zeroes the model's gradients alone
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0
        left = 0 if self.args.dataloader_drop_last else rows % self._train_batch_size
        if left and hd_pissa.world_size() == 1:     # several processes get full batches: rows are repeated
            deal(range(left), self.adapters.S)      # refused now, not at the end of the first epoch
        collate = self.data_collator
        self.data_collator = functools.partial(collate_dealt, collate, self.adapters.S)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def get_batch_samples(self, batches, n, device):
        """Micro-batches of a step, dealt out, and how many tokens every shard has in them."""
        batches, _ = super().get_batch_samples(batches, n, device)
        count = super().get_batch_samples
        tokens = [count(iter(own), len(own), device)[1] for own in zip(*batches)]
        if tokens and all(n is not None and int(n) == 0 for n in tokens):
            raise ValueError("a step without a token to train: all its labels are -100, so no weight would "
                             "move; look at what the collator makes of your rows")
        return batches, tokens

    def training_step(self, model, inputs, num_items_in_batch=None):
        losses = []
        for s, (rows, tokens) in enumerate(zip(inputs, num_items_in_batch)):
            with self.adapters.shard(s):
                losses.append(super().training_step(model, rows, tokens))
        return torch.stack(losses).nanmean()        # that of a shard without a token to train is 0 / 0

    def floating_point_ops(self, inputs):
        return sum(map(super().floating_point_ops, inputs))

    def _track_num_input_tokens(self, inputs):
        for rows in inputs:
            super()._track_num_input_tokens(rows)

    def _save_optimizer_and_scheduler(self, folder):
        if not self.args.should_save:
            self.optimizer.state_dict()     # to which every process adds its shards
        super()._save_optimizer_and_scheduler(folder)

    def _load_optimizer_and_scheduler(self, folder):
        for name in ("optimizer.pt", "scheduler.pt") if folder else ():
            if not os.path.isfile(os.path.join(folder, name)):      # Trainer would go on without a word
                raise ValueError(f"{folder} has no {name}, so it cannot be resumed (save_only_model?); start "
                                 "a new run from its model")
        super()._load_optimizer_and_scheduler(folder)


class HDPissaTrainer(HDPissaMixin, Trainer):
    pass


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, vocab_size=64))


def small_data(rows: int = 96) -> list[dict]:
    x = (torch.arange(rows)[:, None] * 7 + 3 * torch.arange(12)) % 64
    return [{"input_ids": row, "labels": row} for row in x]


def make(folder, shards: int = 4, **settings):
    """(trainer, adapters) of the small model on the small data, 16 rows a step over all processes."""
    # First of all: under torchrun these arguments start the process group, and attach counts its processes.
    args = TrainingArguments(**dict(
        output_dir=str(folder), per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=8, warmup_steps=2, learning_rate=1e-2, dataloader_drop_last=True, save_strategy="no",
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available()) | settings)
    model = small_model().to(args.device)           # before attach: A_i, B_i live where the weights do
    adapters = hd_pissa.attach(model, rank=2, shards=shards)
    return HDPissaTrainer(model, args, train_dataset=small_data(), adapters=adapters), adapters


def bare_loop(model, batches, rates, shards: int = 4, max_grad_norm: float = 1.0):
    """The same training written out: one batch for every shard of this process and step, a rate a step."""
    adapters = hd_pissa.attach(model, rank=2, shards=shards)
    optimizer = torch.optim.AdamW(adapters.parameters(), weight_decay=0.0, fused=True)
    batches = iter(batches)
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        for s in range(adapters.S):
            with adapters.shard(s):
                rows = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                        for name, value in next(batches).items()}
                model(**rows, use_cache=False).loss.backward()      # with a cache packed rows see each other
        adapters.clip_grad_norm_(max_grad_norm)
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return model


def compare(trainer, model, out: str, within: float = 0.0) -> None:
    """Train, save, and hold the result against a bare loop on `model` and against the saved folder.

    within      by how much a weight may differ, in parts of the largest change
    """
    base = [p.detach().clone() for p in model.parameters()]
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.train()
    trainer.save_model(out)                         # a plain folder: W is the fine-tuned weight
    trainer.accelerator.wait_for_everyone()
    log = [line for line in trainer.state.log_history if "loss" in line]
    plain = bare_loop(model.to(trainer.args.device), seen, [line["learning_rate"] for line in log])
    model, x = trainer.model.eval(), small_data(4)[3]["input_ids"][None].to(trainer.args.device)
    apart, moved = (max(float((a.cpu() - b.cpu()).abs().max()) for a, b in zip(model.parameters(), others))
                    for others in (plain.parameters(), base))
    equal, same, how = apart <= within * moved, True, f"within {within:g} of dW" if within else "bit for bit"
    if hd_pissa.process_index() == 0:               # the process that has written the folder
        saved = LlamaForCausalLM.from_pretrained(out).to(trainer.args.device)
        same = torch.equal(saved(x).logits, model(x).logits)
        print(f"loss {log[0]['loss']:.4f} -> {log[-1]['loss']:.4f}, norm of the last gradient "
              f"{log[-1]['grad_norm']:.3f}: {hd_pissa.world_size()} processes, {trainer.adapters.K} shards\n"
              f"CHECK the weights are those of a bare loop over the same rows, {how}: {equal}\n"
              f"CHECK the saved folder gives the same logits, bit for bit: {same}")
    trainer.accelerator.wait_for_everyone()
    assert equal and same and moved and log[-1]["loss"] < log[0]["loss"]


def main(out: str | None = None) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make(folder)
        compare(trainer, small_model(), out or folder)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
