"""Rank-normalised advantages: stage 2's replacement of GRPO's mean-and-std normalisation (arXiv 2512.16201, sec. 3).

The expert's similarity is trusted for its order, not for its scale: within a group of candidates of one image the
rewards become ranks, and the ranks become advantages of zero mean and unit standard deviation. Ranks alone would
give clinically identical paraphrases full-size advantages, so rewards within a tolerance share a rank (VALOR's own
addition). Plain torch, no trainer; left out are weights between groups: every group with two ranks counts the same.

`standardised_advantages` is what ranks replace, kept to be compared with: GRPO's own (arXiv 2402.03300).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROUNDING = 1e-6
"""Rewards are float32: two that differ by the tolerance as written must count as equal, and so must two that say the
same in another order of summation."""


def rank_advantages(
    rewards: "torch.Tensor", *, group_size: int, tolerance: float, unusable: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Return advantages from ranks within each group.

    Sorted from the best down, a rank opens at the first reward not yet placed and takes in every reward at most
    `tolerance` below it, so rewards that share a rank never differ by more than the tolerance: near neighbours cannot
    chain a whole group together. A rank's value is the average of the places it covers. `unusable` rewards share one
    rank below all others, whatever their value.

    Args:
        rewards: (N,) float, finite, groups one after the other.
        group_size: completions per prompt; divides N.
        tolerance: rewards closer than this are equal; at 0, those that differ by no more than float32's rounding.
        unusable: (N,) bool, completions that must rank last (empty, truncated).

    Returns:
        (N,) float32 on the device of `rewards`; a group of one rank gets 0.

    Raises:
        ValueError: N is no multiple of `group_size`, or `tolerance` is negative.
    """
    import torch

    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, expected (N,) with N a multiple of {group_size}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, expected >= 0")
    values = rewards.detach().to("cpu", torch.float64).clone()
    if unusable is not None:
        values[unusable.to("cpu")] = -torch.inf
    ranks = torch.tensor(
        [rank for group in values.view(-1, group_size).tolist() for rank in tied_ranks(group, tolerance=tolerance)],
        dtype=torch.float64,
    ).view(-1, group_size)
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    spread = centred.pow(2).mean(dim=1, keepdim=True).sqrt()
    # Ranks are multiples of one half, so an untied group's spread is far above zero and a tied one's is exactly zero.
    advantages = torch.where(spread > 0, centred / spread.clamp(min=1e-12), torch.zeros_like(centred))
    return advantages.view(-1).to(rewards.device, torch.float32)


def standardised_advantages(
    rewards: "torch.Tensor", *, group_size: int, unusable: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Return rewards centred and scaled by the deviation of their group.

    `unusable` rewards are put one deviation of the usable ones below the least of them (anywhere below, where those do
    not differ): their own value lies so far below that it would be the whole of the group's deviation.

    Args:
        rewards: (N,) float, finite, groups one after the other.
        group_size: completions per prompt; divides N.
        unusable: (N,) bool.

    Returns:
        (N,) float32 on the device of `rewards`; 0 for a group without spread or without a usable completion.
    """
    import torch

    values = rewards.detach().to("cpu", torch.float64).view(-1, group_size)
    bad = torch.zeros_like(values, dtype=torch.bool)
    if unusable is not None:
        bad = unusable.to("cpu").view(-1, group_size)
    usable = (~bad).sum(dim=1, keepdim=True).clamp(min=1)
    kept = values.masked_fill(bad, 0.0)
    mean = kept.sum(dim=1, keepdim=True) / usable
    deviation = ((kept - mean).masked_fill(bad, 0.0).pow(2).sum(dim=1, keepdim=True) / usable).sqrt()
    gap = torch.where(deviation > _ROUNDING, deviation, torch.ones_like(deviation))
    least = values.masked_fill(bad, torch.inf).amin(dim=1, keepdim=True)
    # A group without a usable completion has no least one, and no differences.
    least = torch.where(least.isinf(), torch.zeros_like(least), least)
    centred = torch.where(bad, (least - gap).expand_as(values), values)
    centred = centred - centred.mean(dim=1, keepdim=True)
    spread = centred.pow(2).mean(dim=1, keepdim=True).sqrt()
    advantages = torch.where(spread > _ROUNDING, centred / spread, torch.zeros_like(centred))
    return advantages.view(-1).to(rewards.device, torch.float32)


def tied_ranks(values: list[float], *, tolerance: float) -> list[float]:
    """Return each value's rank, 0 for the worst, the average place where values are tied (see `rank_advantages`)."""
    order = sorted(range(len(values)), key=lambda i: values[i], reverse=True)
    ranks = [0.0] * len(values)
    start = 0
    for place in range(1, len(order) + 1):
        if place < len(order) and _tied(values[order[start]], values[order[place]], tolerance):
            continue
        best, worst = len(order) - 1 - start, len(order) - place
        for i in order[start:place]:
            ranks[i] = (best + worst) / 2
        start = place
    return ranks


def _tied(best: float, other: float, tolerance: float) -> bool:
    return best == other or best - other <= tolerance + _ROUNDING
