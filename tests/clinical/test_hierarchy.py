"""CheXpert's hierarchy: what a name stands for, and that the names of one finding are worth about one."""

import pytest

from valor.clinical.hierarchy import NAMES, PARENTS, SHARE, ancestors, one_per_line
from valor.clinical.vocabulary import OBSERVATIONS


def test_ancestors():
    assert ancestors("Pneumonia") == {"Consolidation", "Lung Opacity"}
    assert ancestors("Edema") == {"Lung Opacity"}
    assert ancestors("Cardiomegaly") == ancestors("Lung Opacity") == frozenset()


def test_names_hold_the_finding_and_its_ancestors():
    for child, parent in PARENTS:
        assert set(NAMES[child]) > set(NAMES[parent])
    assert set(NAMES) == set(OBSERVATIONS)


@pytest.mark.parametrize("finding", OBSERVATIONS)
def test_a_line_of_names_is_worth_one_finding(finding):
    worth = sum(SHARE.get(name, 1.0) for name in NAMES[finding])
    assert worth == {"Lung Opacity": 0.25, "Pneumonia": 1.25}.get(finding, 1.0)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["Pneumonia", "Consolidation", "Lung Opacity"], {"Consolidation"}),
        (["Pneumonia", "Lung Opacity"], {"Pneumonia"}),
        (["Lung Opacity"], {"Lung Opacity"}),
        (["Edema", "Atelectasis", "Lung Opacity"], {"Edema", "Atelectasis"}),
        (["Cardiomegaly", "Enlarged Cardiomediastinum"], {"Cardiomegaly", "Enlarged Cardiomediastinum"}),
        ([], set()),
    ],
)
def test_one_per_line_keeps_the_main_name_of_each(names, kept):
    assert one_per_line(names) == kept
