"""The sets of the paper's tables 3 and 6: where each is, how many rows, how they become text.

The commonsense templates are those of the mix of Liu et al. (2024), which the paper trains on. A
conversion gets a raw row whose fields have the types of the table, and returns (instruction,
response), or a `Dropped`.
"""

import re
from typing import NamedTuple

from data.formats import Dropped


class Set(NamedTuple):
    """Hub id, configuration, revision (None: the default), rows in table 6, fields, conversion."""

    hub: str | None
    config: str | None
    revision: str | None
    paper: int | None
    fields: dict
    convert: object


def pair(question: str, answer: str):
    """Both texts as they are."""
    return lambda raw: (raw[question], raw[answer])


def code(raw):
    """The source has many languages in "lang"; the paper's 105K rows fit those in Python alone."""
    if raw.get("lang", "python") != "python":
        return Dropped("not in Python")
    return raw["query"], raw["answer"]


def conversation(raw):
    turns = raw["conversations"]
    if [turn["from"] for turn in turns] != ["human", "gpt"]:
        return Dropped("not one question with one answer")
    return turns[0]["value"], turns[1]["value"]


def label(value, first: int = 0) -> int | None:
    """Counted from 0; None for the empty or negative label of a hidden test set."""
    return int(value) - first if str(value).strip().isdigit() else None


def choice(task: str, text: str, word: str, options: list[str], right: int | None, between=" ",
           end="\n\n"):
    """Numbered options and the word to answer with."""
    if right is None or not 0 <= right < len(options):
        return Dropped("no label")
    listed = between.join(f"{word.capitalize()}{i}: {option}" for i,
                          option in enumerate(options, 1))
    words = "/".join(f"{word}{i}" for i in range(1, len(options) + 1))
    return (f"Please choose the correct {task}: {text}\n\n{listed}{end}Answer format: {words}",
            f"the correct answer is {word}{right + 1}")


def boolq(raw):
    return ("Please answer the following question with true or false, question: "
            f"{raw['question']}?\n\nAnswer format: true/false",
            f"the correct answer is {str(raw['answer']).lower()}")


def piqa(raw):
    return choice("solution to the question", raw["goal"], "solution", [raw["sol1"], raw["sol2"]],
                  label(raw["label"]), between="\n\n")


def siqa(raw):
    return choice("answer to the question", f"{raw['context']} {raw['question']}", "answer",
                  [raw["answerA"], raw["answerB"], raw["answerC"]], label(raw["label"], 1))


def without_tags(text: str) -> str:
    """WikiHow's marks: a title begins a sentence; header, step and substeps go; others stay."""
    text = text.replace(" [title]", ". ")
    return re.sub(" +", " ", re.sub(r"\[(?:header|title|step|substeps)\]", "", text)).strip()


def hellaswag(raw):
    return choice("ending to complete the given sentence",
                  f"{raw['activity_label']}: {without_tags(raw['ctx'])}", "ending",
                  [without_tags(ending) for ending in raw["endings"]], label(raw["label"]))


def winogrande(raw):
    return choice("answer to fill in the blank to complete the given sentence", raw["sentence"],
                  "option",
                  [raw["option1"], raw["option2"]], label(raw["answer"], 1), end=" ")


def science(question: str):
    """ARC and OpenBookQA: the key is the label of one of the choices."""
    def convert(raw):
        labels, key = list(raw["choices"]["label"]), raw["answerKey"]
        return choice("answer to the question", raw[question], "answer",
                      list(raw["choices"]["text"]),
                      labels.index(key) if key in labels else None)

    return convert


QA, KEY = {"query": str, "answer": str}, {"choices": dict, "answerKey": str}
NUMBER = (int, str)
SETS = {
    "metamathqa": Set("meta-math/MetaMathQA", None, None, 395_000, {"query": str, "response": str},
                      pair("query", "response")),
    "codefeedback": Set("m-a-p/CodeFeedback-Filtered-Instruction", None, None, 105_000, QA, code),
    "wizardlm": Set("WizardLMTeam/WizardLM_evol_instruct_V2_196k", None, None, 143_000,
                    {"conversations": list}, conversation),
    "boolq": Set("google/boolq", None, None, 9_400, {"question": str, "answer": bool}, boolq),
    # Its main branch is a loading script, which the library no longer runs; here are files.
    "piqa": Set("ybisk/piqa", None, "refs/convert/parquet", 16_100,
                {"goal": str, "sol1": str, "sol2": str, "label": NUMBER}, piqa),
    # The same rows as allenai/social_i_qa, which is a loading script too.
    "siqa": Set("lighteval/siqa", None, None, 33_400,
                {"context": str, "question": str, "answerA": str, "answerB": str, "answerC": str,
                 "label": NUMBER}, siqa),
    "hellaswag": Set("Rowan/hellaswag", None, None, 39_900,
                     {"activity_label": str, "ctx": str, "endings": list, "label": NUMBER},
                     hellaswag),
    "winogrande": Set("allenai/winogrande", "winogrande_xl", None, 40_400,
                      {"sentence": str, "option1": str, "option2": str, "answer": NUMBER},
                      winogrande),
    "arc-c": Set("allenai/ai2_arc", "ARC-Challenge", None, 1_100, {"question": str} | KEY,
                 science("question")),
    "arc-e": Set("allenai/ai2_arc", "ARC-Easy", None, 2_300, {"question": str} | KEY,
                 science("question")),
    "obqa": Set("allenai/openbookqa", "main", None, 5_000, {"question_stem": str} | KEY,
                science("question_stem")),
    "rows": Set(None, None, None, None, {}, None),
}
COMMONSENSE = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-c", "arc-e", "obqa"]
MIXES = {"commonsense": COMMONSENSE,
         "multitask": ["metamathqa", "codefeedback", "wizardlm", *COMMONSENSE]}

# Spellings of tables 3 and 6 beside the names above; case does not matter.
SPELLINGS = {"wizardlm-evol-instruct": "wizardlm", "arc_challenge": "arc-c",
             "arc-challenge": "arc-c",
             "arc_easy": "arc-e", "arc-easy": "arc-e", "openbookqa": "obqa"}


def in_thousands(rows: int) -> str:
    """As table 6 prints it: 395K, 9.4K."""
    return f"{rows / 1000:.1f}K" if rows < 100_000 else f"{rows / 1000:.0f}K"


def paper_rows(name: str) -> int | None:
    """Rows of a set in table 6, of a mix in all."""
    return sum(SETS[part].paper for part in MIXES[name]) if name in MIXES else SETS[name].paper


def as_in_paper(rows: int, paper: int) -> bool:
    """Whether a count rounds to the figure of table 6."""
    return abs(rows - paper) <= (500 if paper >= 100_000 else 50)

