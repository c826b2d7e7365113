"""The shipped command line, its data handling and its baselines."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import hd_pissa
import hd_pissa_extra
import train
from data.rows import encode, hold_out, read_rows, step_batches
from training import baselines

ROOT = Path(train.__file__).resolve().parent


def command(*argv, processes=0, **environ):
    """Run train.py in a subprocess, through torchrun where `processes` says so; its output."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launch, str(ROOT / "train.py"), "--device", "cpu", "--threads", "1", *map(str, argv)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_command_line_on_one_and_two_processes(tmp_path):
    """torchrun and plain python give the same losses and weights bit for bit, and print what they claim."""
    results = []
    for processes in (0, 2):
        out = tmp_path / f"out{processes}"
        text = command("--max_steps", 3, "--eval_rows", 64, "--out", out, processes=processes)
        for claim in ("logits equal the base model's bit for bit", "skipped: lm_head (tied weight)",
                      "c_attn x4", "effective rank of dW", "2Kr = 32", "exact match", "aggregate=mean",
                      "model.pt"):  # fmt: skip
            assert claim in text, text
        assert all(domain in text for domain in ("code", "commonsense", "conversation", "math"))
        log, config = log_of(out), json.loads((out / "config.json").read_text())
        assert [record["step"] for record in log] == [1, 2, 3] and config["shards"] == 8
        assert all(set(r) >= {"loss", "lr", "tokens_per_second"} for r in log)
        state = torch.load(out / "model.pt", weights_only=True)
        assert list(state) == list(torch.load(train.DATA / "base.pt", weights_only=True))
        train.GPT.from_state_dict(state)
        results.append((state, [record["loss"] for record in log]))
    (a, losses_a), (b, losses_b) = results
    assert losses_a == losses_b and all(torch.equal(a[k], b[k]) for k in a)
    base = torch.load(train.DATA / "base.pt", weights_only=True)
    changed = {k for k in a if not torch.equal(a[k], base[k])}
    assert changed == {
        k for k in a if any(f".{n}." in k for n in ("c_attn", "attn_proj", "c_fc", "mlp_proj"))
    }


