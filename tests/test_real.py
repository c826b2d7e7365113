"""The runner on a real model: its loss against the logits of every position, its loop against hd_pissa.train,
the basis from a seed against the DCT written out, which runs come next, and the file of results.

A Llama of two small layers stands in for the real model.
"""

import copy
import itertools
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import hd_pissa
import train
from tutorial.baselines import bases
from tutorial.experiments import real, run

transformers = pytest.importorskip("transformers")


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def some_rows(n: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        prompt, response = (int(torch.randint(low, 9, (), generator=g)) for low in (2, 1))
        rows.append((torch.randint(0, 80, (prompt + response,), generator=g).tolist(), prompt))
    return rows


def test_loss_on_response_tokens_is_that_of_all_logits():
    model, rows = llama(), some_rows(9)
    x, y = hd_pissa.pad(rows, "cpu")
    names, weights = zip(*model.named_parameters())
    loss = real.response_loss(model, x, y)
    found = torch.autograd.grad(loss, weights)
    logits = model(input_ids=x).logits
    # each row alone, without padding, token by token
    expected = torch.zeros((), dtype=torch.float64)
    for tokens, prompt in rows:
        alone = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected = expected - sum(alone[t - 1, tokens[t]] for t in range(prompt, len(tokens)))
    torch.testing.assert_close(loss, expected)
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
    torch.testing.assert_close(loss, whole)
    for name, a, b in zip(names, found, torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(a, b, msg=name)
    mean = sum(len(tokens) - prompt for tokens, prompt in rows)
    assert real.evaluate(model, rows, autocast=False) == pytest.approx(loss.item() / mean, rel=1e-9)


@pytest.mark.parametrize("arm", ["published", "whole", "dct", "lora", "pissa r=16", "full"])
def test_the_loop_is_that_of_hd_pissa_train(arm):
    c = real.COMMON | real.ARMS[arm][0] | {"K": 4, "lr": 1e-2, "seed": 1, "steps": 3, "batch": 12}
    rows, one, other = some_rows(36), llama(), llama()
    start = copy.deepcopy(one.state_dict())
    adapters, optimizer = real.attach(one, c)
    batches = [rows[a:a + 12] for a in range(0, 36, 12)]
    losses = []
    for step, batch in enumerate(batches):
        losses.append(real.gradients(one, adapters, batch, 5, autocast=False))
        for group in optimizer.param_groups:
            group["lr"] = c["lr"] * hd_pissa.lr_factor(step, 3, 0.03, "cosine")
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad(set_to_none=True)
    adapters.detach_()
    adapters, optimizer = real.attach(other, c)
    records = list(hd_pissa.train(other, adapters, batches, lr=c["lr"], max_steps=3, optimizer=optimizer,
                                  progress=False))
    adapters.detach_()
    assert losses == pytest.approx([record["loss"] for record in records], rel=1e-8)
    moved = 0.0
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)
        moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("m, n", [(21, 33), (31, 17)])     # odd: no two columns have equal |C|
def test_basis_from_a_seed_is_signs_times_dct_columns(m, n):
    W, k = torch.zeros((m, n), dtype=torch.float64), 16
    U, S, Vt = bases.dct(3)(W, k, "layer")
    assert (S == 1).all()
    for Q, side in ((U, m), (Vt.T, n)):
        torch.testing.assert_close(Q.T @ Q, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
        C = torch.tensor([[math.sqrt((1 if j == 0 else 2) / side) * math.cos(math.pi * (a + 0.5) * j / side)
                           for j in range(side)] for a in range(side)], dtype=torch.float64)
        # every column of |Q| is one column of |C|, and no column of C is taken twice
        distance = torch.cdist(Q.abs().T, C.abs().T, compute_mode="donot_use_mm_for_euclid_dist")
        chosen = distance.argmin(1)
        assert distance.min(1).values.max() < 1e-12 and len(set(chosen.tolist())) == k
        # one sign a row, the same in all columns
        product = Q * C[:, chosen]
        torch.testing.assert_close(product.sum(1).abs(), product.abs().sum(1))
        assert (product.sum(1) < 0).any() and (product.sum(1) > 0).any()
    again, other = bases.dct(3)(W, k, "layer"), bases.dct(4)(W, k, "layer")
    assert torch.equal(again[0], U) and not torch.equal(other[0], U)
    assert not torch.equal(bases.dct(3)(W, k, "another")[0], U)


def test_random_basis_is_drawn_anew_for_every_seed():
    W = torch.zeros((24, 40))
    (U, S, Vt), (other, _, _), (again, _, _) = (bases.drawn(seed)(W, 6, "layer") for seed in (0, 1, 0))
    torch.testing.assert_close(U.T @ U, torch.eye(6))
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(6))
    assert torch.equal(U, again) and (U - other).abs().max() > 0.1


def test_no_instruction_is_on_two_sides():
    rows = [{"instruction": f"say {i % 700}", "response": str(i)} for i in range(900)]
    parts = real.split(rows, 200, 400)
    texts = [{row["instruction"] for row in part} for part in parts]
    assert [len(t) for t in texts] == [100, 200, 400] and len(set.union(*texts)) == 700
    assert sum(map(len, parts)) == 900
    again = real.split(rows[::-1], 200, 400)
    assert [{row["instruction"] for row in part} for part in again] == texts
    with pytest.raises(ValueError, match="give more rows"):
        real.split(rows[:600], 200, 400)


def test_rows_of_the_repository_split_as_the_protocol_says():
    rows = real.read_rows(str(train.DATA / "multi_domain.jsonl"))
    assert [len(part) for part in real.split(rows)] == [7400, 200, 400]


def record(c, loss):
    return {"config": c, "validation": loss, "test": None}


def play(arms, loss):
    """All configurations in the order in which they would be run, by a made-up loss."""
    done, order = {}, []
    while need := real.missing(arms, done):
        order.append(need[0])
        done[run.key(need[0])] = record(need[0], loss(need[0]))
    return order


def test_sweeps_come_first_are_extended_at_edges_and_then_the_seeds():
    best = {"lora": 32e-3, "published": 16e-3}          # lora's is two above the first guess
    arm_of = {json.dumps(real.ARMS[arm][0]): arm for arm in best}

    def loss(c):
        arm = arm_of[json.dumps({k: c[k] for k in real.ARMS["lora"][0]} if c["method"] == "lora" else
                                real.ARMS["published"][0])]
        return abs(math.log(c["lr"] / best[arm]))

    order = play(["published", "lora"], loss)
    rates = [(c["method"], c["lr"]) for c in order if c["seed"] == 0]
    assert sorted(rates) == [("hd_pissa", 8e-3), ("hd_pissa", 16e-3), ("hd_pissa", 32e-3)] + \
        [("lora", x) for x in (4e-3, 8e-3, 16e-3, 32e-3, 64e-3)]
    assert [c["seed"] for c in order] == [0] * 8 + [1, 2, 3] * 2
    assert [(c["method"], c["lr"]) for c in order[8:]] == [("hd_pissa", 16e-3)] * 3 + [("lora", 32e-3)] * 3


def test_a_diverged_rate_counts_as_infinitely_bad():
    order = play(["lora"], lambda c: None if c["lr"] > 8e-3 else 1 / c["lr"])
    assert [c["lr"] for c in order if c["seed"]] == [8e-3] * 3


def test_results_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "runs.jsonl"
    first, second = (record(real.complete("lora", 1, seed), 1.0) for seed in (0, 1))
    real.append(path, first)
    path.write_bytes(path.read_bytes() + b'{"config": {"met')
    real.append(path, second)
    assert list(run.read(path).values()) == [first, second]


def test_every_arm_runs_and_a_run_that_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real, "hugging_face", lambda folder: (llama(torch.float32),))
    monkeypatch.setattr(real, "data", lambda folder: (some_rows(40), some_rows(9, 1), some_rows(9, 2)))
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "runs.jsonl"
    arms = [arm for arm in real.ARMS if not (arm == "hira" and not has_hira())]
    command = ["--model", str(tmp_path), "--out", str(out), "--quick", "--same_process", "--arms",
               *arms]
    done = real.main(command)
    assert len(done) == 2 * len(arms) == len(out.read_text().splitlines())
    for one in done.values():
        assert math.isfinite(one["validation"]) and (one["test"] is None) == (one["config"]["seed"] == 0)
    by_arm = {arm: done[run.key(real.complete(arm, real.ARMS[arm][1], 1, True))] for arm in arms}
    # numbers of the two layers' matrices: rank 2 on eight devices
    sides = 2 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32 + 3 * (32 + 48))
    assert by_arm["lora"]["trained"] == by_arm["published"]["trained"] == 2 * sides
    assert by_arm["lora"]["moments"] == by_arm["whole"]["moments"] == 4 * sides
    assert by_arm["lora"]["moments_zero1"] == 4 * sides // 8
    assert by_arm["lora r=16"]["moments_zero1"] == by_arm["published"]["moments"]
    assert by_arm["published"]["factors"] == by_arm["lora r=16"]["factors"] == 16 * sides
    assert by_arm["dct"]["factors"] == by_arm["full"]["factors"] == 0
    embedding = by_arm["dct embedding"]["trained"] - by_arm["dct"]["trained"]
    assert embedding == 2 * (80 + 32)
    lines = out.read_text()
    assert real.main(command).keys() == done.keys() and out.read_text() == lines
    capsys.readouterr()


