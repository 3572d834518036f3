"""Reports as one assertion per finding, and an expert's opinion of each: VALOR's closed similarity.

The labeler reads a report into canonical statements: a finding is present (with a side and a zone where named), absent
(silence counts as absent) or uncertain. The expert's margin between a statement and its denial, calibrated on
held-out reports (`valor.models.calibration`), is a probability; a report's score is the mean log-probability of what
it asserts, over the findings that the expert passed. A finding stands for its broader names, and the names of one line
share one finding's weight (`valor.clinical.hierarchy`): else one consolidation would count three times. The paper
(arXiv 2512.16201) has no such reward.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from valor.clinical.hierarchy import NAMES, SHARE
from valor.clinical.labeler import labels_of, mentions
from valor.clinical.vocabulary import OBSERVATIONS, SIDES, ZONES, Label
from valor.errors import UserError

if TYPE_CHECKING:
    import torch

    from valor.models.expert import Expert

FLOOR = -3.0
"""Log-probabilities are clipped here (p = 0.05): one confident mistake must not outweigh all the rest."""
ODDS = 1.5
"""The odds of presence are multiplied by this in the score unless asked otherwise, so naming a finding pays from
p = 1 / (1 + ODDS) = 0.4 on: the threshold that maximises F1 is half of the F1 that it reaches (Lipton et al. 2014,
arXiv 1402.1892), about 0.8 here. Against held-out reports 1.5 was best of 0.7 to 9 (docs/development.md)."""
PLACE_FLOOR = -math.log(2)
"""The most that a wrong side, or a wrong zone, costs a finding that is there."""
_PLACE_SHARE = 0.5
"""The most that place costs, of what naming and silence differ by. At all of it and more a finding of which the expert
is not sure would be worth hiding unless it is put right, and the reward would teach omissions."""

_ORDER: tuple[Label, ...] = ("negative", "uncertain", "positive")
_NOUNS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": ("widening of the mediastinum", "mediastinal widening"),
    "Cardiomegaly": ("cardiomegaly", "enlargement of the heart"),
    "Lung Opacity": ("pulmonary opacity", "opacity"),
    "Lung Lesion": ("pulmonary nodule", "nodule"),
    "Edema": ("pulmonary edema", "interstitial edema"),
    "Consolidation": ("consolidation", "airspace consolidation"),
    "Pneumonia": ("pneumonia",),
    "Atelectasis": ("atelectasis",),
    "Pneumothorax": ("pneumothorax",),
    "Pleural Effusion": ("pleural effusion", "pleural fluid"),
    "Pleural Other": ("pleural thickening",),
    "Fracture": ("rib fracture", "fracture"),
    "Support Devices": ("support device",),
}
SIDED = tuple(
    f for f in OBSERVATIONS if f not in ("Enlarged Cardiomediastinum", "Cardiomegaly", "Edema", "Support Devices")
)
ZONED = ("Lung Opacity", "Lung Lesion", "Consolidation", "Pneumonia", "Atelectasis")


def present(finding: str) -> tuple[str, ...]:
    """Return wordings of "the finding is present" in general radiology English."""
    return tuple(t for noun in _NOUNS[finding] for t in (f"There is {noun}.", f"{_capital(noun)} is present."))


def absent(finding: str) -> tuple[str, ...]:
    """Return wordings of the denial."""
    return tuple(t for noun in _NOUNS[finding] for t in (f"There is no {noun}.", f"No evidence of {noun}."))


def on_side(finding: str, side: str) -> tuple[str, ...]:
    """Return wordings of "the finding is present on that side" (`left`, `right`, `bilateral`)."""
    return tuple(t for noun in _NOUNS[finding] for t in (f"There is {side} {noun}.", f"{_capital(side)} {noun}."))


def in_zone(finding: str, zone: str) -> tuple[str, ...]:
    """Return wordings of "the finding is present in that zone" (`upper`, `mid`, `lower`)."""
    return tuple(f"{_capital(noun)} in the {zone} lung zone." for noun in _NOUNS[finding])


class Margins:
    """The expert's raw opinion of images, by finding; statement embeddings are made once.

    Args:
        expert: the dual encoder.
        wordings: which of each statement's wordings to average; all, but where the noise between them is measured.
    """

    def __init__(self, expert: "Expert", wordings: slice = slice(None)):
        import torch

        def embed(statements: Sequence[tuple[str, ...]]) -> "torch.Tensor":
            chosen = [list(texts[wordings] or texts) for texts in statements]
            rows = torch.stack([expert.embed_texts(texts).mean(dim=0) for texts in chosen])
            return rows / rows.norm(dim=-1, keepdim=True)

        self._presence = embed([present(f) for f in OBSERVATIONS]) - embed([absent(f) for f in OBSERVATIONS])
        self._sides = embed([on_side(f, s) for f in OBSERVATIONS for s in SIDES])
        self._zones = embed([in_zone(f, z) for f in OBSERVATIONS for z in ZONES])

    def presence(self, image_embeds: "torch.Tensor") -> "torch.Tensor":
        """Return (N, 13) margins: cosine with "present" minus cosine with "absent"."""
        return image_embeds @ self._presence.T

    def sides(self, image_embeds: "torch.Tensor") -> "torch.Tensor":
        """Return (N, 13, 3) cosines with the finding on each of `SIDES`, centred over sides."""
        return _centred(image_embeds @ self._sides.T)

    def zones(self, image_embeds: "torch.Tensor") -> "torch.Tensor":
        """Return (N, 13, 3) cosines with the finding in each of `ZONES`, centred over zones."""
        return _centred(image_embeds @ self._zones.T)


class Statements:
    """The calibrated score of a report's assertions."""

    def __init__(
        self, margins: Margins, calibration: dict[str, dict[str, Any]], *, masked: Sequence[str], odds: float = ODDS
    ):
        """Build from `expert_gate.json`'s calibration per finding; `masked` findings take no part.

        Args:
            odds: what the odds of presence are multiplied by in the score (> 0).

        Raises:
            UserError: every finding is masked.
        """
        import torch

        self._margins = margins
        self._shift = math.log(odds)
        self._keep = _rewarded(calibration, masked)
        rows = [calibration.get(f, {}) for f in OBSERVATIONS]
        self._worth = torch.tensor([SHARE.get(OBSERVATIONS[i], 1.0) for i in self._keep])
        self._worth /= self._worth.sum()
        self._scale = torch.tensor([float(row.get("scale", 0)) for row in rows])
        self._bias = torch.tensor([float(row.get("bias", 0)) for row in rows])
        self._side = _choice(rows, "side")
        self._zone = _choice(rows, "zone")

    @classmethod
    def of(cls, expert: "Expert", *, odds: float = ODDS) -> "Statements":
        """Build from an expert's own gate.

        Raises:
            UserError: the expert has no measured gate, or passed it for no finding.
        """
        require_rewarded(expert.gate)
        return cls(Margins(expert), expert.gate["calibration"], masked=expert.gate["masked"], odds=odds)

    def probability(self, image_embeds: "torch.Tensor") -> "torch.Tensor":
        """Return (N, 13) calibrated probabilities that each finding is present."""
        return (self._scale * self._margins.presence(image_embeds) + self._bias).sigmoid()

    def log_probability(self, image_embeds: "torch.Tensor", reports: Sequence[str]) -> list[float]:
        """Return per report the mean log-probability of its assertions, each clipped to [FLOOR, 0].

        Uncertain costs the mean of "present" and "absent", so a hedge never beats the better of the two. A side or zone
        beside a finding that is present costs the log of its probability over the likeliest one's, clipped to
        [PLACE_FLOOR, 0] and weighted by the finding's own probability; naming none costs as much as one drawn by its
        frequency. Both together cost at most half of what naming and silence differ by. So the likeliest place is the
        best to name, no place makes a doubtful finding worth naming, and none makes a likely one worth hiding.
        """
        import torch

        p = (self.probability(image_embeds).logit(eps=1e-6) + self._shift).sigmoid()
        yes, no = p.log().clamp_min(FLOOR), (1 - p).log().clamp_min(FLOOR)
        sides = self._place(self._margins.sides(image_embeds), *self._side)
        zones = self._place(self._margins.zones(image_embeds), *self._zone)
        claim, side, zone = _encode(reports)
        score = torch.where(claim == 1, yes, torch.where(claim == 0, no, (yes + no) / 2))
        # Place -1, none named, is the last column.
        costs = [
            place.gather(2, choice.remainder(place.shape[2]).unsqueeze(2)).squeeze(2)
            for place, choice in ((sides, side), (zones, zone))
        ]
        misplaced = torch.maximum(p * sum(costs), -_PLACE_SHARE * (yes - no).abs())
        score = score + torch.where(claim == 1, misplaced, 0.0)
        return (score[:, self._keep].clamp(FLOOR, 0) @ self._worth).tolist()

    @staticmethod
    def _place(
        cosines: "torch.Tensor", scale: "torch.Tensor", bias: "torch.Tensor", prior: "torch.Tensor"
    ) -> "torch.Tensor":
        """Return (N, 13, 4), in [PLACE_FLOOR, 0]: what each place adds, and none named; 0 where not calibrated."""
        import torch

        ratio = (scale[:, None] * cosines + bias).softmax(dim=2)
        ratio = ratio / ratio.amax(dim=2, keepdim=True)
        unnamed = (ratio * prior).sum(dim=2, keepdim=True)
        return torch.cat([ratio, unnamed], dim=2).log().clamp_min(PLACE_FLOOR)


