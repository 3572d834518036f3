"""One lane of a race: a process that trains one variant, an optimizer step at a time, when it is told to.

`race.py` is the other end. A lane takes its work as JSON, answers with JSON lines, and waits for a line on its standard
input before each step, so that the variants of a comparison take turns on the machine: what slows it slows them all.

Variants: `stock`, TRL as its documentation shows it; `valor`, as valor/training/course.py puts a stage together;
`stock_floor` and `floor`, either one with the vision features given: no image is touched and no tower runs.
"""

import dataclasses
import functools
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from typing import Any

PROMPT = "Describe the findings and impression."
SEED = 17
LOGGED = ("loss", "grad_norm", "entropy", "reward")
"""What must agree between variants, step by step."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a lane does.

    Attributes:
        variant: `stock`, `valor`, `stock_floor` or `floor`.
        architecture: of `architectures.ARCHITECTURES`.
        source_px: side of the source images, 8-bit grayscale PNG.
        generations: completions per prompt (G), a micro-batch.
        prompts: prompts per optimizer step.
        tokens: length of every completion.
        steps: optimizer steps; each takes prompts that no step had before.
        checkpointing: compute activations again in the backward pass (TRL's default).
        projector_only: train the projector alone, as stage 2 does.
        device: `cpu` or `cuda`.
        dtype: `float32`, or `bfloat16` for autocast.
        reward: `variety` (next to free), or `text`, `statements` or `paper` (the real ones, on phantom reports).
    """

    variant: str
    architecture: str = "small"
    source_px: int = 224
    generations: int = 8
    prompts: int = 1
    tokens: int = 64
    steps: int = 6
    checkpointing: bool = True
    projector_only: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    reward: str = "variety"

    @property
    def images(self) -> int:
        """How many images the whole lane sees."""
        return self.steps * self.prompts


def reports_only(count: int) -> list[tuple[str, str]]:
    """Return phantom reports as (findings, impression), without drawing their images."""
    import numpy as np

    from valor.data.phantom.disease import draw_findings
    from valor.data.phantom.report import write_report
    from valor.recipe import ReportNoise

    rng = np.random.default_rng(SEED)
    return [write_report(draw_findings(rng), ReportNoise(), rng, held_out_wording=False) for _ in range(count)]


@functools.cache
def phantoms(count: int) -> tuple[list[Any], list[tuple[str, str]]]:
    """Return phantom X-rays, (H, W) uint8, and their reports as (findings, impression)."""
    from valor.data.phantom import samples
    from valor.recipe import PhantomStudies

    drawn = list(samples(PhantomStudies(seed=SEED, train=count, val=0, test=0, image_px=128), "train"))
    return [image for image, _, _ in drawn], [(findings, impression) for _, findings, impression in drawn]


def sources(work: Work) -> list[bytes]:
    """Return one PNG per prompt: a phantom at the source's size with a detector's noise, which PNG cannot squeeze."""
    import numpy as np
    from PIL import Image

    from valor.data.manifest import encode_image

    rng = np.random.default_rng(SEED)
    size = (work.source_px, work.source_px)
    pngs = []
    for image in phantoms(work.images)[0]:
        large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float32)
        noise = rng.standard_normal(size, np.float32) * 2
        pngs.append(encode_image((large + noise).clip(0, 255).astype(np.uint8)))
    return pngs


def studies(work: Work) -> list[Any]:
    """Return the sources as a dataset's studies."""
    from valor.data.manifest import Study, StudyImage

    reports = phantoms(work.images)[1]
    return [
        Study(
            study_id=f"s{i:04d}", subject_id=f"p{i:04d}", images=(StudyImage(png, f"{i}.png", str(i), "PA", "{}"),),
            findings=findings, impression=impression, indication=None, comparison=None, sex=None, age_band=None,
            device=None, split="train", source_digest="",
        )
        for i, (png, (findings, impression)) in enumerate(zip(sources(work), reports, strict=True))
    ]  # fmt: skip


def real_reward(work: Work, kind: str, spent: list[float], embedded: list[float]) -> tuple[Any, Any]:
    """Return a real reward on phantom reports in place of the model's noise, and the expert's image embedding or None.

    Args:
        work: the lane's work.
        kind: `text` (the recipe's default rewards), or a similarity of a CLIP ViT-B/16 with random weights.
        spent: gets the CPU seconds of every call of the reward.
        embedded: gets the CPU seconds of every image's embedding.
    """
    from valor.recipe import GrpoTextSettings

    reports = [f"FINDINGS: {findings} IMPRESSION: {impression}" for findings, impression in reports_only(512)]
    embed = None
    if kind == "text":
        from valor.rewards.text import build

        functions, weights = build(GrpoTextSettings().rewards)

        def score(texts: list[str], **row: Any) -> list[float]:
            each = [function(texts, row["reference"]) for function in functions]
            return [sum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*each, strict=True)]
    else:
        from architectures import expert

        from valor.rewards.expert import expert_reward

        judge = expert(work.architecture, reports)
        judged = expert_reward(judge, kind)

        def embed(images: list[Any]) -> Any:
            start = time.process_time()
            found = judge.embed_images(images)
            embedded.extend([(time.process_time() - start) / len(images)] * len(images))
            return found

        def score(texts: list[str], **row: Any) -> list[float]:
            return judged(texts, row["image_embed"])

    given = iter(reports * 100)

    def reward(completions: list[Any], **row: Any) -> list[float]:
        texts = [next(given) for _ in completions]
        start = time.process_time()
        scores = score(texts, **row)
        spent.append(time.process_time() - start)
        return scores

    return reward, embed


