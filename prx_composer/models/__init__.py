"""The model: see `text_to_image.py` first, then `backbone.py`, `flow.py` and `sampling.py`."""

from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.flow import FlowMatching
from prx_composer.models.losses import AuxiliaryLoss, FlowOutput
from prx_composer.models.text_encoder import HuggingFaceTextEncoder
from prx_composer.models.text_to_image import TextToImage

__all__ = ["AuxiliaryLoss", "FlowMatching", "FlowOutput", "HuggingFaceTextEncoder", "PRXBackbone", "TextToImage"]
