"""JSON files that a later call reads again: each is there as a whole, or counts as not there."""

import json
import os
from pathlib import Path


def write(record: dict, path: Path) -> None:
    """Puts it at ``path`` once all of it is written: a full disk, or an end half-way, leaves there what was there."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> dict | None:
    """None where there is none, or one that breaks off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: not JSON, or not even text
        return None
