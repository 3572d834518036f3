"""CheXpert's hierarchy of findings: what a finding is a narrower name of, and what each name is worth.

The labeler keeps to what a text says, as published figures do. Comparisons that know appearances (with a truth, with an
image, between two reports in a reward) let a finding stand for its ancestors, as hierarchical precision and recall do
(Kiritchenko et al. 2006): "pneumonia" names the consolidation, and says no second finding beside it.
"""

from collections.abc import Iterable, Mapping

from valor.clinical.vocabulary import OBSERVATIONS

PARENTS: tuple[tuple[str, str], ...] = (
    ("Pneumonia", "Consolidation"),
    ("Consolidation", "Lung Opacity"),
    ("Atelectasis", "Lung Opacity"),
    ("Edema", "Lung Opacity"),
    ("Lung Lesion", "Lung Opacity"),
)
"""(child, parent) of CheXpert's hierarchy (Irvin et al. 2019, figure 1), children first."""


def ancestors(finding: str) -> frozenset[str]:
    """Return what a finding is a narrower name of in CheXpert's hierarchy: "Pneumonia" of Consolidation, Lung Opacity.

    Cardiomegaly is no kind of Enlarged Cardiomediastinum here: the two are told apart in the image.
    """
    found: set[str] = set()
    for child, parent in PARENTS:
        if child == finding or child in found:
            found.add(parent)
    return frozenset(found)


NAMES: Mapping[str, tuple[str, ...]] = {finding: (finding, *sorted(ancestors(finding))) for finding in OBSERVATIONS}
"""What a finding names: itself and its ancestors."""
SHARE: Mapping[str, float] = {
    "Lung Opacity": 0.25, "Lung Lesion": 0.75, "Edema": 0.75, "Consolidation": 0.75, "Atelectasis": 0.75,
    "Pneumonia": 0.25,
}  # fmt: skip
"""What naming a finding adds to its broader names, as a share of a whole finding; 1 for those that stand alone."""


def one_per_line(findings: Iterable[str]) -> frozenset[str]:
    """Return the findings without the further names of one line: of "pneumonia", "consolidation", "opacity" the second.

    A line keeps the name of the largest share, and the narrower of two that share alike. Two kinds of opacity are two.
    """
    names = frozenset(findings)

    def weight(finding: str) -> tuple[float, int]:
        return SHARE.get(finding, 1.0), len(ancestors(finding))

    return frozenset(
        finding
        for finding in names
        if not any(
            (other in ancestors(finding) or finding in ancestors(other)) and weight(other) > weight(finding)
            for other in names
        )
    )
