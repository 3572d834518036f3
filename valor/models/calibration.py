"""The expert's calibration on held-out reports: what its margins are worth as probabilities."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from valor.clinical.vocabulary import OBSERVATIONS, SIDES, ZONES
from valor.models.statements import ODDS, SIDED, ZONED, Margins

if TYPE_CHECKING:
    import numpy as np
    import torch

MIN_CASES = 8
"""Fewer positive reports of a finding than this measure nothing."""
_MAX_SCALE = 50.0
Assertion = tuple[str, str | None, str | None]
"""What a report says of a finding: label, side and zone."""


def calibrate_presence(margin: "np.ndarray", says: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a finding's AUC and deletion accuracy, and its calibration (empty where there are too few cases)."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    sure = np.array([value != "uncertain" for value in says])
    truth = np.array([value == "positive" for value in says])[sure]
    entry: dict[str, Any] = {"positives": int(truth.sum()), "auc": None, "deletion": None}
    entry |= {"pays": None, "pays_falsely": None}
    if min(truth.sum(), (~truth).sum()) < MIN_CASES:
        return entry, {}
    values = margin[sure]
    spread = float(values.std()) or 1.0
    fit = LogisticRegression(C=10.0).fit(values[:, None] / spread, truth)
    centre = (float(values[truth].mean()) + float(values[~truth].mean())) / 2
    entry["auc"] = float(roc_auc_score(truth, values))
    # The centre, not where the reward's odds begin to pay: for a rare finding that is far beyond most true cases.
    entry["deletion"] = float((values[truth] > centre).mean())
    # Where they do begin to pay is told beside it, at the default odds: of the true cases, and of all others.
    pays = fit.predict_proba(values[:, None] / spread)[:, 1] >= 1 / (1 + ODDS)
    entry["pays"], entry["pays_falsely"] = float(pays[truth].mean()), float(pays[~truth].mean())
    scale, bias = float(fit.coef_[0, 0]) / spread, float(fit.intercept_[0])
    return entry, {"scale": scale, "bias": bias}


def add_places(
    calibration: dict[str, dict[str, Any]],
    margins: Margins,
    image_embeds: "torch.Tensor",
    read: Sequence[dict[str, Assertion]],
    *,
    masked: Sequence[str],
) -> None:
    """Add the calibrated choice of side and zone to the findings that have enough placed cases."""
    for key, names, places, cosines, part in (
        ("side", SIDED, SIDES, margins.sides(image_embeds).numpy(), 1),
        ("zone", ZONED, ZONES, margins.zones(image_embeds).numpy(), 2),
    ):
        for finding in names:
            if finding in calibration and finding not in masked:
                rows = [
                    (i, places.index(own[finding][part])) for i, own in enumerate(read) if _placed(own, finding, part)
                ]
                calibration[finding][key] = _calibrate_place(cosines[:, OBSERVATIONS.index(finding)], rows)


def _calibrate_place(cosines: "np.ndarray", rows: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """Return scale and biases of a softmax over (N, 3) centred cosines, and the places' frequencies.

    None with few cases. The biases are held near the log frequencies and the scale is bounded, since a finding has
    some twenty placed cases.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    if len(rows) < MIN_CASES:
        return None
    index, place = np.array([i for i, _ in rows]), np.array([p for _, p in rows])
    prior = (np.bincount(place, minlength=3) + 1) / (len(place) + 3)

    def loss(values: "np.ndarray") -> float:
        logits = values[0] * cosines[index] + values[1:]
        chosen = log_softmax(logits, axis=1)[np.arange(len(place)), place]
        return float(0.5 * ((values[1:] - np.log(prior)) ** 2).sum() - chosen.sum())

    bounds = [(0.0, _MAX_SCALE), *[(None, None)] * 3]
    fit = minimize(loss, np.array([10.0, *np.log(prior)]), bounds=bounds, method="L-BFGS-B")
    return {"scale": float(fit.x[0]), "bias": fit.x[1:].tolist(), "prior": prior.tolist(), "cases": len(rows)}


def _placed(own: dict[str, Assertion], finding: str, part: int) -> bool:
    state = own.get(finding)
    return state is not None and state[0] == "positive" and state[part] is not None
