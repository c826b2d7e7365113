"""Generated answers: found and scored, equal to decoding by hand, the same on any number of processes.

Oracles: greedy decoding one row at a time, without cache and padding; the answers that the data sets come
with; lm-evaluation-harness on the saved folder.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from spawned import spawn

import hd_pissa
import hd_pissa_extra
import train
from data.rows import read_rows
from data.tokenizer import HFTokenizer
from training import answers, evaluate

WORDS = ["<unk>", "<eos>", *(str(i) for i in range(40)), *"answer1 answer2 answer3 the is correct".split()]


def talking(model, large: float, seed: int):
    """Random weights, so large that much is said, and the end twice as loud as other words."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=large) if p.dim() == 2 else None
        head = model.lm_head.weight
        head[1] *= 2
    return model.eval()


def llama(seed=3, **config):
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=len(WORDS), max_position_embeddings=64)  # fmt: skip
    return talking(LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=1, **config)), 0.5, seed)


def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=len(WORDS), n_positions=64,
                        bos_token_id=1, eos_token_id=1)
    return talking(GPT2LMHeadModel(config), 0.5, seed)


def small_gpt(seed=3):
    model = train.GPT(len(WORDS), block_size=64, layers=2, width=32)
    model.lm_head = torch.nn.Linear(32, len(WORDS), bias=False)     # a tied one repeats the last word
    return talking(model, 0.5, seed)


MODELS = {"llama": llama, "gpt2": gpt2, "small_gpt": small_gpt}


def hf_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    hf.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return hf


class Words:
    """The interface of data/tokenizer.py over WORDS, for models of either kind."""

    def __init__(self):
        self.hf, self.eot, self.encoding, self.ends = hf_tokenizer(), 1, self, [1]

    def prompt(self, text):
        return self.hf(text)["input_ids"]

    def response(self, text):
        return self.hf(text)["input_ids"] + [1]

    def decode(self, tokens):
        return " ".join(WORDS[t] for t in tokens if t > 1)      # as skip_special_tokens does


def by_hand(model, prompt: list[int], ends, new_tokens: int) -> list[int]:
    """Greedy continuation of one prompt: a whole forward for every token."""
    said = []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = hd_pissa.logits_of(model, torch.tensor([prompt + said]))[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] in ends:
            break
    return said


def prompts_of(n: int, seed=0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 42, (1 + 3 * (j % 4) + j,), generator=g).tolist() for j in range(n)]


# ---- Answers in texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, number", [
    ("#### 70,000", "70000"), ("so 20-3=17 of 5 #### 17\n", "17"), ("#### 4 #### -5", "-5"), ("7%", "7"),
    ("20-3", "3"), ("it costs $1,234.50", "1234.50"), ("1,2,3", "3"), ("1,2345", "2345"), ("", None),
    ("x = -3.", "-3"), ("<<48/2=24>>24", "24"), ("half is .5", "0.5"), ("18.00", "18"), ("none", None),
])  # fmt: skip
def test_last_number(text, number):
    from decimal import Decimal
    assert answers.last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("text, answer, right", [
    ("the correct answer is option1", "option1", True), ("the correct answer is option12", "option1", False),
    ("Answer1 is wrong, so the correct answer is Answer2.", "answer2", True), ("answer2", "answer2", True),
    ("answer2 or answer1", "answer1", False), ("the answer is not given: true", "true", True),
    ("the correct answer is untrue", "true", False), ("the correct answer is false", "true", False),
    ("it is true that solution2 works", "solution2", True), ("", "ending1", False),
    ("#### 18", "18", True), ("18 apples in 2 bags", "18", False), ("1,018.0", "1018", True),
    (" quarry\n", "quarry", True), ("The quarry", "quarry", False), ("word for word", "quarry", True),
])  # fmt: skip
def test_is_right(text, answer, right):
    assert answers.is_right(text, {"instruction": "", "response": "word for word", "answer": answer}) is right


