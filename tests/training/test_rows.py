"""Training rows: what TRL is given, and what it is not."""

import copy
import dataclasses
import errno
import functools

import numpy as np
import pytest
import torch
from tiny_llava import PROMPT, world, write_dataset

from valor.data import manifest
from valor.errors import DataError, ResourceError, UserError
from valor.models.loading import load_policy
from valor.training import rows


@pytest.fixture(scope="module")
def processor():
    return load_policy(world().base)[1]


@pytest.fixture(scope="module")
def studies():
    return rows.training_studies(world().dataset, studies=0, seed=0)


def test_a_row_of_sft_is_prompt_completion_and_an_image_of_the_models_size(processor, studies):
    row = rows.sft_rows(studies, processor, prompt=PROMPT)[3]
    assert set(row) == {"prompt", "completion", "image"}
    assert row["completion"][0]["content"] == studies[3].text
    assert row["image"].size == (48, 48)
    assert row["image"].mode == "RGB"


def test_images_are_decoded_once(processor, studies, monkeypatch):
    table = rows.sft_rows(studies, processor, prompt=PROMPT)
    monkeypatch.setattr("valor.models.loading.first_pixels", None)
    assert np.asarray(table[0]["image"]).shape == (48, 48, 3)


def test_the_expert_sees_an_image_when_it_is_first_asked_for_and_never_again(processor, studies, monkeypatch):
    asked, seen = [], []
    first_pixels = rows.first_pixels
    monkeypatch.setattr(rows, "first_pixels", lambda study: asked.append(study.study_id) or first_pixels(study))
    embed = lambda images: seen.append(images[0].shape) or torch.ones(1, 2)  # noqa: E731
    table = rows.grpo_rows(studies, processor, prompt=PROMPT, embed=embed)
    assert asked == seen == []
    for _ in range(3):
        assert [table[i]["image_embed"].tolist() for i in (0, 1, 0)] == [[1.0, 1.0]] * 3
    assert asked == [studies[0].study_id, studies[1].study_id]
    assert seen == [first_pixels(study).shape for study in studies[:2]], "the expert's own size, not the model's"


@pytest.mark.parametrize("damage", ["none", "empty", "cut", "altered", "no image"])
def test_a_study_whose_image_cannot_be_decoded_is_named(processor, studies, damage):
    image = studies[1].images[0]
    png = {"empty": b"", "cut": image.bytes[:-60], "no image": b"GIF?", "altered": image.bytes[:33] + b"?" * 99}
    images = () if damage == "none" else (dataclasses.replace(image, bytes=png[damage]), *studies[1].images[1:])
    broken = [studies[0], dataclasses.replace(studies[1], images=images)]
    for make in (rows.sft_rows, rows.grpo_rows):
        with pytest.raises(DataError, match=rf"^study {studies[1].study_id}: .*; ingest the data again"):
            make(broken, processor, prompt=PROMPT)


def test_a_report_that_holds_the_image_token_is_named_and_not_shown(processor, studies):
    odd = dataclasses.replace(studies[1], findings=f"Private {processor.image_token} words.")
    with pytest.raises(DataError, match=rf"^study {odd.study_id}: its report holds '<image>'") as caught:
        rows.require_no_image_token([studies[0], odd], processor)
    assert "Private" not in str(caught.value)
    rows.require_no_image_token([studies[0], dataclasses.replace(odd, findings="Private image, < 3 cm.")], processor)


def test_a_report_beyond_the_models_context_is_named_and_not_shown(processor, studies):
    """It would read as memory that is too small, or train on positions that the model does not know."""
    long = dataclasses.replace(studies[1], findings="Private words. " * 2000)
    tokens = len(processor.tokenizer(long.text)["input_ids"])
    fits = functools.partial(rows.require_reports_fit, [studies[0], long], processor)
    with pytest.raises(DataError, match=rf"^study {long.study_id}: its report has {tokens} tokens") as caught:
        fits(room=tokens - 1)
    assert f"leaves {tokens - 1} beside" in str(caught.value)
    assert "Private" not in str(caught.value)
    fits(room=tokens)


def test_a_large_set_goes_to_a_file_with_the_same_pixels(processor, studies):
    small, large = rows.Pixels(studies, processor), rows.Pixels(studies, processor, limit_bytes=1)
    assert isinstance(large._gray, np.memmap)
    assert not isinstance(small._gray, np.memmap)
    assert np.array_equal(small.image(5), large.image(5))


def test_a_full_disk_is_told_before_an_image_is_written(processor, studies, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ResourceError, match="no space left"):
        rows.Pixels(studies, processor, limit_bytes=1)


@pytest.mark.parametrize("kind", ["sft", "grpo_text", "grpo_vision"])
def test_a_table_is_made_and_copied_without_what_its_rows_are_made_from(processor, studies, monkeypatch, kind):
    def refuse(*_):
        raise AssertionError("pickled or copied")

    class Expert:
        def embed(self, images):
            return torch.ones(len(images), 4)

    for part in (rows.Pixels, manifest.Study, Expert):
        monkeypatch.setattr(part, "__reduce_ex__", refuse)
    monkeypatch.setattr("datasets.fingerprint.generate_random_fingerprint", refuse)
    if kind == "sft":
        table = rows.sft_rows(studies, processor, prompt=PROMPT)
    else:
        embed = Expert().embed if kind == "grpo_vision" else None
        table = rows.grpo_rows(studies, processor, prompt=PROMPT, embed=embed)
    assert copy.deepcopy(table)[1]["image"] == table[1]["image"]


def test_text_rows_carry_the_reference_and_vision_rows_never_do(processor, studies):
    text = rows.grpo_rows(studies, processor, prompt=PROMPT)[0]
    assert text["reference"] == studies[0].text
    asked = []

    def embed(images):
        asked.extend(images)
        return torch.ones(len(images), 4)

    table = rows.grpo_rows(studies, processor, prompt=PROMPT, embed=embed)
    vision = [table[0], table[0], table[1]]
    assert set(vision[0]) == {"prompt", "image", "study_id", "image_embed"}
    assert len(asked) == 2, "an image is embedded once"
    assert np.array_equal(asked[0], manifest.decode_image(studies[0].images[0].bytes))


def test_studies_are_drawn_by_the_seed_and_sorted(studies):
    some = rows.training_studies(world().dataset, studies=5, seed=1)
    assert some == rows.training_studies(world().dataset, studies=5, seed=1)
    assert some != rows.training_studies(world().dataset, studies=5, seed=2)
    assert [s.study_id for s in some] == sorted(s.study_id for s in some)
    assert len(studies) == 12


def test_shares_split_the_subjects_and_a_subject_is_in_one(studies):
    parts = [rows.training_studies(world().dataset, studies=0, seed=0, share=s) for s in ((0.0, 0.5), (0.5, 1.0))]
    ids = [{study.study_id for study in part} for part in parts]
    assert all(ids)
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {study.study_id for study in studies}
    assert not {study.subject_id for study in parts[0]} & {study.subject_id for study in parts[1]}
    with pytest.raises(UserError, match="share 0 to 1e-09"):
        rows.training_studies(world().dataset, studies=0, seed=0, share=(0.0, 1e-9))


def test_too_few_studies(tmp_path):
    with pytest.raises(UserError, match="has 12 training studies, the recipe asks for studies=13"):
        rows.training_studies(world().dataset, studies=13, seed=0)
    with pytest.raises(UserError, match="no study in split 'train'"):
        rows.training_studies(write_dataset(tmp_path / "empty", train=0), studies=0, seed=0)
