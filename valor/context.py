"""What varies by environment and is never part of a cache key: places, and the pipeline run's id."""

import dataclasses
import os
import re
from pathlib import Path

from valor.errors import UserError, shown

TARGET = "VALOR_TARGET"
"""Environment variable that a compiled pipeline sets: `kfp` or `vertex`; absent on one machine."""
LASTING = ("VALOR_WORK_ROOT", "VALOR_MODELS_ROOT", "MLFLOW_TRACKING_URI")
"""Environment variables that a cluster's tasks need: a pod's own disk dies with it."""


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a stage works.

    Attributes:
        pipeline_run: id of the pipeline run; "" outside a pipeline.
        task: the task's name in the DAG, such as `predict-text`.
        work_root: work in progress of the training stages (a directory or gs://).
        models_root: the immutable model store (a directory or gs://).
        restricted_uri: the pipeline root, under which all artifacts lie, text and images included, so that it must be
            restricted storage; used for links only.
    """

    pipeline_run: str = ""
    task: str = ""
    work_root: str = ""
    models_root: str = ""
    restricted_uri: str = ""

    @classmethod
    def from_environment(cls, *, pipeline_run: str = "", task: str = "") -> "Context":
        """Build a context from VALOR_HOME, VALOR_WORK_ROOT, VALOR_MODELS_ROOT and VALOR_RESTRICTED_URI.

        Raises:
            UserError: a place is neither a directory nor gs:// with a bucket, or is below a file.
        """
        return cls(
            pipeline_run=pipeline_run or os.environ.get("VALOR_PIPELINE_RUN", ""),
            task=task,
            work_root=_place("VALOR_WORK_ROOT", home() / "work"),
            models_root=_place("VALOR_MODELS_ROOT", home() / "models"),
            restricted_uri=os.environ.get("VALOR_RESTRICTED_URI") or str(home() / "pipeline"),
        )


def _place(variable: str, default: Path) -> str:
    """Return where a variable points: gs://, or a local path."""
    value = os.environ.get(variable) or str(default)
    name = variable if os.environ.get(variable) else "VALOR_HOME"
    if value.startswith("gs:"):
        if not re.match(r"gs://[^/]", value):
            raise UserError(f"{name} is {value!r}, which names no bucket; set it to gs://BUCKET/PREFIX")
        return value
    value = value.removeprefix("file://")
    if "://" in value:
        raise UserError(f"{name} is {value!r}; set it to a directory or gs://BUCKET/PREFIX")
    path = Path(value).absolute()
    try:
        taken = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)
    except OSError as error:
        raise UserError(f"{name}: {shown(str(path))}: {error.strerror}; set it to a directory of yours") from None
    if taken:
        raise UserError(f"{name}: {taken} is a file; set it to a directory")
    return value


def missing_places() -> list[str]:
    """Return the names of `LASTING` that the environment lacks."""
    return [name for name in LASTING if not os.environ.get(name)]


def require_lasting_places() -> None:
    """Raise UserError on a cluster where work, models or tracking would go to the pod's own disk."""
    if os.environ.get(TARGET) and (missing := missing_places()):
        raise UserError(
            f"{', '.join(missing)}: not set, so work, models or runs would be lost with the pod; compile with "
            f"--env {missing[0]}=... for each of them"
        )


def home() -> Path:
    """Return the local home, `VALOR_HOME` or `.valor` in the current directory, as an absolute path."""
    return Path(os.environ.get("VALOR_HOME") or ".valor").absolute()
