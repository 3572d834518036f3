"""A linear probe on the base's frozen tower: how much of the findings is in the features that every arm reads.

Logistic regression per finding on mean and maximum of the patch tokens, taught by the training half's reports as SFT
is; thresholds come from the other half's reports. Where it does not beat SFT clearly, no reward could: there is nothing
left to see. (Alain and Bengio 2016, arXiv 1610.01644.)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from valor import artifacts

_STRENGTHS = (0.003, 0.01, 0.03, 0.1)


def probe(*, base: Path, dataset: Path, evidence: Path, output: Path, seed: int = 0) -> Mapping[str, float]:
    """Measure the probe on the test studies against truth and write `probe.json` into `output`."""
    from pipelines.experiments.arms import REWARDED, SUPERVISED
    from valor.data.manifest import in_share, read_studies
    from valor.evaluation import inputs

    train = read_studies(dataset, split="train")
    test = read_studies(dataset, split="test")
    twins = {pair.twin for pair in inputs.read_pairs(evidence, [s.study_id for s in test])}
    parts = {
        "train": in_share(train, SUPERVISED),
        "tune": in_share(train, REWARDED),
        "test": [study for study in test if study.study_id not in twins],
    }
    truth = inputs.read_truth(evidence, [study.study_id for study in parts["test"]])
    assert truth is not None
    features = _features(base, parts)
    counts, areas = {}, {}
    for finding in _drawn(truth):
        present = np.array([finding in truth.studies[study.study_id] for study in parts["test"]])
        scores, threshold = _fit(features, parts, finding)
        stated = scores >= threshold
        counts[finding] = [
            int((stated & present).sum()),
            int((stated & ~present).sum()),
            int((~stated & present).sum()),
        ]
        areas[finding] = _area(present, scores)
    f1 = {finding: 2 * tp / max(1, 2 * tp + fp + fn) for finding, (tp, fp, fn) in counts.items()}
    tp, fp, fn = (sum(row[i] for row in counts.values()) for i in range(3))
    summary = {
        "f1_macro": float(np.mean(list(f1.values()))), "f1_micro": 2 * tp / (2 * tp + fp + fn),
        "hallucination": fp / (tp + fp), "omission": fn / (tp + fn), "auc_macro": float(np.mean(list(areas.values()))),
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(output / "probe.json", {**summary, "f1": f1, "auc": areas, "counts": counts})
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
    """Return the test studies' scores, and the threshold and strength that are best for F1 on the tuning reports."""
    from sklearn.linear_model import LogisticRegression

    from valor.clinical.labeler import label

    said = {
        name: np.array([label(study.text).get(finding) in ("positive", "uncertain") for study in parts[name]])
        for name in ("train", "tune")
    }
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


def _area(present: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(present, scores))
