import pytest

from valor.data.phantom import plan
from valor.errors import UserError
from valor.recipe import PhantomStudies


def test_counts_are_of_studies_and_subjects_belong_to_one_split():
    keys = plan(PhantomStudies(seed=3, train=200, val=30, test=60))
    assert [sum(key.split == s for key in keys) for s in ("train", "val", "test")] == [200, 30, 60]
    split_of = {}
    for key in keys:
        assert split_of.setdefault(key.subject_id, key.split) == key.split
    assert 200 < len(split_of) < 290  # some subjects have two studies
    assert len({key.study_id for key in keys}) == len({key.dicom_id for key in keys}) == len(keys)
    assert [key.index for key in keys] == list(range(len(keys)))


def test_seeds_share_no_subject_and_no_study():
    one, two = (plan(PhantomStudies(seed=s, train=3000, val=100, test=500)) for s in (1, 20261123))
    assert not {key.subject_id for key in one} & {key.subject_id for key in two}
    assert not {key.study_id for key in one} & {key.study_id for key in two}


def test_one_more_training_study_leaves_all_others():
    before = {key.study_id for key in plan(PhantomStudies(seed=3, train=20, val=5, test=9))}
    after = {key.study_id for key in plan(PhantomStudies(seed=3, train=21, val=5, test=9))}
    assert before < after
    assert len(after) == len(before) + 1


def test_ids_are_digits_whose_order_does_not_follow_the_splits():
    keys = plan(PhantomStudies(seed=3, train=20, val=5, test=9))
    assert all(key.subject_id.isdigit() and key.study_id.isdigit() for key in keys)
    assert all(len(key.subject_id) == 15 and key.subject_id.startswith("10") for key in keys)
    ordered = [key.split for key in sorted(keys, key=lambda key: key.study_id)]
    assert ordered != sorted(ordered, key=("train", "val", "test").index)


def test_more_studies_than_ids_are_the_users_mistake():
    with pytest.raises(UserError, match="val"):
        plan(PhantomStudies(val=30_000))


def test_the_highest_seed_has_ids_of_its_own():
    with pytest.raises(ValueError, match="seed"):
        PhantomStudies(seed=10**8)
    highest, first = (plan(PhantomStudies(seed=seed, train=5, val=2, test=3)) for seed in (10**8 - 1, 0))
    assert not {key.subject_id for key in highest} & {key.subject_id for key in first}
    assert all(len(key.subject_id) == 15 for key in highest)
