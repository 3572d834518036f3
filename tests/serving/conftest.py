"""A tiny checkpoint with random weights and one phantom DICOM: real files, seconds to make."""

from pathlib import Path

import pytest

from valor import artifacts, recipe, storage

SIZES = recipe.PhantomBase(
    image_px=48, patch_px=12, vision_width=32, vision_layers=1, text_width=32, text_layers=1, vocab=400
)
TEXTS = ["FINDINGS: There is a small left pleural effusion. IMPRESSION: Effusion.", "No pneumothorax."] * 20


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from valor.models.loading import save_policy
    from valor.models.tiny import build_llava

    path = tmp_path_factory.mktemp("checkpoint") / "text"
    path.mkdir()
    model, processor = build_llava(SIZES, TEXTS, seed=1)
    prompt = recipe.ModelSettings().prompt
    save_policy(model, processor, path, stage="sft", parents={}, prompt=prompt, settings={"max_new_tokens": 12})
    artifacts.stamp(path, kind="checkpoint", stage="sft")
    return path


@pytest.fixture
def stored(checkpoint: Path, tmp_path: Path) -> tuple[str, str]:
    """The checkpoint in a model store of its own: (uri, digest)."""
    digest = artifacts.digest_dir(checkpoint)
    uri = storage.join(tmp_path / "models", digest)
    storage.put_dir(checkpoint, uri)
    return uri, digest


@pytest.fixture(scope="session")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from valor.data import phantom

    root = tmp_path_factory.mktemp("phantom")
    settings = recipe.PhantomStudies(seed=5, train=1, val=0, test=0, image_px=128)
    studies = [phantom.draw(key, settings) for key in phantom.plan(settings)]
    phantom.write(studies, root=root, annotations_root=root / "truth", settings=settings)
    return next(root.rglob("*.dcm")).read_bytes()
