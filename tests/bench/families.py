"""Families of transformers x attach: tiny random members, three steps, saved, loaded, next to PEFT.

    python tests/bench/families.py              families.json, and its table in tutorial/using/README.md
    python tests/bench/families.py mamba bert   prints these, writes nothing

Offline: every model is drawn from a config. A share is that of the numbers in matrices and larger tensors,
embeddings and the output head left out.
"""

import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import hd_pissa  # noqa: E402
import hd_pissa_extra  # noqa: E402

PAGE = HERE.parents[1] / "tutorial" / "using" / "README.md"
RANK, SHARDS, STEPS, VOCABULARY = 2, 2, 3, 64
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2)
HEADS = GROUPED | dict(head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
              patch_size=8, num_labels=5)  # fmt: skip
MOE = GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
D = dict(d_model=32, vocab_size=VOCABULARY, pad_token_id=0)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
BOTH = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1)  # fmt: skip

# family: kind, model, configuration
FAMILIES = {
    "Llama": ("decoder", "LlamaForCausalLM", GROUPED),
    "Mistral": ("decoder", "MistralForCausalLM", GROUPED),
    "Qwen2": ("decoder", "Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("decoder", "Qwen3ForCausalLM", HEADS),
    "Gemma": ("decoder", "GemmaForCausalLM", HEADS),
    "Gemma-2": ("decoder", "Gemma2ForCausalLM", HEADS),
    "Gemma-3": ("decoder", "Gemma3ForCausalLM",
                HEADS | dict(layer_types=["sliding_attention", "full_attention"])),
    "Phi": ("decoder", "PhiForCausalLM", GROUPED),
    "Phi-3": ("decoder", "Phi3ForCausalLM", GROUPED),
    "OLMo-2": ("decoder", "Olmo2ForCausalLM", GROUPED),
    "Granite": ("decoder", "GraniteForCausalLM", GROUPED),
    "Cohere": ("decoder", "CohereForCausalLM", GROUPED),
    "StableLM": ("decoder", "StableLmForCausalLM", GROUPED),
    "StarCoder2": ("decoder", "Starcoder2ForCausalLM", GROUPED),
    "SmolLM3": ("decoder", "SmolLM3ForCausalLM", GROUPED),
    "GPT-NeoX": ("decoder", "GPTNeoXForCausalLM", SMALL),
    "GPT-2": ("decoder", "GPT2LMHeadModel", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY,
                                                 n_positions=64, bos_token_id=1, eos_token_id=2)),
    "OPT": ("decoder", "OPTForCausalLM", SMALL | dict(ffn_dim=48, word_embed_proj_dim=32)),
    "BLOOM": ("decoder", "BloomForCausalLM",
              dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)),
    "Falcon": ("decoder", "FalconForCausalLM", SMALL),
    "Mixtral": ("mixture of experts", "MixtralForCausalLM", GROUPED | dict(num_local_experts=4)),
    "Qwen2-MoE": ("mixture of experts", "Qwen2MoeForCausalLM",
                  MOE | dict(shared_expert_intermediate_size=24, decoder_sparse_step=1)),
    "Qwen3-MoE": ("mixture of experts", "Qwen3MoeForCausalLM", MOE | dict(head_dim=8)),
    "OLMoE": ("mixture of experts", "OlmoeForCausalLM", MOE),
    "DeepSeek-V3": ("mixture of experts", "DeepseekV3ForCausalLM",
                    SMALL | LATENT | dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
                                          n_group=2, topk_group=1, moe_intermediate_size=24,
                                          first_k_dense_replace=1)),
    "gpt-oss": ("mixture of experts", "GptOssForCausalLM",
                HEADS | dict(num_local_experts=4, num_experts_per_tok=2)),
    "T5": ("encoder-decoder", "T5ForConditionalGeneration",
           D | dict(d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)),
    "BART": ("encoder-decoder", "BartForConditionalGeneration", D | BOTH),
    "Marian": ("encoder-decoder", "MarianMTModel", D | BOTH),
    "BERT": ("encoder", "BertForMaskedLM", SMALL),
    "RoBERTa": ("encoder", "RobertaForMaskedLM", SMALL),
    "DistilBERT": ("encoder", "DistilBertForMaskedLM",
                   dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=VOCABULARY,
                        max_position_embeddings=64)),
    "ELECTRA": ("encoder", "ElectraForMaskedLM", SMALL | dict(embedding_size=32)),
    "ALBERT": ("encoder", "AlbertForMaskedLM", SMALL | dict(embedding_size=16)),
    "DeBERTa-v2": ("encoder", "DebertaV2ForMaskedLM", SMALL),
    "ModernBERT": ("encoder", "ModernBertForMaskedLM", SMALL | dict(sep_token_id=2, cls_token_id=1)),
    "ViT": ("vision", "ViTForImageClassification", VISION),
    "DINOv2": ("vision", "Dinov2ForImageClassification", VISION),
    "Swin": ("vision", "SwinForImageClassification",
             dict(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4,
                  num_labels=5)),
    "ConvNeXt": ("vision", "ConvNextForImageClassification",
                 dict(image_size=16, patch_size=4, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2,
                      num_labels=5)),
    "Mamba": ("state space", "MambaForCausalLM",
              dict(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8,
                   time_step_rank=4)),
    "Mamba-2": ("state space", "Mamba2ForCausalLM",
                dict(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8, num_heads=8,
                     head_dim=8, n_groups=2)),
    "FalconMamba": ("state space", "FalconMambaForCausalLM",
                    dict(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8,
                         time_step_rank=4)),
    "RWKV": ("state space", "RwkvForCausalLM",
             dict(hidden_size=32, attention_hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  vocab_size=VOCABULARY, context_length=64)),
    "RecurrentGemma": ("state space", "RecurrentGemmaForCausalLM",
                       GROUPED | dict(lru_width=32, num_hidden_layers=3, attention_window_size=16,
                                      head_dim=8)),
}  # fmt: skip


