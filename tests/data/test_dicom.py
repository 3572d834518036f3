import io

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from study_trees import SHARED, chest, dicom_bytes, save

from valor.data import dicom
from valor.data.dicom import ALLOWED_TAGS, read_dicom, read_header
from valor.data.manifest import Reason, Rejected
from valor.errors import UserError

PIXELS = chest(3)
NEEDS_SHARED = pytest.mark.skipif(not (SHARED / "dicom").is_dir(), reason="no shared data")


def rejected(data: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        read_dicom(data)
    return caught.value


def compressed(data: bytes, syntax: str) -> bytes:
    file = pydicom.dcmread(io.BytesIO(data))
    file.compress(syntax)
    return save(file)


def test_pixels_are_float_in_unit_range_with_bright_tissue():
    radiograph, header = read_dicom(dicom_bytes(PIXELS))
    assert radiograph.pixels.shape == PIXELS.shape
    assert radiograph.pixels.dtype == np.float32
    assert radiograph.pixels.min() >= 0
    assert radiograph.pixels.max() <= 1
    corner, lung = radiograph.pixels[:5, :5].mean(), radiograph.pixels[30:34, 13:16].mean()
    assert corner > lung + 0.2
    assert (header.view, header.sex, header.age_band, header.device) == ("PA", "F", "60-69", "Maker")


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_pixels_equal_uncompressed(syntax):
    plain = dicom_bytes(PIXELS)
    assert np.array_equal(read_dicom(compressed(plain, syntax))[0].pixels, read_dicom(plain)[0].pixels)


def test_monochrome1_gives_the_same_image_as_monochrome2():
    # The mirrored window's centre is 4095 - centre + 1, because of the half step in PS3.3 C.11.2.1.2.1.
    two, _ = read_dicom(dicom_bytes(PIXELS, window=(2000, 3000)))
    one, _ = read_dicom(
        dicom_bytes(4095 - PIXELS, window=(4095 - 2000 + 1, 3000), PhotometricInterpretation="MONOCHROME1")
    )
    assert one.inverted
    assert not two.inverted
    np.testing.assert_allclose(one.pixels, two.pixels, atol=1e-6)


def test_polarity_is_mended_without_a_window_too():
    two, _ = read_dicom(dicom_bytes(PIXELS, window=None))
    one, _ = read_dicom(dicom_bytes(4095 - PIXELS, window=None, PhotometricInterpretation="MONOCHROME1"))
    wrong, _ = read_dicom(dicom_bytes(4095 - PIXELS, window=None))
    np.testing.assert_allclose(one.pixels, two.pixels, atol=1e-6)
    assert np.corrcoef(wrong.pixels.ravel(), two.pixels.ravel())[0, 1] < -0.9


def test_window_comes_after_the_modality_lut():
    rescaled = dicom_bytes(PIXELS, window=(3096, 4096), RescaleSlope=1, RescaleIntercept=1048, RescaleType="US")
    plain = dicom_bytes(PIXELS, window=(2048, 4096))
    np.testing.assert_allclose(read_dicom(rescaled)[0].pixels, read_dicom(plain)[0].pixels, atol=2e-4)


def test_narrow_window_clips_and_wide_one_keeps_contrast_low():
    narrow, wide = read_dicom(dicom_bytes(PIXELS, window=(1500, 400)))[0], read_dicom(dicom_bytes(PIXELS))[0]
    assert (narrow.pixels == 1.0).mean() > 0.3
    assert (wide.pixels == 1.0).mean() == 0


def test_a_voi_lut_sequence_is_applied():
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 16]
    item.LUTData = [65535 - 16 * value for value in range(4096)]
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
    looked_up, _ = read_dicom(dicom_bytes(PIXELS, window=None, VOILUTSequence=[item]))
    assert looked_up.window.kind == "voi_lut"
    np.testing.assert_allclose(looked_up.pixels, (65535 - 16.0 * PIXELS) / 65535, atol=1e-5)


@pytest.mark.parametrize("window", [(60000, 10), (2048, 0.5), (2048, 0)])
def test_a_window_that_shows_nothing_falls_back_to_percentiles(window):
    radiograph, _ = read_dicom(dicom_bytes(PIXELS, window=window))
    assert radiograph.pixels.std() > 0.1
    assert radiograph.window.kind == "percentile" or window[1] == 0.5


