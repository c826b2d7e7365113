"""Models: each architecture against PEFT and plain equations; what is adapted, saved, refused; dry runs."""

import copy
import json
import math

import families
import pytest
import torch
import twin
from families import LAYERS, flags, folder, names

import hd_pissa
import hd_pissa_extra
import train
from data import tokenizer
from training import models

pytest.importorskip("transformers")
FAMILIES = list(LAYERS)
K, R = 3, 2


def batch(seed: int, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    return model(input_ids=x, labels=x).loss


def weight(model, name) -> torch.Tensor:
    """W (m, n) of a layer, whichever way it is stored."""
    W = model.get_parameter(name + ".weight").detach()
    return W.T if isinstance(model.get_submodule(name), torch.nn.Linear) else W


# ---- The method on every architecture ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_logits_are_the_base_models(family, dtype):
    """Bit for bit, in evaluation and in training with every module's own dropout drawn alike."""
    model, x = families.model(family, dtype), batch(1)
    for mode in (False, True):
        plain = copy.deepcopy(model).train(mode)
        torch.manual_seed(0)
        expected = plain(x).logits
        hd_pissa_extra.attach(plain, R, shards=K)
        torch.manual_seed(0)
        assert torch.equal(plain(x).logits, expected)


@pytest.mark.parametrize("alpha", [None, 2.0 * R])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_shard_are_residual_pissas(family, alpha):
    """float64: autograd of X (W - s A_i B_i) + s (X A_i) B_i in all layers at once, A_i, B_i from a full SVD.

    Components are known up to a sign, so the products g_A B and A g_B are compared.
    """
    model, x, s = families.model(family, torch.float64), batch(1), 1.0 if alpha is None else alpha / R
    residual, adapted = copy.deepcopy(model), names(family)
    factors = {name: twin.slices(weight(model, name), K, R, s) for name in adapted}
    adapters = hd_pissa.attach(model, R, shards=K, alpha=alpha)
    got = dict(adapters.named_parameters())
    for i in range(K):
        with adapters.shard(i):
            loss_of(model, x).backward()
        leaves, hooks = {}, []
        plain = copy.deepcopy(residual).requires_grad_(False)
        for name in adapted:
            A, B = leaves[name] = [f.clone().requires_grad_() for f in factors[name][i]]
            module = plain.get_submodule(name)
            weight(plain, name).sub_(s * (A @ B).detach())
            hooks.append(module.register_forward_hook(
                lambda module, inputs, output, A=A, B=B: output + s * (inputs[0] @ A) @ B))
        loss_of(plain, x).backward()
        for name in adapted:
            A, B = leaves[name]
            gA, gB = (got[f"{name}.shard{i}.{leaf}"].grad for leaf in ("dA", "dB"))
            our_A, our_B = (adapters.state_dict()[f"{name}.shard{i}.{leaf}"] for leaf in "AB")
            for ours, theirs in ((gA @ our_B, A.grad @ B), (our_A @ gB, A @ B.grad)):
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-7, atol=1e-12)
                assert theirs.abs().max() > 1e-7, name


