"""Scores drawn shapes: which combination is nearest to the image?"""

import numpy as np
import torch
from torch import Tensor

from prx_composer.data.shapes import Scene, all_scenes, render


def nearest_scenes(images: Tensor, scenes: list[Scene] | None = None) -> list[Scene]:
    """For uint8 images (B, 3, H, W): the combination whose plain rendering has the smallest Euclidean distance.

    Args:
        scenes: the combinations; all of the source by default.
    """
    height, width = images.shape[-2:]
    scenes = scenes or all_scenes()
    renderings = np.stack([np.asarray(render(scene, height, width)) for scene in scenes])
    references = torch.from_numpy(renderings).permute(0, 3, 1, 2).flatten(1).float()
    distance = torch.cdist(images.cpu().flatten(1).float(), references)
    return [scenes[index] for index in distance.argmin(1).tolist()]
