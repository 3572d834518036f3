"""A vision tower taught from reports: an initialisation from image statistics, and pretraining on labelled places.

Initialisation: a patch embedding that whitens what departs from the mean image at its place, as chest radiographs
are aligned and nearly all their variance is anatomy. Pretraining: for every finding one map over the patches; the
finding is present where any patch says so, on the left where a patch of that half does, in a zone where one at that
height does; the class token learns the same. The labels are the labeler's reading of the report; no mask, box or
truth takes part. The heads that read the findings are thrown away.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from valor.clinical.vocabulary import OBSERVATIONS
from valor.models.optimise import batches, fit
from valor.models.readings import targets

if TYPE_CHECKING:
    import numpy as np
    import torch

_BATCH = 32
_POSITIVE_WEIGHT = 4.0
_MUON_LR = 0.02
_PLACES = 7
_PRIOR_LOGIT = -3.0


def to_batch(images: Sequence["np.ndarray"], *, size_px: int) -> "torch.Tensor":
    """Return (N, size, size) uint8 of images (H, W) uint8, cut and shrunk as the models' loader does."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from valor.models.loading import fit_pixels
    from valor.models.tiny import image_processor

    sizes = SimpleNamespace(image_processor=image_processor(size_px))
    return torch.from_numpy(np.stack([np.asarray(fit_pixels(image, sizes).convert("L")) for image in images]))


def normalised(pixels: "torch.Tensor") -> "torch.Tensor":
    """Return (N, 1, H, W) float32 of (N, H, W) uint8, as the tiny models' image processor normalises one channel."""
    from valor.models.tiny import PIXEL_MEAN, PIXEL_STD

    return ((pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD)[:, None]


def augment(pixels: "torch.Tensor", generator: "torch.Generator", *, strength: float) -> "torch.Tensor":
    """Return normalised images (N, 1, H, W) turned, scaled and shifted a little, with other contrast and brightness."""
    import torch
    from torch.nn import functional

    count = len(pixels)

    def jitter(*shape: int) -> "torch.Tensor":
        return (torch.rand(count, *shape, generator=generator) - 0.5) * strength

    angle, scale, shift = jitter() * 0.14, 1 + jitter() * 0.16, jitter(2) * 0.16
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], dim=1), torch.stack([sin, cos, shift[:, 1]], dim=1)], dim=1
    )
    grid = functional.affine_grid(affine, list(pixels.shape), align_corners=False)
    turned = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return turned * (1 + jitter(1, 1, 1) * 0.4) + jitter(1, 1, 1) * 0.4


def initialise(vision: Any, pixels: "torch.Tensor", *, seed: int) -> None:
    """Set a CLIP vision model's patch and position embeddings from images (N, H, W) uint8."""
    import torch

    config = vision.config
    patch, grid, width = config.patch_size, config.image_size // config.patch_size, config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    images = normalised(pixels)[:, 0]
    cells = images.unfold(1, patch, patch).unfold(2, patch, patch).reshape(len(images), grid * grid, patch * patch)
    mean = cells.mean(dim=0)
    rest = (cells - mean).reshape(-1, patch * patch)
    variance, axes = torch.linalg.eigh(rest.T @ rest / len(rest))
    variance, axes = variance.flip(0), axes.flip(1)
    kept = min(width, patch * patch)
    damped = (variance[:kept] + 0.1 * variance[:kept].mean()).sqrt()
    whiten = torch.zeros(width, patch * patch)
    whiten[:kept] = (axes[:, :kept] / damped).T
    whiten = _rotation(width, generator) @ whiten
    embeddings = vision.embeddings
    with torch.no_grad():
        shape = embeddings.patch_embedding.weight.shape
        embeddings.patch_embedding.weight.copy_((whiten / 3).reshape(width, 1, patch, patch).expand(shape))
        places = _waves(grid, width) @ _rotation(width, generator)
        embeddings.position_embedding.weight[1:] = places - mean @ whiten.T


