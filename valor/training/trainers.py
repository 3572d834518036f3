"""VALOR's few subclasses of TRL's trainers, each for one fault or one idea.

* `_Exact`: a resume restores the weights (transformers loads LLaVA's checkpoints with `strict=False`, and their key
  names match nothing), the order of the data, and TRL's step counter; nothing is sent to anybody.
* `ReportSFTTrainer`, `ReportGRPOTrainer`: TRL's trainers with that.
* `RankGRPOTrainer`: stage 2, advantages from ranks (`valor.training.advantages`).
"""

import logging
from typing import Any

import torch
from accelerate.utils import gather
from trl import GRPOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler

from valor.errors import IntegrityError
from valor.training.advantages import rank_advantages


class _Exact:
    """Mixed into a trainer: what is needed to continue exactly."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a trainer checkpoint's weights through `from_pretrained`, which knows the old key names, strictly."""
        target = model or self.model  # type: ignore[attr-defined]
        saved, info = type(target).from_pretrained(
            resume_from_checkpoint,
            dtype=target.dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            raise IntegrityError(f"{resume_from_checkpoint}: not this model's weights; delete it and run again")
        target.load_state_dict(saved.state_dict(), strict=True)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # type: ignore[attr-defined]

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would tell its makers about every run."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL would write one at each checkpoint."""


class ReportSFTTrainer(_Exact, SFTTrainer):
    """Supervised fine-tuning that resumes exactly."""


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with an order per epoch that does not depend on the epochs drawn before, so a resume finds it."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of one epoch."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class ReportGRPOTrainer(_Exact, GRPOTrainer):
    """GRPO that resumes exactly."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_hide_rows)

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        sampler: Any = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # The counter that says when to generate; TRL starts it at 0 again.
            self._step = self.state.global_step * self.args.gradient_accumulation_steps


class RankGRPOTrainer(ReportGRPOTrainer):
    """GRPO whose advantages are ranks within the group.

    TRL gathers rewards over processes before it normalises them, and so does this: a group may be split over
    processes, and each takes its own slice of the advantages.

    Args:
        tolerance: rewards closer than this share a rank.
    """

    def __init__(self, *args: Any, tolerance: float, **kwargs: Any):
        self._tolerance = tolerance
        super().__init__(*args, **kwargs)

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list
    ) -> "torch.Tensor":
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        local = [
            not _text(completion).strip() or not ids or ids[-1] not in ends
            for completion, ids in zip(completions, completion_ids_list, strict=True)
        ]
        unusable = gather(torch.tensor(local, device=rewards.device)) | rewards.isnan().any(dim=1)
        total = (rewards * self.reward_weights.to(rewards.device)).sum(dim=1)
        training = self.model.training  # type: ignore[union-attr]
        group_size = int(self.num_generations if training else self.num_generations_eval)  # type: ignore[arg-type]
        self._ranked = rank_advantages(total, group_size=group_size, tolerance=self._tolerance, unusable=unusable)
        metrics = self._metrics["train" if training else "eval"]
        metrics["unusable_ratio"].append(unusable.float().mean().item())
        tied = self._ranked.view(-1, group_size).eq(0).all(dim=1)
        metrics["frac_groups_tied"].append(tied.float().mean().item())
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        output["advantages"] = self._ranked[start : start + len(inputs)].to(output["advantages"].device)
        return output


def _text(completion: Any) -> str:
    """Return a completion's text, from a string or a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _hide_rows(record: logging.LogRecord) -> bool:
    """Drop TRL's warning that quotes a whole row, report included, when a completion has no reward."""
    return "All reward functions returned None" not in record.getMessage()
