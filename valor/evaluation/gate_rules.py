"""Whether the gate's rules can be judged: asked by preflight, before hours of training, and by the gate itself."""

import difflib
from collections.abc import Mapping
from typing import Any

from valor.clinical.vocabulary import OBSERVATIONS
from valor.errors import UserError, shown
from valor.evaluation.measures import SOURCES, measures
from valor.recipe import GateSettings

_NEED_ANNOTATIONS = ("truth_", "grounding_")


def metrics_to_come(*, annotated: bool) -> dict[str, dict[str, Any]]:
    """Return the metrics that an evaluation will have, as the `measures` of its metrics.json tells them.

    Args:
        annotated: whether masks and truth come with the data.
    """
    known = measures(truth=annotated, findings=dict.fromkeys(SOURCES, OBSERVATIONS))
    return {
        m.name: {"higher_is_better": m.higher_is_better, "finding": m.finding}
        for m in known
        if annotated or not m.name.startswith(_NEED_ANNOTATIONS)
    }


def check(settings: GateSettings, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse rules that compare nothing.

    Args:
        settings: the recipe's `gate` section.
        metrics: by name, `higher_is_better` and the `finding` that it is about ("" for all).

    Raises:
        UserError: no rule, an unknown metric, a metric's other direction, or a candidate compared with itself.
    """
    if not settings.rules:
        raise UserError("gate.rules is empty: a gate without a rule would pass anything; give it at least one rule")
    for i, rule in enumerate(settings.rules):
        where = f"gate.rules.{i}"
        if rule.against == settings.candidate:
            raise UserError(f"{where}: {settings.candidate!r} is compared with itself; set against to the champion")
        if rule.metric not in metrics:
            raise UserError(f"{where}.metric: no metric {shown(repr(rule.metric))}; {_instead(rule.metric, metrics)}")
        better = metrics[rule.metric]["higher_is_better"]
        if better is not None and better != rule.higher_is_better:
            raise UserError(f"{where}: wrong direction of {rule.metric}; set higher_is_better: {str(better).lower()}")


def _instead(metric: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    if metric.startswith(_NEED_ANNOTATIONS) and not any(name.startswith(_NEED_ANNOTATIONS) for name in metrics):
        return "it needs masks and truth beside the data; set data.annotations_root, or compare report_* metrics"
    if close := difflib.get_close_matches(metric, metrics, n=1):
        return f"did you mean {close[0]!r}?"
    general = [name for name, known in metrics.items() if not known["finding"]]
    return f"known are {', '.join(general)}, and precision, recall and f1 of one finding, such as report_f1_edema"
