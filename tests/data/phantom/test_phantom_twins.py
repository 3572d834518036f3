"""The second site and the counterfactual twins: what only the test split sees."""

import io
from collections import Counter

import numpy as np
import pydicom
import pytest
from scipy.ndimage import binary_dilation

from valor.data.phantom import draw, plan
from valor.data.phantom.disease import change_one, draw_findings
from valor.data.phantom.headers import dicom_bytes
from valor.data.phantom.image import draw_acquisition, to_display
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
        other = next(s for s in studies.values() if s.key.subject_id != twin.key.subject_id)
        # What a finding pulls or pushes (vessels at a collapsed lung, a lobe's volume) reaches a little further.
        assert _changed_elsewhere(twin, original) < 0.2, (name, kind)
        assert _changed_elsewhere(twin, other) > 0.5
    elsewhere = [_changed_elsewhere(s, studies[s.key.twin_of]) for s in studies.values() if s.key.twin_of]
    assert sum(share == 0 for share in elsewhere) >= len(elsewhere) / 2


def _changed_elsewhere(one, other):
    """Return the share of pixels away from all findings that differ by more than a hundredth of the range."""
    near = np.logical_or.reduce([m for s in (one, other) for m in s.masks.values()] or [np.zeros((96, 96), bool)])
    far = ~binary_dilation(near, iterations=8) if near.any() else ~near
    return (np.abs(one.pixels.astype(int) - other.pixels.astype(int))[far] > 40).mean()


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


@pytest.fixture(scope="module")
def at_both_sites():
    """Return (at the first site, at the second) of 40 test studies: one chest with the same findings each."""
    ours = PhantomStudies(seed=43, train=0, val=0, test=40, image_px=96)
    sites = [ours.model_copy(update={"second_site": share}) for share in (0.0, 1.0)]
    pairs = [tuple(draw(key, site) for site in sites) for key in plan(ours)]
    assert all((first.second_site, second.second_site) == (False, True) for first, second in pairs)
    return pairs


# Ingest windows every image, and what a window undoes would be no shift: noise and contrast are compared as displayed.


def test_the_second_site_shows_the_same_chest_noisier(at_both_sites):
    def roughness(study):
        return np.abs(np.diff(to_display(study.pixels).astype(float), axis=1)).mean()

    ratios = [roughness(second) / roughness(first) for first, second in at_both_sites]
    assert min(ratios) > 1
    assert np.median(ratios) > 1.2


def test_the_second_site_shows_the_same_chest_flatter(at_both_sites):
    def contrast(study):
        """Return the deviation of blocks of 8 x 8 pixels, in which noise cancels."""
        return to_display(study.pixels).reshape(12, 8, 12, 8).mean(axis=(1, 3)).std()

    ratios = [contrast(second) / contrast(first) for first, second in at_both_sites]
    assert max(ratios) < 1
    assert np.median(ratios) < 0.97


def test_the_second_site_stores_the_same_chest_darker(at_both_sites):
    """As stored: of brightness, unlike noise and contrast, a window takes back most."""
    assert all(second.pixels.mean() < 0.9 * first.pixels.mean() for first, second in at_both_sites)


def test_the_second_sites_exposures_are_noisier_without_overlap_and_its_median_rotation_is_larger():
    first, second = (
        [draw_acquisition(np.random.default_rng(n), second_site=site) for n in range(1000)] for site in (False, True)
    )
    assert max(exposure.noise for exposure in first) < min(exposure.noise for exposure in second)
    rotations = [np.abs([exposure.rotation_deg for exposure in site]) for site in (first, second)]
    assert np.median(rotations[1]) > 1.4 * np.median(rotations[0])


def test_the_second_sites_devices_have_names_of_their_own(at_both_sites):
    names = [
        {pydicom.dcmread(io.BytesIO(dicom_bytes(study, seed=43))).ManufacturerModelName for study in site}
        for site in zip(*at_both_sites, strict=True)
    ]
    assert names == [{"Phantom CR", "Phantom DX"}, {"Phantom CR II", "Phantom DX II"}]


def test_the_second_site_has_words_of_its_own():
    ours = PhantomStudies(seed=44, train=0, val=0, test=150, second_site=1.0, image_px=32)
    second, first = (
        " ".join(s.findings for s in (draw(k, ours.model_copy(update={"second_site": share})) for k in plan(ours)))
        for share in (1.0, 0.0)
    )
    for phrase in ("is consolidated", "effusion is noted on the", "mediastinal widening is noted"):
        assert phrase in second
        assert phrase not in first