def test_one_hot_pixel_does_not_darken_the_image():
    hot = PIXELS.copy()
    hot[0, 0] = 4095
    dark = np.where(hot > 1500, hot // 4 + 800, hot // 2)
    spoiled = dark.copy()
    spoiled[0, 0] = 4095
    clean = read_dicom(dicom_bytes(dark, window=None))[0].pixels
    np.testing.assert_allclose(read_dicom(dicom_bytes(spoiled, window=None))[0].pixels[1:], clean[1:], atol=0.02)


def test_padding_is_dark_and_outside_the_percentiles():
    padded = PIXELS.copy()
    padded[:, :10] = 4095
    radiograph, _ = read_dicom(dicom_bytes(padded, window=None, PixelPaddingValue=4095))
    plain, _ = read_dicom(dicom_bytes(padded, window=None))
    assert radiograph.pixels[:, :10].max() == 0
    assert plain.pixels[:, :10].min() == 1


@pytest.mark.parametrize("keep", [0.001, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_truncated_files_are_rejected(keep, syntax):
    data = dicom_bytes(PIXELS) if syntax is None else compressed(dicom_bytes(PIXELS), syntax)
    assert rejected(data[: int(len(data) * keep)]).reason is Reason.UNDECODABLE


@pytest.mark.parametrize("data", [b"", b"not a DICOM file", bytes(500)])
def test_other_bytes_are_rejected(data):
    assert rejected(data).reason is Reason.UNDECODABLE


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Modality": "CT"}, Reason.NOT_RADIOGRAPH),
        ({"Modality": None}, Reason.NOT_RADIOGRAPH),
        ({"BodyPartExamined": "EXTREMITY"}, Reason.NOT_CHEST),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}, Reason.COLOUR),
        ({"NumberOfFrames": 2}, Reason.MULTI_FRAME),
        ({"Rows": 0}, Reason.UNDECODABLE),
        ({"Rows": 65000, "Columns": 65000}, Reason.UNDECODABLE),
        ({"Rows": 63}, None),
        ({"BodyPartExamined": None}, None),
        ({"BodyPartExamined": "PORT CHEST"}, None),
        ({"Modality": "DX"}, None),
    ],
)
def test_kinds_of_image(elements, reason):
    data = dicom_bytes(PIXELS, **elements)
    if reason is None:
        assert read_dicom(data)[0].pixels.std() > 0.1
    else:
        assert rejected(data).reason is reason


def with_raw(data: bytes, keyword: str, value: str) -> bytes:
    """Return a file whose text element holds `value` as it stands, lawful or not."""
    file = pydicom.dcmread(io.BytesIO(data))
    element = file[keyword]
    raw = value.encode() + b" " * (len(value) % 2)
    file._dict[element.tag] = RawDataElement(element.tag, element.VR, len(raw), raw, 0, False, True)
    return save(file)


@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": [1, 2], "RescaleIntercept": 0},
        {"RescaleSlope": 1, "RescaleIntercept": [0, 0]},
        {"Rows": [64, 64]},
        {"Rows": []},
        {"SamplesPerPixel": [1, 1]},
        {"NumberOfFrames": [1, 1]},
        {"PixelPaddingValue": [0, 1]},
        {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": [1, 2]},
        {"BitsStored": []},
        {"ModalityLUTSequence": [Dataset()]},
    ],
)
def test_a_malformed_element_rejects_the_file_and_stops_nothing(elements):
    caught = rejected(dicom_bytes(PIXELS, **elements))
    assert caught.reason is Reason.UNDECODABLE
    assert caught.detail


@pytest.mark.parametrize(
    ("keyword", "value"), [("RescaleSlope", "nan"), ("RescaleSlope", "x"), ("RescaleSlope", "inf")]
)
def test_a_rescale_that_is_no_number_rejects_the_file(keyword, value):
    plain = dicom_bytes(PIXELS, RescaleSlope=1, RescaleIntercept=0)
    assert rejected(with_raw(plain, keyword, value)).reason is Reason.UNDECODABLE
    assert read_dicom(with_raw(plain, keyword, "1"))[0].pixels.std() > 0.1


