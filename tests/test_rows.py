"""Conversations to tokens and the spans that the loss covers; splits, batches, lists of sources, what is
said.

Oracles: the template's own text and its own marks ({% generation %}); the split, tokens and batches of the
embedded data as they were before conversations were known (frozen digests).
"""

import hashlib
import itertools
import json
import os
import signal
import threading

import families
import pytest
import torch
from conftest import ROOT

import hd_pissa
from data import formats, rows
from data import tokenizer as tokenizers_
from data.tokenizer import GPTTokenizer, HFTokenizer

EMBEDDED = str(ROOT / "data" / "multi_domain.jsonl")
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|return|>",
    "<|start|>",
    "<|message|>",
    "[INST]",
    "[/INST]",
]


def byte_tokenizer(template=None, post=None):
    import tokenizers as T
    from transformers import PreTrainedTokenizerFast

    letters = sorted(T.pre_tokenizers.ByteLevel.alphabet())
    backend = T.Tokenizer(T.models.BPE({t: i for i, t in enumerate([*SPECIAL, *letters])}, []))
    backend.pre_tokenizer = T.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = T.decoders.ByteLevel()
    if post:
        backend.post_processor = T.processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    hf.chat_template = template
    return hf


LOOP, END = "{% for m in messages %}", "{% endfor %}"
ASK = "{% if add_generation_prompt %}"
# Templates by the families that have them, and by what a turn of the assistant ends.
TEMPLATES = {
    "chatml": (
        LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        + END
        + ASK
        + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% "
        "endif %}"
        + LOOP
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim "
        "}}<end_of_turn>\n" + END + ASK + "<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi": (
        LOOP
        + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
        + END
        + ASK
        + "<|assistant|>\n{% else %}</s>{% endif %}",
        "<|end|>",
    ),
    "mistral": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}" + END,
        "</s>",
    ),
    "gpt-oss": (
        LOOP + "<|start|>{{ m.role }}<|message|>{{ m.content }}{% if loop.last and m.role == "
        "'assistant' %}"
        "<|return|>{% else %}<|end|>{% endif %}" + END + ASK + "<|start|>assistant{% endif %}",
        "<|return|>",
    ),
    "no end": (LOOP + "{{ m.role }}: {{ m.content }}\n" + END + ASK + "assistant: {% endif %}", "</s>"),
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And Größe?"},
    {"role": "assistant", "content": "5\nor 6"},
]


def said(tokenizer, tokens, spans):
    return [tokenizer.decode(tokens[a:b]) for a, b in spans]


# ---- Chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_conversation_is_what_the_template_writes(family):
    """Tokens are those of the template's text as a whole; the loss has every answer up to its end of turn."""
    template, end = TEMPLATES[family]
    hf = byte_tokenizer(template)
    tokenizer = HFTokenizer(family, hf)
    for chat in (CHAT, CHAT[1:], CHAT[1:3]):
        tokens, spans = tokenizer.conversation(chat)
        written = chat
        if family in ("gemma",) and chat is CHAT:
            written = [{"role": "user", "content": "Be brief.\n\nHi, 2+2?"}, *CHAT[2:]]
        if family == "mistral":
            written = (
                chat
                if chat is not CHAT
                else [{"role": "user", "content": "Be brief.\n\nHi, 2+2?"}, *CHAT[2:]]
            )
        text = hf.apply_chat_template(written, tokenize=False)
        whole = hf(text, add_special_tokens=False)["input_ids"]
        assert tokens == whole + [hf.eos_token_id] * (family == "no end"), hf.decode(tokens)
        answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
        for i, (answer, got) in enumerate(zip(answers, said(tokenizer, tokens, spans), strict=True)):
            last = i == len(answers) - 1
            if family == "gpt-oss":
                assert got == f"<|message|>{answer}" + ("<|return|>" if last else "<|end|>")
            elif family == "no end":
                assert got == f"{answer}\n" + ("</s>" if last else "")
            else:
                assert got.strip() == f"{answer}{end}" and got.endswith(end)
    assert "Be brief." in tokenizer.decode(tokenizer.conversation(CHAT)[0])
    # what evaluation asks, and what it expects, are the two halves of that
    ids = {hf.convert_tokens_to_ids(end), hf.eos_token_id}
    assert ids <= set(tokenizer.ends)
    tokens, spans = tokenizer.conversation(CHAT[1:3])
    assert tokenizer.prompt("Hi, 2+2?") + tokenizer.response("4") == tokens[: spans[0][1]]
    assert (
        tokenizer.prompt(CHAT[:4]) == tokenizer.conversation(CHAT)[0][: tokenizer.conversation(CHAT)[1][1][0]]
    )


