"""Sentence GLEU (Wu et al. 2016, arXiv 1609.08144, section 4.3): a BLEU that behaves on one short text.

All n-grams of 1 to 4 words are pooled; the score is the smaller of precision and recall. One reference per
hypothesis, words as in `valor.metrics.words`.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence

from valor.metrics.words import words

MAX_N = 4


def gleu(*, refs: list[str], hyps: list[str]) -> list[float]:
    """Return one score in [0, 1] per pair; 0 where either text has no word."""
    return [_score(_grams(ref), _grams(hyp)) for ref, hyp in zip(refs, hyps, strict=True)]


# A reference is compared with every completion of its group.
@functools.lru_cache(maxsize=1024)
def _grams(text: str) -> Counter[tuple[str, ...]]:
    return ngrams(words(text))


def ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Count the n-grams of 1 to 4 tokens."""
    shifted = [tokens[i:] for i in range(MAX_N)]
    return Counter(itertools.chain.from_iterable(zip(*shifted[:n], strict=False) for n in range(1, MAX_N + 1)))


def _score(ref: Counter[tuple[str, ...]], hyp: Counter[tuple[str, ...]]) -> float:
    larger = max(ref.total(), hyp.total())
    if not larger:
        return 0.0
    shared = ref.keys() & hyp.keys()
    return sum(map(min, map(ref.__getitem__, shared), map(hyp.__getitem__, shared))) / larger
