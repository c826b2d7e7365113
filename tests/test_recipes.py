"""Recipes against the paper's tables, typed here from its text; flags that win; what does not fit."""

import argparse
import json

import families
import pytest

import train
from training import recipes

TABLE_4 = {"method": "hd_pissa", "rank": 16, "shards": 8, "batch_size": 128, "schedule": "cosine",
           "warmup": 0.03, "alpha": None, "dropout": 0.0, "targets": "all-linear", "dtype": "float32",
           "epochs": 1.0, "lr": 2e-5, "aggregate": "mean", "init": "hd_pissa", "gradients": "local"}
TABLE_5 = TABLE_4 | {"rank": 32, "alpha": 64.0, "dropout": 0.05, "schedule": "linear", "warmup": 100.0,
                     "batch_size": 16, "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}
PAPER = {"paper-math": TABLE_4, "paper-code": TABLE_4, "paper-commonsense": TABLE_5,
         "paper-code-ablation": TABLE_4 | {"epochs": 3.0}, "paper-multitask": TABLE_4 | {"rank": 128}}


def parsed(line):
    return vars(train.parse(line.split()))


@pytest.mark.parametrize("name", PAPER)
def test_values_are_the_papers(name):
    """Every setting of the table; everything else stays at train.py's own default."""
    args = parsed(f"--recipe {name} --model someone/llama-7b")
    plain = parsed("--model someone/llama-7b --lr 1")
    assert {key: args[key] for key in PAPER[name]} == PAPER[name]
    rest = set(plain) - set(PAPER[name]) - {"recipe", "max_grad_norm"}
    assert {key: args[key] for key in rest} == {key: plain[key] for key in rest}
    assert args["max_grad_norm"] == 0.0
    assert set(PAPER) == set(recipes.RECIPES)


@pytest.mark.parametrize("line, wanted", [
    ("--rank 8 --recipe paper-math", {"rank": 8, "lr": 2e-5, "batch_size": 128}),
    ("--recipe paper-math --rank 8", {"rank": 8}),
    ("--recipe paper-math --lr 1e-4 --schedule linear", {"lr": 1e-4, "schedule": "linear", "warmup": 0.03}),
    ("--recipe paper-commonsense --epochs 3", {"epochs": 3.0, "alpha": 64.0}),
    ("--recipe paper-commonsense --targets q_proj", {"targets": ["q_proj"]}),
    ("--recipe paper-code --shards 4 --init top", {"shards": 4, "init": "top", "rank": 16}),
    ("--recipe paper-math --rank 2", {"rank": 2}),              # train.py's own default, given all the same
    ("--recipe paper-math --aggregate sum", {"lr": 2e-5 / 8}),
    ("--recipe paper-math --aggregate sum --shards 4", {"lr": 2e-5 / 4}),
    ("--recipe paper-math --aggregate sum --lr 2e-5", {"lr": 2e-5}),
])  # fmt: skip
def test_flags_win(line, wanted):
    args = parsed(line + " --model someone/llama-7b")
    assert {key: args[key] for key in wanted} == wanted


@pytest.mark.parametrize("family, lr", [("llama", 2e-5), ("mistral", 5e-6), ("qwen2", 2e-5)])
def test_lr_by_the_model(family, lr, tmp_path, capsys):
    """By the folder's config.json whatever the folder is called, by the name for a hub id."""
    (tmp_path / "mistral-like").mkdir()
    (tmp_path / "mistral-like" / "config.json").write_text(json.dumps({"model_type": family}))
    assert parsed(f"--recipe paper-math --model {tmp_path / 'mistral-like'}")["lr"] == lr
    assert parsed("--recipe paper-math --model mistralai/Mistral-7B-v0.1")["lr"] == 5e-6
    args = train.parse(["--recipe", "paper-math", "--model", str(tmp_path / "mistral-like")])
    recipes.report(args)
    assert ("not for this --model" in capsys.readouterr().out) == (family == "qwen2")


def test_without_a_recipe_nothing_changes():
    args = parsed("")
    assert args["recipe"] is None and args["rank"] == 2 and args["lr"] == train.LR["hd_pissa"]
    recipes.begin(argparse.Namespace(recipe=None), None)        # says nothing, loads nothing


def test_what_it_says(capsys):
    """All resolved values; which are the command line's; what lr belongs to; the note on table 5's epochs."""
    args = train.parse("--recipe paper-commonsense --model a/llama --rank 16 --aggregate sum".split())
    recipes.report(args)
    lines = capsys.readouterr().out.splitlines()
    assert "table 5" in lines[0] and "Section 5.2 says three: --epochs 3" in lines[0]
    text = "\n".join(lines)
    for words in ("--rank 16 (yours; the recipe: 32)", "--alpha 64.0\n", "--warmup 100.0\n", "--shards 8\n",
                  "--targets q_proj,k_proj,v_proj,up_proj,down_proj\n", "--lr 2.5e-06\n", "scales by 4",
                  "--lr 2.5e-06 belongs to --aggregate sum", "K = 8 times as far",
                  "data/prepare.py commonsense --model a/llama"):  # fmt: skip
        assert words in text, text
    assert text.count("yours") == 2 and "--aggregate sum (yours; the recipe: mean)" in text


def test_the_best_that_was_measured(tmp_path, capsys):
    """Its flags, its rate for the embedded model alone, one reason a line, and a flag beside it wins."""
    best = parsed("--recipe best")
    plain = parsed("--gradients global --aggregate sum --init random --lr 8e-3")
    assert {k for k in best if best[k] != plain[k]} == {"recipe"}
    recipes.report(train.parse(["--recipe", "best", "--init", "hd_pissa"]))
    lines = capsys.readouterr().out.splitlines()
    assert "not the paper's" in lines[0] and "--init hd_pissa (yours; the recipe: random)" in lines[3]
    assert "--gradients global: every shard learns from the whole batch" in lines[1]
    line = refused_by(["--recipe", "best", "--model", str(tmp_path)], capsys)
    assert "--lr: give the peak learning rate for this --model" in line


def refused_by(argv, capsys):
    with pytest.raises(SystemExit):
        train.parse(argv)
    return capsys.readouterr().err


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("train.py: error: --recipe"), line
    return line


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    """With the largest r of each kind of layer: min(m, n) // K of shapes worked out by hand."""
    out = ["--device", "cpu", "--out", str(tmp_path / "out")]
    line = refused(["--recipe", "paper-multitask", *out], capsys)           # every weight has a side of 128
    assert "8 shards of rank 128 need 1024 components" in line
    assert "attn_proj 16, c_attn 16, c_fc 16, mlp_proj 16. Use --rank 16" in line
    pytest.importorskip("transformers")
    families.folder(tmp_path / "llama", "llama")        # width 32, MLP 48, keys and values of width 16
    command = ["--recipe", "paper-math", "--model", str(tmp_path / "llama"), *out]
    line = refused([*command, "--data", str(tmp_path / "llama" / "rows.jsonl")], capsys)
    assert "k_proj 2, v_proj 2, down_proj 4, gate_proj 4, o_proj 4, q_proj 4, up_proj 4" in line
    line = refused([*command, "--targets", "q_proj,up_proj", "--shards", "4"], capsys)
    assert "4 shards of rank 16 need 64 components" in line and "is q_proj 8, up_proj 8. Use --rank 8" in line
    assert not (tmp_path / "out").exists()


def test_what_fits_is_not_refused():
    """r as large as said goes through, one more does not; --init top needs r components, a baseline none."""
    model, *_ = train.load_model(str(train.DATA / "base.pt"), 0)
    layers = train.hd_pissa.find_layers(model, "all-linear")[0]
    for more, most in (({}, 16), ({"shards": 4}, 32), ({"init": "top"}, 128)):
        args = dict(recipe="paper-math", method="hd_pissa", shards=8, init="hd_pissa") | more
        recipes.check_fit(argparse.Namespace(rank=most, **args), layers)
        with pytest.raises(ValueError, match=f"Use --rank {most}"):
            recipes.check_fit(argparse.Namespace(rank=most + 1, **args), layers)
    recipes.check_fit(argparse.Namespace(**args | {"method": "lora"}, rank=999), layers)


@pytest.mark.parametrize("name, more", [("paper-math", []), ("paper-commonsense", ["--rank", "1"])])
def test_recipes_run(name, more, tmp_path, capsys):
    """End to end: the settings in config.json, the peak learning rate in the log, and what is trained."""
    pytest.importorskip("transformers")
    families.folder(tmp_path / "llama", "llama")
    rows = families.rows(tmp_path / "many.jsonl", 150)
    out, rank = tmp_path / "out", more or ["--rank", "2"]
    train.main(["--recipe", name, "--model", str(tmp_path / "llama"), "--data", str(rows), *rank, "--warmup",
                "0", "--max_steps", "2", "--block_size", "64", "--eval_rows", "4", "--threads", "1",
                "--device", "cpu", "--out", str(out)])  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    wanted = PAPER[name] | {"rank": int(rank[1]), "warmup": 0.0, "recipe": name}
    assert {key: config[key] for key in wanted} == wanted
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[0]["lr"] == pytest.approx(2e-5, rel=0.5) and len(log) == 2
    text = capsys.readouterr().out
    assert ("o_proj" in text.split("trained: ")[1].split(";")[0]) == (name == "paper-math")
