"""Latents of Würstchen (arXiv:2306.00637): an EfficientNet makes them, and Stable Cascade's previewer shows them.

Written anew after modules/effnet.py and modules/previewer.py of github.com/Stability-AI/StableCascade, whose weights it reads.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import efficientnet_v2_s

from prx_composer import registry
from prx_composer.models.huggingface import Frozen, makes_no_storage, says_how_to_get

CHANNELS, STRIDE, PREVIEW = 16, 32, 8  # of a latent; pixels of an image, and of its preview, on one side of a latent's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for which EfficientNet was trained


class Encoder(nn.Module):
    """EfficientNetV2-S up to its last features, mapped to channels of mean 0 and standard deviation 1."""

    def __init__(self):
        super().__init__()
        self.backbone = efficientnet_v2_s().features
        self.mapper = nn.Sequential(nn.Conv2d(1280, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS, affine=False))

    def forward(self, image: Tensor) -> Tensor:
        return self.mapper(self.backbone(image))


class Previewer(nn.Module):
    """Three times twice as large, by convolutions: a quarter of the image's side."""

    def __init__(self, width: int = 512):
        super().__init__()
        layers = [nn.Conv2d(CHANNELS, width, 1), *_after(width), nn.Conv2d(width, width, 3, padding=1), *_after(width)]
        for inside, outside in ((width, width // 2), (width // 2, width // 4), (width // 4, width // 4)):
            layers += [nn.ConvTranspose2d(inside, outside, 2, stride=2), *_after(outside)]
            layers += [nn.Conv2d(outside, outside, 3, padding=1), *_after(outside)]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(width // 4, 3, 1))

    def forward(self, latent: Tensor) -> Tensor:
        return self.blocks(latent)


def _after(width: int) -> list[nn.Module]:
    return [nn.GELU(), nn.BatchNorm2d(width)]


@registry.autoencoders.register("wuerstchen")
class Wuerstchen:
    """Latents 32 times smaller than the image, of 16 channels. What is decoded is a preview, enlarged four times.

    Stage B, which makes an image of its full size from a latent, is diffusers' `StableCascadeDecoderPipeline`.

    Args:
        pretrained: folder or hub id with effnet_encoder.safetensors and previewer.safetensors; None: random weights.

    Raises:
        OSError: weights that cannot be had.
    """

    channels, downsampling = CHANNELS, STRIDE

    def __init__(self, pretrained: str | None = "stabilityai/stable-cascade"):
        self._encoder, self._previewer = Encoder(), Previewer()
        if pretrained is not None and not makes_no_storage():
            for part, name in ((self._encoder, "effnet_encoder"), (self._previewer, "previewer")):
                part.load_state_dict(load_file(_file(pretrained, f"{name}.safetensors")))
        self._frozen = Frozen(nn.ModuleList([self._encoder, self._previewer]))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Return fp32 (B, 16, H/32, W/32) of uint8 images (B, 3, H, W)."""
        encoder, _ = self._frozen.on(image.device)
        mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (MEAN, STD))
        with torch.autocast(image.device.type, enabled=False):
            return encoder((image / 255 - mean) / std)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W)."""
        _, previewer = self._frozen.on(latent.device)
        with torch.autocast(latent.device.type, enabled=False):
            preview = previewer(latent.float()).clamp(0, 1)
        large = F.interpolate(preview, scale_factor=STRIDE / PREVIEW, mode="bicubic", antialias=True)
        return (255 * large).round().clamp(0, 255).to(torch.uint8)


def _file(source: str, name: str) -> str:
    if Path(source).is_dir():
        return str(Path(source, name))
    with says_how_to_get(source):
        return hf_hub_download(source, name)