@pytest.mark.parametrize("alpha", [R, 2 * R])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_shard_0_are_pefts(family, alpha):
    """PEFT's own PiSSA ("pissa") on the same model: it decomposes in float32, hence 1e-4."""
    peft = pytest.importorskip("peft")
    model, x = families.model(family), batch(1)
    lora = peft.LoraConfig(r=R, lora_alpha=alpha, init_lora_weights="pissa", lora_dropout=0.0,
                           target_modules=names(family), fan_in_fan_out=family == "gpt2")  # fmt: skip
    theirs, model = peft.get_peft_model(copy.deepcopy(model), lora).double(), model.double()
    adapters = hd_pissa.attach(model, R, shards=K, alpha=alpha)
    loss_of(theirs, x).backward()
    loss_of(model, x).backward()
    got, state = dict(adapters.named_parameters()), adapters.state_dict()
    for name in names(family):
        layer = theirs.base_model.model.get_submodule(name)
        lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight     # (r, m), (n, r)
        gA, gB = got[f"{name}.shard0.dA"].grad, got[f"{name}.shard0.dB"].grad
        A, B = state[f"{name}.shard0.A"], state[f"{name}.shard0.B"]
        for ours, expected in ((A @ B, (lora_B @ lora_A).T), (gA @ B, (lora_B @ lora_A.grad).T),
                               (A @ gB, (lora_B.grad @ lora_A).T)):  # fmt: skip
            expected = expected.detach()
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def equations(model, adapted, batches, lr) -> dict[str, torch.Tensor]:
    """W (m, n) after training `model` by the equations: dense dW by autograd, dense dU_i, own AdamW."""
    model = copy.deepcopy(model).requires_grad_(False)
    weights = [model.get_parameter(name + ".weight").requires_grad_() for name in adapted]
    factors = [twin.slices(weight(model, name), K, R) for name in adapted]
    state = {(j, i, leaf): [0.0, 0.0, 0] for j in range(len(adapted)) for i in range(K) for leaf in "AB"}
    for shards in batches:
        total = [torch.zeros_like(weight(model, name)) for name in adapted]
        for i, x in enumerate(shards):
            for j, dW in enumerate(torch.autograd.grad(loss_of(model, x), weights)):
                linear = isinstance(model.get_submodule(adapted[j]), torch.nn.Linear)
                dW, (A, B) = dW.T if linear else dW, factors[j][i]                              # (m, n)
                dA = twin.adamw(dW @ B.T, state[j, i, "A"], lr)
                dB = twin.adamw(A.T @ dW, state[j, i, "B"], lr)
                total[j] += dA @ B + A @ dB + dA @ dB
        for name, dU in zip(adapted, total):
            weight(model, name).add_(dU / K)
    return {name: weight(model, name) for name in adapted}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_follows_the_equations(family):
    """Three AdamW steps of K = 3 shards in float64: every adapted weight, and nothing else has moved."""
    model = families.model(family, torch.float64)
    before = copy.deepcopy(model)
    batches = [[batch(10 * t + i) for i in range(K)] for t in range(3)]
    expected = equations(model, names(family), batches, 1e-2)
    adapters = hd_pissa.attach(model, R, shards=K)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
    for shards in batches:
        for i, x in enumerate(shards):
            with adapters.shard(i):
                loss_of(model, x).backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    for name, W in expected.items():
        torch.testing.assert_close(weight(model, name), W, rtol=0, atol=1e-9)
        assert (W - weight(before, name)).abs().max() > 1e-4
    before = before.state_dict()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {name + ".weight" for name in expected}


# ---- What is adapted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_by_default_and_for_the_commonsense_setting(family):
    """All linear layers of the blocks but never the head; with suffixes those alone, and why."""
    model = families.model(family)
    found, skipped = hd_pissa.find_layers(model, "all-linear")
    assert [name for name, _ in found] == names(family)
    assert skipped == {"lm_head": "tied weight" if family in ("gpt2", "qwen2") else "output head"}
    suffixes = families.COMMONSENSE.get(family, [f"{x}_proj" for x in ("q", "k", "v", "up", "down")])
    found, skipped = hd_pissa.find_layers(model, suffixes)
    wanted = [name for name in names(family) if any(name.endswith("." + t) for t in suffixes)]
    assert [name for name, _ in found] == wanted and len(wanted) == 2 * len(suffixes)
    assert set(skipped) == set(names(family)) - set(wanted) | {"lm_head"}
    assert {skipped[name] for name in names(family) if name in skipped} == {"not in targets"}


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, pad_token_id=0,
             bos_token_id=1, eos_token_id=2)  # fmt: skip
