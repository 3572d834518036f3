"""Truth as a reward: what no expert could see, to tell whether stage 2 is held back by its expert or by anything else.

Only experiments have it. A study's reward is its findings named rightly less those named wrongly, as the scores count
them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TRUTH = "truth"


def truth_reward(evidence: Path, studies: Sequence[Any]) -> Callable[..., list[float]]:
    """Return a reward in TRL's signature for rows that carry a `study_id` of these studies."""
    from valor.evaluation.inputs import read_truth
    from valor.evaluation.scores import clinical_counts, expected_of_truth, read_report
    from valor.rewards.completions import completion_text

    truth = read_truth(evidence, [study.study_id for study in studies])
    assert truth is not None

    def reward(completions: Sequence[Any], study_id: Sequence[str], **_: Any) -> list[float]:
        found = []
        for completion, study in zip(completions, study_id, strict=True):
            counts = clinical_counts(read_report(completion_text(completion)), expected_of_truth(truth, study))
            found.append(
                sum(v for k, v in counts.items() if k.startswith("tp/"))
                - sum(v for k, v in counts.items() if k.startswith("fp/"))
            )
        return found

    reward.__name__ = "truth_reward"
    return reward


def train_on_truth(
    *,
    dataset: Path,
    evidence: Path,
    parent: Path,
    checkpoint: Path,
    settings: Mapping[str, Any],
    work_root: str,
) -> Mapping[str, float]:
    """Run stage 2 as the recipe does, but for its reward; write `checkpoint`."""
    import functools

    from valor import artifacts
    from valor.context import Context
    from valor.recipe import GrpoVisionSettings
    from valor.stages.grpo_vision import trainer
    from valor.training.advantages import rank_advantages
    from valor.training.course import train
    from valor.training.policy import Policy

    chosen = GrpoVisionSettings.model_validate(settings)

    def build(policy: Policy) -> Any:
        reward = truth_reward(evidence, policy.studies)
        return trainer(policy, chosen, reward=reward, normalise=functools.partial(rank_advantages, tolerance=0.0))

    metrics, cleanup = train(
        "grpo_vision", chosen, dataset=dataset, parents={"parent": parent, "evidence": evidence}, checkpoint=checkpoint,
        context=Context(task="truth", work_root=work_root), projector_only=True, build=build,
    )  # fmt: skip
    artifacts.stamp(checkpoint, kind="checkpoint", stage="truth")
    cleanup()
    return metrics
