"""How the lexical metrics see a text: lower-case words and numbers, punctuation dropped.

That is what R2Gen's cleaner leaves (Chen et al. 2020), after which published BLEU figures are comparable; numbering
of list items goes too. Redaction marks (XXXX) are dropped, since no model should learn them.
"""

import functools
import re

# Looks back after the first digit, not before: `re` then skips to the next digit.
_LISTING = re.compile(r"[0-9](?<![^\s.].)[0-9]?\.(?=\s)")
_WORD = re.compile(r"[a-z0-9]+(?:[.'/-][a-z0-9]+)*")


# Several metrics read one text in turn, and a reference is read once per candidate.
@functools.lru_cache(maxsize=8192)
def words(text: str) -> tuple[str, ...]:
    """Return the words of a text, lower-cased, in order."""
    found = _WORD.findall(_LISTING.sub(" ", text.lower()))
    return tuple(word for word in found if "x" not in word or word.strip("x") or len(word) < 3)


# Reports repeat their sentences, and sampled completions of one study even more so.
@functools.lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """Return the words of a text joined by single spaces."""
    return " ".join(words(text))
