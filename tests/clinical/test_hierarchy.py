"""CheXpert's hierarchy: what a name stands for, and that the names of one finding are worth about one."""

import pytest

from valor.clinical.hierarchy import NAMES, PARENTS, SHARE, ancestors
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
