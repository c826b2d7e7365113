"""Tokenizers: byte-pair ranks of tiktoken for the built-in GPT, a Hugging Face model's own for that model."""

import base64
from pathlib import Path

import tiktoken

TOKENIZER = Path(__file__).with_name("tokenizer.tiktoken")


class GPTTokenizer:
    """The byte-pair ranks of data/ as a tiktoken Encoding, with a plain question and answer prompt."""

    def __init__(self, path=TOKENIZER):
        ranks = {}
        for line in Path(path).read_bytes().splitlines():
            token, index = line.split()
            ranks[base64.b64decode(token)] = int(index)
        pattern = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        self.eot = len(ranks)
        self.encoding = tiktoken.Encoding("hd_pissa", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={"<|endoftext|>": self.eot})
        self.vocabulary = self.eot + 1

    def prompt(self, instruction: str) -> list[int]:
        return self.encoding.encode_ordinary(f"Q: {instruction}\nA:")

    def response(self, response: str) -> list[int]:
        return self.encoding.encode_ordinary(" " + response) + [self.eot]


class HFTokenizer:
    """A Hugging Face tokenizer with its chat template, or the Alpaca prompt where it has none."""

    def __init__(self, path: str):
        from transformers import AutoTokenizer
        self.hf = AutoTokenizer.from_pretrained(path)
        if self.hf.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no eos token, so no response would ever end")

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
