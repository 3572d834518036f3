"""What is wrong with a phantom: findings of the CheXpert-14 vocabulary with side, zone, severity and kind.

Findings are drawn through a few disease patterns (heart failure, pneumonia, intensive care, ...), so that they
co-occur as in life. Rates are the phantom's own, chosen so that every finding is common enough to be learned; they
are no prevalence of any hospital. `Lung Opacity` and `Pneumonia` are never drawn: `truth_rows` derives them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from valor.clinical.vocabulary import OBSERVATIONS

SEVERITIES = ("mild", "moderate", "severe")
OPACITIES = ("Edema", "Consolidation", "Atelectasis", "Lung Lesion")
"""The drawn findings that imply `Lung Opacity` in CheXpert's hierarchy (with Pneumonia, below Consolidation)."""
DRAWN = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Edema",
    "Consolidation",
    "Atelectasis",
    "Lung Lesion",
    "Pneumothorax",
    "Pleural Effusion",
    "Fracture",
    "Support Devices",
)
_SIDED = ("Consolidation", "Atelectasis", "Lung Lesion", "Pneumothorax", "Pleural Effusion", "Fracture")
_BILATERAL_RATE = {"Consolidation": 0.15, "Atelectasis": 0.2, "Pleural Effusion": 0.3}
_ZONE_RATES = {
    "Consolidation": (0.25, 0.25, 0.5),
    "Atelectasis": (0.0, 0.2, 0.8),
    "Lung Lesion": (0.4, 0.35, 0.25),
    "Fracture": (0.2, 0.4, 0.4),
}
_SEVERITY_RATES = (0.35, 0.4, 0.25)
OTHER_SIDE: Mapping[str | None, str] = {"left": "right", "right": "left"}
_NORMAL_RATE = 0.3
_PATTERNS: Mapping[str, tuple[float, Mapping[str, float]]] = {
    "heart failure": (
        0.22,
        {"Cardiomegaly": 0.85, "Edema": 0.75, "Pleural Effusion": 0.6, "Atelectasis": 0.15, "Support Devices": 0.3},
    ),
    "pneumonia": (0.2, {"Consolidation": 1.0, "Pleural Effusion": 0.2, "Atelectasis": 0.08, "Support Devices": 0.1}),
    "intensive care": (
        0.16,
        {"Support Devices": 0.95, "Atelectasis": 0.7, "Pleural Effusion": 0.45, "Edema": 0.2, "Pneumothorax": 0.1},
    ),
    "pneumothorax": (0.12, {"Pneumothorax": 1.0, "Fracture": 0.25, "Support Devices": 0.3, "Atelectasis": 0.1}),
    "tumour": (0.17, {"Lung Lesion": 1.0, "Pleural Effusion": 0.2, "Enlarged Cardiomediastinum": 0.25}),
    "trauma": (0.12, {"Fracture": 1.0, "Pneumothorax": 0.25, "Pleural Effusion": 0.15, "Lung Lesion": 0.05}),
    "mediastinum": (0.06, {"Enlarged Cardiomediastinum": 1.0, "Cardiomegaly": 0.3, "Support Devices": 0.15}),
}
_INCIDENTAL_RATE = 0.025
DEVICES = ("endotracheal tube", "central line", "pacemaker", "nasogastric tube", "chest tube")
_DEVICE_RATES: Mapping[str, tuple[float, ...]] = {
    "heart failure": (0.05, 0.15, 0.8, 0.0, 0.0),
    "intensive care": (0.4, 0.35, 0.05, 0.2, 0.0),
    "pneumothorax": (0.0, 0.0, 0.0, 0.0, 1.0),
    "": (0.05, 0.45, 0.5, 0.0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding as drawn.

    Attributes:
        finding: a name in `DRAWN`.
        side: the patient's `left`, `right`, `bilateral`, or None where the finding has no side.
        zone: `upper`, `mid`, `lower`, or None.
        severity: one of `SEVERITIES`, or None for devices.
        kind: the device's name for `Support Devices`, else "".
    """

    finding: str
    side: str | None = None
    zone: str | None = None
    severity: str | None = None
    kind: str = ""


def draw_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw one study's findings, in the vocabulary's order; empty for a normal study."""
    if rng.random() < _NORMAL_RATE:
        return ()
    names = list(_PATTERNS)
    rates = np.array([_PATTERNS[name][0] for name in names])
    pattern = names[rng.choice(len(names), p=rates / rates.sum())]
    chances = _PATTERNS[pattern][1]
    present = [name for name in DRAWN if rng.random() < max(chances.get(name, 0.0), _INCIDENTAL_RATE)]
    side = str(rng.choice(["left", "right"]))
    return tuple(_settle([_detail(name, rng, pattern=pattern, side=side) for name in present], rng))


@dataclasses.dataclass(frozen=True)
class Change:
    """What distinguishes a study's counterfactual twin from it: one finding `added`, `removed`, or `moved` across."""

    finding: str
    kind: str


def change_one(findings: Sequence[Finding], rng: np.random.Generator) -> tuple[tuple[Finding, ...], Change]:
    """Return the findings with one of them changed; devices stay, and no change hides another finding.

    Of the kinds that are possible one is drawn, then one of its changes; a normal study can only gain a finding.
    """
    options: dict[str, list[tuple[tuple[Finding, ...], Change]]] = {}
    present = [f for f in findings if f.finding != "Support Devices"]
    for finding in present:
        rest = [f for f in findings if f != finding]
        options.setdefault("removed", []).append((tuple(rest), Change(finding.finding, "removed")))
        if finding.side in OTHER_SIDE:
            across = dataclasses.replace(finding, side=OTHER_SIDE[finding.side])
            moved = [across if f == finding else f for f in findings]
            options.setdefault("moved", []).append((tuple(moved), Change(finding.finding, "moved")))
    side = str(rng.choice(["left", "right"]))
    for name in DRAWN:
        if name not in {f.finding for f in findings} | {"Support Devices"}:
            added = sorted([*findings, _detail(name, rng, pattern="", side=side)], key=lambda f: DRAWN.index(f.finding))
            options.setdefault("added", []).append((tuple(added), Change(name, "added")))
    possible = {kind: [o for o in found if _settle(list(o[0]), rng) == list(o[0])] for kind, found in options.items()}
    kinds = [kind for kind, found in possible.items() if found]
    chosen = possible[kinds[rng.integers(len(kinds))]]
    return chosen[rng.integers(len(chosen))]


def truth_rows(findings: Sequence[Finding]) -> list[dict[str, object]]:
    """Return one row per CheXpert finding: finding, present, side, zone, severity, implied.

    Implied, not drawn: `Lung Opacity` (by any of `OPACITIES`), `Pneumonia` (by Consolidation: every consolidation
    of the phantom is one), and `No Finding` (nothing is present but devices). `Enlarged Cardiomediastinum` is NOT
    implied by Cardiomegaly here, so that each drawn finding has a look of its own.
    """
    drawn = {f.finding: f for f in findings}
    rows: list[dict[str, object]] = []
    for name in OBSERVATIONS:
        source = drawn.get(name) or _implying(name, drawn)
        rows.append(
            {
                "finding": name,
                "present": source is not None,
                "side": source.side if source else None,
                "zone": source.zone if source else None,
                "severity": source.severity if source else None,
                "implied": source is not None and name not in drawn,
            }
        )
    empty = not set(drawn) - {"Support Devices"}
    nothing = {"side": None, "zone": None, "severity": None}
    return [*rows, {"finding": "No Finding", "present": empty, **nothing, "implied": empty}]


def _implying(name: str, drawn: Mapping[str, Finding]) -> Finding | None:
    """Return the drawn finding that implies `name`; its place is kept only where it is the sole one."""
    sources = {"Lung Opacity": OPACITIES, "Pneumonia": ("Consolidation",)}.get(name, ())
    found = [drawn[source] for source in sources if source in drawn]
    if not found:
        return None
    return found[0] if len(found) == 1 else Finding(name)


def _detail(name: str, rng: np.random.Generator, *, pattern: str, side: str) -> Finding:
    if name == "Support Devices":
        kind = DEVICES[rng.choice(len(DEVICES), p=_DEVICE_RATES.get(pattern, _DEVICE_RATES[""]))]
        sided = kind in ("central line", "pacemaker", "chest tube")
        return Finding(name, side=side if sided else None, kind=kind)
    severity = SEVERITIES[rng.choice(3, p=_SEVERITY_RATES)]
    zone = None
    if name in _ZONE_RATES:
        zone = ("upper", "mid", "lower")[rng.choice(3, p=_ZONE_RATES[name])]
    if name == "Edema":
        return Finding(name, side="bilateral", severity=severity)
    if name not in _SIDED:
        return Finding(name, severity=severity)
    bilateral = _BILATERAL_RATE.get(name, 0.0) * (2 if pattern == "heart failure" else 1)
    return Finding(name, "bilateral" if rng.random() < bilateral else side, zone, severity)


def _settle(findings: list[Finding], rng: np.random.Generator) -> list[Finding]:
    """Mend places that would hide one finding behind another."""
    by_name = {f.finding: f for f in findings}
    effusion, air = by_name.get("Pleural Effusion"), by_name.get("Pneumothorax")
    settled = []
    for f in findings:
        wet = effusion is not None and effusion.severity != "mild" and effusion.side in (f.side, "bilateral")
        if wet and f.zone == "lower" and f.finding in ("Consolidation", "Lung Lesion"):
            f = dataclasses.replace(f, zone=str(rng.choice(["upper", "mid"])))
        if f.finding in ("Consolidation", "Lung Lesion") and air is not None and f.side in (air.side, "bilateral"):
            f = dataclasses.replace(f, side="left" if air.side == "right" else "right")
        if f.finding == "Pleural Effusion" and air is not None and air.severity == "severe" and f.severity == "severe":
            f = dataclasses.replace(f, severity="moderate")
        settled.append(f)
    return settled
