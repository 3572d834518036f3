"""Stage 1's rewards on many reports, each against edits that make it worse: the true report scores above them all."""

import operator
from collections.abc import Callable, Mapping, Sequence

import pytest
from report_edits import (
    CLAIMS,
    EDITS,
    OPENI,
    SALADS,
    edited_reports,
    in_other_words,
    loses_an_assertion,
    named,
    names_one_side,
    with_a_side_swapped,
    with_a_zone_moved,
    with_an_invention,
    without_a_finding,
)

from pipelines.experiments.arms import Seed
from valor.clinical.hierarchy import NAMES
from valor.recipe import GrpoTextSettings, TextReward, load
from valor.rewards.agreement import AgreementWeights
from valor.rewards.text import build

SOURCES = [
    "phantom",
    pytest.param("openi", marks=pytest.mark.skipif(not OPENI.is_dir(), reason="the Open-i sample is not there")),
]
CLINICAL_SEES: Mapping[str, Callable[[str, str], bool]] = {
    "findings denied": loses_an_assertion,
    "sides swapped": lambda report, edited: names_one_side(report),
    # What the impression says again is still said.
    "a sentence dropped": lambda report, edited: named(edited) != named(report),
    "said three times": lambda report, edited: False,
}
"""Where the clinical reward claims to see an edit (report, edited), if not everywhere."""
LEAST = 90
"""How many of the 200 phantom and 299 Open-i reports each edit changes, at least."""
LEAST_SEEN = {
    ("phantom", "a sentence dropped"): 45,
    ("openi", "sides swapped"): 65,
    ("openi", "a sentence dropped"): 70,
}
"""The same of the edits that the clinical reward claims to see, where they are fewer than that."""


def preferred(rewards: tuple[TextReward, ...], pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs whose edited report scores no lower than the true one by the rewards' weighted sum."""
    references, edited = zip(*pairs, strict=True)
    both = zip(pairs, totals(rewards, references, references), totals(rewards, edited, references), strict=True)
    return [pair for pair, true, edited in both if not true > edited]


def totals(rewards: tuple[TextReward, ...], candidates: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the rewards' weighted sum of each candidate."""
    functions, weights = build(rewards)
    each = [function(candidates, references) for function in functions]
    return [sum(map(operator.mul, weights, values)) for values in zip(*each, strict=True)]


def test_a_claim_asserts_its_finding():
    assert {finding: named(claim) for finding, claim in CLAIMS.items()} == {f: set(NAMES[f]) for f in CLAIMS}


def of_the_recipe() -> tuple[TextReward, ...]:
    return load("phantom").grpo_text.rewards


def of_the_defaults() -> tuple[TextReward, ...]:
    return GrpoTextSettings().rewards


def of_the_experiments() -> tuple[TextReward, ...]:
    return tuple(TextReward(**reward) for reward in Seed(1).text().job.settings["rewards"])


@pytest.mark.parametrize("rewards", [of_the_recipe, of_the_defaults, of_the_experiments])
@pytest.mark.parametrize("kind", [*EDITS, *SALADS])
@pytest.mark.parametrize("source", SOURCES)
def test_the_sum_of_stage_ones_rewards_sees_every_edit(source, kind, rewards):
    pairs = edited_reports(source, kind)
    assert len(pairs) >= LEAST
    assert preferred(rewards(), pairs) == []


@pytest.mark.parametrize("rewards", [of_the_recipe, of_the_defaults, of_the_experiments])
@pytest.mark.parametrize(
    "wrong",
    [with_a_side_swapped, with_a_zone_moved, with_an_invention, without_a_finding],
    ids=lambda edit: edit.__name__,
)
def test_what_is_right_in_other_words_is_better_than_a_copy_with_one_error(wrong, rewards):
    """GLEU pays for words, so each error must cost more than all other words are worth."""
    edits = [(report, other, wrong(report, [], number)) for number, (report, other) in enumerate(in_other_words())]
    edits = [(report, other, edited) for report, other, edited in edits if edited != report]
    assert len(edits) >= LEAST
    reports, others, edited = zip(*edits, strict=True)
    scores = zip(edits, totals(rewards(), others, reports), totals(rewards(), edited, reports), strict=True)
    assert [edit for edit, right, copied in scores if not right > copied] == []


def test_the_experiments_price_inventions_higher_than_the_recipe():
    recipe, experiments = (rewards[0].options for rewards in (of_the_recipe(), of_the_experiments()))
    assert recipe.get("invention", AgreementWeights.invention) < experiments["invention"]
    assert of_the_recipe() != of_the_experiments()


@pytest.mark.parametrize("kind", sorted(EDITS.keys() - {"said three times"}))
@pytest.mark.parametrize("source", SOURCES)
def test_the_clinical_reward_sees_what_it_claims_to_see(source, kind):
    sees = CLINICAL_SEES.get(kind, lambda report, edited: True)
    seen = [pair for pair in edited_reports(source, kind) if sees(*pair)]
    assert len(seen) >= LEAST_SEEN.get((source, kind), LEAST)
    assert preferred((TextReward(name="clinical_agreement_reward"),), seen) == []


@pytest.mark.parametrize("source", SOURCES)
def test_the_clinical_reward_leaves_repetition_to_the_others(source):
    pairs = edited_reports(source, "said three times")
    assert len(pairs) >= LEAST
    assert preferred((TextReward(name="clinical_agreement_reward"),), pairs) == pairs
    assert preferred((TextReward(name="repetition_reward"),), pairs) == []
