"""TensorBoard: one folder of event files for all of a run's restarts, in which every step is there once."""

from typing import Any

import numpy as np
import yaml
from composer.core import State
from composer.loggers import Logger, TensorboardLogger
from composer.utils import dist
from torch import Tensor

from prx_composer.common.pages import image_grid
from prx_composer.loggers.tracker import Tracker
from prx_composer.runs.checkpoints import Checkpoint


class TensorBoard(Tracker, TensorboardLogger):
    """Composer's TensorboardLogger; scalars, drawings with their prompts, and the recipe as text.

    A resumed run goes on in the same folder, `<log_dir>/<run_name>`. Its event file says from which step on what the files before
    it contain is void, so that no step is there twice. Each start writes one event file; Composer's own logger begins another
    at every flush, for uploads. What is written before a checkpoint is on the disk by then.

    Args:
        log_dir: `tensorboard_logs` by default.
        flush_interval: write to the disk every so many batches.
        rank_zero_only: or every rank its own.
    """

    name = "tensorboard"

    @property
    def _enabled(self) -> bool:
        return not self.rank_zero_only or dist.get_global_rank() == 0

    def init(self, state: State, logger: Logger) -> None:
        if self._enabled:  # Composer's own opens a file on every rank
            super().init(state, logger)

    def after_load(self, state: State, logger: Logger) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is not None and int(state.timestamp.batch) > 0:
            folder = self.writer.get_logdir()
            self.writer.close()
            self.writer = SummaryWriter(folder, purge_step=int(state.timestamp.batch) + 1, flush_secs=365 * 24 * 3600)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._enabled:
            self.hyperparameters.update(hyperparameters)

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        if self.writer is not None:
            with self._without_stopping("the recipe"):
                text = yaml.safe_dump(self.hyperparameters, sort_keys=False, allow_unicode=True)
                self.writer.add_text("recipe", f"```yaml\n{text}```", global_step=int(state.timestamp.batch))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.writer is not None:
            with self._without_stopping("metrics"):
                super().log_metrics(metrics, self._step(step))

    def log_images(self, *args: Any, **options: Any) -> None:
        if self.writer is not None:
            with self._without_stopping("images"):
                super().log_images(*args, **options | {"step": self._step(options.get("step"))})

    def log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None:
        if self.writer is not None:
            with self._without_stopping("images"):
                grid = np.asarray(image_grid(images, prompts))
                self.writer.add_image("images", grid, global_step=self._step(step), dataformats="HWC")

    def log_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._write()

    def eval_end(self, state: State, logger: Logger) -> None:  # Composer's own writes hyperparameters here, each time anew
        self._write()

    def close(self, state: State, logger: Logger) -> None:
        if self.writer is not None:
            with self._without_stopping("the last metrics"):
                self.writer.close()
            self.writer = None

    def _flush(self, logger: Logger) -> None:
        self._write()

    def _write(self) -> None:
        if self.writer is not None:
            with self._without_stopping("metrics"):
                self.writer.flush()
