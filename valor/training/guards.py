"""Collapse guards: when a GRPO stage's policy has left the ground that it started from.

A reward can be earned by falling silent or by saying everything, and the reward's own curve rises while it happens
(docs/development.md tells of both). Each guard compares one number of the trainer's log, its mean over the last
`window` steps, with its mean over the first `window`. The log is part of every trainer checkpoint, with what is
gathered for its next line (`valor.training.trainers`), so a stage that was killed and continued is judged as if it had
not been, and the guards keep nothing of their own.

A share of completions depends on the studies that a window happened to see, so beyond its limit it must also differ
from its start by more than that could make it.

Left out: a collapse within the first `window` steps that leaves nothing to fall from; SFT, which has no completions.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from valor.clinical.hierarchy import NAMES
from valor.clinical.summary import summarise
from valor.recipe import Guards

STATED = "completions/stated_findings"
"""Log key: of what the reference states, the share that a completion states too."""
CALLED = "completions/called_abnormal"
"""Log key: of completions whose reference states no finding, the share that state one."""
ABNORMAL = "completions/abnormal_reference"
"""Log key: the share of completions whose reference states a finding, those that STATED is about."""
_SURE = 4.0
"""Standard errors that a share must have moved by: the windows are looked at again with every line of a long log."""
_NO_ABNORMALITY = ("Support Devices", "No Finding")
_CUT = "completions/clipped_ratio"
_SHARES = (STATED, CALLED, _CUT)
_MILDER = "lower trainer.learning_rate or raise trainer.beta"


@dataclasses.dataclass(frozen=True)
class _Guard:
    """One limit of the settings: which number of the log it watches, and what to do once it is passed."""

    setting: str
    key: str
    what: str
    side: Literal["low", "high"]
    scale: Literal["ratio", "room", "absolute"]
    advice: str

    def bound(self, limit: float, *, start: float) -> float:
        """Return the limit in the number's own unit."""
        room = start + limit * (1 - start)
        return {"ratio": limit * start, "room": room, "absolute": limit}[self.scale]

    def passed(self, value: float, bound: float) -> bool:
        return value < bound if self.side == "low" else value > bound


