"""The page that shows the experiments: tables and figures from what was collected, and from nothing else.

So anyone can recompute every number of `docs/experiments/README.md` without training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments import analysis, figures, ledger, results
from pipelines.experiments.analysis import Difference, Table
from pipelines.experiments.arms import ARMS
from pipelines.experiments.collect import CURVES
from valor import artifacts
from valor.errors import UserError
from valor.evaluation.measures import Measure, slug

Curves = Mapping[str, Mapping[int, Mapping[str, Table]]]
"""Tables of operating curves by checkpoint, seed and bias."""
BASELINE, FINAL = "continued", "valor"
PAGE = "README.md"
_GROUPS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("Is it the image?", "other_image", ("valor", "other_image", "text")),
    ("Which similarity?", "similarity", ("valor", "paper", "text")),
    ("Which advantages?", "advantages", ("valor", "exact_ranks", "group")),
    ("Is stage 1 needed?", "stage_1", ("valor", "vision_only", "text")),
    ("How good must the expert be?", "expert", ("valor", "truth", "medium_expert", "weak_expert")),
    ("Would the expert do without reinforcement?", "no_rl", ("valor", "best_of_8", "pseudo_labels")),
    ("Which text rewards?", "text_rewards", ("text", "clinical_only", "lexical_only")),
)
"""Heading, file name and arms of each ablation."""


def write(folder: Path) -> Path:
    """Write the page and its figures from the collected results, and return the page.

    Raises:
        UserError: there are no results, they were made by more than one version of the code, or a table by none.
    """
    facts = [artifacts.read_json(path) for path in sorted(folder.glob("facts-*.json"))]
    _require_one_code(folder, facts)
    tables = {name: _tables(folder, name) for name in ARMS}
    tables = {name: found for name, found in tables.items() if found}
    if not tables:
        raise UserError(f"{folder}: holds no results; run valor experiments first")
    measures = analysis.measured(next(iter(tables.values())))
    curves = {name: found for name in CURVES if (found := _curves(folder, name))}
    parts = [
        "# Experiments: results\n",
        "Written by `valor experiments --document` from the files beside it. Every seed has its own subjects, models "
        "and test studies. Intervals are of 95%, by Student's t of the seeds' differences, each for one number read "
        "alone: of twenty where nothing differs one leaves zero out by chance.\n",
        _seeds(facts, folder),
        _headline(tables, measures, folder, facts, curves),
        _stopped(facts),
        _means(tables, measures),
        _curve_part(curves, tables, measures, folder),
        *(_group(*group, tables=tables, measures=measures, folder=folder) for group in _GROUPS),
        _per_seed(tables, measures),
        _per_finding(tables, measures),
        _headroom(facts, tables, measures),
        _signal(facts),
        _costs(facts),
    ]
    page = folder / PAGE
    page.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return page


def _require_one_code(folder: Path, facts: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where results were made by several versions of the code, or nobody knows by which."""
    codes = {str(job["code"]): one["seed"] for one in facts for job in one["jobs"].values()}
    codes |= {str(one["scored_by"]): one["seed"] for one in facts}
    if len(codes) > 1:
        found = ", ".join(f"{code} (seed {seed})" for code, seed in codes.items())
        raise UserError(
            f"{folder}: its results were made by {len(codes)} versions of the code, {found}, and cannot be compared; "
            "delete the jobs of the older one below VALOR_HOME/experiments/jobs (their job.json names it) and run again"
        )
    known = {f"{name}-{one['seed']}.npz" for one in facts for name in one["arms"]}
    known |= {f"curve-{name}-{one['seed']}" for one in facts for name in CURVES}
    for path in sorted(folder.glob("*.npz")):
        if path.name not in known and path.stem.split("_")[0] not in known:
            raise UserError(f"{path}: no facts file says what made it; delete it, or run valor experiments again")


def _seeds(facts: Sequence[Mapping[str, Any]], folder: Path) -> str:
    opened, lines = ledger.read(folder), []
    for one in facts:
        times = [f"{row['date']} (code {row['code']})" for row in opened if row["seed"] == one["seed"]]
        lines.append(f"| {one['seed']} | {', '.join(times) or 'not known'} | {', '.join(one['arms'])} |")
    return "| seed | begun on | arms |\n|---:|---|---|\n" + "\n".join(lines) + "\n"


