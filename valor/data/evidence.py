"""Annotations and truth: what evaluation compares with, kept apart from the dataset so that no training stage reads it.

`annotations.parquet` holds boxes or masks per image, `truth.parquet` findings per study, `pairs.parquet` counterfactual
twins: studies that differ from another one in a single finding. Real data may have none of them.
This module selects and joins rows; what a mask means is `valor.data.masks`' business.
"""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from valor import storage
from valor.errors import UserError

TABLES: dict[str, pa.Schema] = {
    "annotations": pa.schema(
        [
            (name, pa.string())
            for name in ("study_id", "dicom_id", "finding", "side", "zone", "severity", "shape", "mask")
        ]
    ),
    "truth": pa.schema(
        [
            ("study_id", pa.string()),
            ("finding", pa.string()),
            ("present", pa.bool_()),
            ("side", pa.string()),
            ("zone", pa.string()),
            ("severity", pa.string()),
        ]
    ),
    "pairs": pa.schema([(name, pa.string()) for name in ("study_id", "twin_of", "finding", "change")]),
}
"""The tables with the columns that each needs; types here are those of an empty table, further columns pass through."""


def read_table(annotations_root: str, name: str) -> pa.Table:
    """Return `<annotations_root>/<name>.parquet`, or an empty table where it is missing or no root is given.

    Raises:
        UserError: the root does not exist, or the table is no whole Parquet file or lacks a column.
    """
    if not annotations_root:
        return TABLES[name].empty_table()
    uri = storage.join(annotations_root, f"{name}.parquet")
    if not storage.exists(uri):
        if not storage.exists(annotations_root):
            raise UserError(f"{annotations_root}: no such directory; set data.annotations_root, or leave it empty")
        return TABLES[name].empty_table()
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    except pa.ArrowException:
        raise UserError(f"{uri}: no whole Parquet file; write it again") from None
    missing = [column for column in TABLES[name].names if column not in table.column_names]
    if missing:
        raise UserError(f"{uri}: column {missing[0]!r} is missing; it needs {', '.join(TABLES[name].names)}")
    return table.set_column(table.schema.get_field_index("study_id"), "study_id", table["study_id"].cast(pa.string()))


def select(table: pa.Table, study_ids: Iterable[str]) -> pa.Table:
    """Return the rows of some studies."""
    return table.filter(pc.is_in(table["study_id"], value_set=pa.array(sorted(study_ids), pa.string())))


def join(tables: Iterable[pa.Table], *, name: str) -> pa.Table:
    """Return all rows, in order of study; columns are those of the tables that have rows."""
    filled = [table for table in tables if table.num_rows]
    if not filled:
        return TABLES[name].empty_table()
    return pa.concat_tables(filled, promote_options="permissive").sort_by("study_id").combine_chunks()


def write(path: Path, tables: Iterable[pa.Table], *, name: str) -> None:
    """Write the joined tables to `<path>/<name>.parquet`."""
    pq.write_table(join(tables, name=name), path / f"{name}.parquet", compression="zstd")
