"""BLEU-1..4 (Papineni et al. 2002) by sacrebleu, on words as `valor.metrics.words` gives them.

That cleaning (lower case, no punctuation, no list numbers) is R2Gen's, so corpus figures compare with papers on
IU-Xray and MIMIC-CXR; `cleaned=False` scores the text as it stands, split at white space. No smoothing: sentence
BLEU-4 is near 0 for most pairs of reports, so compare systems by `bleu_corpus`.
"""

from typing import Any

import numpy as np

from valor.metrics.words import clean

MAX_N = 4


def bleu(*, refs: list[str], hyps: list[str]) -> list[float]:
    """Return sentence BLEU-4 in [0, 1] per pair."""
    return bleu_scores(bleu_counts(refs=refs, hyps=hyps))[f"bleu_{MAX_N}"].tolist()


def bleu_corpus(*, refs: list[str], hyps: list[str], cleaned: bool = True) -> dict[str, float]:
    """Return {"bleu_1": ..., "bleu_4": ...} of the whole corpus, each in [0, 1]."""
    totals = bleu_counts(refs=refs, hyps=hyps, cleaned=cleaned).sum(axis=0)
    return {name: float(value) for name, value in bleu_scores(totals).items()}


def bleu_counts(*, refs: list[str], hyps: list[str], cleaned: bool = True) -> np.ndarray:
    """Return (N, 10) int64: matched n-grams (4), the hypothesis's n-grams (4), its words, the reference's words.

    Rows add up: a bootstrap sums the rows of its draw and calls `bleu_scores`.
    """
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(tokenize="none", smooth_method="none", max_ngram_order=MAX_N, effective_order=True, force=True)
    rows = np.zeros((len(refs), 2 * MAX_N + 2), dtype=np.int64)
    for i, (ref, hyp) in enumerate(zip(refs, hyps, strict=True)):
        if cleaned:
            ref, hyp = clean(ref), clean(hyp)
        score: Any = scorer.sentence_score(hyp, [ref])
        rows[i] = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    return rows


def bleu_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return {"bleu_1": ..., "bleu_4": ...} of shape (...) from summed counts of shape (..., 10)."""
    counts = np.asarray(counts, dtype=np.float64)
    matched, total = counts[..., :MAX_N], counts[..., MAX_N : 2 * MAX_N]
    hypothesis, reference = counts[..., -2], counts[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.where(total > 0, matched / total, 0.0))
        brevity = np.where(hypothesis < reference, 1.0 - reference / hypothesis, 0.0)
    scores = {}
    for n in range(1, MAX_N + 1):
        value = np.exp(brevity + logs[..., :n].mean(axis=-1))
        scores[f"bleu_{n}"] = np.where(hypothesis > 0, value, 0.0)
    return scores
