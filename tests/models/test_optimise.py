import torch

from valor.models.optimise import make_muon, orthogonal


def test_muon_steps_like_torchs_which_rounds_to_bfloat16():
    torch.manual_seed(0)
    for shape in ((32, 16), (16, 32), (24, 24)):
        start = torch.randn(shape)
        ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        for parameter, optimizer in (
            (ours, make_muon([ours], lr=0.02, weight_decay=0.05)),
            (theirs, torch.optim.Muon([theirs], lr=0.02, weight_decay=0.05)),
        ):
            generator = torch.Generator().manual_seed(1)
            for _ in range(5):
                parameter.grad = torch.randn(shape, generator=generator)
                optimizer.step()
        moved = (theirs - start).norm()
        assert (ours - theirs).norm() < 0.02 * moved
        assert moved > 0.01 * start.norm()


def test_an_update_becomes_nearly_orthogonal():
    torch.manual_seed(0)
    update = torch.randn(40, 10) @ torch.diag(torch.logspace(-1, 1, 10))
    values = torch.linalg.svdvals(orthogonal(update, (3.4445, -4.775, 2.0315)))
    assert values.min() > 0.5
    assert values.max() < 1.3
