"""How many processes train a stage together, on which nodes, and what `accelerate launch` is told about them.

Node, address and port come from what Kubeflow Trainer v2 (PET_*) or a Vertex AI custom job (CLUSTER_SPEC) set; the rest
is the recipe's. The files are written and used by `valor.training.launch`.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valor.errors import UserError
from valor.recipe import TrainStage


@dataclasses.dataclass(frozen=True)
class Node:
    """One of the machines that train together.

    Attributes:
        rank: its number, 0 for the first, which records what all of them make.
        address, port: of the first; "" and 0 where there is only one.
    """

    rank: int = 0
    address: str = ""
    port: int = 0


def node_of(settings: Any, environment: Mapping[str, str] = os.environ) -> Node:
    """Return which node this is, from what Kubeflow Trainer v2 (PET_*) or Vertex AI (CLUSTER_SPEC) set.

    Args:
        settings: a stage's section; any but a training stage's runs on one node.
        environment: the environment variables.

    Raises:
        UserError: the environment describes another number of nodes than the stage asks for.
    """
    nodes = getattr(settings, "nodes", 1)
    if nodes == 1:
        return Node()
    try:
        if "PET_NNODES" in environment:
            found = int(environment["PET_NNODES"])
            address, port = environment["PET_MASTER_ADDR"], int(environment["PET_MASTER_PORT"])
            rank = int(environment["PET_NODE_RANK"])
        elif "CLUSTER_SPEC" in environment:
            spec = json.loads(environment["CLUSTER_SPEC"])
            pools, task = spec["cluster"], spec["task"]
            hosts = [host for pool in sorted(pools) for host in pools[pool]]
            before = sum(len(pools[pool]) for pool in pools if pool < task["type"])
            found, rank = len(hosts), before + int(task["index"])
            address, port = hosts[0].rsplit(":", 1)[0], int(hosts[0].rsplit(":", 1)[1])
        else:
            raise UserError(
                f"nodes is {nodes}, and neither PET_NNODES (Kubeflow Trainer) nor CLUSTER_SPEC (Vertex AI custom job) "
                "is set; start the stage on each node through one of them, or set nodes: 1"
            )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"nodes is {nodes}, and PET_* or CLUSTER_SPEC cannot be read: {error!r}") from error
    if found != nodes or not 0 <= rank < nodes:
        raise UserError(f"nodes is {nodes}, and the environment describes node {rank} of {found}; make them agree")
    return Node(rank=rank, address=address, port=port)


def accelerate_config(settings: TrainStage, *, node: Node, zero_path: Path, cpu: bool) -> dict[str, Any]:
    """Return the configuration file of `accelerate launch` as a dict.

    Args:
        settings: processes, nodes and strategy.
        node: which node this is.
        zero_path: DeepSpeed's own configuration (`zero3_config`), for that strategy.
        cpu: train on the CPU, over gloo.

    Raises:
        UserError: the strategy cannot run here.
    """
    if settings.strategy != "ddp" and cpu:
        # accelerate would train without the strategy and say nothing.
        raise UserError(f"strategy {settings.strategy} needs GPUs, and this machine shows none; set strategy: ddp")
    if settings.strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UserError("strategy zero3 needs the package deepspeed, which is not installed; set strategy: fsdp2")
    return {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": settings.nodes,
        "num_processes": settings.nodes * settings.processes,
        "machine_rank": node.rank,
        "main_process_ip": node.address or "127.0.0.1",
        "main_process_port": node.port,
        "rdzv_backend": "static",
        "main_training_function": "main",
        # The trainer's arguments say (`dtype: bfloat16` is autocast).
        "mixed_precision": "no",
        "use_cpu": cpu,
        **_strategy_config(settings.strategy, zero_path),
    }


def _strategy_config(strategy: str, zero_path: Path) -> dict[str, Any]:
    if strategy == "fsdp2":
        return {
            "distributed_type": "FSDP",
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_reshard_after_forward": True,
                "fsdp_offload_params": False,
                "fsdp_cpu_ram_efficient_loading": False,
                # Checkpoints of whole weights: `from_pretrained` reads them, whatever the number of processes.
                "fsdp_state_dict_type": "FULL_STATE_DICT",
                # The frozen tower stays whole in each process, so that TowerMemo may skip it in one and not in another.
                "fsdp_ignored_modules": r".*\.vision_tower",
            },
        }
    if strategy == "zero3":
        return {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_config_file": str(zero_path), "zero3_init_flag": False},
        }
    return {"distributed_type": "MULTI_GPU"}


def zero3_config() -> dict[str, Any]:
    """Return DeepSpeed's configuration; "auto" is filled in by transformers from the trainer's arguments."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def name_layers_to_shard(trainer: Any) -> None:
    """Tell FSDP2 which layers to shard one by one: those of the model's own list that it has, outside a frozen tower.

    LLaVA's list names the layers of every tower that it may have, and accelerate refuses a name that the model lacks.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    there = {type(module).__name__ for name, module in trainer.model.named_modules() if "vision_tower" not in name}
    plugin.transformer_cls_names_to_wrap = sorted(there & set(trainer.model._no_split_modules or ()))
