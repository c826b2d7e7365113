"""Runs the checks of a chapter's exercises on a file of answers.

    python tutorial/exercises/03_muted_layer.py my_answers.py

The file defines answer_1, answer_2, answer_3, or those of them that are done.
"""

import importlib.util
import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TUTORIAL), str(TUTORIAL.parent)]        # lesson.py, hd_pissa.py


def load(path):
    """The Python file at `path` as a module, whatever its name."""
    spec = importlib.util.spec_from_file_location(f"answers_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(checks: dict, argv=None) -> None:
    """Check the answers in the file named on the command line; exit 1 unless all are right.

    checks   the globals of an exercise module: check_1, check_2, check_3
    """
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        sys.exit("give one file that defines answer_1, answer_2, answer_3")
    answers, right, numbers = load(argv[0]), 0, [n for n in range(1, 10) if f"check_{n}" in checks]
    for n in numbers:
        answer = getattr(answers, f"answer_{n}", None)
        if answer is None:
            print(f"exercise {n}: no answer_{n} in {argv[0]} yet")
            continue
        try:
            checks[f"check_{n}"](answer)
        except AssertionError as wrong:
            print(f"exercise {n}: not yet. {wrong}")
        except Exception as error:      # the reader's own mistake; its kind and text are the help
            print(f"exercise {n}: {type(error).__name__}: {error}")
        else:
            right += 1
            print(f"exercise {n}: right")
    sys.exit(right < len(numbers))
