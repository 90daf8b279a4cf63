"""Weights & Biases: one run for all of a run's restarts, tables of drawings, and checkpoints as artefacts."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from composer.core import State
from composer.loggers import Logger, WandBLogger
from composer.utils import dist
from packaging.version import Version
from torch import Tensor

from prx_composer.common.distributed import from_rank_zero
from prx_composer.common.errors import UserError, redacted, redacted_text
from prx_composer.common.pages import picture
from prx_composer.loggers.tracker import Tracker, remembered_run, run_folder_of
from prx_composer.runs.checkpoints import INDEX, Checkpoint

_ASKS_NO_SERVER = Version("0.19.4")  # before, a table waits minutes for the server even offline (wandb/wandb#8957)


def wandb_mode(init_kwargs: dict[str, Any] | None) -> str:
    """What `wandb.init` will take as its mode."""
    return (init_kwargs or {}).get("mode") or os.environ.get("WANDB_MODE") or "online"


class WandB(Tracker, WandBLogger):
    """Composer's WandBLogger; config, metrics, drawings with their prompts, and checkpoints on request.

    A resumed run goes on in the same run of wandb, whose id is in `<run folder>/tracking.json`, unless `init_kwargs.id` or
    WANDB_RUN_ID gives another. wandb takes no step twice: what is trained again after a kill, since the last checkpoint, is not
    sent again.

    Args:
        project, group, name, entity, tags: as `wandb.init` has them.
        log_artifacts: log every complete checkpoint, whole, as an artefact of type "model", also where its shards were written
            by several ranks. wandb copies the files before it uploads them.
        rank_zero_only: or a run of wandb for every rank.
        init_kwargs: more arguments of `wandb.init`.
    """

    name = "wandb"

    def __init__(
        self,
        project: str | None = None,
        group: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        tags: list[str] | None = None,
        log_artifacts: bool = False,
        rank_zero_only: bool = True,
        init_kwargs: dict[str, Any] | None = None,
    ):
        # Composer warns that rank 0 lacks the other ranks' files; it has whole checkpoints here.
        super().__init__(project, group, name, entity, tags, False, rank_zero_only, dict(init_kwargs or {}))
        self._log_artifacts = log_artifacts

    @property
    def tracked_run(self) -> str | None:
        run = self._run
        return run.id if run is not None and not run.disabled else None

    @property
    def _run(self) -> Any:
        import wandb

        return wandb.run if self._enabled else None

    def init(self, state: State, logger: Logger) -> None:
        import wandb
        from wandb.util import generate_id

        given = self._init_kwargs
        if not given.get("id") and not os.environ.get("WANDB_RUN_ID"):
            run_id = from_rank_zero(remembered_run(run_folder_of(state), self.name) or generate_id())
            rank = dist.get_global_rank()
            given["id"] = run_id if rank == 0 else f"{run_id}-rank{rank}"
        mode = wandb_mode(given)
        if mode == "online" and not os.environ.get("WANDB_RESUME"):
            given.setdefault("resume", "allow")
        if mode in ("offline", "dryrun") and Version(wandb.__version__) < _ASKS_NO_SERVER:
            given["settings"] = {"allow_offline_artifacts": False} | dict(given.get("settings") or {})
        try:
            with _redacted_command():
                super().init(state, logger)
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"loggers.wandb: wandb.init fails: {error}. Mend that, set WANDB_MODE=offline, or set loggers.wandb=false."
            ) from error

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._run is not None:
            with self._without_stopping("the recipe"):
                self._run.config.update(hyperparameters, allow_val_change=True)  # what may change when a run goes on

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if not self._refuses(step):
            with self._without_stopping("metrics"):
                super().log_metrics(metrics, self._step(step))

    def log_table(self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None) -> None:
        if not self._refuses(step):
            import wandb

            with self._without_stopping("tables"):  # Composer's own names an argument that wandb's Table doesn't have
                self._run.log({name: wandb.Table(columns=columns, data=rows)}, step=self._step(step))

    def log_images(self, *args: Any, **options: Any) -> None:
        if not self._refuses(options.get("step")):
            with self._without_stopping("images"):
                super().log_images(*args, **options | {"step": self._step(options.get("step"))})

    def log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None:
        if self._refuses(step):
            return
        import wandb

        with self._without_stopping("images"):
            drawings = [wandb.Image(picture(image), caption=prompt) for image, prompt in zip(images, prompts, strict=True)]
            rows = [[self._step(step), prompt, drawing] for prompt, drawing in zip(prompts, drawings, strict=True)]
            table = wandb.Table(columns=["step", "prompt", "image"], data=rows)
            self._run.log({"images": drawings, "images_table": table}, step=self._step(step))

    def log_checkpoint(self, checkpoint: Checkpoint) -> None:
        if not self._log_artifacts or self._run is None:
            return
        import wandb

        with self._without_stopping("a checkpoint"):
            index = checkpoint.index()
            metadata = {key: index[key] for key in ("batch", "ranks", "torch")}
            artifact = wandb.Artifact(f"{self._run.id}-checkpoint", type="model", metadata=metadata)
            for file in sorted(checkpoint.path.iterdir()):
                if file.name != INDEX:
                    artifact.add_file(str(file), name=file.name)
            with artifact.new_file(INDEX) as file:  # it has the recipe in it
                json.dump(redacted(index), file, indent=1)
            self._run.log_artifact(artifact, aliases=["latest", checkpoint.path.name])

    def _refuses(self, step: int | None) -> bool:
        """Whether nothing is sent: on other ranks, and what wandb has from before a restart (it would warn, step by step)."""
        return self._run is None or self._step(step) < self._run.starting_step


@contextmanager
def _redacted_command() -> Iterator[None]:
    """wandb keeps the command of every run."""
    arguments = sys.argv
    sys.argv = [redacted_text(argument) for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments
