"""A trainer checkpoint's weights: what trains, of this parent, or an error."""

import pytest
import torch

from valor.errors import IntegrityError
from valor.training.trained import load_trained, save_trained


def model(*, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    layers[0].requires_grad_(False)
    return layers


def test_what_trains_comes_back_and_nothing_else_is_touched(tmp_path):
    saved, other = model(seed=1), model(seed=2)
    frozen = other[0].weight.clone()
    save_trained(saved, tmp_path, parent="p")
    load_trained(other, tmp_path, parent="p")
    assert torch.equal(other[1].weight, saved[1].weight)
    assert torch.equal(other[0].weight, frozen)
    with pytest.raises(IntegrityError, match="made from checkpoint p, the parent is q"):
        load_trained(other, tmp_path, parent="q")


def test_gathered_weights_are_written_whole_or_not_at_all(tmp_path):
    here, elsewhere = model(seed=1), model(seed=2)
    save_trained(here, tmp_path / "all", parent="p", state=elsewhere.state_dict())
    load_trained(here, tmp_path / "all", parent="p")
    assert torch.equal(here[1].weight, elsewhere[1].weight)
    with pytest.raises(IntegrityError, match=r"lack 1 that train, such as 1\.bias"):
        save_trained(here, tmp_path / "part", parent="p", state={"1.weight": elsewhere[1].weight})
    assert not (tmp_path / "part" / "trained.safetensors").exists()
