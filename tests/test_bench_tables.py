"""The tables in tests/bench/README.md are those that its JSON files give."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent / "bench"


def test_tables_are_current():
    """Every number of a table stands in README.md as measured; the text is made anew and compared."""
    sys.path.insert(0, str(BENCH))
    import tables
    text = (BENCH / "README.md").read_text()
    assert tables.filled(text) == text, "run python tests/bench/tables.py"
    assert text.count("<!-- end -->") == len(tables.tables()) == 8
