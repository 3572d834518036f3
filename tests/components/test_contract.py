"""Each wrapper hands its stage exactly the parameters that the stage's function has."""

import ast
import importlib
import inspect

import pytest

from valor.recipe import SECTION_OF_STAGE

WRAPPERS = [*((stage, stage) for stage in SECTION_OF_STAGE), ("predict", "predict_champion")]


def stage_parameters(stage):
    """Return (required, optional, takes anything) names of a stage's function, without settings and context."""
    function = getattr(importlib.import_module(f"valor.stages.{stage}"), stage)
    settings, *parameters = inspect.signature(function).parameters.values()
    assert settings.name == "settings"
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "context"]
    required = {p.name for p in named if p.default is p.empty}
    return required, {p.name for p in named} - required, anything


def wrapper(stage, name):
    return getattr(importlib.import_module(f"components.{stage}"), name)


def passed(component):
    """Return the names that a wrapper's body passes on, by reading its call of run_stage."""
    tree = ast.parse(inspect.getsource(component.python_func))
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_stage"
    ]
    groups = {
        k.arg: [ast.literal_eval(key) for key in k.value.keys] for k in call.keywords if isinstance(k.value, ast.Dict)
    }
    return call.args[0].value, groups


@pytest.mark.parametrize(("stage", "name"), WRAPPERS)
def test_a_wrapper_passes_what_its_stage_takes(stage, name):
    called, groups = passed(wrapper(stage, name))
    names = [n for group in groups.values() for n in group]
    required, optional, anything = stage_parameters(stage)
    assert called == stage
    assert len(names) == len(set(names))
    assert required <= set(names), f"{stage} also needs {required - set(names)}"
    assert anything or set(names) <= required | optional


@pytest.mark.parametrize(("stage", "name"), WRAPPERS)
def test_a_wrapper_is_light(stage, name):
    component = wrapper(stage, name)
    container = component.component_spec.implementation.container
    assert "pip install" not in " ".join(container.command)
    spec = component.component_spec
    assert {"task", "run", "settings"} <= set(spec.inputs)
    assert spec.outputs["metrics"].type.startswith("system.Metrics")


def test_no_wrapper_reads_a_module_level_name():
    """KFP ships the function's source alone: a module-level name would be missing at run time."""
    for stage, name in [*WRAPPERS, ("finish", "finish")]:
        function = wrapper(stage, name).python_func
        used = set(inspect.getclosurevars(function).globals)
        assert not used, f"{name} reads {used}"
