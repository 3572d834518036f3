"""The loop that trains the tiny models: Muon for matrices, AdamW for the rest, warm-up, cosine decay, clipping.

Muon (Jordan et al. 2024) orthogonalises each matrix's update; tiny vision towers learn far more from as many images
with it than with AdamW (docs/development.md), which is what makes minutes on one core enough. Left out: mixed
precision, several processes and resuming, since a run takes two minutes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WARM_UP = 30
_FLOOR = 0.02
_CLIP = 1.0


def fit(
    modules: Iterable["torch.nn.Module"],
    loss_of: Callable[[int], "torch.Tensor"],
    *,
    steps: int,
    muon_lr: float = 0.02,
    adam_lr: float = 1e-3,
    weight_decay: float = 0.05,
    after: Callable[[int, float], None] | None = None,
) -> None:
    """Minimise `loss_of(step)` over the modules' parameters.

    Args:
        modules: what to train.
        loss_of: returns step `i`'s scalar loss.
        steps: optimizer steps.
        muon_lr: peak rate for weight matrices other than embeddings.
        adam_lr: peak rate for everything else.
        weight_decay: of both.
        after: called with (steps done, loss) after each step.
    """
    import torch

    matrices, others = _split(modules)
    optimizers: list[Any] = [torch.optim.AdamW(others, lr=adam_lr, weight_decay=weight_decay, betas=(0.9, 0.98))]
    if matrices:
        optimizers.append(make_muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in groups:
            group["lr"] = peak * _rate(step, steps)
        loss = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + others, _CLIP)
        for optimizer in optimizers:
            optimizer.step()
        if after:
            after(step + 1, float(loss.detach()))


def make_muon(matrices: list["torch.nn.Parameter"], *, lr: float, weight_decay: float) -> "torch.optim.Optimizer":
    """Return `torch.optim.Muon` with its arithmetic in float32.

    torch orthogonalises in bfloat16, which a CPU without instructions for it emulates: on one of those a step of the
    tiny tower took 1.2 s instead of 0.2 s.
    """
    import torch

    class Muon(torch.optim.Muon):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for matrix in group["params"]:
                    momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                    momentum.lerp_(matrix.grad, 1 - group["momentum"])
                    update = orthogonal(matrix.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"])
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    rows, columns = matrix.shape
                    matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    return Muon(matrices, lr=lr, weight_decay=weight_decay)


def orthogonal(update: "torch.Tensor", coefficients: tuple[float, float, float], *, steps: int = 5) -> "torch.Tensor":
    """Return (R, C) float32 near `update`'s orthogonal factor: singular values about 0.7 to 1.2 (Newton-Schulz)."""
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def batches(count: int, size: int, *, seed: int) -> Iterator["torch.Tensor"]:
    """Yield index batches for ever: each epoch a new permutation, its incomplete last batch left out."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _split(modules: Iterable["torch.nn.Module"]) -> tuple[list[Any], list[Any]]:
    matrices: list[Any] = []
    others: list[Any] = []
    seen = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            hidden = parameter.ndim == 2 and "embed" not in name and "head" not in name
            (matrices if hidden else others).append(parameter)
    return matrices, others


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / _WARM_UP)
    return warm * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))
