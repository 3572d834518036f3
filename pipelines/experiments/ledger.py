"""When which code may have seen a seed's test studies: a line for each time, appended before and never changed.

Results can be deleted and made again; that they were is told here.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.experiments.execute import code_digest
from valor.tracking.runs import code_identity

_NAME = "opened.jsonl"


def append(folder: Path, seeds: Sequence[int]) -> None:
    """Append a line for each of the seeds that this code has not opened yet."""
    code, commit = code_digest(), code_identity()["commit"]
    opened = {(row["seed"], row["code"]) for row in read(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _NAME).open("a", encoding="utf-8") as file:
        for seed in seeds:
            if (seed, code) not in opened:
                row = {"seed": seed, "date": datetime.now(UTC).date().isoformat(), "code": code, "commit": commit}
                file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines: seed, date, code and commit of each time."""
    path = folder / _NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
