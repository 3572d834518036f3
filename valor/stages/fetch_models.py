"""Fetch models: base, expert and judge as verified checkpoint directories, from a place or trained on the phantom.

A model that is trained here is kept in `work_root/models/<digest of settings and code>`, each on its own, so neither
a killed task nor a lost pipeline cache trains it twice.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from valor import artifacts, progress, storage
from valor.context import Context
from valor.errors import IntegrityError, UserError
from valor.models import expert_gate, gate_file
from valor.models.expert import Expert, require_dual_encoder
from valor.models.loading import load_processor, write_prompt
from valor.models.resolve import resolve
from valor.models.tokens import IMAGE
from valor.models.train import settings_of, train_phantoms
from valor.recipe import ModelSettings, PhantomStudies
from valor.stages import StageResult

log = logging.getLogger(__name__)

_CODE = ("models", "clinical", "data/phantom", "data/manifest.py", "recipe/values.py")
"""Packages and modules of valor that a phantom model's weights depend on."""
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "scipy", "scikit-learn")
"""Libraries that draw, tokenize, train and measure."""


def fetch_models(
    settings: ModelSettings, *, base: Path, expert: Path, judge: Path, models_digest: str, context: Context
) -> StageResult:
    """Write the checkpoints `base`, `expert` and `judge`.

    Args:
        settings: the recipe's `models` section.
        base: the directory to make for the vision-language model; its `prompt.json` holds the prompt.
        expert: the directory to make for the dual encoder and its `expert_gate.json`.
        judge: the directory to make for the dual encoder that scores similarity; without one, a copy of the expert.
        models_digest: what preflight saw at their places; it makes other weights at the same address new work.
        context: `work_root` keeps phantom models between runs.

    Raises:
        UserError: no such model, a hub id without a commit hash, an expert or judge that is no dual encoder or whose
            parts do not fit each other, or a base whose prompt and chat template ask about no image or several.
        IntegrityError: weights do not match their recorded sha256.
        ServiceError: the hub or the store cannot be reached.
    """
    if settings.base == "phantom" and IMAGE in settings.prompt:
        raise UserError(
            f"models.prompt holds {IMAGE!r}, which stands for the image; leave it out, the template adds it"
        )
    paths = {"base": base, "expert": expert, "judge": judge}
    # Before training: a wrong place for one model should not cost the other's minutes.
    for kind in ("judge", "expert", "base"):
        if getattr(settings, kind) not in ("", "phantom"):
            fetch_outside(kind, settings, paths[kind])
            if kind != "base":
                with naming(f"models.{kind} {getattr(settings, kind)!r}", paths[kind]):
                    Expert.load(paths[kind]).require_fit(paths[kind])
    _phantoms(settings, paths, context)
    if not settings.judge:
        log.info("models.judge is not set: the expert scores its own pupil, so similarity is circular")
        with artifacts.atomic_dir(judge) as partial:
            shutil.copytree(expert, partial, dirs_exist_ok=True)
    values = {}
    gate = gate_file.read(expert)
    if gate["measured"]:
        log.info("%s", expert_gate.show(gate))
        values = expert_gate.metrics(gate)
    else:
        log.info("the expert came without a measured gate: only grpo_vision.similarity: paper can use it")
    return StageResult(metrics=values)


def fetch_outside(kind: str, settings: ModelSettings, path: Path) -> None:
    """Fetch the model of a kind (`base`, `expert`, `judge`) from outside and give it a `valor.json`.

    Raises:
        UserError: as for `fetch_models`.
        IntegrityError: a `valor.json` that it brought names other weights.
        ServiceError: the hub or the store cannot be reached.
    """
    source, revision = getattr(settings, kind), getattr(settings, f"{kind}_revision")
    progress.report(0, 1, unit=f"{kind} fetched")
    with artifacts.atomic_dir(path) as partial:
        origin = resolve(source, revision=revision, setting=f"models.{kind}", path=partial)
        with naming(f"models.{kind} {source!r}", partial):
            _require_image_text(partial) if kind == "base" else require_dual_encoder(partial)
            parents: dict[str, str] = {}
            if (partial / artifacts.CHECKPOINT_INFO).exists():
                artifacts.load_checkpoint_info(partial)
                parents = {"source": artifacts.digest_file(partial / artifacts.CHECKPOINT_INFO)}
            if kind == "base":
                write_prompt(partial, settings.prompt)
                load_processor(partial)
            artifacts.write_checkpoint_info(partial, stage="fetch_models", parents=parents, origin=origin)
    progress.report(1, 1, unit=f"{kind} fetched")


@contextlib.contextmanager
def naming(what: str, copy: Path) -> Iterator[None]:
    """Let an error name what the user gave instead of the copy of it, which is gone when the error is read."""
    try:
        yield
    except (UserError, IntegrityError) as error:
        raise type(error)(str(error).replace(str(copy), what)) from error


def phantom_key(kind: str, settings: ModelSettings) -> str:
    """Return the digest that a trained phantom model is kept under: its settings, the seed, the code, the libraries."""
    settings = settings_of(kind, settings)
    kind = "base" if kind == "base" else "expert"
    own = {f"phantom_{kind}": getattr(settings, f"phantom_{kind}").model_dump(), "seed": settings.seed}
    own |= {"prompt": settings.prompt} if kind == "base" else {"gate": settings.expert_gate.model_dump()}
    # The reports' noise is the default of phantom studies, no setting of the model.
    own |= {"noise": PhantomStudies().noise.model_dump(mode="json")}
    return artifacts.digest_value([kind, own, artifacts.digest_code(_CODE, _LIBRARIES)])


def _phantoms(settings: ModelSettings, paths: dict[str, Path], context: Context) -> None:
    """Copy the phantom models from the store; train those that it lacks, all at once."""

    wanted = [kind for kind in paths if getattr(settings, kind) == "phantom"]
    uris = {kind: storage.join(context.work_root, "models", phantom_key(kind, settings)) for kind in wanted}
    missing = [kind for kind in wanted if not storage.get_kept(uris[kind], paths[kind])]
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {kind: (settings.model_dump(mode="json"), Path(scratch) / kind) for kind in missing}
        train_phantoms(jobs, work=Path(scratch), done=lambda kind: storage.keep(jobs[kind][1], uris[kind]))
    for kind in wanted:
        log.info("%s: %s at %s", kind, "trained and kept" if kind in missing else "reused", uris[kind])
        if kind in missing:
            storage.get_dir(uris[kind], paths[kind])
        artifacts.load_checkpoint_info(paths[kind])


def _require_image_text(path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no model configuration that transformers knows ({type(error).__name__})") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"{path}: model_type is {config.model_type!r}, which reads no image; the base must be an "
            "image-text-to-text model such as llava"
        )
