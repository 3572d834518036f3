"""Reports as sentences, and edits of a sentence that reverse its side or its polarity.

The edits know general radiology English only; whether one reversed the meaning is for the labeler to say
(`reversed_polarity`), so a wrong guess is dropped and never becomes a training pair.
"""

import functools
import re

from valor.clinical.labeler import mentions

_HEADING = re.compile(r"\b[A-Z][A-Z ]{3,}:")
_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_ZONE_WORDS = ("upper", "mid", "lower")
_ZONE = re.compile(r"\b(upper|mid|lower)\b", re.IGNORECASE)
_SIDE = re.compile(r"\b(left|right)(?=\b|-)", re.IGNORECASE)
_DENIALS = (
    (re.compile(r"^there (is|are) no (evidence of |definite |convincing )?", re.IGNORECASE), r"There \1 "),
    (re.compile(r"^no (?=.*\b(?:is|are) (?:present|seen|noted|identified|visible)\b)", re.IGNORECASE), ""),
    (re.compile(r"^no (evidence of |definite |convincing |focal )?", re.IGNORECASE), "There is "),
    (re.compile(r"\b(is|are) not\b", re.IGNORECASE), r"\1"),
    (re.compile(r"\bwithout (evidence of )?", re.IGNORECASE), "with "),
    (re.compile(r"\bnegative for\b", re.IGNORECASE), "positive for"),
    (re.compile(r"\b(heart|cardiac silhouette)(.*?)\bnormal\b", re.IGNORECASE), r"\1\2enlarged"),
)
_CLAIMS = (
    (re.compile(r"^there (is|are) (an? )?", re.IGNORECASE), r"There \1 no "),
    (re.compile(r"\b(heart|cardiac silhouette)(.*?)\b\w*\s*enlarged\b", re.IGNORECASE), r"\1\2normal in size"),
    (re.compile(r"\b(is|are) (present|seen|noted|identified|visible)\b", re.IGNORECASE), r"\1 not \2"),
    (re.compile(r"^(an? |the )?(?!patient)(?=\w)", re.IGNORECASE), "No "),
)


def sentences(report: str) -> list[str]:
    """Return a report's sentences in order, without section headings; an empty list for an empty report."""
    parts = (part.strip(" ;\t") for part in _END.split(_HEADING.sub("\n", report)))
    return [part for part in parts if any(c.isalnum() for c in part)]


def swap_sides(text: str) -> str:
    """Return the text with left and right exchanged; unchanged where it names neither."""
    return _SIDE.sub(lambda m: _like(m[0], "right" if m[0].lower() == "left" else "left"), text)


def moved_zones(text: str) -> list[str]:
    """Return the text in each of the other two zones (upper, mid, lower); [] where it names none or several."""
    named = {m[0].lower() for m in _ZONE.finditer(text)}
    if len(named) != 1:
        return []
    edits = []
    for zone in _ZONE_WORDS:
        if zone not in named:
            edits.append(_ZONE.sub(functools.partial(_in_case_of, word=zone), text))
    return edits


def reversed_polarity(sentence: str) -> str:
    """Return an edit that makes every asserted finding denied, or every denied one asserted; "" where none is found.

    The labeler must read the same findings with exactly the opposite label; uncertain sentences have no opposite.
    """
    own = {(m.finding, m.label) for m in mentions(sentence)}
    labels = {label for _, label in own}
    if labels not in ({"positive"}, {"negative"}) or any(finding == "No Finding" for finding, _ in own):
        return ""
    opposite = "negative" if labels == {"positive"} else "positive"
    wanted = {(finding, opposite) for finding, _ in own}
    for pattern, replacement in _CLAIMS if opposite == "negative" else _DENIALS:
        edit, count = pattern.subn(replacement, sentence, count=1)
        edit = _sentence_case(edit)
        if count and {(m.finding, m.label) for m in mentions(edit)} == wanted:
            return edit
    return ""


def _sentence_case(text: str) -> str:
    """Return the text with a capital first letter, and what follows a leading "No" in lower case."""
    text = re.sub(r"^No ([A-Z])(?=[a-z])", lambda m: f"No {m[1].lower()}", text)
    return text[:1].upper() + text[1:]


def _in_case_of(match: re.Match[str], *, word: str) -> str:
    return _like(match[0], word)


def _like(model: str, word: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