def build(family: str, **changes):
    """The model in eval mode. Biases and norms are drawn too: initial zeros and ones would hide faults."""
    import transformers
    _, name, config = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**config | changes))
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):   # sinusoids are not saved
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


def batch(family: str, seed: int) -> tuple[dict, torch.Tensor]:
    """(inputs, labels) of four rows."""
    g = torch.Generator().manual_seed(seed)
    if FAMILIES[family][0] == "vision":
        pixels = torch.randn((4, 3, 16, 16), generator=g)
        return dict(pixel_values=pixels), torch.randint(5, (4,), generator=g)
    x = torch.randint(3, VOCABULARY, (4, 12), generator=g)
    inputs = dict(input_ids=x, decoder_input_ids=x) if FAMILIES[family][0] == "encoder-decoder" else dict(
        input_ids=x)
    return inputs, (5 * x + 3) % VOCABULARY


def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def matrices(model) -> dict[int, int]:
    """{id of a parameter: numbers} of what a share is taken of."""
    head = model.get_output_embeddings()
    left_out = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) or module is head
                for p in module.parameters(recurse=False)}
    return {id(p): p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in left_out}


def share_of_peft(family: str) -> float | str:
    """Of the matrices, those under a LoRA of PEFT's "all-linear"."""
    from peft import LoraConfig, get_peft_model
    model = build(family)
    sizes = matrices(model)
    try:
        wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    except ValueError:
        return "refused"
    adapted = set()
    for module in wrapped.modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            name = getattr(module, "parameter_name", "weight")
            base = module.get_base_layer()
            adapted.add(id(getattr(base, name)))
    return sum(n for key, n in sizes.items() if key in adapted) / sum(sizes.values())