@pytest.mark.parametrize(
    "flags, exact",
    [("--shard_weights", True), ("--shard_weights --dtype bfloat16", True), ("--basis resend", True),
     pytest.param("--shard_weights --exchange all_reduce", False, marks=pytest.mark.slow),
     pytest.param("--gradients global", False, marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_processes_save_what_one_does(flags, exact, tmp_path):
    """Sharded, resent, in halves: the saved file is the plain one of one process."""
    common = ["--max_steps", 3, "--eval_rows", 8, "--batch_size", 16, "--shards", 4]
    one = [flag for flag in flags.split() if flag != "--shard_weights"]
    command(*common, *one, "--out", tmp_path / "one")
    text = command(*common, *flags.split(), "--out", tmp_path / "two", processes=2)
    a, b = (torch.load(tmp_path / out / "model.pt", weights_only=True) for out in ("one", "two"))
    assert list(a) == list(b) and "effective rank" in text
    for name in a:
        assert type(b[name]) is torch.Tensor and a[name].dtype == b[name].dtype
        if exact:
            assert torch.equal(a[name], b[name]), name
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_random_init(tmp_path, monkeypatch):
    """--init random: all factors of a layer orthonormal, of no SVD, the same in every run; the loss falls."""
    flags = ["--max_steps", "3", "--eval_rows", "16", "--batch_size", "16", "--shards", "4", "--lr", "4e-3",
             "--gradients", "global", "--aggregate", "sum", "--init", "random"]  # fmt: skip
    kept, attach = [], hd_pissa_extra.attach

    def keeping(model, *args, **kwargs):
        kept.append(attach(model, *args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(hd_pissa_extra, "attach", keeping)
    results = [train.main([*flags, "--out", str(tmp_path / out)]) for out in "ab"]

    def factors(slot):
        """A^T (K r, m) and B (K r, n) of all shards."""
        A, B = hd_pissa_extra.Seeded(slot, kept[0].seed, 0, 4).make("cpu", torch.float32)
        return A.mT.flatten(0, 1), B.flatten(0, 1)

    for slot in kept[0].slots:
        for Q in factors(slot):
            torch.testing.assert_close(Q @ Q.T, torch.eye(8), rtol=0, atol=1e-5)
    assert kept[0].basis.numel() == 0 and results[0]["after"] == results[1]["after"]
    for a, b in zip(kept[0].slots, kept[1].slots):
        assert all(torch.equal(x, y) for x, y in zip(factors(a), factors(b)))
    assert results[0]["after"]["all"]["loss"] < results[0]["before"]["all"]["loss"]
    top = torch.linalg.svd(kept[0].slots[0].module.weight)[0][:, :8]
    assert (factors(kept[0].slots[0])[1] @ top).norm() < 2      # 8^1/2 if it were


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_baselines_run_in_process(method, tmp_path):
    """Through the same loop; loss falls, and the effective rank is the method's."""
    out = tmp_path / "out"
    result = train.main(["--method", method, "--max_steps", "4", "--eval_rows", "32", "--out", str(out)])
    assert len(log_of(out)) == 4 and result["after"]["all"]["loss"] < result["before"]["all"]["loss"]
    ranks = {layer["effective_rank"] for layer in result["effective_rank"].values()}
    assert {"lora": max(ranks) <= 2, "pissa": max(ranks) <= 4, "full": min(ranks) > 16}[method], ranks


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_baseline_forward_is_the_residual_adapter(method):
    """Starts at the base model's logits; after training, folding s A B into W keeps the logits."""
    model = train.GPT(50, block_size=16, layers=1, width=32).double()
    x = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start = model(x)
    baseline = baselines.Baseline(model, method, 2, 1, "all-linear", 4.0, 0)
    torch.testing.assert_close(model(x), start, rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.AdamW(baseline.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        trained = model(x)
        baseline.detach_()
        torch.testing.assert_close(model(x), trained, rtol=1e-10, atol=1e-10)
    assert (trained - start).abs().max() > 1e-3


def test_baseline_dropout_is_on_the_adapters_input():
    """Y = X W_res + s (mask X) A B in training, by hand with the same draw; no mask in evaluation."""
    model = nn.Sequential(nn.Linear(12, 10, bias=False).double())
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        start = model(x)
    baseline = baselines.Baseline(model, "pissa", 3, 1, "all-linear", 6.0, 0, 0.4)
    (A, B), s = baseline.parameters(), 2.0
    torch.manual_seed(5)
    mask = torch.ones(12).double().expand(7, 12).bernoulli(0.6) / 0.6
    torch.manual_seed(5)
    expected = start - s * x @ A @ B + s * (mask * x) @ A @ B
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.eval()(x), start, rtol=1e-9, atol=1e-9)


def test_baselines_minimise_the_whole_batch():
    """Gradient of the baseline at the first step: token mean over all rows, as autograd gives it."""
    g = torch.Generator().manual_seed(0)
    rows = [(torch.randint(0, 50, (n,), generator=g).tolist(), 2) for n in (5, 12, 7, 9)]
    model, kept = train.GPT(50, block_size=16, layers=1, width=32).double(), []
    adapters = baselines.Baseline(model, "full", 2, 4, "all-linear", None, 0)
    x, y = hd_pissa.pad(rows, "cpu")
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    expected = [p.grad.clone() for p in adapters.parameters()]
    model.zero_grad()
    adapters.step_ = lambda optimizer, told: kept.extend(
        p.grad.clone() for p in adapters.parameters()) or hd_pissa.gather_shards(told).tolist()
    list(hd_pissa.train(model, adapters, [rows], lr=1e-3, max_steps=1, micro_batch_size=1, progress=False))
    for a, b in zip(kept, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spare", [0, 1])
def test_a_baseline_takes_no_step_that_is_not_finite(spare):
    """Nothing protects its weights in a merge, so the loss is read first; steps to spare are left out."""
    model = train.GPT(50, block_size=16, layers=1, width=32)
    adapters = baselines.Baseline(model, "full", 2, 4, "all-linear", None, 0)
    adapters.skip_nonfinite = spare
    model.ln_f.weight.data[0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    rows = [([1, 2, 3, 4], 1)] * 4
    steps = hd_pissa.train(model, adapters, [rows] * 3, lr=1e-3, max_steps=3, progress=False)
    for _ in range(spare):
        assert math.isnan(next(steps)["loss"])
    with pytest.raises(ValueError, match=f"step {spare + 1}: not finite: loss of shards .0, 1, 2, 3"):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()) if not b.isnan().any())


def test_hold_out_keeps_equal_rows_together():
    """5 %, at most 500, independent of the order of the rows; no row on both sides."""
    rows = [{"instruction": str(i % 1000), "response": "x"} for i in range(2000)]
    rest, held = hold_out(rows)
    assert len(held) == 100 and len(rest) == 1900
    assert not {r["instruction"] for r in rest} & {r["instruction"] for r in held}
    assert {r["instruction"] for r in hold_out(rows[::-1])[1]} == {r["instruction"] for r in held}
    many = [{"instruction": str(i), "response": "x"} for i in range(20_000)]
    assert len(hold_out(many)[1]) == 500 and len(hold_out(many[:3])[1]) == 1


def test_step_batches_depend_on_the_seed_alone():
    """Every row once an epoch, another order in the next, no partial batch."""
    rows = [([i], 1, "all") for i in range(10)]

    def first(seed, n=6):
        return [[r[0][0] for r in batch] for batch, _ in zip(step_batches(rows, 4, seed), range(n))]

    assert first(0) == first(0) != first(1)
    batches = first(0)
    for epoch in (batches[:2], batches[2:4]):
        assert len({i for batch in epoch for i in batch}) == 8
    assert batches[:2] != batches[2:4]


def test_encode_cuts_and_drops():
    """Cut on the right at block_size and counted; dropped and counted where no response is left."""
    tokenizer = train.GPTTokenizer()
    rows = [
        {"instruction": "one", "response": "two three four five"},
        {"instruction": "word " * 40, "response": "x"},
    ]
    (tokens, prompt, domain), = encode(rows, tokenizer, 12, "train", report=(report := {}))  # fmt: skip
    full = tokenizer.prompt("one") + tokenizer.response("two three four five")
    assert tokens == full[:12] and prompt == len(tokenizer.prompt("one")) and domain == "all"
    assert report["train"]["dropped"] == {"no answer within --block_size 12": [1, ""]}
    assert (report["train"]["kept"], report["train"]["cut"]) == (1, 1)
    assert (
        tokenizer.encoding.decode(tokens)
        == "Q: one\nA: two three four five"[: len(tokenizer.encoding.decode(tokens))]
    )


def test_a_domain_that_is_no_text_is_all():
    """null (a table's gap), numbers, lists, empty text: the row counts in "all" alone."""
    tokenizer, row = train.GPTTokenizer(), {"instruction": "one", "response": "two"}
    rows = [row, *(row | {"domain": d} for d in (None, 3, ["a"], "", "math"))]
    assert [domain for *_, domain in encode(rows, tokenizer, 64, "train")] == ["all"] * 5 + ["math"]


def test_loss_covers_the_response_alone():
    """The padded batch's cross entropy equals the sum over response tokens by hand."""
    model = train.GPT(50, block_size=16, layers=1, width=32).double()
    rows = [([1, 2, 3, 4, 5, 6], 3), ([7, 8, 9], 1)]
    x, y = hd_pissa.pad(rows, "cpu")
    got = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    expected = 0
    for tokens, prompt in rows:
        logp = model(torch.tensor([tokens])).log_softmax(-1)[0]
        expected -= sum(logp[t - 1, tokens[t]] for t in range(prompt, len(tokens)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_exact_match_is_greedy_decoding():
    """evaluate against token-by-token decoding; half the references are what the model says, half are not."""
    model = train.GPT(50, block_size=16, layers=2, width=32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    g, rows, expected = torch.Generator().manual_seed(0), [], []
    for j in range(12):
        prompt = torch.randint(0, 50, (3 + j % 4,), generator=g).tolist()
        said = list(prompt)
        for _ in range(5):
            said.append(int(model(torch.tensor([said]))[0, -1].argmax()))
        if j % 2:
            said[-1 - j % 5] = (said[-1 - j % 5] + 1) % 50
        decoded = said[: len(prompt)]
        while len(decoded) < len(said):
            decoded.append(int(model(torch.tensor([decoded]))[0, -1].argmax()))
        rows.append((said, len(prompt), "ab"[j % 2]))
        expected.append(decoded == said)
    table = train.evaluate(model, rows, "cpu", batch_size=5)
    assert table["all"]["exact_match"] == pytest.approx(100 * sum(expected) / 12) and 0 < sum(expected) < 12
    assert table["a"]["exact_match"] == 100 and table["b"]["exact_match"] == 0
    assert train.evaluate(model, rows, "cpu", batch_size=1)["all"]["loss"] == pytest.approx(
        table["all"]["loss"], 1e-5
    )


def test_the_embedded_job_leaves_room_above_2Kr():
    """2Kr < min(m, n) / 2 at K = 8, and the base model knows at most a tenth of the answers (README)."""
    flags = {flag[0]: flag[2] for flag in train.FLAGS if not isinstance(flag, str)}
    model, tokenizer, context = train.load_model(flags["model"], 0)
    found, _ = hd_pissa.find_layers(model, "all-linear")
    assert 2 * flags["shards"] * flags["rank"] < min(min(m.weight.shape) for _, m in found) / 2
    held = encode(hold_out(read_rows(flags["data"]))[1], tokenizer, context, "held out")
    assert all(row["exact_match"] <= 10 for row in train.evaluate(model, held[::4], "cpu").values())


def losses_of(lines):
    return {line["step"]: line["loss"] for line in lines if line["set"] == "held out"}


def test_the_model_of_the_lowest_held_out_loss_is_kept(tmp_path, capsys):
    """A rate that rises far too high: the loss is lowest in the middle. OUT/best.pt gives that very loss;
    going on from a checkpoint ends with the same file and sentence."""
    argv = ["--max_steps", "8", "--batch_size", "16", "--eval_rows", "24", "--eval_every", "2", "--lr", "0.4",
            "--warmup", "8", "--save_every", "4", "--threads", "1"]  # fmt: skip
    result = train.main([*argv, "--out", str(tmp_path / "a")])
    losses = losses_of(result["eval"])
    best = min(list(losses)[1:], key=losses.get)
    assert list(losses) == [0, 2, 4, 6, 8] and result["best"]["step"] == best < 8, losses
    assert losses[0] == result["before"]["all"]["loss"] and losses[8] == result["after"]["all"]["loss"]
    text = f"lowest held-out loss {losses[best]:.4f} after step {best} of 8: {tmp_path / 'a' / 'best.pt'}"
    assert text in capsys.readouterr().out
    model, tokenizer, context = train.load_model(str(tmp_path / "a" / "best.pt"), 0)
    held = hold_out(read_rows(train.DATA / "multi_domain.jsonl"))[1][:24]
    held = encode(held, tokenizer, context, "held out")
    assert train.evaluate(model, held, "cpu", 32)["all"]["loss"] == losses[best]

    fit = train.hd_pissa.train
    def stopping(*args, **kwargs):
        for record in fit(*args, **kwargs):
            yield record
            if record["step"] == 5:
                raise ValueError("stopped here")

    out = tmp_path / "b"
    train.hd_pissa.train = stopping
    try:
        with pytest.raises(SystemExit):
            train.main([*argv, "--out", str(out)])
    finally:
        train.hd_pissa.train = fit
    assert train.main([*argv, "--out", str(out)])["eval"] == result["eval"]
    a, b = (torch.load(tmp_path / name / "best.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_where_the_end_is_best_there_is_one_model(tmp_path, capsys):
    result = train.main(["--max_steps", "4", "--batch_size", "16", "--eval_rows", "24", "--eval_every", "2",
                         "--threads", "1", "--lr", "4e-3", "--out", str(tmp_path)])  # fmt: skip
    assert result["best"]["step"] == 4 and "after step 4 of 4: the result" in capsys.readouterr().out
    assert (tmp_path / "model.pt").exists() and not (tmp_path / "best.pt").exists()


def test_three_prompts_are_answered_before_and_after(tmp_path, capsys):
    """Of different domains; the texts are greedy continuations by the base and by the result."""
    result = train.main(["--max_steps", "3", "--batch_size", "16", "--eval_rows", "64", "--threads", "1",
                         "--out", str(tmp_path)])
    text, some = capsys.readouterr().out, result["samples"]
    rows = {row["instruction"]: row for row in read_rows(train.DATA / "multi_domain.jsonl")}
    asked = [rows[sample["prompt"][3:-3]] for sample in some]       # between "Q: " and "\nA:"
    assert len({row["domain"] for row in asked}) == 3 == len(some)
    for when, path in (("before", train.DATA / "base.pt"), ("after", tmp_path / "model.pt")):
        model, tokenizer, context = train.load_model(str(path), 0)
        for sample, row in zip(some, asked):
            assert sample["answer"] == " " + row["response"]
            tokens = tokenizer.prompt(row["instruction"])
            start = len(tokens)
            while len(tokens) < start + 64 and (len(tokens) == start or tokens[-1] != tokenizer.eot):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
            assert tokenizer.decode([t for t in tokens[start:] if t != tokenizer.eot]) == sample[when]
    assert all(f"before  {json.dumps(sample['before'])[1:41]}" in text for sample in some)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<dl>") == 3 and page.count("<dt>before</dt>") == 3


@pytest.mark.slow
def test_real_model_and_data(real_dir, smollm2, tmp_path):
    """Two steps on SmolLM2-135M and GSM8K rows: the held-out loss falls, the folder gives the same loss."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    result = train.main([
        "--model", str(smollm2), "--data", str(real_dir / "gsm8k_train.jsonl"), "--rank", "2", "--lr", "1e-3",
        "--batch_size", "8", "--micro_batch_size", "1", "--block_size", "128", "--max_steps", "2",
        "--warmup", "0", "--eval_rows", "8", "--out", str(out),
    ])  # fmt: skip
    assert result["after"]["all"]["loss"] < result["before"]["all"]["loss"] - 0.02
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    rows = hold_out(read_rows(str(real_dir / "gsm8k_train.jsonl")))[1][:8]
    rows = encode(rows, train.models.HFTokenizer(str(out / "model")), 128, "held out")
    assert train.evaluate(model, rows, "cpu", 8)["all"]["loss"] == pytest.approx(
        result["after"]["all"]["loss"], 1e-6
    )
