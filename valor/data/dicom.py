"""Read a chest radiograph from DICOM: decode, modality LUT, VOI, scale, polarity (DICOM PS3.3 C.11, PS3.4 N.2).

Only an allow-list of header elements is parsed: de-identification tools leave text in StudyDescription and in
private elements, so VALOR never reads those. It leaves out presentation states, overlays, shutters and
PresentationLUTShape (for CR and DX it repeats what PhotometricInterpretation says).
"""

import io
import logging
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, get_decoder, pixel_array

from valor.data.images import MAX_PIXELS, Radiograph, Window, scale_robust
from valor.data.manifest import Reason, Rejected
from valor.errors import UserError

# pydicom's warnings quote the values of unlawful elements, and a log must not hold a patient's.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

MODALITIES = ("CR", "DX")
CHEST_WORDS = ("CHEST", "THORAX", "LUNG", "RIB", "STERNUM", "CLAVICLE", "HEART")
VIEW_WORDS = frozenset(
    "AP PA FRONTAL LATERAL LL RL LLD RLD LLO RLO LAO RAO LPO RPO AXIAL OBLIQUE XTABLE SWIMMERS LORDOTIC".split()  # noqa: SIM905
)

_FACTS = (
    *("Modality", "BodyPartExamined", "ViewPosition", "PatientSex", "PatientAge", "Manufacturer"),
    *("ManufacturerModelName", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "RescaleSlope"),
    *("RescaleIntercept", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit"),
)
_IMAGE_PIXEL = (
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
ALLOWED_TAGS = (*_FACTS, *_IMAGE_PIXEL)
"""DICOM keywords that VALOR parses; everything else in a file is skipped unread."""


@dataclass(frozen=True)
class Header:
    """De-identified facts of one file; "" or None where the file does not tell.

    `age_band` is a decade such as `60-69`, or `90+`; `device` is manufacturer and model.
    """

    view: str
    sex: str | None
    age_band: str | None
    device: str | None


def read_header(data: bytes) -> Header:
    """Return the header facts of a DICOM file without touching its pixels; Rejected where it is no DICOM."""
    return _header(_parse(data, keywords=_FACTS, pixels=False))


def read_dicom(data: bytes) -> tuple[Radiograph, Header]:
    """Return a radiograph with (H, W) float32 pixels in [0, 1], bright is dense (MONOCHROME2), and its header.

    Raises:
        Rejected: not a grayscale single-frame CR or DX image of a chest, damaged, or without any contrast.
        UserError: the codec of its transfer syntax is not installed.
    """
    dataset = _parse(data, keywords=ALLOWED_TAGS, pixels=True)
    try:
        return _radiograph(dataset), _header(dataset)
    except (MemoryError, UserError, Rejected):
        raise
    except Exception as error:  # an empty or multi-valued element where one number is due; a text may quote its value
        raise Rejected(Reason.UNDECODABLE, f"a header element is malformed ({type(error).__name__})") from None


def _radiograph(dataset: pydicom.Dataset) -> Radiograph:
    if not dataset.get("PixelData"):
        raise Rejected(Reason.UNDECODABLE, "PixelData is missing or empty")
    _check_kind(dataset)
    stored = _decode(dataset)
    if stored.min() == stored.max():
        raise Rejected(Reason.BLANK, f"every stored pixel is {stored.flat[0]}")
    pixels, window = _to_display(stored, dataset)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if inverted:
        pixels = 1.0 - pixels
    pixels[_padding(stored, dataset)] = 0.0
    return Radiograph(pixels=pixels, inverted=inverted, window=window)


def _parse(data: bytes, *, keywords: tuple[str, ...], pixels: bool) -> pydicom.Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="End of file reached")
            dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=list(keywords), stop_before_pixels=not pixels)
            for element in dataset:  # values are parsed lazily: a damaged one must show here, not later
                element.value  # noqa: B018
    except InvalidDicomError:
        raise Rejected(Reason.UNDECODABLE, "no DICOM file (the DICM prefix is missing)") from None
    except UserWarning:
        raise Rejected(Reason.UNDECODABLE, "the file ends within an element: it is truncated") from None
    except MemoryError:
        raise
    except Exception as error:  # pydicom raises many types on damaged bytes; their texts may quote values
        raise Rejected(Reason.UNDECODABLE, f"the header cannot be parsed ({type(error).__name__})") from None
    return dataset


