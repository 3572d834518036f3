"""The page that shows the experiments: tables and figures from what was collected, and from nothing else.

So anyone can recompute every number of a folder's `README.md` without training.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.experiments import analysis, figures, groups, ledger, outcomes
from pipelines.experiments.arms import ARMS
from pipelines.experiments.facts import Expert, Facts
from pipelines.experiments.headline import headline
from pipelines.experiments.outcomes import BASELINE, FINAL, RIVALS, Outcomes
from pipelines.experiments.wording import bounded, change, heading, percent, points, verdicts
from valor.evaluation.measures import slug

PAGE = "README.md"
_GATE = {"auc": False, "side_swap": True, "negation": False, "deletion": False}
"""The accuracies of an expert's gate, and whether a masked side leaves a finding out of one."""


def write(folder: Path) -> Path:
    """Write the page and its figures from the collected results, and return the page.

    Raises:
        UserError: there are no results, they were made by more than one version of the code, or a table by none.
    """
    found = outcomes.load(folder)
    parts = [
        "# Experiments: results\n",
        "Written by `valor experiments --document` from the files beside it. Every seed has its own subjects, models "
        "and test studies. Intervals are of 95%, by Student's t of the seeds' differences, each for one number read "
        "alone: of twenty where nothing differs one leaves zero out by chance.\n",
        _seeds(found.facts, folder),
        headline(found, folder),
        _stopped(found.facts),
        _means(found),
        _curve(found, folder),
        *(groups.section(group, found, folder) for group in groups.GROUPS),
        _per_seed(found),
        _per_finding(found),
        _headroom(found),
        _expert(found.facts),
        _signal(found.facts),
        _costs(found.facts),
    ]
    page = folder / PAGE
    page.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return page


def _seeds(facts: Sequence[Facts], folder: Path) -> str:
    opened, lines = ledger.read(folder), []
    for one in facts:
        times = [f"{row['date']} (code {row['code']}, plan {row['plan']})" for row in opened if row["seed"] == one.seed]
        lines.append(f"| {one.seed} | {', '.join(times) or 'not known'} | {', '.join(one.arms)} |")
    return "| seed | begun on | arms |\n|---:|---|---|\n" + "\n".join(lines) + "\n"


def _stopped(facts: Sequence[Facts]) -> str:
    """Return the arms that ended with a verdict instead of a model: a missing row must not read as one never asked."""
    rows = [
        f"| {ARMS[name].title} | {one.seed} | {verdict} |" for one in facts for name, verdict in one.stopped.items()
    ]
    if not rows:
        return ""
    return "## Arms that stopped\n\n| arm | seed | verdict |\n|---|---:|---|\n" + "\n".join(rows) + "\n"


def _means(found: Outcomes) -> str:
    head = "| arm | seeds | " + " | ".join(heading(found.measures[key]) for key in analysis.SHOWN) + " |"
    lines = [head, "|---|---:|" + "---:|" * len(analysis.SHOWN)]
    for name, tables in found.tables.items():
        values = [percent(np.mean(found.values(key, name, seeds=list(tables)))) for key in analysis.SHOWN]
        lines.append(f"| {ARMS[name].title} | {len(tables)} | " + " | ".join(values) + " |")
    note = "Arms with fewer seeds have the first ones; the tables below compare arms on the seeds that both have."
    return "## All arms, means over their seeds\n\n" + note + "\n\n" + "\n".join(lines) + "\n"


def _curve(found: Outcomes, folder: Path) -> str:
    if not found.curves:
        return ""
    marked = [name for name in ("sft", BASELINE, "text", FINAL) if name in found.tables]
    seeds = sorted(set.intersection(*(set(c) for c in found.curves.values()), set(found.shared(*marked))))
    if not seeds:
        return ""
    rows = []
    compared = [("text", False, ""), (FINAL, False, ""), (FINAL, True, ", at its own best bias")]
    for name in RIVALS:
        by_seed = found.best_of(name)
        for arm, at_its_best, how in compared:
            if stands := found.above_best(name, arm, at_its_best=at_its_best):
                # Of the seeds that the difference has, or mean and difference would not be of the same.
                best = [by_seed[seed] for seed in stands.seeds]
                rows.append(
                    f"| {ARMS[name].title} | {', '.join(bias for bias, _ in best)} | "
                    f"{percent(np.mean([value for _, value in best]))} | {ARMS[arm].title}{how} | "
                    f"{change(stands, found.measures['truth_f1_micro'])} |"
                )
    points = {
        ARMS[name].title: np.mean([found.errors(found.tables[name][seed]) for seed in seeds], axis=0).tolist()
        for name in marked
    }
    lines = {
        ARMS[name].title: np.mean([found.curve_points(name, seed) for seed in seeds], axis=0).tolist()
        for name in found.curves
    }
    figures.operating_curve(folder / "curve.svg", lines, points)
    return (
        "## Above the curve, or along it?\n\n![Findings missed against findings invented](curve.svg)\n\n"
        "The lines are what reports become when tokens of findings are made likelier or less likely; means of seeds "
        f"{', '.join(map(str, seeds))}. Of each line the point with the best F1 was chosen on the test studies, in the "
        "line's favour.\n\n"
        "| curve | best bias of each seed | its F1 | arm | F1 minus the curve's best [95%] |\n"
        "|---|---|---:|---|---:|\n" + "\n".join(rows) + "\n\n" + _at_same_inventions(found)
    )