@pytest.mark.slow
def test_the_real_model_runs_in_processes_of_their_own(smollm2, tmp_path):
    out = tmp_path / "runs.jsonl"
    command = [sys.executable, ROOT / "tutorial/experiments/real.py", "--model", smollm2, "--out", out,
               "--quick"]
    subprocess.run([*command, "--arms", "dct"], check=True)
    done = run.read(out)
    assert len(done) == 2 and all(2 < record["validation"] < 5 for record in done.values())
    process = subprocess.Popen([*command, "--arms", "full"], stderr=subprocess.PIPE, text=True)
    time.sleep(15)
    process.terminate()
    assert "the same command continues" in process.communicate(timeout=30)[1] and process.returncode == 1
    assert run.read(out) == done or len(run.read(out)) > 2


def has_hira() -> bool:
    import peft
    return hasattr(peft, "HiraConfig")


def test_misuse_is_refused_in_one_line(tmp_path, capsys):
    for arguments, text in ((["--model", str(tmp_path)], "no config.json"),
                            (["--model", str(tmp_path), "--arms", "loro"], "no arm 'loro'")):
        with pytest.raises(SystemExit):
            real.main(arguments)
        assert text in capsys.readouterr().err
    assert list(itertools.islice(real.missing(["lora"], {}), 1))[0]["lr"] == 8e-3


