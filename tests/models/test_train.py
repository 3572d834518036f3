import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from valor import artifacts
from valor.errors import IntegrityError, Interrupted, ResourceError
from valor.interruption import sigterm_interrupts
from valor.models import train, train_expert
from valor.recipe import ModelSettings, PhantomExpert, builtin_names, load


def _settings(**expert):
    small = {"image_px": 24, "patch_px": 12, "vision_width": 32, "vision_layers": 1, "text_width": 32, "text_layers": 1}
    return {"phantom_expert": {**small, "vocab": 300, **expert}}


def test_a_childs_user_error_comes_through_with_its_exit_code(tmp_path):
    jobs = {"expert": (_settings(subjects=70_000, steps=2), tmp_path / "expert")}
    with pytest.raises(train.ValorError) as error:
        train.train_phantoms(jobs, work=tmp_path, done=lambda kind: None)
    assert error.value.exit_code == 2
    assert "70000" in str(error.value)
    assert not (tmp_path / "expert").exists()


def test_a_judge_shares_neither_subjects_nor_weights_with_the_expert(tmp_path, monkeypatch):
    """Its score of reports that an expert rewarded would be circular otherwise."""
    small = {**_settings()["phantom_expert"], "subjects": 8, "steps": 2, "held_out_subjects": 8}
    settings = ModelSettings(phantom_expert=PhantomExpert(**small), phantom_judge=PhantomExpert(**small, seed=9001))
    subjects, weights = [], []
    real_draw, real_build = train_expert.draw, train_expert.build_clip

    def draw(seed, *args, **kwargs):
        subjects.append(seed)
        return real_draw(seed, *args, **kwargs)

    def build_clip(*args, seed):
        weights.append(seed)
        return real_build(*args, seed=seed)

    monkeypatch.setattr(train_expert, "draw", draw)
    monkeypatch.setattr(train_expert, "build_clip", build_clip)
    for kind in ("expert", "judge"):
        train_expert.train_expert(train.settings_of(kind, settings), path=tmp_path / kind)
    held_out = train_expert._HELD_OUT_SEED
    assert subjects == [8001, 8001 + held_out, 9001, 9001 + held_out]
    assert len(weights) == len(set(weights)) == 2
    name = "vision_model.embeddings.patch_embedding.weight"
    first, second = (load_file(tmp_path / kind / "model.safetensors")[name] for kind in ("expert", "judge"))
    assert not first.equal(second)


@pytest.mark.parametrize("name", builtin_names())
def test_a_built_in_recipes_models_and_data_are_of_different_subjects(name):
    recipe = load(name)
    models, held_out = recipe.models, train_expert._HELD_OUT_SEED
    seeds = {
        "base": models.phantom_base.seed,
        "expert": models.phantom_expert.seed,
        "expert, held out": models.phantom_expert.seed + held_out,
        "judge": models.phantom_judge.seed,
        "judge, held out": models.phantom_judge.seed + held_out,
        "data": recipe.data.phantom.seed,
    }
    assert len(set(seeds.values())) == len(seeds), seeds
    assert train.settings_of("judge", models).phantom_expert == models.phantom_judge
    assert train.settings_of("judge", models).seed != models.seed


def test_exit_statuses_become_errors(tmp_path):
    train._check("base", 0, tmp_path)
    with pytest.raises(ResourceError, match="killed by signal 9"):
        train._check("base", -9, tmp_path)
    (tmp_path / "base.job.error").write_text("x: altered", encoding="utf-8")
    with pytest.raises(IntegrityError, match="x: altered"):
        train._check("base", 7, tmp_path)


PARENT = """
import json, sys
from pathlib import Path
from valor.errors import ValorError
from valor.models.train import train_phantoms
work, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
try:
    train_phantoms({kind: (settings, work / kind) for kind in ("base", "expert")}, work=work, done=print)
except ValorError as error:
    sys.exit(error.exit_code)
"""


def _alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _trainers(parent: int) -> list[int]:
    """Return the children of a process that train, and have come as far as loading torch."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):
            command, maps = (Path(f"/proc/{pid}/{name}").read_text() for name in ("cmdline", "maps"))
            if "valor.models.train" in command and "libtorch_cpu" in maps:
                found.append(int(pid))
    return found


def _wait_until(condition, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the children through /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_children_end_with_their_parent(tmp_path, number, code):
    settings = artifacts.canonical_json(_settings(subjects=100_000) | {"phantom_base": {"subjects": 100_000}})
    work, log = tmp_path / "work", tmp_path / "log"
    work.mkdir()
    with log.open("w") as output:
        parent = subprocess.Popen([sys.executable, "-c", PARENT, str(work), settings], stdout=output, stderr=output)
    # Both have loaded torch, so they are past their start: what they do next would take many minutes.
    _wait_until(lambda: len(_trainers(parent.pid)) == 2)
    children = _trainers(parent.pid)
    assert all(_alive(pid) for pid in children), log.read_text()
    parent.send_signal(number)
    assert parent.wait(30) == code
    _wait_until(lambda: not any(_alive(pid) for pid in children))
    if number == signal.SIGTERM:
        assert list(work.iterdir()) == []


def test_a_job_of_a_parent_that_is_gone_ends_at_once_and_one_of_this_process_is_trained(tmp_path):
    settings = {"phantom_base": {**_settings()["phantom_expert"], "subjects": 8, "tower_steps": 1, "language_steps": 1}}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    job = {"kind": "base", "settings": settings, "path": str(tmp_path / "orphan"), "leads": False, "parent": gone.pid}
    artifacts.write_json(tmp_path / "job.json", job)
    orphan = subprocess.run([sys.executable, "-m", "valor.models.train", str(tmp_path / "job.json")])
    assert orphan.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
    finished = []
    work = tmp_path / "work"
    work.mkdir()
    train.train_phantoms({"base": (settings, tmp_path / "base")}, work=work, done=finished.append)
    assert finished == ["base"]
    artifacts.load_checkpoint_info(tmp_path / "base")
    assert not any(work.iterdir())


def test_sigterm_interrupts_while_training_and_is_handled_as_before_afterwards(tmp_path):
    def as_before(*_: object) -> None: ...

    saved = signal.signal(signal.SIGTERM, as_before)
    try:
        with pytest.raises(Interrupted), sigterm_interrupts("told"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is as_before
        # Only the main thread may listen; another trains all the same.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(train.train_phantoms, {}, work=tmp_path, done=print).result()
        assert signal.getsignal(signal.SIGTERM) is as_before
    finally:
        signal.signal(signal.SIGTERM, saved)
