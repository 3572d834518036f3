"""What `accelerate launch` is told: the node from its cluster's environment, and the strategy's configuration."""

import json
from pathlib import Path

import pytest
from alike import configured

from valor.errors import UserError
from valor.recipe import PredictSettings, SftSettings, load, parse_section
from valor.training import processes
from valor.training.processes import Node, accelerate_config, node_of, zero3_config

KUBEFLOW = {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"}


def vertex(pool: str, index: int) -> dict[str, str]:
    cluster = {"workerpool1": ["b-0:3333", "b-1:3333"], "workerpool0": ["a-0:2222"]}
    return {
        "CLUSTER_SPEC": json.dumps({"cluster": cluster, "task": {"type": pool, "index": index}, "environment": "x"})
    }


def test_one_node_asks_nobody():
    assert node_of(SftSettings(), {**KUBEFLOW, "RANK": "1"}) == node_of(PredictSettings(), {}) == Node()


def test_a_node_learns_from_its_cluster_who_it_is():
    three = SftSettings(nodes=3)
    assert node_of(three, KUBEFLOW) == Node(rank=2, address="job-node-0-0.job", port=29400)
    ranks = [node_of(three, vertex(*task)) for task in (("workerpool0", 0), ("workerpool1", 0), ("workerpool1", 1))]
    assert ranks == [Node(rank=rank, address="a-0", port=2222) for rank in (0, 1, 2)]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "neither PET_NNODES .* nor CLUSTER_SPEC"),
        ({**KUBEFLOW, "PET_NNODES": "4"}, "node 2 of 4"),
        ({**KUBEFLOW, "PET_NODE_RANK": "3"}, "node 3 of 3"),
        ({**KUBEFLOW, "PET_NODE_RANK": "x"}, "cannot be read"),
        ({"PET_NNODES": "3"}, "cannot be read: KeyError"),
        ({"CLUSTER_SPEC": "{"}, "cannot be read"),
        ({"CLUSTER_SPEC": '{"cluster": {}, "task": {"type": "workerpool0", "index": 0}}'}, "cannot be read"),
    ],
)
def test_a_cluster_that_says_something_else_is_an_error(environment, words):
    with pytest.raises(UserError, match=words):
        node_of(SftSettings(nodes=3), environment)


def config(strategy: str, *, node: Node | None = None, **sizes: int):
    settings = SftSettings(strategy=strategy, **sizes)
    return accelerate_config(settings, node=node or Node(), zero_path=Path("/folder/zero3.json"), cpu=False)


def test_ddp_starts_a_process_per_gpu(tmp_path):
    arguments, environment = configured(config("ddp", processes=4), tmp_path / "config.yaml")
    assert (arguments.multi_gpu, arguments.nproc_per_node) == (True, "4")
    assert environment.get("ACCELERATE_USE_FSDP") is environment.get("ACCELERATE_USE_DEEPSPEED") is None


def test_several_nodes_meet_at_the_first(tmp_path):
    node = Node(rank=1, address="first", port=29400)
    arguments, _ = configured(config("ddp", node=node, processes=4, nodes=2), tmp_path / "config.yaml")
    assert (arguments.num_processes, arguments.nproc_per_node, arguments.nnodes, arguments.node_rank) == (
        8,
        "4",
        "2",
        1,
    )
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "first:29400")


def test_fsdp2_leaves_the_vision_tower_whole(tmp_path, monkeypatch):
    import re

    from accelerate.utils import FullyShardedDataParallelPlugin
    from tiny_llava import write_policy

    from valor.models.loading import load_policy

    arguments, environment = configured(config("fsdp2", processes=2), tmp_path / "config.yaml")
    assert (arguments.use_fsdp, arguments.nproc_per_node) == (True, "2")
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    model = load_policy(write_policy(tmp_path / "base"))[0]
    ignored = [name for name, _ in model.named_modules() if re.fullmatch(plugin.ignored_modules, name)]
    assert ignored == ["model.vision_tower"]


def test_zero3_shards_everything_and_saves_whole_weights(tmp_path, monkeypatch):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    with pytest.raises(UserError, match="needs the package deepspeed"):
        config("zero3", processes=2)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda _: object())
    arguments, environment = configured(config("zero3", processes=2), tmp_path / "config.yaml")
    assert (arguments.use_deepspeed, arguments.nproc_per_node) == (True, "2")
    assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "/folder/zero3.json"
    zero = HfDeepSpeedConfig(zero3_config())
    assert zero.is_zero3()
    assert not zero.is_offload()
    assert zero.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_a_strategy_that_a_cpu_would_ignore_is_refused(strategy):
    settings = SftSettings(strategy=strategy, processes=2)
    with pytest.raises(UserError, match="needs GPUs"):
        accelerate_config(settings, node=Node(), zero_path=Path("unused"), cpu=True)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize("section", ["sft", "grpo_text", "grpo_vision"])
def test_a_strategy_needs_processes_to_share_the_weights(section, strategy):
    alone = f"{section}.strategy={strategy}"
    with pytest.raises(UserError, match=rf"{section}\.strategy is {strategy} and {section}\.processes 1: .*raise"):
        load("phantom", [alone])
    with pytest.raises(UserError, match="nobody to share"):
        parse_section(section, json.dumps({"strategy": strategy}))
    for several in ("processes=2", "nodes=2"):
        assert load("phantom", [alone, f"{section}.{several}"])


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize("section", ["sft", "grpo_text"])
def test_adapters_are_not_merged_into_weights_that_are_shared_out(section, strategy):
    asked = [f"{section}.lora.r=8", f"{section}.processes=2"]
    with pytest.raises(UserError, match=rf"{section}\.lora with strategy {strategy}: .*set strategy: ddp"):
        load("phantom", [*asked, f"{section}.strategy={strategy}"])
    assert load("phantom", [*asked, f"{section}.strategy=ddp"])


def test_a_training_stage_has_a_gpu_per_process():
    gpus = ["resources.sft={gpus: 2, gpu_type: NVIDIA_H100_80GB}"]
    assert load("phantom", [*gpus, "sft.processes=2"]).sft.processes == 2
    with pytest.raises(UserError, match=r"resources\.sft\.gpus is 2 and sft\.processes 1: .*set both to the same"):
        load("phantom", gpus)
    assert load("phantom", ["sft.processes=2"]).sft.processes == 2, "a CPU has as many as it likes"


@pytest.mark.parametrize(("target", "image"), [("local", ""), ("kfp", "valor:1"), ("vertex", "valor:1")])
def test_a_pipelines_task_is_one_node(target, image):
    from pipelines.targets import dresser

    with pytest.raises(UserError, match=r"grpo_text\.nodes is 2: .* one pod"):
        dresser(load("phantom", ["grpo_text.nodes=2"]), target=target, image=image, env={})
    dresser(load("phantom"), target=target, image=image, env={})
