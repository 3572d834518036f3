"""The expert's own gate: what it can tell apart on held-out subjects, from their reports alone, and its calibration.

Per finding: AUC of the statement margin (present against absent, in general radiology English), and over the held-out
reports' own sentences the accuracies of side swap (the sentence beats itself with left and right exchanged), negation
(it beats its reversed polarity; the mean of assertions and denials, or an expert that always prefers the more frequent
would pass) and deletion (the margin of a report that has the finding is nearer to those that have it than to those that
leave it out: prevalence aside, leaving it out scores lower). A finding below a threshold, or with too few cases, is
masked from rewards and named; one whose sentences the edits cannot reverse is judged without negation. A failed side
swap masks the finding's side and zone alone. Silence counts as absent, so the labels carry the reports' own noise: the
figures are bounds from below.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from valor.clinical.labeler import mentions
from valor.clinical.vocabulary import OBSERVATIONS
from valor.models.calibration import MIN_CASES, Assertion, add_places, calibrate_presence
from valor.models.expert import BATCH
from valor.models.sentences import reversed_polarity, sentences, swap_sides
from valor.models.statements import SIDED, Margins, Statements, assertions
from valor.recipe import ExpertGate

if TYPE_CHECKING:
    import torch

    from valor.models.expert import Expert

_MEASURES = ("auc", "negation", "deletion")
_CHANCE = 0.5
_Outcomes = dict[str, list[bool]]
"""Whether the expert preferred the right one of two sentences, by finding or by polarity."""
_SILENT: Assertion = ("negative", None, None)


def measure(
    expert: "Expert", image_embeds: "torch.Tensor", reports: Sequence[str], thresholds: ExpertGate
) -> dict[str, Any]:
    """Return the content of `expert_gate.json`.

    Args:
        expert: the frozen dual encoder.
        image_embeds: (N, D) of held-out studies that it was not trained on.
        reports: their N reports.
        thresholds: accuracies in [0, 1].
    """
    read = [assertions(report) for report in reports]
    margins = Margins(expert)
    presence = margins.presence(image_embeds).numpy()
    swaps, negations = _sentence_tests(expert, image_embeds, reports, read)
    findings, calibration = {}, {}
    for column, finding in enumerate(OBSERVATIONS):
        says = [own.get(finding, _SILENT)[0] for own in read]
        entry, line = calibrate_presence(presence[:, column], says)
        entry |= _negation(negations[finding])
        entry |= {"side_swap": _rate(swaps[finding]), "side_pairs": len(swaps[finding])}
        entry |= _verdict(finding, entry, thresholds)
        findings[finding] = entry
        if line:
            calibration[finding] = line
    masked_sides = [f for f in SIDED if findings[f]["masked_side"]]
    add_places(calibration, margins, image_embeds, read, masked=masked_sides)
    masked = [f for f in OBSERVATIONS if findings[f]["masked"]]
    return {
        "measured": True,
        "studies": len(reports),
        "thresholds": thresholds.model_dump(),
        "findings": findings,
        "masked": masked,
        "masked_sides": masked_sides,
        "overall": _overall(findings, swaps, negations)
        | {"deletion_paper": _paper_deletion(expert, image_embeds, reports)},
        "prefers": _preferences(Statements(margins, calibration, masked=masked), image_embeds, reports, read)
        if set(calibration) - set(masked)
        else {},
        "calibration": calibration,
        "paraphrase_noise": {
            "statements": _statements_noise(
                expert, image_embeds, reports, read, masked=masked, masked_sides=masked_sides
            ),
            "paper": _paper_noise(expert, image_embeds, reports, read),
        },
    }


def show(gate: dict[str, Any]) -> str:
    """Return the gate as a table for the log."""
    lines = [f"expert's gate on {gate['studies']} held-out studies"]
    lines.append(f"{'finding':28} cases   auc  side  neg.  del.  pays falsely")
    for finding, row in gate["findings"].items():
        numbers = " ".join(
            "   - " if row[k] is None else f"{row[k]:5.2f}"
            for k in ("auc", "side_swap", "negation", "deletion", "pays", "pays_falsely")
        )
        note = f"  masked: {row['masked']}" if row["masked"] else ""
        note += f"  side masked: {row['masked_side']}" if row["masked_side"] else ""
        if row["negation"] is None and not row["masked"]:
            note += f"  judged without negation: {row['negation_pairs']} pairs"
        lines.append(f"{finding:28} {row['positives']:5} {numbers}{note}")
    for key in ("overall", "prefers"):
        lines.append(f"{key}: " + ", ".join(f"{k} {v:.3f}" for k, v in gate[key].items() if v is not None))
    return "\n".join(lines)


def metrics(gate: dict[str, Any]) -> dict[str, float]:
    """Return the gate's numbers for the stage's metrics."""
    values = {f"expert_{name}": value for name, value in gate["overall"].items() if value is not None}
    values |= {f"expert_prefers_{name}": value for name, value in gate["prefers"].items() if value is not None}
    return values | {"expert_masked_findings": float(len(gate["masked"]))}


def _statements_noise(
    expert: "Expert",
    image_embeds: "torch.Tensor",
    reports: Sequence[str],
    read: Sequence[dict[str, Assertion]],
    *,
    masked: Sequence[str],
    masked_sides: Sequence[str],
) -> float | None:
    """Return how far two halves of the statements' wordings, each calibrated, disagree on a pair of reports.

    For each image, its own report and another one: the root mean square over images of the difference between the
    halves of what the one report scores above the other. Only differences within an image matter, as within a group.
    """
    import numpy as np

    halves = []
    for wordings in (slice(0, None, 2), slice(1, None, 2)):
        margins, calibration = Margins(expert, wordings), {}
        presence = margins.presence(image_embeds).numpy()
        for column, finding in enumerate(OBSERVATIONS):
            says = [own.get(finding, _SILENT)[0] for own in read]
            if line := calibrate_presence(presence[:, column], says)[1]:
                calibration[finding] = line
        if not set(calibration) - set(masked):
            return None
        add_places(calibration, margins, image_embeds, read, masked=masked_sides)
        scored = Statements(margins, calibration, masked=masked)
        others = [*reports[1:], reports[0]]
        scores = [np.array(scored.log_probability(image_embeds, texts)) for texts in (reports, others)]
        halves.append(scores[0] - scores[1])
    return float(np.sqrt(np.mean((halves[0] - halves[1]) ** 2)))


def _paper_noise(
    expert: "Expert",
    image_embeds: "torch.Tensor",
    reports: Sequence[str],
    read: Sequence[dict[str, Assertion]],
) -> float | None:
    """Return the root mean square difference of the plain similarity of two reports that assert the same."""
    import numpy as np

    alike: dict[str, list[int]] = {}
    for row, own in enumerate(read):
        said = sorted((f, *state) for f, state in own.items() if state[0] != "negative")
        alike.setdefault(repr(said), []).append(row)
    # A section in capitals alone has no sentence that could be scored.
    with_words = [[row for row in rows if sentences(reports[row])] for rows in alike.values()]
    pairs = [(a, b) for rows in with_words for a, b in itertools.pairwise(rows)]
    if len(pairs) < MIN_CASES:
        return None
    images = image_embeds[[a for a, _ in pairs]]
    sides = ([reports[pair[i]] for pair in pairs] for i in (0, 1))
    scores = [np.array(expert.paper_similarity(images, side, batch=BATCH)) for side in sides]
    return float(np.sqrt(np.mean((scores[0] - scores[1]) ** 2)))


def _sentence_tests(
    expert: "Expert", image_embeds: "torch.Tensor", reports: Sequence[str], read: Sequence[dict[str, Assertion]]
) -> tuple[_Outcomes, dict[str, _Outcomes]]:
    """Return per finding the outcomes of side swaps (positive sentences that name one side) and of negations.

    Negations by what the image's report says, "positive" or "negative". Some findings are never denied in a sentence of
    their own: with every assertion of one comes an image whose report has none of what it asserts, where its denial
    should win.
    """
    pairs: list[tuple[int, str, str, list[str], str]] = []
    for row, report in enumerate(reports):
        for sentence in sentences(report):
            found = mentions(sentence)
            sided = [m.finding for m in found if m.label == "positive" and m.side in ("left", "right")]
            if sided:
                pairs.append((row, sentence, swap_sides(sentence), sided, "side"))
            edit = reversed_polarity(sentence)
            if edit:
                findings = [m.finding for m in found]
                pairs.append((row, sentence, edit, findings, found[0].label))
                other = _without(findings, read, after=row) if found[0].label == "positive" else None
                if other is not None:
                    pairs.append((other, edit, sentence, findings, "negative"))
    swaps: _Outcomes = {finding: [] for finding in OBSERVATIONS}
    negations: dict[str, _Outcomes] = {finding: {"positive": [], "negative": []} for finding in OBSERVATIONS}
    if pairs:
        own = image_embeds[[row for row, *_ in pairs]]
        right, wrong = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
        difference = expert.embed_texts(right, batch=BATCH) - expert.embed_texts(wrong, batch=BATCH)
        for better, (*_, findings, kind) in zip(((own * difference).sum(1) > 0).tolist(), pairs, strict=True):
            for finding in set(findings) & set(OBSERVATIONS):
                (swaps[finding] if kind == "side" else negations[finding][kind]).append(better)
    return swaps, negations


def _without(findings: Sequence[str], read: Sequence[dict[str, Assertion]], *, after: int) -> int | None:
    """Return the next report, in a circle, that neither states nor suspects any of the findings."""
    for step in range(1, len(read)):
        row = (after + step) % len(read)
        if all(read[row].get(finding, _SILENT)[0] == "negative" for finding in findings):
            return row
    return None


def _negation(outcomes: _Outcomes) -> dict[str, Any]:
    """Return a finding's accuracy where it is and where it is not, and their mean, which the threshold is for.

    A polarity without pairs counts as a coin's: who always prefers the other one must not pass for it.
    """
    rates = {kind: sum(of) / len(of) if of else None for kind, of in outcomes.items()}
    known, pairs = [_CHANCE if rate is None else rate for rate in rates.values()], sum(map(len, outcomes.values()))
    return {
        **{f"negation_{kind}": rate for kind, rate in rates.items()},
        "negation": sum(known) / len(known) if pairs >= MIN_CASES else None,
        "negation_pairs": pairs,
    }


def _preferences(
    scored: Statements,
    image_embeds: "torch.Tensor",
    reports: Sequence[str],
    read: Sequence[dict[str, Assertion]],
) -> dict[str, float | None]:
    """Return how often the `statements` reward prefers a report to an edit that asserts another; a tie counts half."""
    edits: dict[str, list[str]] = {
        "deletion": [" ".join(_without_positives(report)) for report in reports],
        "negation": [" ".join(reversed_polarity(s) or s for s in sentences(report)) for report in reports],
        "side_swap": [swap_sides(report) for report in reports],
        "another": [*reports[1:], reports[0]],
    }
    found: dict[str, float | None] = {}
    for kind, edited in edits.items():
        rows = [row for row, text in enumerate(edited) if text and assertions(text) != read[row]]
        own = scored.log_probability(image_embeds[rows], [reports[row] for row in rows])
        others = scored.log_probability(image_embeds[rows], [edited[row] for row in rows])
        found[kind] = _rate([((a > b) + (a >= b)) / 2 for a, b in zip(own, others, strict=True)])
    return found


def _without_positives(report: str) -> list[str]:
    """Return a report's sentences without those that assert a finding."""
    return [
        sentence
        for sentence in sentences(report)
        if not any(m.label == "positive" and m.finding != "No Finding" for m in mentions(sentence))
    ]


