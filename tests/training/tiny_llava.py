"""A random-init tiny LLaVA and a handmade dataset: real classes, real files, small enough to train in seconds."""

import atexit
import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from valor import artifacts
from valor.data import manifest

PROMPT = "Describe the findings and impression."
WORDS = ("left", "right", "small", "large", "pleural effusion", "pneumothorax", "cardiomegaly", "no")


def report(rng: np.random.Generator) -> tuple[str, str]:
    side, size, finding = rng.choice(WORDS[:2]), rng.choice(WORDS[2:4]), rng.choice(WORDS[4:7])
    return f"There is a {size} {side} {finding}.", f"{finding} on the {side}."


def write_dataset(path: Path, *, train: int = 12, val: int = 0, test: int = 3, image_px: int = 48) -> Path:
    rng = np.random.default_rng(5)
    path.mkdir(parents=True)
    digests, splits = [], ["train"] * train + ["val"] * val + ["test"] * test
    with manifest.TableWriter(path / "shard-0.parquet", manifest.SCHEMA) as table:
        for i, split in enumerate(splits):
            pixels = rng.integers(0, 255, (image_px, image_px), dtype=np.uint8)
            image = manifest.StudyImage(manifest.encode_image(pixels), f"{i}.dcm", str(i), "PA", "{}")
            findings, impression = report(rng)
            study = manifest.Study(
                study_id=f"s{i:04d}", subject_id=f"p{i:04d}", images=(image,), findings=findings,
                impression=impression, indication=None, comparison=None, sex=None, age_band=None, device=None,
                split=split, source_digest="0",
            )  # fmt: skip
            table.write(study)
            digests.append(manifest.row_digest(study))
    digest = manifest.dataset_digest(digests)
    info = {
        "schema_version": manifest.SCHEMA_VERSION,
        "digest": digest,
        "studies": {"train": train, "val": val, "test": test},
    }
    artifacts.write_json(path / manifest.DATASET_INFO, info)
    artifacts.stamp(path, kind="dataset", stage="validate_data", digest=digest)
    return path


def texts() -> list[str]:
    rng = np.random.default_rng(1)
    return [manifest.report_text(*report(rng)) for _ in range(200)] + [PROMPT]


def write_policy(path: Path, *, prompt: str = PROMPT) -> Path:
    """Write a tiny LLaVA with random weights as a checkpoint artifact."""
    from valor.models.loading import save_policy
    from valor.models.tiny import build_llava
    from valor.recipe import PhantomBase

    sizes = PhantomBase(image_px=48, vision_width=32, vision_layers=2, text_width=32, text_layers=2, vocab=400)
    model, processor = build_llava(sizes, texts(), seed=0)
    path.mkdir(parents=True)
    save_policy(model, processor, path, stage="fetch_models", parents={}, prompt=prompt)
    artifacts.stamp(path, kind="base", stage="fetch_models")
    return path


def gate_of(**content: object) -> dict[str, object]:
    """Return the content of a gate that masks nothing and calibrates nothing, but for what is given."""
    nothing = {"paper": None, "statements": None}
    return {
        "measured": True, "studies": 0, "masked": [], "masked_sides": [], "calibration": {}, "findings": {},
        "paraphrase_noise": nothing, "overall": {}, "prefers": {}, **content,
    }  # fmt: skip


def write_expert(path: Path) -> Path:
    """Write a tiny CLIP with random weights and a gate: a dual encoder whose opinions are arbitrary but fixed."""
    from valor.clinical.vocabulary import OBSERVATIONS
    from valor.models.gate_file import GATE_FILE
    from valor.models.tiny import build_clip
    from valor.recipe import PhantomExpert

    sizes = PhantomExpert(image_px=48, vision_width=32, vision_layers=2, text_width=32, text_layers=2, vocab=400)
    path.mkdir(parents=True)
    for part in build_clip(sizes, texts(), seed=3):
        part.save_pretrained(path)
    place = {"scale": 20.0, "bias": [0.0] * 3, "prior": [1 / 3] * 3}
    calibration = {finding: {"scale": 50.0, "bias": 0.0, "side": place, "zone": place} for finding in OBSERVATIONS}
    noise = {"paper": 1e-4, "statements": 1e-3}
    artifacts.write_json(path / GATE_FILE, gate_of(calibration=calibration, paraphrase_noise=noise))
    artifacts.write_checkpoint_info(path, stage="fetch_models", parents={})
    artifacts.stamp(path, kind="expert", stage="fetch_models")
    return path


def write_parent(path: Path, *, base: Path, dataset: Path, steps: int = 150) -> Path:
    """Write what SFT makes of the base: it ends its reports and varies them, so GRPO has something to choose from."""
    from valor.context import Context
    from valor.recipe import SftSettings
    from valor.stages.sft import sft

    trainer = {"max_steps": steps, "per_device_train_batch_size": 12, "learning_rate": 5e-3, "save_strategy": "no"}
    settings = SftSettings(trainer=trainer)
    sft(
        settings,
        dataset=dataset,
        base=base,
        checkpoint=path,
        context=Context(work_root=str(path.with_name("sft-work"))),
    )
    artifacts.stamp(path, kind="checkpoint", stage="sft")
    return path


class World(NamedTuple):
    """What the tests of one process share, made when first asked for and read only."""

    dataset: Path
    base: Path
    parent: Path
    expert: Path


@functools.cache
def world() -> World:
    folder = tempfile.TemporaryDirectory(prefix="valor-tiny-")
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    dataset, base = write_dataset(root / "dataset"), write_policy(root / "base")
    parent = write_parent(root / "parent", base=base, dataset=dataset)
    return World(dataset=dataset, base=base, parent=parent, expert=write_expert(root / "expert"))
