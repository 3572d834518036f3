"""The document's first part: the whole recipe against SFT continued, and whether what was asked before was found."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.experiments import analysis, figures
from pipelines.experiments.analysis import Difference
from pipelines.experiments.arms import ARMS
from pipelines.experiments.facts import Cost
from pipelines.experiments.outcomes import BASELINE, FINAL, RIVALS, Outcomes
from pipelines.experiments.wording import change, heading, percent, points, verdicts

_DRAWN = ("truth_f1_micro", "truth_f1_macro", "truth_hallucination", "truth_omission", "flip_rate")


def headline(found: Outcomes, folder: Path) -> str:
    """Return the comparison and its verdicts, and draw its figure; nothing where no seed has both arms."""
    seeds = found.shared(FINAL, BASELINE)
    if not seeds:
        return ""
    changes = {key: found.compare(key, FINAL, BASELINE) for key in analysis.SHOWN}
    against = ARMS[BASELINE].title
    rows = []
    for key, difference in changes.items():
        ours, theirs = (np.mean(found.values(key, arm, seeds=seeds)) for arm in (FINAL, BASELINE))
        low, high = difference.within
        rows.append(
            f"| {heading(found.measures[key])} | {percent(theirs)} | {percent(ours)} | "
            f"{change(difference, found.measures[key])} | [{points(low)}, {points(high)}] | "
            f"{100 * found.relative(key):+z.0f}% | "
            f"{' '.join(map(points, difference.seeds.values()))} |"
        )
    title = f"{ARMS[FINAL].title}, minus {against}"
    drawn = [found.measures[key] for key in _DRAWN]
    figures.forest(
        folder / "headline.svg",
        [(m.label, changes[m.name], m.higher_is_better is not False) for m in drawn],
        title=title,
        axis="points; green is better, red is worse, grey cannot be told",
    )
    return (
        f"## {ARMS[FINAL].title} against {against}\n\n{ARMS[BASELINE].question}\n\n![{title}](headline.svg)\n\n"
        f"| metric | {against} | {ARMS[FINAL].title} | difference [95%] | [95%, these seeds' models held] | relative |"
        f" seeds {', '.join(map(str, seeds))} |\n"
        "|---|---:|---:|---:|---:|---:|---|\n" + "\n".join(rows) + "\n\n" + _verdicts(found, changes)
    )


def _verdicts(found: Outcomes, changes: Mapping[str, Difference]) -> str:
    """Return what was asked before the test seeds were opened, what was found, and whether that meets it."""
    seeds, wanted = found.shared(FINAL, BASELINE), ARMS[FINAL].seeds
    if len(seeds) < wanted:
        return f"{len(seeds)} of {wanted} seeds have both: no verdict.\n"
    f1, invented, missed, flips = (
        changes[key] for key in ("truth_f1_micro", "truth_hallucination", "truth_omission", "flip_rate")
    )
    f1_part, invented_part = (found.relative(key) for key in ("truth_f1_micro", "truth_hallucination"))
    rows = [
        ("F1 rises: its interval is above zero", f1.low > 0, f"{points(f1.low)} at least"),
        ("F1, aim: 3 points", f1.value >= 0.03, points(f1.value)),
        ("F1, stretch: 15% relative", f1_part >= 0.15, f"{100 * f1_part:+z.0f}%"),
        ("hallucination falls: its interval is below zero", invented.high < 0, f"{points(invented.high)} at most"),
        ("hallucination, aim: -15% relative", invented_part <= -0.15, f"{100 * invented_part:+z.0f}%"),
        ("hallucination, stretch: -25% relative", invented_part <= -0.25, f"{100 * invented_part:+z.0f}%"),
        ("omission rises by less than 2 points, by its upper bound", missed.high < 0.02, points(missed.high)),
        (
            "more counterfactual pairs are told apart: the interval is above zero",
            flips.low > 0,
            f"{points(flips.low)} at least",
        ),
    ]
    for name in RIVALS:
        asked = f"F1 above the operating curve of {ARMS[name].title}: the interval of the difference is above zero"
        stands = found.above_best(name, FINAL)
        drawn = len(stands.seeds) if stands else 0
        if stands and drawn >= wanted:
            rows.append((asked, stands.low > 0, f"{points(stands.low)} at least"))
            rows.append(_no_slide(found, name))
        else:
            rows.append((asked, False, f"not known: {drawn} of {wanted} seeds have the curve"))
    rows.append(_headroom([probe - ours for seed, probe, ours, _ in found.probed() if seed in seeds], wanted))
    rows.append(_same_time([one.arms for one in found.facts if one.seed in seeds]))
    return verdicts(rows)


def _no_slide(found: Outcomes, curve: str) -> tuple[str, bool, str]:
    """Return the row that tells whether the final model misses less than a curve does at no more inventions."""
    asked = f"at no more inventions {ARMS[curve].title}'s curve misses more: the interval is below zero"
    _, _, high = analysis.student(list(found.missed_above(curve, FINAL).values()))
    return asked, high < 0, f"{points(high)} at most"


def _headroom(leads: Sequence[float], wanted: int) -> tuple[str, bool, str]:
    """Return the row that tells whether the probe had something to give."""
    asked = "before RL a probe's macro F1 is 8 points above SFT's"
    if len(leads) < wanted:
        return asked, False, f"not known: {len(leads)} of {wanted} seeds have the probe"
    mean = float(np.mean(leads))
    return asked, mean >= 0.08, points(mean)


def _same_time(arms: Sequence[Mapping[str, Cost]]) -> tuple[str, bool, str]:
    """Return the row that tells whether the baseline had the final model's time, from each seed's costs."""
    asked = "SFT continued for the same time: at least 0.95 of it"
    # A resumed job knows its last try alone, which would make the final model look cheaper than it was.
    if any(one[name].resumed for one in arms for name in (BASELINE, FINAL)):
        return asked, False, "not known: a job was resumed"
    spent = np.reshape([one[name].processor_seconds for one in arms for name in (BASELINE, FINAL)], (-1, 2))
    ratio, *by_seed = (theirs / max(1, final) for theirs, final in [spent.sum(axis=0), *spent])
    return asked, ratio >= 0.95, f"{ratio:.2f} (by seed {', '.join(f'{one:.2f}' for one in by_seed)})"