def _paper_deletion(expert: "Expert", image_embeds: "torch.Tensor", reports: Sequence[str]) -> float | None:
    """Return how often the plain mean similarity falls when all positive sentences are deleted."""
    kept, rows = [], []
    for row, report in enumerate(reports):
        rest = _without_positives(report)
        if rest and len(rest) < len(sentences(report)):
            kept.append(" ".join(rest))
            rows.append(row)
    if not rows:
        return None
    whole = expert.paper_similarity(image_embeds[rows], [reports[row] for row in rows], batch=BATCH)
    silent = expert.paper_similarity(image_embeds[rows], kept, batch=BATCH)
    return sum(a > b for a, b in zip(whole, silent, strict=True)) / len(rows)


def _verdict(finding: str, entry: dict[str, Any], thresholds: ExpertGate) -> dict[str, str]:
    """Return why the finding is masked, and why its side is; "" where it is not."""
    reasons = []
    for name in _MEASURES:
        limit = getattr(thresholds, f"min_{name}")
        if name == "auc" and entry[name] is None:
            reasons.append("too few cases")
        elif entry[name] is not None and entry[name] < limit:
            reasons.append(f"{name} {entry[name]:.2f} < {limit}")
    side = ""
    if finding in SIDED and not reasons:
        if entry["side_swap"] is None:
            side = "too few cases"
        elif entry["side_swap"] < thresholds.min_side_swap:
            side = f"side_swap {entry['side_swap']:.2f} < {thresholds.min_side_swap}"
    return {"masked": "; ".join(reasons), "masked_side": side}


def _overall(findings: dict[str, Any], swaps: _Outcomes, negations: dict[str, _Outcomes]) -> dict[str, float | None]:
    polarities = [_rate([x for row in negations.values() for x in row[kind]]) for kind in ("positive", "negative")]
    known = [rate for rate in polarities if rate is not None]
    aucs = [row["auc"] for row in findings.values() if row["auc"] is not None]
    deletions = [row["deletion"] for row in findings.values() if row["deletion"] is not None]
    return {
        "macro_auc": sum(aucs) / len(aucs) if aucs else None,
        "side_swap": _rate([x for row in swaps.values() for x in row]),
        "negation": sum(known) / 2 if len(known) == 2 else None,
        "deletion": sum(deletions) / len(deletions) if deletions else None,
    }


def _rate(outcomes: Sequence[float]) -> float | None:
    return sum(outcomes) / len(outcomes) if len(outcomes) >= MIN_CASES else None
