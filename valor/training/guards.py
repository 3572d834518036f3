"""Collapse guards: when a GRPO stage's policy has left the ground that it started from.

A reward can be earned by falling silent or by saying everything, and the reward's own curve rises while it happens
(docs/experiments.md tells of both). Each guard compares one number of the trainer's log, its mean over the last
`window` steps, with its mean over the first `window`. The log is part of every trainer checkpoint, with what is
gathered for its next line (`valor.training.trainers`), so a stage that was killed and continued is judged as if it had
not been, and the guards keep nothing of their own.

Left out: a collapse within the first `window` steps that leaves nothing to fall from; SFT, which has no completions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from valor.clinical.summary import summarise
from valor.clinical.vocabulary import FINDINGS
from valor.recipe import Guards

STATED = "completions/stated_findings"
"""Log key: the share of completions that state a finding; of those whose reference does, where there is a reference."""
CALLED = "completions/called_abnormal"
"""Log key: the same share; of those whose reference states none, where there is a reference."""
_NO_ABNORMALITY = ("Support Devices", "No Finding")
_MILDER = "lower trainer.learning_rate or raise trainer.beta"


@dataclasses.dataclass(frozen=True)
class _Guard:
    """One limit of the settings: which number of the log it watches, and what to do once it is passed."""

    setting: str
    key: str
    what: str
    side: Literal["low", "high"]
    scale: Literal["ratio", "rise", "room", "absolute"]
    advice: str

    def bound(self, limit: float, *, start: float) -> float:
        """Return the limit in the number's own unit."""
        room = start + limit * (1 - start)
        return {"ratio": limit * start, "rise": start + limit, "room": room, "absolute": limit}[self.scale]

    def passed(self, value: float, bound: float) -> bool:
        return value < bound if self.side == "low" else value > bound


