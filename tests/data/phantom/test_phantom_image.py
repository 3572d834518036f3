import itertools

import numpy as np
import pytest
from PIL import Image

from valor.data.phantom import draw, plan, samples
from valor.data.phantom.anatomy import draw_anatomy
from valor.data.phantom.disease import DRAWN, SEVERITIES, Finding
from valor.data.phantom.image import Acquisition, draw_acquisition, render
from valor.data.phantom.keys import StudyKey
from valor.recipe import PhantomBase, PhantomStudies

KEY = StudyKey("10", "5", "train", 0, subject=7, ordinal=0)
STILL = Acquisition(gain=1, offset=0, gamma=1, noise=0, rotation_deg=0, zoom=1, shift_x=0, shift_y=0)
SIDED = ("Consolidation", "Atelectasis", "Lung Lesion", "Pneumothorax", "Pleural Effusion", "Fracture")


def picture(*findings: Finding, px: int = 192, subject: int = 7, acquisition: Acquisition = STILL):
    anatomy = draw_anatomy(np.random.default_rng(subject))
    return render(anatomy, findings, acquisition, key=KEY, seed=1, image_px=px)


def make(name: str, severity: str = "moderate", side: str = "left") -> Finding:
    if name == "Support Devices":
        return Finding(name, side, kind="pacemaker")
    zoned = name in ("Consolidation", "Atelectasis", "Lung Lesion", "Fracture")
    return Finding(name, side, "lower" if zoned else None, severity)


def test_a_study_is_the_same_in_any_order_and_at_any_size_of_plan(small):
    keys = plan(small)
    first = [draw(key, small) for key in keys[:3]]
    again = draw(next(k for k in plan(small.model_copy(update={"train": 4})) if k == keys[2]), small)
    assert (again.pixels == first[2].pixels).all()
    assert (again.findings, again.impression, again.truth) == (first[2].findings, first[2].impression, first[2].truth)
    assert (first[0].pixels != first[1].pixels).any()


def test_pixels_are_twelve_bits_with_contrast(small):
    for key in plan(small)[:5]:
        pixels = draw(key, small).pixels
        assert pixels.dtype == np.uint16
        assert pixels.shape == (96, 96)
        assert pixels.max() <= 4095
        assert pixels.std() > 300


def test_masks_are_of_the_findings_and_of_the_pixels(small):
    for study in (draw(key, small) for key in plan(small)):
        assert set(study.masks) == {f.finding for f in study.truth}
        assert all(mask.shape == study.pixels.shape and mask.dtype == bool for mask in study.masks.values())


@pytest.mark.parametrize("name", DRAWN)
def test_a_finding_changes_the_image_within_its_mask(name):
    healthy, _ = picture()
    for severity in SEVERITIES:
        ill, masks = picture(make(name, severity))
        mask = masks[name]
        assert 0.003 < mask.mean() < 0.3
        change = np.abs(ill - healthy)
        # Borders that a finding moves (heart, mediastinum, diaphragm) change less inside than at the edge.
        assert change[mask].mean() > 0.02
        assert change[mask].mean() > 2 * change[~mask].mean()


@pytest.mark.parametrize("name", sorted(set(DRAWN) - {"Support Devices"}))
def test_severe_shows_more_than_mild(name):
    healthy, _ = picture()
    mild, severe = (np.abs(picture(make(name, s))[0] - healthy).mean() for s in ("mild", "severe"))
    assert severe > 1.3 * mild


@pytest.mark.parametrize(("name", "side"), itertools.product(SIDED, ("left", "right")))
def test_the_patients_left_is_on_the_images_right(name, side):
    _, masks = picture(make(name, side=side))
    columns = np.flatnonzero(masks[name].any(axis=0))
    assert (columns > 96).all() if side == "left" else (columns < 96).all()


def test_zones_go_down_the_image():
    height = [np.flatnonzero(picture(Finding("Lung Lesion", "left", z, "mild"))[1]["Lung Lesion"].any(1)).mean()
              for z in ("upper", "mid", "lower")]  # fmt: skip
    assert height == sorted(height)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_smallest_lesion_is_one_and_a_half_patches_of_a_tiny_model_across(severity):
    base = PhantomBase()
    for subject in range(5):
        _, masks = picture(make("Lung Lesion", severity), px=base.image_px, subject=subject)
        rows, columns = np.nonzero(masks["Lung Lesion"])
        assert min(np.ptp(rows), np.ptp(columns)) + 1 >= 1.5 * base.patch_px


def test_pneumothorax_is_dark_and_fluid_bright():
    healthy, _ = picture()
    air, masks = picture(make("Pneumothorax", "severe"))
    assert (air - healthy)[masks["Pneumothorax"]].mean() < -0.03
    fluid, masks = picture(make("Pleural Effusion", "severe"))
    assert (fluid - healthy)[masks["Pleural Effusion"]].mean() > 0.2


def test_adding_a_finding_moves_no_other():
    alone = picture(make("Lung Lesion"))[1]["Lung Lesion"]
    both = picture(make("Lung Lesion"), make("Pneumothorax", side="right"))[1]["Lung Lesion"]
    assert (alone == both).all()


def test_sizes_show_the_same_chest():
    acquisition = draw_acquisition(np.random.default_rng(3))
    large, large_masks = picture(make("Consolidation"), px=512, acquisition=acquisition)
    small, small_masks = picture(make("Consolidation"), px=128, acquisition=acquisition)
    shrunk = np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.98
    assert abs(large_masks["Consolidation"].mean() - small_masks["Consolidation"].mean()) < 0.004


def test_a_rotated_exposure_rotates_its_masks():
    turned = Acquisition(gain=1, offset=0, gamma=1, noise=0, rotation_deg=3, zoom=1, shift_x=0, shift_y=0)
    _, straight = picture(make("Support Devices"))
    _, rotated = picture(make("Support Devices"), acquisition=turned)
    assert (straight["Support Devices"] != rotated["Support Devices"]).any()
    ill, _ = picture(make("Support Devices"), acquisition=turned)
    healthy, _ = picture(acquisition=turned)
    assert (ill - healthy)[rotated["Support Devices"]].mean() > 5 * abs(
        (ill - healthy)[~rotated["Support Devices"]]
    ).mean()


def test_samples_are_what_draw_draws():
    settings = PhantomStudies(seed=5, train=3, val=2, test=0, image_px=128)
    drawn = [draw(key, settings) for key in plan(settings) if key.split == "val"]
    fast = list(samples(settings, "val"))
    assert [(f, i) for _, f, i in fast] == [(study.findings, study.impression) for study in drawn]
    for (image, _, _), study in zip(fast, drawn, strict=True):
        assert image.dtype == np.uint8
        assert image.shape == (128, 128)
        assert np.corrcoef(image.ravel(), study.pixels.ravel())[0, 1] > 0.98
