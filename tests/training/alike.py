"""Workers for the tests of `valor.training.launch`: their draws do not depend on how many of them share a batch.

`python -m alike FOLDER` is started by `accelerate launch` in place of `valor.stages.worker`. VALOR_TEST_WORKER says
what it does: `train`, `fail`, `fail-in-step`, `die-in-step`, `wait`, `interrupt` or `all`. Nothing heavy is imported
before that is known.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

STEPS, STOP = 8, 5
"""Three steps are an epoch: the checkpoint of step 5 lies within the second."""


def sft_settings(*, processes: int, nodes: int = 1, strategy: str = "ddp"):
    from valor.recipe import SftSettings

    trainer = {
        "max_steps": STEPS, "learning_rate": 1e-3, "save_steps": 0.5, "logging_steps": 1,
        "per_device_train_batch_size": 4 // (processes * nodes),
        # With a sampler that is not accelerate's own, whose epoch it would lose.
        "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
    return SftSettings(processes=processes, nodes=nodes, strategy=strategy, trainer=trainer)


def grpo_settings(kind: str, *, processes: int):
    """A step has two groups of four in stage 1, in two parts, and one in stage 2, which two processes share.

    The losses are the recipes' and TRL's older one: `dapo` divides by the tokens of all processes and parts.
    """
    from valor.recipe import GrpoTextSettings, GrpoVisionSettings

    parts = {"text": 2, "vision": 1}[kind]
    trainer = {
        "max_steps": 3, "per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": parts,
        "num_generations": 4, "learning_rate": 1e-3, "save_strategy": "no",
        "loss_type": {"text": "dapo", "vision": "grpo"}[kind],
    }  # fmt: skip
    if kind == "text":
        return GrpoTextSettings(processes=processes, max_new_tokens=16, trainer=trainer)
    return GrpoVisionSettings(processes=processes, max_new_tokens=24, trainer=trainer)


def train_grpo(kind: str, *, processes: int, path: Path, world: dict[str, str]) -> None:
    from valor.context import Context
    from valor.stages.grpo_text import grpo_text
    from valor.stages.grpo_vision import grpo_vision

    paths = {"dataset": Path(world["dataset"]), "parent": Path(world["parent"]), "checkpoint": path}
    if kind == "vision":
        paths["expert"] = Path(world["expert"])
    function = {"text": grpo_text, "vision": grpo_vision}[kind]
    function(
        grpo_settings(kind, processes=processes), **paths, context=Context(work_root=str(path.with_suffix(".work")))
    )


def multinomial_by_place(calls: dict[str, int]):
    """Return a stand-in for torch.multinomial: a row's draw follows from its place in the batch of all processes."""
    import torch

    def multinomial(probabilities, num_samples, **_):
        calls["tokens"] += 1
        first = int(os.environ.get("RANK", "0")) * len(probabilities)
        names = [f"{calls['generations']} {calls['tokens']} {first + row}" for row in range(len(probabilities))]
        draws = torch.tensor([[random.Random(name).random()] for name in names], dtype=torch.float64)
        below = (probabilities.double().cumsum(1) < draws * probabilities.double().sum(1, keepdim=True)).sum(1)
        return below.clamp(max=probabilities.shape[1] - 1)[:, None]

    return multinomial


def draw_by_place(set_attribute) -> None:
    """Patch generation with `set_attribute(object, name, value)`."""
    import torch
    from transformers import GenerationMixin

    calls = {"generations": 0, "tokens": 0}
    generate = GenerationMixin.generate

    @functools.wraps(generate)
    def counted(*args, **kwargs):
        calls["generations"] += 1
        calls["tokens"] = 0
        return generate(*args, **kwargs)

    set_attribute(GenerationMixin, "generate", counted)
    set_attribute(torch, "multinomial", multinomial_by_place(calls))


def _interrupt(folder: Path) -> int:
    """Train until the last process alone, at step STOP, sees that the parent was told to end."""
    from valor.stages import worker
    from valor.training import launch

    asked = []

    def is_set(team) -> bool:
        asked.append(time.monotonic())
        if os.environ["RANK"] == "0" or len(asked) < STOP:
            return False
        while not (team.folder / launch.TOLD).exists():
            (team.folder.parent / "at-stop").touch()
            assert time.monotonic() < asked[STOP - 1] + 300
            time.sleep(0.05)
        return True

    launch.Team.is_set = is_set
    return worker.main(folder)


def _fail_in_step(folder: Path) -> int:
    """Train until the last process alone fails in a step in which the others wait for it."""
    from valor.errors import UserError

    def fail():
        raise UserError("process 1: no such study")

    return _train_until(fail, folder)


def _die_in_step(folder: Path) -> int:
    """Train until the last process alone is killed in a step in which the others wait for it."""
    return _train_until(lambda: os.kill(os.getpid(), signal.SIGKILL), folder)


