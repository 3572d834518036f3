"""VALOR's few subclasses of TRL's trainers, each for one fault or one idea.

* `_Exact`: a checkpoint holds what trains (`valor.training.trained`), and a resume restores it (transformers loads
  LLaVA's checkpoints with `strict=False`, and their key names match nothing), the order of the data, TRL's step counter
  and the numbers gathered for the next log line; nothing is sent to anybody.
* `ReportSFTTrainer`, `ReportGRPOTrainer`: TRL's trainers with that; SFT's batches may be of similar length, and GRPO's
  loss computes a shared prompt once (`valor.training.prompts`).
* `VisionGRPOTrainer`: stage 2, advantages of its own (`valor.training.advantages`).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from torch.distributed.fsdp import FSDPModule
from trl import GRPOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler

from valor import artifacts
from valor.errors import GuardStop
from valor.rewards.completions import completion_text, were_cut
from valor.rewards.expert import unusable
from valor.training.guards import stated_findings
from valor.training.prompts import by_prompt, can_share, packed_log_probabilities
from valor.training.trained import load_trained, save_trained

_IMAGES = ("pixel_values", "num_images")
_GATHERED = "gathered.json"
"""File in a trainer checkpoint: {number of the log: its values since the last line}."""


class _Exact:
    """Mixed into a trainer: what is needed to continue exactly.

    Attributes:
        parent: digest of the checkpoint artifact that the model was loaded from.
    """

    parent = ""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write what trains, and neither the rest of the model nor the processor: the parent has them."""
        args = self.args  # type: ignore[attr-defined]
        if args.should_save:
            folder = Path(output_dir or args.output_dir)
            save_trained(self.model, folder, parent=self.parent, state=state_dict)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load what `_save` has written: transformers would look for a whole model, and ignore names it lacks."""
        target = model or self.model  # type: ignore[attr-defined]
        if isinstance(target, FSDPModule):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        load_trained(target, Path(resume_from_checkpoint), parent=self.parent)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, beside the rest, what TRL has gathered since its last log line: the guards judge by its averages."""
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            state: Any = self.state  # type: ignore[attr-defined]
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{state.global_step}")  # type: ignore[attr-defined]
            artifacts.write_json(folder / _GATHERED, self._metrics["train"])  # type: ignore[attr-defined]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._metrics["train"].update(artifacts.read_json(Path(checkpoint, _GATHERED)))  # type: ignore[attr-defined]

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would tell its makers about every run."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL would write one at each checkpoint."""