def test_answers_of_real_sets(real_dir):
    """Every response of the real sets gives the answer that the set has beside it; another row's rarely."""
    for name in ("gsm8k_train", "gsm8k_test", "commonsense_train_5k", "commonsense_test_boolq",
                 "commonsense_test_piqa", "commonsense_test_ARC-Easy"):  # fmt: skip
        rows = read_rows(str(real_dir / f"{name}.jsonl"))
        assert all(answers.is_right(row["response"], row) for row in rows), name
        others = [answers.is_right(a["response"], b) for a, b in zip(rows, rows[1:])]
        assert 0 < sum(others) < (0.1 if "gsm8k" in name else 0.6) * len(others)


# ---- Programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program, passed", [
    ("x = 1\nassert x == 1", True), ("assert 1 == 2", False), ("def f(:", False),
    ("raise SystemExit(0)", False), ("import os\nos._exit(0)", False), ("while True: pass", False),
    ("import mmap\nmmap.mmap(-1, 3 << 30)", False),
    ("import sys\nassert not sys.stdin.read()\nprint('x' * 10**6)", True),
    ("import os\nassert 'HD_PISSA_SECRET' not in os.environ and not os.listdir('.') == []", True),
    ("open('big', 'wb').write(b' ' * (2 << 20))", False), ("import sys\nsys.exit(73)", False),
    ("files = [open('/dev/null') for _ in range(100)]", False),
    ("import os\nfor i in range(3, 64):\n    try:\n        os.write(i, b'x' * 64)\n"
     "    except OSError:\n        pass\nos._exit(0)", False),
])  # fmt: skip
def test_passes(program, passed, tmp_path, monkeypatch):
    """Ended by itself, without an error, in time; nothing of the caller's environment or folder is there."""
    monkeypatch.setenv("HD_PISSA_SECRET", "1")
    monkeypatch.chdir(tmp_path)
    assert answers.passes(program, 1.0) is passed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [
    "import os\nfor i in range(3000):\n    os.mkdir('d')\n    os.chdir('d')",
    "import os, shutil\nd = os.getcwd()\nos.chdir('/')\nshutil.rmtree(d)\nos.symlink(KEPT, d)",
])  # fmt: skip
def test_what_a_program_makes_of_its_folder_ends_no_run(program, tmp_path, monkeypatch):
    """Too deep for Python to remove, or a link to a folder whose files stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("precious")
    assert answers.passes(program.replace("KEPT", repr(str(tmp_path / "kept"))), 30.0)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("isolated", [True, False])
def test_what_a_program_started_is_killed(isolated, tmp_path, monkeypatch):
    """Children, and one that has left session and parent; with namespaces of their own or without."""
    if not isolated:
        text = answers.RUNNER.read_text()
        assert text.count("system.unshare(") == 1
        monkeypatch.setattr(answers, "RUNNER", tmp_path / "run_program.py")
        answers.RUNNER.write_text(text.replace("system.unshare(", "("))
    mark = f"{time.time():.6f}"[-9:]
    program = (f"import os, subprocess\nsubprocess.Popen(['/bin/sleep', '6{mark}'])\n"
               f"if not os.fork():\n    os.setsid()\n    if not os.fork():\n"
               f"        os.execv('/bin/sleep', ['sleep', '6{mark}'])\n    os._exit(0)\n"
               "import time\ntime.sleep(0.3)")  # fmt: skip
    assert answers.passes(program, 20.0)

    def left():
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"6{mark}" in entry.read_text():
                    yield entry
    assert not list(left())


def test_no_network_where_the_system_can_forbid_it(tmp_path):
    """A port that listens here is out of reach, and the sentence about it says so."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        reached = answers.passes(program, 10.0)
    assert ("without network" in answers.isolation()) is not reached


def wrong(row):
    """Its response without what it does."""
    if "check(" in row["answer"]:
        return "    pass\n"
    name = re.search(r"def (\w+)\(", row["response"]).group(1)
    return f"def {name}(*args):\n    return object()\n"


