"""Stage-1 rewards: metrics of a candidate report against its reference, in TRL's reward signature.

Every reward is deterministic and bounded (docs/rewards.md). A text that cannot be a report (no word, more than
`RUNAWAY` times the reference's length, or cut by the token limit) gets the reward's lowest value; so does, for
the clinical reward, one that states nothing the labeler knows where the reference states something.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from valor.clinical.summary import summarise
from valor.errors import UserError
from valor.metrics.gleu import gleu
from valor.metrics.words import clean, words
from valor.recipe import TextReward
from valor.rewards.agreement import AgreementWeights, agreement
from valor.rewards.completions import completion_text, were_cut

RewardFunction = Callable[..., list[float]]
Scorer = Callable[[str, str], float]

RUNAWAY = 4
"""A candidate of more than this many times the reference's words (counted as at least `SHORT`) has run away."""
SHORT = 50
REPEAT_N = 4
"""Words in the n-grams that `repetition_reward` counts."""


@dataclasses.dataclass(frozen=True)
class LengthBounds:
    """Full reward between `low` and `high` times the reference's words; nothing from `2 * high` on."""

    low: float = 0.6
    high: float = 1.5


def clinical_agreement(reference: str, candidate: str, weights: AgreementWeights) -> float:
    """Return agreement on findings, sides and zones in [-1, 1]; -1 where the candidate alone states nothing.

    What the candidate asserts and denies in one breath is uncertain, unless the reference does so too.
    """
    expected = summarise(reference)
    stated = summarise(candidate, is_candidate=True, pardoned=expected.contradictions)
    return agreement(expected, stated, weights) if stated.labels or not expected.labels else -1.0


def sentence_gleu(reference: str, candidate: str) -> float:
    """Return sentence GLEU in [0, 1]."""
    return gleu(refs=[reference], hyps=[candidate])[0]


def length_fit(reference: str, candidate: str, bounds: LengthBounds) -> float:
    """Return 1 for a length within the bounds, falling linearly to 0 at no words and at twice the upper bound."""
    ratio = _count(candidate) / max(_count(reference), 1)
    if ratio < bounds.low:
        return ratio / bounds.low
    return min(1.0, max(0.0, 2.0 - ratio / bounds.high))


def freedom_from_repetition(reference: str, candidate: str) -> float:
    """Return the share of distinct 4-grams, or of distinct sentences where that is smaller, in [0, 1].

    Findings and impression repeat each other a little, so what the reference repeats is not held against a candidate.
    """
    return min(1.0, _distinct(candidate) / _distinct(reference)) if _count(candidate) else 0.0


@functools.lru_cache(maxsize=8192)
def _count(text: str) -> int:
    return len(words(text))


@functools.lru_cache(maxsize=8192)
def _distinct(text: str) -> float:
    tokens = words(text)
    grams = Counter(zip(*(tokens[i:] for i in range(REPEAT_N)), strict=False))
    sentences = Counter(joined for sentence in text.split(".") if (joined := clean(sentence)))
    shares = [len(c) / c.total() for c in (grams, sentences) if c]
    return min(shares, default=1.0)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A known reward: its scorer, its options' class (None without options) and its lowest value."""

    scorer: Callable[..., float]
    options: Callable[..., Any] | None
    worst: float


KNOWN: Mapping[str, _Kind] = {
    "clinical_agreement_reward": _Kind(clinical_agreement, AgreementWeights, -1.0),
    "gleu_reward": _Kind(sentence_gleu, None, 0.0),
    "length_reward": _Kind(length_fit, LengthBounds, 0.0),
    "repetition_reward": _Kind(freedom_from_repetition, None, 0.0),
}
"""The rewards that a recipe can name."""


def build(
    rewards: Sequence[TextReward], *, eos_token_ids: Collection[int] = ()
) -> tuple[list[RewardFunction], list[float]]:
    """Return reward functions for TRL and their weights.

    Args:
        rewards: names, weights and options from the recipe.
        eos_token_ids: ids that end a report; a completion without any of them was cut.

    Returns:
        Functions `(completions, reference, **kwargs) -> list[float]` with distinct `__name__`, and their weights.

    Raises:
        UserError: an unknown option, or bounds that cannot be.
    """
    functions: list[RewardFunction] = []
    seen: Counter[str] = Counter()
    for reward in rewards:
        scorer, worst = _scorer(reward)
        seen[reward.name] += 1
        # TRL logs by __name__: two alike would share one column.
        name = reward.name if seen[reward.name] == 1 else f"{reward.name}_{seen[reward.name]}"
        functions.append(_function(scorer, name, worst, frozenset(eos_token_ids)))
    return functions, [reward.weight for reward in rewards]


def is_report(candidate: str, reference: str) -> bool:
    """Tell whether a text can be a report at all: it has words, and has not run away from the reference's length."""
    return 0 < _count(candidate) <= RUNAWAY * max(_count(reference), SHORT)


def _scorer(reward: TextReward) -> tuple[Scorer, float]:
    kind = KNOWN[reward.name]
    known = [field.name for field in dataclasses.fields(kind.options)] if kind.options else []  # type: ignore[arg-type]
    for option, value in reward.options.items():
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has no options"
            raise UserError(f"grpo_text.rewards.{reward.name}.options.{option}: unknown option; {reward.name} {has}")
        if not value >= 0:
            raise UserError(f"grpo_text.rewards.{reward.name}.options.{option}: is {value}, expected 0 or more")
    if kind.options is None:
        return kind.scorer, kind.worst
    options = kind.options(**reward.options)
    _check(reward.name, options)
    return functools.partial(_with_options, kind.scorer, options), kind.worst


def _with_options(scorer: Callable[..., float], options: Any, reference: str, candidate: str) -> float:
    return scorer(reference, candidate, options)


def _check(name: str, options: Any) -> None:
    if isinstance(options, LengthBounds) and not 0 < options.low <= options.high:
        raise UserError(
            f"grpo_text.rewards.{name}.options: low is {options.low} and high {options.high}, expected 0 < low <= high"
        )
    if isinstance(options, AgreementWeights) and not options.true_positive > 0:
        raise UserError(f"grpo_text.rewards.{name}.options.true_positive: is 0, expected more")


def _function(scorer: Scorer, name: str, worst: float, eos_token_ids: frozenset[int]) -> RewardFunction:
    def reward(
        completions: Sequence[Any],
        reference: Sequence[str],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        texts = [completion_text(c) for c in completions]
        cut = were_cut(completion_ids, count=len(texts), eos_token_ids=eos_token_ids)
        return [
            scorer(ref, text) if not is_cut and is_report(text, ref) else worst
            for text, ref, is_cut in zip(texts, reference, cut, strict=True)
        ]

    reward.__name__ = reward.__qualname__ = name
    return reward
