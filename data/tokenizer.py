"""Tokenizers: tiktoken encodings for the built-in GPT, a Hugging Face model's own for that model."""

import base64
import hashlib
import os
import tempfile
from pathlib import Path

import tiktoken

TOKENIZER = Path(__file__).with_name("tokenizer.tiktoken")
PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def from_file(path) -> tiktoken.Encoding:
    """An Encoding with this project's pattern of a file of ranks, a line "base64-token rank" each."""
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
        raise ValueError(f"--tokenizer {name}: no such file, nor one of tiktoken's {', '.join(known)}")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR")) or os.path.join(
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
        raise ValueError(f"--tokenizer {name}: {os.path.join(cache, file)} {why}, and {url} cannot be "
                         f"reached; fetch that where there is a network, copy it here as {file} and set "
                         "TIKTOKEN_CACHE_DIR to its folder") from e


class GPTTokenizer:
    """Any tiktoken Encoding (None: the ranks of data/) with a plain question and answer prompt."""

    def __init__(self, name: str | None = None):
        path = TOKENIZER if name is None else name
        self.encoding = from_file(path) if os.path.isfile(path) else from_tiktoken(name)
        self.eot, self.vocabulary = self.encoding.eot_token, self.encoding.n_vocab

    def prompt(self, instruction: str) -> list[int]:
        return self.encoding.encode_ordinary(f"Q: {instruction}\nA:")

    def response(self, response: str) -> list[int]:
        return self.encoding.encode_ordinary(" " + response) + [self.eot]


class HFTokenizer:
    """A Hugging Face tokenizer with its chat template, or the Alpaca prompt where it has none."""

    def __init__(self, path: str, hf=None):
        from transformers import AutoTokenizer
        self.hf = AutoTokenizer.from_pretrained(path) if hf is None else hf
        if self.hf.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no eos token, so no response would ever end; set "
                             '"eos_token" in its tokenizer_config.json')

    def prompt(self, instruction: str) -> list[int]:
        if self.hf.chat_template:
            chat = [{"role": "user", "content": instruction}]
            text = self.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return self.hf(text, add_special_tokens=False)["input_ids"]
        text = ("Below is an instruction that describes a task. Write a response that appropriately "
                f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")
        return self.hf(text)["input_ids"]

    def response(self, response: str) -> list[int]:
        return self.hf(response, add_special_tokens=False)["input_ids"] + [self.hf.eos_token_id]
