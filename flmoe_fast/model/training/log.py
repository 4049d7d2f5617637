"""Records of a training run as files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flmoe_fast.files import replacing


def write_log(path: str | os.PathLike, history: Sequence[Mapping[str, Any]], expert_names: Sequence[str]) -> None:
    """Write training records, one line an epoch: JSON, or a flat table for a name ending in ``.csv``."""
    with replacing(path, "w") as file:
        if Path(path).suffix == ".jsonl":
            file.writelines(json.dumps(record) + "\n" for record in history)
            return
        rows = []
        for record in history:
            flat = {key: value for key, value in record.items() if not isinstance(value, (list, dict))}
            named = zip(expert_names, record["interaction_losses"])
            flat |= {f"interaction_loss {name}": value for name, value in named}
            flat |= {f"validation {name}": value for name, value in record.get("validation", {}).items()}
            rows.append(flat)
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
