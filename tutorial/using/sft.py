"""HD-PiSSA under TRL's SFTTrainer, with packing: several rows in one, none of which sees another.

    python tutorial/using/sft.py
    torchrun --nproc_per_node=2 tutorial/using/sft.py
"""

import os
import sys
import tempfile
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from trl import SFTConfig, SFTTrainer

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from trainer import HDPissaMixin, compare, small_model  # noqa: E402

import hd_pissa  # noqa: E402


class HDPissaSFTTrainer(HDPissaMixin, SFTTrainer):
    pass


def small_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Characters as tokens: nothing is downloaded here."""
    characters = ["<end>", *"0123456789+=? abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, []))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>",
                                                pad_token="<end>")


def small_rows(n: int = 128) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": f"{i}+{i % 7}=?", "completion": f" {i + i % 7}"}
                                       for i in range(n)])


def make(folder, shards: int = 4, **settings):
    """(trainer, adapters): 8 packed rows of 48 tokens a step over all processes, the answers trained."""
    args = SFTConfig(**dict(
        output_dir=str(folder), per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
        packing=True, max_length=48, max_steps=8, learning_rate=1e-2, lr_scheduler_type="constant",
        dataloader_drop_last=True, save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True,
        bf16=False, use_cpu=not torch.cuda.is_available()) | settings)
    model = small_model().to(args.device)
    adapters = hd_pissa.attach(model, rank=2, shards=shards)
    return HDPissaSFTTrainer(model, args, train_dataset=small_rows(), processing_class=small_tokenizer(),
                             adapters=adapters), adapters


def main(out: str | None = None) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make(folder)
        compare(trainer, small_model(), out or folder, within=1e-5)   # its loss is summed in another order
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