_GUARDS = (
    _Guard(
        "min_findings_ratio", STATED, "the share of findings that completions state", "low", "ratio",
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
        "max_cut_rise", _CUT, "the share of completions cut at max_new_tokens", "high", "room",
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
    """A number of the trainer's log: the step it was logged at, how many steps it averages over, its value.

    TRL logs what completions say at the steps that generate, for all the steps that learn from them.
    """

    step: int
    steps: float
    value: float


@dataclasses.dataclass(frozen=True)
class _Level:
    """A guarded number: its limit, its mean over the first window and over the last, and its last value."""

    guard: _Guard
    limit: float
    start: float
    now: float
    last: float
    noise: float

    @property
    def bound(self) -> float:
        return self.guard.bound(self.limit, start=self.start)


def collapse(
    log_history: Sequence[Mapping[str, Any]], guards: Guards | None, *, prompts: float = math.inf, every: int = 1
) -> str | None:
    """Return the verdict on a training log, in one line without the step, or None where no limit is passed.

    Args:
        log_history: the trainer's log lines; lines and keys that no guard knows are passed over.
        guards: limits; None turns all of them off.
        prompts: of an optimizer step, each with a group of completions; the fewer, the more chance makes of a share.
        every: optimizer steps that learn from one generation.
    """
    for level in _levels(log_history, guards, prompts=prompts, every=every):
        if level.guard.passed(level.now, level.bound) and abs(level.now - level.start) > _SURE * level.noise:
            window = guards.window if guards else 0
            return (
                f"{level.guard.what}: {level.now:.3g} on average of the last {window} steps, {level.start:.3g} of the "
                f"first; guards.{level.guard.setting} ({level.limit:g}) sets the limit at {level.bound:.3g}; "
                f"{level.guard.advice}"
            )
    return None


def blind_spots(guards: Guards | None, *, beta: float, logging_steps: int, max_steps: int) -> list[str]:
    """Return what the guards will not see of a stage with these trainer settings, a line each.

    Args:
        guards: limits.
        beta: weight of the KL term; TRL measures the divergence only where it is above 0.
        logging_steps: optimizer steps between two lines of the log.
        max_steps: of the stage.
    """
    if guards is None:
        return []
    found = []
    if guards.max_kl is not None and not beta:
        found.append(
            "guards.max_kl watches nothing, since trainer.beta is 0 and the KL divergence is not measured; 1e-6 "
            "measures it and teaches nothing, at the price of a reference model (with lora there is none to load)"
        )
    if max_steps // logging_steps * logging_steps <= max(guards.window, logging_steps):
        found.append(
            f"no guard will judge: of {max_steps} steps, with trainer.logging_steps {logging_steps} and guards.window "
            f"{guards.window}, the log has nothing after the first window"
        )
    return found


def missed_silence(
    log_history: Sequence[Mapping[str, Any]], guards: Guards | None, *, prompts: float, every: int
) -> str | None:
    """Return that a window is too small to tell silence from chance, judged by the first one; None where it is not.

    Args:
        log_history, guards, prompts, every: as for `collapse`.
    """
    lines = _lines(log_history, STATED, every=every)
    if guards is None or guards.min_findings_ratio is None or not lines:
        return None
    first = _first(lines, guards.window)
    start, none = _mean(first), [dataclasses.replace(line, value=0.0) for line in first]
    if start > _SURE * _error(first, none, prompts=prompts):
        return None
    return (
        f"guards.min_findings_ratio watches nothing: completions state findings at a share of {start:.2g}, and "
        f"{_steps(first) * prompts:.0f} prompts in a window cannot tell a fall to none from chance; raise "
        "guards.window or the batch"
    )


def healthy(log_history: Sequence[Mapping[str, Any]], guards: Guards | None) -> bool:
    """Tell whether a checkpoint of this moment may be called good, whatever comes after it.

    A verdict comes some lines after the collapse began, so this asks for more: no mean is half of the way from its
    start to its limit, and no last line, which a sudden collapse shows in first, is past the limit.
    """
    return not any(
        level.guard.passed(level.now, (level.start + level.bound) / 2) or level.guard.passed(level.last, level.bound)
        for level in _levels(log_history, guards)
    )


def stated_findings(texts: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Return what completions state, under the log keys that average it.

    Findings are those of images, stated or suspected, by this or a narrower name. A completion counts under STATED or
    CALLED, by whether its reference states a finding.

    Args:
        texts: the completions.
        references: their studies' reports.
    """
    found: dict[str, list[float]] = {STATED: [], CALLED: [], ABNORMAL: []}
    for text, reference in zip(texts, references, strict=True):
        given, due = _findings(text, is_candidate=True), _findings(reference)
        found[ABNORMAL].append(float(bool(due)))
        if due:
            found[STATED].append(len(due & given) / len(due))
        else:
            found[CALLED].append(float(bool(given)))
    return found


def _findings(report: str, *, is_candidate: bool = False) -> frozenset[str]:
    labels = summarise(report, is_candidate=is_candidate).labels
    stated = [finding for finding, label in labels.items() if label != "negative" and finding not in _NO_ABNORMALITY]
    return frozenset(name for finding in stated for name in NAMES[finding])


def _levels(
    log_history: Sequence[Mapping[str, Any]], guards: Guards | None, *, prompts: float = math.inf, every: int = 1
) -> list[_Level]:
    """Return what can be judged already."""
    if guards is None:
        return []
    levels = []
    for guard in _GUARDS:
        limit, lines = getattr(guards, guard.setting), _lines(log_history, guard.key, every=every)
        first = _first(lines, guards.window)
        if limit is not None and len(lines) > len(first):
            last = lines[-1]
            recent = [line for line in lines if line.step > last.step - guards.window]
            noise = _error(first, recent, prompts=prompts) if guard.key in _SHARES else 0.0
            levels.append(_Level(guard, limit, _mean(first), _mean(recent), last.value, noise))
    return levels


def _lines(log_history: Sequence[Mapping[str, Any]], key: str, *, every: int) -> list[_Line]:
    training = [line for line in log_history if "loss" in line]
    starts = [0, *(line["step"] for line in training)]
    return [
        _Line(line["step"], steps=max(line["step"] - start, every) * _part(line, key), value=line[key])
        for start, line in zip(starts, training, strict=False)
        if line.get(key) is not None
    ]


def _first(lines: Sequence[_Line], window: int) -> Sequence[_Line]:
    """Return the lines of the first window; where the first line averages over more than that, it is one."""
    return [line for line in lines if line.step <= window] or lines[:1]


def _part(line: Mapping[str, Any], key: str) -> float:
    """Return the part of a line's completions that a number is about."""
    abnormal = line.get(ABNORMAL)
    if abnormal is None:
        return 1.0
    return {STATED: abnormal, CALLED: 1.0 - abnormal}.get(key, 1.0)


def _error(first: Sequence[_Line], recent: Sequence[_Line], *, prompts: float) -> float:
    """Return the standard error of two windows' difference in a share, were it the same in both.

    It is the greatest possible: all completions of a prompt agree, and other prompts do not.
    """
    share = _mean([*first, *recent])
    return math.sqrt(share * (1 - share) * sum(1 / (_steps(part) * prompts) for part in (first, recent)))


def _steps(lines: Sequence[_Line]) -> float:
    return sum(line.steps for line in lines)


def _mean(lines: Sequence[_Line]) -> float:
    """Return the mean over steps: `logging_first_step` makes a line of one step beside lines of many."""
    return sum(line.value * line.steps for line in lines) / _steps(lines)