def pretrain(
    vision: Any,
    pixels: "torch.Tensor",
    reports: Sequence[str],
    *,
    steps: int,
    seed: int,
    strength: float = 0.4,
    after: Callable[[int, float], None] | None = None,
) -> Any:
    """Teach a CLIP vision model the findings of reports, and return the head that read them.

    Args:
        vision: a CLIP vision model; its last layer's tokens are trained.
        pixels: (N, H, W) uint8 at the model's size.
        reports: their N reports.
        steps: optimizer steps of 32 images.
        seed: of order, augmentation and the head.
        strength: of augmentation.
        after: see `fit`.
    """
    import torch
    from torch.nn import functional

    initialise(vision, pixels, seed=seed)
    wanted, weight = (torch.from_numpy(array) for array in targets(reports))
    head, class_head = finding_maps(vision.config, seed=seed), _class_head(vision.config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = batches(len(pixels), _BATCH, seed=seed)
    positive = torch.tensor(_POSITIVE_WEIGHT)

    def loss_of(_: int) -> "torch.Tensor":
        rows = next(order)
        images = augment(normalised(pixels[rows]), generator, strength=strength)
        tokens = vision(pixel_values=images.expand(-1, 3, -1, -1)).last_hidden_state
        logits = torch.stack([head(tokens[:, 1:]), class_head(tokens[:, 0])])
        loss = functional.binary_cross_entropy_with_logits(
            logits, wanted[rows].expand_as(logits), reduction="none", pos_weight=positive
        )
        return (loss * weight[rows]).sum() / len(rows)

    vision.train()
    fit([vision, head, class_head], loss_of, steps=steps, muon_lr=_MUON_LR, after=after)
    vision.eval()
    return head.eval()


def patch_tokens(vision: Any, images: "torch.Tensor") -> "torch.Tensor":
    """Return the last layer's patch tokens (N, grid * grid, width) of normalised images (N, 1, H, W)."""
    return vision(pixel_values=images.expand(-1, 3, -1, -1)).last_hidden_state[:, 1:]


def finding_maps(config: Any, *, seed: int) -> Any:
    """Return the head: patch tokens (N, P, width) to logits (N, 13 * 7) in the order of `readings.targets`."""
    import torch

    regions = _regions(config.image_size // config.patch_size).log().clamp_min(-1e4)

    class FindingMaps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(config.hidden_size)
            self.head_map = torch.nn.Linear(config.hidden_size, len(OBSERVATIONS))
            self.head_mean = torch.nn.Linear(config.hidden_size, len(OBSERVATIONS) * _PLACES)
            torch.nn.init.zeros_(self.head_mean.weight)
            self.bias = torch.nn.Parameter(torch.full((len(OBSERVATIONS), _PLACES), _PRIOR_LOGIT))

        def forward(self, tokens: "torch.Tensor") -> "torch.Tensor":
            tokens = self.norm(tokens)
            maps = self.head_map(tokens)[..., None] + regions.T[None, :, None]
            whole = self.head_mean(tokens.mean(dim=1)).unflatten(1, (len(OBSERVATIONS), _PLACES))
            return (maps.logsumexp(dim=1) + whole + self.bias).flatten(1)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FindingMaps()


def _class_head(config: Any, *, seed: int) -> Any:
    """Return what reads the class token, which an expert's image embedding is made of."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        count = len(OBSERVATIONS) * _PLACES
        head = torch.nn.Linear(config.hidden_size, count)
        torch.nn.init.constant_(head.bias, _PRIOR_LOGIT)
    # Named, since `fit` tells heads from hidden matrices by name.
    return torch.nn.Sequential(OrderedDict(norm=torch.nn.LayerNorm(config.hidden_size), head=head))


def _regions(grid: int) -> "torch.Tensor":
    """Return (7, grid * grid) in {0, 1}: where each place can be; the patient's left is the image's right.

    Zones overlap by a patch row and the halves share a middle column, since reports place roughly.
    """
    import torch

    column, row = torch.arange(grid * grid) % grid, torch.arange(grid * grid) // grid
    regions = torch.ones(_PLACES, grid * grid)
    regions[1] = (column >= grid // 2).float()
    regions[2] = (column < grid - grid // 2).float()
    for zone in range(3):
        top, bottom = grid * (0.05 + 0.3 * zone) - 1, grid * (0.35 + 0.3 * zone) + 1
        regions[4 + zone] = ((row >= top) & (row < bottom)).float()
    return regions


def _rotation(width: int, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def _waves(grid: int, width: int) -> "torch.Tensor":
    """Return (grid * grid, width): sines and cosines of row and column, the usual fixed position code."""
    import torch

    row, column = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    rates = torch.linspace(0.1, 2.5, width // 4)
    waves = [wave(place.reshape(-1, 1) * rates) for place in (row, column) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1)
