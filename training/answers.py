"""Generated text against a row's `answer`: what kind of answer it is, and whether the text gives it."""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

NUMBER = re.compile(r"(?:(?<![\w.)])-)?"                        # a sign, but no minus between two numbers
                    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
CHOICE = re.compile(r"true|false|(?:option|answer|solution|ending)[0-9]+")
TESTS = re.compile(r"^[ \t]*(?:assert\b|check\()", re.MULTILINE)
RUNNER = Path(__file__).with_name("run_program.py")
FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)(?:```|\Z)", re.DOTALL)


def kind_of(answer: str) -> str:
    """What an answer asks for: "code" (it holds asserts), "choice" (option2, true), "number", or "text"."""
    if TESTS.search(answer):
        return "code"
    if CHOICE.fullmatch(answer.strip().lower()):
        return "choice"
    return "number" if NUMBER.fullmatch(answer.strip()) else "text"


def last_number(text: str) -> Decimal | None:
    """The last number, behind the last "####" if there is one: how GSM8K marks its result."""
    found = NUMBER.findall(text.rpartition("####")[2])
    return Decimal(found[-1].replace(",", "")) if found else None


def first_choice(text: str, answer: str) -> str | None:
    """The first word like the answer (answer1, answer2, ...), behind the last "answer is" if one is there."""
    word = answer.rstrip("0123456789").lower()
    pattern = re.compile(r"\b(?:true|false)\b" if word in ("true", "false") else rf"\b{word}[0-9]+\b")
    text = text.lower()
    found = pattern.search(text.rpartition("answer is")[2]) or pattern.search(text)
    return found and found.group()


def is_right(text: str, row: dict, seconds: float = 10.0) -> bool:
    """Does generated `text` give the row's answer? Runs the text as a program if the answer is code.

        number   the last number equals it in value (1,000.00 is 1000)
        choice   the first choice named is it
        code     the program text + answer ends without an error within `seconds`; where the answer calls
                 check(...), as HumanEval's does, it is instruction + text + answer
        text     the text equals answer or response, blanks at either end apart
    """
    answer, kind = row["answer"].strip(), kind_of(row["answer"])
    if kind == "number":
        return last_number(text) == Decimal(answer.replace(",", ""))
    if kind == "choice":
        return first_choice(text, answer) == answer.lower()
    if kind == "text":
        return text.strip() in (answer, row.get("response", answer).strip())
    fenced = FENCE.search(text)
    code = fenced.group(1) if fenced else text
    start = row["instruction"] if re.search(r"^check\(", row["answer"], re.MULTILINE) else ""
    return passes(f"{start}{code}\n{row['answer']}\n", seconds)


def passes(program: str, seconds: float) -> bool:
    """Run Python source by run_program.py; True if it ends by itself, without an error, in time.

    Own session, folder and environment, limits, no network where the system can forbid it; all that it
    started is killed at the end. It is no sandbox: the program can read the user's files.
    """
    folder, secret = tempfile.mkdtemp(), secrets.token_hex(16).encode()
    try:
        Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
        child = subprocess.Popen(
            [sys.executable, "-I", str(RUNNER), str(seconds)], cwd=folder, env={}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            with contextlib.suppress(OSError):
                child.stdin.write(secret)
                child.stdin.close()
            child.wait(seconds + 10)
            return child.stdout.read(64) == secret
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
    finally:
        # Whatever the program has made of its folder (too deep for Python, a link to elsewhere), rm
        # follows no link, and a folder that stays behind ends no run.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["rm", "-rf", "--", folder], timeout=60, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)


def isolation() -> str:
    """What a generated program can still do here, in words."""
    alone = passes("assert len(open('/proc/net/dev').readlines()) == 3     # two lines of heading, lo\n", 10)
    return ("generated programs run with limits on time, memory, files and processes, "
            + ("and without network" if alone else "but can use the network")
            + "; they can read and change what this user can: use a machine or container of their own")