def _train_until(end, folder: Path) -> int:
    from valor.stages import worker
    from valor.training.trainers import ReportSFTTrainer

    training_step = ReportSFTTrainer.training_step

    def step(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and self.state.global_step + 1 == STOP:
            end()
        return training_step(self, *args, **kwargs)

    ReportSFTTrainer.training_step = step
    return worker.main(folder)


def _train(folder: Path) -> int:
    from valor.stages import worker

    return worker.main(folder)


def configured(config: dict, path: Path):
    """Return the arguments and the workers' environment that `accelerate launch` makes of a configuration."""
    import yaml
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path.write_text(yaml.safe_dump(config))
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(path), "--module", "worker", "folder"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        return arguments, prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    return arguments, prepare_deepspeed_cmd_env(arguments)[1]


def _take_cpus_for_gpus() -> None:
    """Let accelerate use FSDP over gloo; by itself it takes FSDP on accelerators only."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plugins = []
    init = AcceleratorState.__init__

    def as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugins.extend([fsdp_plugin] if fsdp_plugin else [])
        if plugins:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

    AcceleratorState.__init__ = as_on_gpus


def _fsdp2(folder: Path, world: dict[str, str]) -> None:
    """Train with FSDP2 up to STOP, and on from its checkpoint; see that it shards the language model, not the tower."""
    from valor.context import Context
    from valor.errors import Interrupted
    from valor.stages.sft import sft
    from valor.training import launch
    from valor.training.memo import is_sharded
    from valor.training.processes import Node, accelerate_config
    from valor.training.trainers import ReportSFTTrainer

    settings = sft_settings(processes=2, strategy="fsdp2")
    config = accelerate_config(settings, node=Node(), zero_path=Path("unused"), cpu=False)
    _, environment = configured(config, folder / f"fsdp2-{os.environ['RANK']}.yaml")
    os.environ.update({name: value for name, value in environment.items() if "FSDP" in name})
    _take_cpus_for_gpus()
    asked, shares = [], []
    launch.Team.is_set = lambda _: asked.append(1) or len(asked) >= STOP
    train = ReportSFTTrainer.train

    def watched(self, *args, **kwargs):
        try:
            return train(self, *args, **kwargs)
        finally:
            shares.append((is_sharded(self.model.model.vision_tower), is_sharded(self.model.model.language_model)))

    ReportSFTTrainer.train = watched
    work, path = str(Path(world["out"], "fsdp2-work")), Path(world["out"], "fsdp2")
    paths = {"dataset": Path(world["dataset"]), "base": Path(world["base"]), "checkpoint": path}
    with launch.joined(folder, {"place": work, "scratch": work, "holder": {}}):
        try:
            sft(settings, **paths, context=Context())
        except Interrupted:
            launch.Team.is_set = lambda _: False
        resumed = sft(settings, **paths, context=Context()).metrics["resumed_from_step"]
    assert (resumed, shares) == (STOP, [(False, True)] * 2), (resumed, shares)


def _all(folder: Path) -> int:
    """Train the task, then in the same processes both GRPO stages, and the task again with FSDP2."""
    from valor.stages import worker
    from valor.training import launch

    code = worker.main(folder)
    draw_by_place(setattr)
    world = json.loads(os.environ["VALOR_TEST_WORLD"])
    for kind in ("text", "vision"):
        work = Path(world["out"], f"{kind}-work")
        with launch.joined(folder, {"place": str(work), "scratch": str(work), "holder": {}}):
            train_grpo(kind, processes=2, path=Path(world["out"], kind), world=world)
    _fsdp2(folder, world)
    return code


def main(folder: Path) -> int:
    mode, rank = os.environ["VALOR_TEST_WORKER"], os.environ["RANK"]
    if mode == "fail" and rank == "1":
        from valor.training.launch import write_verdict

        time.sleep(0.2)
        write_verdict(folder, rank=1, exit_code=2, error="process 1: no such study")
        return 2
    if mode == "fail":
        from valor.training.launch import write_verdict

        write_verdict(folder, rank=0, exit_code=1, error="process 0: RuntimeError, its connection closed")
        time.sleep(600)
    if mode == "wait":
        import threading

        from valor.stages.worker import _end_with_parent

        Path(folder, f"{rank}.pid").write_text(str(os.getpid()))
        threading.Thread(target=_end_with_parent).start()
        time.sleep(600)
    return WORKERS[mode](folder)


WORKERS = {
    "train": _train,
    "fail-in-step": _fail_in_step,
    "die-in-step": _die_in_step,
    "interrupt": _interrupt,
    "all": _all,
}


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    if os.environ["VALOR_TEST_WORKER"] in WORKERS:
        from valor.stages.worker import leave

        leave(code)
    os._exit(code)