def variety(completions: list[Any], **_: Any) -> list[float]:
    """Return the share of distinct characters: a reward that costs nothing and tells random completions apart."""
    texts = [completion[0]["content"] for completion in completions]
    return [len(set(text)) / max(len(text), 1) for text in texts]


def arguments(work: Work, folder: str) -> Any:
    """Return the trainer's arguments, the same for every variant."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        num_generations=work.generations,
        per_device_train_batch_size=work.generations,
        gradient_accumulation_steps=work.prompts,
        max_completion_length=work.tokens,
        max_steps=work.steps,
        gradient_checkpointing=work.checkpointing,
        generation_kwargs={"min_new_tokens": work.tokens},
        loss_type="grpo",
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        beta=0.0,
        bf16=work.dtype == "bfloat16",
        use_cpu=work.device == "cpu",
        optim="adamw_torch",
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        seed=SEED,
        dataloader_pin_memory=False,
    )


def stock(work: Work, model: Any, processor: Any, reward: Any, embed: Any) -> tuple[Any, dict[str, Any]]:
    """Return TRL's own trainer's class and its data: an image column, as in TRL's documentation."""
    from datasets import Dataset, Image
    from trl import GRPOTrainer

    rows = {
        "prompt": [[{"role": "user", "content": PROMPT}]] * work.images,
        "image": [{"bytes": png, "path": None} for png in sources(work)],
    }
    return GRPOTrainer, {"train_dataset": Dataset.from_dict(rows).cast_column("image", Image())}


def valor(work: Work, model: Any, processor: Any, reward: Any, embed: Any) -> tuple[Any, dict[str, Any]]:
    """Return VALOR's trainer's class and its data, with what spares work attached."""
    from valor.training.memo import TowerMemo
    from valor.training.prompts import SharedPrompts
    from valor.training.rows import grpo_rows
    from valor.training.trainers import ReportGRPOTrainer

    TowerMemo.attach(model)
    SharedPrompts.attach(model)
    given = studies(work)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = grpo_rows(given, processor, prompt=PROMPT, embed=embed)
    spent = {"rows_wall": time.perf_counter() - wall, "rows_cpu": time.process_time() - cpu}
    return ReportGRPOTrainer, {"train_dataset": rows, "references": references(given), **spent}


def stock_floor(work: Work, model: Any, processor: Any, reward: Any, embed: Any) -> tuple[Any, dict[str, Any]]:
    """Return TRL's own trainer with the features given."""
    from trl import GRPOTrainer

    return GRPOTrainer, {"train_dataset": features_given(work, model, processor)}


def floor(work: Work, model: Any, processor: Any, reward: Any, embed: Any) -> tuple[Any, dict[str, Any]]:
    """Return VALOR's trainer with the features given."""
    from valor.training.prompts import SharedPrompts
    from valor.training.trainers import ReportGRPOTrainer

    SharedPrompts.attach(model)
    rows = features_given(work, model, processor)
    return ReportGRPOTrainer, {"train_dataset": rows, "references": references(studies(work))}


def references(given: Any) -> dict[str, str]:
    """Return the studies' reports by id, which the guards compare with."""
    return {study.study_id: study.text for study in given}


