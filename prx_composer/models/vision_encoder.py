"""Vision encoders as teachers: any transformers one, frozen, from images to a grid of patch features."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModel
from transformers.image_processing_utils import BaseImageProcessor

from prx_composer.models.autoencoder import Pixels
from prx_composer.models.constants import cached_tensor
from prx_composer.models.huggingface import Frozen, load_config, makes_no_storage, random_config, says_how_to_get
from prx_composer.models.known_configs import UnknownConfiguration, known_config

# The image towers of models that also read text.
_VISION_CLASSES = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TeacherSpec:
    """Which vision encoder.

    Args:
        pretrained: hub id or folder.
        config: transformers configuration of one with random weights instead: `model_type` and its settings.
        revision: of `pretrained`.
        dtype: storage dtype of the weights; bfloat16 halves the memory and, without autocast, the time.
        compile: `torch.compile` it, one graph for every image size that it sees.

    Raises:
        ValueError: neither or both of `pretrained` and `config`.
    """

    pretrained: str | None = None
    config: dict[str, Any] | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("a teacher needs either `pretrained` (hub id or folder) or `config` (random weights).")


@cached_tensor
def _resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """(target, source): what torch's antialiased bicubic interpolation does to one side."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(source)[None, None]
        return F.interpolate(identity, (target, source), mode="bicubic", antialias=True)[0, 0].to(device)


def resize_antialiased(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased, differentiable: (B, C, H, W) → (B, C, height, width); the same tensor if nothing changes.

    As two matrix products, since the backward pass of `interpolate` adds up in no fixed order on a GPU.
    """
    if image.shape[-2:] == (height, width):
        return image
    rows = _resize_matrix(image.shape[-2], height, image.device)
    columns = _resize_matrix(image.shape[-1], width, image.device)
    with torch.autocast(image.device.type, enabled=False):
        return rows @ image.float() @ columns.mT


def _known(name: str, revision: str | None) -> dict[str, Any]:
    config = known_config(name, revision)
    if config is None:
        raise UnknownConfiguration(name)
    return config


class VisionEncoder:
    """Patch features of a frozen vision encoder (DINOv2, DINOv3, SigLIP, CLIP, ViT …). Not a module: no checkpoint has it.

    On the meta device it is made from its configuration, if that is known here: nothing is loaded or downloaded.

    Args:
        spec: which, or its hub id or folder.

    Raises:
        ValueError: a configuration without patches.
        OSError: weights that cannot be had (missing, gated, offline).
    """

    def __init__(self, spec: TeacherSpec | str):
        spec = TeacherSpec(pretrained=spec) if isinstance(spec, str) else spec
        on_meta = makes_no_storage()
        if on_meta and spec.pretrained is not None:
            spec = TeacherSpec(config=_known(spec.pretrained, spec.revision), dtype=spec.dtype)
        if spec.pretrained is not None:
            self.name = spec.pretrained
            with says_how_to_get(spec.pretrained):
                config = load_config(spec.pretrained, spec.revision)
                cls = getattr(transformers, _VISION_CLASSES.get(config.model_type, "AutoModel"))
                module = cls.from_pretrained(
                    spec.pretrained, revision=spec.revision, dtype=torch.float32, trust_remote_code=False
                )
                processor = self._processor(spec.pretrained, spec.revision)
        else:
            config, processor = random_config(spec.config or {}), {}
            if on_meta:
                config = getattr(config, "vision_config", config)  # of a model that also reads text
            module: Any = AutoModel.from_config(config, trust_remote_code=False)
            self.name = f"random {config.model_type}"
        patch_size = getattr(module.config, "patch_size", None)
        if not isinstance(patch_size, int):
            raise ValueError(f"{self.name} is no vision transformer with square patches (patch_size is {patch_size}).")
        self.patch_size = patch_size
        self.hidden_size = int(module.config.hidden_size)
        self._dtype = getattr(torch, spec.dtype)
        self._frozen = Frozen(module, self._dtype)
        self._run: Any = torch.compile(module, dynamic=False) if spec.compile and not on_meta else module
        self._mean = torch.tensor(processor.get("image_mean") or IMAGENET_MEAN)[:, None, None]
        self._std = torch.tensor(processor.get("image_std") or IMAGENET_STD)[:, None, None]
        takes = inspect.signature(module.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    @staticmethod
    def _processor(name: str, revision: str | None) -> dict[str, Any]:
        try:
            return BaseImageProcessor.get_image_processor_dict(name, revision=revision)[0]
        except OSError:  # a folder with weights alone
            return {}

    @property
    def module(self) -> torch.nn.Module:
        """transformers' own."""
        return self._frozen.module

    def __call__(self, image: Tensor) -> Tensor:
        """Features of the patches, without class and register tokens; gradients flow to the image.

        Args:
            image: (B, 3, H, W) in [−1, 1] (values outside are kept), H and W divisible by `patch_size`.

        Returns:
            (B, H/p, W/p, hidden_size), fp32.
        """
        mean, std = self._mean.to(image.device), self._std.to(image.device)
        rows, columns = image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size
        normalised = ((image.float() + 1) / 2 - mean) / std
        self._frozen.on(image.device)
        tokens = self._run(pixel_values=normalised.to(self._dtype), **self._options).last_hidden_state
        return tokens[:, -rows * columns :].float().unflatten(1, (rows, columns))  # what comes before are prefix tokens


@torch.no_grad()
def teacher_features(teacher: VisionEncoder, batch: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Features of the clean images, resized so that the teacher's patches are the backbone's tokens: (B, rows · columns, C)."""
    image = resize_antialiased(Pixels().encode(batch["image"]), rows * teacher.patch_size, columns * teacher.patch_size)
    return teacher(image).flatten(1, 2)
