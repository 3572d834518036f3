"""How the lexical metrics see a text: lower-case words and numbers, punctuation dropped.

That is what R2Gen's cleaner leaves (Chen et al. 2020), after which published BLEU figures are comparable; numbering
of list items goes too. Redaction marks (XXXX) are dropped, since no model should learn them.
"""

import functools
import re

_LISTING = re.compile(r"(?:^|(?<=[\s.]))\d{1,2}\.(?=\s)")
_WORD = re.compile(r"[a-z0-9]+(?:[.'/-][a-z0-9]+)*")


def words(text: str) -> list[str]:
    """Return the words of a text, lower-cased, in order."""
    return list(_words(text))


def clean(text: str) -> str:
    """Return the words of a text joined by single spaces."""
    return " ".join(words(text))


# Several metrics read one text in turn, and a reference is read once per candidate.
@functools.lru_cache(maxsize=8192)
def _words(text: str) -> tuple[str, ...]:
    found = _WORD.findall(_LISTING.sub(" ", text.lower()))
    return tuple(word for word in found if "x" not in word or word.strip("x") or len(word) < 3)
