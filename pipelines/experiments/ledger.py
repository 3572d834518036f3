"""When which code and plan may have seen a seed's test studies: a line for each, appended before and never changed.

Results can be deleted and made again, and rates and rewards changed in between; that they were is told here.
"""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.experiments.arms import ARMS, Seed, curves
from pipelines.experiments.execute import code_digest
from valor import artifacts
from valor.errors import UserError, shown
from valor.tracking.runs import code_identity

_NAME = "opened.jsonl"
_KEYS = {"seed": int, "date": str, "code": str, "plan": str, "commit": str}


def append(folder: Path, seeds: Sequence[int]) -> None:
    """Append a line for each of the seeds that this code has not opened yet with this plan."""
    code, commit = code_digest(), code_identity()["commit"]
    opened = {(row["seed"], row["code"], row["plan"]) for row in read(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _NAME).open("a", encoding="utf-8") as file:
        for seed in seeds:
            row = {"seed": seed, "date": datetime.now(UTC).date().isoformat(), "code": code, "plan": plan(seed)}
            if (seed, code, row["plan"]) not in opened:
                file.write(json.dumps({**row, "commit": commit}) + "\n")
        # Nothing may be opened before its line is there to stay.
        file.flush()
        os.fsync(file.fileno())


def plan(seed: int) -> str:
    """Return the digest of everything that a seed is asked for: data, models, schedules, rewards, measurements."""
    one = Seed(seed)
    jobs = [*(arm.reports(one) for arm in ARMS.values()), *curves(one).values(), one.probe(), one.signal()]
    return artifacts.digest_value([job.key for job in jobs])[:12]


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines: seed, date, code, plan and commit of each time.

    Raises:
        UserError: a line is cut or lacks one of these.
    """
    path = folder / _NAME
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [_row(line, where=f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _row(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or any(not isinstance(row.get(key), kind) for key, kind in _KEYS.items()):
        raise UserError(
            f"{where}: {shown(repr(line))} is no JSON object of {', '.join(_KEYS)}; restore the line from version "
            "control, or delete it if it is the last one and cut: nothing is run before its line is whole"
        )
    return row
