"""Models on disk: Hugging Face folders, the hub, files of the small GPT; checked when read, written whole."""

import contextlib
import functools
import inspect
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import hd_pissa
import hd_pissa_extra
from data.formats import one_line
from data.tokenizer import HFTokenizer, folder_of, read_tokenizer
from training import folder
from training.evaluate import first_logits
from training.processes import everywhere, say

SHARD = "5GB"           # of a file of weights, at most
# What a model's folder may hold beside weights, config and tokenizer: how it takes images and sounds.
BESIDE = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json",
          "video_preprocessor_config.json", "feature_extractor_config.json", "chat_template.json")


def is_small(name: str) -> bool:
    """Is --model the small GPT, new or from a file, and not a Hugging Face name?"""
    return name == "scratch" or name.endswith(".pt")


def snapshot(name: str, tokenizer: str | None, weights: bool) -> str:
    """The folder of a Hugging Face model, or the hub's cache, as it is if the hub does not answer."""
    where = folder_of(name, tokenizer)
    if weights and not os.path.isdir(name):
        from huggingface_hub import snapshot_download
        with one_line(f"--model {name}", "its weights are not here; start it where there is a network"):
            for patterns in (["model*.safetensors"], ["pytorch_model*.bin"]):
                where = snapshot_download(name, allow_patterns=patterns)    # the rest of one cut short, too
                if any(file.endswith(".safetensors") for file in os.listdir(where)):
                    break
    return where


def refuse_quantized(config, what: str) -> None:
    """ValueError for weights of 4 or 8 bits, of the whole model or of its part for text."""
    for part in (config, config.get_text_config()):
        if quantized := getattr(part, "quantization_config", None):
            quantized = quantized if isinstance(quantized, dict) else quantized.to_dict()
            raise ValueError(f"{what} is quantized ({quantized.get('quant_method', 'unknown method')}): W "
                             "itself is trained here, in steps that 4 or 8 bits cannot hold; give the model "
                             "that it was quantized from, in 16 or 32 bits")


