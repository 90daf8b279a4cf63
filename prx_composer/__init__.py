"""Train your own text-to-image diffusion transformer in a day, on MosaicML Composer."""

__version__ = "0.1.0"