OTHERS = {      # config, layers of a block
    "OPT": (dict(ffn_dim=48, word_embed_proj_dim=32), "q_proj k_proj v_proj out_proj fc1 fc2"),
    "GPTNeoX": (dict(intermediate_size=48), "query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "Phi3": (dict(intermediate_size=48), "qkv_proj o_proj gate_up_proj down_proj"),
    "Gemma2": (dict(intermediate_size=48, head_dim=8),
               "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "Mixtral": (dict(intermediate_size=48, num_local_experts=2, num_key_value_heads=2),
                "q_proj k_proj v_proj o_proj"),
    "Mamba": (dict(state_size=4), "in_proj x_proj dt_proj out_proj"),
    "Falcon": (dict(), ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind):
    """Equal logits at step 0, and what README.md of tutorial/using says: a mixture's experts are not linear
    layers, Falcon's layers are refused with the reason, Mamba's dt_proj never gets a gradient."""
    transformers = pytest.importorskip("transformers", "5" if kind == "Mixtral" else None)
    sizes, layers = OTHERS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**SMALL | sizes)
    model, x = transformers.AutoModelForCausalLM.from_config(config).float().eval(), batch(1) % 96
    model.requires_grad_(False)         # torch picks some matmuls by whether a weight is trained
    with torch.no_grad():
        before = model(input_ids=x).logits
    if kind == "Falcon":
        with pytest.raises(ValueError, match="a weight or a forward of its own kind"):
            hd_pissa.attach(model, 1, shards=2)
        return
    adapters = hd_pissa.attach(model, 1, shards=2)
    assert sorted(slot.name.split(".")[-1] for slot in adapters.slots) == sorted(2 * layers.split())
    assert torch.equal(model(input_ids=x).logits, before)
    for s in range(2):
        with adapters.shard(s):
            model(input_ids=x, labels=x, use_cache=False).loss.backward()
    without = {name.split(".")[-3] for name, p in adapters.named_parameters() if p.grad is None}
    assert without == ({"dt_proj"} if kind == "Mamba" else set())


# ---- The saved folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_gives_the_training_models_logits(family, tmp_path, monkeypatch):
    """train.py's output loads by plain from_pretrained, with equal logits bit for bit, same tokenizer."""
    import transformers
    kept, save, x = [], train.save, batch(3)

    def recording(out, model, *rest):
        kept.append(model.eval()(x).logits.detach())
        return save(out, model, *rest)

    monkeypatch.setattr(train, "save", recording)
    train.main(flags(folder(tmp_path / "base", family), "--out", tmp_path / "out"))
    saved = tmp_path / "out" / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in saved.iterdir()}
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")(x).logits
        after = transformers.AutoModelForCausalLM.from_pretrained(saved)(x).logits
    assert torch.equal(after, kept[0]) and (after - base).abs().max() > 1e-3
    text = "7+4 ok\n"
    a, b = (transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "base", saved))
    assert a(text)["input_ids"] == b(text)["input_ids"] and len(b(text)["input_ids"]) == len(text)


HELD = [([72, 101, 108, 108, 111, 256], 2, "all"), ([55, 43, 52, 58, 32, 256], 3, "all")]


