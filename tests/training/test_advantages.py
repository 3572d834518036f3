"""Ranks as advantages: order counts, scale does not, equals share, the unusable come last."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from valor.training.advantages import rank_advantages, standardised_advantages, tied_ranks


def advantages(*rewards, group_size=None, tolerance=0.0, unusable=None):
    values = torch.tensor(rewards, dtype=torch.float32)
    mask = None if unusable is None else torch.tensor(unusable)
    size = group_size or len(rewards)
    return rank_advantages(values, group_size=size, tolerance=tolerance, unusable=mask).tolist()


def test_order_decides_and_scale_does_not():
    assert advantages(0.1, 0.2, 0.9, 0.3) == advantages(-5.0, 0.0, 1e6, 1.0)
    assert advantages(0.1, 0.2, 0.9, 0.3) != advantages(0.1, 0.9, 0.2, 0.3)


def test_a_better_reward_gets_a_larger_advantage():
    low, middle, high = advantages(0.1, 0.2, 0.3)
    assert low < middle < high
    assert middle == 0


def test_zero_mean_and_unit_deviation_in_each_group():
    values = torch.tensor(advantages(0.1, 0.5, 0.3, 0.2, 7.0, 7.0, 1.0, 9.0, group_size=4)).view(2, 4)
    assert values.mean(dim=1).abs().max() < 1e-6
    assert (values.pow(2).mean(dim=1).sqrt() - 1).abs().max() < 1e-6


def test_ties_share_their_average_rank():
    assert tied_ranks([0.5, 0.5, 0.1, 0.9], tolerance=0) == [1.5, 1.5, 0.0, 3.0]
    assert tied_ranks([1.0, 1.0, 1.0, 0.0], tolerance=0) == [2.0, 2.0, 2.0, 0.0]


def test_within_the_tolerance_is_a_tie_and_beyond_it_is_not():
    assert tied_ranks([0.50, 0.52], tolerance=0.02) == [0.5, 0.5]
    assert tied_ranks([0.50, 0.521], tolerance=0.02) == [0.0, 1.0]


def test_tolerance_as_written_holds_in_float32():
    for base in (0.1, 0.3, 0.7, 1.1):
        pair = torch.tensor([base, base + 0.02]).tolist()
        assert tied_ranks(pair, tolerance=0.02) == [0.5, 0.5]


def test_without_a_tolerance_rounding_alone_makes_no_order():
    third = torch.tensor([1.0, 1.0, 1.0]).div(3)
    assert tied_ranks([0.4, 0.4 + 6e-8], tolerance=0) == [0.5, 0.5]
    assert tied_ranks([third.sum().item(), third.double().sum().item()], tolerance=0) == [0.5, 0.5]
    assert tied_ranks([0.4, 0.4 + 1e-5], tolerance=0) == [0.0, 1.0]


def test_neighbours_do_not_chain():
    # Each is within 0.02 of the next, yet the best and the worst are 0.06 apart and must not share a rank.
    ranks = tied_ranks([0.06, 0.045, 0.03, 0.015, 0.0], tolerance=0.02)
    assert ranks == [3.5, 3.5, 1.5, 1.5, 0.0]


def test_a_tied_group_gets_nothing_and_its_neighbour_is_untouched():
    values = advantages(0.4, 0.41, 0.405, 0.1, 0.2, 0.9, group_size=3, tolerance=0.02)
    assert values[:3] == [0.0, 0.0, 0.0]
    assert values[3:] == advantages(0.1, 0.2, 0.9)


def test_unusable_ranks_last_whatever_its_reward():
    values = advantages(0.1, 9.0, 0.2, 0.3, unusable=[False, True, False, False])
    assert values[1] == min(values)
    assert advantages(0.1, 9.0, 0.2, 0.3)[1] == max(advantages(0.1, 9.0, 0.2, 0.3))


def test_the_worst_usable_beats_the_unusable_even_within_the_tolerance():
    usable, unusable = advantages(0.30, 0.31, tolerance=0.5, unusable=[False, True])
    assert usable > unusable


def test_a_group_of_unusable_ones_is_tied():
    assert advantages(0.1, 0.2, unusable=[True, True]) == [0.0, 0.0]


def test_infinite_rewards_are_ordered():
    assert tied_ranks([math.inf, 0.0, -math.inf], tolerance=0.1) == [2.0, 1.0, 0.0]


def test_groups_do_not_see_each_other():
    left, right = advantages(0.1, 0.2), advantages(5.0, 4.0)
    assert advantages(0.1, 0.2, 5.0, 4.0, group_size=2) == left + right


@pytest.mark.parametrize(("count", "group_size", "tolerance"), [(3, 2, 0.0), (4, 2, -0.1), (4, 2, math.nan)])
def test_impossible_arguments(count, group_size, tolerance):
    with pytest.raises(ValueError, match=r"rewards have shape|tolerance"):
        rank_advantages(torch.zeros(count), group_size=group_size, tolerance=tolerance)


finite = st.floats(-2, 2, width=32)


@given(st.lists(finite, min_size=1, max_size=12), st.floats(0, 0.5))
def test_properties_of_any_group(values, tolerance):
    ranks = tied_ranks(values, tolerance=tolerance)
    assert math.isclose(sum(ranks), sum(range(len(values))))
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if a > b:
                assert ranks[i] >= ranks[j]
            if ranks[i] == ranks[j]:
                assert abs(a - b) <= tolerance + 2e-6
            if a == b:
                assert ranks[i] == ranks[j]


@given(st.lists(finite, min_size=2, max_size=12), st.randoms())
def test_order_of_the_group_does_not_matter(values, random):
    shuffled = list(range(len(values)))
    random.shuffle(shuffled)
    ranks = tied_ranks(values, tolerance=0.1)
    assert tied_ranks([values[i] for i in shuffled], tolerance=0.1) == [ranks[i] for i in shuffled]


def test_standardised_is_scale_free_and_keeps_distances():
    low, middle, high = standardised_advantages(torch.tensor([0.0, 0.3, 1.0]), group_size=3).tolist()
    assert high - middle == pytest.approx((middle - low) * 7 / 3, rel=1e-5)
    assert standardised_advantages(torch.tensor([2.0, 2.0, 2.0]), group_size=3).tolist() == [0, 0, 0]


def test_an_unusable_completion_does_not_drown_the_differences_of_a_standardised_group():
    usable = [-0.38, -0.40, -0.42, -0.45]
    rewards = torch.tensor([*usable, -10.0, 9.0])
    mask = torch.tensor([False] * 4 + [True, True])
    found = standardised_advantages(rewards, group_size=6, unusable=mask)
    below = -0.45 - torch.tensor(usable).std(correction=0).item()
    worst = standardised_advantages(torch.tensor([*usable, below, below]), group_size=6)
    assert found.tolist() == pytest.approx(worst.tolist(), rel=1e-5)
    assert found[0] - found[3] > 1
    drowned = standardised_advantages(rewards[:5], group_size=5)
    assert drowned[0] - drowned[3] < 0.1
    assert standardised_advantages(rewards, group_size=6, unusable=torch.tensor([True] * 6)).tolist() == [0] * 6
    alone = standardised_advantages(
        torch.tensor([-0.4, -10.0, -10.0]), group_size=3, unusable=torch.tensor([False, True, True])
    )
    assert alone[0] > 1 > 0 > alone[1]
