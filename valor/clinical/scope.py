"""Judge the mentions of one sentence: negation, doubt, predicates of organs, side and zone.

One pass over the sentence's tokens (`valor.clinical.lexicon`) carries the scope of a negation or a doubt forward
until something ends it, lets "has resolved" or "cannot be excluded" reach back over the list before it, and gives
organs ("heart size") their predicate ("is normal").
"""

import re
from typing import Any, NamedTuple

from valor.clinical.lexicon import ABNORMAL_MEANS, LEXER, NORMAL_MEANS, TOKENS
from valor.clinical.place import NO_PLACE, PREPOSITION, places
from valor.clinical.vocabulary import Label, Side, Zone

Reading = tuple[str, Label, Side | None, Zone | None, int, int]
"""(finding, label, side, zone, start, end) with the span inside the sentence."""

LINKS = frozenset({"comma", "and", "or", "side", "zone", "place", "size"})
"""Tokens that join the members of a list without ending it."""
_MODIFIERS = LINKS - {"comma", "and", "or"} | {"pred", "stable", "verb"}
"""Tokens that may stand between "resolved" and the finding that it denies ("resolved small left effusion")."""
_TURN = re.compile(r"[:\n]|\b(?:after|as|at|because|by|due|following|for|from|given|in|on|since|than)\b")
"""What shows that a finding behind "resolved" or "unlikely" is another matter ("unlikely given the effusion")."""
_LIES = re.compile(r"\b(?:in|at|on|within|involving|along|of|over\w*|throughout|to)\b")
_PLURAL = frozenset({"have", "are", "were"})
_SHORT_GAP = 25
"""Characters between an adjective and its organ: "enlargement of the left heart"."""


class Token(NamedTuple):
    """A word that the lexicon knows, with its span in the sentence."""

    kind: str
    value: Any
    start: int
    end: int


def read_sentence(sentence: str) -> tuple[Reading, ...]:
    """Return the readings of one lower-case sentence, in its order."""
    tokens = [Token(*TOKENS[m.lastindex or 0], m.start(), m.end()) for m in LEXER.finditer(sentence)]
    if not any(t.kind in ("find", "find_neg", "subj") for t in tokens):
        return ()
    drafts = _Walk(sentence, tokens).run()
    where = places(sentence, tokens, {d.at for d in drafts if d.finding not in NO_PLACE})
    return tuple(
        (d.finding, d.label, *where.get(d.at, (None, None)), d.start, d.end)
        for d in sorted(drafts, key=lambda d: (d.start, d.finding))
    )


class _Draft:
    """A mention whose label later words may still change."""

    __slots__ = ("at", "end", "finding", "label", "start")

    def __init__(self, finding: str, label: Label, *, at: int, start: int, end: int):
        self.finding, self.label, self.at, self.start, self.end = finding, label, at, start, end