def test_table_and_verdicts_are_those_of_the_lines(tmp_path, capsys):
    from tutorial.experiments import real_table
    assert set(real_table.NAMES) == set(real.ARMS)
    path, best = tmp_path / "runs.jsonl", {"published": 4, "lora": 3}
    tests = {"published": (1.04, 1.05, 1.06), "lora": (1.01, 1.01, 1.01)}
    for arm, i in best.items():
        for k in (i - 1, i, i + 1):
            real.append(path, record(real.complete(arm, k, 0), 1.0 + abs(k - i)))
        for seed, test in zip((1, 2, 3), tests[arm]):
            real.append(path, record(real.complete(arm, i, seed), 1.5) | {"test": test})
        real.append(path, record(real.complete(arm, i + 1, 1), 0.1) | {"test": 0.1})     # of another rate
    arms = real_table.load(path)
    assert arms["lora"].tests == {1: 1.01, 2: 1.01, 3: 1.01} and arms["published"].lr == 16e-3
    found = real_table.compare(arms["published"], arms["lora"])
    assert found.gap == pytest.approx(0.04) and found.word == "decided"
    real_table.main(["--runs", str(path)])
    said = capsys.readouterr().out
    assert "| HD-PiSSA as published | 0.016 | 1.000 | 1.050 ± 0.010 | 3 |" in said
    assert "| HD-PiSSA as published | LoRA r=2 | +0.040 | 6.9 | 4.3 |" in said
    assert "| whole batch, SVD basis | HD-PiSSA as published | - |" in said
    assert "full" not in said.split("\n\n")[0]
