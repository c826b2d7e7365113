"""What a user can get wrong: each gets one message that names the value, the limit and the remedy."""

import json

import pytest
import torch
import torch.nn as nn
import toy

import hd_pissa
import hd_pissa_extra
import train


def model():
    return toy.module(*toy.problem()[:2])


def attach(**attach):
    return lambda: toy.attach(model(), attach.pop("rank", 2), **{"shards": 2, **attach})


def spoilt(change):
    def work():
        spoilt_model = model()
        change(spoilt_model)
        hd_pissa.attach(spoilt_model, 2, shards=2)

    return work


def twice():
    net = model()
    hd_pissa.attach(net, 2, shards=2)
    hd_pissa.attach(net, 2, shards=2)


def to_int8(net):
    net[2].weight = nn.Parameter(torch.ones(18, 24, dtype=torch.int8), requires_grad=False)


def tie(net):
    net.append(nn.Linear(24, 18, bias=False).double())
    net[3].weight = net[2].weight


CALLS = {
    "K r above min(m, n)": (
        attach(rank=5, shards=4, targets=["2"]),
        ["2 is (18, 24)", "K r = 20", "it has 18", "lower rank or shards", "exclude=['.2']"],
    ),
    "K r above every layer's": (
        attach(rank=1, shards=32),
        ["no layer to adapt", "2 (fewer than K r = 32 components)", "K r may be 20 at most"],
    ),
    "no such name": (attach(targets=["nothing"]), ["'nothing'", "ends no linear layer's name", "0, 2"]),
    "part of a name": (attach(targets="ayer0"), ["'ayer0'", "ends no linear layer's name", "0, 2"]),
    "one of two names": (attach(targets=["0", "oops"]), ["'oops'", "ends no linear layer's name"]),
    "exclude": (attach(exclude="oops"), ["'oops'", "ends no linear layer's name"]),
    "everything excluded": (attach(exclude=["0", "2"]), ["no layer to adapt", "0 (in exclude)"]),
    "rank 0": (attach(rank=0), ["rank=0", "1 or more"]),
    "rank 1.5": (attach(rank=1.5), ["rank=1.5", "whole number"]),
    "shards 0": (attach(shards=0), ["shards=0", "1 or more"]),
    "init": (attach(init="svd"), ["init='svd'", "hd_pissa, top, lora"]),
    "aggregate": (attach(aggregate="avg"), ["aggregate='avg'", "mean, sum"]),
    "exchange": (attach(exchange="p2p"), ["exchange='p2p'", "auto, all_gather, all_reduce"]),
    "alpha 0": (attach(alpha=0), ["alpha=0", "use more than 0", "None"]),
    "alpha nan": (attach(alpha=float("nan")), ["alpha=nan"]),
    "dropout 1": (attach(dropout=1.0), ["dropout=1.0", "below 1"]),
    "int8": (spoilt(to_int8), ["2.weight is", "torch.int8", "load float32 weights"]),
    "float16": (spoilt(lambda m: m.half()), ["0.weight is", "torch.float16", "load float32 weights"]),
    "nan": (
        spoilt(lambda m: m[2].weight.data[1, 1].fill_(float("nan"))),
        ["2.weight holds NaN", "load it again"],
    ),
    "inf": (spoilt(lambda m: m[0].weight.data[0, 0].fill_(float("inf"))), ["0.weight holds NaN or Inf"]),
    "zeros": (
        spoilt(lambda m: m[2].weight.data.zero_()),
        ["2.weight has rank 0, 4 components", "exclude=['.2']"],
    ),
    "rank below K r": (
        spoilt(lambda m: m[2].weight.data[3:].zero_()),
        ["2.weight has rank 3, 4 components", "exclude=['.2']"],
    ),
    "twice": (twice, ["0 has adapters", "detach_()"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_attach_refuses(call):
    """attach raises ValueError with these words."""
    work, words = CALLS[call]
    with pytest.raises(ValueError) as error:
        work()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_refused_attach_leaves_the_model_alone():
    """Plain modules, trainable as before."""
    net = model()
    with pytest.raises(ValueError):
        hd_pissa.attach(net, 99, shards=2)
    assert type(net[0]) is nn.Linear and all(p.requires_grad for p in net.parameters())


def test_tied_weights_are_skipped_with_a_reason():
    """A weight of two modules stays out; so does a parametrized one."""
    net = model()
    tie(net)
    torch.nn.utils.parametrizations.weight_norm(net[0])
    net.append(nn.Linear(18, 18).double())
    adapters = hd_pissa.attach(net, 1, shards=2)
    assert [slot.name for slot in adapters.slots] == ["4"]
    assert adapters.skipped["2"] == adapters.skipped["3"] == "tied weight" and "0" in adapters.skipped


@pytest.mark.parametrize("make, words", [
    (lambda p: torch.optim.AdamW(p, lr=1e-3), ["AdamW has weight_decay", "weight_decay=0.0"]),
    (lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1), ["SGD has weight_decay"]),
    (lambda p: torch.optim.Adafactor(p), ["Adafactor", "reads the parameter", "AdamW"]),
    (lambda p: torch.optim.LBFGS(p), ["LBFGS"]),
    (lambda p: torch.optim.ASGD(p), ["ASGD"]),
    (lambda p: torch.optim.Adam(p[1:]), ["lacks 1 of the 8", "adapters.parameters()"]),
    (lambda p: torch.optim.Adam([nn.Parameter(torch.zeros(1))]), ["lacks 8 of the 8"]),
])  # fmt: skip
def test_check_refuses_optimizers(make, words):
    """Weight decay, rules that read the parameter, missing increments; other groups are none of ours."""
    adapters = hd_pissa.attach(model(), 2, shards=2)
    with pytest.raises(ValueError) as error:
        adapters.check(make(adapters.parameters()))
    assert all(word in str(error.value) for word in words), str(error.value)
    other = {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.1}
    adapters.check(torch.optim.AdamW([{"params": adapters.parameters(), "weight_decay": 0.0}, other]))


def test_attach_refuses_a_launch_without_a_process_group(monkeypatch):
    """Started by torchrun, but nobody joined the processes: replicas would drift apart without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but no process group.*init_process_group before"):
        hd_pissa.attach(nn.Sequential(nn.Linear(8, 8)), 1)


def test_merge_refuses_a_shard_without_gradient():
    """Names it, shows the loop, leaves W; after the missing backward the same merge goes through."""
    weights, bias, data = toy.problem(shards=2)
    net = toy.module(weights, bias)
    adapters = hd_pissa.attach(net, 2, shards=2)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    with adapters.shard(1):
        late = net(data[0][1][0]).sum()
    net(data[0][0][0]).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"shards \[1\] of 2 got no gradient(.|\n)*with adapters.shard\(s\)"):
        adapters.merge_()
    assert torch.equal(net[0].weight.T, weights[0])
    late.backward()
    adapters.merge_()
    assert not torch.equal(net[0].weight.T, weights[0])


def test_merge_refuses_zero_increments_twice():
    """Forgotten optimizer.step(): the second merge says so; a loss without gradient is no such case."""
    net, (x, _) = model(), toy.problem()[2][0][0]
    adapters = hd_pissa.attach(net, 2, shards=1)
    for _ in range(3):
        (0 * net(x)).sum().backward()
        adapters.merge_()
    adapters.parameters()[0].grad = None
    net(x).sum().backward()
    adapters.merge_()
    net(x).sum().backward()
    with pytest.raises(ValueError, match=r"zero in two successive merges.*optimizer.step\(\)"):
        adapters.merge_()


def test_merge_refuses_nan_increments():
    """W stays."""
    weights, bias, data = toy.problem(shards=1)
    net = toy.module(weights, bias)
    adapters = hd_pissa.attach(net, 2, shards=1)
    net(data[0][0][0]).sum().backward()
    adapters.parameters()[-1].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"increments of shards \[0\] hold NaN or Inf; W is untouched"):
        adapters.merge_()
    assert torch.equal(net[0].weight.T, weights[0])


@pytest.mark.parametrize("i", [-1, 2])
def test_shard_out_of_range(i):
    """Names the range."""
    adapters = hd_pissa.attach(model(), 2, shards=2)
    with pytest.raises(ValueError, match=r"shards 0\.\.1"), adapters.shard(i):
        pass


@pytest.mark.parametrize("rows, kwargs, words", [
    ([([1, 2, 3], 1)] * 3, {}, ["3 rows", "2 shards"]),
    ([([1, 2, 3], 1), ([1, 2, 3], 3)], {}, ["step 1", "1 of them cut before their response"]),
    ([([1, 2, 3], 1)] * 2, {"lr": 0.0}, ["lr=0.0", "above 0"]),
    ([([1, 2, 3], 1)] * 2, {"lr": float("nan")}, ["lr=nan"]),
])  # fmt: skip
def test_loop_refuses(rows, kwargs, words):
    """Rows that cannot be dealt, a shard without response token, a learning rate that trains nothing."""
    gpt = train.GPT(30, block_size=8, layers=1, width=32)
    adapters = hd_pissa.attach(gpt, 2, shards=2)
    with pytest.raises(ValueError) as error:
        list(hd_pissa.train(gpt, adapters, [rows], max_steps=1, progress=False, **{"lr": 1e-3, **kwargs}))
    assert all(word in str(error.value) for word in words), str(error.value)


GOOD = json.dumps({"instruction": "a", "response": "b"})
FILES = {
    "missing": (None, ["no such data file"]),
    "empty": ("\n\n", ["holds no rows"]),
    "not JSON": (GOOD + "\n{oops}\n", [":2: not JSON"]),
    "no response": (json.dumps({"instruction": "a"}),
                    [":1: no format has the fields", "instruction+response"]),
    "empty response": (json.dumps({"instruction": "a", "response": ""}), [":1: no text in 'response'"]),
    "number": (json.dumps({"instruction": 3, "response": "b"}), [":1: int in field 'instruction'"]),
    "list": ("[1, 2]", [" row 1: a int, not an object"]),
    "too few": (GOOD, ["--batch_size 64", "give more rows"]),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_data_files(case, tmp_path, capsys):
    """Through the command line: exit status 2, one line with file and line, no output folder."""
    text, words = FILES[case]
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", str(path), "--out", str(out), "--device", "cpu"])
    lines = capsys.readouterr().err.strip().splitlines()
    message = next(line for line in lines if line.startswith("train.py: error:"))
    assert stop.value.code == 2 and str(path) in message and not out.exists()
    assert all(word in message for word in words), message


COMMANDS = {
    "--method galore": ["galore", "hd_pissa"],
    "--aggregate avg": ["avg", "mean"],
    "--exchange p2p": ["p2p", "all_gather"],
    "--init svd": ["svd", "lora"],
    "--dtype float16": ["float16", "bfloat16"],
    "--method lora --dtype bfloat16": ["--method lora", "only hd_pissa"],
    "--method full --shard_weights": ["--method full", "--shard_weights True", "leave it out"],
    "--method lora --aggregate sum": ["--method lora", "--aggregate sum", "leave it out"],
    "--method pissa --init top": ["--method pissa", "--init top"],
    "--recipe paper-math --method full --gradients global": ["--method full", "--gradients global"],
    "--lora_rank 3": ["--lora_rank 3 without --export_lora"],
    "--export_lora": ["hd_pissa", "Hugging Face model", "leave it out"],
    "--init lora --rank 17 --dry_run": ["fewer than K r = 136 components", "K r may be 128 at most"],
    "--init top --rank 129 --dry_run": ["fewer than K r = 129 components", "K r may be 128 at most"],
    "--block_size 2 --dry_run": ["too few", "--block_size"],
    "--shard_weights": ["needs several processes", "torchrun"],
    "--rank 0": ["--rank 0", "above 0"],
    "--rank 1.5": ["--rank", "1.5"],
    "--rank 17 --targets c_fc": ["blocks.0.c_fc is (512, 128)", "K r = 136", "lower rank or shards"],
    "--rank 17": ["blocks.0.c_attn", "fewer than K r = 136 components", "K r may be 128 at most"],
    "--shards 0": ["--shards 0", "above 0"],
    "--shards 3": ["--batch_size 64", "--shards 3", "63"],
    "--lr 0": ["--lr 0.0", "above 0"],
    "--lr nan": ["--lr nan"],
    "--lr inf": ["--lr inf"],
    "--alpha 0": ["--alpha 0.0", "above 0"],
    "--dropout 1": ["dropout=1.0", "below 1"],
    "--targets nothing": ["'nothing'", "ends no linear layer's name", "c_attn, c_fc"],
    "--max_steps 0": ["--max_steps 0"],
    "--block_size 0": ["--block_size 0"],
    "--block_size 2": ["too few", "--block_size"],
    "--model missing.pt --lr 1e-3": ["missing.pt", "no such file"],
    "--model ./missing --lr 1e-3": ["./missing", "no such directory"],
    "--model scratch": ["--lr", "2e-5"],
    "--no_such_flag": ["--no_such_flag"],
    "--eval_data missing.jsonl": ["missing.jsonl", "no such data file"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_command_lines(command, tmp_path, capsys):
    """In process through main(argv): exit status 2, one line with value and remedy, no output folder."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        train.main([*command.split(), "--out", str(out), "--device", "cpu", "--eval_rows", "8"])
    lines = capsys.readouterr().err.strip().splitlines()
    message = next(line for line in lines if line.startswith("train.py: error:"))
    assert stop.value.code == 2 and not out.exists()
    assert all(word in message for word in COMMANDS[command]), message


def test_cuda_without_a_gpu(tmp_path, capsys):
    """--device cuda says that there is none."""
    with pytest.raises(SystemExit):
        train.main(["--device", "cuda", "--out", str(tmp_path / "out")])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_model_that_moves_after_attach_is_refused():
    """A Trainer moves it to its GPU; "meta" stands in for that."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    hd_pissa_extra.attach(model, 2, shards=2)
    with pytest.raises(ValueError, match="0 runs on meta, its adapter is on cpu: attach when the model is"):
        model.to("meta")(torch.randn(1, 8, device="meta"))
