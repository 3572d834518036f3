"""How much a reward tells the projector: signal and noise of its policy gradient, and where that gradient points.

Every group of completions gives one gradient of the projector. Their mean is the signal, what they scatter around it
the noise; `groups` is how many it takes until the two are equal. The cosine with the gradient that truth itself gives
tells whether a clear signal is one that helps. Products of different groups alone enter, so noise does not pass for
signal (the unbiased U-statistic of the squared mean; Hoeffding 1948).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.experiments.truth import TRUTH, truth_reward
from valor import artifacts

if TYPE_CHECKING:
    import torch

FILE = "signal.json"


def signal(
    *,
    dataset: Path,
    evidence: Path,
    checkpoint: Path,
    expert: Path,
    output: Path,
    groups: int,
    settings: Mapping[str, Any],
) -> Mapping[str, float]:
    """Measure the rewards on groups that `checkpoint` samples and write `signal.json` into `output`.

    Args:
        dataset, evidence: where the studies, their reports and their truth are.
        checkpoint: the policy, as stage 2 would start from it.
        expert: stage 2's expert.
        output: the directory to make.
        groups: how many, at most; whole batches are taken.
        settings: stage 2's section.
    """
    import torch

    from valor.recipe import GrpoVisionSettings

    chosen = GrpoVisionSettings.model_validate(settings)
    torch.manual_seed(chosen.seed)
    trainer, seen, rewards = _trainer(chosen, dataset=dataset, evidence=evidence, checkpoint=checkpoint, expert=expert)
    batches = iter(trainer.get_train_dataloader())
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in rewards}
    size = trainer.num_generations
    while len(gradients[TRUTH]) + len(seen["study_id"]) // size <= groups:
        batch = trainer._generate_and_score_completions(next(batches))
        advantages = {name: reward(seen) for name, reward in rewards.items()}
        for start in range(0, len(seen["study_id"]), size):
            rows = slice(start, start + size)
            jacobian = _of_completions(trainer, batch, rows)
            for name, values in advantages.items():
                gradients[name].append(values[rows] @ jacobian)
    found = summary({name: torch.stack(rows) for name, rows in gradients.items()})
    output.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(output / FILE, found)
    return {f"{name}/{key}": value for name, row in found.items() for key, value in row.items() if value is not None}


def summary(gradients: Mapping[str, "torch.Tensor"]) -> dict[str, dict[str, float | None]]:
    """Return per reward the signal-to-noise ratio of a group, the groups needed, and the cosine with truth's gradient.

    Args:
        gradients: (groups, parameters) by reward, `truth` among them; rows of all are of the same groups.

    Returns:
        `groups` and `cosine` are None where no signal rises above zero.
    """
    truth = gradients[TRUTH]
    truths = _across(truth, truth)
    found: dict[str, dict[str, float | None]] = {}
    for name, rows in gradients.items():
        own, noise = _across(rows, rows), float(rows.pow(2).sum(dim=1).mean())
        sure = own > 0 and truths > 0
        found[name] = {
            "signal_to_noise": own / noise if noise else 0.0,
            "groups": noise / own if own > 0 else None,
            "cosine": _across(rows, truth) / (own * truths) ** 0.5 if sure else None,
        }
    return found


def _across(left: "torch.Tensor", right: "torch.Tensor") -> float:
    """Return the mean product of a row of the one with another row of the other."""
    count = len(left)
    whole = left.sum(dim=0) @ right.sum(dim=0) - (left * right).sum()
    return float(whole) / (count * (count - 1))


def _trainer(
    settings: Any, *, dataset: Path, evidence: Path, checkpoint: Path, expert: Path
) -> tuple[Any, dict[str, Any], Mapping[str, Callable[[dict[str, Any]], "torch.Tensor"]]]:
    """Return stage 2's trainer, what its last completions were, and advantages of them by reward."""
    import tempfile

    import torch

    from valor.models.expert import Expert
    from valor.models.loading import load_policy, prompt_of
    from valor.recipe import TextReward
    from valor.rewards.expert import expert_reward, unusable
    from valor.rewards.text import build
    from valor.training.advantages import rank_advantages
    from valor.training.arguments import VISION_DEFAULTS, grpo_arguments
    from valor.training.course import choose_trained
    from valor.training.memo import TowerMemo
    from valor.training.prompts import SharedPrompts
    from valor.training.rows import grpo_rows, training_studies
    from valor.training.trainers import VisionGRPOTrainer

    model, processor = load_policy(checkpoint)
    choose_trained(model, projector_only=True)
    TowerMemo.attach(model)
    SharedPrompts.attach(model)
    studies = training_studies(dataset, studies=0, seed=settings.seed, share=settings.share)
    references = {study.study_id: study.text for study in studies}
    judge = Expert.load(expert)
    seen: dict[str, Any] = {"study_id": []}

    def watch(completions: Sequence[Any], **rows: Any) -> list[float]:
        seen.update({"completions": list(completions), **rows})
        return [0.0] * len(completions)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = VisionGRPOTrainer(
            model=model,
            reward_funcs=[watch],
            args=grpo_arguments(settings, output_dir=Path(scratch), defaults=VISION_DEFAULTS, reward_weights=[1.0]),
            train_dataset=grpo_rows(studies, processor, prompt=prompt_of(checkpoint), embed=judge.embed_images),
            processing_class=processor,
            normalise=lambda rewards, **_: torch.zeros_like(rewards),
        )
    size = int(trainer.num_generations or 1)
    (clinical,), _ = build([TextReward(name="clinical_agreement_reward")])
    noise = judge.gate["paraphrase_noise"]
    truth = truth_reward(evidence, studies)

    def ranked(reward: Callable[..., list[float]], tolerance: float) -> Callable[[dict[str, Any]], torch.Tensor]:
        def advantages(rows: dict[str, Any]) -> torch.Tensor:
            texts = [one[0]["content"] for one in rows["completions"]]
            last = torch.tensor(unusable(texts, [False] * len(texts)))
            known = {key: value for key, value in rows.items() if key != "completion_ids"}
            values = torch.tensor(reward(reference=[references[s] for s in rows["study_id"]], **known))
            return rank_advantages(values, group_size=size, tolerance=tolerance, unusable=last)

        return advantages

    statements = expert_reward(judge, "statements", odds=settings.odds)
    rewards = {
        TRUTH: ranked(truth, 0.0),
        "clinical agreement": ranked(clinical, 0.0),
        "statements": ranked(statements, noise["statements"] or 0.0),
        "paper": ranked(expert_reward(judge, "paper"), noise["paper"] or 0.0),
    }
    return trainer, seen, rewards


def _of_completions(trainer: Any, batch: Mapping[str, Any], rows: slice) -> "torch.Tensor":
    """Return (completions, parameters): the gradient of each one's log-probability, per token of the longest."""
    import torch

    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)[rows]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)[rows]
    length = batch["completion_ids"].size(1)
    trainer.model.train()
    with torch.enable_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, pixel_values=batch["pixel_values"][rows], num_images=[1] * len(ids)
        )
        totals = (found * batch["completion_mask"][rows]).sum(dim=1) / length
    gradients = [torch.autograd.grad(total, trained, retain_graph=True) for total in totals]
    return torch.stack([torch.cat([part.flatten() for part in one]) for one in gradients]).float()
