"""Models on disk: Hugging Face folders, the hub, files of the small GPT; checked when read, written whole."""

import os
import tempfile
from pathlib import Path

import torch

import hd_pissa
import hd_pissa_extra
from data.formats import one_line
from data.tokenizer import HFTokenizer
from training import folder
from training.processes import everywhere, say


def is_small(name: str) -> bool:
    """Is --model the small GPT, new or from a file, and not a Hugging Face name?"""
    return name == "scratch" or name.endswith(".pt")


def snapshot(name: str, weights: bool) -> str:
    """The folder of a hub id in the hub's cache, as it is there if the hub does not answer.

    Once for the whole model: from_pretrained with an id would ask again for each file, and without a network
    spend 23 s on each.
    """
    from huggingface_hub import snapshot_download
    texts = ["*.json", "*.txt", "*.jinja", "tokenizer*", "*.model"]
    remedy = ("it is no directory: give a hub id that exists and that you may read (hf auth login); without "
              f"a network run `hf download {name} --local-dir DIR` elsewhere, copy it here, give --model DIR")
    with one_line(f"--model {name}", remedy):
        where = snapshot_download(name, allow_patterns=texts)
        for patterns in (["model*.safetensors"], ["pytorch_model*.bin"]) if weights else ():
            where = snapshot_download(name, allow_patterns=patterns)      # the rest of one cut short, too
            if any(file.endswith(".safetensors") for file in os.listdir(where)):
                break
    return where


@torch.no_grad()
def refuse_two_sided(model, what: str) -> None:
    """Raise ValueError for a model whose logits depend on tokens that come later: an encoder, say.

    Trained to give the next token it would see it, and learn nothing.
    """
    x = torch.arange(5, 17)[None] % model.get_input_embeddings().weight.shape[0]
    other = x.clone()
    other[0, -1] = 0
    before, after = (model.eval()(tokens).logits[:, :-1] for tokens in (x, other))
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(f"{what} sees later tokens (its earlier logits change with the last token): it is "
                         "no causal language model; give a decoder, or its config is_decoder=True")


