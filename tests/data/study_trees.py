"""Small data roots for tests: a MIMIC-CXR tree of real DICOM files and an Open-i tree of drawn PNGs."""

import csv
import dataclasses
import io
import os
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

SHARED = Path(os.environ.get("VALOR_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"
"""Real files that are no part of the project; tests that need them skip without."""

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old with cough

 FINDINGS:  Study {study}: the heart is normal
 in size. No effusion.

 IMPRESSION:  No acute process in {study}.
"""


def chest(seed: int, *, rows: int = 64, columns: int = 48) -> np.ndarray:
    """Return (rows, columns) uint16 in 0..4095: two dark lungs in bright tissue, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns]
    image = np.full((rows, columns), 2800.0)
    for centre in (0.3, 0.7):
        lung = ((x / columns - centre) / 0.16) ** 2 + ((y / rows - 0.5) / 0.35) ** 2 < 1
        image[lung] = 900 + 60 * (seed % 7)
    return np.clip(image + rng.normal(0, 40, image.shape), 0, 4095).astype(np.uint16)


def dicom_bytes(pixels: np.ndarray, *, window: tuple[float, float] | None = (2048, 4096), **elements: object) -> bytes:
    """Return a CR file of (H, W) uint16 12-bit pixels; `elements` set or (None) delete DICOM keywords."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[pixels.tobytes().hex()])
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Modality, file.BodyPartExamined, file.ViewPosition = "CR", "CHEST", "PA"
    file.PatientSex, file.PatientAge, file.Manufacturer = "F", "063Y", "Maker"
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    if window:
        file.WindowCenter, file.WindowWidth = window
    file.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        if value is None:
            delattr(file, keyword)
        else:
            setattr(file, keyword, value)
    return save(file)


def save(file: pydicom.Dataset) -> bytes:
    """Return a dataset's file bytes."""
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@dataclasses.dataclass
class MimicTree:
    """A MIMIC-CXR tree that grows study by study; nothing but real files in the real layout."""

    root: Path
    rows: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(
        self,
        study: int,
        *,
        subject: int | None = None,
        split: str = "",
        images: dict[str, bytes] | None = None,
        report: str | None = REPORT,
    ) -> None:
        """Add a study; ids are 5xxxxxxx and 1xxxxxxx; `report=None` leaves the text file out."""
        subject_id, study_id = f"1{study if subject is None else subject:07d}", f"5{study:07d}"
        folder = self.root / "files" / f"p{subject_id[:2]}" / f"p{subject_id}"
        (folder / f"s{study_id}").mkdir(parents=True, exist_ok=True)
        if report is not None:
            # MIMIC-CXR's lines begin with one space, blank lines too.
            (folder / f"s{study_id}.txt").write_text(report.format(study=study).replace("\n\n", "\n \n"))
        for name, data in (images if images is not None else {f"{study:08x}-0": dicom_bytes(chest(study))}).items():
            (folder / f"s{study_id}" / f"{name}.dcm").write_bytes(data)
            if split:
                self.rows.append({"dicom_id": name, "study_id": study_id, "subject_id": subject_id, "split": split})
        if self.rows:
            with (self.root / "mimic-cxr-2.0.0-split.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)


def mimic_tree(root: Path, *, train: int = 6, val: int = 3, test: int = 4) -> MimicTree:
    """Return a tree with official splits, one study per subject."""
    tree = MimicTree(root)
    number = 0
    for split, count in (("train", train), ("validate", val), ("test", test)):
        for _ in range(count):
            number += 1
            tree.add(number, split=split)
    return tree


def openi_tree(root: Path, *, limit: int = 300) -> Path:
    """Copy real Open-i reports below `root` and draw a PNG under each image's real name."""
    from valor.data.reports import parse_openi

    (root / "ecgen-radiology").mkdir(parents=True)
    (root / "NLMCXR_png").mkdir()
    for path in sorted((SHARED / "openi" / "ecgen-radiology").glob("*.xml"))[:limit]:
        data = path.read_bytes()
        (root / "ecgen-radiology" / path.name).write_bytes(data)
        for number, (name, _) in enumerate(parse_openi(data).images):
            pixels = (chest(int(path.stem) + number, rows=96, columns=80) >> 4).astype(np.uint8)
            Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(root / "NLMCXR_png" / f"{name}.png")
    return root