def _check_kind(dataset: pydicom.Dataset) -> None:
    modality = str(dataset.get("Modality") or "")
    if modality not in MODALITIES:
        raise Rejected(Reason.NOT_RADIOGRAPH, f"Modality is {_code(modality)}, expected {' or '.join(MODALITIES)}")
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Rejected(Reason.COLOUR, f"PhotometricInterpretation is {_code(photometric)}, expected MONOCHROME1 or 2")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise Rejected(Reason.MULTI_FRAME, f"NumberOfFrames is {frames}, expected 1")
    part = str(dataset.get("BodyPartExamined") or "").upper()
    if part not in ("", "UNKNOWN") and not any(word in part for word in CHEST_WORDS):
        raise Rejected(Reason.NOT_CHEST, f"BodyPartExamined is {_code(part)}")


def _decode(dataset: pydicom.Dataset) -> np.ndarray:
    """Return stored pixels (H, W) as integers."""
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if not 0 < rows * columns <= MAX_PIXELS:
        raise Rejected(Reason.UNDECODABLE, f"Rows x Columns is {rows} x {columns}, expected 1 to {MAX_PIXELS} pixels")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    try:
        decoder = get_decoder(syntax)
    except (NotImplementedError, ValueError, AttributeError, TypeError):
        raise Rejected(Reason.UNDECODABLE, f"transfer syntax {syntax} is unknown") from None
    if not decoder.is_available:
        raise UserError(f"{syntax.name}: no codec for this transfer syntax; install the extra `train` of valor-rrg")
    _check_complete(dataset)
    try:
        stored = pixel_array(dataset)
    except MemoryError:
        raise
    except Exception as error:  # each codec has its own error types
        raise Rejected(Reason.UNDECODABLE, f"{syntax.name}: {type(error).__name__} while decoding") from None
    if stored.shape != (rows, columns):
        raise Rejected(Reason.UNDECODABLE, f"decoded shape is {stored.shape}, the header says {(rows, columns)}")
    return stored


def _check_complete(dataset: pydicom.Dataset) -> None:
    """Reject a JPEG stream without its end marker: codecs fill what is missing with grey instead of failing."""
    data = dataset.PixelData
    if not dataset.file_meta.TransferSyntaxUID.is_compressed:
        return
    tail = data.rstrip(b"\x00")[-64:]
    starts_jpeg = b"\xff\xd8\xff" in data[:4096] or b"\xff\x4f\xff\x51" in data[:4096]
    if starts_jpeg and b"\xff\xd9" not in tail:
        raise Rejected(Reason.UNDECODABLE, "the compressed stream has no end marker: the file is truncated")


def _to_display(stored: np.ndarray, dataset: pydicom.Dataset) -> tuple[np.ndarray, Window]:
    """Apply modality LUT and VOI and scale to [0, 1]; without a usable window, robust percentiles do it."""
    for keyword, neutral in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
        if keyword in dataset and dataset[keyword].is_empty:
            setattr(dataset, keyword, neutral)
    values = apply_modality_lut(stored, dataset)
    if not np.isfinite(values).all():
        raise Rejected(Reason.UNDECODABLE, "the modality LUT gives values that are no numbers")
    has_lut = bool(dataset.get("VOILUTSequence"))
    has_window = dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None
    if has_lut or has_window:
        try:
            shown = apply_voi_lut(values, dataset, index=0).astype(np.float32)
            low, high = _voi_range(dataset, is_lut=has_lut)
        except (ValueError, NotImplementedError, AttributeError, TypeError, IndexError):
            has_lut = has_window = False  # an unlawful window is no reason to lose the image
        else:
            pixels = np.clip((shown - low) / (high - low), 0.0, 1.0)
            # A window that shows next to nothing of an image that has contrast is a header's mistake.
            if float(pixels.std()) > 0.01:
                return pixels, _window_of(dataset, is_lut=has_lut)
    seen = values[~_padding(stored, dataset)]
    return scale_robust(values, reference=seen if seen.size else values)


