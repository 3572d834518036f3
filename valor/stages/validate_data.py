"""Join the shards into the dataset artifact, gather facts about it and hold the data gate.

A failing gate is a DataError before any training; facts, quarantine and Data Docs are written first and stay. The
outputs are made one after another: `data_docs` is there even where `dataset` is not.
"""

import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valor import artifacts, progress
from valor.context import Context
from valor.data import checks
from valor.data import evidence as tables
from valor.data.data_docs import write_page
from valor.data.facts import Facts, gather
from valor.data.manifest import DATASET_INFO, QUARANTINE, SCHEMA_VERSION, SPLITS, dataset_digest, iter_studies
from valor.errors import DataError, IntegrityError, UserError
from valor.recipe import DataSettings
from valor.stages import StageResult
from valor.stages.ingest import SHARD_INFO, STUDIES

log = logging.getLogger(__name__)


def validate_data(
    settings: DataSettings, *, shards: list[Path], dataset: Path, evidence: Path, data_docs: Path, context: Context
) -> StageResult:
    """Make the dataset and evidence artifacts and the Data Docs from ingested shards.

    Args:
        settings: the recipe's `data` section.
        shards: outputs of `ingest`, in any order.
        dataset: directory to make: Parquet shards, quarantine.parquet, dataset.json.
        evidence: directory to make: annotations.parquet, truth.parquet, pairs.parquet.
        data_docs: directory to make: index.html, facts, Great Expectations' pages; also on failure.
        context: where the stage runs.

    Raises:
        DataError: every study was rejected, or a check failed; the line names check, count and fix.
        IntegrityError: a shard is of another schema version, or was ingested with another image size.
    """
    infos = [_shard_info(shard, settings=settings) for shard in shards]
    shards = [shard for _, shard in sorted(zip(infos, shards, strict=True), key=lambda pair: pair[0]["index"])]
    quarantine = pa.concat_tables([pq.read_table(shard / QUARANTINE) for shard in shards]).sort_by(
        [("study_id", "ascending"), ("path", "ascending")]
    )
    kept, seen = sum(info["kept"] for info in infos), sum(info["studies"] for info in infos)
    gathered = gather(
        iter_studies(shard / STUDIES for shard in shards),
        quarantined=seen - kept,
        progress=lambda done: progress.report(done, kept, unit="studies"),
    )
    digest = dataset_digest(gathered.row_digests)
    _gate(gathered, digest=digest, quarantine=quarantine, settings=settings, output=data_docs)
    info = {
        "schema_version": SCHEMA_VERSION,
        "digest": digest,
        "studies": _counts(gathered, "studies"),
        "subjects": _counts(gathered, "subjects"),
        "image_px": settings.image_px,
        "quarantine": dict(sorted(Counter(quarantine["reason"].to_pylist()).items())),
        "quarantined_studies": seen - kept,
        "source": {"layout": infos[0]["layout"], "phantom": infos[0]["phantom"]},
    }
    _write_dataset(dataset, shards=shards, quarantine=quarantine, info=info)
    _write_evidence(evidence, shards=shards)
    return StageResult(
        metrics={name: float(value) for name, value in gathered.overall.iloc[0].items()},
        digests={"dataset": digest},
        notes={"dataset": digest, "quarantine": info["quarantine"]},
    )


def _shard_info(shard: Path, *, settings: DataSettings) -> dict[str, Any]:
    info = artifacts.read_json(shard / SHARD_INFO)
    expected = {"schema_version": SCHEMA_VERSION, "image_px": settings.image_px}
    for name, value in expected.items():
        if info.get(name) != value:
            raise IntegrityError(f"{shard}: {name} is {info.get(name)}, expected {value}; ingest this shard again")
    return info


def _gate(facts: Facts, *, digest: str, quarantine: pa.Table, settings: DataSettings, output: Path) -> None:
    """Run the checks, write the Data Docs, then raise DataError where the data must not be trained on."""
    with artifacts.atomic_dir(output) as folder:
        facts.write(folder)
        pq.write_table(quarantine, folder / QUARANTINE)
        outcomes = checks.run(facts, settings=settings, docs=folder) if len(facts.studies) else []
        failed = [outcome for outcome in outcomes if not outcome.passed]
        verdict = f"Passed all {len(outcomes)} checks."
        if not outcomes:
            verdict = _all_rejected(quarantine)
        elif failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            verdict = f"{failed[0].message()}{more}"
        write_page(folder, digest=digest, facts=facts, quarantine=quarantine, outcomes=outcomes, verdict=verdict)
    if failed or not outcomes:
        raise DataError(f"data gate: {verdict}; see {output / 'index.html'}")
    log.info("data gate: %s", verdict)


def _all_rejected(quarantine: pa.Table) -> str:
    reasons = Counter(quarantine["reason"].to_pylist()).most_common(1)
    if not reasons:
        raise UserError("no study in any shard; check data.root")
    reason, count = reasons[0]
    return f"all studies were rejected, most often for {reason} ({count} inputs); check data.root and data.layout"


def _counts(facts: Facts, what: str) -> dict[str, int]:
    return {split: int(facts.overall[f"{split}_{what}"].iloc[0]) for split in SPLITS}


def _write_dataset(output: Path, *, shards: list[Path], quarantine: pa.Table, info: dict[str, Any]) -> None:
    with artifacts.atomic_dir(output) as folder:
        for number, shard in enumerate(shards):
            _link(shard / STUDIES, folder / f"shard-{number:05d}.parquet")
        pq.write_table(quarantine, folder / QUARANTINE)
        artifacts.write_json(folder / DATASET_INFO, info)


def _write_evidence(output: Path, *, shards: list[Path]) -> None:
    with artifacts.atomic_dir(output) as folder:
        for name in tables.TABLES:
            tables.write(folder, [pq.read_table(shard / f"{name}.parquet") for shard in shards], name=name)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