def _tables(folder: Path, name: str) -> dict[int, Table]:
    found = {}
    for path in sorted(folder.glob(f"{name}-*.npz")):
        number = path.stem.removeprefix(f"{name}-")
        if number.isdigit():
            found[int(number)] = results.load(path)
    return found


def _headline(
    tables: Mapping[str, Any],
    measures: Mapping[str, Measure],
    folder: Path,
    facts: Sequence[Mapping[str, Any]],
    curves: Curves,
) -> str:
    seeds = _shared(tables, (FINAL, BASELINE))
    if not seeds:
        return ""
    found = {key: analysis.compare(measures[key], tables[FINAL], tables[BASELINE]) for key in analysis.SHOWN}
    against = ARMS[BASELINE].title
    rows = []
    for key, change in found.items():
        ours, theirs = _both(tables, measures[key])
        low, high = change.within
        rows.append(
            f"| {measures[key].label}{_source(key)} | {_percent(np.mean(theirs))} | {_percent(np.mean(ours))} | "
            f"{_change(change, measures[key])} | [{100 * low:+z.1f}, {100 * high:+z.1f}] | "
            f"{100 * analysis.relative(ours, theirs):+z.0f}% | "
            f"{' '.join(f'{100 * v:+z.1f}' for v in change.seeds.values())} |"
        )
    title = f"{ARMS[FINAL].title}, minus {against}"
    chosen = ("truth_f1_micro", "truth_f1_macro", "truth_hallucination", "truth_omission", "flip_rate")
    figures.forest(
        folder / "headline.svg",
        [(measures[k].label, found[k], measures[k].higher_is_better is not False) for k in chosen],
        title=title,
    )
    return (
        f"## {ARMS[FINAL].title} against {against}\n\n{ARMS[BASELINE].question}\n\n![{title}](headline.svg)\n\n"
        f"| metric | {against} | {ARMS[FINAL].title} | difference [95%] | [95%, these seeds' models held] | relative |"
        f" seeds {', '.join(map(str, seeds))} |\n"
        "|---|---:|---:|---:|---:|---:|---|\n"
        + "\n".join(rows)
        + "\n\n"
        + _verdicts(found, tables, measures, facts, curves)
    )


def _verdicts(
    found: Mapping[str, Difference],
    tables: Mapping[str, Any],
    measures: Mapping[str, Measure],
    facts: Sequence[Mapping[str, Any]],
    curves: Curves,
) -> str:
    """Return what was asked before the test seeds were opened, what was found, and whether that meets it."""
    seeds, wanted = _shared(tables, (FINAL, BASELINE)), ARMS[FINAL].seeds
    if len(seeds) < wanted:
        return f"{len(seeds)} of {wanted} seeds have both: no verdict.\n"
    f1, invented, missed, flips = (
        found[key] for key in ("truth_f1_micro", "truth_hallucination", "truth_omission", "flip_rate")
    )
    f1_part, invented_part = (
        analysis.relative(*_both(tables, measures[key])) for key in ("truth_f1_micro", "truth_hallucination")
    )
    rows = [
        ("F1 rises: its interval is above zero", f1.low > 0, f"{100 * f1.low:+z.1f} at least"),
        ("F1, aim: 3 points", f1.value >= 0.03, f"{100 * f1.value:+z.1f}"),
        ("F1, stretch: 15% relative", f1_part >= 0.15, f"{100 * f1_part:+z.0f}%"),
        ("hallucination falls: its interval is below zero", invented.high < 0, f"{100 * invented.high:+z.1f} at most"),
        ("hallucination, aim: -15% relative", invented_part <= -0.15, f"{100 * invented_part:+z.0f}%"),
        ("hallucination, stretch: -25% relative", invented_part <= -0.25, f"{100 * invented_part:+z.0f}%"),
        ("omission rises by less than 2 points, by its upper bound", missed.high < 0.02, f"{100 * missed.high:+z.1f}"),
        ("more counterfactual pairs are told apart", flips.value > 0, f"{100 * flips.value:+z.1f}"),
    ]
    for name, curve in curves.items():
        if not set(curve) & set(tables[FINAL]):
            continue
        _, _, above = _above_best(curve, FINAL, tables, measures)
        asked = f"F1 above the operating curve of {ARMS[name].title}: the interval of the difference is above zero"
        rows.append((asked, above.low > 0, f"{100 * above.low:+z.1f} at least"))
    if headroom := [probe - ours for _, probe, ours, _ in _probed(facts, tables, measures)]:
        mean = float(np.mean(headroom))
        rows.append(("before RL a probe's macro F1 is 8 points above SFT's", mean >= 0.08, f"{100 * mean:+z.1f}"))
    both = [one["arms"] for one in facts if one["seed"] in seeds]
    spent = {name: sum(arms[name]["processor_seconds"] for arms in both) for name in (BASELINE, FINAL)}
    ratio = spent[BASELINE] / max(1, spent[FINAL])
    rows.append(("SFT continued for the same time: at least 0.95 of it", ratio >= 0.95, f"{ratio:.2f}"))
    lines = [f"| {asked} | {got} | {'yes' if met else '**no**'} |" for asked, met, got in rows]
    return "| asked | found | met |\n|---|---:|---|\n" + "\n".join(lines) + "\n"


