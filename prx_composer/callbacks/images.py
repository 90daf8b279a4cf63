"""Grids of generated images with their prompts, during training and at its end."""

import logging
from pathlib import Path

import torch
from composer.core import Callback, Event, State, Time
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from prx_composer.common.distributed import unwrapped
from prx_composer.common.errors import UserError
from prx_composer.common.pages import image_grid
from prx_composer.loggers.tracker import log_drawings
from prx_composer.metrics.grid_artifacts import VISIBLE_GRID, can_measure_grid, grid_energy, seam_energy
from prx_composer.models.sampling import check_guidance_scale, check_seeds
from prx_composer.models.text_to_image import TextToImage
from prx_composer.schedule.clock import with_rehearsal
from prx_composer.schedule.moments import Point

log = logging.getLogger(__name__)


def unwrap(state: State) -> TextToImage:
    """The model itself, without what DDP puts around it."""
    model = unwrapped(state.model)
    if not isinstance(model, TextToImage):
        raise TypeError(f"This callback draws with a TextToImage model, not a {type(model).__name__}.")
    return model


def check_size(state: State, height: int, width: int, path: str) -> None:
    """Raises UserError, before training, if the model cannot draw images of that size."""
    model = unwrap(state)
    multiple = model.backbone.patch_size * model.autoencoder.downsampling
    if height % multiple or width % multiple:
        raise UserError(f"{path}: {height}×{width} is not divisible by {multiple} (patch_size × autoencoder downsampling).")


def draw_images(
    state: State,
    prompts: list[str],
    height: int,
    width: int,
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 256,
) -> Tensor:
    """Draws on every rank, with averaged weights when there are any and without touching training's random state.

    Returns:
        uint8 (len(prompts), 3, height, width), on the CPU.
    """
    model = unwrap(state)
    drawn = []
    with model.sampling_weights(), get_precision_context(state.precision, state.precision_config):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            images = model.generate(prompts[part], height, width, seeds[part], num_inference_steps, guidance_scale)
            drawn.append(images.cpu())
    return torch.cat(drawn)


class Images(Callback):
    """Draws the same prompts from the same seeds at an interval and at the end.

    Grids go to `<run folder>/images/ba<batch>.png` and to every logger that takes images (wandb, TensorBoard, MLflow). Also logs
    `images/grid_energy` and `images/seam_energy`, medians over the images of how much of the grid of patches shows in them (1 =
    nothing), if there are enough patches to tell, and warns when one can see it.

    Args:
        prompts: one image each.
        folder: the run folder.
        image_size: side of the image, unless `height` and `width` are given. With progressive resolution it is the size that the
            model is trained at by then; else the recipe's.
        interval: a time string, such as "0.25dur" or "1000ba".
        height, width: for other aspect ratios.
        seed: of the first image; the next ones count on.
        num_inference_steps: Euler steps.
        guidance_scale: 1 = unguided.
    """

    def __init__(
        self,
        prompts: list[str],
        folder: str,
        image_size: int,
        interval: str = "0.25dur",
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
    ):
        if not prompts:
            raise ValueError("prompts must name at least one prompt.")
        self.prompts = list(prompts)
        self.folder = Path(folder) / "images"
        self._given = (height, width)
        self.height, self.width = height or image_size, width or image_size
        self.seeds = [seed + index for index in range(len(prompts))]
        check_seeds(self.seeds)
        check_guidance_scale(guidance_scale)
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        Point.parse_interval(interval)
        self._due = with_rehearsal(create_interval_scheduler(Time.from_timestring(interval), include_end_of_training=True))

    def init(self, state: State, logger: Logger) -> None:
        check_size(state, self.height, self.width, "callbacks.images.height and width")
        unwrap(state).say_what_is_lost(self.prompts)

    def batch_start(self, state: State, logger: Logger) -> None:  # later in the step the loader may be in the next stage already
        if (stage_size := getattr(state.train_dataloader, "image_size", None)) is not None:
            self.height, self.width = (side or stage_size for side in self._given)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._draw_if_due(Event.BATCH_CHECKPOINT, state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._draw_if_due(Event.EPOCH_CHECKPOINT, state, logger)

    def _draw_if_due(self, event: Event, state: State, logger: Logger) -> None:
        if not self._due(state, event):
            return
        images = draw_images(
            state, self.prompts, self.height, self.width, self.seeds, self.num_inference_steps, self.guidance_scale
        )
        if dist.get_global_rank() == 0:
            path = self.folder / f"ba{int(state.timestamp.batch):06d}.png"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                image_grid(images, self.prompts).save(path)
                log.info("Drew %s", path)
            except OSError as error:  # a full disk: no reason to lose the run
                log.error("%s cannot be written: %s", path, error)
        log_drawings(logger, images, self.prompts, int(state.timestamp.batch))
        self._look_for_grid(images, state, logger)

    def _look_for_grid(self, images: Tensor, state: State, logger: Logger) -> None:
        model = unwrap(state)
        patch_size = model.backbone.patch_size * model.autoencoder.downsampling
        if not can_measure_grid(self.height, self.width, patch_size):
            return
        for name, measure in {"grid": grid_energy, "seam": seam_energy}.items():
            energy = measure(images, patch_size).median().item()
            logger.log_metrics({f"images/{name}_energy": energy})
            if energy > VISIBLE_GRID and dist.get_global_rank() == 0:
                log.warning("The grid of patches shows in the images: %s energy %.1f, where 1 is nothing.", name, energy)