def test_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """An error in the middle, here a full disk at the tokenizer, leaves a former run's folder as it was."""
    path, model = folder(tmp_path / "out" / "model", "llama"), families.model("llama")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    made = models.HFTokenizer(str(path))
    with torch.no_grad():
        model.lm_head.weight.add_(1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made.hf, "save_pretrained", full)
    with pytest.raises(ValueError, match="No space left"):
        models.save(tmp_path / "out", model, made, HELD, "cpu", "trained")
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before
    monkeypatch.undo()
    models.save(tmp_path / "out", model, made, HELD, "cpu", "trained")
    assert (path / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert {file.name for file in path.iterdir()} == before.keys()


def lose_a_tensor(path):
    from safetensors.torch import load_file, save_file
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def change_a_tensor(path):
    from safetensors.torch import load_file, save_file
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-6
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def change_the_config(path):
    edit(path / "config.json", rms_norm_eps=0.1)


@pytest.mark.parametrize("spoil, words", [
    (lose_a_tensor, "1 tensors do not fit, model.layers.1.mlp.up_proj.weight the first"),
    (change_a_tensor, "1 of 21 tensors are others, model.layers.1.mlp.up_proj.weight the first"),
    (change_the_config, "gives other logits than the model in memory"),
])  # fmt: skip
def test_what_was_saved_is_loaded_once_more(spoil, words, tmp_path, monkeypatch, capsys):
    """A folder that is not the model in memory is refused, and never takes the place of the one before."""
    path, save_folder = folder(tmp_path / "out" / "model", "llama"), models.save_folder
    model, made = families.model("llama"), models.HFTokenizer(str(path))
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def spoiling(staged, *rest):
        save_folder(staged, *rest)
        spoil(staged)

    monkeypatch.setattr(models, "save_folder", spoiling)
    with pytest.raises(ValueError, match=words) as error:
        models.save(tmp_path / "out", model, made, HELD, "cpu", "trained")
    assert "loaded once more" in str(error.value) and "the same command writes them again" in str(error.value)
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before
    monkeypatch.undo()
    models.save(tmp_path / "out", model, made, HELD, "cpu", "trained")
    assert "loaded once more, 21 tensors are equal bit for bit, logits too" in capsys.readouterr().out


def test_the_small_gpts_file_is_loaded_once_more(tmp_path, monkeypatch):
    model = train.GPT(300, layers=1, width=32)
    files = models.save(tmp_path, model, None, HELD, "cpu", "trained")
    assert files == {"model.pt": (tmp_path / "model.pt").stat().st_size}
    before, read = (tmp_path / "model.pt").read_bytes(), models.read_state
    monkeypatch.setattr(models, "read_state", lambda path: read(path) | {"ln_f.bias": torch.ones(32)})
    with pytest.raises(ValueError, match="ln_f.bias the first"):
        models.save(tmp_path, model, None, HELD, "cpu", "trained")
    assert (tmp_path / "model.pt").read_bytes() == before


def chat_folder(path):
    """A Llama of bfloat16 with a chat template that ends turns by <|im_end|>, and an image processor."""
    base, hf = folder(path, "llama"), families.tokenizer()
    families.model("llama", torch.bfloat16).save_pretrained(base)
    hf.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    hf.chat_template = ("{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
                        "{% if add_generation_prompt %}assistant>{% endif %}")  # fmt: skip
    hf.save_pretrained(base)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (base / name).write_text(json.dumps({"from": name}))
    (base / "notes.json").write_text("{}")
    return base, hf


@pytest.mark.parametrize("save_dtype", ["trained", "base", "float16"])
def test_the_result_is_whole(save_dtype, tmp_path, monkeypatch):
    """Shards of SHARD bytes with their index, processors, template, the template's end of turn for
    generation, the dtype asked for: all there, as anybody's from_pretrained finds it."""
    import transformers
    base, hf = chat_folder(tmp_path / "base")
    monkeypatch.setattr(models, "SHARD", "40KB")
    train.main(flags(base, "--save_dtype", save_dtype, "--out", tmp_path / "out"))
    saved = tmp_path / "out" / "model"
    dtype = {"trained": torch.float32, "base": torch.bfloat16, "float16": torch.float16}[save_dtype]
    shards = list(saved.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and max(path.stat().st_size for path in shards) < 50_000
    assert (saved / "model.safetensors.index.json").exists() and not (saved / "model.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype} == {loaded.config.dtype}
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (saved / name).read_bytes() == (base / name).read_bytes()
    assert not (saved / "notes.json").exists()
    there = transformers.AutoTokenizer.from_pretrained(saved)
    end = there.convert_tokens_to_ids("<|im_end|>")
    assert there.chat_template == hf.chat_template
    assert loaded.generation_config.eos_token_id == [256, end]
    step, = (tmp_path / "out" / "checkpoint").glob("step_2")
    manifest = json.loads((step / "manifest.json").read_text())
    _, shape, parts = manifest["tensors"]["model.model.layers.0.mlp.up_proj.weight"]
    data = (step / parts[0][0]).read_bytes()[parts[0][1]:][:4 * shape[0] * shape[1]]
    W = torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)
    assert torch.equal(loaded.get_parameter("model.layers.0.mlp.up_proj.weight"), W.to(dtype))


def test_a_base_without_a_dtype(tmp_path, capsys):
    base = folder(tmp_path / "base", "llama")
    edit(base / "config.json", dtype=None, torch_dtype=None)
    refused(flags(base, "--save_dtype", "base"), ["no dtype", "_dtype bfloat16"], tmp_path / "o", capsys)


# ---- Checkpointed activations, packed rows -----------------------------------------------------------------


def weights_of(out) -> dict:
    if (out / "model.pt").exists():
        return torch.load(out / "model.pt", weights_only=True)
    from safetensors.torch import load_file
    return load_file(out / "model" / "model.safetensors")


def losses_of(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def small(tmp_path, family) -> list[str]:
    """A command line of two steps for a family, or for the small GPT."""
    if family != "small":
        return flags(folder(tmp_path / "base", family))
    return ["--max_steps", "2", "--batch_size", "16", "--shards", "2", "--eval_rows", "8", "--threads", "1"]


@pytest.mark.parametrize("family", [*FAMILIES, "small"])
def test_checkpointed_activations_change_no_bit(family, tmp_path, monkeypatch):
    """Losses and weights are those of a run without; a block runs forward twice a micro-batch in training."""
    calls = []
    kind = {"llama": "LlamaMLP", "mistral": "MistralMLP", "qwen2": "Qwen2MLP", "gpt2": "GPT2MLP"}.get(family)
    if kind:
        from importlib import import_module
        cls = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), kind)
    else:
        cls = train.Block
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *a: (calls.append(self.training), forward(self, *a))[1])
    argv, counts = small(tmp_path, family), []
    for name, more in (("a", []), ("b", ["--gradient_checkpointing"])):
        calls.clear()
        train.main([*argv, *more, "--out", str(tmp_path / name)])
        counts.append(sum(calls))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", [*FAMILIES, "small"])
