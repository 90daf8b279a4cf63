"""What is between uint8 images and the backbone: nothing, which leaves it pixels, or a frozen autoencoder with its latents."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from prx_composer.models.huggingface import Frozen, refuse_outside, says_how_to_get
from prx_composer.recipe.consistency import downsampling_of


class Autoencoder(Protocol):
    """What `model.autoencoder` must be."""

    channels: int
    downsampling: int  # image side / latent side

    def encode(self, image: Tensor) -> Tensor:
        """Return fp32 (B, channels, H / downsampling, W / downsampling) of uint8 images (B, 3, H, W)."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Return the uint8 images (B, 3, H, W) again."""
        ...


def _to_unit_range(image: Tensor) -> Tensor:
    return image.float() / 127.5 - 1


def _to_uint8(image: Tensor) -> Tensor:
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Pixels:
    """No autoencoder: RGB in [−1, 1]."""

    channels = 3
    downsampling = 1

    def encode(self, image: Tensor) -> Tensor:
        return _to_unit_range(image)

    def decode(self, latent: Tensor) -> Tensor:
        return _to_uint8(latent)


class DiffusersAutoencoder:
    """A frozen `AutoencoderKL` or `AutoencoderDC`, whose latents are shifted and scaled as its configuration says.

    Where the encoder gives a distribution, its mode is the latent: nothing is drawn, and an image has one latent.

    Args:
        pretrained: hub id or folder.
        config: constructor arguments for random weights instead (tests), with `_class_name`.
        subfolder, revision: where in the repository.
        dtype: storage and compute dtype.

    Raises:
        ValueError: neither or both of `pretrained` and `config`, or an unknown class.
        OSError: weights that cannot be had.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ):
        if (pretrained is None) == (config is None):
            raise ValueError("autoencoder needs either `pretrained` (hub id or folder) or `config` (random weights).")
        module = _with_random_weights(config or {}) if pretrained is None else _load(pretrained, subfolder, revision)
        self._frozen = Frozen(module, getattr(torch, dtype))
        self._dtype = getattr(torch, dtype)
        settings: Any = module.config
        self.channels = int(settings.latent_channels)
        downsampling = downsampling_of(settings)
        assert downsampling is not None
        self.downsampling = downsampling
        self.shift = float(settings.get("shift_factor") or 0.0)
        self.scaling = float(settings.get("scaling_factor") or 1.0)

    @property
    def module(self) -> Any:
        """The module of diffusers."""
        return self._frozen.module

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            encoded = self._frozen.on(image.device).encode(_to_unit_range(image).to(self._dtype))
        latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return (latent.float() - self.shift) * self.scaling

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        unscaled = (latent / self.scaling + self.shift).to(self._dtype)
        with torch.autocast(latent.device.type, enabled=False):
            return _to_uint8(self._frozen.on(latent.device).decode(unscaled).sample)


def _load(name: str, subfolder: str | None, revision: str | None) -> Any:
    """Return a diffusers autoencoder, whose class is looked for in diffusers alone, not where model_index.json says."""
    import diffusers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with says_how_to_get(name):
        refuse_outside(name, subfolder)
        config: Any = AutoencoderKL.load_config(name, subfolder=subfolder, revision=revision)
        class_name = str(config.get("_class_name"))
        if not class_name.startswith("Autoencoder") or not hasattr(diffusers, class_name):
            raise ValueError(f"{name} is a {class_name}, which is no autoencoder that diffusers has.")
        return getattr(diffusers, class_name).from_pretrained(name, subfolder=subfolder, revision=revision)


def _with_random_weights(config: Mapping[str, Any]) -> Any:
    """Return an autoencoder with random weights; raise ValueError for an unknown class, or arguments that it doesn't have."""
    import diffusers

    arguments = dict(config)
    class_name = arguments.pop("_class_name", "AutoencoderKL")
    if class_name not in ("AutoencoderKL", "AutoencoderDC"):
        raise ValueError(f"_class_name must be AutoencoderKL or AutoencoderDC, not {class_name!r}.")
    try:
        return getattr(diffusers, class_name)(**arguments)
    except TypeError as error:
        raise ValueError(f"config: {error}") from error


def stored_config(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of a diffusers autoencoder, if it is here: in its folder, or in the hub's cache.

    Args:
        arguments: of `DiffusersAutoencoder`.

    Returns:
        `_class_name` and settings, as its `config` takes them.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if not arguments.get("pretrained"):
        return None
    where: dict[str, Any] = {key: arguments.get(key) for key in ("subfolder", "revision")}
    try:
        loaded: Any = AutoencoderKL.load_config(arguments["pretrained"], local_files_only=True, **where)
    except (OSError, ValueError):
        return None
    return {key: value for key, value in loaded.items() if key == "_class_name" or not key.startswith("_")}
