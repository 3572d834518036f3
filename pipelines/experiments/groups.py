"""The page's sections that compare arms: what each part of the recipe is worth, a question to a section."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.experiments import figures
from pipelines.experiments.analysis import Difference
from pipelines.experiments.arms import ARMS
from pipelines.experiments.outcomes import Outcomes
from pipelines.experiments.wording import change


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms that answer one question.

    Attributes:
        ground: the arms that it stands on, the first of which all are compared with.
        own: the arms that it is about.
        also: another arm that the first and the own ones are compared with.
    """

    title: str
    file: str
    ground: Sequence[str]
    own: Sequence[str]
    also: str = ""


GROUPS = (
    Group("What do the stages add to where they start?", "start", ("valor", "text"), ("sft", "continued"), "sft"),
    Group("Is it the image?", "other_image", ("valor", "text"), ("other_image",)),
    Group("Which similarity?", "similarity", ("valor", "text"), ("paper",), "text"),
    Group("Which advantages?", "advantages", ("valor", "text"), ("exact_ranks", "group"), "text"),
    Group("Is stage 1 needed?", "stage_1", ("valor", "text", "sft"), ("vision_only",), "sft"),
    Group(
        "How good must the expert be?", "expert", ("valor", "text"), ("truth", "medium_expert", "weak_expert"), "text"
    ),
    Group(
        "Would the expert do without reinforcement?",
        "no_rl",
        ("valor", "vision_only", "sft"),
        ("best_of_8", "pseudo_labels"),
        "vision_only",
    ),
    Group("Which text rewards?", "text_rewards", ("text", "sft"), ("clinical_only", "lexical_only"), "sft"),
)
_PANELS = (
    ("truth_f1_micro", "F1 against truth, % (right is better)"),
    ("truth_hallucination", "stated findings that are not there, % (left is better)"),
)
_COMPARED = ("truth_f1_micro", "truth_hallucination", "truth_omission", "flip_rate")
"""The metrics of an ablation's table."""


def section(group: Group, found: Outcomes, folder: Path) -> str:
    """Return a group's section and draw its figure; "" where none of its own arms is there."""
    reference, *others = group.ground
    own = [name for name in group.own if found.shared(reference, name)]
    if not own:
        # An older page may have had it.
        (folder / f"{group.file}.svg").unlink(missing_ok=True)
        return ""
    others = [*(name for name in others if found.shared(reference, name)), *own]
    rows = _differences(others, reference, found)
    panels = [
        figures.Panel(
            axis,
            more_is_better=found.measures[key].higher_is_better is not False,
            reference=float(np.mean(found.values(key, reference, seeds=sorted(found.tables[reference])))),
            differences={_labelled(name, found): row[key] for name, row in rows.items()},
        )
        for key, axis in _PANELS
    ]
    caption = f"{group.title} Changes from {ARMS[reference].title}"
    figures.side_by_side(folder / f"{group.file}.svg", _labelled(reference, found), panels, title=caption)
    questions = [f"- {ARMS[name].title}: {ARMS[name].question}" for name in (reference, *others)]
    parts = [
        f"## {group.title}\n\n![{caption}]({group.file}.svg)\n",
        "\n".join(questions) + "\n",
        _table(rows, reference, found),
    ]
    if group.also:
        also = [n for n in (reference, *others) if n != group.also and found.shared(group.also, n)]
        parts += [_table(_differences(also, group.also, found), group.also, found)] if also else []
    return "\n".join(parts)


def _differences(names: Sequence[str], reference: str, found: Outcomes) -> dict[str, dict[str, Difference]]:
    return {name: {key: found.compare(key, name, reference) for key in _COMPARED} for name in names}


def _table(rows: Mapping[str, Mapping[str, Difference]], reference: str, found: Outcomes) -> str:
    lines = [
        f"| minus {ARMS[reference].title} | seeds | F1 | hallucinated | omitted | pairs told apart |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        cells = " | ".join(change(difference, found.measures[key]) for key, difference in row.items())
        lines.append(f"| {ARMS[name].title} | {len(row['truth_f1_micro'].seeds)} | {cells} |")
    return "\n".join(lines) + "\n"


def _labelled(name: str, found: Outcomes) -> str:
    seeds = len(found.tables[name])
    return f"{ARMS[name].title} ({seeds} seed{'s' * (seeds > 1)})"
