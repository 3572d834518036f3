"""How the lexical metrics see a text: lower-case words and numbers, punctuation dropped.

That is what R2Gen's cleaner leaves (Chen et al. 2020), after which published BLEU figures are comparable; numbering
of list items goes too. Redaction marks (XXXX) are dropped, since no model should learn them.
"""

import re

_LISTING = re.compile(r"(?:^|(?<=[\s.]))\d{1,2}\.(?=\s)")
_WORD = re.compile(r"[a-z0-9]+(?:[.'/-][a-z0-9]+)*")


def words(text: str) -> list[str]:
    """Return the words of a text, lower-cased, in order."""
    return [w for w in _WORD.findall(_LISTING.sub(" ", text.lower())) if w.strip("x") or len(w) < 3]


def clean(text: str) -> str:
    """Return the words of a text joined by single spaces."""
    return " ".join(words(text))
