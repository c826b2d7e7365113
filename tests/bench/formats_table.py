"""What train.py does with each format of rows: the same conversations in every one, in every kind of file.

    python tests/bench/formats_table.py        # prints the tables and writes them to tests/bench/formats.md

The conversations are the first rows of the embedded data, by twos a chat of two questions. Compared are the
tokens and the spans of the loss, of the small GPT's tokenizer and of a chat template's (ChatML), through
data.rows.load, as train.py calls it.
"""

import csv
import gzip
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from data import rows  # noqa: E402
from data.tokenizer import GPTTokenizer, HFTokenizer  # noqa: E402

PAGE, NUMBER, SYSTEM = Path(__file__).with_name("formats.md"), 40, "Answer in one line."
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip


def says(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def share(turns) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def chats() -> dict[str, list[list[dict]]]:
    """{kind: conversations}: one question and answer; a system prompt before it; two of them."""
    lines = (ROOT / "data" / "multi_domain.jsonl").read_text("utf-8").splitlines()[:NUMBER]
    pairs = [[says("user", row["instruction"]), says("assistant", row["response"])]
             for row in map(json.loads, lines)]
    return {"one": pairs, "system": [[says("system", SYSTEM), *pair] for pair in pairs],
            "two": [a + b for a, b in zip(pairs[::2], pairs[1::2])],
            "text": [[says("text", answer["content"])] for _, answer in pairs]}  # fmt: skip


def cut(text: str) -> tuple[str, str]:
    """A question in two parts, as instruction and input are; the first line break goes between them."""
    first, _, rest = text.partition("\n")
    return first, rest


# fields of a row: (kind of chat, how a row is made of it)
DRESSES = {
    "`messages`": ("two", lambda c: {"messages": c}),
    "`messages`, parts of text": ("one", lambda c: {"messages": [
        says(turn["role"], [{"type": "text", "text": turn["content"]}]) for turn in c]}),
    "`messages`, system turn": ("system", lambda c: {"messages": c}),
    "`messages` and `system`": ("system", lambda c: {"messages": c[1:], "system": SYSTEM}),
    "`conversations` (ShareGPT)": ("two", lambda c: {"conversations": share(c)}),
    "`conversations` and `system`": ("system", lambda c: {"conversations": share(c[1:]), "system": SYSTEM}),
    "`instruction`, `response`": ("one", lambda c: dict(zip(
        ("instruction", "response"), (c[0]["content"], c[1]["content"])))),
    "`instruction`, `context`, `response` (Dolly)": ("one", lambda c: dict(zip(
        ("instruction", "context", "response", "category"), (*cut(c[0]["content"]), c[1]["content"], "qa")))),
    "`instruction`, `input`, `output` (Alpaca)": ("one", lambda c: dict(zip(
        ("instruction", "input", "output"), (*cut(c[0]["content"]), c[1]["content"])))),
    "... and `system`": ("system", lambda c: {"instruction": c[1]["content"], "input": "",
                                              "output": c[2]["content"], "system": SYSTEM}),
    "... and `history`": ("two", lambda c: {"instruction": c[2]["content"], "output": c[3]["content"],
                                            "history": [[c[0]["content"], c[1]["content"]]]}),
    "`prompt`, `completion`": ("one", lambda c: {"prompt": c[0]["content"], "completion": c[1]["content"]}),
    "`prompt`, `completion` as turns": ("two", lambda c: {"prompt": c[:-1], "completion": c[-1:]}),
    "`text`, all of it loss": ("text", lambda c: {"text": c[0]["content"]}),
}  # fmt: skip
# rows that are no conversation, or have more than one: beside a good one
ODD = {
    "a null answer": {"messages": [says("user", "a"), says("assistant", None)]},
    "an empty answer": {"instruction": "a", "output": " "},
    "no answer": {"messages": [says("user", "a")]},
    "calls of tools": {"messages": [
        says("user", "a"), says("assistant", "I look.") | {"tool_calls": [{"id": "1"}]}, says("tool", "5"),
        says("assistant", "5")]},
    "a turn of a tool": {"conversations": share([says("user", "a"), says("assistant", "b")])
                         + [{"from": "observation", "value": "5"}]},
    "a weight of a turn": {"messages": [says("user", "a"), says("assistant", "b") | {"weight": 0}]},
    "a field of its own": {"prompt": "a", "completion": "b", "score": 3},
}  # fmt: skip


def jsonl(some) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some).encode()


def table_file(some) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(some[0]))
    writer.writeheader()
    writer.writerows(some)
    return text.getvalue().encode()