def test_packed_rows_train_as_unpacked_ones(family, tmp_path):
    """Losses to 1e-5, weights to a hundredth of what the training moved; in fewer, longer rows."""
    argv = [*small(tmp_path, family), "--block_size", "60"]
    if family == "gpt2":        # dropout draws by a row's place
        edit(tmp_path / "base" / "config.json", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    before = (train.load_model(str(train.DATA / "base.pt"), 0)[0].state_dict() if family == "small" else
              families.model(family).state_dict())
    for name, more in (("a", []), ("b", ["--packing"])):
        train.main([*argv, *more, "--out", str(tmp_path / name)])
    assert losses_of(tmp_path / "b") == pytest.approx(losses_of(tmp_path / "a"), rel=1e-5)
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    moved = 0.0
    for name, W in a.items():
        change = (W - before[name]).norm()
        assert (b[name] - W).norm() <= 1e-2 * change
        moved += float(change)
    assert moved > 0.1


@pytest.mark.parametrize("family", [*FAMILIES, "small"])
def test_a_packed_rows_gradients_are_its_own(family):
    """float64: loss and every weight's gradient of five rows in two blocks, against one row at a time."""
    from data.rows import packed_batches
    if family == "small":
        model = train.GPT(288, layers=2, width=32).double()
    else:
        model = families.model(family, torch.float64)
    generator = torch.Generator().manual_seed(0)
    some = [(torch.randint(256, (n,), generator=generator).tolist(), 2) for n in (5, 9, 14, 6, 11)]

    def gradients(rows):
        model.zero_grad()
        total = 0.0
        for row in rows:
            x, y = hd_pissa.pad([row], "cpu")
            logits = hd_pissa.logits_of(model, x).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, y.flatten(), reduction="sum")
            loss.backward()
            total += float(loss.detach())
        return total, {name: p.grad.clone() for name, p in model.named_parameters()}

    alone, expected = gradients(some)
    (blocks,) = packed_batches([some], 1, 30, 288)
    assert [len(tokens) for tokens, _ in blocks] != [len(row[0]) for row in some] and len(blocks) == 2
    models.take_packed(model, 288, 32)
    together, got = gradients(blocks)
    assert together == pytest.approx(alone, rel=1e-9)
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=1e-6, atol=1e-9 + 1e-7 * float(g.abs().max()))


