"""Measure the gate of an expert from outside on a dataset, for `valor expert-gate`."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from valor import artifacts, progress, storage
from valor.errors import ResourceError, UserError, ValorError, shown
from valor.interruption import sigterm_interrupts
from valor.recipe import ModelSettings

SPLIT = "val"
"""No stage trains on it, and the release gate judges by `test`, which must not shape a reward."""
MIN_STUDIES = 50
"""Below, no finding but the most frequent ones has the cases that its gate asks for."""


def measure_gate(settings: ModelSettings, *, dataset: Path, studies: int, seed: int, out: Path) -> dict[str, Any]:
    """Write an expert with its gate, measured on validation studies of a dataset, and return the gate.

    Args:
        settings: `expert`, `expert_revision` and the thresholds, `expert_gate`.
        dataset: a dataset artifact; its studies must be unknown to the expert, which nobody can see from its weights.
        studies: how many at most, drawn by `seed`; 0 means all.
        seed: of the draw.
        out: the directory to make: the expert's files and `expert_gate.json`, for `models.expert`.

    Raises:
        UserError: no such expert, no dual encoder or one whose parts do not fit each other, no dataset, `out` is there,
            or too few studies.
        IntegrityError: the weights or the dataset are damaged.
        ServiceError: the hub or the store cannot be reached.
        ResourceError: out of memory or disk.
        Interrupted: SIGTERM.
    """
    from valor.models.expert import Expert
    from valor.models.gate_file import GATE_FILE
    from valor.stages.fetch_models import fetch_outside, naming

    out = out.resolve()
    stamp = _checked(settings, dataset, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:100]}-")
    told_to_end = sigterm_interrupts("expert-gate: told to end; run again")
    with told_to_end, _withholding_messages(), artifacts.full_disk_is_a_resource_error(out), scratch as folder:
        fetched = Path(folder) / "expert"
        fetch_outside("expert", settings, fetched)
        # One that it brought along is of other studies.
        (fetched / GATE_FILE).unlink(missing_ok=True)
        with naming(f"EXPERT {settings.expert!r}", fetched):
            expert = Expert.load(fetched)
            expert.require_fit(fetched)
        artifacts.verify_files(dataset, stamp)
        gate = _measured(expert, dataset, settings=settings, studies=studies, seed=seed)
        gate |= {"dataset": stamp["digest"], "split": SPLIT}
        artifacts.write_json(fetched / GATE_FILE, gate)
        artifacts.stamp(fetched, kind="expert", stage="expert-gate", parents={"dataset": stamp["digest"]})
        _put(fetched, out)
    return gate


def _checked(settings: ModelSettings, dataset: Path, out: Path) -> dict[str, Any]:
    """Refuse what would fail after minutes, and return the dataset's stamp."""
    from valor.models import resolve

    if settings.expert == "phantom":
        raise UserError("EXPERT is 'phantom', which gets its gate when it is trained; name one from outside")
    resolve.check(settings.expert, revision=settings.expert_revision, setting="EXPERT")
    if out.exists():
        raise UserError(f"{shown(str(out))}: is there already; name a new directory")
    taken = [dataset] if storage.is_remote(settings.expert) else [dataset, Path(settings.expert)]
    for place in taken:
        if out.is_relative_to(place.resolve()):
            raise UserError(f"{shown(str(out))}: lies inside {place}, which it would alter; name another place")
    if not (dataset / artifacts.STAMP).is_file():
        raise UserError(f"{dataset}: holds no artifact; give `validate-data/dataset` of a run")
    stamp = artifacts.read_stamp(dataset)
    if stamp["kind"] != "dataset":
        raise UserError(f"{dataset}: is the artifact {stamp['kind']!r}; give `validate-data/dataset` of a run")
    return stamp


def _measured(expert: Any, dataset: Path, *, settings: ModelSettings, studies: int, seed: int) -> dict[str, Any]:
    import torch

    from valor.data.manifest import choose_studies, first_pixels, read_studies
    from valor.models import expert_gate
    from valor.models.expert import BATCH

    every = read_studies(dataset, split=SPLIT)
    chosen = choose_studies(every, studies=studies, seed=seed)
    if len(chosen) < MIN_STUDIES:
        fix = "raise --studies" if len(every) >= MIN_STUDIES else "take a dataset with more of them"
        raise UserError(
            f"{dataset}: {len(chosen)} studies of split {SPLIT!r} are too few to judge an expert, at least "
            f"{MIN_STUDIES}; {fix}"
        )
    embeds = []
    for start in range(0, len(chosen), BATCH):
        embeds.append(expert.embed_images([first_pixels(study) for study in chosen[start : start + BATCH]]))
        progress.report(min(start + BATCH, len(chosen)), len(chosen), unit="images")
    return expert_gate.measure(expert, torch.cat(embeds), [study.text for study in chosen], settings.expert_gate)


def _put(fetched: Path, out: Path) -> None:
    """Move the finished directory to its place, where nobody has put anything meanwhile."""
    try:
        fetched.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"{shown(str(out))}: has been made by somebody else meanwhile; name a new directory") from error


@contextlib.contextmanager
def _withholding_messages() -> Iterator[None]:
    """Tell of an unexpected error by its type alone: what it says may quote a report."""
    import torch

    from valor.stages import print_traceback

    try:
        yield
    except (ValorError, OSError):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError("expert-gate: out of memory; lower --studies, or use a larger machine") from error
    except Exception as error:
        print_traceback(error)
        raise ValorError(f"expert-gate: {type(error).__name__}; see the traceback") from None
