"""Measure the gate of an expert from outside on a dataset, for `valor expert-gate`."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from valor import artifacts, progress
from valor.errors import UserError
from valor.recipe import ModelSettings

MIN_STUDIES = 50
"""Below, no finding but the most frequent ones has the cases that its gate asks for."""


def measure_gate(
    settings: ModelSettings, *, dataset: Path, split: str, studies: int, seed: int, out: Path
) -> dict[str, Any]:
    """Write an expert with its gate, measured on held-out studies of a dataset, and return the gate.

    Args:
        settings: `expert`, `expert_revision` and the thresholds, `expert_gate`.
        dataset: a dataset artifact; its studies must be unknown to the expert, which nobody can see from its weights.
        split: `val` or `test`; the policy trains on `train`.
        studies: how many, drawn by `seed`; 0 means all.
        seed: of the draw.
        out: the directory to make: the expert's files and `expert_gate.json`, for `models.expert`.

    Raises:
        UserError: no such expert or no dual encoder, `out` is not empty, or too few studies.
        IntegrityError: the weights or the dataset are damaged.
    """
    import torch

    from valor.data.manifest import choose_studies, first_pixels, read_studies
    from valor.models import expert_gate
    from valor.models.expert import BATCH, GATE_FILE, Expert
    from valor.stages.fetch_models import fetch_outside

    if settings.expert == "phantom":
        raise UserError("EXPERT is 'phantom', which gets its gate when it is trained; name one from outside")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not an empty directory; name a new one")
    stamp = artifacts.read_stamp(dataset)
    artifacts.verify_files(dataset, stamp)
    chosen = choose_studies(read_studies(dataset, split=split), studies=studies, seed=seed)
    if len(chosen) < MIN_STUDIES:
        raise UserError(
            f"{dataset}: {len(chosen)} studies of split {split!r} are too few to judge an expert, at least "
            f"{MIN_STUDIES}; take --split test, more --studies, or a larger dataset"
        )
    with tempfile.TemporaryDirectory() as scratch:
        fetched = Path(scratch) / "expert"
        fetch_outside("expert", settings, fetched)
        expert = Expert.load(fetched)
        embeds = []
        for start in range(0, len(chosen), BATCH):
            embeds.append(expert.embed_images([first_pixels(study) for study in chosen[start : start + BATCH]]))
            progress.report(min(start + BATCH, len(chosen)), len(chosen), unit="images")
        gate = expert_gate.measure(expert, torch.cat(embeds), [study.text for study in chosen], settings.expert_gate)
        gate |= {"dataset": stamp["digest"], "split": split}
        artifacts.write_json(fetched / GATE_FILE, gate)
        with artifacts.atomic_dir(out) as partial:
            shutil.copytree(fetched, partial, dirs_exist_ok=True)
    return gate
