"""What the tests of REPA, its adapter and iREPA share: a tiny teacher, and an algorithm attached as the Trainer does it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from composer.core import Event, State
from composer.devices import DeviceCPU

from prx_composer.algorithms.repa import REPA, Alignment
from prx_composer.models import TextToImage
from prx_composer.models.encoders import TeacherSpec
from prx_composer.optim import AdamW

Build = Callable[..., TextToImage]
Batch = dict[str, torch.Tensor]

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
DINO = dict(model_type="dinov2", image_size=16, patch_size=4, mlp_ratio=2, **SIZES)
ROWS, COLUMNS = 4, 6  # of a tiny batch's 16×24 images in patches of 4


def make_teacher(path: Path) -> Path:
    """A tiny DINOv2 with its image processor, as on the hub."""
    torch.manual_seed(0)
    arguments = {key: value for key, value in DINO.items() if key != "model_type"}
    transformers.Dinov2Model(transformers.Dinov2Config(**arguments)).save_pretrained(path)  # pyright: ignore[reportArgumentType]
    transformers.BitImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]).save_pretrained(path)
    return path


def attach(model: TextToImage, algorithm: Alignment) -> State:
    """As the Trainer does, up to the first batch."""
    state = State(
        model=model,
        rank_zero_seed=0,
        run_name="test",
        device=DeviceCPU(),
        max_duration="10ba",
        optimizers=AdamW(model),
    )
    algorithm.apply(Event.INIT, state, None)  # pyright: ignore[reportArgumentType]
    algorithm.apply(Event.BATCH_START, state, None)  # pyright: ignore[reportArgumentType]
    return state


def repa(**arguments: Any) -> REPA:
    return REPA(**({"teacher": TeacherSpec(config=DINO), "block": 1, "projector_hidden": 20} | arguments))


def transformers_features(folder: Path, image: torch.Tensor) -> torch.Tensor:
    """Patch features (B, N, C) of uint8 images by transformers' own processor and model."""
    processor = transformers.BitImageProcessor.from_pretrained(folder, do_resize=False, do_center_crop=False)
    pixels = processor(list(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        return transformers.AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state[:, 1:]