def _at_same_inventions(found: Outcomes) -> str:
    lines = []
    for name in RIVALS:
        for arm in ("text", FINAL):
            if above := found.missed_above(name, arm):
                by_seed = ", ".join(f"{seed}: {points(value)}" for seed, value in above.items())
                shown = bounded(*analysis.student(list(above.values())))
                lines.append(f"| {ARMS[name].title} | {ARMS[arm].title} | {shown} | {by_seed} |")
    return (
        "A model that only slides misses as much as the curve does at the same inventions. What each arm misses, minus "
        "the least that a curve misses where it invents no more than the arm; less than zero is above the curve. "
        "Between two points a curve is taken to run as low as a convex one can; where it invents more throughout, to "
        "miss no more than where it invents least.\n\n"
        "| curve | arm | points missed more [95%] | seeds |\n|---|---|---:|---|\n" + "\n".join(lines) + "\n"
    )


def _per_seed(found: Outcomes) -> str:
    lines = ["| arm | seed | " + " | ".join(heading(found.measures[key]) for key in analysis.SHOWN) + " |"]
    lines.append("|---|---:|" + "---:|" * len(analysis.SHOWN))
    for name, tables in found.tables.items():
        for seed in tables:
            values = [percent(*found.values(key, name, seeds=[seed])) for key in analysis.SHOWN]
            lines.append(f"| {ARMS[name].title} | {seed} | " + " | ".join(values) + " |")
    return "## Every seed\n\n" + "\n".join(lines) + "\n"


def _per_finding(found: Outcomes) -> str:
    from valor.clinical.vocabulary import OBSERVATIONS

    seeds = found.shared(FINAL, BASELINE)
    if not seeds:
        return ""
    head = f"| finding | {ARMS[BASELINE].title} | {ARMS[FINAL].title} | difference [95%] |"
    lines = [head, "|---|---:|---:|---:|"]
    for finding in OBSERVATIONS:
        key = f"truth_f1_{slug(finding)}"
        if key not in found.measures:
            continue
        means = [np.mean(found.values(key, arm, seeds=seeds)) for arm in (BASELINE, FINAL)]
        if np.isfinite(means).all():
            shown = change(found.compare(key, FINAL, BASELINE), found.measures[key])
            lines.append(f"| {finding} | {percent(means[0])} | {percent(means[1])} | {shown} |")
    return "## F1 of each finding, against truth\n\n" + "\n".join(lines) + "\n"