_GUARDS = (
    _Guard(
        "min_findings_ratio", STATED, "the share of completions that state a finding", "low", "ratio",
        f"reports fall silent: {_MILDER}, or make the rewards pay more for what is found",
    ),
    _Guard(
        "max_called_rise", CALLED, "the share of completions that call a study abnormal", "high", "room",
        f"reports find something everywhere: {_MILDER}, or make inventions cost more",
    ),
    _Guard(
        "min_length_ratio", "completions/mean_length", "tokens per completion", "low", "ratio",
        f"reports grow short: {_MILDER}, or give length_reward more weight",
    ),
    _Guard(
        "max_length_ratio", "completions/mean_length", "tokens per completion", "high", "ratio",
        f"reports grow long: {_MILDER}, or give length_reward and repetition_reward more weight",
    ),
    _Guard(
        "max_cut_rise", "completions/clipped_ratio", "the share of completions cut at max_new_tokens", "high", "rise",
        f"reports no longer end: {_MILDER}, or give length_reward more weight",
    ),
    _Guard(
        "min_entropy_ratio", "entropy", "entropy per token", "low", "ratio",
        f"completions no longer differ, so no group has a better one: {_MILDER}, or raise trainer.temperature",
    ),
    _Guard(
        "max_entropy_ratio", "entropy", "entropy per token", "high", "ratio",
        f"completions become noise: {_MILDER}",
    ),
    _Guard(
        "max_kl", "kl", "KL divergence per token from the parent", "high", "absolute",
        f"the policy is far from its parent: {_MILDER}",
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Line:
    """A number of the trainer's log: the step it was logged at, how many steps it averages over, its value."""

    step: int
    steps: int
    value: float


def collapse(log_history: Sequence[Mapping[str, Any]], guards: Guards | None) -> str | None:
    """Return the verdict on a training log, in one line without the step, or None where no limit is passed.

    Args:
        log_history: the trainer's log lines; lines and keys that no guard knows are passed over.
        guards: limits; None turns all of them off.
    """
    for guard, limit, start, now, _ in _levels(log_history, guards):
        bound = guard.bound(limit, start=start)
        if guard.passed(now, bound):
            window = guards.window if guards else 0
            return (
                f"{guard.what}: {now:.3g} on average of the last {window} steps, {start:.3g} of the first; "
                f"guards.{guard.setting} ({limit:g}) sets the limit at {bound:.3g}; {guard.advice}"
            )
    return None


def blind_spots(guards: Guards | None, *, beta: float, logging_steps: float, max_steps: int) -> list[str]:
    """Return what the guards will not see of a stage with these trainer settings, a line each.

    Args:
        guards: limits.
        beta: weight of the KL term; TRL measures the divergence only where it is above 0.
        logging_steps: optimizer steps between two lines of the log.
        max_steps: of the stage; -1 where epochs end it.
    """
    if guards is None:
        return []
    found = []
    if guards.max_kl is not None and not beta:
        found.append("guards.max_kl watches nothing, since trainer.beta is 0 and the KL divergence is not measured")
    last = max_steps // logging_steps * logging_steps if logging_steps >= 1 else max_steps
    if max_steps > 0 and last <= max(guards.window, logging_steps):
        found.append(
            f"no guard will judge: trainer.max_steps is {max_steps}, guards.window {guards.window} and "
            f"trainer.logging_steps {logging_steps:g}, so the log has nothing after the first window"
        )
    return found


def healthy(log_history: Sequence[Mapping[str, Any]], guards: Guards | None) -> bool:
    """Tell whether a checkpoint of this moment may be called good, whatever comes after it.

    A verdict comes some lines after the collapse began, so this asks for more: no mean is half of the way from its
    start to its limit, and no last line, which a sudden collapse shows in first, is past the limit.
    """
    for guard, limit, start, now, last in _levels(log_history, guards):
        bound = guard.bound(limit, start=start)
        if guard.passed(now, (start + bound) / 2) or guard.passed(last, bound):
            return False
    return True


def stated_findings(texts: Sequence[str], references: Sequence[str | None]) -> dict[str, list[bool]]:
    """Tell of each completion whether it states a finding, under the log keys that count it.

    One with a reference counts under STATED or CALLED, by whether its reference states a finding; one without under
    both.
    """
    found: dict[str, list[bool]] = {STATED: [], CALLED: []}
    for text, reference in zip(texts, references, strict=True):
        abnormal = _is_abnormal(text, is_candidate=True)
        expected = None if reference is None else _is_abnormal(reference)
        if expected is not False:
            found[STATED].append(abnormal)
        if expected is not True:
            found[CALLED].append(abnormal)
    return found


def _is_abnormal(report: str, *, is_candidate: bool = False) -> bool:
    labels = summarise(report, is_candidate=is_candidate).labels
    return any(labels.get(finding) == "positive" for finding in FINDINGS if finding not in _NO_ABNORMALITY)


def _levels(
    log_history: Sequence[Mapping[str, Any]], guards: Guards | None
) -> list[tuple[_Guard, float, float, float, float]]:
    """Return (guard, limit, mean of the first window, of the last, last value) of all that can be judged already."""
    if guards is None:
        return []
    training = [line for line in log_history if "loss" in line]
    starts = [0, *(line["step"] for line in training)]
    levels = []
    for guard in _GUARDS:
        limit = getattr(guards, guard.setting)
        lines = [
            _Line(line["step"], steps=line["step"] - start, value=line[guard.key])
            for start, line in zip(starts, training, strict=False)
            if line.get(guard.key) is not None
        ]
        # Where a line averages over more than a window, it is one.
        first = [line for line in lines if line.step <= guards.window] or lines[:1]
        if limit is not None and len(lines) > len(first):
            last = lines[-1]
            recent = [line for line in lines if line.step > last.step - guards.window]
            levels.append((guard, limit, _mean(first), _mean(recent), last.value))
    return levels


def _mean(lines: Sequence[_Line]) -> float:
    """Return the mean over steps: `logging_first_step` makes a line of one step beside lines of many."""
    return sum(line.value * line.steps for line in lines) / sum(line.steps for line in lines)