def parquet(path: Path, some) -> None:
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path)


def saved(path: Path, some) -> None:
    import datasets
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(some).save_to_disk(str(path))


FILES = {
    "JSONL": ("a.jsonl", lambda path, some: path.write_bytes(jsonl(some))),
    "BOM, CRLF": ("b.jsonl", lambda path, some: path.write_bytes(
        b"\xef\xbb\xbf" + jsonl(some).replace(b"\n", b"\r\n\r\n"))),
    ".gz": ("a.jsonl.gz", lambda path, some: path.write_bytes(gzip.compress(jsonl(some)))),
    "JSON": ("a.json", lambda path, some: path.write_text(json.dumps(some, indent=1), "utf-8")),
    "CSV": ("a.csv", lambda path, some: path.write_bytes(table_file(some))),
    "Parquet": ("a.parquet", parquet),
    "datasets": ("saved", saved),
}  # fmt: skip


def template_tokenizer() -> HFTokenizer:
    """Bytes as tokens, with ChatML's marks and template."""
    import families
    hf = families.tokenizer()
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    hf.chat_template = CHATML
    return HFTokenizer("ChatML", hf)


def read(path, tokenizer):
    """(all rows as train.py gets them, in an order of their own; what is said of them)."""
    report = {}
    train, held, _ = rows.load(str(path), None, NUMBER, tokenizer, 4096, report=report)
    return sorted(row[:2] for row in [*train, *held]), report[str(path)]


def measure(folder: Path) -> tuple[list[list], list[list]]:
    """Rows of both tables."""
    some, dressed, odd = chats(), [], []
    for name, (kind, make) in DRESSES.items():
        made, cells = [make(chat) for chat in some[kind]], {}
        for i, tokenizer in enumerate((GPTTokenizer(), template_tokenizer())):
            plain = [{"text": c[0]["content"]} if kind == "text" else {"messages": c} for c in some[kind]]
            wanted = sorted(row[:2] for row in rows.encode(plain, tokenizer, 4096, "wanted"))
            for kind_of_file, (file, write) in FILES.items():
                if kind_of_file == "CSV" and any(isinstance(value, list) for value in made[0].values()):
                    cells[kind_of_file] = ""            # a cell is a text
                    continue
                path = folder / f"{len(dressed)}.{file}"
                if not i:
                    write(path, made)
                got, account = read(path, tokenizer)
                same = got == wanted and cells.get(kind_of_file) != "OTHER"
                cells[kind_of_file] = "same" if same else "OTHER"
            cells[i] = sum(len(tokens) for tokens, _ in wanted), sum(
                sum(b - a for a, b in ([(loss, len(tokens))] if isinstance(loss, int) else loss))
                for tokens, loss in wanted)
        notes = "; ".join(f"{text} ({count} rows)" for text, count in account["notes"].items())
        dressed.append([name, account["format"], *cells[0], *cells[1], *(cells[f] for f in FILES), notes])
    for name, row in ODD.items():
        path = folder / f"odd{len(odd)}.jsonl"
        good = next(good for kind, make in DRESSES.values()
                    if set(good := make(some[kind][0])) >= set(row) - {"score"})
        path.write_bytes(jsonl([good] * 3 + [row]))
        account = rows.entry(report := {}, str(path))
        kept = len(rows.read_rows(str(path), None, report))
        said = [f"dropped: {why}" for why in account["dropped"]]
        said += [f"kept; {text}" for text in account["notes"]]
        odd.append([name, account["format"], account["read"], kept, "; ".join(said) or "NOTHING"])
    return dressed, odd


def markdown(head, body) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page() -> str:
    with tempfile.TemporaryDirectory() as folder:
        dressed, odd = measure(Path(folder))
    return "\n".join((
        "# Formats of rows, and what train.py does with them", "",
        f"Made by `python tests/bench/formats_table.py`. {NUMBER} questions and answers of the embedded "
        "data, alone, with a system prompt, or by twos as one chat, written in every format and kind of "
        "file. *same*: the tokens and the spans of the loss are those of the conversations themselves, with "
        "the small GPT's tokenizer and with ChatML's template. An empty cell: a CSV cell holds no list.", "",
        markdown(["fields of a row", "`--format`", "tokens", "of them loss", "tokens, ChatML", "of them loss",
                  *FILES, "said"], dressed), "",
        "One odd row behind three good ones. Nothing is left out without a word.", "",
        markdown(["the row has", "`--format`", "read", "kept", "said"], odd), ""))  # fmt: skip


if __name__ == "__main__":
    text = page()
    PAGE.write_text(text, "utf-8")
    print(text)
