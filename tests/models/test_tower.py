import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from valor.clinical.vocabulary import OBSERVATIONS
from valor.models.tower import augment, initialise, normalised, patch_tokens, pretrain, to_batch

EFFUSION = OBSERVATIONS.index("Pleural Effusion")


def _vision():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=48, patch_size=12
    )
    return CLIPVisionModel(config)


def _studies(count, seed):
    """A bright square on the image's right is a left effusion; on its left, a right one."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(95, 105, (count, 48, 48)).astype(np.uint8)
    reports = []
    for i in range(count):
        kind = i % 3
        if kind < 2:
            column = 32 if kind == 0 else 4
            pixels[i, 30:42, column : column + 12] = 250
        reports.append(["Left pleural effusion.", "Right pleural effusion.", "No pleural effusion."][kind])
    return torch.from_numpy(pixels), reports


def test_it_learns_findings_and_sides_from_reports_alone():
    vision = _vision()
    head = pretrain(vision, *_studies(96, seed=0), steps=100, seed=0)
    pixels, _ = _studies(30, seed=1)
    with torch.no_grad():
        logits = head(patch_tokens(vision, normalised(pixels))).reshape(30, 13, 7)[:, EFFUSION]
    has, left, right = logits[:, 0], logits[:, 1], logits[:, 2]
    assert has[2::3].max() < min(has[0::3].min(), has[1::3].min())
    assert (left > right)[0::3].all()
    assert (right > left)[1::3].all()


def test_its_start_sees_what_departs_from_the_mean_image():
    pixels, _ = _studies(30, seed=0)
    vision = _vision()
    initialise(vision, pixels, seed=0)
    mean = pixels.float().mean(0, keepdim=True).to(torch.uint8)
    with torch.no_grad():
        tokens = vision.embeddings(normalised(torch.cat([mean, pixels])).expand(-1, 3, -1, -1))[:, 1:]
    departure = (tokens[1:] - tokens[:1]).norm(dim=2).reshape(30, 4, 4)
    assert departure[0, 2:, 2:].mean() > 1.5 * departure[2, 2:, 2:].mean()


def test_training_is_repeatable():
    one, two = _vision(), _vision()
    pretrain(one, *_studies(32, seed=0), steps=3, seed=0)
    pretrain(two, *_studies(32, seed=0), steps=3, seed=0)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_augmentation_moves_a_little_and_strength_0_not_at_all():
    images = normalised(_studies(4, seed=0)[0])
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(augment(images, generator, strength=0.0), images, atol=1e-4)
    moved = augment(images, generator, strength=0.4)
    assert moved.shape == images.shape
    assert 0.01 < (moved - images).abs().mean() < 1


def test_images_are_cut_to_their_central_square():
    image = np.zeros((40, 80), np.uint8)
    image[:, 16:64] = 200
    small = to_batch([image], size_px=20)
    assert small.shape == (1, 20, 20)
    assert small.dtype == torch.uint8
    assert small.min() >= 198
