"""The LoRA export: equal to dW but for second-order terms, loaded by PEFT, and tied to its base."""

import json

import pytest
import torch
from spawned import spawn
from toy import K, R, problem, run

import hd_pissa
import hd_pissa_extra
import train
from training import checkpoint

LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=64, max_position_embeddings=64)  # fmt: skip


def second_order(adapters, record):
    """sum_t sum_i dA_i dB_i of each layer, from the increments that `record` has kept before every merge."""
    layers = range(len(adapters.slots))
    return [sum((dA @ dB) for step in record for dA, dB in zip(*step[j])) for j in layers]


@pytest.fixture
def recorded(monkeypatch):
    """Increments before each merge, copied where the optimizer left them."""
    record, merge_ = [], hd_pissa.Adapters.merge_

    def copying(self):
        record.append([[x.clone() for x in slot.views(self.increments)] for slot in self.slots])
        merge_(self)

    monkeypatch.setattr(hd_pissa.Adapters, "merge_", copying)
    return record


@pytest.mark.parametrize("aggregate, alpha", [("mean", None), ("sum", None), ("mean", 2.0 * R)])
def test_float64_identity(aggregate, alpha, recorded):
    """W - W0 = P Q + s/K sum_t sum_i dA_i dB_i, to rounding in float64."""
    weights, bias, data = problem()
    after, adapters = run(weights, bias, data, aggregate=aggregate, alpha=alpha, accumulate=True)
    s = 1.0 if alpha is None else alpha / R
    share = s / K if aggregate == "mean" else s
    rest = second_order(adapters, recorded)
    for W0, W, slot, extra in zip(weights, after, adapters.slots, rest):
        P, Q = hd_pissa_extra.lora_factors(adapters, slot)
        assert P.shape == (slot.m, 2 * K * R) and Q.shape == (2 * K * R, slot.n)
        dW = W - W0
        torch.testing.assert_close(P @ Q + share * extra, dW, rtol=0, atol=1e-13)
        assert (P @ Q - dW).abs().max() > 1e-9, "without second-order terms nothing was tested"


def test_smaller_rank_is_the_best_one():
    """Rank 3 of a layer's factors leaves what the singular values beyond the third say (Eckart-Young)."""
    weights, bias, data = problem()
    _, adapters = run(weights, bias, data, accumulate=True)
    for slot in adapters.slots:
        P, Q = hd_pissa_extra.lora_factors(adapters, slot)
        P3, Q3 = hd_pissa_extra.lora_factors(adapters, slot, 3)
        S = torch.linalg.svdvals(P @ Q)
        assert P3.shape == (slot.m, 3) and Q3.shape == (3, slot.n)
        torch.testing.assert_close((P @ Q - P3 @ Q3).norm(), S[3:].norm(), rtol=1e-9, atol=1e-12)


def train_model(make, batches=4, **attach):
    """(model, adapters, base state_dict) of a small transformers model after a few AdamW steps, K = 2."""
    torch.manual_seed(0)
    model = make()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config.pad_token_id = 0
    adapters = hd_pissa_extra.attach(model, 2, shards=2, accumulate=True, **attach)
    model = model.bfloat16() if attach.get("dtype") == torch.bfloat16 else model
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        for s in range(adapters.S):
            x = torch.randint(64, (2, 12), generator=generator)
            with adapters.shard(s):
                model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    adapters.detach_()
    return model.eval(), adapters, base


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_peft_loads_it(make, tmp_path):
    """PeftModel.from_pretrained on the base gives the trained logits, as near as the printed error says."""
    peft = pytest.importorskip("peft")
    model, adapters, base = train_model(make)
    error = hd_pissa_extra.export_lora(adapters, str(tmp_path / "lora"), base)
    plain = make()
    plain.load_state_dict(base)
    x = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        trained, before = model(x).logits, plain.eval()(x).logits
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(x).logits
    assert 0 < error < 0.05
    assert (loaded - trained).norm() <= 10 * error * (trained - before).norm()
    assert (trained - before).norm() > 1e-3 * before.norm(), "the model has not moved, nothing was compared"


