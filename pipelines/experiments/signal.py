"""How much a reward tells the projector: signal and noise of its policy gradient, and where that gradient points.

Every group of completions gives one gradient of the projector. Their mean is the signal, what they scatter around it
the noise; at a ratio of a thousandth it takes a thousand groups until the two are equal. The cosine with the gradient
that truth itself gives tells whether a clear signal is one that helps. Products of different groups alone enter, so
noise does not pass for signal (the unbiased U-statistic of the squared mean; Hoeffding 1948). A thousand groups may
hold little more than one such number, so each stands with the bounds that groups drawn again give it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.experiments.truth import TRUTH, truth_reward
from valor import artifacts
from valor.errors import UserError

if TYPE_CHECKING:
    import torch

_DRAWS, _CONFIDENCE = 500, 0.9


def signal(
    *,
    dataset: Path,
    evidence: Path,
    checkpoint: Path,
    expert: Path,
    output: Path,
    groups: int,
    clinical: Mapping[str, float],
    settings: Mapping[str, Any],
) -> Mapping[str, float]:
    """Measure the rewards on groups that `checkpoint` samples and write `signal.json` into `output`.

    Args:
        dataset, evidence: where the studies, their reports and their truth are.
        checkpoint: the policy, as stage 2 would start from it.
        expert: stage 2's expert.
        output: the directory to make.
        groups: how many, at most; whole batches are taken.
        clinical: stage 1's options of `clinical_agreement_reward`.
        settings: stage 2's section.

    Raises:
        UserError: the data has fewer studies than groups are asked for.
    """
    import torch

    from valor.recipe import GrpoVisionSettings

    chosen = GrpoVisionSettings.model_validate(settings)
    torch.manual_seed(chosen.seed)
    # Twice the same study would pass what is peculiar to it for signal.
    once = {"num_iterations": 1, "steps_per_generation": chosen.trainer.get("gradient_accumulation_steps", 1)}
    chosen = chosen.model_copy(update={"trainer": {**chosen.trainer, **once}})
    trainer, seen, rewards = _trainer(
        chosen, clinical, dataset=dataset, evidence=evidence, checkpoint=checkpoint, expert=expert
    )
    batches = iter(trainer.get_train_dataloader())
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in rewards}
    size = trainer.num_generations
    if len(trainer.train_dataset) < groups:
        raise UserError(f"signal: asks for {groups} groups, there are {len(trainer.train_dataset)} studies")
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
    artifacts.write_json(output / "signal.json", found)
    return {f"{name}/signal_to_noise": row["signal_to_noise"] for name, row in found.items()}


def summary(gradients: Mapping[str, "torch.Tensor"], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return per reward the signal-to-noise ratio of a group and the cosine with truth's gradient, with bounds.

    Args:
        gradients: (groups, parameters) by reward, `truth` among them; rows of all are of the same groups.
        seed: of the bootstrap over groups.

    Returns:
        By reward `signal_to_noise`, `cosine` (None where no signal rises above zero) and `bounds` of both, (low, high)
        of 90%; those of the cosine are None where a twentieth of the draws has none.
    """
    import numpy as np

    # Products of rows are all that enters, so groups are drawn from tables of them and not from the gradients.
    truth = (gradients[TRUTH] @ gradients[TRUTH].T).numpy()
    rng = np.random.default_rng(seed)
    weights = [np.bincount(rng.integers(0, len(truth), len(truth)), minlength=len(truth)) for _ in range(_DRAWS)]
    found: dict[str, dict[str, Any]] = {}
    for name, rows in gradients.items():
        own, mixed = (rows @ rows.T).numpy(), (rows @ gradients[TRUTH].T).numpy()
        ratio, cosine = _ratio_and_cosine(own, mixed, truth, np.ones(len(truth)))
        drawn = np.array([_ratio_and_cosine(own, mixed, truth, weight) for weight in weights], dtype=float)
        found[name] = {
            "signal_to_noise": ratio,
            "cosine": None if np.isnan(cosine) else cosine,
            "bounds": {"signal_to_noise": _bounds(drawn[:, 0]), "cosine": _bounds(drawn[:, 1])},
        }
    return found


