"""The convolutional networks behind LPIPS as data: what each layer costs and leaves, without building one.

torchvision's VGG-16, AlexNet and SqueezeNet 1.1, cut where `lpips` cuts them.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Conv(NamedTuple):
    """A square convolution and its ReLU, which works in place."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    tapped: bool = False  # LPIPS compares its output


class Pool(NamedTuple):
    """A max-pooling layer."""

    kernel: int
    ceil: bool = False  # round the output size up


class Fire(NamedTuple):
    """SqueezeNet's module: a 1×1 convolution, then a 1×1 and a 3×3 side by side, concatenated."""

    squeeze: int
    expand: int
    tapped: bool = False


Layer = Conv | Pool | Fire

_VGG_POOL, _WIDE_POOL, _CEIL_POOL = Pool(2), Pool(3), Pool(3, ceil=True)
CONVOLUTIONAL_NETS: dict[str, tuple[Layer, ...]] = {
    "vgg": (
        Conv(64), Conv(64, tapped=True), _VGG_POOL,
        Conv(128), Conv(128, tapped=True), _VGG_POOL,
        Conv(256), Conv(256), Conv(256, tapped=True), _VGG_POOL,
        Conv(512), Conv(512), Conv(512, tapped=True), _VGG_POOL,
        Conv(512), Conv(512), Conv(512, tapped=True),
    ),
    "alex": (
        Conv(64, 11, 4, 2, tapped=True), _WIDE_POOL, Conv(192, 5, 1, 2, tapped=True), _WIDE_POOL,
        Conv(384, tapped=True), Conv(256, tapped=True), Conv(256, tapped=True),
    ),
    "squeeze": (
        Conv(64, 3, 2, 0, tapped=True), _CEIL_POOL, Fire(16, 64), Fire(16, 64, tapped=True), _CEIL_POOL,
        Fire(32, 128), Fire(32, 128, tapped=True), _CEIL_POOL,
        Fire(48, 192, tapped=True), Fire(48, 192, tapped=True), Fire(64, 256, tapped=True), Fire(64, 256, tapped=True),
    ),
}  # fmt: skip


class FeatureMap(NamedTuple):
    """What one layer makes of one image.

    Args:
        elements: values in its output.
        flops: of its convolution; a multiply and an add are two.
        parameters: weights and biases.
        pooled: it is the output of a pooling layer, which also keeps an index per value.
        tapped: LPIPS compares it.
    """

    elements: int
    flops: int = 0
    parameters: int = 0
    pooled: bool = False
    tapped: bool = False


def feature_maps(net: str, height: int, width: int) -> Iterator[FeatureMap]:
    """The layers of a network in order, for an image of height × width.

    Args:
        net: a key of `CONVOLUTIONAL_NETS`.
    """
    channels = 3
    for layer in CONVOLUTIONAL_NETS[net]:
        if isinstance(layer, Pool):
            stride = 2
            up = stride - 1 if layer.ceil else 0
            height, width = ((side - layer.kernel + up) // stride + 1 for side in (height, width))
            yield FeatureMap(channels * height * width, pooled=True)
        elif isinstance(layer, Conv):
            height, width = ((side + 2 * layer.padding - layer.kernel) // layer.stride + 1 for side in (height, width))
            yield _convolved(channels, layer.channels, layer.kernel, height * width, layer.tapped)
            channels = layer.channels
        else:
            yield _convolved(channels, layer.squeeze, 1, height * width)
            yield _convolved(layer.squeeze, layer.expand, 1, height * width)
            yield _convolved(layer.squeeze, layer.expand, 3, height * width)
            channels = 2 * layer.expand
            yield FeatureMap(channels * height * width, tapped=layer.tapped)  # the two, concatenated


def _convolved(channels_in: int, channels_out: int, kernel: int, places: int, tapped: bool = False) -> FeatureMap:
    weights = channels_in * channels_out * kernel**2
    return FeatureMap(channels_out * places, 2 * weights * places, weights + channels_out, tapped=tapped)
