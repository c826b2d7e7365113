"""Baselines behind the interface that hd_pissa.train expects, in one process, on the whole batch.

PEFT's LoRA, PiSSA, DoRA and HiRA run in their own modules; `Plain` only tells the loop what is trained.
"""

import contextlib

import torch
import torch.nn as nn

import hd_pissa
from training.baselines import Baseline


class Plain(Baseline):
    """Named tensors trained on the whole step batch with any optimizer; nothing to merge during the run.

    model     the model that holds them
    tensors   {name: tensor that requires grad}
    K         mini-batches that the loop cuts a step batch into; their gradients add up to the whole batch's
    finish    called by `detach_`: folds what was trained into plain weights, or None
    """

    def __init__(self, model, tensors: dict, K: int, seed: int = 0, finish=None):
        self.model, self._parameters, self.K, self.S, self.first = model, tensors, K, K, 0
        self.seed, self.step, self.finish, self.slots = seed, 0, finish, []

    def result(self):
        """Context in which the model computes what the run would give if it ended now."""
        return contextlib.nullcontext()

    def detach_(self):
        if self.finish:
            self.finish()


def full(model: nn.Module, K: int, seed: int = 0) -> Plain:
    """Every weight of the model, embeddings and norms included."""
    model.requires_grad_(True)
    return Plain(model, dict(model.named_parameters()), K, seed)


def linear(model: nn.Module, K: int, seed: int = 0, also: str | None = None) -> Plain:
    """Full fine-tuning of the layers that adapters adapt, and of parameters with `also` in their name."""
    model.requires_grad_(False)
    trained = {name: module.weight for name, module in hd_pissa.find_layers(model, "all-linear")[0]}
    trained |= {name: p for name, p in model.named_parameters() if also and also in name}
    for weight in trained.values():
        weight.requires_grad_(True)
    return Plain(model, trained, K, seed)


def with_peft(model: nn.Module, method: str, r: int, K: int, seed: int = 0, alpha: float | None = None,
              rslora: bool = False) -> Plain:
    """PEFT's "lora", "pissa", "dora" or "hira" of rank r on every linear layer but the head.

    It is scaled by alpha / r, or with `rslora` by alpha / sqrt(r) (arXiv 2312.03732). alpha None: r.
    """
    try:
        from peft import HiraConfig, LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise ValueError(f"{method} is PEFT's; pip install -r requirements-extra.txt") from None
    names = [name for name, _ in hd_pissa.find_layers(model, "all-linear")[0]]
    torch.manual_seed(hd_pissa.seed_of(seed, "init"))           # PEFT draws from torch's own generator
    if method == "hira":
        config = HiraConfig(r=r, target_modules=names)
    else:
        config = LoraConfig(r=r, lora_alpha=r if alpha is None else alpha, lora_dropout=0.0,
                            target_modules=names, use_dora=method == "dora", use_rslora=rslora,
                            init_lora_weights="pissa" if method == "pissa" else True)
    inject_adapter_in_model(config, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def finish():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(name)
            assert isinstance(module, BaseTunerLayer), name
            module.merge()
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())

    return Plain(model, trained, K, seed, finish)