def without_cache(model, args, kwargs):
    """A hook: in training no keys and values are kept for a next token."""
    return (args, {**kwargs, "use_cache": False}) if model.training else None


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
    where, what, remedy = snapshot(name, tokenizer, weights), f"--model {name}", "download it again"
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    how = {"trust_remote_code": False}
    if not os.path.isfile(os.path.join(where, "config.json")):
        raise ValueError(f"{what} has no config.json; give the folder of a whole model (an adapter must be "
                         "merged into its model first)")
    if os.path.exists(os.path.join(where, "adapter_config.json")):
        raise ValueError(f"{what} has an adapter_config.json beside the model, which transformers would put "
                         "into it; merge that adapter, or move adapter_* out of the folder")
    with one_line(what, f"code from a model's folder is not run; {remedy}"):
        config = AutoConfig.from_pretrained(where, **how)
    refuse_quantized(config, what)
    base_dtype = getattr(config, "dtype", None)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{what}: its model_type {config.model_type!r} is no causal language model of "
                         "transformers; give one that is, for example llama, mistral, qwen2 or gpt2")
    tokenizer = read_tokenizer(name, where)
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
    model.base_dtype = base_dtype
    if "use_cache" in inspect.signature(model.forward).parameters:      # nothing is generated in training
        model.register_forward_pre_hook(without_cache, with_kwargs=True)
    if getattr(model, "generation_config", None) is not None:   # generation stops where answers end here
        own = model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [] if own is None else [own]
        ends = list(dict.fromkeys([*own, *tokenizer.ends]))
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return model, tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def whole_state(model, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The state_dict with every tensor whole on every process, however W is sharded; tied ones stay one.

    dtype       of the parameters in it; None: as they are
    """
    hd_pissa_extra.reshard(model)
    parameters, first, state = dict(model.named_parameters(remove_duplicate=False)), {}, {}
    for name, tensor in model.state_dict().items():
        tied = first.setdefault(id(parameters.get(name, tensor)), name)
        if tied in state:
            state[name] = state[tied]
        else:
            cast = dtype if name in parameters and tensor.is_floating_point() else None
            state[name] = hd_pissa_extra.whole(tensor).to(cast or tensor.dtype)
    return state


def saved_dtype(name: str, model) -> torch.dtype | None:
    """The dtype that --save_dtype means; None for that of the training."""
    if name != "base":
        return None if name == "trained" else getattr(torch, name)
    dtype = getattr(model, "base_dtype", torch.float32)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("--save_dtype base: the config.json of --model names no dtype; give the one you "
                         "want, --save_dtype bfloat16 for example")
    return dtype


def check_savable(args, model, tokenizer) -> None:
    """ValueError if what is saved beside the weights cannot be: before the training, not after it."""
    saved_dtype(args.save_dtype, model)
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


def save(out: Path, model, tokenizer, held, device, save_dtype: str, name: str = "model") -> dict[str, int]:
    """OUT/NAME/ (Hugging Face) or OUT/NAME.pt of the plain weights, as they load; {its files: sizes}.

    What was written is loaded once more, and compared with the model in memory before it takes the place of
    a file before. Every process calls it.
    """
    dtype, rows = saved_dtype(save_dtype, model), [(row[0][:65], 1) for row in held[:4]]
    logits, state = first_logits(model, rows, device).cpu(), whole_state(model, dtype)

    def write():
        if hd_pissa.process_index() > 0:
            return {}
        if not hasattr(model, "save_pretrained"):
            file = out / f"{name}.pt"
            folder.remember(out, [file.name])

            def put(unfinished):
                # On the CPU it loads without a GPU; torch itself would not say why a file was not written.
                whole = io.BytesIO()
                torch.save({key: t.cpu() for key, t in state.items()}, whole)
                unfinished.write_bytes(whole.getbuffer())
                again = type(model).from_state_dict
                compare(lambda: again(read_state(unfinished)), state, logits, rows, file)

            folder.put(file, put)
            return {file.name: file.stat().st_size}
        staged = folder.unfinished(out, name)
        with folder.writing(out / name):
            save_folder(staged, model, tokenizer, state)
            declare(staged, dtype)
        compare(lambda: reloaded(staged), state, logits, rows, out / name)
        return folder.settle(out, name)

    return everywhere(write)


def save_folder(path: Path, model, tokenizer: HFTokenizer, state: dict) -> None:
    """A plain Hugging Face folder of `state`, with config, tokenizer and what else the base model has."""
    model.save_pretrained(path, state_dict=dict(state), max_shard_size=SHARD)       # which it empties
    several = {"save_jinja_files": False} if isinstance(tokenizer.hf.chat_template, dict) else {}
    tokenizer.hf.save_pretrained(path, **several)       # several templates would be a folder of files
    for name in BESIDE:
        source = Path(model.name_or_path, name)
        if source.is_file() and not (path / name).exists():
            shutil.copyfile(source, path / name)


def declare(path: Path, dtype: torch.dtype | None) -> None:
    """Name the dtype of the weights in config.json, where transformers has written that of the training."""
    if dtype:
        config = json.loads((path / "config.json").read_text("utf-8"))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype)[6:]
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def reloaded(path: Path):
    """The model of a folder, as anybody loads it; ValueError where that leaves something out."""
    from transformers import AutoModelForCausalLM
    with one_line("transformers", "it does not load what it has saved"):
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True,
                                                           trust_remote_code=False)
    if lost := sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]])):
        raise ValueError(f"{len(lost)} tensors do not fit, {lost[0]} the first")
    return model


def compare(load, state: dict, logits: torch.Tensor, rows, what) -> None:
    """ValueError unless load() has the tensors of `state`, bit for bit, and these logits but for rounding."""
    safe = "the weights are in the last checkpoint, and the same command writes them again"
    try:
        again = load()
        there = again.state_dict()
        wrong = [name for name, tensor in state.items() if name not in there
                 or not torch.equal(there[name].cpu().to(tensor.dtype), tensor.cpu())]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(state)} tensors are others, {wrong[0]} the first")
        off = float((first_logits(again, rows, "cpu") - logits).abs().max() / logits.abs().max())
    except ValueError as e:
        raise ValueError(f"{what}, loaded once more, is not the model in memory: {e}; {safe}") from None
    exact = all(p.element_size() >= 4 for p in again.parameters())
    if not off <= (1e-3 if exact else 0.1):
        raise ValueError(f"{what}, loaded once more, gives other logits than the model in memory (by "
                         f"{off:.1e} of the largest) from equal weights: its config.json does not say all; "
                         f"{safe}")
    say(f"{what}: loaded once more, {len(state)} tensors are equal bit for bit, logits "
        + ("too" if off == 0 else f"to {off:.0e} of the largest"))


# ---- A run as a LoRA ---------------------------------------------------------------------------------------


def taken(peft_model) -> set[str]:
    """Names of the base model's layers, and of its stacks of experts, that have a LoRA in a PeftModel."""
    wrapped = {name.removeprefix("base_model.model."): module for name, module in peft_model.named_modules()
               if len(getattr(module, "lora_A", ()))}
    return {f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            if hasattr(module, "parameter_name") else name for name, module in wrapped.items()}


def check_exportable(model, layers) -> None:
    """ValueError if PEFT would leave layers out when it loads a LoRA of them: asked of it, without weights.

    It renames what looks like transformers 4's experts, DeepSeek's dense layers too.
    """
    from peft import LoraConfig, PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    (targets, places), tensors = hd_pissa_extra.lora_places(layers), {}
    for name, module in layers:
        expert = isinstance(module, hd_pissa_extra.Expert)
        many, *shape = module.stack.shape if expert else (1, *module.weight.shape)
        m, n = shape if not isinstance(module, torch.nn.Linear) else shape[::-1]
        place = f"base_model.model.{places[name.rpartition('.')[0] if expert else name]}.lora_"
        tensors |= {place + "A.weight": torch.zeros(many, m), place + "B.weight": torch.zeros(n, many)}
    remedy = "PEFT does not load a LoRA of this model; leave the flag out, OUT/model is whole"
    with (tempfile.TemporaryDirectory() as trial, warnings.catch_warnings(),
          one_line("--export_lora", remedy)):
        warnings.simplefilter("ignore")         # tensors without bytes take none
        LoraConfig(r=1, task_type="CAUSAL_LM", **targets).save_pretrained(trial)
        save_file(tensors, os.path.join(trial, "adapter_model.safetensors"))
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config)
        there = taken(PeftModel.from_pretrained(plain, trial, torch_device="cpu"))
    if lost := sorted(places.keys() - there):
        kept, gone = ({name.rpartition(".")[2] for name in some} for some in (there & places.keys(), lost))
        raise ValueError(f"--export_lora: PEFT leaves out {len(lost)} of {len(places)} layers when it loads "
                         f"a LoRA of this model, {lost[0]} the first. Leave the flag out, or train the "
                         f"others alone: --targets {','.join(sorted(kept - gone))}")