def _ratio_and_cosine(own: Any, mixed: Any, truth: Any, weight: Any) -> tuple[float, float]:
    """Return signal over noise, and the cosine (nan without a signal), of groups that count `weight` times each."""
    noise = float(weight @ own.diagonal()) / float(weight.sum())
    signal, across, truths = (_across(table, weight) for table in (own, mixed, truth))
    cosine = across / (signal * truths) ** 0.5 if signal > 0 and truths > 0 else float("nan")
    return (signal / noise if noise else 0.0), cosine


def _across(products: Any, weight: Any) -> float:
    """Return the mean product of two different groups; a group that was drawn twice is not paired with itself."""
    whole = weight @ products @ weight - (weight**2) @ products.diagonal()
    return float(whole) / float(weight.sum() ** 2 - (weight**2).sum())


def _bounds(values: Any) -> list[float] | None:
    import numpy as np

    defined = values[~np.isnan(values)]
    if len(defined) < 0.95 * len(values):
        return None
    low, high = np.quantile(defined, [0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2])
    return [float(low), float(high)]


def _trainer(
    settings: Any, options: Mapping[str, float], *, dataset: Path, evidence: Path, checkpoint: Path, expert: Path
) -> tuple[Any, dict[str, Any], Mapping[str, Callable[[dict[str, Any]], "torch.Tensor"]]]:
    """Return stage 2's trainer, what its last completions were, and advantages of them by reward."""
    import tempfile

    import torch

    from valor.models.expert import Expert
    from valor.recipe import TextReward
    from valor.rewards.completions import completion_text, were_cut
    from valor.rewards.expert import expert_reward, unusable
    from valor.rewards.text import build
    from valor.stages import grpo_vision
    from valor.training.advantages import rank_advantages
    from valor.training.policy import open_policy

    judge = Expert.load(expert)
    seen: dict[str, Any] = {"study_id": []}

    def watch(completions: Sequence[Any], **rows: Any) -> list[float]:
        seen.update({"completions": list(completions), **rows})
        return [0.0] * len(completions)

    with tempfile.TemporaryDirectory() as scratch:
        policy, _ = open_policy(
            "grpo_vision", settings, dataset=dataset, parent=checkpoint, output_dir=Path(scratch), projector_only=True
        )
        trainer = grpo_vision.trainer(
            policy,
            settings,
            reward=watch,
            normalise=lambda rewards, **_: torch.zeros_like(rewards),
            embed=judge.embed_images,
        )
    references = policy.references
    size = int(trainer.num_generations or 1)
    (clinical,), _ = build([TextReward(name="clinical_agreement_reward", options=dict(options))])
    noise = judge.gate["paraphrase_noise"]
    truth = truth_reward(evidence, policy.studies)

    def ranked(
        reward: Callable[..., list[float]], tolerance: float, *, must_state: bool = False
    ) -> Callable[[dict[str, Any]], torch.Tensor]:
        def advantages(rows: dict[str, Any]) -> torch.Tensor:
            texts = [completion_text(one) for one in rows["completions"]]
            cut = were_cut(rows["completion_ids"], count=len(texts), eos_token_ids=trainer.eos_token_ids)
            last = torch.tensor(unusable(texts, cut, must_state=must_state))
            values = torch.tensor(reward(reference=[references[s] for s in rows["study_id"]], **rows))
            return rank_advantages(values, group_size=size, tolerance=tolerance, unusable=last)

        return advantages

    statements = expert_reward(judge, "statements", odds=settings.odds)
    rewards = {
        TRUTH: ranked(truth, 0.0, must_state=True),
        "clinical agreement": ranked(clinical, 0.0),
        "statements": ranked(statements, noise["statements"] or 0.0, must_state=True),
        "paper": ranked(expert_reward(judge, "paper"), noise["paper"] or 0.0),
    }
    return trainer, seen, rewards


def _of_completions(trainer: Any, batch: Mapping[str, Any], rows: slice) -> "torch.Tensor":
    """Return (completions, parameters): the gradient of each one's log-probability."""
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
        totals = (found * batch["completion_mask"][rows]).sum(dim=1)
    gradients = [torch.autograd.grad(total, trained, retain_graph=True) for total in totals]
    return torch.stack([torch.cat([part.flatten() for part in one]) for one in gradients]).float()