def steps(model, adapters, family: str) -> list[float]:
    """Mean losses of STEPS steps, in training mode: RWKV has no backward in the other."""
    optimizer, losses = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0), []
    torch.manual_seed(0)            # of dropout
    model.train()
    for _ in range(STEPS):
        mean = 0.0
        for s in range(SHARDS):
            rows, labels = batch(family, s)
            with adapters.shard(s):
                loss = F.cross_entropy(logits(model, rows).flatten(0, -2), labels.flatten())
                loss.backward()
            mean += float(loss.detach()) / SHARDS
        optimizer.step()
        adapters.merge_()
        losses.append(mean)
    model.eval()
    return losses


def measure(family: str) -> dict:
    """What attach, three steps and a saved folder give; "error" where one of them fails."""
    found = {"family": family, "kind": FAMILIES[family][0], "peft": share_of_peft(family)}
    model = build(family)
    sizes, inputs = matrices(model), batch(family, 0)[0]
    with torch.no_grad():
        frozen = logits(model, inputs)
    try:
        # With the core's decomposition: but for experts these are hd_pissa.attach's numbers.
        adapters = hd_pissa_extra.attach(model, RANK, shards=SHARDS, decompose=hd_pissa.components)
        weights = {slot.name: slot.module.weight for slot in adapters.slots}
        before = {name: W.clone() for name, W in weights.items()}
        found |= {"layers": len(weights), "left_out": dict(Counter(adapters.skipped.values())),
                  "share": sum(W.numel() for W in weights.values()) / sum(sizes.values())}
        with torch.no_grad():
            found["step0"] = torch.equal(logits(model, inputs), frozen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of layers without gradient: counted below
            found["loss"] = steps(model, adapters, family)
    except (ValueError, RuntimeError) as e:
        return found | {"error": str(e)}
    found["moved"] = sum(not torch.equal(before[name], W) for name, W in weights.items())
    adapters.detach_()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
        found["saved"] = torch.equal(logits(loaded, inputs), logits(model, inputs))
    return found


def table(result: dict) -> str:
    def number(x) -> str:
        return f"{x:.2f}" if isinstance(x, float) else x or ""

    head = ["family", "layers", "step-0 logits", "loss, 3 steps", "saved folder", "share", "PEFT", "left out"]
    lines, kind = [head, ["---"] * len(head)], None
    for row in result["rows"]:
        if row["kind"] != kind:
            kind = row["kind"]
            lines.append([f"**{kind}**", *[""] * (len(head) - 1)])
        why = "; ".join(f"{n} x {reason}" for reason, n in row.get("left_out", {}).items())
        if "error" in row:
            short = row["error"].partition(", of ")[0]
            lines.append([row["family"], *[""] * 4, number(row.get("share")), number(row["peft"]), short])
            continue
        moved = "" if row["moved"] == row["layers"] else f", {row['moved']} train"
        equal = ["equal" if row[key] else "differ" for key in ("step0", "saved")]
        lines.append([row["family"], f"{row['layers']}{moved}", equal[0],
                      f"{row['loss'][0]:.3f} to {row['loss'][-1]:.3f}", equal[1],
                      number(row["share"]), number(row["peft"]), why])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"torch {result['torch']}, transformers {result['transformers']}, peft {result['peft']}\n\n{text}"


def filled(page: str, result: dict) -> str:
    return re.sub(r"<!-- families -->\n.*?<!-- end -->",
                  lambda _: f"<!-- families -->\n\n{table(result)}\n\n<!-- end -->", page, flags=re.S)


def main(*names: str) -> None:
    import peft
    import transformers
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [f for f in FAMILIES if not names or f.lower() in names]
    rows = []
    for family in chosen:
        rows.append(measure(family))
        print(json.dumps(rows[-1]), flush=True)
    if not names:
        result = {"torch": torch.__version__, "transformers": transformers.__version__,
                  "peft": peft.__version__, "rows": rows}
        (HERE / "families.json").write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(filled(PAGE.read_text(), result))


if __name__ == "__main__":
    main(*sys.argv[1:])
