"""Look at the source and the champion before anything else runs; never cached, so new data is always seen."""

import logging
from pathlib import Path

from valor import artifacts, storage
from valor.context import Context, require_lasting_places
from valor.data.shards import plan_shards
from valor.errors import UserError
from valor.evaluation import gate_rules
from valor.models import gate_file, resolve
from valor.models.statements import require_rewarded
from valor.recipe import DataSettings, check_publishing, parse_section
from valor.stages import StageResult

log = logging.getLogger(__name__)


def preflight(
    settings: DataSettings,
    *,
    root: str,
    annotations_root: str,
    public: str,
    publish_text: str,
    model_name: str,
    models: str,
    gate: str,
    vision: str,
    context: Context,
) -> StageResult:
    """Return the source's digest, its shards, the outside models' digest and the current champion.

    Args:
        settings: the recipe's `data` section.
        root: directory, gs:// address, or `phantom`.
        annotations_root: place of annotations.parquet and truth.parquet, "" for none.
        public: "true" where the data's owner lets everyone see it.
        publish_text: "true" where a later stage shows text or images: a compiled pipeline takes another root than the
            one it was checked with.
        model_name: the registered model whose champion the candidate will meet.
        models: the recipe's `models` section as JSON: where base, expert and judge come from.
        gate: its `gate` section as JSON; the rules must be such that they can be judged.
        vision: its `grpo_vision` section as JSON; what it rewards must be there.
        context: where the stage runs.

    Returns:
        values `source_digest`, `shards` (JSON list of {"index", "count", "digest"}, empty shards left out),
        `models_digest` (of the listings of models in a directory or at gs://), `champion_uri` and `champion_digest`
        ("" where there is no champion).

    Raises:
        UserError: no data root, no study in it, its text would be shown though it is not public, the gate's
            rules cannot be judged, the expert's gate leaves stage 2 nothing to reward, a model has no pinned revision,
            or a cluster's tasks have no lasting place for work, models and runs.
    """
    from valor.tracking.registry import champion

    require_lasting_places()
    check_publishing("publish_text", publish_text == "true", root=root, public=public == "true", source="preflight")
    shards, studies = plan_shards(root, annotations_root=annotations_root, settings=settings)
    wanted = parse_section("fetch_models", models)
    for setting in ("base", "expert", "judge"):
        if place := getattr(wanted, setting):
            resolve.check(place, revision=getattr(wanted, f"{setting}_revision"), setting=f"models.{setting}")
    if parse_section("grpo_vision", vision).similarity == "statements":
        _require_gate(wanted.expert)
    annotated = root == "phantom" or bool(annotations_root)
    gate_rules.check(parse_section("gate", gate), gate_rules.metrics_to_come(annotated=annotated))
    champion_uri, champion_digest = champion(model_name)
    source_digest = artifacts.digest_value([shard.digest for shard in shards])
    log.info("%s: %d studies in %d shards, source digest %s", root, studies, len(shards), source_digest[:12])
    return StageResult(
        metrics={"source_studies": studies, "shards": len(shards)},
        values={
            "source_digest": source_digest,
            "shards": f"[{','.join(shard.to_json() for shard in shards)}]",
            "models_digest": artifacts.digest_value(
                [_model_identity(place) for place in (wanted.base, wanted.expert, wanted.judge) if place]
            ),
            "champion_uri": champion_uri,
            "champion_digest": champion_digest,
        },
    )


def _require_gate(place: str) -> None:
    """Refuse an expert in a directory or at gs:// whose statements stage 2 could not reward, hours from now.

    A hub's expert is not there yet, and the phantom's has no gate before it is trained.
    """
    if place == "phantom" or not (storage.is_remote(place) or Path(place).is_dir()):
        return
    path = storage.join(place, gate_file.GATE_FILE)
    gate = gate_file.parse(storage.read_bytes(path), place=path) if storage.exists(path) else gate_file.UNMEASURED
    try:
        require_rewarded(gate)
    except UserError as error:
        raise UserError(f"models.expert {place!r}: {error}") from None


def _model_identity(place: str) -> list[tuple[str, int, str]]:
    """Return the listing of a model's directory or gs:// address; a hub id has none, its revision pins it."""
    return storage.listing(place) if storage.is_remote(place) or Path(place).is_dir() else []
