import handmade
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valor.errors import DataError, IntegrityError
from valor.evaluation import inputs
from valor.evaluation.predict import TABLE


def rows_of(path):
    return pq.read_table(path / TABLE).to_pylist()


def copy(path, small, *, name="text", change=lambda rows: rows, **changes):
    """Write a changed copy of the small evaluation's predictions."""
    rows = change(rows_of(small["predictions"][1]))
    return handmade.write_predictions(path, name, rows, checkpoint_digest="c", **changes)


def test_reads_in_the_tables_order_without_an_empty_champion(small):
    found = inputs.read_predictions(small["predictions"][::-1], dataset_digest=handmade.DIGEST)
    assert list(found) == ["sft", "text", "vision"]
    assert all(len(one.rows) == 24 for one in found.values())


def test_a_champion_with_rows_is_kept(small, tmp_path):
    champion = copy(tmp_path / "champion", small, name="champion")
    found = inputs.read_predictions([*small["predictions"][:3], champion], dataset_digest=handmade.DIGEST)
    assert list(found) == ["sft", "text", "vision", "champion"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"change": lambda rows: rows[:-1]}, "first at study"),
        ({"change": lambda rows: [*rows, rows[0]]}, "differ"),
        ({"change": lambda rows: [{**row, "reference": "x"} for row in rows]}, "different references"),
        ({"digest": "e" * 64}, "made from dataset eeeeeeeeeeee"),
        ({"name": "sft"}, "a second set"),
        ({"name": "best"}, "named 'best'"),
    ],
)
def test_predictions_that_do_not_belong_together_are_refused(small, tmp_path, changes, words):
    odd = copy(tmp_path / "odd", small, **changes)
    with pytest.raises(IntegrityError, match=words):
        inputs.read_predictions([small["predictions"][0], odd], dataset_digest=handmade.DIGEST)


def test_no_study_is_a_data_error(tmp_path):
    empty = handmade.write_predictions(tmp_path / "sft", "sft", [], checkpoint_digest="c")
    with pytest.raises(DataError, match="hold no study"):
        inputs.read_predictions([empty], dataset_digest=handmade.DIGEST)


def test_truth_covers_all_studies_or_none(small, tmp_path):
    ids = [row["study_id"] for row in rows_of(small["predictions"][0])]
    truth = inputs.read_truth(small["evidence"], ids)
    assert set(truth.studies) == set(ids)
    assert inputs.read_truth(handmade.empty_evidence(tmp_path / "none"), ids) is None
    assert inputs.read_truth(small["evidence"], ["elsewhere"]) is None
    with pytest.raises(IntegrityError, match="24 of 25"):
        inputs.read_truth(small["evidence"], [*ids, "elsewhere"])


def test_places_of_one_finding_are_joined(tmp_path):
    row = {"study_id": "s", "finding": "Pleural Effusion", "present": True, "zone": "lower", "severity": "mild"}
    rows = [{**row, "side": "left"}, {**row, "side": "right", "severity": "severe"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "truth.parquet")
    found = inputs.read_truth(tmp_path, ["s"]).studies["s"]["Pleural Effusion"]
    assert found == inputs.Present(sides=frozenset({"left", "right"}), zone="lower", severity="")
