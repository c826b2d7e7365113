"""Tokenizers: tiktoken encodings for the built-in GPT, a Hugging Face model's own for that model.

Both turn a conversation into tokens and the spans of its answers, which the loss covers: by the
model's chat template where it has one, else by a plain format.
"""

import base64
import collections
import contextlib
import datetime
import hashlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import tiktoken

from data.formats import one_line

TOKENIZER = Path(__file__).with_name("tokenizer.tiktoken")
PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's regular expressions overflow its stack at some 500,000 blanks: long runs go in pieces.
LONG = re.compile(r"\s{50000}(?=\s)|\S{50000}(?=\S)")
SECONDS, LATE = 10.0, 3         # that a chat template may take for a conversation; how often it may not
# A template that writes today's date would give a run that goes on tomorrow other tokens. This one stands for
# its clock: the day that Llama 3's template names where it has none.
DAY = datetime.datetime(2024, 7, 26)
CODES = {code: DAY.strftime("%" + code) for code in "AaBbdHIjMmpSYy"} | {"-d": "26", "-m": "7"}
CLOCK = ("{%- macro strftime_now(format) -%}{{ format"
         + "".join(f"|replace('%{code}', '{text}')" for code, text in CODES.items())
         + " }}{%- endmacro %}{{ '' }}")
MOST = 1_000_000                # characters that it may write beside the text it is given


class TemplateError(ValueError):
    """A conversation that the chat template refuses, or in which answers cannot be found."""


def from_file(path) -> tiktoken.Encoding:
    """An Encoding, with this project's pattern, of a file of lines "base64-token rank"."""
    ranks = {}
    for i, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            token, index = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(index)
        except ValueError:
            raise ValueError(f"--tokenizer {path}:{i}: not 'base64-token rank'; give a tiktoken "
                             "file") from None
    if len(set(ranks.values())) < len(ranks) or not ranks or min(ranks.values()) < 0:
        raise ValueError(f"--tokenizer {path}: holds no ranks, or one twice; give a tiktoken file")
    for byte in (bytes([b]) for b in range(256)):
        if byte not in ranks:       # tiktoken cannot encode a text with a byte that has no rank
            ranks[byte] = 1 + max(ranks.values())
    return tiktoken.Encoding(Path(path).stem, pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 1 + max(ranks.values())})


