"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B, which starts at zero, steps `ratio` times as far as A."""

import torch


def groups(named, ratio: float) -> list[dict]:
    """Parameter groups of LoRA factors by name: those with "lora_B" in it, and the rest."""
    named = list(named)
    B = [p for name, p in named if "lora_B" in name]
    if not 0 < len(B) < len(named):
        raise ValueError(f"{len(B)} of {len(named)} parameters have lora_B in their names: LoRA+ needs both "
                         "factors of PEFT's LoRA")
    return [{"params": [p for name, p in named if "lora_B" not in name], "ratio": 1.0},
            {"params": B, "ratio": float(ratio)}]


def adamw(named, lr: float, ratio: float) -> torch.optim.AdamW:
    """AdamW whose groups step `ratio` times the rate that a loop sets in all of them."""
    optimizer = torch.optim.AdamW(groups(named, ratio), lr, weight_decay=0.0, foreach=True)

    def scale(up: bool):
        def hook(optimizer, args, kwargs):
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * group["ratio"] if up else group["lr"] / group["ratio"]
        return hook

    optimizer.register_step_pre_hook(scale(True))
    optimizer.register_step_post_hook(scale(False))
    return optimizer
