"""Stage 2's rewards: how well a report fits the image in the eyes of a frozen expert.

`paper` is VALOR's similarity of image and report (arXiv 2512.16201) as we read it: the mean cosine of the report's
sentences with the image, since a report is longer than the 77 tokens that the paper's kind of expert takes.
`statements` is VALOR's closed variant, not the paper's: silence, length and wording cannot game it, because a labeler
reads every report into one assertion per finding (`valor.models.statements`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from valor.clinical.labeler import mentions
from valor.models.sentences import sentences
from valor.models.statements import ODDS, Statements
from valor.rewards.completions import completion_text, were_cut

if TYPE_CHECKING:
    import torch

    from valor.models.expert import Expert

LOWEST_SIMILARITY = -1.0
LOWEST_STATEMENTS = -10.0
"""What a truncated or repetitive report gets, and one that states nothing: below every other report, and a number,
since TRL gives a nan reward the advantage 0, which is above the median."""
_MAX_REPEATS = 2
"""A sentence may stand in findings and again in the impression."""


def expert_reward(
    expert: "Expert",
    similarity: Literal["paper", "statements"] = "paper",
    *,
    odds: float = ODDS,
    eos_token_ids: Sequence[int] = (),
) -> Callable[..., list[float]]:
    """Return a reward in TRL's signature; rows carry `image_embed`, (D,) floats from `expert.embed_images`.

    Args:
        expert: frozen; for `statements` its gate must have been measured.
        similarity: `paper` in [-1, 1], or `statements`, a mean log-probability in [-3, 0] or LOWEST_STATEMENTS.
        odds: of `statements`: what the odds of presence are multiplied by.
        eos_token_ids: where given, a completion whose `completion_ids` hold none of them counts as truncated.

    Raises:
        UserError: `statements` with an expert without calibration.
    """
    score: Callable[[torch.Tensor, Sequence[str]], list[float]]
    if similarity == "paper":
        score, lowest = expert.paper_similarity, LOWEST_SIMILARITY
    else:
        score, lowest = Statements.of(expert, odds=odds).log_probability, LOWEST_STATEMENTS

    def reward(
        completions: Sequence[Any],
        image_embed: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        import numpy as np
        import torch

        texts = [completion_text(completion) for completion in completions]
        cut = were_cut(completion_ids, count=len(texts), eos_token_ids=eos_token_ids)
        last = unusable(texts, cut, must_state=similarity == "statements")
        scores = score(torch.from_numpy(np.asarray(image_embed, dtype=np.float32)), texts)
        return [lowest if is_last else float(value) for value, is_last in zip(scores, last, strict=True)]

    reward.__name__ = f"expert_{similarity}_reward"
    return reward


def unusable(texts: Sequence[str], cut: Sequence[bool], *, must_state: bool) -> list[bool]:
    """Tell of each report whether it must rank last: truncated, empty, or repetitive.

    Args:
        texts: the reports.
        cut: whether each was.
        must_state: whether one that states nothing is empty, too: where silence counts as denial, such words would earn
            what a normal report does.
    """
    parts = mentions if must_state else sentences
    return [is_cut or not parts(text) or is_repetitive(text) for text, is_cut in zip(texts, cut, strict=True)]


def is_repetitive(report: str) -> bool:
    """Tell whether a sentence comes more than twice, or less than half of the report's four-word runs are distinct."""
    parts = [part.lower() for part in sentences(report)]
    if any(parts.count(part) > _MAX_REPEATS for part in set(parts)):
        return True
    words = report.lower().split()
    runs = list(zip(*(words[i:] for i in range(4)), strict=False))
    return len(runs) >= 8 and len(set(runs)) < len(runs) / 2
