"""Which model fits where, computed by the formula of `train.py --dry_run`: nothing here was measured.

    python tests/bench/hardware.py              # writes hardware.json, from which tables.py makes the table

Rows of 1024 tokens, one a forward, r = 16. Of a GPU's memory 4 GiB are held back. Needs transformers, but no
weights.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import hd_pissa  # noqa: E402
from training import dry_run, report  # noqa: E402

MODELS = {  # width, feed-forward, layers, heads, heads of keys and values, vocabulary
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152), "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256),
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32, 32000), "LLaMA-2-13B": (5120, 13824, 40, 40, 40, 32000),
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256),
}  # fmt: skip
TWO_BYTES = dict(dtype="bfloat16", rounding="stochastic", init="random", gradients="global")
PLACES = {  # GiB, processes, and what may be tried there: model, options
    "laptop, 16 GiB": (16, 1, [("SmolLM2-135M", {}), ("Llama-3.2-1B", TWO_BYTES), ("LLaMA-2-7B", TWO_BYTES)]),
    "one GPU of 24 GiB": (24, 1, [("Llama-3.2-1B", {}), ("LLaMA-2-7B", dict(dtype="bfloat16")),
                                  ("LLaMA-2-7B", TWO_BYTES), ("LLaMA-2-7B", TWO_BYTES | dict(shards=2))]),
    "one GPU of 80 GiB": (80, 1, [("LLaMA-2-7B", dict(dtype="autocast")),
                                  ("LLaMA-2-13B", dict(dtype="bfloat16")), ("LLaMA-2-13B", TWO_BYTES),
                                  ("Llama-3-70B", TWO_BYTES)]),
    "8 GPUs of 80 GiB": (80, 8, [("LLaMA-2-7B", {}), ("LLaMA-2-13B", dict(dtype="autocast")),
                                 ("Llama-3-70B", TWO_BYTES | dict(shard_weights=True, send="backward")),
                                 ("Llama-3-70B", dict(dtype="bfloat16", shard_weights=True))]),
    "2 machines of 8 GPUs of 80 GiB": (80, 16, [("Llama-3-70B", dict(dtype="bfloat16", shard_weights=True)),
                                                ("Llama-3-70B", dict(shard_weights=True))]),
}  # fmt: skip


def build(name: str, layers: int, dtype: str):
    """The model with weights that nobody trained."""
    import transformers
    width, ffn, _, heads, kv, vocabulary = MODELS[name]
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, use_cache=False,
        tie_word_embeddings=name in ("SmolLM2-135M", "Llama-3.2-1B"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    try:
        return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def sizes(name: str, layers: int, dtype: str, rows: int = 1, tokens: int = 1024, gpu: bool = False):
    """(shapes of adapted weights, numbers of all weights, units, saved_bytes)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(name, layers, dtype)
        found, _ = hd_pissa.find_layers(model)
        shapes, units = [(*module.weight.shape,) for _, module in found], dry_run.units(model)
        x = torch.zeros((rows, tokens), dtype=torch.long)
        kept = dry_run.saved_bytes(model.train(), found, x, dtype == "autocast", gpu=gpu)
        return shapes, sum(p.numel() for p in model.parameters()), units, kept


def needed(name: str, options: dict, processes: int = 1, gpu: bool = True, **x) -> int:
    """Bytes of each process. Layers are alike: two and three tell of all. x: rows and tokens."""
    layers, dtype = MODELS[name][2], options.get("dtype", "float32")
    two, three = (sizes(name, n, dtype, gpu=gpu, **x) for n in (2, 3))
    block = two[0][len(two[0]) // 2:]
    shapes = {f"{i}.{j} of a block": shape for i in range(layers) for j, shape in enumerate(block)}
    everything, kept = (a + (layers - 2) * (b - a) for a, b in ((two[1], three[1]), (two[3][0], three[3][0])))
    units = (two[2][0], two[2][1], layers * two[2][1])
    memory, _ = dry_run.needs(
        [*shapes.values()], everything, units, (kept, two[3][1]), rank=16, processes=processes, gpu=gpu,
        watched=sum(math.prod(shapes[name]) for name in report.sampled([*shapes])),
        **({"shards": max(8, processes)} | options))
    return sum(memory.values())


def flags(options: dict) -> str:
    """As train.py is given them."""
    return " ".join(f"--{key}" + ("" if value is True else f" {value}") for key, value in options.items())


def row(place: str, name: str, options: dict) -> dict:
    """GiB of each process, and whether they are there."""
    (room, processes, _), gpu = PLACES[place], "GPU" in place
    size = needed(name, options, processes, gpu)
    return {"where": place, "model": name, "flags": flags(options) or "(none)",
            "GiB": round(size / 2**30, 1), "fits": size + gpu * dry_run.SPARE <= room * 2**30}


def rows() -> list[dict]:
    return [row(place, name, options) for place, (_, _, tries) in PLACES.items() for name, options in tries]


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows(), indent=1) + "\n")
