"""Does the grid of patches show in the images? Models with large patches in pixels are known to draw one."""

import torch
from torch import Tensor

VISIBLE_GRID = 3.0
"""Above it, as the median of several images, either energy means a grid that one can see. Measured: single photographs, noise and
fields with power spectra from 1/f² to 1/f⁴ stay below 1.4 with patches of 16 and 32 pixels and below 4 with patches of 4 and 8,
where fewer harmonics are averaged; their medians below 1.7. Waves or lines of 4 grey levels (of 255) have a `grid_energy` of 30
and more on a plain ground and 3 to 30 on one with noise of 5 levels; on busy photographs it takes lines of 8 to 16. JPEG's blocks
have a `seam_energy` of 1.5 at quality 80, 3 at 60, 18 at 20."""

_LUMINANCE = (0.2126, 0.7152, 0.0722)  # Rec. 709
_MIN_PATCHES = 8  # along a side: with fewer, harmonics and neighbours are too close to each other and to the picture itself
_NEAR, _FAR = 2, 4  # neighbours, in bins; the window's main lobe ends at 2
_LEVEL = 1 / 255


def can_measure_grid(height: int, width: int, patch_size: int) -> bool:
    """Say whether `grid_energy` and `seam_energy` take images of that size."""
    return patch_size >= 3 and max(height, width) // patch_size >= _MIN_PATCHES


def grid_energy(images: Tensor, patch_size: int) -> Tensor:
    """Return the energy at the frequency of the patches and its harmonics, relative to the frequencies beside them; 1 = no grid.

    Along the width W, and likewise along the height: rows that lie a multiple of the patch size p apart are averaged, which keeps
    what repeats from patch to patch and averages out the picture. S(n) is the power spectrum of the p rows that are left, of
    their luminance under a Hann window, averaged over them, plus that of white noise of one grey level. The harmonics of the
    patches are the bins n_k = k·W/p, 0 < k < p/2, and

        energy = mean over k of  n_k·S(n_k) / mean over d ∈ {±2, ±3, ±4} of (n_k + d)·S(n_k + d).

    The weight n makes spectra that fall as 1/n, as those of rows of natural images do, as well as flat ones come out as 1. The
    noise of one level keeps what nobody can see out of it. Both directions count alike.

    It sees what is the same in all patches: lines, waves, textures. Steps between patches, up here and down there, have no
    frequency of their own; they are for `seam_energy`.

    Args:
        images: (B, 3, H, W), uint8, or floating point in [0, 1]. What is left over of a last patch is cut off.
        patch_size: in pixels of the images, that is with the autoencoder's downsampling; at least 3.

    Returns:
        (B,) fp32. A direction with fewer than 8 patches is left out.

    Raises:
        ValueError: patches below 3 pixels, or fewer than 8 of them in both directions.
    """
    luminance = _luminance(images, patch_size)
    return _energy([luminance, luminance.mT], patch_size)


def seam_energy(images: Tensor, patch_size: int) -> Tensor:
    """Return the `grid_energy` of the steps |Y(x) − Y(x − 1)| from pixel to pixel along each direction; 1 = no seams.

    It sees patches that don't continue each other, like the blocks of a strongly compressed JPEG. Arguments, result and errors
    are those of `grid_energy`.
    """
    luminance = _luminance(images, patch_size)
    steps = [torch.nn.functional.pad(field.diff(dim=-1).abs(), (1, 0)) for field in (luminance, luminance.mT)]
    return _energy(steps, patch_size)


def _luminance(images: Tensor, patch_size: int) -> Tensor:
    height, width = images.shape[-2:]
    if not can_measure_grid(height, width, patch_size):
        raise ValueError(
            f"A grid can be measured with patches of at least 3 pixels, {_MIN_PATCHES} of them or more along a side; "
            f"these images are {height}×{width} with patches of {patch_size}."
        )
    scale = 255 if images.dtype == torch.uint8 else 1
    return torch.einsum("bchw,c->bhw", images.float(), torch.tensor(_LUMINANCE, device=images.device) / scale)


def _energy(directions: list[Tensor], patch_size: int) -> Tensor:
    """Return the mean energy (B,) of fields, each (B, …, along its direction)."""
    long_enough = [field for field in directions if field.shape[-1] // patch_size >= _MIN_PATCHES]
    return torch.cat([_ratios(field, patch_size) for field in long_enough], dim=1).mean(1)


def _ratios(field: Tensor, patch_size: int) -> Tensor:
    """Return the energy (B, harmonics) of a field (B, H, W) along its width."""
    height, width = (max(side // patch_size, 1) * patch_size for side in field.shape[-2:])
    field = field[:, :height, :width]
    folds = max(field.shape[1] // patch_size, 1)
    rows = field.unflatten(1, (folds, -1)).mean(1)
    rows = rows - rows.mean(-1, keepdim=True)
    window = torch.hann_window(width, device=field.device)
    power = torch.fft.rfft(rows * window).abs().square().mean(1) / window.square().sum()
    power = power + _LEVEL**2 / folds  # white noise of one level, averaged over as many rows
    power = power * torch.arange(power.shape[-1], device=field.device)
    harmonics = torch.arange(1, -(-patch_size // 2), device=field.device) * (width // patch_size)
    distances = torch.arange(_NEAR, _FAR + 1, device=field.device)
    neighbours = harmonics[:, None] + torch.cat([-distances, distances])
    return power[:, harmonics] / power[:, neighbours].mean(-1)