def from_tiktoken(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding `name`, from its cache or the network."""
    if name not in (known := tiktoken.list_encoding_names()):
        raise ValueError(f"--tokenizer {name}: no such file, nor one of tiktoken's "
                         f"{', '.join(known)}")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR",
                           os.environ.get("DATA_GYM_CACHE_DIR")) or os.path.join(
        tempfile.gettempdir(), "data-gym-cache")
    before = os.listdir(cache) if os.path.isdir(cache) else []
    try:
        return tiktoken.get_encoding(name)
    except (ValueError, OSError) as e:      # requests' errors are OSErrors
        url = getattr(getattr(e, "request", None), "url", None)
        if url is None:
            raise ValueError(f"--tokenizer {name}: {e}") from e
        file = hashlib.sha1(url.encode()).hexdigest()
        why = "has another digest than tiktoken expects" if file in before else "is not there"
        raise ValueError(f"--tokenizer {name}: {os.path.join(cache, file)} {why}, and {url} cannot "
                         f"be reached; fetch that where there is a network, copy it here as {file} "
                         "and set TIKTOKEN_CACHE_DIR to its folder") from e


def joined(turns: list[dict]) -> list[tuple[str, str]]:
    """(role, text) of questions and answers in turn; a system prompt begins the first question."""
    made = []
    for turn in turns:
        role, text = turn["role"].replace("system", "user"), turn["content"]
        if made and made[-1][0] == role:
            text, role = f"{made.pop()[1]}\n\n{text}", role
        made.append((role, text))
    return made


class Tokenizer:
    """Conversations in a plain format: question and answer, end of text, the next question and
    answer.

    A subclass has begin(), the tokens in front of a text, encode(text), plain_prompt(question),
    `ends`, the tokens that end an answer, and decode(tokens). `counts` says how often something
    about the texts was noteworthy.
    """

    def prompt(self, question) -> list[int]:
        """Tokens up to where the answer begins, of a question or of all turns before it."""
        turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
        tokens, spans = self.conversation([*turns, {"role": "assistant", "content": "."}])
        return tokens[:spans[-1][0]]

    def response(self, answer: str) -> list[int]:
        return self.encode(answer) + self.ends[:1]

    def conversation(self, turns: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
        """(tokens, spans): of all turns, and (start, stop) of each answer with its end of turn."""
        tokens, spans = self.begin(), []
        for role, text in joined(turns):
            if role == "user":
                tokens = tokens + self.plain_prompt(text)
            elif role == "text":
                tokens = tokens + self.encode(text, control=True) + self.ends[:1]
                spans = [(1, len(tokens))]              # nothing stands before the first token
            else:
                start, tokens = len(tokens), tokens + self.response(text)
                spans.append((start, len(tokens)))
        return tokens, spans


class GPTTokenizer(Tokenizer):
    """Any tiktoken Encoding (None: the ranks of data/) with a plain question and answer prompt."""

    def __init__(self, name: str | None = None):
        path = TOKENIZER if name is None else name
        self.encoding = from_file(path) if os.path.isfile(path) else from_tiktoken(name)
        self.eot, self.vocabulary = self.encoding.eot_token, self.encoding.n_vocab
        self.ends, self.counts = [self.eot], collections.Counter()
        self.decode = self.encoding.decode

    def begin(self) -> list[int]:
        return []

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Special tokens that a text spells are ordinary text here, always."""
        cuts = [0, *(match.end() for match in LONG.finditer(text)), len(text)]
        return [t for a, b in zip(cuts, cuts[1:]) for t in self.encoding.encode_ordinary(text[a:b])]

    def plain_prompt(self, question: str) -> list[int]:
        return self.encode(f"Q: {question}\nA:")

    def response(self, answer: str) -> list[int]:
        return self.encode(" " + answer) + [self.eot]


# ---- A Hugging Face model's own ------------------------------------------------------------------


@contextlib.contextmanager
def within(seconds: float):
    """TimeoutError in Python code of the block that runs longer: a template may loop for ever.

    By the alarm clock of the process; a thread that has none, or Windows, looks at the time in every line.
    """
    def late(*_):
        raise TimeoutError(f"no end within {seconds:g} s")

    def trace(frame, event, arg):
        return late() if time.monotonic() > deadline else trace

    deadline = time.monotonic() + seconds
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGALRM, late)
        rest, every = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, rest, every)
            signal.signal(signal.SIGALRM, before)
        return
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer with its chat template, or the Alpaca prompt where it has none.

    What a template writes is tokenized as a whole. Where it marks the answers ({% generation %}),
    the loss covers these marks. Else an answer begins where the template, given the turns before
    it, asks for one, and stops with the token by which the template ends a turn (<end_of_turn>,
    <|im_end|>, </s>).
    """

    def __init__(self, path: str, hf=None):
        if hf is None:
            from transformers import AutoTokenizer
            hf = AutoTokenizer.from_pretrained(path)
        self.hf, self.name, self.counts = hf, path, collections.Counter()
        if hf.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no eos token, so no response would ever "
                             "end; set "
                             '"eos_token" in its tokenizer_config.json')
        added = getattr(hf, "added_tokens_decoder", {})
        special = {str(token) for token in added.values()
                   if token.special} | set(hf.all_special_tokens)
        self.special = sorted(special - {""}, key=len, reverse=True)
        self.control = set(hf.convert_tokens_to_ids(self.special))
        # Characters of that plane that the data itself has hide too, behind numbers of their own.
        self.spelled = re.compile("|".join([*map(re.escape, self.special), "[\U00100000-\U0010ffff]"]))
        self.met = [*self.special]
        self.ends, self.turn_ends = [hf.eos_token_id], []
        self.takes_system, self.marks, self.late = True, False, 0
        # What the tokenizer puts before a text (bos). What it puts behind (eos) is no prompt's.
        bare, full = (hf("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        starts = (full[:k] for k in range(len(full)) if full[k:k + len(bare)] == bare)
        self.first = next(starts, [])
        if hf.chat_template:
            self.probe()

    def decode(self, tokens: list[int]) -> str:
        return self.hf.decode(tokens)

    # -- Text to tokens. Special tokens that the data spells out must not become control tokens:
    # each hides behind a character of Unicode's last private plane while the template writes, and
    # is tokenized on its own.

    def hide(self, text: str) -> str:
        found = set(self.spelled.findall(text))
        self.counts["special tokens in the text are taken as text"] += not found.isdisjoint(self.special)
        self.met += sorted(found - set(self.met))
        return self.spelled.sub(lambda m: chr(0x100000 + self.met.index(m[0])), text)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are control tokens, hidden ones apart."""
        ids = []
        for i, part in enumerate(re.split("([\U00100000-\U0010ffff])", text)):
            if i % 2:
                ids += self.hf(self.met[ord(part) - 0x100000], add_special_tokens=False,
                               split_special_tokens=True)["input_ids"]
            elif part and i:    # behind a token, as in the whole text: no blank is put in front
                ids += self.hf(self.hf.eos_token + part, add_special_tokens=False)["input_ids"][1:]
            elif part:
                ids += self.hf(part, add_special_tokens=False)["input_ids"]
        return ids

    def begin(self) -> list[int]:
        return self.first

    def encode(self, text: str, control: bool = False) -> list[int]:
        if control and any(token in text for token in self.special):    # somebody has formatted it
            self.counts["texts spell special tokens, which are control tokens"] += 1
            return self.hf(text, add_special_tokens=False)["input_ids"]
        return self.tokens(self.hide(text))

    def plain_prompt(self, question: str) -> list[int]:
        return self.encode("Below is an instruction that describes a task. Write a response that "
                           f"appropriately completes the request.\n\n### "
                           f"Instruction:\n{question}\n\n### Response:\n")

    # -- The chat template

    def applied(self, turns: list[dict], **how):
        """What the template makes of turns, within a time; TemplateError where it fails, ValueError where it
        is late again and again."""
        try:
            with within(SECONDS):
                return self.hf.apply_chat_template(turns, **self.dated, **how)
        except Exception as e:      # the time of a row may run out in a library that renames the error
            self.late += "no end within" in str(e)
            if self.late == LATE:
                raise ValueError(f"{self.name}: its chat template had no end within {SECONDS:g} s, "
                                 f"{LATE} times; mend chat_template.jinja (or chat_template in "
                                 "tokenizer_config.json)") from None
            raise TemplateError(" ".join(str(e).split())[:200] or type(e).__name__) from e

    def write(self, turns: list[dict], **how) -> str:
        text = self.applied(turns, tokenize=False, **how)
        if len(text) > MOST + 10 * sum(len(turn["content"]) for turn in turns):
            raise TemplateError(f"it writes {len(text)} characters for a conversation of {len(turns)} turns")
        return text

    def parts(self, turns: list[dict]) -> tuple[str, list[int]]:
        """What the template writes, and where in it each answer begins."""
        text, starts = self.write(turns), []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self.write(turns[:i], add_generation_prompt=True)
                if not text.startswith(before):
                    raise TemplateError("what it writes before an answer is not what it writes to "
                                        "ask for one; mark the answers in the template by {% "
                                        "generation %}")
                starts.append(len(before))
        return text, starts

    def probe(self) -> None:
        """Learn how the template ends a turn and whether it takes a system prompt."""
        one = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes1."}]
        two = one + [{"role": "user", "content": "Second?"},
                     {"role": "assistant", "content": "No2."}]
        template = self.hf.get_chat_template() if hasattr(self.hf, "get_chat_template") else ""
        self.dated = {"chat_template": CLOCK + template} if "strftime_now" in template else {}
        self.marks = self.hf.is_fast and bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        try:
            if self.marks:
                tokens, spans = self.marked(one)
                asked = self.decode(tokens[:spans[0][0]])
                told = self.decode(tokens[spans[0][0]:spans[-1][1]])
            else:
                text, starts = self.parts(one)
                asked, told = text[:starts[0]], text[starts[0]:]
            if "First?" not in asked or "Yes1." not in told or len(asked + told) > 100_000:
                raise TemplateError("it does not write the question and then the answer")
            found = [told.split("Yes1.")[-1]]
            with contextlib.suppress(TemplateError):        # one that takes a single question
                text, starts = self.parts(two)
                found += [text[starts[0]:].split("Yes1.")[1].split("Second?")[0]]
            try:
                system = {"role": "system", "content": "Be3."}
                chat = [system, *(two if len(found) > 1 else one)]
                text = self.write(chat) if self.marks else self.parts(chat)[0]
                self.takes_system = "Be3." in text
            except TemplateError:
                self.takes_system = False
        except (TemplateError, IndexError) as e:
            raise ValueError(f"{self.name}: its chat template fails on a question and an answer "
                             f"({e}); mend chat_template.jinja (or chat_template in "
                             "tokenizer_config.json), or remove it for the plain prompt of a base "
                             "model") from None
        self.late = 0
        ends = [next((t for t in self.tokens(behind) if t in self.control), None)
                for behind in found]
        if ends[0] is not None:         # else nothing ends an answer that generation could stop at
            self.turn_ends = list(dict.fromkeys(t for t in ends if t is not None))
            self.ends = list(dict.fromkeys([*self.ends, *self.turn_ends]))

    def response(self, answer: str) -> list[int]:
        if not self.hf.chat_template:
            return super().response(answer)
        turns = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": answer}]
        tokens, spans = self.conversation(turns)
        return tokens[spans[0][0]:spans[-1][1]]

    def prompt(self, question) -> list[int]:
        if not self.hf.chat_template:
            return super().prompt(question)
        turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
        return self.tokens(self.write(self.hidden(turns), add_generation_prompt=True))

    def hidden(self, turns: list[dict]) -> list[dict]:
        turns = [turn | {"content": self.hide(turn["content"])} for turn in turns]
        if turns[0]["role"] == "system" and not self.takes_system:
            first = turns[1] | {"content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
            turns = [first, *turns[2:]]
        return turns

    def conversation(self, turns: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
        """As the template writes it whole; TemplateError if it refuses, or hides the answers."""
        if not self.hf.chat_template or turns[0]["role"] == "text":
            return super().conversation(turns)
        turns = self.hidden(turns)
        if self.marks and not any(c >= "\U00100000" for turn in turns for c in turn["content"]):
            return self.marked(turns)
        text, starts = self.parts(turns)
        tokens, before = self.tokens(text), [self.tokens(text[:start]) for start in starts]
        if any(tokens[:len(b)] != b for b in before):
            # A token reaches over a border: question and answer apart, as the model will see them.
            cuts = [0, *starts, len(text)]
            pieces = [self.tokens(text[a:b]) for a, b in zip(cuts, cuts[1:])]
            tokens, before = sum(pieces, []), [sum(pieces[:i], []) for i in range(1, len(pieces))]
        answers, spans = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"], []
        for i, start in zip(answers, map(len, before)):
            if self.turn_ends:
                stop = next((j + 1 for j in range(start, len(tokens))
                             if tokens[j] in self.turn_ends), None)
            elif i == len(turns) - 1:
                tokens, stop = tokens + self.ends[:1], len(tokens) + 1
            else:
                upto = self.tokens(self.write(turns[:i + 1]))
                stop = len(upto) if tokens[:len(upto)] == upto else None
            if stop is None:
                raise TemplateError("where an answer ends cannot be told from what it writes; mark "
                                    "the answers in the template by {% generation %}")
            spans.append((start, stop))
        return tokens, spans

    def marked(self, turns: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and the spans that the template's own {% generation %} marks."""
        made = self.applied(turns, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0, *made["assistant_masks"], 0]
        edges = [i for i in range(len(mask) - 1) if mask[i] != mask[i + 1]]
        if not edges:
            raise TemplateError("it marks no answer")
        return list(made["input_ids"]), list(zip(edges[::2], edges[1::2]))


# ---- The tokenizer of a --model ------------------------------------------------------------------


TEXTS = ["*.json", "*.txt", "*.jinja", "tokenizer*", "*.model"]     # of a model: all but its weights


def folder_of(model: str, name: str | None = None) -> str:
    """The folder of a Hugging Face --model: itself, or the hub's cache, with its texts.

    Once for the whole model: from_pretrained with an id would ask the hub again for each file, and without
    a network spend 23 s on each.
    """
    what = f"--model {model}"
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{what} is not a .pt file, and Hugging Face models need transformers: "
                         "pip install -r requirements-extra.txt")
    if name is not None:
        raise ValueError(f"--tokenizer {name}: {what} comes with its own; leave the flag out")
    if os.path.isdir(model):
        return model
    if os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"{what}: no such directory; give a folder with config.json, or a hub id")
    from huggingface_hub import snapshot_download
    remedy = ("it is no directory: give a hub id that exists and that you may read (hf auth login); without "
              f"a network run `hf download {model} --local-dir DIR` elsewhere, copy it here, --model DIR")
    with one_line(what, remedy):
        return snapshot_download(model, allow_patterns=TEXTS)


def read_tokenizer(model: str, folder: str) -> HFTokenizer:
    """The tokenizer in the folder of a --model; no code of the folder's is run."""
    from transformers import AutoTokenizer
    with one_line(f"--model {model}: its tokenizer", "download it again"):
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return HFTokenizer(model, hf)


def open_tokenizer(model: str, name: str | None = None) -> Tokenizer:
    """The tokenizer of train.py's --model and --tokenizer; no weights are read."""
    if model == "scratch" or model.endswith(".pt"):
        return GPTTokenizer(name)
    return read_tokenizer(model, folder_of(model, name))
