"""A stage told to end, killed, out of memory or left with a damaged checkpoint: what it leaves, and how it goes on.

Stages run in forks of this process, which has the libraries loaded already, and die all the same.
"""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from killing import committed
from tiny_llava import world

from pipelines.local import child
from valor import artifacts, stages
from valor.context import Context
from valor.errors import ResourceError, ServiceError
from valor.recipe import GrpoTextSettings, GrpoVisionSettings, SftSettings
from valor.training import callbacks
from valor.training.trainers import ReportGRPOTrainer, ReportSFTTrainer

SFT = SftSettings(trainer={"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 1})
GRPO = {
    "max_steps": 6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4,
    "learning_rate": 1e-3, "save_steps": 1,
}  # fmt: skip
STAGES = {
    "sft": (SFT, {"base": "base"}),
    "grpo_text": (GrpoTextSettings(max_new_tokens=16, trainer=GRPO), {"parent": "parent"}),
    "grpo_vision": (
        GrpoVisionSettings(max_new_tokens=24, trainer=GRPO),
        {"parent": "parent", "expert": "expert"},
    ),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    world()
    monkeypatch.setenv("VALOR_TRACKING", "off")
    monkeypatch.setenv("VALOR_RUN_DIR", str(tmp_path))


def run(stage: str, root: Path) -> dict[str, float]:
    settings, inputs = STAGES[stage]
    paths = {name: getattr(world(), kind) for name, kind in inputs.items()}
    result = stages.run(
        stage, settings_json=settings.model_dump_json(), context=Context(work_root=str(root / "work")),
        inputs={"dataset": world().dataset, **paths}, outputs={"checkpoint": root / "checkpoint"},
    )  # fmt: skip
    return dict(result.metrics)


def start(stage: str, root: Path):
    """Start a stage as a process of its own; a ValorError is its exit status, as at the command line."""
    process = multiprocessing.get_context("fork").Process(target=_main, args=(stage, root))
    process.start()
    return process


def _main(stage: str, root: Path) -> None:
    from valor.errors import ValorError

    try:
        run(stage, root)
    except ValorError as error:
        os._exit(error.exit_code)


def slow_from(step: int, seconds: float, monkeypatch) -> None:
    """Make every training step from `step` on take so long."""
    for trainer in (ReportSFTTrainer, ReportGRPOTrainer):
        monkeypatch.setattr(trainer, "training_step", _slowed(trainer.training_step, step, seconds))


def _slowed(training_step, step: int, seconds: float):
    def slow(self, *args, **kwargs):
        if self.state.global_step + 1 >= step:
            time.sleep(seconds)
        return training_step(self, *args, **kwargs)

    return slow


def told_to_end(root: Path, stage: str = "sft") -> tuple[int, float]:
    """Send SIGTERM to a stage that has saved twice; return exit status and the seconds until it left."""
    process = start(stage, root)
    while not [step for step in committed(root / "work") if step >= 2]:
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    begun = time.monotonic()
    process.join(60)
    return process.exitcode, time.monotonic() - begun


def failures(root: Path) -> list[dict]:
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "fail"]


@pytest.mark.parametrize("stage", ["sft", "grpo_text", "grpo_vision"])
def test_told_to_end_it_finishes_the_step_saves_and_leaves(tmp_path, monkeypatch, stage):
    with monkeypatch.context() as patch:
        slow_from(3, 0.5, patch)
        status, seconds = told_to_end(tmp_path, stage)
    assert status == 143
    assert seconds < 25
    assert max(committed(tmp_path / "work")) == 3
    assert "told to end at step 3 of " in failures(tmp_path)[0]["error"]
    assert run(stage, tmp_path)["resumed_from_step"] == 3


def test_a_spot_reclaims_25_seconds_and_a_local_run_leave_time_to_go():
    assert callbacks.GRACE_S <= 20
    assert child.GRACE_S > callbacks.GRACE_S


def test_told_to_end_in_a_step_that_takes_too_long_it_leaves_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "GRACE_S", 0.5)
    with monkeypatch.context() as patch:
        slow_from(3, 60, patch)
        status, seconds = told_to_end(tmp_path)
    assert status == 143
    assert 0.4 < seconds < 20
    assert "the step took longer than 0.5 s; run again" in failures(tmp_path)[0]["error"]
    assert max(committed(tmp_path / "work")) == 2
    assert run("sft", tmp_path)["resumed_from_step"] == 2


def test_the_signal_is_handled_as_before_once_the_stage_is_over(monkeypatch):
    monkeypatch.setattr(callbacks, "GRACE_S", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    with callbacks.sigterm() as told:
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    time.sleep(0.4)  # The timer would have ended this process by now.


@pytest.mark.parametrize("saves", [{"save_steps": 1}, {"save_strategy": "no"}])
def test_what_lost_its_lease_writes_over_nothing_of_who_took_over(tmp_path, monkeypatch, saves):
    other = {"host": "elsewhere", "pid": 1, "start": 0.0, "renewed": time.time()}
    training_step = ReportSFTTrainer.training_step

    def taken_over(self, *args, **kwargs):
        if self.state.global_step == 2:
            (lease,) = (tmp_path / "work").glob("*/lease/lease.json")
            lease.write_text(json.dumps(other))
            theirs = lease.parents[1] / "checkpoint-3" / "trained.safetensors"
            theirs.parent.mkdir()
            theirs.write_text("theirs")
            (tmp_path / "checkpoint").mkdir()
            (tmp_path / "checkpoint" / "model.safetensors").write_text("theirs")
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(ReportSFTTrainer, "training_step", taken_over)
    settings = SFT.model_copy(update={"trainer": {**SFT.trainer, **saves}})
    monkeypatch.setitem(STAGES, "sft", (settings, {"base": "base"}))
    with pytest.raises(ServiceError, match="another process took over"):
        run("sft", tmp_path)
    (saved,) = (tmp_path / "work").glob("*/checkpoint-3")
    assert [path.name for path in saved.iterdir()] == ["trained.safetensors"]
    kept = saved / "trained.safetensors", tmp_path / "checkpoint" / "model.safetensors"
    assert [path.read_text() for path in kept] == ["theirs"] * 2


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_newest_checkpoint_costs_a_step_and_changes_nothing(tmp_path, damage, monkeypatch):
    with monkeypatch.context() as patch:
        slow_from(5, 60, patch)
        process = start("sft", tmp_path)
        while 4 not in committed(tmp_path / "work"):
            time.sleep(0.01)
        process.kill()
        process.join()
    (weights,) = (tmp_path / "work").glob("*/checkpoint-4/trained.safetensors")
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        del content[-1:]
    else:
        content[-1] ^= 1
    weights.write_bytes(content)
    assert run("sft", tmp_path)["resumed_from_step"] == 3
    run("sft", tmp_path / "undisturbed")
    assert digest(tmp_path) == digest(tmp_path / "undisturbed")


def digest(root: Path) -> str:
    """Return the sha256 over the artifact's content, weights included, once they are found to be what it says."""
    artifacts.load_checkpoint_info(root / "checkpoint")
    return artifacts.digest_dir(root / "checkpoint")


def _too_large_for_the_host():
    return torch.empty(1 << 60, dtype=torch.uint8)


def _too_large_for_python():
    return bytearray(1 << 62)


def _too_large_for_the_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _too_large_for_what_others_leave_of_the_device():
    # What an allocation outside of torch's own pool meets, such as the device's context.
    raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")


def _no_room_for_a_process():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def _no_room_for_a_library():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "allocate",
    [
        _too_large_for_the_host, _too_large_for_python, _too_large_for_the_device,
        _too_large_for_what_others_leave_of_the_device, _no_room_for_a_process, _no_room_for_a_library,
    ],
)  # fmt: skip
def test_out_of_memory_is_one_line_that_names_the_settings(tmp_path, monkeypatch, allocate):
    monkeypatch.setattr(ReportSFTTrainer, "training_step", lambda *_, **__: allocate())
    with pytest.raises(ResourceError, match=r"^sft: out of memory; lower sft\.trainer\.per_device") as caught:
        run("sft", tmp_path)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(", or set trainer.activation_checkpointing: true, dtype: bfloat16, lora: {}")


def _shapes_that_do_not_fit():
    return torch.ones(2) @ torch.ones(3)


def _never_written():
    raise NotImplementedError("a kind of RuntimeError: no such kernel size")


def _a_broken_device():
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered; check its size")


@pytest.mark.parametrize("fault", [_shapes_that_do_not_fit, _never_written, _a_broken_device])
def test_another_fault_of_the_runtime_is_not_called_out_of_memory(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(ReportSFTTrainer, "training_step", lambda *_, **__: fault())
    with pytest.raises(RuntimeError, match="size"):
        run("sft", tmp_path)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    dice = random.Random(20)
    kills = 0
    for stage, wanted in (("sft", 6), ("grpo_text", 13), ("grpo_vision", 20)):
        begun = time.monotonic()
        assert ended(start(stage, tmp_path / stage), within=120) == 0
        seconds, expected = time.monotonic() - begun, digest(tmp_path / stage)
        root, done = tmp_path / stage / "1", False
        while kills < wanted or not done:
            status = ended(start(stage, root), within=dice.uniform(0, seconds) if kills < wanted else 120)
            kills += status == -signal.SIGKILL
            done = status == 0
            if done:
                assert digest(root) == expected
                # It had time to finish before it could be killed: the next kills are of a new try.
                root = root.with_name(f"{root.name}1")
            else:
                assert status == -signal.SIGKILL
    assert kills == 20


def ended(process, *, within: float) -> int:
    """Return a process's exit status; one that has not ended within so many seconds is killed."""
    process.join(within)
    process.kill()
    process.join()
    return process.exitcode