class _Walk:
    """The state while passing over a sentence's tokens.

    `scope` is None, "neg", "unc" or "ignore"; `filled` tells that the scope already has a member, after which a new
    clause may end it. `pending` holds organs that wait for a predicate, `lead` a predicate before its organ.
    `clause` is the first draft of the clause, `outside` that of the clause before it.
    """

    def __init__(self, sentence: str, tokens: list[Token]):
        self.sentence = sentence
        self.tokens = tokens
        self.drafts: list[_Draft] = []
        self.clause = self.outside = 0
        self.scope: str | None = None
        self.filled = False
        self.pending: list[tuple[int, str | None]] = []
        self.lead: int | None = None

    def run(self) -> list[_Draft]:
        """Return the sentence's mentions, unsorted."""
        for at, token in enumerate(self.tokens):
            handler = getattr(self, "_on_" + token.kind, None)
            if handler:
                handler(at, token)
        self._settle()
        return self.drafts

    # Scopes

    def _open(self, scope: str | None) -> None:
        self.scope, self.filled = scope, False

    def _on_break(self, at: int, token: Token) -> None:
        if self.scope != "ignore":
            self._open(None)
        # "The lungs are hypoinflated but clear" still speaks of the lungs.
        if self._kind(at + 1) not in ("pred", "verb"):
            self._settle()
        self.lead = None
        self.outside, self.clause = self.clause, len(self.drafts)

    def _on_with(self, at: int, token: Token) -> None:
        if self.filled and self.scope in ("neg", "unc"):
            self._open(None)

    def _on_ignore(self, at: int, token: Token) -> None:
        self._open("ignore")

    def _on_neg(self, at: int, token: Token) -> None:
        if self.scope != "ignore":
            self._open("neg")

    def _on_unc(self, at: int, token: Token) -> None:
        if token.value == "versus":
            self._doubt(self._list_before(at, most=1))
        # "no opacity to suggest pneumonia" stays denied; "no effusion, possible pneumonia" does not.
        anew = token.value in ("may", "new") and self.filled and self._kind(at - 1) in ("comma", "and")
        if self.scope is None or token.value == "new" or (self.scope == "neg" and anew):
            self._open("unc")

    def _on_size(self, at: int, token: Token) -> None:
        """A fresh noun phrase after a comma ends a filled scope, unless "or" shows that the list goes on."""
        if self.filled and self.scope in ("neg", "unc") and self._kind(at - 1) in ("comma", "and"):
            rest = (t.kind for t in self.tokens[at:])
            if not any(kind == "or" for kind in rest):
                self._open(None)

    _on_side = _on_place = _on_size

    def _kind(self, at: int) -> str:
        return self.tokens[at].kind if 0 <= at < len(self.tokens) else ""

    def _word(self, at: int) -> str:
        return self.sentence[self.tokens[at].start : self.tokens[at].end] if 0 <= at < len(self.tokens) else ""

    # Findings

    def _on_find(self, at: int, token: Token) -> None:
        self.lead = None if self._kind(at - 1) != "pred" or self.tokens[at - 1].value != "borderline" else self.lead
        if self.scope == "ignore":
            return
        label: Label = "negative" if self.scope == "neg" else "uncertain" if self.scope == "unc" else "positive"
        if label == "positive" and self.lead is not None:
            label = "uncertain"
        self.lead = None
        self.filled = True
        if self._kind(at - 1) == "or" and label == "positive":
            # "opacity, atelectasis or scarring" doubts two; "atelectasis, scarring, or pneumonia" all three.
            self._doubt(self._list_before(at, most=None if self._kind(at - 2) == "comma" else 1))
            label = "uncertain"
        self.drafts.append(_Draft(token.value, label, at=at, start=token.start, end=token.end))

    def _on_find_neg(self, at: int, token: Token) -> None:
        if self.scope != "neg":
            return
        self.filled = True
        if token.value == "No Finding":
            self._predicate(at, "normal")
            label: Label = "positive"
        else:
            label = "negative"
        self.drafts.append(_Draft(token.value, label, at=at, start=token.start, end=token.end))

    def _on_neg_post(self, at: int, token: Token) -> None:
        if self.scope in ("neg", "ignore"):
            return
        reached = self._list_before(at)
        for draft in reached:
            draft.label = "negative"
        if not reached:
            self._open("neg")

    def _on_neg_either(self, at: int, token: Token) -> None:
        # "Has not resolved" denies the denial; "may have resolved" doubts it.
        doubted = self.scope == "unc" and not self.filled
        if self.scope == "ignore" or (self.scope == "neg" and not self.filled):
            return
        if not token.value and self._leads(at):
            self._open("unc" if doubted else "neg")
            return
        # "The chest is negative" is said of an organ.
        if self._word(at) == "negative" and self.pending and self.pending[-1][0] >= at - 2:
            self._predicate(at, "normal")
            return
        for draft in self._list_told(at):
            draft.label = "uncertain" if doubted else "negative"

    def _on_unc_either(self, at: int, token: Token) -> None:
        if self.scope == "ignore" or (self.scope == "neg" and not self.filled):
            return
        if self._leads(at):
            self._open("unc")
        else:
            self._doubt(self._list_told(at))

    def _leads(self, at: int) -> bool:
        """Tell "resolved left effusion" from "left effusion resolved"."""
        for token in self.tokens[at + 1 :]:
            if token.kind not in _MODIFIERS:
                between = self.sentence[self.tokens[at].end : token.start]
                return token.kind in ("find", "find_neg", "subj") and not _TURN.search(between)
        return False

    def _list_told(self, at: int) -> list[_Draft]:
        """Return the list before a word such as "none", without members of which something else is told.

        "Effusion, pneumothorax: none" is a list; "small effusion, pneumothorax: none" and "effusion persists,
        pneumothorax absent" are not. A plural ("have resolved") tells all.
        """
        reached = self._list_before(at)
        if self._word(at - 1) in _PLURAL:
            return reached
        for i, draft in enumerate(reached[1:], start=1):
            joint = self.tokens[draft.at + 1].start
            if self._kind(draft.at - 1) == "size" or self.sentence[draft.end : joint].strip(" /"):
                return reached[:i]
        return reached

    def _on_unc_post(self, at: int, token: Token) -> None:
        self._doubt(self._list_before(at))

    def _doubt(self, drafts: list[_Draft]) -> None:
        for draft in drafts:
            if draft.label == "positive":
                draft.label = "uncertain"

    def _list_before(self, at: int, most: int | None = None) -> list[_Draft]:
        """Return the last mentions of this clause, at `most`, joined in one list that ends before token `at`.

        A remark in brackets ("effusion (resolved)") is made on the clause before it. A list does not reach over an
        organ ("effusion, the costophrenic angle is not visible"), unless that is where the finding lies.
        """
        if self.pending and self.drafts:
            organ, last = self.tokens[self.pending[-1][0]], self.drafts[-1]
            if last.end < organ.start and not _LIES.search(self.sentence, last.end, organ.start):
                return []
        first = self.outside if self._word(at - 1) == "(" else self.clause
        reached: list[_Draft] = []
        limit = at
        for draft in reversed(self.drafts[first:]):
            between = self.tokens[draft.at + 1 : limit]
            # Any words may lie between the last member and `at`, only links between the members.
            if len(reached) == most or (reached and any(t.kind not in LINKS for t in between)):
                break
            reached.append(draft)
            limit = draft.at
        return reached

    # Organs and their predicates

    def _on_subj(self, at: int, token: Token) -> None:
        following = self.tokens[at + 1] if at + 1 < len(self.tokens) else None
        # "Focal lung consolidation" tells nothing of the lungs.
        modifies = following is not None and following.kind == "find" and following.start <= token.end + 1
        if self.scope == "ignore" or modifies or (token.value == "lungs" and self._locates(token)):
            return
        previous = self.pending[-1][0] if self.pending else None
        if previous is not None and any(t.kind not in LINKS for t in self.tokens[previous + 1 : at]):
            self._settle()
            previous = None
        if self.filled and self.scope in ("neg", "unc") and self._kind(at - 1) in ("comma", "and"):
            self._open(None)
        inherited = self.pending[-1][1] if previous is not None else None
        if self.lead is not None and token.start - self.tokens[self.lead].end <= _SHORT_GAP:
            inherited = self._meaning(self.tokens[self.lead].value)
        self.lead = None
        self.pending.append((at, inherited))

    def _locates(self, organ: Token) -> bool:
        """Tell "opacity in the left lung" from "the left lung is clear"."""
        return len(self.drafts) > self.clause and bool(PREPOSITION.search(self.sentence, 0, organ.start))

    def _on_pred(self, at: int, token: Token) -> None:
        if self.pending and not self._qualifies_a_finding(at):
            self._predicate(at, self._meaning(token.value))
        else:
            self.lead = at

    def _qualifies_a_finding(self, at: int) -> bool:
        """Tell "increased opacity" from "is increased"."""
        following = self.tokens[at + 1] if at + 1 < len(self.tokens) else None
        return following is not None and following.kind == "find" and following.start - self.tokens[at].end < 15

    def _meaning(self, value: str) -> str:
        """Return what a predicate says under the present scope: normal, abnormal, borderline or nothing."""
        if self.scope == "neg" and not self.filled:
            return "nothing" if value == "normal" else "normal"
        if self.scope == "unc" and value != "normal":
            return "borderline"
        return value

    def _predicate(self, at: int, meaning: str) -> None:
        for subject, _ in self.pending:
            self._state(subject, meaning, at=at)
        if self.pending:
            self.filled = True
        self.pending = []

    def _settle(self) -> None:
        """Give organs that wait the predicate which led their list, if one did."""
        for subject, meaning in self.pending:
            if meaning:
                self._state(subject, meaning, at=subject)
        self.pending = []

    def _state(self, subject: int, meaning: str, *, at: int) -> None:
        organ = self.tokens[subject]
        start, end = min(organ.start, self.tokens[at].start), max(organ.end, self.tokens[at].end)
        if meaning == "normal":
            label: Label | None = "positive" if organ.value == "chest" else "negative"
            findings = NORMAL_MEANS[organ.value]
        else:
            label = ABNORMAL_MEANS.get((organ.value, meaning))
            findings = NORMAL_MEANS[organ.value][:1]
        if label:
            self.drafts += [_Draft(finding, label, at=subject, start=start, end=end) for finding in findings]