def test_error_is_that_of_the_update(tmp_path):
    """The returned error is |LoRA - dW| / |dW| over all layers, from the file's own tensors."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file
    model, adapters, base = train_model(llama)
    for rank in (None, 3):
        error = hd_pissa_extra.export_lora(adapters, str(tmp_path), base, rank=rank)
        file, wrong, whole = load_file(tmp_path / "adapter_model.safetensors"), 0.0, 0.0
        for slot in adapters.slots:
            lora_A, lora_B = (file[f"base_model.model.{slot.name}.lora_{x}.weight"].double() for x in "AB")
            dW = slot.module.weight.double() - base[slot.name + ".weight"].double()
            wrong += float((lora_B @ lora_A - dW).square().sum())
            whole += float(dW.square().sum())
        assert error == pytest.approx((wrong / whole) ** 0.5, rel=1e-2)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == (rank or 8)


def export_there(out, exchange, dtype):
    """On two processes: {name: tensor} of the exported file and the error."""
    _, adapters, base = train_model(llama, exchange=exchange, dtype=dtype)
    error = hd_pissa_extra.export_lora(adapters, out, base)
    return error


@pytest.mark.parametrize("exchange, dtype", [("all_gather", None), ("all_reduce", None),
                                             ("all_gather", torch.bfloat16)])  # fmt: skip
def test_two_processes(exchange, dtype, tmp_path):
    """Sums and factors of both processes' shards are in the one file that process 0 writes."""
    pytest.importorskip("peft")
    errors = spawn(2, export_there, tmp_path, str(tmp_path / "lora"), exchange, dtype)
    assert errors[0] == errors[1] and 0 < errors[0] < 0.05
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_a_full_disk_leaves_no_adapter(tmp_path, monkeypatch):
    """The folder is there when it is whole: not a config without its tensors."""
    pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.torch")
    _, adapters, base = train_model(llama)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "save_file", full)
        with pytest.raises(ValueError, match="No space"):
            hd_pissa_extra.export_lora(adapters, str(tmp_path / "lora"), base)
    assert not (tmp_path / "lora").exists()
    hd_pissa_extra.export_lora(adapters, str(tmp_path / "lora"), base)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


