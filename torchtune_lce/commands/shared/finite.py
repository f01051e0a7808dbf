"""Numbers for JSON, which has no NaN and no infinity."""

import math


def finite(value):
    """``value``, of lists and dictionaries, with None in the place of what is no finite number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
