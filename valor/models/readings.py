"""What sentences say about studies whose reports are known: the supervision of the tiny models, from reports alone.

The labeler turns a sentence into a signature, the set of (finding, label, side, zone) that it states. Against a
study's report a sentence then agrees, contradicts, or cannot be judged. Without that, "No effusion." from another
patient's report would be a negative for a study whose own report says "There is no pleural effusion."
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from valor.clinical.labeler import mentions
from valor.clinical.vocabulary import OBSERVATIONS, ZONES
from valor.models.statements import assertions

if TYPE_CHECKING:
    import numpy as np

State = tuple[str, str, str | None, str | None]
_MIRROR = {"left": "right", "right": "left"}


def signature(sentence: str) -> frozenset[State]:
    """Return the (finding, label, side, zone) statements of a sentence; empty where it says nothing of findings."""
    return frozenset((m.finding, m.label, m.side, m.zone) for m in mentions(sentence))


def mirrored(states: frozenset[State]) -> frozenset[State]:
    """Return the signature with left and right exchanged."""
    return frozenset((f, value, _MIRROR.get(side or "", side), zone) for f, value, side, zone in states)


def agreement(reports: Sequence[str], signatures: Sequence[frozenset[State]]) -> "np.ndarray":
    """Return (reports, signatures) int8: 1 the report agrees, -1 it contradicts, 0 it cannot tell.

    Silence counts as absent. A sentence agrees only if all of its statements do, and contradicts if any one does.
    """
    import numpy as np

    read = [assertions(report) for report in reports]
    states = sorted({state for one in signatures for state in one}, key=repr)
    single = np.array([[_agree(own, state) for state in states] for own in read], dtype=np.int8)
    column = {state: i for i, state in enumerate(states)}
    result = np.zeros((len(reports), len(signatures)), dtype=np.int8)
    for i, one in enumerate(signatures):
        if one:
            result[:, i] = single[:, [column[state] for state in one]].min(axis=1)
    return result


def targets(reports: Sequence[str]) -> tuple["np.ndarray", "np.ndarray"]:
    """Return (N, 13 * 7) float32 targets in {0, 1} and their weights in {0, 1}.

    Per finding: present, then present on each of left and right, then present in each zone, then bilateral. An
    uncertain finding, and the place of a finding that is present but not placed, weigh 0.
    """
    import numpy as np

    wanted = np.zeros((len(reports), len(OBSERVATIONS), 7), dtype=np.float32)
    weight = np.ones_like(wanted)
    for row, report in enumerate(reports):
        for finding, (value, side, zone) in assertions(report).items():
            if finding not in OBSERVATIONS:
                continue
            cell = row, OBSERVATIONS.index(finding)
            if value == "uncertain":
                weight[cell] = 0
            if value == "positive":
                wanted[cell][0] = 1
                wanted[cell][1:4] = [side in ("left", "bilateral"), side in ("right", "bilateral"), side == "bilateral"]
                wanted[cell][4:] = [zone == name for name in ZONES]
                weight[cell][1:4] = side is not None
                weight[cell][4:] = zone is not None
    return wanted.reshape(len(reports), -1), weight.reshape(len(reports), -1)


def mirrored_targets(values: "np.ndarray") -> "np.ndarray":
    """Return `targets` (or their weights) of the mirrored image."""
    cells = values.reshape(len(values), len(OBSERVATIONS), 7)
    return cells[:, :, [0, 2, 1, 3, 4, 5, 6]].reshape(len(values), -1)


def _agree(own: dict[str, tuple[str, str | None, str | None]], state: State) -> int:
    finding, value, side, zone = state
    known, known_side, known_zone = own.get(finding, ("negative", None, None))
    if value == "uncertain" or known == "uncertain":
        return 1 if value == known else 0
    if value != known:
        return -1
    if value == "negative":
        return 1
    agrees = [_place(side, known_side), _place(zone, known_zone)]
    return min(agrees)


def _place(said: str | None, known: str | None) -> int:
    if said is None:
        return 1
    if known is None:
        return 0
    return 1 if said == known else -1