class SimilarLengths(torch.utils.data.Sampler[int]):
    """Batches of similar length in random order: sorted by length within four random batches, then shuffled.

    transformers' own sampler for `train_sampling_strategy: group_by_length` sorts up to a quarter of the data at once,
    from long (findings) to short (none), and draws an epoch's order from the global generator, so a resume would not
    find it again. Here the order is a function of seed and epoch.

    Args:
        lengths: of the N examples, in any unit.
        batch_size: examples of one optimizer step, of all processes together.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int):
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of one epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order, size = torch.randperm(len(self), generator=generator).tolist(), self._batch_size
        whole = len(order) - len(order) % size
        batches: list[list[int]] = []
        for start in range(0, whole, 4 * size):
            similar = sorted(order[start : min(start + 4 * size, whole)], key=self._lengths.__getitem__)
            batches += [similar[i : i + size] for i in range(0, len(similar), size)]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        # What fills no batch is of any length and stays last, or every batch after it would straddle two lengths.
        return iter([index for batch in [*shuffled, order[whole:]] for index in batch])


class ReportSFTTrainer(_Exact, SFTTrainer):
    """Supervised fine-tuning that resumes exactly.

    Args:
        lengths: of the training examples, for `train_sampling_strategy: group_by_length`.
    """

    def __init__(self, *args: Any, lengths: Sequence[int] = (), **kwargs: Any):
        self._lengths = lengths
        super().__init__(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # TRL's own count of tokens for the log, which starts at 0 again; the trainer's state has the same number.
            self._total_train_tokens = int(self.state.num_input_tokens_seen)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        examples = len(self.train_dataset)  # type: ignore[arg-type]
        if len(self._lengths) != examples:
            raise ValueError(f"group_by_length: {len(self._lengths)} lengths for {examples} examples")
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SimilarLengths(self._lengths, batch_size=size, seed=self.args.seed)


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with an order per epoch that does not depend on the epochs drawn before, so a resume finds it."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of one epoch."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class ReportGRPOTrainer(_Exact, GRPOTrainer):
    """GRPO that resumes exactly, computes a shared prompt once, and logs what its guards watch.

    Args:
        references: the reports of all training studies by study_id, for what the guards watch and nothing else: rewards
            see a row's own fields alone.
    """

    def __init__(self, *args: Any, references: Mapping[str, str], **kwargs: Any):
        self._references = references
        super().__init__(*args, **kwargs)
        self._shares = can_share(self.accelerator.unwrap_model(self.model))
        self._regroups = self._shares and not self._looks_at_micro_batches()
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_hide_rows)
        if self.use_vllm:
            forget_images_at_each_sync(self.vllm_generation)

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

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list
    ) -> "torch.Tensor":
        texts = [completion_text(completion) for completion in completions]
        references = [self._references[row["study_id"]] for row in inputs]
        for key, values in stated_findings(texts, references).items():
            for value in values:
                # TRL averages over all that is logged until its next log line, of all processes.
                self._log_metric(key, value)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # Gathered already, so all processes stop. TRL would leave a NaN out of what it logs and of the advantages.
        broken = rewards[~rewards.isfinite()]
        if len(broken):
            raise GuardStop(
                f"step {self.state.global_step + 1}: a reward is {broken[0].item()}; an expert's calibration or its "
                "weights may hold one"
            )
        return rewards

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Sample under the loss's autocast: accelerate puts it around the wrapped model's forward, peft's `generate`
        goes past that, and samples would be those of a numerically other policy. vLLM has a dtype of its own."""
        with contextlib.nullcontext() if self.use_vllm else self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _looks_at_micro_batches(self) -> bool:
        """Tell whether the loss depends on which completions share a micro-batch, as a mean or quantile of its tokens.

        TRL's other losses average a sequence's tokens, or divide by a number of the whole generation.
        """
        args: Any = self.args
        entropy = args.entropy_coef != 0 or args.use_adaptive_entropy or args.top_entropy_quantile < 1
        return args.loss_type == "bnpo" or entropy or self.aux_loss_enabled

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        batches: Any = self._buffered_inputs
        args: Any = self.args
        # Where a generation is used for several optimizer steps, each of them should see all the prompts.
        one_step = args.steps_per_generation == args.gradient_accumulation_steps
        if self._regroups and one_step and batches is not before and inputs.get("pixel_values") is not None:
            batches = by_prompt(batches)
            self._buffered_inputs = batches
            inputs = batches[self._step % args.steps_per_generation]
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: "torch.Tensor",
        attention_mask: "torch.Tensor",
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **inputs: Any,
    ) -> tuple["torch.Tensor", "torch.Tensor | None", "torch.Tensor | None"]:
        pixels, counts = inputs.get("pixel_values"), inputs.get("num_images")
        others = [
            key for key, value in inputs.items() if value is not None and value is not False and key not in _IMAGES
        ]
        whole = batch_size is None or batch_size >= len(input_ids)
        if self._shares and whole and not others and pixels is not None and counts:
            with self.accelerator.autocast():
                found = packed_log_probabilities(
                    model, input_ids, attention_mask, logits_to_keep, pixel_values=pixels, num_images=counts
                )
            if found is not None:
                return *found, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **inputs
        )


class VisionGRPOTrainer(ReportGRPOTrainer):
    """GRPO whose advantages are not TRL's.

    TRL gathers rewards over processes before it normalises them, and so does this: a group may be split over
    processes, and each takes its own slice of the advantages.

    Args:
        normalise: makes (N,) advantages of (N,) rewards, `group_size` and a mask `unusable`, such as `rank_advantages`.
        must_state: whether a completion that states nothing is unusable.
    """

    def __init__(self, *args: Any, normalise: Callable[..., "torch.Tensor"], must_state: bool, **kwargs: Any):
        self._normalise, self._must_state = normalise, must_state
        super().__init__(*args, **kwargs)

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list
    ) -> "torch.Tensor":
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        cut = were_cut(completion_ids_list, count=len(completions), eos_token_ids=self.eos_token_ids)
        texts = [completion_text(completion) for completion in completions]
        local = unusable(texts, cut, must_state=self._must_state)
        last = gather(torch.tensor(local, device=rewards.device))
        total = (rewards * self.reward_weights.to(rewards.device)).sum(dim=1)
        group_size: int = self.num_generations  # type: ignore[assignment]
        self._normalised = self._normalise(total, group_size=group_size, unusable=last)
        metrics = self._metrics["train"]
        metrics["unusable_ratio"].append(last.float().mean().item())
        tied = self._normalised.view(-1, group_size).eq(0).all(dim=1)
        metrics["frac_groups_tied"].append(tied.float().mean().item())
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        output["advantages"] = self._normalised[start : start + len(inputs)].to(output["advantages"].device)
        return output


def forget_images_at_each_sync(generation: Any) -> None:
    """Make TRL's vLLM engine drop its image embeddings whenever it gets new weights.

    It keeps them by image, and TRL drops its text cache alone (trl#7198): the projector, which trains, would go unseen.
    vLLM's own reload of weights calls the same method since vllm#45093.
    """
    sync = generation.sync_weights

    def sync_weights() -> None:
        sync()
        generation.llm.llm_engine.reset_encoder_cache()

    generation.sync_weights = sync_weights


def _hide_rows(record: logging.LogRecord) -> bool:
    """Drop TRL's warning that quotes a whole row, report included, when a completion has no reward."""
    return "All reward functions returned None" not in record.getMessage()