def hugging_face(name: str, weights: bool = True, tokenizer: str | None = None):
    """(float32 model, its tokenizer, context length) of a local folder or a hub id.

    weights     False: of the shapes in its config alone, randomly drawn
    Raises ValueError, one line with the remedy, for what cannot be loaded whole. No code of the
    folder's is run.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        raise ValueError(f"--model {name} is not a .pt file, and Hugging Face models need transformers: "
                         "pip install -r requirements-extra.txt") from None
    how, what, where, remedy = {"trust_remote_code": False}, f"--model {name}", name, "download it again"
    if tokenizer is not None:
        raise ValueError(f"--tokenizer {tokenizer}: {what} comes with its own; leave the flag out")
    if not os.path.isdir(name):
        if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"{what}: no such directory; give a folder with config.json, or a hub id")
        where = snapshot(name, weights)
    if not os.path.isfile(os.path.join(where, "config.json")):
        raise ValueError(f"{what} has no config.json; give the folder of a whole model (an adapter must be "
                         "merged into its model first)")
    if os.path.exists(os.path.join(where, "adapter_config.json")):
        raise ValueError(f"{what} has an adapter_config.json beside the model, which transformers would put "
                         "into it; merge that adapter, or move adapter_* out of the folder")
    with one_line(what, f"code from a model's folder is not run; {remedy}"):
        config = AutoConfig.from_pretrained(where, **how)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{what}: its model_type {config.model_type!r} is no causal language model of "
                         "transformers; give one that is, for example llama, mistral, qwen2 or gpt2")
    with one_line(f"{what}: its tokenizer", remedy):
        tokenizer = AutoTokenizer.from_pretrained(where, **how)
    tokenizer = HFTokenizer(name, tokenizer)
    with one_line(what, f"its weights cannot be used as they are; {remedy}" if weights else remedy):
        if weights:
            model, info = AutoModelForCausalLM.from_pretrained(
                where, dtype=torch.float32, config=config, output_loading_info=True,
                ignore_mismatched_sizes=True, **how)
            # transformers would draw these at random
            other = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])   # 4.56, 5.x
            wrong = sorted({*info["missing_keys"], *other})
            if wrong:
                raise ValueError(f"{len(wrong)} weights are not in its files or have other shapes than "
                                 f"config.json says, {wrong[0]} the first")
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if weights:
        refuse_two_sided(model, what)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer.hf) > rows:
        raise ValueError(f"{what}: its tokenizer has {len(tokenizer.hf)} tokens, the model {rows} "
                         "embeddings; put the tokenizer files of this very model into the folder")
    return model, tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def whole_state(model) -> dict[str, torch.Tensor]:
    """The state_dict with every tensor whole on every process, however W is sharded; tied ones stay one."""
    parameters, first, state = dict(model.named_parameters(remove_duplicate=False)), {}, {}
    for name, tensor in model.state_dict().items():
        tied = first.setdefault(id(parameters.get(name, tensor)), name)
        state[name] = state[tied] if tied in state else hd_pissa_extra.whole(tensor)
    return state


def check_savable(model, tokenizer) -> None:
    """ValueError if what is saved beside the weights cannot be: before the training, not after it."""
    if not hasattr(model, "save_pretrained"):
        return
    with tempfile.TemporaryDirectory() as trial, one_line("--model", "its result could not be saved"):
        own = getattr(model, "generation_config", None)
        try:
            if own is not None:
                own.save_pretrained(trial)
        except ValueError:
            # Published models give a temperature without sampling, which transformers does not write.
            own.do_sample = True
            own.save_pretrained(trial)
            say("generation_config.json has values for sampling alone: the result's says do_sample")
        model.config.save_pretrained(trial)
        tokenizer.hf.save_pretrained(trial)


def save_folder(out: Path, model, tokenizer: HFTokenizer, state: dict) -> dict[str, int]:
    """A plain Hugging Face folder of `state`, with config and tokenizer; {its files: sizes}."""
    unfinished = folder.unfinished(out, "model")
    model.save_pretrained(unfinished, state_dict=state)
    tokenizer.hf.save_pretrained(unfinished)
    return folder.settle(out, "model")


def export(args, adapters, sums: dict, out: Path, load_model) -> float:
    """Write the run as a PEFT adapter in OUT/lora; its relative error.

    sums        {layer: hd_pissa.checksum of its weight} when the run began
    load_model  train.py's
    """
    def load_base():
        model = load_model(args.model, args.seed)[0]
        base = (model.double() if args.dtype == "float64" else model).state_dict()
        for name, there in sums.items():
            if hd_pissa.checksum(base[name + ".weight"]) != there:
                raise ValueError(f"--model {args.model} is not what this run began with: {name}.weight "
                                 "differs. A LoRA belongs to one base; put that back and run this again")
        return base

    base = everywhere(load_base)
    everywhere(lambda: folder.unfinished(out, "lora") if hd_pissa.process_index() == 0 else None)
    staged = str(out / "lora" / "unfinished")
    error = hd_pissa_extra.export_lora(adapters, staged, base, args.model, args.lora_rank)
    everywhere(lambda: folder.settle(out, "lora") if hd_pissa.process_index() == 0 else None)
    rank = args.lora_rank or 2 * args.shards * args.rank
    say(f"\nLoRA of rank {rank} in {out / 'lora'}: relative error {error:.1e} of dW")
    return error


def read_state(path: str) -> dict:
    """The state_dict of a small GPT in a .pt file; ValueError for anything else."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--model {path}: no such file; give a model.pt that train.py has written")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:      # a damaged or foreign file makes torch.load raise anything
        raise ValueError(f"--model {path}: not a file of tensors alone, or damaged "
                         f"({' '.join(str(e).split())[:100]}); give a model.pt that train.py has "
                         "written") from e
    small = isinstance(state, dict) and all(isinstance(W, torch.Tensor) and W.is_floating_point() and
                                            W.layout == torch.strided for W in state.values())
    if not small or not {"wte.weight", "wpe.weight", "blocks.0.c_fc.weight"} <= state.keys():
        raise ValueError(f"--model {path}: not a state_dict of the small GPT; a Hugging Face model is "
                         "a folder")
    blocks = {str(name).split(".")[1] for name in state if str(name).startswith("blocks.")}
    width = state["wte.weight"].shape[-1:].numel()
    if blocks != set(map(str, range(len(blocks)))) or width % 32 or not width:
        raise ValueError(f"--model {path}: {len(blocks)} blocks of width {width} are no small GPT; give a "
                         "model.pt that train.py has written")
    return state
