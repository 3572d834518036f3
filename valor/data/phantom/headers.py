"""A phantom study as DICOM: CR (PS3.3 A.2) or DX for presentation (PS3.3 A.26), 12 bits, de-identified.

The photometric interpretation, SOP class and transfer syntax vary by study, as over the scanners of a hospital.
All UIDs derive from the study's id (UUID form, PS3.5 B.2). It leaves out dates (empty, as type 2 allows), private
elements, overlays and other views.
"""

import hashlib
import io

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from valor.data.phantom.image import FULL_SCALE, voi_window
from valor.data.phantom.keys import Stream, generator
from valor.data.phantom.studies import PhantomStudy

_FIELD_MM = 400.0
"""The width of the imaged field at the detector."""
_SYNTAXES = (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless)
_SYNTAX_RATES = (0.6, 0.3, 0.1)
"""JPEG 2000 costs ten times as much to write and read as the others, so it is the rarest."""
_MONOCHROME1_RATE = 0.3
_DX_RATE = 0.5


def dicom_bytes(study: PhantomStudy, *, seed: int) -> bytes:
    """Return a study's image as a DICOM file.

    Args:
        seed: the settings' seed; header choices have a random stream of their own.
    """
    rng = generator(seed, study.key.subject, study.key.ordinal, Stream.DEVICE)
    digital, inverted = rng.random() < _DX_RATE, rng.random() < _MONOCHROME1_RATE
    syntax = _SYNTAXES[rng.choice(len(_SYNTAXES), p=_SYNTAX_RATES)]
    sop_class = DigitalXRayImageStorageForPresentation if digital else ComputedRadiographyImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, _uid(study.key.dicom_id)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\x00" * 128)
    _patient_and_study(dataset, study)
    _series(dataset, study, digital=digital)
    _image(dataset, study, digital=digital, inverted=inverted)
    if digital:
        _digital_xray(dataset, inverted=inverted)
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _uid(name: str) -> UID:
    return UID(f"2.25.{int(hashlib.sha256(name.encode()).hexdigest()[:32], 16)}")


def _patient_and_study(dataset: Dataset, study: PhantomStudy) -> None:
    key = study.key
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "", key.subject_id, ""
    dataset.PatientSex, dataset.PatientAge = study.sex, f"{study.age:03d}Y"
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "Procedural phantom: there is no patient"
    dataset.StudyInstanceUID, dataset.StudyID = _uid(f"study {key.study_id}"), key.study_id
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber, dataset.ReferringPhysicianName = "", "", "", ""


def _series(dataset: Dataset, study: PhantomStudy, *, digital: bool) -> None:
    dataset.Modality = "DX" if digital else "CR"
    dataset.SeriesInstanceUID, dataset.SeriesNumber = _uid(f"series {study.key.study_id}"), 1
    dataset.BodyPartExamined, dataset.ViewPosition = "CHEST", study.view
    dataset.Manufacturer = "VALOR"
    dataset.ManufacturerModelName = ("Phantom DX" if digital else "Phantom CR") + (" II" if study.second_site else "")


def _image(dataset: Dataset, study: PhantomStudy, *, digital: bool, inverted: bool) -> None:
    pixels = FULL_SCALE - study.pixels if inverted else study.pixels
    low, high = voi_window(study.pixels)
    if inverted:
        low, high = FULL_SCALE - high, FULL_SCALE - low
    rows, columns = pixels.shape
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.InstanceNumber, dataset.ImageType = 1, ["ORIGINAL", "PRIMARY", ""] if digital else ["ORIGINAL", "PRIMARY"]
    dataset.PatientOrientation = ["L", "F"]
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    spacing = f"{_FIELD_MM / columns:.6g}"
    dataset.ImagerPixelSpacing = dataset.PixelSpacing = [spacing, spacing]
    dataset.PixelSpacingCalibrationType = "FIDUCIAL"
    dataset.PixelSpacingCalibrationDescription = "Width of the drawn field"
    # PS3.3 C.11.2.1.2: the linear window maps center - 0.5 +/- (width - 1) / 2 to the ends of the output.
    dataset.WindowWidth = f"{high - low + 1}"
    dataset.WindowCenter = f"{(low + high + 1) / 2:g}"
    dataset.PixelData = np.ascontiguousarray(pixels, dtype="<u2").tobytes()


def _digital_xray(dataset: Dataset, *, inverted: bool) -> None:
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LOG", -1 if not inverted else 1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.ImageLaterality, dataset.DetectorType, dataset.PositionerType = "U", "DIRECT", "NONE"
    dataset.AnatomicRegionSequence = Sequence([_code("51185008", "SCT", "Thorax")])
    dataset.ViewCodeSequence = Sequence([_view_code(dataset.ViewPosition)])
    dataset.ViewCodeSequence[0].ViewModifierCodeSequence = Sequence([])
    dataset.AcquisitionContextSequence = Sequence([])


def _view_code(view: str) -> Dataset:
    if view == "AP":
        return _code("399348003", "SCT", "antero-posterior")
    return _code("399100000", "SCT", "postero-anterior")


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
