"""What is vendored is what its list says: name, version, licence and sum of every file, and no file besides."""

import hashlib
import json
from pathlib import Path

import pytest

from jilju import view

FOLDERS = (view.DIRECTORY / "vendor", Path(__file__).parent / "vendor")


@pytest.mark.parametrize("folder", FOLDERS, ids=("pages", "tests"))
def test_every_vendored_file_is_listed_with_licence_and_sum(folder):
    entries = json.loads((folder / "versions.json").read_text())
    assert len(entries) > 0
    for entry in entries:
        assert entry["name"] and entry["version"] and entry["licence"], entry
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"], entry["file"]
        assert entry["version"] in (folder / entry["file"]).read_text(encoding="utf-8"), entry["file"]
        assert len((folder / entry["licence_file"]).read_text(encoding="utf-8")) > 500, entry["licence_file"]
    listed = {entry[key] for entry in entries for key in ("file", "licence_file")} | {"versions.json"}
    assert {path.name for path in folder.iterdir()} == listed
