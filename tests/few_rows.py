"""ROWS, a file of 400 embedded rows: to read all 8,000 takes two thirds of a run of two steps."""

import tempfile
from pathlib import Path

from conftest import ROOT

_folder = tempfile.TemporaryDirectory()         # removed when this process ends
ROWS = Path(_folder.name, "rows.jsonl")
with open(ROOT / "data" / "multi_domain.jsonl") as _all:
    ROWS.write_text("".join(list(_all)[::20]))
