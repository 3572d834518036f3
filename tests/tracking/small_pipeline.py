"""A pipeline run through `valor.stages.run` whose costly stages write a few bytes; register and finalize are real."""

import json
import socket
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from valor import artifacts, recipe, stages
from valor.context import Context
from valor.stages import StageResult

OUTPUTS = {
    "preflight": (),
    "ingest": ("output",),
    "validate_data": ("dataset", "evidence", "data_docs"),
    "fetch_models": ("base", "expert", "judge"),
    "sft": ("checkpoint",),
    "grpo_text": ("checkpoint",),
    "predict": ("predictions",),
    "evaluate": ("evaluation",),
    "gate": ("verdict",),
    "register": ("registration",),
    "finalize": ("summary",),
}


class SmallPipeline:
    """Runs tasks of one pipeline run under `root`."""

    def __init__(self, root: Path, run: str, monkeypatch: Any, *, seed: int = 0):
        self.root, self.run, self.seed = root, run, seed
        self.model_name = "m-" + run.split("+")[0]
        for stage in set(OUTPUTS) - {"register", "finalize"}:
            module = types.ModuleType(f"valor.stages.{stage}")
            setattr(module, stage, _cheap(stage))
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def task(
        self, stage: str, task: str = "", *, values: dict[str, str] | None = None, **inputs: Any
    ) -> dict[str, Path]:
        task = task or stage
        outputs = {name: self.root / self.run / task / name for name in OUTPUTS[stage]}
        for path in outputs.values():
            path.mkdir(parents=True)
        section = recipe.SECTION_OF_STAGE[stage]
        settings = json.loads(recipe.Recipe(name="small", seed=self.seed).section_json(section))
        if "seed" in settings:
            settings["seed"] = self.seed
        if stage in ("register", "finalize"):
            settings["model_name"] = self.model_name
        self.result = stages.run(
            stage,
            settings_json=json.dumps(settings),
            context=Context(pipeline_run=self.run, task=task, models_root=str(self.root / "models")),
            inputs=inputs,
            outputs=outputs,
            values=values,
        )
        return outputs

    def until_checkpoint(self) -> dict[str, Path]:
        """Run preflight to grpo_text; return their artifacts."""
        self.task("preflight", values={"root": "/data", "annotations_root": "", "model_name": self.model_name})
        shards = [self.task("ingest", f"ingest-{i}", values={"shard": f'{{"index":{i}}}'})["output"] for i in range(2)]
        made = self.task("validate_data", shards=shards) | self.task("fetch_models")
        sft = self.task("sft", dataset=made["dataset"], base=made["base"])["checkpoint"]
        text = self.task("grpo_text", dataset=made["dataset"], parent=sft)["checkpoint"]
        return made | {"shards": shards, "sft": sft, "checkpoint": text}

    def judged(self, made: dict[str, Path], *, verdict: str = "pass", champion: str = "") -> dict[str, Path]:
        """Run predict, evaluate and gate on the checkpoint."""
        predictions = self.task(
            "predict", "predict-text", dataset=made["dataset"], checkpoint=made["checkpoint"], judge=made["judge"]
        )["predictions"]
        evaluated = self.task(
            "evaluate", dataset=made["dataset"], evidence=made["evidence"], predictions=[predictions]
        )["evaluation"]
        digest = artifacts.read_stamp(made["checkpoint"])["digest"]
        values = {"champion_digest": champion, "candidate_digest": digest, "decision": verdict}
        judged = self.task("gate", evaluation=evaluated, values=values)["verdict"]
        return made | {"predictions": predictions, "evaluation": evaluated, "verdict": judged}

    def register(self, made: dict[str, Path], *, champion: str = "", task: str = "register") -> str:
        """Run the real register stage; return the version."""
        inputs = {name: made[name] for name in ("checkpoint", "evaluation", "verdict")}
        self.task("register", task, values={"champion_digest": champion}, **inputs)
        return self.result.values["version"]


def _cheap(stage: str) -> Any:
    def run(settings: Any, *, context: Context, **given: Any) -> StageResult:
        outputs = {name: given[name] for name in OUTPUTS[stage]}
        parents = {
            name: artifacts.read_stamp(path)["digest"]
            for name, path in given.items()
            if isinstance(path, Path) and name not in outputs and name != "dataset"
        }
        digests = {}
        for name, path in outputs.items():
            content = f"{stage} {context.task} {name} {settings.model_dump_json()} {sorted(parents.items())}"
            if name in ("base", "expert", "judge", "checkpoint"):
                save_file({"w": np.frombuffer(content.encode(), np.uint8)}, path / "model.safetensors")
                dataset = artifacts.read_stamp(given["dataset"])["digest"] if "dataset" in given else ""
                artifacts.write_checkpoint_info(path, stage=stage, parents=parents, dataset_digest=dataset)
            else:
                (path / "content.txt").write_text(content)
            if name == "dataset":
                digests[name] = artifacts.digest_value(content)
                artifacts.write_json(path / "dataset.json", {"digest": digests[name]})
        if stage == "evaluate":
            for name in ("summary.md", "summary.json", "evaluation.html"):
                (outputs["evaluation"] / name).write_text("{}")
        if stage == "gate":
            value = {"verdict": given["decision"], "candidate_digest": given["candidate_digest"]}
            artifacts.write_json(outputs["verdict"] / "verdict.json", value)
        values = {"source_digest": "5" * 64} if stage == "preflight" else {}
        return StageResult(metrics={"seconds": 1.5, f"{stage}/loss": 0.25}, values=values, digests=digests)

    return run


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