def _headroom(found: Outcomes) -> str:
    probed = found.probed()
    if not probed:
        return ""
    lines = [
        "| seed | probe, macro F1 | SFT, macro F1 | headroom | SFT at the best bias of its curve | "
        "findings the expert's gate masks |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    macro = found.measures["truth_f1_macro"]
    for seed, probe, ours, masked in probed:
        curve = found.curves.get("sft", {}).get(seed)
        biased = percent(analysis.best_of_curve(curve, lambda t: analysis.value(macro, t))[1]) if curve else "-"
        lines.append(f"| {seed} | {percent(probe)} | {percent(ours)} | {points(probe - ours)} | {biased} | {masked} |")
    return (
        "## Visual headroom and the expert\n\nThe probe's thresholds are chosen on reports, where SFT's reports are "
        "greedy: what a bias of the tokens, chosen on the test studies, gives SFT is part of the headroom.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _expert(facts: Sequence[Facts]) -> str:
    """Return how each seed's expert passed its gate: of what is rewarded, the worst finding by each accuracy."""
    lines = []
    for one in facts:
        if one.expert is None:
            continue
        kept = {name: row for name, row in one.expert.findings.items() if name not in one.expert.masked}
        cells = []
        for key, masked in _GATE.items():
            rated = {name: value for name, row in kept.items() if (value := getattr(row, key)) is not None}
            if masked:
                rated = {name: value for name, value in rated.items() if name not in one.expert.masked_sides}
            worst = min(rated, key=rated.__getitem__, default="")
            cells.append(f"{100 * rated[worst]:.0f} ({worst})" if worst else "-")
        undenied = ", ".join(name for name, row in kept.items() if row.negation is None) or "none"
        unsided = ", ".join(name for name in one.expert.masked_sides if name in kept) or "none"
        tolerance = "-" if one.expert.tolerance is None else f"{one.expert.tolerance:.3f}"
        lines.append(f"| {one.seed} | {len(kept)} | {' | '.join(cells)} | {undenied} | {unsided} | {tolerance} |")
    if not lines:
        return ""
    levels = [
        f"| {one.seed} | {level} | {_overall(expert, 'macro_auc')} | {_overall(expert, 'deletion')} | "
        f"{len(expert.findings) - len(expert.masked)} |"
        for one in facts
        if one.expert and one.other_experts
        for level, expert in {"strong": one.expert, **one.other_experts}.items()
    ]
    head = "| seed | expert | AUC, macro | deleted, all findings | findings that pass |\n|---:|---|---:|---:|---:|\n"
    return (
        "## The expert's gate\n\nOn subjects that it did not learn from, in %: of the findings that rewards ask about, "
        "the one with the least of each accuracy (at least 85 is asked), what no held-out report had a case of, and "
        "the tolerance of ranks, which is the noise between wordings.\n\n"
        "| seed | findings | AUC | side swapped | negated | deleted | never denied | side not rewarded | tolerance |\n"
        "|---:|---:|---|---|---|---|---|---|---:|\n"
        + "\n".join(lines)
        + "\n"
        + ("\n" + head + "\n".join(levels) + "\n" if levels else "")
    )


def _overall(expert: Expert, key: str) -> str:
    value = expert.overall.get(key)
    return "-" if value is None else percent(value)


def _signal(facts: Sequence[Facts]) -> str:
    measured = [one.signal for one in facts if one.signal]
    if not measured:
        return ""
    lines = []
    for name in measured[0]:
        rows = [one[name] for one in measured if name in one]
        ratio = [_with_bounds(row.signal_to_noise, row.bounds.signal_to_noise, scale=1000) for row in rows]
        cosine = [_with_bounds(row.cosine, row.bounds.cosine) for row in rows]
        lines.append(f"| {name} | {', '.join(ratio)} | {', '.join(cosine)} |")
    return (
        "## What each reward tells the projector\n\nOf the policy gradient at the end of stage 1, of one group of "
        "completions: a thousandth means that a thousand groups carry as much signal as noise. The cosine is with the "
        "gradient of truth itself as the reward: a ratio of estimates, so where there is little signal it may leave "
        "[-1, 1]. Bounds of 90%, groups drawn again (`pipelines/experiments/signal.py`).\n\n"
        "| reward, as ranks | signal to noise, in thousandths, each seed | cosine with truth's gradient, each seed |\n"
        "|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _with_bounds(value: float | None, bounds: tuple[float, float] | None, *, scale: float = 1) -> str:
    if value is None or bounds is None:
        return "-"
    return f"{scale * value:.2f} [{scale * bounds[0]:.2f}, {scale * bounds[1]:.2f}]"


def _costs(facts: Sequence[Facts]) -> str:
    lines = ["| arm | what it took after SFT | processor seconds, by seed |", "|---|---|---|"]
    longest = 0
    for name, arm in ARMS.items():
        costs = [one.arms[name] for one in facts if name in one.arms]
        seconds = [f"{'≥ ' if cost.resumed else ''}{cost.processor_seconds}" for cost in costs]
        longest = max([longest, *(cost.processor_seconds for cost in costs)])
        if costs:
            lines.append(f"| {arm.title} | {' + '.join(costs[0].took) or 'nothing'} | {', '.join(seconds)} |")
    jobs = [job for one in facts for job in one.jobs.values()]
    hours = sum(job.processor_seconds for job in jobs) / 3600 / 2
    # A resumed job knows its last try alone and a stopped arm has no cost: lower bounds say nothing of an upper one.
    partial = any(job.resumed for job in jobs) or any(one.stopped for one in facts)
    known, mark = (False, "≥ ") if partial else (True, "")
    asked = [
        ("an arm of a seed takes at most 900 s of one core", known and longest <= 900, f"{mark}{longest} s"),
        ("all of the above take at most 5 h of two cores", known and hours <= 5, f"{mark}{hours:.1f} h"),
    ]
    return "## Cost\n\n" + "\n".join([*lines, "", _models(facts), verdicts(asked)])


def _models(facts: Sequence[Facts]) -> str:
    """Return what the models cost that arms begin with, which is in no arm's row."""
    spent: dict[str, list[str]] = {}
    for one in facts:
        for job in one.jobs.values():
            if job.name.startswith("models"):
                spent.setdefault(job.name.rpartition(", seed ")[0], []).append(str(job.processor_seconds))
    learned = [one.models for one in facts if one.models]
    if not spent or not learned:
        return ""
    costs = "; ".join(f"{name}, {', '.join(seconds)}" for name, seconds in spent.items())
    return (
        f"Beside these rows, in processor seconds by seed: {costs} (base, expert and judge; of another expert, that "
        f"alone). The expert learned from {learned[0].expert_subjects} image-report pairs of its own, where SFT and "
        f"the rewards share {learned[0].train_subjects}.\n"
    )
