"""Small random members of the architectures that the paper and its readers use, and folders with them."""

import json
from pathlib import Path

import torch

VOCABULARY = 288                # 256 bytes, the end of a text, and spare rows as real models have
END = "<|endoftext|>"
ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
# module names of one block, and of the head; GPT-2's q, k, v are one c_attn, and its head is its embedding
LAYERS = {"llama": ATTENTION + MLP, "mistral": ATTENTION + MLP, "qwen2": ATTENTION + MLP,
          "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}  # fmt: skip
BLOCKS = {"gpt2": "transformer.h"}
COMMONSENSE = {"gpt2": ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]}       # the paper's q, k, v, up, down


def names(family: str, suffixes=None) -> list[str]:
    """Full names of the layers in both blocks, in the model's order."""
    blocks, kept = BLOCKS.get(family, "model.layers"), suffixes or LAYERS[family]
    return [f"{blocks}.{i}.{name}" for i in range(2) for name in LAYERS[family] if name in kept]


def config(family: str):
    import transformers
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128,
                                       bos_token_id=256, eos_token_id=256, pad_token_id=256)  # fmt: skip
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
    return getattr(transformers, kind + "Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=128, bos_token_id=256,
        eos_token_id=256, pad_token_id=256, tie_word_embeddings=family == "qwen2")  # fmt: skip


def model(family: str, dtype=torch.float32):
    """The model in eval mode. Biases and norms are drawn too: initial zeros and ones would hide faults."""
    import transformers
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(family), dtype=dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return made.eval()


def tokenizer(eos: str | None = END):
    """Bytes as tokens, in the format that every one of these families reads."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=END)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}: {% endfor %}"
    return made


def rows(path: Path, n: int = 40) -> Path:
    made = [{"instruction": f"{i % 7}+{i % 5}", "response": f"{i % 7 + i % 5} ok"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def folder(path: Path, family: str, eos: str | None = END) -> Path:
    """A Hugging Face folder with weights, config, tokenizer, and rows.jsonl beside them."""
    model(family).save_pretrained(path)
    tokenizer(eos).save_pretrained(path)
    rows(path / "rows.jsonl")
    return path


def flags(path: Path, *more) -> list[str]:
    """A train.py command line of two steps on that folder, K = 2 shards of rank 2."""
    return ["--model", str(path), "--data", str(path / "rows.jsonl"), "--lr", "1e-3", "--batch_size", "8",
            "--rank", "2", "--shards", "2", "--threads", "1", "--max_steps", "2", "--block_size", "100",
            *map(str, more)]  # fmt: skip
