"""Gate: compare the candidate with SFT and the champion by the recipe's rules, on paired bootstrap intervals.

Every rule is one of non-inferiority: the bound of the interval that is worst for the candidate must not lie beyond
the margin. Refusing is a normal result: the stage writes the verdict with its evidence and returns "refuse"; the
command line turns that into exit code 4.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valor import artifacts
from valor.context import Context
from valor.errors import IntegrityError, UserError
from valor.evaluation.gate_rules import check
from valor.evaluation.table import number
from valor.recipe import GateRule, GateSettings
from valor.stages import StageResult

MIN_DEFINED = 0.95
"""A difference that fewer of the bootstrap draws define says too little: its interval leaves out the others."""

log = logging.getLogger(__name__)


def gate(
    settings: GateSettings, *, evaluation: Path, verdict: Path, champion_digest: str, context: Context
) -> StageResult:
    """Write `verdict.json` and `verdict.md` and return the value `verdict`, "pass" or "refuse".

    Args:
        settings: the recipe's `gate` section.
        evaluation: the evaluation artifact.
        verdict: the directory to make.
        champion_digest: digest of the current champion, "" where there is none.
        context: unused places.

    Raises:
        UserError: there is no rule, or a rule names an unknown metric, a metric whose direction differs, or compares
            the candidate with itself.
        IntegrityError: the evaluation's champion is not the one of `champion_digest`.
    """
    metrics = artifacts.read_json(evaluation / "metrics.json")
    _check(settings, metrics, champion_digest)
    judged = [_judge(rule, settings.candidate, metrics, champion_digest) for rule in settings.rules]
    refused = [rule for rule in judged if rule["holds"] is False]
    few = metrics["subjects"] < settings.min_subjects
    decision = "refuse" if refused or few else "pass"
    value = {
        "verdict": decision,
        "candidate": settings.candidate,
        "candidate_digest": metrics["checkpoint_digests"][settings.candidate],
        "champion_digest": champion_digest,
        "dataset_digest": metrics["dataset_digest"],
        "studies": metrics["studies"],
        "subjects": metrics["subjects"],
        "min_subjects": settings.min_subjects,
        "bootstrap": metrics["bootstrap"],
        "rules": judged,
    }
    with artifacts.atomic_dir(verdict) as path:
        artifacts.write_json(path / "verdict.json", value)
        (path / "verdict.md").write_text(_markdown(value), encoding="utf-8")
    log.info("the gate's verdict is %s: %d of %d rules do not hold", decision, len(refused), len(judged))
    counts = {"rules": len(judged), "rules_refused": len(refused), "passed": float(decision == "pass")}
    return StageResult(metrics=counts, values={"verdict": decision})


def _check(settings: GateSettings, metrics: Mapping[str, Any], champion_digest: str) -> None:
    if settings.candidate not in metrics["checkpoints"]:
        raise UserError(
            f"gate.candidate: {settings.candidate!r} was not evaluated; have {', '.join(metrics['checkpoints'])}"
        )
    evaluated = metrics["checkpoint_digests"].get("champion", "")
    if evaluated != champion_digest:
        raise IntegrityError(
            f"the evaluation's champion is {evaluated[:12] or 'none'}, the gate was given "
            f"{champion_digest[:12] or 'none'}; evaluate again with the current champion"
        )
    check(settings, metrics["measures"])


def _judge(rule: GateRule, candidate: str, metrics: Mapping[str, Any], champion_digest: str) -> dict[str, Any]:
    judged: dict[str, Any] = {
        "metric": rule.metric,
        "label": metrics["measures"][rule.metric]["label"],
        "against": rule.against,
        "margin": rule.margin,
        "higher_is_better": rule.higher_is_better,
    }
    if rule.against == "champion" and not champion_digest:
        return {**judged, "applicable": False, "holds": None, "difference": None, "worst": None,
                "explanation": f"{rule.metric}: not applicable, there is no champion yet."}  # fmt: skip
    difference = metrics["differences"][f"{candidate}-{rule.against}"][rule.metric]
    worst = difference["low"] if rule.higher_is_better else difference["high"]
    # An undefined difference is no evidence, and without evidence nothing passes.
    enough = worst is not None and difference["defined"] >= MIN_DEFINED
    holds = enough and (worst >= -rule.margin if rule.higher_is_better else worst <= rule.margin)
    return {
        **judged,
        "applicable": True,
        "holds": holds,
        "difference": difference,
        "worst": worst,
        "explanation": _explain(rule, candidate, metrics, difference, worst, holds),
    }


def _explain(
    rule: GateRule,
    candidate: str,
    metrics: Mapping[str, Any],
    difference: Mapping[str, Any],
    worst: float | None,
    holds: bool,
) -> str:
    form = metrics["measures"][rule.metric]["form"]
    unit = " points" if form == "percent" else ""
    if worst is None:
        return f"{rule.metric}: refused, {candidate} - {rule.against} is undefined on these studies."
    if difference["defined"] < MIN_DEFINED:
        return (
            f"{rule.metric}: refused, {candidate} - {rule.against} is defined in only {difference['defined']:.1%} of "
            f"bootstrap draws, {MIN_DEFINED:.0%} are needed; too few studies count for it: judge more or drop the rule."
        )

    def text(value: float) -> str:
        return number(value, form, signed=True)

    limit = -rule.margin if rule.higher_is_better else rule.margin
    confidence = f"{metrics['bootstrap']['confidence']:.0%}"
    return (
        f"{rule.metric}: {'holds' if holds else 'refused'}, {candidate} - {rule.against} is "
        f"{text(difference['value'])}{unit} [{text(difference['low'])}, {text(difference['high'])}] "
        f"({confidence} interval); its worst bound {text(worst)} is {'within' if holds else 'beyond'} the limit "
        f"{text(limit)}."
    )


def _markdown(verdict: Mapping[str, Any]) -> str:
    words = {True: "holds", False: "**refused**", None: "not applicable"}
    lines = [
        f"# Verdict: {verdict['verdict']}",
        "",
        f"Candidate `{verdict['candidate']}` ({verdict['candidate_digest'][:12]}), champion "
        f"{verdict['champion_digest'][:12] or 'none'}, {verdict['studies']} studies of {verdict['subjects']} subjects.",
        "",
        "| rule | against | verdict | why |",
        "|---|---|---|---|",
    ]
    if verdict["subjects"] < verdict["min_subjects"]:
        lines.append(
            f"| min_subjects | | **refused** | {verdict['subjects']} subjects were judged, at least "
            f"{verdict['min_subjects']} are needed: intervals over fewer are too narrow. |"
        )
    for rule in verdict["rules"]:
        lines.append(f"| {rule['metric']} | {rule['against']} | {words[rule['holds']]} | {rule['explanation']} |")
    return "\n".join(lines) + "\n"