def _voi_range(dataset: pydicom.Dataset, *, is_lut: bool) -> tuple[float, float]:
    """Return the darkest and brightest value that the VOI transformation can give."""
    if is_lut:
        item = dataset.VOILUTSequence[0]
        return 0.0, float(2 ** int(item.LUTDescriptor[2]) - 1)
    # Far outside any window the result is its limit, whatever the VOI LUT function.
    width = abs(float(np.atleast_1d(dataset.WindowWidth)[0])) + 1.0
    centre = float(np.atleast_1d(dataset.WindowCenter)[0])
    low, high = apply_windowing(np.array([centre - 100 * width, centre + 100 * width]), dataset, index=0)
    if not high > low:
        raise ValueError("an empty window")
    return float(low), float(high)


def _window_of(dataset: pydicom.Dataset, *, is_lut: bool) -> Window:
    if is_lut:
        return Window(kind="voi_lut", low=None, high=None)
    width = float(np.atleast_1d(dataset.WindowWidth)[0])
    centre = float(np.atleast_1d(dataset.WindowCenter)[0])
    return Window(kind="window", low=centre - width / 2, high=centre + width / 2)


def _padding(stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Return (H, W) bool: pixels that the detector did not measure (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _header(dataset: pydicom.Dataset) -> Header:
    sex = str(dataset.get("PatientSex") or "").upper()
    maker = " ".join(str(dataset.get(k) or "").strip() for k in ("Manufacturer", "ManufacturerModelName")).strip()
    return Header(
        view=known_view(str(dataset.get("ViewPosition") or "")),
        sex=sex if sex in ("F", "M", "O") else None,
        age_band=_age_band(str(dataset.get("PatientAge") or "")),
        device=re.sub(r"[^A-Za-z0-9 ._/+-]", "", maker)[:48].strip() or None,
    )


def known_view(text: str) -> str:
    """Return a ViewPosition in capitals, "" where it is none that radiographs have."""
    words = text.upper().split()
    return " ".join(words) if words and all(word in VIEW_WORDS for word in words) else ""


def _age_band(age: str) -> str | None:
    """Return the decade of a DICOM age string (`063Y` -> `60-69`); months, weeks and days are the first."""
    match = re.fullmatch(r"(\d{1,3})([YMWD])", age.strip())
    if not match:
        return None
    decade = int(match[1]) // 10 * 10 if match[2] == "Y" else 0
    return "90+" if decade >= 90 else f"{decade}-{decade + 9}"


_TERMS = {
    # PS3.3 C.7.6.3.1.2 PhotometricInterpretation
    "MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT",
    "YBR_RCT",
    # PS3.3 C.7.3.1.1.1 Modality, the common ones
    "CT", "MR", "US", "MG", "PT", "NM", "XA", "RF", "PX", "IO", "OT", "SC", "SR", "PR", "SEG", "CR", "DX", "ES", "OP",
    # PS3.16 annex L BodyPartExamined, the common ones
    "ABDOMEN", "ANKLE", "ARM", "BREAST", "CHEST", "CSPINE", "ELBOW", "EXTREMITY", "FINGER", "FOOT", "HAND", "HEAD",
    "HIP", "JAW", "KNEE", "LEG", "LSPINE", "NECK", "PELVIS", "SHOULDER", "SKULL", "SPINE", "TOE", "TSPINE", "WRIST",
}  # fmt: skip


def _code(text: str) -> str:
    """Return a value for a message if it is a term of the standard's, so that no stray text is quoted."""
    if not text:
        return "missing"
    return repr(text) if text in _TERMS else "another term"
