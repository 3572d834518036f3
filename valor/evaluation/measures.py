"""The metrics of an evaluation, each a function of sums of per-study columns, so that a bootstrap is a matrix product.

Clinical metrics count findings that a report states. "Uncertain" counts as stated, in references and in hypotheses
alike, as CheXbert-based scores of report generation do: a hedge is neither free of charge nor worthless. A metric
exists twice where there is truth: `report_*` against the radiologist's report, `truth_*` against what is in the image.
Macro means run over the findings that the reference holds at least once, so every checkpoint meets the same list; where
truth has no such finding, a wrong name ("pneumonia") counts against the finding that it is a narrower name of. A wrong
"opacity", which may be any kind of it, counts in the micro metrics alone.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from valor.clinical.hierarchy import ancestors
from valor.clinical.vocabulary import OBSERVATIONS
from valor.metrics.bleu import MAX_N, bleu_scores

Source = Literal["report", "truth"]
Compute = Callable[[Mapping[str, np.ndarray]], np.ndarray]
SOURCES: tuple[Source, ...] = ("report", "truth")
SOURCE_NAMES: dict[Source, str] = {"report": "the report", "truth": "truth"}
BLEU_COLUMNS: tuple[str, ...] = (
    *(f"bleu/{kind}{n}" for kind in ("matched", "total") for n in range(1, MAX_N + 1)),
    "bleu/hypothesis",
    "bleu/reference",
)
"""The columns of `valor.metrics.bleu.bleu_counts`."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """One metric.

    Attributes:
        name: its key in metrics.json.
        label: what people read.
        group: the heading it stands under.
        compute: sums of per-study columns, each (draws,), to (draws,) values; nan where undefined.
        higher_is_better: None where neither direction is good in itself.
        form: how its value is written.
        finding: the finding it is about, "" where it is about all.
    """

    name: str
    label: str
    group: str
    compute: Compute
    higher_is_better: bool | None = True
    form: Literal["percent", "number"] = "number"
    finding: str = ""


def slug(finding: str) -> str:
    """Return a finding as the end of a metric's name: "Pleural Effusion" is pleural_effusion."""
    return finding.lower().replace(" ", "_")


def measures(*, truth: bool, findings: Mapping[Source, Sequence[str]]) -> list[Measure]:
    """Return the metrics of an evaluation in the table's order.

    Args:
        truth: whether there are `truth_*` metrics.
        findings: per source, the findings that its reference holds at least once.
    """
    sources: list[Source] = ["truth", "report"] if truth else ["report"]
    wrong = {source: _wrong_names(source, findings[source]) for source in sources}
    clinical = [m for source in sources for m in _clinical(source, findings[source], wrong[source])]
    per_finding = [
        m for source in sources for finding in OBSERVATIONS for m in _per_finding(source, finding, wrong[source])
    ]
    return [*clinical, *_image(), *_language(), *_form(), *per_finding]


def _wrong_names(source: Source, held: Collection[str]) -> Mapping[str, Sequence[str]]:
    """Return per finding the names whose false positives count against it.

    Truth credits a narrower name with the finding that is there (`scores.Expected`); so must it be charged.
    """
    names = {finding: [finding] for finding in OBSERVATIONS}
    for finding in OBSERVATIONS if source == "truth" else ():
        broader = ancestors(finding) & set(held)
        if broader and finding not in held:
            names[max(sorted(broader), key=lambda one: len(ancestors(one)))].append(finding)
    return names


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _clinical(source: Source, findings: Sequence[str], wrong: Mapping[str, Sequence[str]]) -> list[Measure]:
    group = f"Findings against {SOURCE_NAMES[source]}"

    def total(kind: str) -> Compute:
        return lambda sums: sum((sums[f"{source}/{kind}/{f}"] for f in OBSERVATIONS), np.zeros(()))

    def micro(top: Sequence[str], bottom: Sequence[str]) -> Compute:
        return lambda sums: share(sum(total(k)(sums) for k in top), sum(total(k)(sums) for k in bottom))  # type: ignore[arg-type]

    def macro(kind: str) -> Compute:
        parts = {"precision": _precision, "recall": _recall, "f1": _f1}[kind]
        return lambda sums: _mean_defined([_supported(parts(source, f, wrong[f]), source, f)(sums) for f in findings])

    def measure(name: str, label: str, compute: Compute, *, higher: bool = True) -> Measure:
        return Measure(f"{source}_{name}", label, group, compute, higher_is_better=higher, form="percent")

    return [
        measure("f1_micro", "F1, micro", micro(["tp", "tp"], ["tp", "tp", "fp", "fn"])),
        measure("f1_macro", "F1, macro", macro("f1")),
        measure("hallucination", "Hallucinated findings", micro(["fp"], ["tp", "fp"]), higher=False),
        measure("omission", "Omitted findings", micro(["fn"], ["tp", "fn"]), higher=False),
        measure("precision_micro", "Precision, micro", micro(["tp"], ["tp", "fp"])),
        measure("recall_micro", "Recall, micro", micro(["tp"], ["tp", "fn"])),
        measure("precision_macro", "Precision, macro", macro("precision")),
        measure("recall_macro", "Recall, macro", macro("recall")),
        measure("abnormal_recall", "Abnormal studies called abnormal", _share(source, "abnormal_found", "abnormal")),
        measure("normal_recall", "Normal studies called normal", _share(source, "normal_kept", "normal")),
        measure("side_accuracy", "Side right, where the finding is", _share(source, "side_right", "side")),
    ]