def _both(tables: Mapping[str, Any], measure: Measure) -> tuple[list[float], list[float]]:
    """Return the final model's values and the baseline's, on the seeds that both have."""
    seeds = _shared(tables, (FINAL, BASELINE))
    ours, theirs = ([analysis.value(measure, tables[name][s]) for s in seeds] for name in (FINAL, BASELINE))
    return ours, theirs


def _stopped(facts: Sequence[Mapping[str, Any]]) -> str:
    """Return the arms that ended with a verdict instead of a model: a missing row must not read as one never asked."""
    rows = [
        f"| {ARMS[name].title} | {one['seed']} | {verdict} |"
        for one in facts
        for name, verdict in one.get("stopped", {}).items()
    ]
    if not rows:
        return ""
    return "## Arms that stopped\n\n| arm | seed | verdict |\n|---|---:|---|\n" + "\n".join(rows) + "\n"


def _means(tables: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    head = "| arm | seeds | " + " | ".join(measures[k].label + _source(k) for k in analysis.SHOWN) + " |"
    lines = [head, "|---|---:|" + "---:|" * len(analysis.SHOWN)]
    for name, found in tables.items():
        values = [
            _percent(np.mean([analysis.value(measures[k], table) for table in found.values()])) for k in analysis.SHOWN
        ]
        lines.append(f"| {ARMS[name].title} | {len(found)} | " + " | ".join(values) + " |")
    note = "Arms with fewer seeds have the first ones; the tables below compare arms on the seeds that both have."
    return "## All arms, means over their seeds\n\n" + note + "\n\n" + "\n".join(lines) + "\n"


def _curve_part(found: Curves, tables: Mapping[str, Any], measures: Mapping[str, Measure], folder: Path) -> str:
    keys = ("truth_omission", "truth_hallucination")
    if not found:
        return ""
    marked = [name for name in ("sft", BASELINE, "text", FINAL) if name in tables]
    seeds = sorted(set.intersection(*(set(c) for c in found.values()), *(set(tables[name]) for name in marked)))
    if not seeds:
        return ""
    rows = [
        _above(name, arm, curves, tables, measures)
        for name, curves in found.items()
        for arm in ("text", FINAL)
        if set(curves) & set(tables.get(arm, ()))
    ]

    def mean(of: Mapping[int, Table]) -> tuple[float, ...]:
        return tuple(float(np.mean([analysis.value(measures[key], of[seed]) for seed in seeds])) for key in keys)

    lines = {
        ARMS[name].title: [
            mean({seed: curves[seed][bias] for seed in seeds}) for bias in sorted(curves[seeds[0]], key=float)
        ]
        for name, curves in found.items()
    }
    points = {ARMS[name].title: mean(tables[name]) for name in marked}
    figures.operating_curve(folder / "curve.svg", lines, points)  # type: ignore[arg-type]
    return (
        "## Above the curve, or along it?\n\n![Findings missed against findings invented](curve.svg)\n\n"
        "The lines are what SFT's reports become when tokens of findings are made likelier; means of seeds "
        f"{', '.join(map(str, seeds))}. Of each line the point with the best F1 was chosen on the test studies, in the "
        "line's favour.\n\n"
        "| curve | best bias of each seed | its F1 | arm | F1 minus the curve's best [95%] |\n"
        "|---|---|---:|---|---:|\n" + "\n".join(rows) + "\n"
    )


def _above(
    name: str,
    arm: str,
    curves: Mapping[int, Mapping[str, Table]],
    tables: Mapping[str, Any],
    measures: Mapping[str, Measure],
) -> str:
    """Return a row: an arm against the best point of a curve, paired by study."""
    picked, mean, change = _above_best(curves, arm, tables, measures)
    shown = _change(change, measures["truth_f1_micro"])
    return f"| {ARMS[name].title} | {', '.join(picked)} | {_percent(mean)} | {ARMS[arm].title} | {shown} |"


def _above_best(
    curves: Mapping[int, Mapping[str, Table]], arm: str, tables: Mapping[str, Any], measures: Mapping[str, Measure]
) -> tuple[list[str], float, Difference]:
    """Return the bias at which each seed's curve is best, its mean F1 there, and the arm's F1 minus that."""
    measure = measures["truth_f1_micro"]
    seeds = sorted(set(curves) & set(tables[arm]))
    picked = {seed: analysis.best_of_curve(curves[seed], lambda t: analysis.value(measure, t)) for seed in seeds}
    best = {seed: curves[seed][bias] for seed, (bias, _) in picked.items()}
    mean = float(np.mean([value for _, value in picked.values()]))
    return [bias for bias, _ in picked.values()], mean, analysis.compare(measure, tables[arm], best)


def _curves(folder: Path, name: str) -> dict[int, dict[str, Table]]:
    found: dict[int, dict[str, Table]] = {}
    for path in sorted(folder.glob(f"curve-{name}-*_*.npz")):
        number, bias = path.stem.removeprefix(f"curve-{name}-").split("_")
        found.setdefault(int(number), {})[bias] = results.load(path)
    return found


def _group(
    heading: str,
    file: str,
    arms: Sequence[str],
    *,
    tables: Mapping[str, Any],
    measures: Mapping[str, Measure],
    folder: Path,
) -> str:
    reference, *others = arms
    others = [name for name in others if _shared(tables, (reference, name))]
    if not others:
        return ""
    lines = [
        f"| {ARMS[reference].title} minus | seeds | F1 | hallucinated | omitted | pairs told apart |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    shown = [measures[k] for k in ("truth_f1_micro", "truth_hallucination", "truth_omission", "flip_rate")]
    pairs = {name: [analysis.compare(measure, tables[reference], tables[name]) for measure in shown] for name in others}
    for name, row in pairs.items():
        cells = " | ".join(_change(found, measure) for found, measure in zip(row, shown, strict=True))
        lines.append(f"| {ARMS[name].title} | {len(row[0].seeds)} | {cells} |")
    title = f"{heading} F1 of {ARMS[reference].title}, minus that of"
    figures.forest(
        folder / f"{file}.svg",
        [(f"{ARMS[name].title} ({len(row[0].seeds)} seeds)", row[0], True) for name, row in pairs.items()],
        title=title,
    )
    questions = [f"- {ARMS[name].title}: {ARMS[name].question}" for name in (reference, *others)]
    return f"## {heading}\n\n![{title}]({file}.svg)\n\n" + "\n".join(questions) + "\n\n" + "\n".join(lines) + "\n"


def _shared(tables: Mapping[str, Any], arms: Sequence[str]) -> list[int]:
    """Return the seeds that all these arms have."""
    return sorted(set.intersection(*(set(tables.get(name, ())) for name in arms)))


def _per_seed(tables: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    lines = ["| arm | seed | " + " | ".join(measures[k].label + _source(k) for k in analysis.SHOWN) + " |"]
    lines.append("|---|---:|" + "---:|" * len(analysis.SHOWN))
    for name, found in tables.items():
        for seed, table in found.items():
            values = [_percent(analysis.value(measures[k], table)) for k in analysis.SHOWN]
            lines.append(f"| {ARMS[name].title} | {seed} | " + " | ".join(values) + " |")
    return "## Every seed\n\n" + "\n".join(lines) + "\n"


def _per_finding(tables: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    from valor.clinical.vocabulary import OBSERVATIONS

    seeds = _shared(tables, (FINAL, BASELINE))
    if not seeds:
        return ""
    head = f"| finding | {ARMS[BASELINE].title} | {ARMS[FINAL].title} | difference [95%] |"
    lines = [head, "|---|---:|---:|---:|"]
    for finding in OBSERVATIONS:
        measure = measures.get(f"truth_f1_{slug(finding)}")
        if measure is None:
            continue
        means = [np.mean([analysis.value(measure, tables[name][seed]) for seed in seeds]) for name in (BASELINE, FINAL)]
        if np.isfinite(means).all():
            found = analysis.compare(measure, tables[FINAL], tables[BASELINE])
            lines.append(f"| {finding} | {_percent(means[0])} | {_percent(means[1])} | {_change(found, measure)} |")
    return "## F1 of each finding, against truth\n\n" + "\n".join(lines) + "\n"


def _headroom(facts: Sequence[Mapping[str, Any]], tables: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    lines = [
        "| seed | probe, macro F1 | SFT, macro F1 | headroom | findings the expert's gate masks |",
        "|---:|---:|---:|---:|---|",
    ]
    for seed, probe, ours, masked in _probed(facts, tables, measures):
        lines.append(f"| {seed} | {_percent(probe)} | {_percent(ours)} | {100 * (probe - ours):+z.1f} | {masked} |")
    return "## Visual headroom and the expert\n\n" + "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _probed(
    facts: Sequence[Mapping[str, Any]], tables: Mapping[str, Any], measures: Mapping[str, Measure]
) -> list[tuple[int, float, float, str]]:
    """Return per seed the macro F1 of probe and SFT, and the findings that the expert's gate masks."""
    found = []
    for one in facts:
        table = tables.get("sft", {}).get(one["seed"])
        if "probe" in one and table is not None:
            ours = analysis.value(measures["truth_f1_macro"], table)
            found.append((one["seed"], one["probe"]["f1_macro"], ours, ", ".join(one["expert"]["masked"])))
    return found


def _signal(facts: Sequence[Mapping[str, Any]]) -> str:
    found = [one["signal"] for one in facts if "signal" in one]
    if not found:
        return ""
    lines = []
    for name in found[0]:
        ratio = [_with_bounds(row[name], "signal_to_noise", scale=1000) for row in found]
        cosine = [_with_bounds(row[name], "cosine") for row in found]
        lines.append(f"| {name} | {', '.join(ratio)} | {', '.join(cosine)} |")
    return (
        "## What each reward tells the projector\n\nOf the policy gradient at the end of stage 1, of one group of "
        "completions: a thousandth means that a thousand groups carry as much signal as noise. The cosine is with the "
        "gradient of truth itself as the reward. Bounds of 90%, groups drawn again (`pipelines/experiments/signal.py`)."
        "\n\n"
        "| reward, as ranks | signal to noise, in thousandths, each seed | cosine with truth's gradient, each seed |\n"
        "|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _with_bounds(row: Mapping[str, Any], key: str, *, scale: float = 1) -> str:
    value, bounds = row[key], row["bounds"][key]
    if value is None or bounds is None:
        return "-"
    return f"{scale * value:.2f} [{scale * bounds[0]:.2f}, {scale * bounds[1]:.2f}]"


def _costs(facts: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| arm | what it took after SFT | processor seconds, by seed |", "|---|---|---|"]
    for name, arm in ARMS.items():
        found = [one["arms"][name] for one in facts if name in one["arms"]]
        seconds = [f"{'≥ ' if cost['resumed'] else ''}{cost['processor_seconds']}" for cost in found]
        if found:
            lines.append(f"| {arm.title} | {' + '.join(found[0]['took']) or 'nothing'} | {', '.join(seconds)} |")
    known = [one["models"] for one in facts if "models" in one]
    note = ""
    if known:
        note = (
            f"Beside these rows: base, expert and judge, {', '.join(str(one['processor_seconds']) for one in known)} "
            f"processor seconds by seed; the expert learned from {known[0]['expert_subjects']} image-report pairs of "
            f"its own, where SFT and the rewards share {known[0]['train_subjects']}.\n"
        )
    return "## Cost\n\n" + "\n".join([*lines, "", note])


def _source(key: str) -> str:
    return {"truth": " (truth)", "report": " (report)"}.get(key.split("_")[0], "")


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}"


def _change(found: Difference, measure: Measure) -> str:
    mark = ""
    if found.is_sure and measure.higher_is_better is not None:
        mark = " better" if (found.value > 0) == measure.higher_is_better else " **worse**"
    if not np.isfinite(found.low):
        return f"{100 * found.value:+z.1f}"
    return f"{100 * found.value:+z.1f} [{100 * found.low:+z.1f}, {100 * found.high:+z.1f}]{mark}"