@pytest.mark.parametrize("kind, sizes", [("Mamba", dict(state_size=4)), ("Bloom", dict(n_layer=2, n_head=4))])
def test_models_that_would_mix_rows_are_refused(kind, sizes):
    """A state space runs on over the border; ALiBi counts distances from a mask of another shape."""
    import transformers
    config = getattr(transformers, kind + "Config")(
        **dict(hidden_size=32, vocab_size=96, pad_token_id=0, num_hidden_layers=2) | sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    with pytest.raises(ValueError, match="--packing: this model takes neither"):
        models.take_packed(model, 96, 32)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_sharded_weights_save_the_same_folder(family, tmp_path):
    """Two processes with --shard_weights write the file of one process, the tied head not twice."""
    import os
    import subprocess
    import sys

    from conftest import ROOT
    base = folder(tmp_path / "base", family)
    train.main(flags(base, "--out", tmp_path / "one"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, ROOT / "train.py", *flags(base, "--shard_weights", "--out", tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_lora_export_loads_in_peft(family, tmp_path):
    """tests/test_export.py has Llama and GPT-2; the logits are as near as the returned error says."""
    peft = pytest.importorskip("peft")
    base = families.model(family)
    model, x = copy.deepcopy(base), batch(3)
    adapters = hd_pissa_extra.attach(model, R, shards=K, accumulate=True)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
    for t in range(3):
        for i in range(K):
            with adapters.shard(i):
                loss_of(model, batch(10 * t + i)).backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    error = hd_pissa_extra.export_lora(adapters, str(tmp_path), base.state_dict())
    adapters.detach_()
    with torch.no_grad():
        before, trained = base(x).logits, model(x).logits
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()(x).logits
    assert (trained - before).norm() > 0.02 and 0 < error < 0.05
    assert (loaded - trained).norm() <= 10 * error * (trained - before).norm()


# ---- Tokenizers of the built-in GPT ------------------------------------------------------------------------


def write_ranks(path, tokens):
    import base64
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return path


def test_a_file_of_ranks(tmp_path):
    """Merges by rank, spare ids for bytes without a rank, the end of a text last; every byte comes back."""
    path = write_ranks(tmp_path / "few.tiktoken", [*(bytes([b]) for b in range(97, 123)), b"ab", b"abc"])
    few = tokenizer.GPTTokenizer(str(path))
    assert few.encoding.encode_ordinary("abcab") == [27, 26]
    assert few.encoding.encode_ordinary("cab") == [2, 26]
    assert few.vocabulary == 2 + 256 + 1 and few.eot == 258 and few.response("a")[-1] == 258
    text = bytes(range(128)).decode() + "äé漢字🙂 \n\n  7+4"
    for made in (few, tokenizer.GPTTokenizer()):
        assert made.encoding.decode(made.encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize("content, message", [
    ("YQ== 0\nnonsense\n", "few.tiktoken:2: not 'base64-token rank'"), ("YQ== 0\nYg== 0\n", "one twice"),
    ("", "holds no ranks"), ("%% 0\n", "few.tiktoken:1: not")])  # fmt: skip
def test_a_bad_file_of_ranks_is_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "few.tiktoken"
    path.write_text(content)
    argv = ["--model", "scratch", "--lr", "1e-3", "--tokenizer", str(path)]
    refused(argv, [message], tmp_path / "out", capsys)


def test_the_small_gpt_with_another_tokenizer(tmp_path, capsys):
    """Trained with --tokenizer FILE, its model.pt has that vocabulary and asks for the flag again."""
    path = write_ranks(tmp_path / "few.tiktoken", [bytes([b]) for b in range(256)])
    common = ["--lr", "1e-3", "--batch_size", "8", "--shards", "2", "--max_steps", "1", "--threads", "1",
              "--data", str(families.rows(tmp_path / "rows.jsonl"))]  # fmt: skip
    train.main(["--model", "scratch", "--tokenizer", str(path), "--out", str(tmp_path / "out"), *common])
    saved = tmp_path / "out" / "model.pt"
    assert torch.load(saved, weights_only=True)["wte.weight"].shape[0] == 257
    refused(["--model", str(saved), *common], ["257 embeddings", "--tokenizer"], tmp_path / "no", capsys)
    train.main(["--model", str(saved), "--tokenizer", str(path), "--out", str(tmp_path / "again"), *common])


# ---- Bad input: one line with the remedy, nothing written --------------------------------------------------


def refused(argv, parts, out, capsys):
    """The command ends with status 2 and one line on stderr that holds `parts`; `out` does not exist."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train.main([*argv, "--out", str(out)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert exit.value.code == 2 and len(lines) == 1, lines
    for part in parts:
        assert part in lines[0], lines[0]
    assert not out.exists()


def edit(path, **changes):
    """Change keys of a JSON file; None takes one away."""
    there = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in there.items() if value is not None}))


def no_weights(path):
    (path / "model.safetensors").unlink()


def no_config(path):
    (path / "config.json").rename(path / "adapter_config.json")


def no_tokenizer(path):
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()


def no_eos(path):
    edit(path / "tokenizer_config.json", eos_token=None)


def cut_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4000])


def weight_left_out(path):
    from safetensors.torch import load_file, save_file
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def other_shapes(path):
    edit(path / "config.json", intermediate_size=64)


def no_language_model(path):
    edit(path / "config.json", model_type="t5")


def own_code(path):
    edit(path / "config.json", model_type="mine", auto_map={
        "AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})  # fmt: skip
    (path / "mine.py").write_text("raise SystemExit('code of the folder has run')\n")


def no_json(path):
    (path / "config.json").write_text('{"model_type": "llama"')


def small_vocabulary(path):
    import transformers
    config = families.config("llama")
    config.vocab_size, config.pad_token_id = 200, None
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def four_bits(path):
    edit(path / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def eight_bits(path):
    edit(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 8, "group_size": 128})


def infinite(path):
    from safetensors.torch import load_file, save_file
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = math.inf
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil, parts", [
    (no_weights, ["model.safetensors", "download it again"]),
    (no_config, ["has no config.json", "merged into its model"]),
    (no_tokenizer, ["its tokenizer", "download it again"]),
    (no_eos, ["no eos token", "tokenizer_config.json"]),
    (cut_weights, ["weights cannot be used", "download it again"]),
    (weight_left_out, ["1 weights are not in its files or", "model.layers.1.mlp.up_proj.weight", "download"]),
    (other_shapes, ["6 weights", "other shapes", "model.layers.0.mlp.down_proj.weight"]),
    (no_language_model, ["'t5' is no causal language model"]),
    (own_code, ["custom code", "is not run"]),
    (no_json, ["config.json", "download it again"]),
    (small_vocabulary, ["257 tokens, the model 200 embeddings"]),
    (four_bits, ["is quantized (bitsandbytes): W itself is trained", "give the model that it was"]),
    (eight_bits, ["is quantized (gptq)"]),
    (infinite, ["model.layers.1.mlp.up_proj.weight holds NaN or Inf"]),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_a_bad_folder_is_one_line(spoil, parts, tmp_path, capsys):
    path = folder(tmp_path / "base", "llama")
    spoil(path)
    refused(flags(path), [str(path)] if spoil is not infinite else [], tmp_path / "out", capsys)
    refused(flags(path), parts, tmp_path / "out", capsys)


def test_bad_names_are_one_line(tmp_path, capsys):
    text = tmp_path / "notes.pt"
    text.write_text("no tensors")
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, other)
    for name, parts in ((str(tmp_path / "gone"), ["no such directory"]),
                        (str(tmp_path / "gone.pt"), ["no such file"]),
                        (str(text), ["damaged", "model.pt that train.py has written"]),
                        (str(other), ["not a state_dict of the small GPT"])):  # fmt: skip
        refused(["--model", name, "--lr", "1"], [name, *parts], tmp_path / "out", capsys)
    path = folder(tmp_path / "base", "llama")
    refused(flags(path, "--tokenizer", "gpt2"), ["comes with its own"], tmp_path / "out", capsys)
    refused(["--model", "scratch", "--lr", "1", "--tokenizer", "gpt9"], ["no such file", "cl100k_base"],
            tmp_path / "out", capsys)  # fmt: skip


def test_small_gpt_or_folder():
    """A folder called ...scratch is a folder."""
    names = {"scratch": True, "a/b.pt": True, "./llama-from-scratch": False, "gpt2": False}
    assert {name: models.is_small(name) for name in names} == names


@pytest.mark.parametrize("there", [[], ["model-00001-of-00003.safetensors"], ["pytorch_model.bin"]])
def test_a_download_that_was_cut_off_is_asked_for_again(there, tmp_path, monkeypatch):
    """Whatever the cache holds of the weights, the hub is asked for the rest of them."""
    hub, asked = pytest.importorskip("huggingface_hub"), []
    for name in there:
        (tmp_path / name).write_text("")

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    models.snapshot("some/model", None, True)
    assert asked[1:2] == [["model*.safetensors"]] and "*.json" in asked[0]
    assert (len(asked) == 3) == (not any("safetensors" in name for name in there))
    asked.clear()
    models.snapshot("some/model", None, False)
    assert len(asked) == 1


# ---- Real sizes without weights ----------------------------------------------------------------------------

REAL = {    # config, number of weights, smallest side of an adapted weight
    "llama-2-7b": ("LlamaConfig", dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                   num_hidden_layers=32, num_attention_heads=32), 6_738_415_616, 4096),
    "llama-3.1-8b": ("LlamaConfig", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
                     8_030_261_248, 1024),
    "mistral-7b-v0.1": ("MistralConfig", dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336,
                        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
                        7_241_732_096, 1024),
    "qwen2.5-7b": ("Qwen2Config", dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                   num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
                   7_615_616_512, 512),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_dry_run_of_the_papers_models(name, tmp_path, capsys, monkeypatch):
    """From config.json and a tokenizer alone: the published number of weights, whether it fits, largest r."""
    import transformers

    from training import dry_run
    kind, sizes, weights, side = REAL[name]
    getattr(transformers, kind)(**sizes, max_position_embeddings=4096).save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    families.rows(tmp_path / "rows.jsonl")
    commonsense = ["--targets", "q_proj,k_proj,v_proj,up_proj,down_proj", "--shards", "8"]
    argv = flags(tmp_path, *commonsense, "--dry_run", "--out", tmp_path / "out")
    fits = name == "mistral-7b-v0.1"
    monkeypatch.setattr(dry_run, "available", lambda device: ((160 if fits else 16) * 2**30, "a machine"))
    said, text = train.main([*argv, "--rank", str(side // 8)]), capsys.readouterr().out
    assert list(said["memory"].values())[0] == 4 * weights and f"{weights:,} weights" in text
    assert said["fits"] is fits and ("does not fit: the sum against" in text) is not fits
    message = f"K r = {side + 8} components are needed, it has {side}"
    refused([*argv, "--rank", str(side // 8 + 1)], [message], tmp_path / "out", capsys)


# ---- The real SmolLM2-135M ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(real_dir, smollm2, tmp_path, monkeypatch):
    """Commonsense targets on real rows: the loss falls, the folder's logits are the training model's, PEFT
    loads the adapter. (That the logits at step 0 are the base model's is train.py's own check.)"""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    kept, save = [], train.save

    def recording(out, model, *rest):
        with torch.no_grad():
            kept.append(model.eval()(x).logits)
        return save(out, model, *rest)

    monkeypatch.setattr(train, "save", recording)
    x = batch(3, 2, 24)
    result = train.main([
        "--model", str(smollm2), "--data", str(real_dir / "commonsense_train_5k.jsonl"), "--rank", "8",
        "--shards", "2", "--targets", "q_proj,k_proj,v_proj,up_proj,down_proj", "--lr", "1e-3",
        "--warmup", "0", "--batch_size", "4", "--micro_batch_size", "2", "--block_size", "96",
        "--max_steps", "2", "--eval_rows", "4", "--export_lora", "--out", str(tmp_path / "out")])  # fmt: skip
    assert result["after"]["all"]["loss"] < result["before"]["all"]["loss"] - 0.02
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")(x).logits
        before = base(x).logits
        lora = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "lora").eval()(x).logits
    assert torch.equal(after, kept[0])
    assert 0 < result["lora_error"] < 0.05
    assert (lora - after).norm() <= 10 * result["lora_error"] * (after - before).norm()


def test_a_two_sided_model_is_refused_and_a_decoder_is_not():
    """An encoder's earlier logits change with a later token; the sentence says so and names the remedy."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                 vocab_size=40)
    torch.manual_seed(0)
    encoder = transformers.RobertaForCausalLM(transformers.RobertaConfig(**sizes, is_decoder=False))
    decoder = transformers.RobertaForCausalLM(transformers.RobertaConfig(**sizes, is_decoder=True))
    with pytest.raises(ValueError, match="M sees later tokens .* is_decoder=True"):
        models.refuse_two_sided(encoder, "M")
    models.refuse_two_sided(decoder, "M")