@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"RescaleSlope": "", "RescaleIntercept": 0},
        {"RescaleSlope": 1, "RescaleIntercept": ""},
        {"PixelPaddingValue": []},
        {"NumberOfFrames": ""},
        {"WindowCenter": [2048, 1], "WindowWidth": [4096, 2]},
        {"PatientAge": "", "PatientSex": ""},
    ],
)
def test_an_empty_element_is_as_good_as_none(elements):
    np.testing.assert_array_equal(
        read_dicom(dicom_bytes(PIXELS, **elements))[0].pixels, read_dicom(dicom_bytes(PIXELS))[0].pixels
    )


@pytest.mark.parametrize("error", [MemoryError, UserError])
def test_what_is_not_the_files_fault_is_not_blamed_on_it(monkeypatch, error):
    def fail(*_args):
        raise error

    monkeypatch.setattr(dicom, "_padding", fail)
    with pytest.raises(error):
        read_dicom(dicom_bytes(PIXELS))


def test_a_constant_image_is_blank():
    assert rejected(dicom_bytes(np.full((32, 32), 700, np.uint16))).reason is Reason.BLANK


def test_patient_text_is_never_parsed_nor_quoted():
    secret = "Johanna Geheim"
    data = dicom_bytes(
        PIXELS, PatientName=secret, StudyDescription=secret, ViewPosition=secret, PatientAge="044Y", PatientSex=secret
    )
    _, header = read_dicom(data)
    assert "PatientName" not in ALLOWED_TAGS
    assert header.sex is None
    assert header.view == ""
    for name in (secret, "JOHANNA GEHEIM", "GEHEIM"):  # the latter are lawful codes by their form
        for elements in ({"Modality": name}, {"BodyPartExamined": name}, {"PhotometricInterpretation": name}):
            assert name not in str(rejected(dicom_bytes(PIXELS, **elements)))


@pytest.mark.parametrize(
    ("age", "band"),
    [
        ("063Y", "60-69"),
        ("009Y", "0-9"),
        ("089Y", "80-89"),
        ("090Y", "90+"),
        ("104Y", "90+"),
        ("011M", "0-9"),
        ("", None),
    ],
)
def test_age_is_a_band(age, band):
    assert read_header(dicom_bytes(PIXELS, PatientAge=age)).age_band == band


@NEEDS_SHARED
def test_real_radiograph_and_its_inverse():
    two, header = read_dicom((SHARED / "dicom" / "rsna-cxr-jpeg.dcm").read_bytes())
    one, _ = read_dicom((SHARED / "dicom" / "rsna-cxr-monochrome1.dcm").read_bytes())
    assert two.pixels.shape == (1024, 1024)
    assert header.view == "PA"
    # The second file is the first marked MONOCHROME1: its picture is the negative.
    np.testing.assert_allclose(one.pixels, 1 - two.pixels, atol=1e-6)


@NEEDS_SHARED
def test_real_jpeg2000_chest_decodes_and_real_others_are_refused():
    folder = SHARED / "dicom"
    assert read_dicom((folder / "RG1_J2KI.dcm").read_bytes())[0].pixels.shape == (1955, 1841)
    assert rejected((folder / "RG3_J2KR.dcm").read_bytes()).reason is Reason.NOT_CHEST
    assert rejected((folder / "JPEG-LL.dcm").read_bytes()).reason is Reason.NOT_RADIOGRAPH
    assert rejected((folder / "JLSL_16_15_1_1F.dcm").read_bytes()).reason is Reason.NOT_RADIOGRAPH


@NEEDS_SHARED
@pytest.mark.parametrize("name", ["RG3_J2KR.dcm", "JPEG-LL.dcm", "JLSL_16_15_1_1F.dcm", "rsna-cxr-jpeg.dcm"])
def test_each_real_codec_decodes_whole_and_not_cut(name):
    file = pydicom.dcmread(SHARED / "dicom" / name)
    file.Modality, file.BodyPartExamined = "CR", "CHEST"
    if "NumberOfFrames" in file:
        del file.NumberOfFrames
    data = save(file)
    assert read_dicom(data)[0].pixels.std() > 0.02
    assert rejected(data[: len(data) * 9 // 10]).reason is Reason.UNDECODABLE
