"""The tables in README.md and tests/bench/README.md are those that the JSON files of tests/bench give."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent / "bench"


def test_tables_are_current():
    """Every number of a table stands on its page as measured; the text is made anew and compared."""
    sys.path.insert(0, str(BENCH))
    import tables
    text = "".join(page.read_text() for page in tables.PAGES)
    assert tables.filled(text) == text, "run python tests/bench/tables.py"
    assert all(f"<!-- {name} -->" in text for name in tables.tables())
