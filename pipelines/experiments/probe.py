"""A linear probe on the base's frozen tower: how much of the findings is in the features that every arm reads.

Logistic regression per finding on mean and maximum of the patch tokens, taught by the supervised share's reports as SFT
is; strengths and thresholds come from the other share's. It is no bound: what trains is not linear, and
learns of findings from each other. (Alain and Bengio 2016, arXiv 1610.01644.)
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from valor import artifacts

_STRENGTHS = (0.003, 0.01, 0.03, 0.1)
_SHOWN = ("f1_macro", "f1_micro", "hallucination", "omission")


def probe(
    *,
    base: Path,
    dataset: Path,
    evidence: Path,
    output: Path,
    taught: tuple[float, float],
    tuned: tuple[float, float],
) -> Mapping[str, float]:
    """Measure the probe on the test studies against truth and write `probe.json` into `output`.

    Its findings are counted as those of a report that asserts them (`scores.clinical_counts`).

    Args:
        base: the checkpoint whose tower is read.
        dataset, evidence: where the studies, their reports and their truth are.
        output: the directory to make.
        taught, tuned: shares of the training subjects whose reports teach it, and choose strengths and thresholds.
    """
    from pipelines.experiments.analysis import Table, measured, value
    from valor.data.manifest import in_share, read_studies
    from valor.evaluation import inputs, scores

    train = read_studies(dataset, split="train")
    test = read_studies(dataset, split="test")
    twins = {pair.twin for pair in inputs.read_pairs(evidence, [s.study_id for s in test])}
    parts = {
        "train": in_share(train, taught),
        "tune": in_share(train, tuned),
        "test": [study for study in test if study.study_id not in twins],
    }
    truth = inputs.read_truth(evidence, [study.study_id for study in parts["test"]])
    assert truth is not None
    features = _features(base, parts)
    stated: list[set[str]] = [set() for _ in parts["test"]]
    areas = {}
    for finding in _drawn(truth):
        values, threshold = _fit(features, parts, finding)
        for own, one in zip(stated, values, strict=True):
            own.update({finding} if one >= threshold else ())
        areas[finding] = _area(np.array([finding in truth.studies[s.study_id] for s in parts["test"]]), values)
    index = {name: i for i, name in enumerate(scores.COLUMNS)}
    table = np.zeros((len(stated), len(index)))
    for row, (study, own) in enumerate(zip(parts["test"], stated, strict=True)):
        says = scores.Statement(labels=dict.fromkeys(own, "positive"), sides={}, mentions=[])
        for key, count in scores.clinical_counts(says, scores.expected_of_truth(truth, study.study_id)).items():
            table[row, index[f"truth/{key}"]] = count
    found = Table(np.arange(len(stated)), scores.COLUMNS, table)
    measures = measured({0: found})
    summary = {name: value(measures[f"truth_{name}"], found) for name in _SHOWN}
    summary["auc_macro"] = float(np.mean(list(areas.values())))
    output.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(output / "probe.json", {**summary, "auc": areas})
    return summary


def _drawn(truth: Any) -> list[str]:
    """Return the findings that are in some image of their own accord."""
    return [f for f in truth.findings if any(f in present for present in truth.studies.values())]


def _features(base: Path, parts: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    import torch

    from valor.models.loading import load_policy, model_pixels
    from valor.models.tower import normalised, patch_tokens

    model, processor = load_policy(base)
    features = {}
    with torch.inference_mode():
        for name, studies in parts.items():
            grey = np.stack([np.asarray(model_pixels(study, processor).convert("L")) for study in studies])
            batches = torch.from_numpy(grey).split(64)
            tokens = torch.cat([patch_tokens(model.model.vision_tower, normalised(batch)) for batch in batches])
            features[name] = torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1).numpy()
    mean, spread = features["train"].mean(axis=0), features["train"].std(axis=0) + 1e-6
    return {name: (values - mean) / spread for name, values in features.items()}


def _fit(
    features: Mapping[str, np.ndarray], parts: Mapping[str, Sequence[Any]], finding: str
) -> tuple[np.ndarray, float]:
    """Return the test studies' scores and a threshold, both of what is best for F1 on the tuning reports."""
    from sklearn.linear_model import LogisticRegression

    said = {name: np.array([finding in _named(study.text) for study in parts[name]]) for name in ("train", "tune")}
    best = (-1.0, np.zeros(0), 0.0)
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(features["train"], said["train"])
        tune, test = (model.decision_function(features[name]) for name in ("tune", "test"))
        for threshold in np.quantile(tune, np.linspace(0.5, 0.99, 50)):
            stated = tune >= threshold
            f1 = 2 * (stated & said["tune"]).sum() / max(1, stated.sum() + said["tune"].sum())
            if f1 > best[0]:
                best = (float(f1), test, float(threshold))
    return best[1], best[2]


@functools.cache
def _named(report: str) -> frozenset[str]:
    """Return what a report states by any name: "pneumonia" says that there is a consolidation."""
    from valor.clinical.hierarchy import NAMES
    from valor.evaluation.scores import read_report

    return frozenset(name for finding in read_report(report).stated for name in NAMES[finding])


def _area(present: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(present, scores))
