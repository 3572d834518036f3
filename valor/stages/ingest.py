"""Read one shard of the source and write it as the dataset's rows; what cannot be used goes to quarantine.

The output holds `studies.parquet`, `quarantine.parquet`, the shard's evidence tables and `shard.json`. Memory holds a
row group of shrunken images and one full-size image.
"""

from collections import Counter
from pathlib import Path

from valor import artifacts, progress
from valor.context import Context
from valor.data import evidence
from valor.data.ingest import ingest_study
from valor.data.manifest import QUARANTINE, QUARANTINE_SCHEMA, SCHEMA, SCHEMA_VERSION, TableWriter
from valor.data.shards import PHANTOM, Shard, read_shard
from valor.data.source import adapter
from valor.recipe import DataSettings
from valor.stages import StageResult

STUDIES = "studies.parquet"
SHARD_INFO = "shard.json"


def ingest(
    settings: DataSettings, *, root: str, annotations_root: str, shard: str, output: Path, context: Context
) -> StageResult:
    """Write the dataset rows of one shard to `output`.

    Args:
        settings: the recipe's `data` section.
        root: directory, gs:// address, or `phantom`.
        annotations_root: place of annotations.parquet and truth.parquet, "" for none.
        shard: one member of preflight's `shards`, as JSON.
        output: directory to make.
        context: where the stage runs.

    Raises:
        UserError: nothing at `root`; a codec is missing.
        IntegrityError: the source changed since preflight.
    """
    part_of = Shard.from_json(shard)
    layout = adapter("mimic_cxr" if root == PHANTOM else settings.layout)
    counts: Counter[str] = Counter()
    notes: dict[str, list] = {name: [] for name in evidence.TABLES}
    with (
        artifacts.atomic_dir(output) as folder,
        TableWriter(folder / STUDIES, SCHEMA) as studies,
        TableWriter(folder / QUARANTINE, QUARANTINE_SCHEMA) as quarantine,
    ):
        for part in read_shard(part_of, root=root, annotations_root=annotations_root, settings=settings):
            kept = []
            for study in part.studies:
                row, rejections = ingest_study(layout, part.source, study, settings=settings)
                if row:
                    studies.write(row)
                    kept.append(row.study_id)
                for rejection in rejections:
                    quarantine.write(rejection)
                counts.update(f"rejected_{rejection.reason}" for rejection in rejections)
                counts.update(studies=1, kept=row is not None)
                progress.report(counts["studies"], part.total, unit="studies", kept=counts["kept"])
            for name, tables in notes.items():
                tables.append(evidence.select(evidence.read_table(part.annotations_root, name), kept))
        for name, tables in notes.items():
            evidence.write(folder, tables, name=name)
        artifacts.write_json(
            folder / SHARD_INFO,
            {
                "schema_version": SCHEMA_VERSION,
                "layout": settings.layout,
                "phantom": root == PHANTOM,
                "index": part_of.index,
                "count": part_of.count,
                "image_px": settings.image_px,
                "studies": counts["studies"],
                "kept": counts["kept"],
            },
        )
    counts["quarantined"] = counts["studies"] - counts["kept"]
    return StageResult(metrics={name: float(value) for name, value in sorted(counts.items())})
