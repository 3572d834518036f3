"""The page that shows the experiments: collects the arms' results, and writes tables and figures from them alone.

`collect` copies what a run left into `docs/experiments/`, small enough to be committed; `write` makes
`docs/experiments/README.md` and its figures from there, so anyone can recompute every number without training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments import analysis, figures, results, run
from pipelines.experiments.analysis import Difference, Table
from pipelines.experiments.arms import ARMS, Seed
from pipelines.experiments.curve import TABLES
from valor import artifacts
from valor.evaluation.measures import Measure, slug

BASELINE, FINAL = "continued", "valor"
PAGE = "README.md"
_GROUPS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("Is it the image?", "other_image", ("valor", "other_image", "text")),
    ("Which similarity?", "similarity", ("valor", "paper", "text")),
    ("Which advantages?", "advantages", ("valor", "exact_ranks", "group")),
    ("Is stage 1 needed?", "stage_1", ("valor", "vision_only", "text")),
    ("How good must the expert be?", "expert", ("valor", "medium_expert", "weak_expert")),
    ("Would the expert do without reinforcement?", "no_rl", ("valor", "best_of_8", "pseudo_labels")),
    ("Which text rewards?", "text_rewards", ("text", "clinical_only", "lexical_only")),
)
"""Heading, file name and arms of each ablation."""


def collect(root: Path, folder: Path, *, seeds: Sequence[int]) -> None:
    """Copy the results that are there into `folder`: a table per arm and seed, and a JSON of facts per seed."""
    for number in seeds:
        seed, facts = Seed(number), {"seed": number, "arms": {}, "stopped": {}}
        evidence = seed.data.output("evidence").path(root)
        for name, arm in ARMS.items():
            job = arm.reports(seed)
            if verdict := run.verdict_on(job, root):
                facts["stopped"][name] = verdict  # type: ignore[index]
            if job.is_done(root):
                path = job.output("predictions").path(root)
                results.save(folder / f"{name}-{number}.npz", *results.study_table(evidence=evidence, predictions=path))
                facts["arms"][name] = _cost(job.inputs["checkpoint"].job, root)  # type: ignore[index]
        for name, checkpoint in (("sft", seed.sft), ("continued", seed.continued())):
            job = seed.curve(checkpoint)
            if job.is_done(root):
                _save_curve(job.output("curve").path(root) / TABLES, folder / f"curve-{name}-{number}.npz")
        if seed.probe().is_done(root):
            facts["probe"] = artifacts.read_json(seed.probe().output("probe").path(root) / "probe.json")
        if seed.models().is_done(root):
            gate = artifacts.read_json(seed.models().output("expert").path(root) / "expert_gate.json")
            facts["expert"] = {key: gate[key] for key in ("masked", "masked_sides", "overall", "findings")}
        artifacts.write_json(folder / f"facts-{number}.json", facts)


def _cost(job: Any, root: Path) -> dict[str, Any]:
    record = job.record(root)
    return {"seconds": record["seconds"], "commit": record["commit"], "steps": record["metrics"].get("steps")}


def _save_curve(source: Path, target: Path) -> None:
    with np.load(source, allow_pickle=False) as file:
        for bias in file.files:
            if bias != "subjects":
                results.save(target.with_name(f"{target.stem}_{bias}.npz"), file["subjects"].tolist(), file[bias])


def write(folder: Path) -> Path:
    """Write the page and its figures from the collected results, and return the page."""
    tables = {name: _tables(folder, name) for name in ARMS}
    tables = {name: found for name, found in tables.items() if found}
    measures = analysis.measured(tables[BASELINE])
    facts = [artifacts.read_json(path) for path in sorted(folder.glob("facts-*.json"))]
    parts = [
        "# Experiments: the test seeds\n",
        "Written by `valor experiments --document` from the files beside it. Every seed has its own subjects, models "
        "and test studies, each opened once.\n",
        _headline(tables, measures, folder),
        _stopped(facts),
        _means(tables, measures),
        _curve_part(tables, measures, folder),
        *(_group(*group, tables=tables, measures=measures, folder=folder) for group in _GROUPS),
        _per_seed(tables, measures),
        _per_finding(tables, measures),
        _headroom(facts, tables, measures),
        _costs(facts),
    ]
    page = folder / PAGE
    page.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return page


def _tables(folder: Path, name: str) -> dict[int, Table]:
    found = {}
    for path in sorted(folder.glob(f"{name}-*.npz")):
        number = path.stem.removeprefix(f"{name}-")
        if number.isdigit():
            found[int(number)] = results.load(path)
    return found


def _headline(tables: Mapping[str, Any], measures: Mapping[str, Measure], folder: Path) -> str:
    if FINAL not in tables:
        return ""
    found = {key: analysis.compare(measures[key], tables[FINAL], tables[BASELINE]) for key in analysis.SHOWN}
    rows = []
    for key, change in found.items():
        ours, theirs = _both(tables, measures[key])
        rows.append(
            f"| {measures[key].label}{_source(key)} | {_percent(np.mean(theirs))} | {_percent(np.mean(ours))} | "
            f"{_change(change, measures[key])} | {100 * analysis.relative(ours, theirs):+.0f}% | "
            f"{' '.join(f'{100 * v:+.1f}' for v in change.seeds.values())} |"
        )
    chosen = ("truth_f1_micro", "truth_f1_macro", "truth_hallucination", "truth_omission", "flip_rate")
    figures.forest(
        folder / "headline.svg",
        [(measures[k].label, found[k], measures[k].higher_is_better is not False) for k in chosen],
        title="Stages 1 and 2, minus SFT continued for the same time",
    )
    return (
        "## Both stages against SFT continued for the same time\n\n![](headline.svg)\n\n"
        "| metric | SFT continued | stages 1 and 2 | difference [95% interval] | relative | each seed |\n"
        "|---|---:|---:|---:|---:|---|\n" + "\n".join(rows) + "\n\n" + _criteria(found, tables, measures)
    )


def _criteria(found: Mapping[str, Difference], tables: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    """Return what was asked before the test seeds were opened, what was found, and whether that meets it."""
    f1, invented, missed, flips = (
        found[key] for key in ("truth_f1_micro", "truth_hallucination", "truth_omission", "flip_rate")
    )
    f1_part, invented_part = (
        analysis.relative(*_both(tables, measures[key])) for key in ("truth_f1_micro", "truth_hallucination")
    )
    rows = [
        ("F1 rises: its interval is above zero", f1.low > 0, f"{100 * f1.low:+.1f} at least"),
        ("F1, aim: 3 points", f1.value >= 0.03, f"{100 * f1.value:+.1f}"),
        ("F1, stretch: 15% relative", f1_part >= 0.15, f"{100 * f1_part:+.0f}%"),
        ("hallucination falls: its interval is below zero", invented.high < 0, f"{100 * invented.high:+.1f} at most"),
        ("hallucination, aim: -15% relative", invented_part <= -0.15, f"{100 * invented_part:+.0f}%"),
        ("hallucination, stretch: -25% relative", invented_part <= -0.25, f"{100 * invented_part:+.0f}%"),
        ("omission rises by less than 2 points, by its upper bound", missed.high < 0.02, f"{100 * missed.high:+.1f}"),
        ("more counterfactual pairs are told apart", flips.value > 0, f"{100 * flips.value:+.1f}"),
    ]
    lines = [f"| {asked} | {got} | {'yes' if met else '**no**'} |" for asked, met, got in rows]
    return "| asked | found | met |\n|---|---:|---|\n" + "\n".join(lines) + "\n"


def _both(tables: Mapping[str, Any], measure: Measure) -> tuple[list[float], list[float]]:
    """Return the final model's values and the baseline's, on the seeds that both have."""
    seeds = sorted(set(tables[FINAL]) & set(tables[BASELINE]))
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
    return "## All arms, means over their seeds\n\n" + "\n".join(lines) + "\n"


def _curve_part(tables: Mapping[str, Any], measures: Mapping[str, Measure], folder: Path) -> str:
    keys = ("truth_omission", "truth_hallucination")
    lines, rows = {}, []
    for name in ("sft", "continued"):
        curves = _curves(folder, name)
        if not curves:
            return ""
        biases = sorted(next(iter(curves.values())), key=float)
        lines[f"{ARMS[name].title}, tokens biased"] = [
            tuple(
                float(np.mean([analysis.value(measures[key], curve[bias]) for curve in curves.values()]))
                for key in keys
            )
            for bias in biases
        ]
        for seed, curve in curves.items():
            bias, best = analysis.best_of_curve(curve, lambda t: analysis.value(measures["truth_f1_micro"], t))
            ours = tables.get(FINAL, {}).get(seed)
            got = analysis.value(measures["truth_f1_micro"], ours) if ours else float("nan")
            rows.append(f"| {ARMS[name].title} | {seed} | {bias} | {_percent(best)} | {_percent(got)} |")
    points = {
        ARMS[name].title: tuple(
            float(np.mean([analysis.value(measures[key], t) for t in tables[name].values()])) for key in keys
        )
        for name in ("sft", "continued", "text", "valor")
        if name in tables
    }
    figures.operating_curve(folder / "curve.svg", lines, points)  # type: ignore[arg-type]
    return (
        "## Above the curve, or along it?\n\n![](curve.svg)\n\nThe lines are what SFT's reports become when tokens of "
        "findings are made likelier. The best F1 on each line was chosen on the test studies, in the line's favour.\n\n"
        "| curve | seed | best bias | its F1 | stages 1 and 2 |\n|---|---:|---:|---:|---:|\n" + "\n".join(rows) + "\n"
    )


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
    arms = [name for name in arms if name in tables]
    if len(arms) < 2 or not _share_seeds(tables, arms):
        return ""
    reference, *others = arms
    lines = [
        f"| {ARMS[reference].title} minus | seeds | F1 | hallucinated | omitted | pairs told apart |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    shown = [measures[k] for k in ("truth_f1_micro", "truth_hallucination", "truth_omission", "flip_rate")]
    pairs = {name: [analysis.compare(measure, tables[reference], tables[name]) for measure in shown] for name in others}
    for name, row in pairs.items():
        cells = " | ".join(_change(found, measure) for found, measure in zip(row, shown, strict=True))
        lines.append(f"| {ARMS[name].title} | {len(row[0].seeds)} | {cells} |")
    figures.forest(
        folder / f"{file}.svg",
        [(f"{ARMS[name].title} (n = {len(row[0].seeds)})", row[0], True) for name, row in pairs.items()],
        title=f"{heading} F1 of {ARMS[reference].title}, minus that of",
    )
    questions = [f"- {ARMS[name].title}: {ARMS[name].question}" for name in arms]
    return f"## {heading}\n\n![]({file}.svg)\n\n" + "\n".join(questions) + "\n\n" + "\n".join(lines) + "\n"


def _share_seeds(tables: Mapping[str, Any], arms: Sequence[str]) -> bool:
    return bool(set.intersection(*(set(tables[name]) for name in arms)))


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

    if FINAL not in tables:
        return ""
    lines = ["| finding | SFT continued | stages 1 and 2 | difference [95% interval] |", "|---|---:|---:|---:|"]
    for finding in OBSERVATIONS:
        measure = measures.get(f"truth_f1_{slug(finding)}")
        if measure is None:
            continue
        means = [
            np.mean([analysis.value(measure, table) for table in tables[name].values()]) for name in (BASELINE, FINAL)
        ]
        if np.isfinite(means).all():
            found = analysis.compare(measure, tables[FINAL], tables[BASELINE])
            lines.append(f"| {finding} | {_percent(means[0])} | {_percent(means[1])} | {_change(found, measure)} |")
    return "## F1 of each finding, against truth\n\n" + "\n".join(lines) + "\n"


def _headroom(facts: Sequence[Mapping[str, Any]], tables: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    lines = [
        "| seed | probe, macro F1 | SFT, macro F1 | headroom | findings the expert's gate masks |",
        "|---:|---:|---:|---:|---|",
    ]
    for one in facts:
        table = tables.get("sft", {}).get(one["seed"])
        if "probe" in one and table is not None:
            ours, probe = analysis.value(measures["truth_f1_macro"], table), one["probe"]["f1_macro"]
            masked = ", ".join(one["expert"]["masked"])
            lines.append(
                f"| {one['seed']} | {_percent(probe)} | {_percent(ours)} | {100 * (probe - ours):+.1f} | {masked} |"
            )
    return "## Visual headroom and the expert\n\n" + "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _costs(facts: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| arm | seconds of its last stage, by seed |", "|---|---|"]
    for name, arm in ARMS.items():
        seconds = [f"{one['arms'][name]['seconds']:.0f}" for one in facts if name in one["arms"]]
        if seconds:
            lines.append(f"| {arm.title} | {', '.join(seconds)} |")
    return "## Cost\n\n" + "\n".join(lines) + "\n"


def _source(key: str) -> str:
    return {"truth": " (truth)", "report": " (report)"}.get(key.split("_")[0], "")


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}"


def _change(found: Difference, measure: Measure) -> str:
    mark = ""
    if (found.low > 0 or found.high < 0) and measure.higher_is_better is not None:
        mark = " better" if (found.value > 0) == measure.higher_is_better else " **worse**"
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]{mark}"