def require_rewarded(gate: Mapping[str, Any]) -> None:
    """Raise UserError where the content of `expert_gate.json` leaves `similarity: statements` nothing to reward."""
    if not gate.get("measured"):
        raise UserError(
            "the expert's gate is not measured, so its statements have no calibration; set "
            "grpo_vision.similarity: paper, or measure the gate on held-out studies (valor expert-gate)"
        )
    _rewarded(gate["calibration"], gate["masked"])


def _rewarded(calibration: Mapping[str, Any], masked: Sequence[str]) -> list[int]:
    """Return the columns of the findings that take part; raise UserError where none does."""
    kept = [i for i, f in enumerate(OBSERVATIONS) if f in calibration and f not in masked]
    if not kept:
        raise UserError(
            "the expert passed its gate for no finding, so similarity: statements has nothing to reward; use a "
            "better expert, lower models.expert_gate, or set grpo_vision.similarity: paper"
        )
    return kept


def assertions(report: str, *, is_candidate: bool = False) -> dict[str, tuple[str, str | None, str | None]]:
    """Return {finding: (label, side, zone)} of a report; left and right make bilateral, zones that differ make None.

    A finding that is present or uncertain is so under its broader names too, in the same places.
    """
    found = mentions(report)
    labels: dict[str, Label] = {}
    for finding, value in labels_of(report, found, is_candidate=is_candidate).items():
        for name in NAMES.get(finding, (finding,)) if value != "negative" else (finding,):
            labels[name] = max(labels.get(name, value), value, key=_ORDER.index)
    result: dict[str, tuple[str, str | None, str | None]] = {}
    for finding, value in labels.items():
        same = [m for m in found if m.label == value and finding in NAMES.get(m.finding, ())]
        sides = {m.side for m in same if m.side}
        zones = {m.zone for m in same if m.zone}
        side = "bilateral" if len(sides) > 1 else next(iter(sides), None)
        result[finding] = (value, side, next(iter(zones)) if len(zones) == 1 else None)
    return result


