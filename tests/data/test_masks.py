import numpy as np
import pytest

from valor.data import masks
from valor.errors import IntegrityError


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_a_mask_survives_its_encoding(density):
    mask = np.random.default_rng(1).random((17, 31)) < density
    text = masks.encode(mask)
    assert (masks.decode(text, (17, 31)) == mask).all()
    assert (masks.decode(text, masks.format_shape(mask.shape)) == mask).all()


def test_runs_are_row_major_and_start_with_background():
    assert masks.encode(np.array([[0, 1, 1], [1, 0, 0]], bool)) == "1 3 2"
    assert masks.encode(np.array([[1, 0], [0, 0]], bool)) == "0 1 3"


def test_a_transposed_mask_is_another_text():
    mask = np.array([[1, 1], [0, 0]], bool)
    assert masks.encode(mask) != masks.encode(mask.T)


@pytest.mark.parametrize(
    ("text", "shape"),
    [("1 3 2", (2, 4)), ("1 3", (2, 3)), ("1 x 2", (2, 3)), ("-1 5 2", (2, 3)), ("6", "2by3"), ("6", "x3")],
)
def test_a_text_that_does_not_fill_the_shape_is_refused(text, shape):
    with pytest.raises(IntegrityError):
        masks.decode(text, shape)
