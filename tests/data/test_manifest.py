import dataclasses
import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from valor import artifacts
from valor.data.manifest import (
    DATASET_INFO,
    SCHEMA,
    SCHEMA_VERSION,
    SPLITS,
    Study,
    StudyImage,
    TableWriter,
    dataset_digest,
    decode_image,
    encode_image,
    iter_studies,
    read_studies,
    report_text,
    row_digest,
)
from valor.errors import IntegrityError

PIXELS = np.arange(20, dtype=np.uint8).reshape(4, 5)


def study(number: int, *, split: str = "train", pixels: np.ndarray = PIXELS, **fields) -> Study:
    image = StudyImage(
        bytes=encode_image(pixels), path=f"{number}.dcm", dicom_id=f"d{number}", view="PA", transform="{}"
    )
    values = {"findings": f"Findings {number}.", "impression": "Fine."} | fields
    empty = dict.fromkeys(("indication", "comparison", "sex", "age_band", "device"))
    return Study(
        **({"study_id": f"s{number}", "subject_id": f"p{number}", "images": (image,), **empty} | values),
        split=split,
        source_digest="",
    )


def write(path, studies, *, schema_version=SCHEMA_VERSION):
    path.mkdir()
    for number, shard in enumerate(studies):
        with TableWriter(path / f"shard-{number:05d}.parquet", SCHEMA, rows_per_group=2) as writer:
            for one in shard:
                writer.write(one)
    splits = [one.split for shard in studies for one in shard]
    counts = {split: splits.count(split) for split in SPLITS}
    artifacts.write_json(path / DATASET_INFO, {"schema_version": schema_version, "studies": counts})
    return path


@pytest.mark.parametrize(
    ("findings", "impression", "text"),
    [
        ("A.", "B.", "FINDINGS: A. IMPRESSION: B."),
        (None, "B.", "IMPRESSION: B."),
        ("A.", "", "FINDINGS: A."),
        (None, None, ""),
    ],
)
def test_report_text(findings, impression, text):
    assert report_text(findings, impression) == text


def test_image_round_trip_keeps_every_pixel():
    assert np.array_equal(decode_image(encode_image(PIXELS)), PIXELS)


def test_studies_come_back_whole_sorted_and_of_one_split(tmp_path):
    shards = [[study(3), study(1)], [study(2, split="test"), study(0, findings=None)]]
    dataset = write(tmp_path / "d", shards)
    assert read_studies(dataset, split="train") == [study(0, findings=None), study(1), study(3)]
    assert [s.study_id for s in read_studies(dataset, split="test")] == ["s2"]
    assert read_studies(dataset, split="val") == []


def replace(shard, **columns):
    table = pq.read_table(shard)
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, values)
    pq.write_table(table, shard)


def test_memory_that_is_too_small_is_no_damage(tmp_path, monkeypatch):
    path = write(tmp_path / "d", [[study(1)]])

    def full(*args, **kwargs):
        raise pa.lib.ArrowMemoryError("malloc of size 1 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", full)
    with pytest.raises(MemoryError):
        read_studies(path, split="train")


def test_a_shard_that_another_library_wrote_is_read(tmp_path):
    """It names a list's items in its own way, and keeps no schema of Arrow's beside Parquet's."""
    path = write(tmp_path / "d", [[study(1)]])
    shard = path / "shard-00000.parquet"
    table = pq.read_table(shard).replace_schema_metadata(None)
    pq.write_table(table, shard, store_schema=False, use_compliant_nested_type=True)
    assert read_studies(path, split="train") == [study(1)]


@pytest.mark.parametrize(
    "damage", ["lost", "doubled", "uncounted", "garbage", "flipped", "no column", "numbers", "no text"]
)
def test_a_dataset_that_is_not_what_it_says_is_refused(tmp_path, damage):
    """Else a model would be trained on a part of the data, and nobody would know."""
    path = write(tmp_path / "d", [[study(1), study(2)], [study(3)]])
    assert len(read_studies(path, split="train")) == 3
    shard, words = path / "shard-00001.parquet", rf"{path}: its shards hold"
    if damage == "lost":
        shard.unlink()
    elif damage == "doubled":
        shutil.copyfile(path / "shard-00000.parquet", shard)
    elif damage == "uncounted":
        artifacts.write_json(path / DATASET_INFO, {"schema_version": SCHEMA_VERSION, "studies": {"train": 3}})
        words = r"dataset\.json: studies does not count"
    else:
        words = rf"{shard}: "
        if damage == "garbage":
            shard.write_bytes(b"PAR1 and no more")
        elif damage == "flipped":
            content = bytearray(shard.read_bytes())
            content[4:400] = bytes(396)
            shard.write_bytes(content)
        elif damage == "no text":
            replace(shard, findings=pa.array([b"\xe9\xe9"], pa.binary()).view(pa.string()))
            words += "cannot be read"
        elif damage == "numbers":
            replace(shard, findings=pa.array([7]))
            words += "column findings is int64, expected string"
        else:
            pq.write_table(pq.read_table(shard).drop_columns(["study_id"]), shard)
            words += "column study_id is missing, expected string"
    with pytest.raises(IntegrityError, match=rf"{words}.*; ingest the data again") as caught:
        read_studies(path, split="train")
    assert "\n" not in str(caught.value)


def test_the_datasets_library_reads_the_shards(tmp_path):
    import datasets

    dataset = write(tmp_path / "d", [[study(1)], [study(2)]])
    rows = datasets.load_dataset(
        "parquet", data_files=str(dataset / "shard-*.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert rows["study_id"] == ["s1", "s2"]
    assert np.array_equal(decode_image(rows[0]["images"][0]["bytes"]), PIXELS)


def test_rows_are_written_in_groups(tmp_path):
    dataset = write(tmp_path / "d", [[study(n) for n in range(5)]])
    assert pq.ParquetFile(dataset / "shard-00000.parquet").num_row_groups == 3
    assert len(list(iter_studies([dataset / "shard-00000.parquet"], batch_size=2))) == 5


def test_another_schema_version_or_no_dataset_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match="schema_version is 99"):
        read_studies(write(tmp_path / "d", [], schema_version=99), split="train")
    with pytest.raises(IntegrityError, match="missing"):
        read_studies(tmp_path / "nothing", split="train")
    with pytest.raises(ValueError, match="'validate'"):
        read_studies(tmp_path / "d", split="validate")


def test_row_digest_is_over_pixels_not_over_png_bytes():
    one = study(1)
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format="PNG", compress_level=0)
    other = dataclasses.replace(one.images[0], bytes=buffer.getvalue())
    assert other.bytes != one.images[0].bytes
    assert row_digest(dataclasses.replace(one, images=(other,))) == row_digest(one)


@pytest.mark.parametrize(
    "changed",
    [
        {"findings": "Else."},
        {"findings": None},
        {"sex": "F"},
        {"split": "val"},
        {"subject_id": "p9"},
        {"pixels": PIXELS + 1},
        {"pixels": PIXELS.reshape(5, 4)},
    ],
)
def test_row_digest_sees_every_change(changed):
    assert row_digest(study(1, **changed)) != row_digest(study(1))


def test_dataset_digest_ignores_order_but_counts_copies():
    assert dataset_digest(["a", "b"]) == dataset_digest(["b", "a"])
    assert dataset_digest(["a", "a"]) != dataset_digest(["a"])
