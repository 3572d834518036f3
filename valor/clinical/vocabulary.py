"""The CheXpert-14 finding vocabulary (Irvin et al. 2019, arXiv 1901.07031, table 1).

Labels of one report are a mapping finding -> `Label`; a finding that the report does not mention is absent
from the mapping. `SIDES` and `ZONES` are the anatomical words VALOR's labeler reads beside a finding.
"""

from typing import Literal

FINDINGS: tuple[str, ...] = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
"""The 14 classes, in the paper's order."""

OBSERVATIONS: tuple[str, ...] = FINDINGS[:-1]
"""The classes that can be seen in an image: all but "No Finding"."""

Label = Literal["positive", "negative", "uncertain"]
Side = Literal["left", "right", "bilateral"]
Zone = Literal["upper", "mid", "lower"]
SIDES: tuple[Side, ...] = ("left", "right", "bilateral")
ZONES: tuple[Zone, ...] = ("upper", "mid", "lower")