def _per_finding(source: Source, finding: str, wrong: Mapping[str, Sequence[str]]) -> list[Measure]:
    group = f"{finding}, against {SOURCE_NAMES[source]}"
    kinds = {"f1": ("F1", _f1), "precision": ("Precision", _precision), "recall": ("Recall", _recall)}
    found = {kind: (label, compute(source, finding, wrong[finding])) for kind, (label, compute) in kinds.items()}
    return [
        Measure(f"{source}_{kind}_{slug(finding)}", label, group, compute, form="percent", finding=finding)
        for kind, (label, compute) in found.items()
    ]


def _image() -> list[Measure]:
    def mean(column: str) -> Compute:
        return lambda sums: share(sums[f"grounding/{column}"], sums["grounding/mentions"])

    return [
        Measure(
            "similarity", "Similarity to the image (judge)", "Image",
            lambda sums: share(sums["similarity/sum"], sums["similarity/count"]),
        ),
        Measure("grounding_ratio", "Attention in the finding (even = 1)", "Image", mean("ratio")),
        Measure("grounding_shuffled", "Attention in the finding, shuffled image", "Image", mean("shuffled"), None),
        Measure(
            "grounding_difference", "Attention in the finding, own - shuffled", "Image",
            lambda sums: mean("ratio")(sums) - mean("shuffled")(sums),
        ),
        Measure(
            "flip_rate", "Counterfactual pairs told apart", "Image",
            lambda sums: share(sums["pairs/flipped"], sums["pairs/count"]), form="percent",
        ),
    ]  # fmt: skip


def _language() -> list[Measure]:
    group = "Wording against the report"

    def mean(column: str) -> Compute:
        return lambda sums: share(sums[column], sums["studies"])

    bleu = [
        Measure(f"report_bleu_{n}", f"BLEU-{n}", group, _bleu(f"bleu_{n}"), form="percent") for n in range(1, MAX_N + 1)
    ]
    return [
        *bleu,
        Measure("report_rouge_l", "ROUGE-L", group, mean("rouge_l"), form="percent"),
        Measure("report_gleu", "GLEU", group, mean("gleu"), form="percent"),
    ]


def _form() -> list[Measure]:
    group = "Form"

    def mean(column: str) -> Compute:
        return lambda sums: share(sums[column], sums["studies"])

    return [
        Measure("length", "Tokens per report", group, mean("tokens"), higher_is_better=None),
        Measure("truncated", "Reports cut at the limit", group, mean("truncated"), False, "percent"),
        Measure("empty", "Empty reports", group, mean("empty"), False, "percent"),
    ]


def _bleu(name: str) -> Compute:
    """Corpus BLEU from the summed n-gram counts."""
    return lambda sums: bleu_scores(np.stack([sums[column] for column in BLEU_COLUMNS], axis=-1))[name]


def _share(source: Source, part: str, whole: str) -> Compute:
    return lambda sums: share(sums[f"{source}/{part}"], sums[f"{source}/{whole}"])


def _false(source: Source, names: Sequence[str]) -> Compute:
    return lambda sums: sum((sums[f"{source}/fp/{name}"] for name in names), np.zeros(()))


def _f1(source: Source, finding: str, wrong: Sequence[str]) -> Compute:
    def compute(sums: Mapping[str, np.ndarray]) -> np.ndarray:
        tp, fn = (sums[f"{source}/{kind}/{finding}"] for kind in ("tp", "fn"))
        return share(2 * tp, 2 * tp + _false(source, wrong)(sums) + fn)

    return compute


def _precision(source: Source, finding: str, wrong: Sequence[str]) -> Compute:
    return lambda sums: share(
        sums[f"{source}/tp/{finding}"], sums[f"{source}/tp/{finding}"] + _false(source, wrong)(sums)
    )


def _recall(source: Source, finding: str, _: Sequence[str]) -> Compute:
    return lambda sums: share(
        sums[f"{source}/tp/{finding}"], sums[f"{source}/tp/{finding}"] + sums[f"{source}/fn/{finding}"]
    )


def _supported(compute: Compute, source: Source, finding: str) -> Compute:
    """Leave a finding out of a draw that holds none of it; where it is there and never stated, precision is 0."""

    def guarded(sums: Mapping[str, np.ndarray]) -> np.ndarray:
        support = sums[f"{source}/tp/{finding}"] + sums[f"{source}/fn/{finding}"]
        return np.where(support > 0, np.nan_to_num(compute(sums)), np.nan)

    return guarded


def _mean_defined(values: Sequence[np.ndarray]) -> np.ndarray:
    if not values:
        return np.full(1, np.nan)
    stacked = np.stack(values)
    return share(np.nansum(stacked, axis=0), np.isfinite(stacked).sum(axis=0))