@pytest.mark.parametrize("family", ["chatml", "gemma", "phi"])
def test_marked_answers_are_the_same_spans(family):
    """The same template with {% generation %} around its answers, as transformers reads them, and without."""
    plain, end = TEMPLATES[family]
    body = "{{ m.content | trim }}" if family == "gemma" else "{{ m.content }}"
    plain = plain.replace(end + "\n", end + "{{ '\n' }}")  # a line's end behind a tag is taken off
    marked = plain.replace(
        body + end,
        "{% if m.role == 'assistant' %}{% generation %}"
        + body
        + end
        + "{% endgeneration %}{% else %}"
        + body
        + end
        + "{% endif %}",
    )
    a, b = HFTokenizer("a", byte_tokenizer(plain)), HFTokenizer("b", byte_tokenizer(marked))
    assert b.marks and not a.marks
    for chat in ([CHAT] if family == "chatml" else []) + [CHAT[1:], CHAT[1:3]]:
        made = b.hf.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0] * len(made["input_ids"])
        tokens, spans = a.conversation(chat)
        for start, stop in spans:
            mask[start:stop] = [1] * (stop - start)
        assert (tokens, mask) == (list(made["input_ids"]), list(made["assistant_masks"])) and sum(mask)
        assert b.conversation(chat) == (tokens, spans)


