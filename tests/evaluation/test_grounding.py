import numpy as np
import pytest

from valor.data.images import shrink_mask
from valor.data.masks import decode, encode, format_shape
from valor.evaluation import grounding

GRID = (8, 8)
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture
def mask():
    mask = np.zeros((80, 80), dtype=np.float32)
    mask[10:30, 50:75] = 1
    return mask


def test_attention_in_the_finding_beats_even_attention_beats_attention_elsewhere(mask):
    covered = grounding.cover(mask, box=WHOLE, grid=GRID)
    even = np.full(GRID, 1 / 64)
    assert grounding.ratio(covered, covered) > 2
    assert grounding.ratio(even, covered) == pytest.approx(1)
    assert grounding.ratio((covered == 0).astype(float), covered) == 0


def test_even_attention_scores_one_whatever_the_size():
    for size in (1, 3, 17, 60):
        mask = np.zeros((64, 64), dtype=np.float32)
        mask[2 : 2 + size, 2 : 2 + size] = 1
        covered = grounding.cover(mask, box=WHOLE, grid=GRID)
        assert grounding.ratio(np.ones(GRID), covered) == pytest.approx(1)
        assert covered.mean() == pytest.approx(size**2 / 64**2)


def test_a_finding_outside_the_grid_is_undefined_not_zero(mask):
    covered = grounding.cover(mask, box=(0.0, 0.5, 0.5, 1.0), grid=GRID)
    assert covered.sum() == 0
    assert np.isnan(grounding.ratio(np.ones(GRID), covered))


def test_the_box_moves_the_grid_over_the_image():
    wide = np.zeros((100, 200), dtype=np.float32)
    wide[:, 50:100] = 1
    covered = grounding.cover(wide, box=(0.25, 0.0, 0.75, 1.0), grid=(4, 4))
    np.testing.assert_allclose(covered, [[1, 1, 0, 0]] * 4)


def test_a_box_beyond_the_image_meets_an_empty_border():
    covered = grounding.cover(np.ones((100, 50), dtype=np.float32), box=(-0.5, 0.0, 1.5, 1.0), grid=(4, 4))
    np.testing.assert_allclose(covered, [[0, 1, 1, 0]] * 4)


def test_a_stored_mask_reaches_its_place_through_the_shrink():
    stored = np.zeros((512, 400), dtype=bool)
    stored[128:256, 100:200] = True
    decoded = decode(encode(stored), format_shape(stored.shape))
    transform = '{"rows": 512, "columns": 400, "height": 128, "width": 100}'
    covered = grounding.cover(shrink_mask(decoded, transform), box=WHOLE, grid=(4, 4))
    expected = np.zeros((4, 4))
    expected[1, 1] = 1
    np.testing.assert_allclose(covered, expected)