def _encode(reports: Sequence[str]) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Return (N, 13) int64: claim (0 absent, 1 present, 2 uncertain), side and zone indices, -1 where none is named."""
    import torch

    claim = torch.zeros(len(reports), len(OBSERVATIONS), dtype=torch.int64)
    side, zone = torch.full_like(claim, -1), torch.full_like(claim, -1)
    code = {"negative": 0, "positive": 1, "uncertain": 2}
    for row, report in enumerate(reports):
        for finding, (value, a_side, a_zone) in assertions(report, is_candidate=True).items():
            if finding in OBSERVATIONS:
                column = OBSERVATIONS.index(finding)
                claim[row, column] = code[value]
                side[row, column] = SIDES.index(a_side) if a_side else -1
                zone[row, column] = ZONES.index(a_zone) if a_zone else -1
    return claim, side, zone


def _choice(rows: Sequence[dict[str, Any]], key: str) -> tuple["torch.Tensor", ...]:
    """Return (scale (13,), bias (13, 3), prior (13, 3)) of a calibrated choice; scale 0 where there is none."""
    import torch

    scale = torch.tensor([float(row[key]["scale"]) if row.get(key) else 0.0 for row in rows])
    bias = torch.tensor([row[key]["bias"] if row.get(key) else [0.0] * 3 for row in rows])
    prior = torch.tensor([row[key]["prior"] if row.get(key) else [1 / 3] * 3 for row in rows])
    return scale, bias, prior


def _centred(cosines: "torch.Tensor") -> "torch.Tensor":
    cosines = cosines.reshape(len(cosines), len(OBSERVATIONS), 3)
    return cosines - cosines.mean(dim=2, keepdim=True)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