def test_a_system_prompt_that_wanders():
    """Templates that put the system prompt into the last question (Mistral's): it stays in the first one, so
    that every answer is behind what it was an answer to."""
    template = (
        "{% set first = messages[0].role == 'system' %}{% set rest = messages[1:] if first else messages %}"
        "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] {% if first and (loop.last or "
        "(loop.index0 == rest | length - 2)) %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
        "{{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = HFTokenizer("x", byte_tokenizer(template))
    tokens, spans = tokenizer.conversation(CHAT)
    assert said(tokenizer, tokens, spans) == [" 4</s>", " 5\nor 6</s>"]
    assert tokenizer.decode(tokens).startswith("<s>[INST] Be brief.\n\nHi, 2+2? [/INST] 4</s>[INST] And")


def test_marks_win_over_what_a_template_asks_with():
    """Answers that begin otherwise than the template asks for one (a thought that is opened) are found by
    the marks; the loss covers what they cover, here without the end of turn."""
    template = (LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
                "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>" + END
                + ASK + "<|im_start|>assistant\n<think>\n{% endif %}")  # fmt: skip
    tokenizer = HFTokenizer("x", byte_tokenizer(template))
    assert said(tokenizer, *tokenizer.conversation(CHAT)) == ["4", "5\nor 6"]
    with pytest.raises(ValueError, match="mark the answers in the template"):
        HFTokenizer(
            "x", byte_tokenizer(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
        )


def test_a_real_template(smollm2):
    """SmolLM2's tokenizer with the template of its instruction models: text, ends of turn, system."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(smollm2)
    hf.chat_template = TEMPLATES["chatml"][0]
    tokenizer = HFTokenizer("smollm2", hf)
    tokens, spans = tokenizer.conversation(CHAT)
    assert tokens == hf(hf.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    assert said(tokenizer, tokens, spans) == ["4<|im_end|>", "5\nor 6<|im_end|>"]


def test_thoughts_that_a_template_takes_out():
    """Templates of reasoning models leave the thoughts of earlier turns out: spans follow what is written."""
    template = (
        LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        + END
        + ASK
        + "<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = HFTokenizer("x", byte_tokenizer(template))
    chat = [
        turn | {"content": "<think>hm</think>" + turn["content"]} if turn["role"] == "assistant" else turn
        for turn in CHAT
    ]
    assert said(tokenizer, *tokenizer.conversation(chat)) == [
        "4<|im_end|>",
        "<think>hm</think>5\nor 6<|im_end|>",
    ]


def test_a_token_over_the_border_is_cut_there():
    """Where question and answer would share a token, both are tokenized apart, as generation sees them."""
    import tokenizers as T
    from transformers import PreTrainedTokenizerFast

    letters = sorted(T.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["</s>", *letters, ":Y"])}
    backend = T.Tokenizer(T.models.BPE(vocabulary, [(":", "Y")]))
    backend.pre_tokenizer = T.pre_tokenizers.Split("", "isolated")
    backend.decoder = T.decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    backend.pre_tokenizer = None
    hf._tokenizer.pre_tokenizer = T.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.chat_template = (
        LOOP + "{{ m.content }}{% if m.role == 'user' %}:{% else %}{{ eos_token }}{% endif %}" + END
    )
    tokenizer = HFTokenizer("x", hf)
    tokens, spans = tokenizer.conversation(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes"}]
    )
    assert said(tokenizer, tokens, spans) == ["Yes</s>"] and tokenizer.decode(tokens) == "q:Yes</s>"


BAD_TEMPLATES = {
    "raises": ("{{ raise_exception('needs a system turn') }}", "needs a system turn"),
    "undefined": ("{{ nothing.at_all }}", "undefined"),
    "syntax": ("{% for %}", "Expected an expression"),
    "nothing": ("{% if false %}x{% endif %}", "does not write the question"),
    "no answer": (
        LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}" + END,
        "does not write the question",
    ),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "no end within",
    ),
    "huge": (LOOP + "{{ m.content * 99999 }}" + END, "it writes 1099989 characters"),
    "another header": (
        LOOP + "{{ m.role }}>{{ m.content }}" + END + ASK + "think{% endif %}",
        "{% generation %}",
    ),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_templates_of_no_use_are_refused(case, monkeypatch):
    monkeypatch.setattr(tokenizers_, "SECONDS", 0.5)
    template, words = BAD_TEMPLATES[case]
    with pytest.raises(ValueError) as error:
        HFTokenizer("DIR", byte_tokenizer(template))
    text = str(error.value)
    assert (
        words in text
        and text.startswith("DIR: its chat template fails")
        and "remove it" in text
        and "\n" not in text
    )


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_writes_the_date_writes_one_day(marked):
    """A run that goes on after midnight has the same tokens; what the model saves keeps the clock."""
    dated = ("\n{{ strftime_now('%d %b %Y %H:%M:%S.') }}{% macro day() %}{{ strftime_now('%B %-d') }}"
             "{% endmacro %}{{ day() if strftime_now is defined }}")  # fmt: skip
    answer = "{{ m.content }}</s>"
    template = dated + (
        LOOP + "{% if m.role == 'user' %}{{ m.content }}:{% else %}"
        + ("{% generation %}" + answer + "{% endgeneration %}" if marked else answer) + "{% endif %}" + END
    )  # fmt: skip
    hf = byte_tokenizer(template)
    tokenizer = HFTokenizer("x", hf)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    tokens, spans = tokenizer.conversation(chat)
    assert tokenizer.decode(tokens) == "\n26 Jul 2024 00:00:00.July 26q:r</s>"
    assert said(tokenizer, tokens, spans) == ["r</s>"] and tokenizer.prompt("q") == tokens[: spans[0][0]]
    assert hf.chat_template == template


def test_a_conversation_that_the_template_refuses_is_dropped():
    """Turns that must alternate: that row is dropped with the template's reason, the others stay."""
    template = TEMPLATES["chatml"][0].replace(
        LOOP,
        LOOP + "{% if loop.index0 and m.role == "
        "messages[loop.index0 - 1]"
        ".role %}{{ raise_exception('must alternate') }}{% endif %}",
    )
    tokenizer, report = HFTokenizer("x", byte_tokenizer(template)), {}
    some = [{"messages": CHAT[1:3]}, {"messages": [CHAT[1], CHAT[1], CHAT[2]]}]
    assert len(rows.encode(some, tokenizer, 200, "train", report=report)) == 1
    assert report["train"]["dropped"] == {"refused by the chat template (must alternate)": [1, ""]}


# Ends without a word of LONG; with it, never, or with far too much.
LATE = TEMPLATES["chatml"][0].replace(LOOP, LOOP + "{% if 'LONG' in m.content %}{% for a in range(99999) %}"
                                      "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}")
HUGE = TEMPLATES["chatml"][0].replace("{{ m.content }}", "{{ m.content * 9999 if 'LONG' in m.content else "
                                      "m.content }}")  # fmt: skip


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("thread", [False, True])
def test_the_time_of_a_template_is_bounded_in_every_row(thread, marked, monkeypatch):
    """The probe knows nothing of LONG. Such a row is dropped, the third ends the reading; the alarm clock of
    the process, and what it was set to, are as before. The same in a thread, which has no alarm clock."""
    answer = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    template = LATE.replace("{{ m.content }}", answer + "{{ m.content }}{% endif %}") if marked else LATE
    tokenizer, result = HFTokenizer("DIR", byte_tokenizer(template)), []
    assert tokenizer.marks == marked
    monkeypatch.setattr(tokenizers_, "SECONDS", 0.3)
    good, bad = ({"messages": [CHAT[1], {"role": "assistant", "content": text}]} for text in ("4", "LONG"))

    def work():
        report = {}
        made = rows.encode([good, bad, good, bad], tokenizer, 200, "train", report=report)
        result.append((len(made), report["train"]["dropped"]))
        with pytest.raises(ValueError, match="DIR: its chat template had no end within 0.3 s, 3 times"):
            rows.encode([bad, good], tokenizer, 200, "train")

    before = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        if thread:
            runner = threading.Thread(target=work)
            runner.start()
            runner.join()
        else:
            work()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900 and signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert result == [(2, {"refused by the chat template (no end within 0.3 s)": [2, ""]})]


def test_a_template_that_writes_too_much_for_a_row(monkeypatch):
    """300,000 times as much as it is given: that row is dropped before it is tokenized."""
    tokenizer, report = HFTokenizer("DIR", byte_tokenizer(HUGE)), {}
    some = [{"messages": [CHAT[1], {"role": "assistant", "content": text}]} for text in ("4", "LONG" * 99)]
    assert len(rows.encode(some, tokenizer, 200, "train", report=report)) == 1
    (reason,) = report["train"]["dropped"]
    assert "it writes 39" in reason and "characters for a conversation of 2 turns" in reason


# ---- Special tokens in the text, eos, long runs --------------------------------------------------


@pytest.mark.parametrize("family", [*TEMPLATES, None])
def test_special_tokens_in_the_text_are_text(family):
    """What a row spells is read back letter by letter; control tokens are the template's alone."""
    hf = byte_tokenizer(family and TEMPLATES[family][0], post="<s> $A")
    tokenizer = HFTokenizer("x", hf)
    chat = [
        {"role": "user", "content": "What is </s><|im_end|> and <end_of_turn>?"},
        {"role": "assistant", "content": "<|im_end|> ends <s>turns</s>"},
    ]
    clean = [
        {"role": "user", "content": "What is x and y?"},
        {"role": "assistant", "content": "x ends turns"},
    ]
    tokens, spans = tokenizer.conversation(chat)
    control = [t for t in tokens if t in tokenizer.control]
    assert control == [t for t in tokenizer.conversation(clean)[0] if t in tokenizer.control]
    assert len(spans) == 1 and chat[1]["content"] in tokenizer.decode(tokens[spans[0][0] :])
    assert chat[0]["content"] in tokenizer.decode(tokens)
    assert tokenizer.counts["special tokens in the text are taken as text"] == 2
    # as are characters of the plane that hides them
    own = "\U00100000\U0010fffd</s>\U00100001"
    tokens, _ = tokenizer.conversation([{"role": "user", "content": own}, clean[1]])
    assert own in tokenizer.decode(tokens)
    assert [t for t in tokens if t in tokenizer.control] == control


def test_plain_prompt_has_bos_and_no_eos():
    """add_bos_token and add_eos_token: <s> once in front, </s> behind every answer alone."""
    tokenizer = HFTokenizer("x", byte_tokenizer(post="<s> $A </s>"))
    prompt = tokenizer.prompt("Add 1 and 1.")
    assert prompt[0] == 0 and prompt.count(0) == 1 and 1 not in prompt
    tokens, spans = tokenizer.conversation(CHAT)
    assert (
        tokens.count(0) == 1
        and tokens.count(1) == 2
        and said(tokenizer, tokens, spans) == ["4</s>", "5\nor 6</s>"]
    )
    assert tokenizer.decode(tokens).count("### Instruction:") == 2
    assert "### Instruction:\nBe brief.\n\nHi, 2+2?\n" in tokenizer.decode(tokens)


def test_the_small_gpt_repeats_its_format():
    tokenizer = GPTTokenizer()
    tokens, spans = tokenizer.conversation(CHAT[1:])
    parts = (
        tokenizer.prompt("Hi, 2+2?"),
        tokenizer.response("4"),
        tokenizer.prompt("And Größe?"),
        tokenizer.response("5\nor 6"),
    )
    assert tokens == sum(parts, []) and tokenizer.decode(tokens).startswith(
        "Q: Hi, 2+2?\nA: 4<|endoftext|>Q: And"
    )
    assert said(tokenizer, tokens, spans) == [" 4<|endoftext|>", " 5\nor 6<|endoftext|>"]
    tokens, spans = tokenizer.conversation([{"role": "text", "content": "Once <|endoftext|>."}])
    assert spans == [(1, len(tokens))] and tokens.count(tokenizer.eot) == 1


def test_long_runs_are_handed_over_in_pieces():
    """A million blanks or letters: no panic, the text comes back, and ordinary text has the tokens it had."""
    tokenizer = GPTTokenizer()
    for text in (
        " " * 1_000_000 + "x",
        "\n" * 600_000,
        "a" * 300_000,
        " " * 50_001,
        "b" + " " * 50_000 + "c",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in (open(EMBEDDED).read()[:50_000], " " * 49_999 + "x"):
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


# ---- Rows of the loop: cut, last answer, several -------------------------------------------------


def test_cut_and_the_loss_of_the_last_answer():
    tokens = list(range(20))
    assert rows.trained(tokens, [(3, 20)], 100) == (tokens, 3)
    assert rows.trained(tokens, [(3, 20)], 10) == (tokens[:10], 3)
    assert rows.trained(tokens, [(3, 20)], 3) is None
    assert rows.trained(tokens, [(3, 6), (10, 15)], 100) == (tokens[:15], [(3, 6), (10, 15)])
    assert rows.trained(tokens, [(3, 6), (10, 15)], 12) == (tokens[:12], [(3, 6), (10, 12)])
    assert rows.trained(tokens, [(3, 6), (10, 15)], 10) == (tokens[:10], 3)
    assert rows.trained(tokens, [(3, 6), (10, 15)], 100, "last") == (tokens[:15], 10)
    assert rows.trained(tokens, [(3, 6), (10, 15)], 9, "last") is None
    assert rows.trained(tokens, [(0, 20)], 100) == (tokens, 1)  # nothing predicts the first token


@pytest.mark.parametrize("loss", ["all", "last"])
def test_conversations_through_every_kind_of_source(loss, tmp_path):
    """A file, a prepared set and a list of both give the same rows: tokens, spans, domains."""
    from data import prepare

    some = [
        {
            "messages": [*CHAT[: 1 + 2 * (1 + i % 2)][:-1], {"role": "assistant", "content": f"{i}!"}],
            "domain": "ab"[i % 2],
        }
        for i in range(40)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    prepare.main(["rows", "--from", str(path), "--out", str(tmp_path / "set")])
    tokenizer = GPTTokenizer()
    wanted = {
        repr((*rows.trained(*tokenizer.conversation(row["messages"]), 60, loss), row["domain"]))
        for row in some
    }
    for data in (str(path), str(tmp_path / "set"), f"{path},{tmp_path / 'set'}"):
        report = {}
        train, held, _ = rows.load(data, None, 500, tokenizer, 60, loss=loss, report=report)
        assert {repr(row) for row in [*train, *held]} == wanted
        assert any(isinstance(row[1], list) for row in train) == (loss == "all")
    hashes = {
        rows.load(str(tmp_path / "set"), None, 9, tokenizer, 60, loss=kind)[2] for kind in ("all", "last")
    }
    assert len(hashes) == 2
    # cut where the last answer begins: that row is left to "all" and lost to "last"
    block = max(
        b[-1][0]
        for _, b in (tokenizer.conversation(row["messages"]) for row in some if len(row["messages"]) > 3)
    )
    left = [
        rows.open_rows(data, tokenizer, block, "train", loss=loss)
        for data in (str(tmp_path / "set"), str(path))
    ]
    assert (
        [len(x) for x in left] == [40, 40] if loss == "all" else [len(x) < 40 for x in left] == [True, True]
    )


# ---- The embedded data: as ever ------------------------------------------------------------------


@pytest.mark.parametrize("held, block, wanted", [
    (500, 128, (7600, 400, "669cfb49dbf3b3ec86d3b91986d4b257", "675c829e0c9fb076d1c6b93fc1296ab3",
                "02324e4f58c08f4f776754eea04ab6c0")),
    (50, 40, (7395, 48, "ad853495401613e093d07ecbe3d22dbc", "8fd1c6a831c407b36247e469b2f2ac7b",
              "06f1fa538dcc5f82a53164ebb185dcb7")),
])  # fmt: skip
def test_the_embedded_data_is_split_and_ordered_as_ever(held, block, wanted):
    """Digests taken before formats and conversations were known: split, tokens, hash of a run, batches."""
    train, out, digest = rows.load(EMBEDDED, None, held, GPTTokenizer(), block)

    def batches(seed, n, start=0):
        some = list(itertools.islice(rows.step_batches(train, 64, seed, start), n))
        return hashlib.blake2b(repr(some).encode(), digest_size=16).hexdigest()

    assert (len(train), len(out), digest, batches(3, 130), batches(0, 30, 100)) == wanted
    assert all(isinstance(row[1], int) for row in train)


def test_seeds_are_those_of_the_loop():
    assert [rows.seed_of("epoch", s, e) for s, e in ((0, 0), (3, 7))] == [
        hd_pissa.seed_of("epoch", s, e) for s, e in ((0, 0), (3, 7))]  # fmt: skip


# ---- Splits --------------------------------------------------------------------------------------


def variants(i):
    """One text in several dresses: ids, blanks, another format's field names, a system prompt, accents as
    one character or two, and a question behind the last answer, where training stops."""
    q, a = f"What is {i}, é?", f"It is {i}."
    chat = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    return [
        {"instruction": q, "response": a, "id": i},
        {"instruction": f"  {q}\n", "response": a.replace(" ", "  ")},
        {"messages": chat},
        {"instruction": "What is", "input": f"{i}, é?", "output": a},
        {"system": "Be kind.", "instruction": q, "response": a},
        {"instruction": q.replace("é", "e\u0301"), "response": a},
        {"messages": [*chat, {"role": "user", "content": f"Thanks {i % 7}."}]},
    ]


def test_equal_texts_are_on_one_side():
    some = [row for i in range(300) for row in variants(i)]
    train, held = rows.hold_out(some)
    keys = [{formats.text_key(rows.turns_of(row)) for row in side} for side in (train, held)]
    assert not keys[0] & keys[1] and len(held) == 7 * 15 and len(train) == 7 * 285
    assert rows.hold_out(some[::-1])[1] == held[::-1]


def test_rows_that_are_equal_once_they_are_cut_are_on_one_side(tmp_path):
    """Texts that differ behind --block_size alone: of those, what is held out is not trained on."""
    some = [{"instruction": f"Q{i % 40}", "response": f"A{i % 40} " + "z " * 60 + str(i)} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    report = {}
    train, held, _ = rows.load(str(tmp_path / "a.jsonl"), None, 500, GPTTokenizer(), 32, report=report)
    assert len(held) == 10 and not {tuple(row[0]) for row in train} & {tuple(row[0]) for row in held}
    account = report["to train on"]
    (dropped, _), = account["dropped"].values()
    assert account["read"] == 190 and account["kept"] == len(train) == 190 - dropped
    whole, _, _ = rows.load(str(tmp_path / "a.jsonl"), None, 500, GPTTokenizer(), 500)
    assert len(whole) == 190


def test_prepared_sets_and_files_agree_on_what_is_held_out(tmp_path):
    from data import prepare

    paths = []
    for k in (0, 2):
        paths.append(tmp_path / f"{k}.jsonl")
        paths[-1].write_text("".join(json.dumps(variants(i)[k]) + "\n" for i in range(300)))
    prepare.main(["rows", "--from", str(paths[0]), "--out", str(tmp_path / "set")])
    report = {}
    train, held, _ = rows.load(f"{paths[1]},{tmp_path / 'set'}", None, 500, GPTTokenizer(), 64, report=report)
    assert len(held) == 30 and not {tuple(r[0]) for r in held} & {tuple(r[0]) for r in train}
    assert report["to train on"]["doubled"] == 300
    report = {}
    rows.load(str(paths[0]), str(paths[1]), 500, GPTTokenizer(), 64, report=report)
    assert report["held out"]["notes"] == {"texts of --eval_data that are trained on too": 300}


# ---- Lists of sources ----------------------------------------------------------------------------


def test_lists_of_paths(tmp_path, monkeypatch):
    """Drives, weights, commas and blanks in names; --eval splits as --data does."""
    monkeypatch.chdir(tmp_path)
    for name in ("a, b.jsonl", "c.jsonl", "d,e,f.jsonl", "E:/x.jsonl", "1:g.jsonl"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "w").close()
    for text, wanted in {
        "c.jsonl": [(None, "c.jsonl")], "a, b.jsonl": [(None, "a, b.jsonl")],
        "a, b.jsonl, c.jsonl": [(None, "a, b.jsonl"), (None, "c.jsonl")],
        "c.jsonl,d,e,f.jsonl,c.jsonl": [(None, "c.jsonl"), (None, "d,e,f.jsonl"), (None, "c.jsonl")],
        "E:/x.jsonl,c.jsonl": [(None, "E:/x.jsonl"), (None, "c.jsonl")],
        "0.5:E:/x.jsonl,.5:c.jsonl": [(0.5, "E:/x.jsonl"), (0.5, "c.jsonl")],
        "2:a, b.jsonl,1e1:c.jsonl": [(2.0, "a, b.jsonl"), (10.0, "c.jsonl")],
        "1:g.jsonl": [(None, "1:g.jsonl")],
    }.items():  # fmt: skip
        assert rows.sources(text) == wanted, text
        if wanted[0][0] is None:
            assert rows.split_list(text) == [path for _, path in wanted]
    for text in ("-1:c.jsonl", "0:c.jsonl", "1e:c.jsonl", "e:c.jsonl", "nan:c.jsonl", "c.jsonl,", ""):
        with pytest.raises(ValueError):
            rows.sources(text)


# ---- What is said --------------------------------------------------------------------------------


def test_the_report_counts_what_is_dropped_cut_and_doubled(tmp_path):
    some = [
        {"instruction": f"q{i}", "response": "a " * (60 if i % 10 == 0 else 3), "source": "x"}
        for i in range(40)
    ]
    some += [
        some[1],
        some[1] | {"source": "y"},
        {"instruction": "q", "response": ""},
        {"instruction": None, "response": "x"},
        {"instruction": "q " * 90, "response": "x"},
        {"instruction": "z", "response": None},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    report = {}
    train, held, _ = rows.load(str(path), None, 500, GPTTokenizer(), 50, report=report)
    read, made = report[str(path)], report["to train on"]
    assert (read["format"], read["read"], read["kept"]) == ("instruction", 46, 43)
    assert read["dropped"] == {
        "no text in 'response'": [2, f"{path}:43"],
        "no text in 'instruction'": [1, f"{path}:44"],
    }
    assert read["notes"] == {"field 'source' is not used": 42}
    assert made["doubled"] == 2
    assert made["cut"] + report["held out"]["cut"] == 4
    assert len(train) + len(held) == 42
    text = rows.table(report)
    assert "field 'source' is not used (42 rows)" in text and f"({path}:43 the first)" in text
    assert "1 dropped: no answer within --block_size 50" in text
    assert rows.table({}) and all(len(line) < 200 for line in text.splitlines())


@pytest.mark.parametrize("tokenizer", [GPTTokenizer(), None])
def test_a_preview_marks_the_loss(tokenizer):
    tokenizer = tokenizer or HFTokenizer("x", byte_tokenizer(TEMPLATES["chatml"][0]))
    made = rows.encode([{"messages": CHAT}, {"text": "only text"}], tokenizer, 500, "train")
    lines = rows.preview(made[0], tokenizer).splitlines()
    assert (
        [line[0] for line in lines] == ["-", "+", "-", "+"] and "5\\nor 6" in lines[3] and "Größe" in lines[2]
    )
    assert sum(int(line.split()[1]) for line in lines) == len(made[0][0])
    assert "<|im_end|>" in lines[1] or "<|endoftext|>" in lines[1]
    assert rows.preview((made[0][0], 5), tokenizer, 20).count(" ... ") == 1
    assert [line[0] for line in rows.preview(made[1], tokenizer).splitlines()] == ["-", "+"]


def test_questions_of_every_format(tmp_path):
    """What --eval asks: the last answer is the response, all before it the question."""
    path = tmp_path / "q.jsonl"
    path.write_text(
        json.dumps({"messages": CHAT, "answer": "5"})
        + "\n"
        + json.dumps({"messages": CHAT[1:3], "answer": "4"})
        + "\n"
    )
    a, b = rows.questions(str(path))
    assert a["instruction"] == CHAT[:4] and a["response"] == "5\nor 6" and a["answer"] == "5"
    assert b["instruction"] == "Hi, 2+2?" and b["response"] == "4"
    tokenizer = HFTokenizer("x", byte_tokenizer(TEMPLATES["chatml"][0]))
    tokens, spans = tokenizer.conversation(CHAT)
    assert tokenizer.prompt(a["instruction"]) == tokens[: spans[1][0]]
    path.write_text(json.dumps({"text": "no question", "answer": "4"}) + "\n")
    with pytest.raises(ValueError, match="row 1 does not end with an answer"):
        rows.questions(str(path))


def test_data_imports_nothing_of_the_project():
    """The readers work in an interpreter in which hd_pissa and the rest of the project cannot be imported."""
    import subprocess
    import sys

    program = (
        "import sys; [sys.modules.__setitem__(n, None) for n in ('hd_pissa', 'hd_pissa_extra', "
        "'train', 'training')]; from data import prepare, rows, sets, tokenizer, formats; import "
        "data.generate; print(len(rows.load('data/multi_domain.jsonl', None, 5, "
        "tokenizer.GPTTokenizer(), 64)[0]))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout) > 7000, run.stderr


def test_families_with_a_template_train(tmp_path):
    """A folder as the other tests make it, whose template ends no turn: eos is added behind the answer."""
    tokenizer = HFTokenizer("x", families.tokenizer())
    tokens, spans = tokenizer.conversation(CHAT[1:3])
    assert tokenizer.decode(tokens) == "Hi, 2+2?: 4: <|endoftext|>" and tokens[-1] == tokenizer.ends[0]
    assert torch.is_tensor(hd_pissa.pad([rows.trained(tokens, spans, 99)], "cpu")[0])


def test_packed_batches_hold_the_same_rows():
    """Every row of a shard is in one of its blocks, marked and whole, its loss where it was; blocks are as
    many for every shard, within block_size, and hardly more than must be."""
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(1, high, (), generator=generator))

    for _ in range(200):
        K, per, size = draw(5), draw(7), 12 + draw(40)
        batch = []
        for _ in range(K * per):
            length = 1 + draw(min(size, 12))
            row = torch.randint(50, (length,), generator=generator).tolist()
            at = draw(length)
            batch.append((row, at if draw(3) == 1 else [(at, length)]))
        (blocks,) = rows.packed_batches([batch], K, size, 50)
        number = len(blocks) // K
        assert number * K == len(blocks) and max(len(tokens) for tokens, _ in blocks) <= size
        for i in range(K):
            found = []
            for tokens, spans in blocks[i * number:(i + 1) * number]:
                starts = [j for j, token in enumerate(tokens) if token >= 50]
                assert starts[0] == 0 and len(spans) == len(starts)
                for a, b, span in zip(starts, [*starts[1:], len(tokens)], spans):
                    assert a < span[0] < span[1] == b, "no target is a marked token"
                    found.append(([tokens[a] - 50, *tokens[a + 1:b]], span[0] - a))
            wanted = [(row, max(1, at if isinstance(at, int) else at[0][0])) for row, at in
                      batch[i * per:(i + 1) * per]]
            assert sorted(found) == sorted(wanted)
        most = max(sum(len(row) for row, _ in batch[i * per:(i + 1) * per]) for i in range(K))
        assert number >= -(-most // size) and (number == 1 or number <= -(-2 * most // size) + 1)
