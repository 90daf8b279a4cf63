"""The model: read `text_to_image.py` first, then `backbone.py` and `processes.py`."""

from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.diffusion import DDPM, EDM
from prx_composer.models.encoders import HuggingFaceTextEncoder
from prx_composer.models.flow import AuxiliaryLoss, FlowOutput
from prx_composer.models.processes import FlowMatching
from prx_composer.models.text_to_image import TextToImage
