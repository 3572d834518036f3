"""A tiny recipe, and the command line and environment that run it as a person would."""

import os
import sys
from pathlib import Path

TINY = (
    "data.phantom.train=6", "data.phantom.val=2", "data.phantom.test=4", "data.phantom.image_px=64",
    "data.image_px=32", "data.shards=2",
)  # fmt: skip
"""Twelve studies: the data gate refuses them (exit code 3), which ends a run before any model."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *arguments]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "VALOR_HOME": str(home), "OMP_NUM_THREADS": "1", "VALOR_TRACKING": "off"}


def tiny_run(*overrides: str) -> list[str]:
    return ["run", "phantom", *(part for pair in (*TINY, *overrides) for part in ("--set", pair))]
