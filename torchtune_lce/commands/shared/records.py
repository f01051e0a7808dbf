"""JSON files: each is there as a whole, or counts as not there."""

import json
import math
import os
from pathlib import Path


def write(record: dict, path: Path) -> None:
    """Puts it at ``path`` once all of it is written: a full disk, or an end half-way, leaves there what was there.

    Null in the place of what is no finite number: JSON has none. Raises OSError where it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> dict | None:
    """None where there is none, or one that breaks off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: not JSON, or not even text
        return None


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