FOREIGN = {
    "a file beside them": ("lora", {"notes.txt": "precious", "adapter_config.json": "{}"}),
    "another adapter": ("lora", {"adapter_model.safetensors": None, "adapter_config.json": "{}"}),
    "a damaged one": ("lora", {"adapter_model.safetensors": "precious"}),
    "a config alone": ("lora", {"adapter_config.json": "{}"}),
    "a folder": ("lora", {"sub/thesis.txt": "precious"}),
    "where it is written first": ("lora.tmp", {"thesis.txt": "precious"}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_no_foreign_folder_is_emptied(case, tmp_path):
    """Only an earlier export is replaced, told by its mark; a slash behind the folder changes nothing."""
    pytest.importorskip("peft")
    from safetensors.torch import save_file
    name, files = FOREIGN[case]
    for file, text in files.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text) if text else save_file({"x": torch.zeros(2)}, path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    _, adapters, base = train_model(llama)
    with pytest.raises(ValueError, match="which no export has written; give a new or an empty folder"):
        hd_pissa_extra.export_lora(adapters, f"{tmp_path / 'lora'}/", base)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    again = tmp_path / "again"
    for rank in (None, 3):
        (tmp_path / "again.tmp").mkdir()
        (tmp_path / "again.tmp" / ".tmpAb1").write_text("safetensors' own, of a kill inside an export")
        hd_pissa_extra.export_lora(adapters, f"{again}/", base, rank=rank)
        assert sorted(path.name for path in again.iterdir()) == sorted(hd_pissa_extra.EXPORT)
        assert json.loads((again / "adapter_config.json").read_text())["r"] == (rank or 8)
    assert not (tmp_path / "again.tmp").exists()


def test_refusals(tmp_path):
    weights, bias, data = problem()
    for options in ({}, {"accumulate": False}):         # adapters of the core, and of the extra file
        _, adapters = run(weights, bias, data, **options)
        with pytest.raises(ValueError, match="accumulate=True"):
            hd_pissa_extra.lora_factors(adapters, adapters.slots[0])
    _, adapters = run(weights, bias, data, accumulate=True)
    with pytest.raises(ValueError, match="base has no 0.weight"):
        hd_pissa_extra.export_lora(adapters, str(tmp_path), {})
    assert not list(tmp_path.iterdir())


def small_llama(folder):
    """A Llama of random weights in `folder`, with SmolLM2-like files and a tokenizer of single words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "<eos>", *(str(i) for i in range(50)), "instruction", "response", "Write", "below"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    hf.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    hf.save_pretrained(folder)
    rows = [{"instruction": f"{i % 7} {i % 11}", "response": f"{i % 7 + i % 11} {i % 3}"} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(folder), "--data", str(folder / "rows.jsonl"), "--lr", "1e-3", "--batch_size", "8",
            "--rank", "2", "--shards", "4", "--threads", "1", "--export_lora", "--max_steps"]  # fmt: skip


def test_float64_run_knows_its_base(tmp_path):
    """The base is read again in the run's own dtype, so that its checksum is the one taken at the start."""
    pytest.importorskip("peft")
    result = train.main([*small_llama(tmp_path), "2", "--dtype", "float64", "--out", str(tmp_path / "out")])
    assert 0 < result["lora_error"] < 0.05 and (tmp_path / "out" / "lora").is_dir()


def test_a_smaller_rank_on_the_command_line(tmp_path, capsys):
    """--lora_rank 3: the file has that rank, and the error printed is that of the file."""
    pytest.importorskip("peft")
    flags = [*small_llama(tmp_path), "3", "--lora_rank"]
    with pytest.raises(SystemExit):
        train.main([*flags, "17"])
    assert "dW has rank 2 K r = 16" in capsys.readouterr().err
    result = train.main([*flags, "3", "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert f"LoRA of rank 3 in {tmp_path / 'out' / 'lora'}: relative error {result['lora_error']:.1e}" in (
        capsys.readouterr().out)
    from safetensors.torch import load_file
    lora = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in (".", "out/model"))
    wrong = whole = 0.0
    for name in (k for k in lora if "lora_A" in k):
        weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        dW = after[weight].double() - before[weight].double()
        PQ = lora[name.replace("lora_A", "lora_B")].double() @ lora[name].double()
        wrong, whole = wrong + (PQ - dW).square().sum(), whole + dW.square().sum()
    assert abs((wrong / whole).sqrt() / result["lora_error"] - 1) < 1e-3


def test_command_line_resume_and_changed_base(tmp_path, capsys):
    """--export_lora of a resumed run equals that of a whole one; a base that has changed is refused."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file
    flags = small_llama(tmp_path)
    whole = train.main([*flags, "4", "--out", str(tmp_path / "whole")])
    out, fit, steps = tmp_path / "parts", hd_pissa.train, []

    def stopping(*args, **kwargs):
        for record in fit(*args, **kwargs):
            yield record
            if record["step"] == 2 and not steps:
                steps.append(record)
                raise ValueError("stopped here")

    hd_pissa.train = stopping
    try:
        with pytest.raises(SystemExit):
            train.main([*flags, "4", "--out", str(out), "--save_every", "2"])
    finally:
        hd_pissa.train = fit
    parts = train.main([*flags, "4", "--out", str(out)])
    assert whole["lora_error"] == parts["lora_error"] < 0.05
    a, b = (load_file(tmp_path / name / "lora" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert checkpoint.steps(out / "checkpoint")

    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    calls = []

    def spoil(*args):
        calls.append(args)
        save_file(state, file, metadata={"format": "pt"})
        return rank_of_update(*args)

    rank_of_update, train.report.rank_of_update = train.report.rank_of_update, spoil
    try:
        with pytest.raises(SystemExit):
            train.main([*flags, "2", "--out", str(tmp_path / "spoilt")])
    finally:
        train.report.rank_of_update = rank_of_update
    message = capsys.readouterr().err
    assert calls and "mlp.up_proj.weight differs" in message and "Traceback" not in message
    assert not (tmp_path / "spoilt" / "lora").exists() and not (tmp_path / "spoilt" / "result.json").exists()
    assert (tmp_path / "spoilt" / "model" / "model.safetensors").exists(), "what was trained is there"


def deepseek(**changes):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    return DeepseekV3ForCausalLM(DeepseekV3Config(**dict(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, pad_token_id=0,
        max_position_embeddings=64) | changes))  # fmt: skip


def test_layers_that_peft_leaves_out_are_refused_before_training(tmp_path, capsys):
    """PEFT takes DeepSeek's dense and shared layers for experts. The sentence's own --targets are taken, and
    what PEFT then gives is what was trained."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers", "5")
    flags = [*small_llama(tmp_path), "2", "--rank", "1", "--shards", "2"]
    torch.manual_seed(0)
    deepseek().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", str(tmp_path / "out")])
    text = capsys.readouterr()
    message = text.err.splitlines()[-1]
    assert "PEFT leaves out 6 of 16 layers" in message and "model.layers.0.mlp.down_proj the first" in message
    assert "SVD" not in text.err and not (tmp_path / "out").exists()
    targets = message.rpartition("--targets ")[2].split()[0]
    result = train.main([*flags, "--targets", targets, "--out", str(tmp_path / "out")])
    assert 0 < result["lora_error"] < 0.05 and "in PEFT its logits are" in capsys.readouterr().out
    rest = [flag for flag in flags if flag != "--export_lora"]
    assert train.main([*rest, "--out", str(tmp_path / "b")])["after"], "what the sentence offers, too"


@pytest.mark.parametrize("fault, words", [("scale", "gives logits"), ("names", "out model.layers.0.mlp.up")])
def test_a_lora_that_peft_reads_otherwise_is_not_called_done(fault, words, tmp_path, monkeypatch, capsys):
    """Planted where the file is written: factors twice as large, or layers of other names."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file
    write = hd_pissa_extra.export_lora

    def spoil(adapters, folder, *rest):
        error, file = write(adapters, folder, *rest), f"{folder}/adapter_model.safetensors"
        if fault == "scale":
            save_file({k: 2 * v if "lora_B" in k else v for k, v in load_file(file).items()}, file)
        else:
            path = folder + "/adapter_config.json"
            config = json.load(open(path))
            kept = [name for name in config["target_modules"] if not name.endswith("0.mlp.up_proj")]
            json.dump(config | {"target_modules": kept}, open(path, "w"))
        return error

    monkeypatch.setattr(hd_pissa_extra, "export_lora", spoil)
    with pytest.raises(SystemExit):
        train.main([*small_llama(tmp_path), "3", "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err.splitlines()[-1]
    assert words in message and "does not read them" in message and "is whole" in message, message
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "lora" / "adapter_model.safetensors").exists()