def check_layers(args, model, layers) -> None:
    """ValueError for what this run cannot do with its layers: before they are decomposed."""
    plain = [(name, module) for name, module in layers if not isinstance(module, hd_pissa_extra.Expert)]
    if args.shard_weights and len(plain) < len(layers):
        kinds = ",".join(sorted({".".join(name.split(".")[-2:]) for name, _ in plain}))
        raise ValueError("--shard_weights: experts in 3-D parameters cannot be sharded; leave them out, "
                         f"--targets {kinds}")
    for some in [plain, layers][:1 + (plain != layers)] if args.export_lora else ():
        check_exportable(model, some)


def export(args, model, adapters, sums: dict, held, device, load_model) -> float:
    """Write the run as a PEFT adapter in OUT/lora, load it into PEFT and compare; its relative error.

    sums        {layer: hd_pissa_extra.checksum of its weight} when the run began
    load_model  train.py's
    """
    out, rows, bases = Path(args.out), [(row[0][:65], 1) for row in held[:4]], []
    logits, staged = first_logits(model, rows, device).cpu(), str(out / "lora" / "unfinished")

    def load_base():
        base = load_model(args.model, args.seed)[0]
        bases.append(base.double() if args.dtype == "float64" else base)
        state = bases[0].state_dict()
        for name, there in sums.items():
            if hd_pissa_extra.checksum(hd_pissa_extra.weight_in(state, name)) != there:
                raise ValueError(f"--model {args.model} is not what this run began with: {name}.weight "
                                 "differs. A LoRA belongs to one base; put that back and run this again")
        return state

    def load_into_peft():
        from peft import PeftModel
        base, = bases
        before = first_logits(base, rows, "cpu")
        loaded = PeftModel.from_pretrained(base, staged, torch_device="cpu")
        layers = [(slot.name, slot.module) for slot in adapters.slots]
        lost = hd_pissa_extra.lora_places(layers)[1].keys() - taken(loaded)
        off, moved = (first_logits(loaded, rows, "cpu") - logits).norm(), (logits - before).norm()
        rounding = (0.1 if args.dtype == "bfloat16" else 1e-3) * logits.norm()
        if lost or not off <= 10 * error * moved + rounding:
            what = f"leaves out {min(lost)}" if lost else f"gives logits {off / moved:.0%} of the change off"
            raise ValueError(f"{out / 'lora'}, loaded into PEFT, {what}, while its factors are only "
                             f"{error:.1e} off: this version of PEFT does not read them; {out / 'model'} is "
                             "whole")
        folder.settle(out, "lora")
        say(f"\nLoRA of rank {args.lora_rank or 2 * args.shards * args.rank} in {out / 'lora'}: relative "
            f"error {error:.1e} of dW; in PEFT its logits are {off / moved:.1e} of their change off")

    first, state = hd_pissa.process_index() == 0, everywhere(load_base)

    def empty():
        if first:
            folder.unfinished(out, "lora")

    everywhere(empty)
    with folder.writing(out / "lora"):
        error = hd_pissa_extra.export_lora(adapters, staged, state, args.model, args.lora_rank)
    everywhere(lambda: load_into_peft() if first else None)
    return error