@pytest.mark.parametrize("every", [40, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_programs_of_real_sets(name, every, real_dir):
    """The sets' own solutions pass their tests, bare and in a fence; programs that do nothing fail."""
    rows = read_rows(str(real_dir / f"{name}.jsonl"))[::every * (4 if name == "mbpp" else 1)]
    assert len(rows) >= 5
    for row in rows:
        assert answers.kind_of(row["answer"]) == "code"
        assert answers.is_right(row["response"], row), row
        assert not answers.is_right(wrong(row), row), row
    assert answers.is_right(f"Here it is:\n```python\n{row['response']}\n```\nDone.", row)


def test_generated_code_is_refused_without_the_flag(tmp_path, capsys, monkeypatch):
    """One line, before anything is generated, run or written."""
    monkeypatch.setattr(answers, "passes", lambda *_: pytest.fail("a program was run"))
    monkeypatch.setattr(evaluate, "generate", lambda *_: pytest.fail("a program was generated"))
    file = tmp_path / "mbpp.jsonl"
    row = {"instruction": "Add.", "response": "def f(a):\n    return a", "answer": "assert f(1) == 1"}
    file.write_text(json.dumps({"instruction": "a", "response": "b", "answer": "b"}) + "\n" + json.dumps(row))
    with pytest.raises(SystemExit) as e:
        train.main(["--eval", str(file), "--max_steps", "1", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1
    assert "mbpp.jsonl: row 2" in error and "--execute_generated_code" in error
    assert not (tmp_path / "out").exists()
    assert len(evaluate.read_sets(str(file), 500, True)["mbpp"]) == 2


# ---- Generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_generate_is_greedy_decoding(kind):
    """Batches of 1, 3 and 7 against decoding by hand, whatever the model's own generation settings say."""
    model, prompts, ends = MODELS[kind](), prompts_of(7), [1, 7]
    expected = [by_hand(model, p, ends, 15) for p in prompts]
    lengths = {len(e) for e in expected}
    assert len(lengths) > 2 and 15 in lengths, "the ends are tested too little"
    if kind != "small_gpt":
        model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=2, eos_token_id=[5])
    for size in (1, 3, 7):
        got = []
        for a in range(0, 7, size):
            with torch.no_grad():
                got += evaluate.generate(model, prompts[a:a + size], ends, 15, "cpu")
        assert got == expected, size
    if kind != "small_gpt":
        assert model.generation_config.repetition_penalty == 3.0


def test_keys_and_values_are_cached():
    """transformers models see the prompts once, then one new token a forward."""
    model, lengths = MODELS[next(kind for kind in MODELS if kind != "small_gpt")](), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    prompts = prompts_of(3)
    with torch.no_grad():
        evaluate.generate(model, prompts, [1], 6, "cpu")
    assert lengths[0] == max(map(len, prompts)) and len(lengths) > 2 and set(lengths[1:]) == {1}


def rows_of(model, n=7, new_tokens=20) -> list[dict]:
    """Rows whose answers are, for every second one, what the model says."""
    rows, words = [], Words()
    for j, prompt in enumerate(prompts_of(n, seed=1)):
        said = by_hand(model, prompt, [1], new_tokens)
        text = words.decode(said)
        rows.append({"instruction": words.decode(prompt), "response": "1", "answer": "x " * (j % 2) + text})
    return rows


def ask(model, rows, context=64, batch_size=2):
    return evaluate.ask(model, Words(), rows, "cpu", context, 20, batch_size)


@pytest.mark.parametrize("kind", MODELS)
def test_ask(kind):
    """Texts, right ones, ended ones, and rows that are too long to be asked, in the order of the rows."""
    model = MODELS[kind]()
    rows = [row | {"answer": row["answer"] or "empty"} for row in rows_of(model)]
    model.train()
    got = ask(model, rows, context=32)
    assert model.training
    for row, answer in zip(rows, got, strict=True):
        prompt = Words().prompt(row["instruction"])
        said = by_hand(model.eval(), prompt, [1], 20)
        if len(prompt) + 20 > 32:
            assert answer == {"text": None, "right": False, "ended": False}
        else:
            text = Words().decode(said)
            assert answer == {"text": text, "right": answers.is_right(text, row), "ended": said[-1] == 1}
    assert {a["right"] for a in got} == {a["ended"] for a in got} == {a["text"] is None for a in got}
    assert {a["right"] for a in got} == {True, False}


def ask_there():
    """On a process of two: answers with W whole, then sharded by FSDP2."""
    answers = []
    for kind in ("llama", "small_gpt"):
        model = MODELS[kind]()
        rows = rows_of(model, 5)
        answers.append(ask(model, rows))
        hd_pissa_extra.shard_over_processes(model, torch.device("cpu"))
        answers.append(ask(model, rows))
    return answers


def test_two_processes_say_what_one_says(tmp_path):
    """Five rows in three batches of unequal length, dealt to two processes, W whole and sharded."""
    expected = []
    for kind in ("llama", "small_gpt"):
        model = MODELS[kind]()
        expected += 2 * [ask(model, rows_of(model, 5))]
        assert {a["right"] for a in expected[-1]} == {a["ended"] for a in expected[-1]} == {True, False}
    for there in spawn(2, ask_there, tmp_path):
        assert there == expected


@pytest.mark.slow
def test_real_model_generates_as_by_hand(real_dir, smollm2):
    """SmolLM2-135M on GSM8K prompts of unequal length: cached and padded equals one row at a time."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = HFTokenizer(str(smollm2))
    rows = read_rows(str(real_dir / "gsm8k_test.jsonl"))[:3]
    prompts = [tokenizer.prompt(row["instruction"]) for row in rows]
    assert len({len(p) for p in prompts}) > 1
    ends = [tokenizer.hf.eos_token_id]
    with torch.no_grad():
        got = evaluate.generate(model, prompts, ends, 8, "cpu")
    assert got == [by_hand(model, p, ends, 8) for p in prompts]


# ---- The command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines, match", [
    (['{"instruction": "a", "response": "b"}'], "row 1 has no text in 'answer'"),
    (['{"instruction": "a", "response": "b", "answer": 3}'], "row 1 has no text in 'answer'"),
    ([], "holds no rows"),
])  # fmt: skip
def test_bad_sets(lines, match, tmp_path):
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=match):
        evaluate.read_sets(str(tmp_path / "set.jsonl"), 500, False)


def test_sets_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "set.jsonl").write_text('{"instruction": "a", "response": "b", "answer": "c"}\n')
    with pytest.raises(ValueError, match="two sets are called set"):
        evaluate.read_sets(f"{tmp_path}/a/set.jsonl,{tmp_path}/b/set.jsonl", 500, False)
    (tmp_path / "a" / "set.jsonl").rename(tmp_path / "held out.jsonl")
    with pytest.raises(ValueError, match="two sets are called held out"):
        evaluate.read_sets(f"{tmp_path}/held out.jsonl", 500, False)


def test_command_line(tmp_path, capsys):
    """Before, every 2 steps, after: the files hold what decoding by hand gives; W is as without them."""
    model, tokenizer, _ = train.load_model(str(train.DATA / "base.pt"), 0)
    rows = read_rows(str(train.DATA / "multi_domain.jsonl"))[:5]

    def said(model, row):
        tokens = by_hand(model, tokenizer.prompt(row["instruction"]), [tokenizer.eot], 12)
        return tokenizer.encoding.decode([t for t in tokens if t != tokenizer.eot])

    for j in (0, 3):
        rows[j] = rows[j] | {"answer": said(model, rows[j]).strip()}
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(json.dumps(row) + "\n" for row in rows))
    two.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    common = ["--threads", "1", "--device", "cpu", "--eval_rows", "8", "--max_steps", "4",
              "--batch_size", "8"]  # fmt: skip
    out, asking = tmp_path / "out", ["--eval", f"{one},{two}", "--eval_every", "2", "--eval_tokens", "12"]
    result = train.main([*common, *asking, "--out", str(out)])

    every = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    sets = ("held out", "one", "two")
    assert [(e["step"], e["set"]) for e in every] == [(s, name) for s in (0, 2, 4) for name in sets]
    assert result["eval"] == every == json.loads((out / "result.json").read_text())["eval"]
    lines = [e for e in every if e["set"] != "held out"]
    trained = train.GPT.from_state_dict(torch.load(out / "model.pt", weights_only=True)).eval()
    for step, there in ((0, model), (4, trained)):
        file = (out / "answers" / f"one.step_{step}.jsonl").read_text().splitlines()
        texts, line = [said(there, row) for row in rows], lines[2 * (step // 2)]
        assert [json.loads(answer)["text"] for answer in file] == texts
        right = [answers.is_right(text, row) for text, row in zip(texts, rows)]
        assert line["exact_match"] == pytest.approx(100 * sum(right) / 5) and line["rows"] == 5
        losses = []
        for row in rows:
            prompt, response = tokenizer.prompt(row["instruction"]), tokenizer.response(row["response"])
            with torch.no_grad():
                logp = there(torch.tensor([prompt + response])).log_softmax(-1)[0]
            losses += [-float(logp[len(prompt) + k - 1, token]) for k, token in enumerate(response)]
        assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    printed, bars = capsys.readouterr()
    assert all(re.search(rf"{desc}: +\d+%.*/1 ", bars) for desc in ("one: loss", "one", "two: loss", "two"))
    assert lines[0]["exact_match"] >= 40 and f"step 4, two: loss {lines[5]['loss']:.4f}" in printed

    train.main([*common, "--out", str(tmp_path / "plain")])
    plain = torch.load(tmp_path / "plain" / "model.pt", weights_only=True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in trained.state_dict().items())
    assert not (tmp_path / "plain" / "eval.jsonl").exists()

    # A run in the folder of an older one starts its files anew. One that goes on, here from step 1 because
    # step 2 was evaluated but not saved, ends with the lines of a whole run.
    def stopping(folder, step, *rest, save=train.checkpoint.save):
        if step == 2:
            raise ValueError("stopped here")
        save(folder, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.checkpoint, "save", stopping)
        with pytest.raises(SystemExit):
            train.main([*common, *asking, "--save_every", "1", "--resume", "never", "--out", str(out)])
    steps = [json.loads(line)["step"] for line in (out / "eval.jsonl").read_text().splitlines()]
    assert steps == [0, 0, 0, 2, 2, 2] and not (out / "result.json").exists()
    assert train.main([*common, *asking, "--out", str(out)])["eval"] == every


def folder_of(path: Path, model, template=True) -> list[str]:
    """A Hugging Face folder and rows for it; the flags of a short run on both."""
    model.save_pretrained(path)
    hf = hf_tokenizer()
    if not template:
        hf.chat_template = None
    hf.save_pretrained(path)
    rows = [{"instruction": f"{i % 7} {i % 11}", "response": f"{i % 7 + i % 11} {i % 3}"} for i in range(64)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(path), "--data", str(path / "rows.jsonl"), "--lr", "1e-2", "--batch_size", "8",
            "--rank", "2", "--shards", "4", "--threads", "1", "--device", "cpu",
            "--max_steps", "2"]  # fmt: skip


@pytest.mark.parametrize("make, dtype", [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"),
                                         ("tied", "float32")])  # fmt: skip
def test_saved_folder_is_the_trained_model(make, dtype, tmp_path, monkeypatch):
    """from_pretrained gives the in-memory model's logits bit for bit, and its tokenizer the same tokens."""
    transformers = pytest.importorskip("transformers")
    model = llama(tie_word_embeddings=True) if make == "tied" else MODELS[make]()
    flags, kept, save = folder_of(tmp_path / "base", model), [], train.save
    x = torch.randint(2, 42, (3, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        start = model(x).logits

    def keeping(out, model, *rest):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            kept.append((model.eval()(x).logits, type(model), state))
        return save(out, model, *rest)

    monkeypatch.setattr(train, "save", keeping)
    train.main([*flags, "--dtype", dtype, "--out", str(tmp_path / "out")])
    (logits, kind, state), = kept  # fmt: skip
    folder = tmp_path / "out" / "model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, logits)
    assert type(loaded) is kind is type(model) and (logits.float() - start).abs().max() > 1e-3
    assert loaded.state_dict().keys() == state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    assert hf("3 the answer1").input_ids == hf_tokenizer()("3 the answer1").input_ids
    assert hf.eos_token == "<eos>" and hf.chat_template == hf_tokenizer().chat_template
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))


# ---- lm-evaluation-harness ---------------------------------------------------------------------------------


def documented(kind: str) -> list[str]:
    """Code blocks of data/README.md's section on evaluation."""
    text = (train.DATA / "README.md").read_text().partition("## Evaluation")[2].partition("\n## ")[0]
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_harness_knows_the_documented_tasks():
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm_eval (requirements-extra.txt)")
    named = re.findall(r"--tasks (\S+)", "".join(documented("bash")))
    known = tasks.TaskManager().all_tasks
    names = {name for group in named for name in group.split(",")}
    assert len(names) >= 12 and names - {"gsm8k_local"} <= set(known)


@pytest.mark.slow
def test_the_harness_scores_the_saved_folder(tmp_path):
    """The documented command and task, offline, on what train.py saved: equal to scores taken by hand."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (requirements-extra.txt)")
    flags = folder_of(tmp_path / "base", llama(), template=False)
    train.main([*flags, "--out", str(tmp_path / "out")])
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = tmp_path / "out" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hf, g = AutoTokenizer.from_pretrained(folder), torch.Generator().manual_seed(3)
    choices = "answer1 answer2 answer3"
    rows, expected_choice, expected_number = [], [], []
    (generation,) = documented("yaml")
    start = re.search(r'doc_to_text: "(.*?)\{\{', generation).group(1).encode().decode("unicode_escape")
    end = re.search(r'doc_to_text: ".*?\}\}(.*?)"', generation).group(1).encode().decode("unicode_escape")
    for j in range(24):
        question = " ".join(str(i) for i in torch.randint(0, 40, (3 + j % 5,), generator=g).tolist())
        prompt = hf(start + question + end).input_ids
        scores = []
        for choice in choices.split():
            tokens = prompt + hf(" " + choice).input_ids
            with torch.no_grad():
                logp = model(torch.tensor([tokens])).logits.log_softmax(-1)[0]
            scores.append(sum(float(logp[t - 1, tokens[t]]) for t in range(len(prompt), len(tokens))))
        text = hf.decode([t for t in by_hand(model, prompt, [1], 16) if t != 1])
        number = answers.last_number(text)
        label = j % 3
        answer = str(number if j % 2 and number is not None else 99)
        rows.append({"instruction": question, "response": "x", "answer": answer, "label": label})
        expected_choice.append(scores.index(max(scores)) == label)
        expected_number.append(number is not None and str(number) == answer)
    assert 0 < sum(expected_choice) < 24 and 0 < sum(expected_number) < 24
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "gsm8k_local.yaml").write_text(generation.replace("max_gen_toks: 256", "max_gen_toks: 16"))
    text = re.search(r"^doc_to_text: .*$", generation, re.MULTILINE).group()
    (tasks / "choice_local.yaml").write_text(
        "task: choice_local\ndataset_path: json\ndataset_kwargs:\n  data_files: gsm8k_test.jsonl\n"
        f"test_split: train\noutput_type: multiple_choice\n{text}\ntarget_delimiter: ' '\n"
        f"doc_to_choice: {json.dumps(choices.split())}\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n")
    done = subprocess.run(
        ["lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32",
         "--device", "cpu", "--include_path", str(tasks), "--tasks", "gsm8k_local,choice_local",
         "--batch_size", "8", "--output_path", str(tmp_path / "scores")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
             "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (file,) = (tmp_path / "scores").rglob("results*.json")
    got = json.loads(file.read_text())["results"]
    assert got["choice_local"]["acc,none"] == pytest.approx(sum(expected_choice) / 24)
    assert got["gsm8k_local"]["exact_match,last-number"] == pytest.approx(sum(expected_number) / 24)
