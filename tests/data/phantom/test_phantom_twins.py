"""The second site and the counterfactual twins: what only the test split sees."""

from collections import Counter

import numpy as np
import pytest

from valor.data.phantom import draw, plan
from valor.data.phantom.disease import change_one, draw_findings
from valor.data.phantom.image import to_display
from valor.recipe import PhantomStudies

SETTINGS = PhantomStudies(seed=43, train=12, val=4, test=40, pairs=12, image_px=96)


@pytest.fixture(scope="module")
def studies():
    return {key.study_id: draw(key, SETTINGS) for key in plan(SETTINGS)}


def test_twins_come_beside_the_test_studies_and_share_their_subjects(studies):
    twins = [s for s in studies.values() if s.key.twin_of]
    assert len(twins) == 12
    assert sum(s.key.split == "test" for s in studies.values()) == 40 + 12
    for twin in twins:
        original = studies[twin.key.twin_of]
        assert (twin.key.subject_id, twin.key.split) == (original.key.subject_id, "test")
        assert twin.key.study_id != original.key.study_id
    every = plan(SETTINGS.model_copy(update={"pairs": 4000}))
    assert sum(bool(key.twin_of) for key in every) == 40, "no more twins than test studies"


def test_a_twin_leaves_every_other_study_as_it_was(studies):
    without = [draw(key, SETTINGS) for key in plan(SETTINGS.model_copy(update={"pairs": 0}))]
    assert len(without) == len(studies) - 12
    assert all((study.pixels == studies[study.key.study_id].pixels).all() for study in without)


def test_a_twin_differs_where_the_finding_is_and_nowhere_else(studies):
    for twin in (s for s in studies.values() if s.key.twin_of):
        original = studies[twin.key.twin_of]
        name, kind = twin.change.finding, twin.change.kind
        ours, theirs = ({f.finding: f for f in s.truth} for s in (twin, original))
        assert (name in theirs, name in ours) == {"added": (False, True), "removed": (True, False)}.get(
            kind, (True,) * 2
        )
        assert {k: v for k, v in ours.items() if k != name} == {k: v for k, v in theirs.items() if k != name}
        if kind == "moved":
            assert {ours[name].side, theirs[name].side} == {"left", "right"}
        assert (twin.pixels != original.pixels).any()
        far = ~np.logical_or.reduce(
            [m for s in (twin, original) for m in s.masks.values()] or [np.ones((96, 96), bool)]
        )
        rest = np.abs(twin.pixels.astype(int) - original.pixels.astype(int))[far]
        assert np.median(rest) < 40, (name, kind)  # of 4095: the pose and the noise are the same


def test_every_kind_of_change_occurs_and_devices_stay():
    kinds = Counter()
    for n in range(300):
        found = draw_findings(np.random.default_rng(n))
        changed, change = change_one(found, np.random.default_rng([n, 1]))
        kinds[change.kind] += 1
        assert change.finding != "Support Devices"
        assert [f for f in found if f.finding == "Support Devices"] == [
            f for f in changed if f.finding == "Support Devices"
        ]
    assert min(kinds[kind] for kind in ("added", "removed", "moved")) > 40


def test_only_the_test_split_sees_the_second_site(studies):
    at = {split: [s for s in studies.values() if s.key.split == split] for split in ("train", "val", "test")}
    assert not any(s.second_site for s in (*at["train"], *at["val"]))
    share = sum(s.second_site for s in at["test"]) / len(at["test"])
    assert 0.3 < share < 0.7
    assert not any(draw(key, SETTINGS.model_copy(update={"second_site": 0.0})).second_site for key in plan(SETTINGS))


def test_the_second_site_is_noisier_and_flatter_also_after_windowing(studies):
    """Ingest windows every image, so a shift that only moved the window would be no shift."""

    def roughness(study):
        return np.abs(np.diff(to_display(study.pixels).astype(float), axis=1)).mean()

    test = [s for s in studies.values() if s.key.split == "test"]
    second, first = ([roughness(s) for s in test if s.second_site == site] for site in (True, False))
    assert np.median(second) > 1.15 * np.median(first)


def test_the_second_site_has_words_of_its_own():
    ours = PhantomStudies(seed=44, train=0, val=0, test=150, second_site=1.0, image_px=32)
    second, first = (
        " ".join(s.findings for s in (draw(k, ours.model_copy(update={"second_site": share})) for k in plan(ours)))
        for share in (1.0, 0.0)
    )
    for phrase in ("is consolidated", "effusion is noted on the", "mediastinal widening is noted"):
        assert phrase in second
        assert phrase not in first
