"""Read a mention's side and zone from the words of its own clause.

Words before the finding come first ("left lower lobe opacity"), then words after it ("opacity in the left base");
members of a pair share them ("atelectasis and consolidation in the left base").
"""

import re
from collections.abc import Sequence, Set
from typing import Protocol

from valor.clinical.vocabulary import Side, Zone


class _Token(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def value(self) -> object: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


NO_PLACE = frozenset({"Cardiomegaly", "Enlarged Cardiomediastinum", "No Finding"})
"""Findings that have neither side nor zone."""
_WHERE = frozenset({"side", "zone", "place"})
_SEPARATORS = frozenset({"comma", "and", "or"})
_ANCHORS = frozenset({"find", "subj"})
PREPOSITION = re.compile(r"\b(?:in|at|on|within|involving|along|of|over\w*|throughout|to)(?: the| both)? ?(?:\w+ )?$")

Place = tuple[Side | None, Zone | None]


def places(sentence: str, tokens: Sequence[_Token], at: Set[int]) -> dict[int, Place]:
    """Return {token index: (side, zone)} for the mentions at the token indices `at`."""
    if not any(t.kind in _WHERE for t in tokens):
        return {}
    own = {i: _own(sentence, tokens, i) for i in sorted(at)}
    for first, second in zip(sorted(at), sorted(at)[1:], strict=False):
        between = {t.kind for t in tokens[first + 1 : second]}
        if between <= {"and", "or", "size"} and second - first <= 3:
            a, b = own[first], own[second]
            own[first] = (a[0] or b[0], a[1] or b[1]) if a == (None, None) else a
            own[second] = own[first] if b == (None, None) else b
    return own


def _own(sentence: str, tokens: Sequence[_Token], at: int) -> Place:
    before, after = _before(tokens, at), _after(sentence, tokens, at)
    side, zone = _merge(before)
    late_side, late_zone = _merge(after)
    if any(t.kind in ("side", "place") and sentence[t.start : t.end].count("than") for t in after):
        side = None
    return side or late_side, zone or late_zone


def _before(tokens: Sequence[_Token], at: int) -> list[_Token]:
    found: list[_Token] = []
    for i in range(at - 1, -1, -1):
        kind = tokens[i].kind
        if kind in _WHERE:
            found.append(tokens[i])
        elif _is_anchor(tokens[i]) or kind in ("break", "with"):
            break
        elif kind in _SEPARATORS and not (i and tokens[i - 1].kind in _WHERE and tokens[i + 1].kind in _WHERE):
            # "left and right upper lobe" goes on; "effusion on the left and atelectasis" does not.
            break
    return found[::-1]


def _after(sentence: str, tokens: Sequence[_Token], at: int) -> list[_Token]:
    found: list[_Token] = []
    anchors = [i for i in range(at + 1, len(tokens)) if _is_anchor(tokens[i]) or tokens[i].kind == "break"]
    stop = anchors[0] if anchors else len(tokens)
    last = stop == len(tokens) or tokens[stop].kind == "break"
    for i in range(at + 1, stop):
        kind = tokens[i].kind
        if kind in _WHERE:
            found.append(tokens[i])
        elif kind in ("with", "neg") or (kind in _SEPARATORS and not (last and _goes_on(tokens, i))):
            return found
    if not last and found and not PREPOSITION.search(sentence[: found[0].start]):
        return []
    return found


def _goes_on(tokens: Sequence[_Token], at: int) -> bool:
    """Tell whether a place follows a separator at once ("effusions, left greater than right")."""
    following = tokens[at + 1] if at + 1 < len(tokens) else None
    return following is not None and following.kind in _WHERE and following.start - tokens[at].end <= 5


def _is_anchor(token: _Token) -> bool:
    """Tell whether words beyond a token belong to something else; the lungs are where findings lie."""
    return token.kind in _ANCHORS and token.value != "lungs"


def _merge(found: Sequence[_Token]) -> Place:
    sides: set[object] = set()
    zones: set[object] = set()
    for token in found:
        if token.kind == "place":
            both: tuple[object, object] = token.value  # type: ignore[assignment]
            sides.add(both[0])
            zones.add(both[1])
        else:
            (sides if token.kind == "side" else zones).add(token.value)
    one_side = next(iter(sides)) if len(sides) == 1 else "bilateral" if sides else None
    one_zone = next(iter(zones)) if len(zones) == 1 else None
    return one_side, one_zone  # type: ignore[return-value]
