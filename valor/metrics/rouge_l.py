"""ROUGE-L (Lin 2004) by Google's rouge-score: F1 of the longest common subsequence of words, without stemming.

Words are those of `valor.metrics.words`. Radiology papers often print COCO's variant (recall weighted by 1.2),
which lies a few points away.
"""

from valor.metrics.words import words


class _Words:
    """The tokenizer's interface that rouge-score expects."""

    def tokenize(self, text: str) -> tuple[str, ...]:
        return words(text)


def rouge_l(*, refs: list[str], hyps: list[str]) -> list[float]:
    """Return one F1 in [0, 1] per pair; 0 where either text has no word."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [float(scorer.score(ref, hyp)["rougeL"].fmeasure) for ref, hyp in zip(refs, hyps, strict=True)]
