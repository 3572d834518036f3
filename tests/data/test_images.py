import io
import json

import numpy as np
import pytest
from PIL import Image
from study_trees import SHARED, chest

from valor.data.images import Radiograph, Window, read_raster, shrink, shrink_mask
from valor.data.manifest import Reason, Rejected

GREY = (chest(1) >> 4).astype(np.uint8)


def png(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def radiograph(pixels: np.ndarray) -> Radiograph:
    return Radiograph(pixels=pixels.astype(np.float32), inverted=False, window=Window("none", 0.0, 255.0))


def test_equal_channels_are_grayscale_and_different_ones_colour():
    rgb = np.stack([GREY] * 3, axis=-1)
    np.testing.assert_array_equal(read_raster(png(rgb)).pixels, read_raster(png(GREY)).pixels)
    assert read_raster(png(GREY)).pixels.max() <= 1
    rgb[5, 5, 0] ^= 64
    with pytest.raises(Rejected) as caught:
        read_raster(png(rgb))
    assert caught.value.reason is Reason.COLOUR


def test_sixteen_bits_are_scaled():
    pixels = read_raster(png(chest(1))).pixels
    assert pixels.min() == 0
    assert pixels.max() == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(GREY)[:200], Reason.UNDECODABLE),
        (b"", Reason.UNDECODABLE),
        (b"<html>404</html>", Reason.UNDECODABLE),
        (png(np.full((9, 9), 7, np.uint8)), Reason.BLANK),
    ],
)
def test_bad_files_are_rejected(data, reason):
    with pytest.raises(Rejected) as caught:
        read_raster(data)
    assert caught.value.reason is reason


def test_animations_are_rejected():
    buffer = io.BytesIO()
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    frames[0].save(buffer, format="PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(Rejected) as caught:
        read_raster(buffer.getvalue())
    assert caught.value.reason is Reason.MULTI_FRAME


@pytest.mark.parametrize(
    ("shape", "expected"), [((100, 50), (32, 16)), ((50, 100), (16, 32)), ((20, 10), (20, 10)), ((300, 2), (32, 1))]
)
def test_shrink_keeps_aspect_and_never_enlarges(shape, expected):
    pixels, transform = shrink(radiograph(np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)), image_px=32)
    assert pixels.shape == expected
    assert pixels.dtype == np.uint8
    info = json.loads(transform)
    assert (info["rows"], info["columns"]) == shape
    assert (info["height"], info["width"]) == expected


def test_shrink_averages_instead_of_sampling():
    stripes = np.zeros((128, 128))
    stripes[:, ::2] = 1.0
    pixels, _ = shrink(radiograph(stripes), image_px=32)
    assert abs(pixels[8:-8, 8:-8].astype(int) - 127).max() <= 3


def test_shrink_does_not_ring_beyond_grey():
    edge = np.zeros((128, 128))
    edge[:, 64:] = 1.0
    pixels, _ = shrink(radiograph(edge), image_px=32)
    assert pixels[:, :14].max() <= 2
    assert pixels[:, 18:].min() >= 253


def test_transform_brings_a_mask_onto_the_image():
    mask = np.zeros((120, 80), dtype=bool)
    mask[90:110, 10:30] = True
    pixels, transform = shrink(radiograph(mask), image_px=60)
    small = shrink_mask(mask, transform)
    assert small.shape == pixels.shape
    assert small.sum() == pytest.approx(mask.sum() / 4, rel=0.01)
    assert pixels[small > 0.99].min() > 200
    with pytest.raises(ValueError, match="stored image"):
        shrink_mask(mask.T, transform)


@pytest.mark.skipif(not (SHARED / "dicom").is_dir(), reason="no shared data")
def test_real_png():
    pixels, _ = shrink(read_raster((SHARED / "dicom" / "nih-00000001_000.png").read_bytes()), image_px=192)
    assert max(pixels.shape) == 192
    assert pixels.std() > 20
