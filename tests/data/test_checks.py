import dataclasses
import json

import numpy as np
import pytest
from study_trees import chest

from valor.data import checks
from valor.data.facts import gather
from valor.data.manifest import Study, StudyImage, encode_image
from valor.recipe import CheckThresholds, DataSettings

TRANSFORM = json.dumps({"rows": 64, "columns": 48, "inverted": False})
SETTINGS = DataSettings(image_px=64, checks=CheckThresholds(min_studies=2))


def study(number: int, **fields) -> Study:
    image = StudyImage(
        encode_image((chest(number) >> 4).astype(np.uint8)), f"{number}.dcm", f"d{number}", "PA", TRANSFORM
    )
    values = {
        "study_id": f"s{number}",
        "subject_id": f"p{number}",
        "images": (image,),
        "findings": f"Wombat {number}.",
        "impression": "Fine.",
        "split": ("train", "val", "test")[number % 3],
    }
    empty = dict.fromkeys(("indication", "comparison", "sex", "age_band", "device"))
    return Study(**(empty | values | {"source_digest": ""} | fields))


GOOD = [study(number) for number in range(9)]


def black(one: Study) -> Study:
    image = dataclasses.replace(one.images[0], bytes=encode_image(np.zeros((20, 20), np.uint8)))
    return dataclasses.replace(one, images=(image, image))


def outcomes(studies, tmp_path, *, quarantined=0, settings=SETTINGS):
    facts = gather(studies, quarantined=quarantined)
    return {outcome.check.name: outcome for outcome in checks.run(facts, settings=settings, docs=tmp_path)}


def test_good_data_passes_every_check(tmp_path):
    found = outcomes(GOOD, tmp_path, quarantined=2)
    assert [name for name, outcome in found.items() if not outcome.passed] == []
    assert (tmp_path / checks.SITE / "index.html").is_file()


def test_every_check_fails_on_data_that_breaks_it(tmp_path):
    template = {"findings": None, "impression": "Fine."}
    bad = [
        *(dataclasses.replace(study(3 * number, **template), study_id=f"s{number // 2}") for number in range(9)),
        dataclasses.replace(black(study(90, **template)), subject_id="p0", split="val"),
        study(91, findings=None, impression=None, split="holdout"),
    ]
    settings = SETTINGS.model_copy(
        update={"checks": CheckThresholds(min_studies=10, max_duplicate_report_fraction=0.5)}
    )
    found = outcomes(bad, tmp_path, quarantined=9, settings=settings)
    assert [name for name, outcome in found.items() if outcome.passed] == []
    failing = {name: outcome.failing for name, outcome in found.items() if outcome.observed is None}
    assert failing == {
        "unique_studies": 8,
        "known_split": 1,
        "disjoint_subjects": 2,
        "views": 1,
        "report_says_something": 1,
        "image_contrast": 2,
        "image_size": 2,
    }
    assert found["quarantine"].message().startswith("quarantine: quarantined_fraction is 0.45, expected at most 0.2; ")


def test_great_expectations_never_sees_text(tmp_path):
    facts = gather(GOOD, quarantined=0)
    for frame in facts.tables().values():
        assert "wombat" not in frame.to_csv().lower()
    outcomes(GOOD, tmp_path)
    for path in tmp_path.rglob("*.html"):
        assert "wombat" not in path.read_text().lower()


@pytest.mark.parametrize("number", [1, 4])
def test_facts_of_a_study(number):
    facts = gather([*GOOD, study(20, findings=f"Wombat {number}.")], quarantined=0)
    row = facts.studies.set_index("study_id").loc[f"s{number}"]
    assert (row["findings_words"], row["impression_words"], row["report_words"]) == (2, 1, 3)
    assert row["same_report_studies"] == 2
    assert facts.overall["duplicate_report_fraction"].iloc[0] == pytest.approx(0.1)
    image = facts.images.set_index("study_id").loc[f"s{number}"]
    assert (image["height"], image["width"], image["longer_side"]) == (64, 48, 64)
    assert len(set(facts.row_digests)) == 10
