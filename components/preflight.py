"""KFP wrapper of the stage `preflight`."""

from kfp import dsl

from components.wrap import component


@component
def preflight(
    task: str,
    run: str,
    settings: str,
    registry: str,
    models: str,
    evaluation: str,
    gate: str,
    vision: str,
    root: str,
    annotations_root: str,
    public: bool,
    source_digest: dsl.OutputPath(str),  # type: ignore[valid-type]
    models_digest: dsl.OutputPath(str),  # type: ignore[valid-type]
    champion_uri: dsl.OutputPath(str),  # type: ignore[valid-type]
    champion_digest: dsl.OutputPath(str),  # type: ignore[valid-type]
    metrics: dsl.Output[dsl.Metrics],
) -> list:
    """Look at the source, the models and the registry; return the shards, one JSON string each."""
    import json
    import pathlib

    from components.entry import run_stage

    values = run_stage(
        "preflight",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        values={
            "root": root,
            "annotations_root": annotations_root,
            "public": json.dumps(public),
            "publish_text": json.dumps(any(json.loads(section)["publish_text"] for section in (registry, evaluation))),
            "model_name": json.loads(registry)["model_name"],
            "models": models,
            "gate": gate,
            "vision": vision,
        },
    )
    pathlib.Path(source_digest).write_text(values["source_digest"])
    pathlib.Path(models_digest).write_text(values["models_digest"])
    pathlib.Path(champion_uri).write_text(values["champion_uri"])
    pathlib.Path(champion_digest).write_text(values["champion_digest"])
    return [json.dumps(shard, sort_keys=True) for shard in json.loads(values["shards"])]
