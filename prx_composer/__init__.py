"""Train your own text-to-image diffusion transformer in a day, on MosaicML Composer."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("prx-composer")
except PackageNotFoundError:  # a copied folder
    __version__ = "0.0"