def features_given(work: Work, model: Any, processor: Any) -> Any:
    """Compute every image's features now, let the model look them up, and return rows whose image is a number."""
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from valor.models.loading import messages, model_pixels
    from valor.training.memo import TowerMemo

    run_tower = TowerMemo(model)._run_tower
    features, given = [], studies(work)
    for study in given:
        pixels = processor.image_processor(images=model_pixels(study, processor), return_tensors="pt")["pixel_values"]
        with torch.autocast(work.device, torch.bfloat16, enabled=work.dtype == "bfloat16"):
            features.append(run_tower(pixels.to(work.device), {}))
    shape = pixels.shape[1:]

    class Numbers(type(processor.image_processor)):
        """An image processor whose pixels are the image's number."""

        def __call__(self, images: Any, **_: Any) -> dict[str, Any]:
            flat = [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]
            numbers = torch.tensor([image.getpixel((0, 0)) for image in flat], dtype=torch.float32)
            return {"pixel_values": numbers.view(-1, 1, 1, 1).expand(-1, *shape)}

    def get_image_features(pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        numbers = pixel_values[:, 0, 0, 0].long().tolist()
        unique = sorted(set(numbers))
        projected = model.model.multi_modal_projector(torch.cat([features[i] for i in unique]))
        return BaseModelOutputWithPooling(pooler_output=[projected[unique.index(i)] for i in numbers])

    model.model.get_image_features = functools.wraps(model.model.get_image_features)(get_image_features)
    processor.image_processor.__class__ = Numbers

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {
            "prompt": [messages(PROMPT) for _ in batch["row"]],
            "image": [Image.new("L", (1, 1), color=i) for i in batch["row"]],
            "study_id": [given[i].study_id for i in batch["row"]],
        }

    return Dataset.from_dict({"row": list(range(work.images))}).with_transform(rows)


VARIANTS = {"stock": stock, "valor": valor, "stock_floor": stock_floor, "floor": floor}


class Turns:
    """The lane's end of the race: says what a step took, and waits for its next turn."""

    def __init__(self, out: Any, turn: Any):
        self._out, self._turn = out, turn
        self._wall = self._cpu = 0.0

    def say(self, **event: Any) -> None:
        """Write one event."""
        print(json.dumps(event), file=self._out, flush=True)

    def wait(self) -> None:
        """Wait for the turn; the other end closing the pipe ends the lane."""
        if not self._turn.readline():
            sys.exit(0)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def callback(self, device: str) -> Any:
        """Return the trainer's callback that ends a turn with each optimizer step."""
        from transformers import TrainerCallback

        turns = self

        class EndOfStep(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if device == "cuda":
                    import torch

                    torch.cuda.synchronize()
                wall, cpu = time.perf_counter() - turns._wall, time.process_time() - turns._cpu
                # A process has its core to itself by CPU time, whoever else runs; an accelerator is timed by the clock.
                turns.say(event="step", seconds=wall if device == "cuda" else cpu, wall=wall)
                turns.wait()

        return EndOfStep()


def peak_mb(device: str) -> float:
    """Return the most memory that this process has held, in MB: of the device, on a CPU of the process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(work: Work, turns: Turns, profile: str = "") -> None:
    """Build the variant and train it in turns; with `profile`, write what cProfile saw to that path."""
    import cProfile

    import torch
    from architectures import build
    from transformers import PrinterCallback, set_seed

    from valor.training.frozen import can_hold, hold_in_bfloat16
    from valor.training.parts import choose_trained

    warnings.filterwarnings("ignore")
    reports = [f"FINDINGS: {findings} IMPRESSION: {impression}" for findings, impression in reports_only(256)]
    model, processor = build(work.architecture, [*reports, PROMPT], device=work.device)
    choose_trained(model, projector_only=work.projector_only)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    counts = {"trained": sum(n for n, trains in sizes if trains), "total": sum(n for n, _ in sizes)}
    model_mb = peak_mb(work.device)
    spent: list[float] = []
    embedded: list[float] = []
    reward, embed = variety, None
    if work.reward != "variety":
        reward, embed = real_reward(work, work.reward, spent, embedded)
    with tempfile.TemporaryDirectory(prefix="valor-bench-") as folder:
        trainer_class, data = VARIANTS[work.variant](work, model, processor, reward, embed)
        rows = {key: data.pop(key, 0.0) for key in ("rows_wall", "rows_cpu")}
        trainer = trainer_class(
            model=model, reward_funcs=[reward], args=arguments(work, folder), processing_class=processor, **data
        )
        if not work.variant.startswith("stock") and can_hold(trainer.args, strategy="ddp"):
            hold_in_bfloat16(trainer.model)
        if work.device == "cuda":
            # Until here the model was built in float32, whatever it is held in.
            torch.cuda.reset_peak_memory_stats()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(turns.callback(work.device))
        set_seed(SEED)
        turns.say(event="ready", **rows, threads=torch.get_num_threads(), **counts)
        turns.wait()
        profiler = cProfile.Profile()
        if profile:
            profiler.enable()
        trainer.train()
        if profile:
            profiler.disable()
            profiler.dump_stats(profile)
        history = [{key: line[key] for key in LOGGED} for line in trainer.state.log_history if "loss" in line]
        turns.say(
            event="end", history=history, peak_mb=peak_mb(work.device), model_mb=model_mb,
            reward_cpu=sum(spent), embedding_cpu=sum(embedded), images_embedded=len(embedded),
        )  # fmt: skip


def main() -> None:
    """Run the work given as JSON; a second argument is a path for a profile."""
    # What libraries print must not mix with the events.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run(Work(**json.loads(sys.argv[1])), Turns(out, sys.stdin), *sys.argv[2:])


if __name__ == "__main__":
    main()