# ---- What a run does to a model ----------------------------------------------------------------------------


def in_precision(dtype: str, records):
    """`records`, an iterator of steps; in a step, and only there, float32 products are done as --dtype says.

    That is forward, backward and what is added to W, where TF32 is off by less than float32 W rounds. All
    else train.py pins to float32, whatever was set before: decompositions, evaluation, comparisons.
    """
    while True:
        with hd_pissa_extra.float32_products("tf32" if dtype == "tf32" else "ieee"):
            record = next(records, None)
        if record is None:
            return
        yield record


@contextlib.contextmanager
def rows_apart(packed: bool):
    """Without --packing: transformers need not look whether positions begin anew inside a row.

    It looks in every forward, and a host waits for the GPU's answer. Of positions without numbers, as
    --dry_run has them, it would assume the worst.
    """
    masks = sys.modules.get("transformers.masking_utils")
    look = getattr(masks, "find_packed_sequence_indices", None)
    if look is None or packed:
        yield
        return
    masks.find_packed_sequence_indices = lambda positions: None         # what it says of such rows
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = look


def checkpoint_activations(model) -> None:
    """Activations inside a block are computed again in the backward, in place of being kept."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        for block in (block for blocks in model.modules() if isinstance(blocks, torch.nn.ModuleList)
                      for block in blocks):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    elif model.supports_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    else:
        raise ValueError(f"--gradient_checkpointing: {type(model).__name__} of transformers has none; leave "
                         "the flag out, and lower --micro_batch_size for less memory")


def told(x: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(tokens, positions, mask) of packed rows; None where no row is marked. See data.rows.packed_batches.

    x           (b, t); a token that begins a row is `vocabulary` more than it is
    mask        (b, 1, t, t): may the query (third) look at the key (last)?
    """
    begins = x >= vocabulary
    if not begins.any():
        return None
    at = torch.arange(x.shape[1], device=x.device).expand_as(x)
    row, first = begins.cumsum(1), torch.where(begins, at, 0).cummax(1).values
    mask = (row[:, :, None] == row[:, None, :]) & (at[:, :, None] >= at[:, None, :])
    return torch.where(begins, x - vocabulary, x), at - first, mask[:, None]


def take_packed(model, vocabulary: int, block_size: int) -> None:
    """Make the model read packed rows, each as if it stood alone; ValueError if it cannot.

    Which way it takes is found by trying, on a whole block: positions alone, from which transformers makes
    its attention's mask or flash-attention's lengths; or positions and a mask.
    """
    def arguments(way, x, positions, mask):
        more = {} if way == "positions" else {"attention_mask": mask}
        if way == "added":
            more["attention_mask"] = torch.zeros(mask.shape, device=x.device).masked_fill(
                ~mask, torch.finfo(torch.float32).min)
        more |= {"use_cache": False} if hasattr(model, "config") else {}
        return (x,), {"position_ids": positions, **more}

    def logits(way, x):
        if (packed := told(x, vocabulary)) is None:
            return hd_pissa.logits_of(model, x)
        args, more = arguments(way, *packed)
        out = model(*args, **more)
        return out if isinstance(out, torch.Tensor) else out.logits

    def works(way) -> bool:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return bool((logits(way, block)[0, cut:] - alone).abs().max() <= 1e-4 * alone.abs().max())
        return False

    device, was_training, cut = next(model.parameters()).device, model.training, max(1, block_size // 4)
    draw = torch.randint(vocabulary, (block_size,), generator=torch.Generator().manual_seed(0)).to(device)
    block = draw.clone()[None]
    block[0, [0, cut]] += vocabulary
    with torch.no_grad():
        alone = hd_pissa.logits_of(model.eval(), draw[None, cut:])[0]
        way = next(filter(works, ("positions", "mask", "added")), None)
    model.train(was_training)
    if way is None:
        raise ValueError("--packing: this model takes neither positions nor a mask by which a row would not "
                         "see the others in its block; leave the flag out")

    def unpack(module, args, kwargs):
        if len(args) == 1 and not kwargs.keys() - {"use_cache"} and (packed := told(args[0], vocabulary)):
            return arguments(way, *packed)

    model.register_forward_pre_hook(unpack, with_kwargs=True)


# ---- The small GPT -----------------------------------------------------------------------------------------


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
