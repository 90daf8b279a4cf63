"""Perceptual losses: the predicted clean image x̂0 is compared with the true one by the features of a frozen network.

Shapes: B images, C channels, H × W pixels (of the image, or of a layer's features).
"""

import math
import pickle
import urllib.request
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor, nn

from prx_composer.algorithms.base import LossTrick
from prx_composer.common.errors import UserError, at_path
from prx_composer.models.compiling import compile_for_all_sizes
from prx_composer.models.diffusion import DDPM
from prx_composer.models.encoders import TeacherSpec, VisionEncoder, resize_antialiased
from prx_composer.models.flow import FlowOutput
from prx_composer.models.huggingface import Frozen, makes_no_storage
from prx_composer.models.processes import Process

_MOST_NOISE = 0.9  # at which a predicted noise still tells an image


class PixelLoss(LossTrick):
    """(1/B) · Σ distance(x̂0, x0) over images with no more noise than `max_timestep`; B counts all, so that microbatches add up.

    Args:
        weight: of the term in the total loss.
        max_timestep: noisier images than that don't count; 1 = all do. It is a share of noise, of flow matching the timestep.
        fraction: of a microbatch's images that are compared at most, rounded up, those that count first. Where more count, these
            stand for those that are left out: batches are shuffled, so that the expected loss is the same.
        start, end: window; after it the network is let go.

    Raises:
        ValueError: a negative weight, a timestep or a fraction outside of (0, 1].
    """

    needs_whole_image = True

    def __init__(self, weight: float, max_timestep: float, start: str, end: str | None, fraction: float = 1.0):
        super().__init__(weight, start, end)
        for name, value in {"max_timestep": max_timestep, "fraction": fraction}.items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1], not {value}.")
        self.max_timestep, self.fraction = max_timestep, fraction

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        """Raise UserError unless the model predicts pixels."""
        channels = model.autoencoder.channels
        if (channels, model.autoencoder.downsampling) != (3, 1):
            raise UserError(
                f"algorithms.{self.name} compares images, but the model predicts latents of {channels} channels; "
                f"{self.name} needs model.autoencoder: {{name: pixels}}."
            )
        return {}

    def check_flow(self, flow: Process) -> None:
        if isinstance(flow, DDPM) and flow.prediction == "eps" and self.max_timestep > _MOST_NOISE:
            raise UserError(
                f"algorithms.{self.name}.max_timestep is {self.max_timestep}, but the image that a predicted noise tells has its "
                f"error σ/α times: with linear betas up to 158 times, at {_MOST_NOISE} 9 times. Set max_timestep to "
                f"{_MOST_NOISE} or less, or model.flow.prediction to v."
            )

    @abstractmethod
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the distances (B,) of images (B, 3, H, W) around [−1, 1], not clamped; only `prediction` gets gradients."""

    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        size, seen = len(outputs.clean), (outputs.prediction, outputs.noised, outputs.timestep, outputs.clean)
        counts, share = self.flow.noise_share(outputs.timestep) <= self.max_timestep, 1.0
        if (most := math.ceil(self.fraction * size)) < size:  # which, the device knows alone; how many, the host
            chosen = (~counts).to(torch.int8).argsort(stable=True)[:most]
            seen, every = tuple(part.index_select(0, chosen) for part in seen), counts.sum()
            counts = counts.index_select(0, chosen)
            share = counts.sum().clamp_min(1) / every.clamp_min(1)
        prediction, noised, timestep, clean = seen
        distances = self.distance(self.flow.to_x0(prediction, noised, timestep).float(), clean.float())
        return (distances * counts).sum() / (size * share)


def fit_size(height: int, width: int, image_size: int, multiple: int) -> tuple[int, int]:
    """Return a height and width of about image_size² pixels and the same aspect ratio, both multiples of `multiple`.

    Smaller images grow: an encoder has seen nothing but images of about the size that it was trained at.
    """
    scale = image_size / math.sqrt(height * width)
    rows, columns = (max(1, round(side * scale / multiple)) for side in (height, width))
    return rows * multiple, columns * multiple


def patch_dissimilarity(teacher: VisionEncoder, prediction: Tensor, target: Tensor) -> Tensor:
    """Return 1 − cos between the features of images (B, 3, H, W), averaged over patches: (B,). The target has no graph."""
    with torch.no_grad():
        expected = teacher(target)  # (B, rows, columns, D)
    return 1 - F.cosine_similarity(teacher(prediction), expected, dim=-1).mean((1, 2))


class PerceptualDINO(PixelLoss):
    """`patch_dissimilarity` of the images at `fit_size`, for a model that predicts pixels.

    Args:
        teacher: vision encoder, by hub id or folder or as a `TeacherSpec`.
        image_size: side of the square whose area the teacher sees, in pixels; the aspect ratio is kept.
        weight, max_timestep, fraction, start, end: see `PixelLoss`.

    Raises:
        ValueError: an argument out of range.
        UserError: when it is attached, for a model of latents, for a teacher that cannot be had, and for an image size smaller
            than the teacher's patches.
    """

    name = "perceptual_dino"

    def __init__(
        self,
        teacher: str | TeacherSpec = "facebook/dinov2-with-registers-base",
        weight: float = 0.01,
        image_size: int = 224,
        max_timestep: float = 1.0,
        fraction: float = 1.0,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(weight, max_timestep, start, end, fraction)
        self.teacher, self.image_size = teacher, image_size
        self.encoder: VisionEncoder | None = None

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        super().build(model)
        with at_path(f"algorithms.{self.name}.teacher"):
            self.encoder = VisionEncoder(self.teacher)
        if self.image_size < self.encoder.patch_size:
            raise ValueError(
                f"image_size must be at least {self.encoder.patch_size}, the teacher's patch size, not {self.image_size}."
            )
        return {}

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        assert self.encoder is not None
        sides = fit_size(target.shape[-2], target.shape[-1], self.image_size, self.encoder.patch_size)
        return patch_dissimilarity(self.encoder, resize_antialiased(prediction, *sides), resize_antialiased(target, *sides))

    def release(self) -> None:
        self.encoder = None


# --------------------------------------------------------------------------------------------------------- LPIPS


Net = Literal["vgg", "alex", "squeeze"]
_TORCHVISION: dict[str, tuple[str, str]] = {
    "vgg": ("vgg16", "VGG16"), "alex": ("alexnet", "AlexNet"), "squeeze": ("squeezenet1_1", "SqueezeNet 1.1")
}  # fmt: skip
_MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17}  # below, a pooling layer has nothing left to pool


_EPSILON = 1e-10  # the lpips package's own, added to lengths


def _places(predicted: Tensor, expected: Tensor, head: Tensor) -> tuple[Tensor, ...]:
    """Return what the distance at every place is made of, (B, H, W) each, from features that are read once.

    With the length |p| = √Σ p², a = 1/(|p| + ε) and b = 1/(|q| + ε) of the features p and q over channels,

        Σ w·(a·p − b·q)² = a²·Σ w·p² − 2ab·Σ w·p·q + b²·Σ w·q²

    Returns:
        |p|, b, Σ w·p², Σ w·p·q and Σ w·q².
    """
    weights = head.float()[:, None, None]
    length, other = (torch.linalg.vector_norm(features, dim=1, dtype=torch.float32) for features in (predicted, expected))
    p, q = weights * predicted, weights * expected
    return length, 1 / (other + _EPSILON), (p * predicted).sum(1), (p * expected).sum(1), (q * expected).sum(1)


class _FeatureDistance(torch.autograd.Function):
    """The squared difference of unit-length features, weighted by channel and averaged over places, in closed form.

    Compiled, it reads both features once each way and writes the gradient: five passes over them, where differences of
    normalised features take fifteen.
    """

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, expected: Tensor, head: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        length, b, own, shared, other = _places(predicted, expected, head)
        a = 1 / (length + _EPSILON)
        ctx.save_for_backward(predicted, expected, head, length, b, own, shared)
        return (a.square() * own - 2 * a * b * shared + b.square() * other).mean((1, 2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        predicted, expected, head, length, b, own, shared = ctx.saved_tensors
        a = 1 / (length + _EPSILON)
        of_length = torch.where(length > 0, a.square() * (a * own - b * shared) / length, 0.0)  # 0 has no direction
        scale = 2 * gradient[:, None, None] / length[0].numel()
        weights = head.float()[:, None, None]
        to_p, to_q = ((scale * factor)[:, None] for factor in (a.square(), a * b))
        result = predicted * (weights * to_p - (scale * of_length)[:, None]) - expected * (weights * to_q)
        return result.to(predicted.dtype), None, None


def lpips_distance(network: Any, prediction: Tensor, target: Tensor) -> Tensor:
    """Return LPIPS of two images, without an autograd graph for the target.

    The network runs in the autocast dtype, and what it gives is compared in fp32.

    Args:
        network: `lpips.LPIPS`, without gradients of its own.
        prediction, target: (B, 3, H, W) around [−1, 1].

    Returns:
        (B,), fp32; what `network(prediction, target)` gives, to 1e-6. Between images that are nearly
        alike it may lie a little below 0.
    """
    with torch.no_grad():
        target_features = network.net(network.scaling_layer(target.contiguous(memory_format=torch.channels_last)))
    features = network.net(network.scaling_layer(prediction.contiguous(memory_format=torch.channels_last)))
    heads = (head.model[-1].weight.flatten() for head in network.lins)
    with torch.autocast(prediction.device.type, enabled=False):
        layers: list[Any] = [_FeatureDistance.apply(*layer) for layer in zip(features, target_features, heads, strict=True)]
        return torch.stack(layers).sum(0)


class LPIPS(PixelLoss):
    """`lpips_distance` (arXiv:1801.03924) of the images at `scale` times their size, for a model that predicts pixels.

    Args:
        net: the network whose features are compared.
        scale: images are resized to this share of their sides first, antialiased.
        weights: torchvision's ImageNet weights of `net` as a file, instead of the one in torch.hub's cache, which is
            downloaded if it isn't there.
        random_weights: of the network, for tests.
        compile: `torch.compile` the network and the comparison, as one graph or a few for images of all sizes.
        weight, max_timestep, fraction, start, end: see `PixelLoss`.

    Raises:
        ValueError: an argument out of range, or both `weights` and `random_weights`.
        UserError: when it is attached, for a model of latents and for weights that cannot be had.
    """

    name = "lpips"

    def __init__(
        self,
        weight: float = 0.1,
        net: Net = "vgg",
        scale: float = 0.5,
        max_timestep: float = 1.0,
        fraction: float = 1.0,
        weights: str | None = None,
        random_weights: bool = False,
        compile: bool = False,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(weight, max_timestep, start, end, fraction)
        if weights is not None and random_weights:
            raise ValueError("weights and random_weights exclude each other.")
        if scale <= 0:
            raise ValueError(f"scale must be positive, not {scale}.")
        self.net: Net = net
        self.scale, self.weights, self.random_weights = scale, weights, random_weights
        self.compile, self._distance = compile, lpips_distance
        self.network: Frozen | None = None

    def find_weights(self, timeout: float) -> str | None:
        if self.random_weights:
            return None
        if self.weights is not None:
            return f"weights are in {_existing(self.weights)}"
        title, url, file = torchvision_weights(self.net)
        if file.is_file():
            return f"torchvision's {title} is in {file}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as answer:
                size = int(answer.headers.get("Content-Length") or 0)
        except (OSError, ValueError) as error:
            raise UserError(_weights_are_missing(self.net, str(getattr(error, "reason", error)))) from error
        return f"torchvision's {title} is downloaded on first use ({size / 1e6:.0f} MB)"

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        super().build(model)
        network = build_network(self.net, self.weights, self.random_weights)
        if self.compile and not makes_no_storage():
            self._distance = compile_for_all_sizes(lpips_distance)
        self.network = Frozen(network.to(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]
        return {}

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        assert self.network is not None
        height, width = target.shape[-2:]
        sides = round(self.scale * height), round(self.scale * width)
        smallest = _MIN_SIDE[self.net]
        if min(sides) < smallest:
            raise UserError(
                f"algorithms.lpips: images of {height}×{width} px at scale {self.scale} are {sides[0]}×{sides[1]}, but "
                f"net: {self.net} needs {smallest} px a side; set algorithms.lpips.scale to {smallest / min(height, width):.3g} "
                "or more, or algorithms.lpips.start to when the images are larger."
            )
        network = self.network.on(prediction.device)
        return self._distance(network, resize_antialiased(prediction, *sides), resize_antialiased(target, *sides))

    def release(self) -> None:
        self.network = None


def build_network(net: Net, weights: str | None = None, random_weights: bool = False) -> nn.Module:
    """Return `lpips.LPIPS` with the heads from its wheel and the backbone's weights from torchvision, as `LPIPS` says.

    On the meta device it has no weights.

    Raises:
        UserError: weights that cannot be had.
    """
    on_meta = makes_no_storage()
    file = None
    if not random_weights and not on_meta:
        file = _cached_weights(net) if weights is None else _existing(weights)
    import lpips

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision", category=UserWarning)  # lpips' way to name the weights
        network = lpips.LPIPS(pretrained=not on_meta, net=net, pnet_rand=True, verbose=False)
    if file is None:
        return network
    try:  # torchvision's "features.5.weight" is "slice2.5.weight" in lpips
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        network.net.load_state_dict({name: loaded["features." + name.partition(".")[2]] for name in network.net.state_dict()})
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"algorithms.lpips.weights: {file} is no {_TORCHVISION[net][1]} of torchvision's ({reason}).") from error
    return network


def _existing(weights: str) -> Path:
    if not Path(weights).is_file():
        raise UserError(f"algorithms.lpips.weights: there is no file {weights}.")
    return Path(weights)


def torchvision_weights(net: Net) -> tuple[str, str, Path]:
    """Return what torchvision's ImageNet weights of `net` are called, where they come from, and where they are kept."""
    from torchvision.models import get_model_weights

    model, title = _TORCHVISION[net]
    url: str = get_model_weights(model)["IMAGENET1K_V1"].url  # pyright: ignore[reportIndexIssue]
    return title, url, Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def _weights_are_missing(net: Net, reason: str) -> str:
    """Return the message for weights that are not here and cannot be fetched."""
    title, url, file = torchvision_weights(net)
    return (
        f"algorithms.lpips needs the {title} weights of torchvision, which are not in {file} and cannot be downloaded "
        f"from {url} ({reason}). Put the file there, or name it as algorithms.lpips.weights."
    )


def _cached_weights(net: Net) -> Path:
    """Return the file in torch.hub's cache, downloaded by one rank of the node if it isn't there. Its hash is checked then."""
    _, url, file = torchvision_weights(net)
    reason = None
    with dist.run_local_rank_zero_first():  # the others wait for it: nothing may be raised inside
        if not file.is_file():
            try:
                torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
            except (OSError, RuntimeError) as error:
                reason = str(error)
    if reason is not None:
        raise UserError(_weights_are_missing(net, reason))
    return file
