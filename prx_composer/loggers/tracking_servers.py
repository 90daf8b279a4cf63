"""Trackers with a server: Weights & Biases and MLflow, each with one run for all of a run's restarts."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from composer.core import State
from composer.loggers import Logger, MLFlowLogger, WandBLogger
from composer.utils import dist
from packaging.version import Version
from torch import Tensor

from prx_composer.common.distributed import from_rank_zero
from prx_composer.common.errors import UserError, redacted, redacted_text
from prx_composer.common.pages import picture
from prx_composer.loggers.trackers import Tracker, remembered_run, run_folder_of
from prx_composer.runs.checkpoints import INDEX, Checkpoint

log = logging.getLogger(__name__)

_ASKS_NO_SERVER = Version("0.19.4")  # before, a table waits minutes for the server even offline (wandb/wandb#8957)


def wandb_mode(init_kwargs: dict[str, Any] | None) -> str:
    """Return what `wandb.init` will take as its mode."""
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

    def log_table(self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None) -> None:
        if self._sends(step):
            import wandb

            with self._without_stopping("tables"):  # Composer's own names an argument that wandb's Table doesn't have
                self._run.log({name: wandb.Table(columns=columns, data=rows)}, step=self._step(step))

    def _log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None:
        import wandb

        drawings = [wandb.Image(picture(image), caption=prompt) for image, prompt in zip(images, prompts, strict=True)]
        rows = [[step, prompt, drawing] for prompt, drawing in zip(prompts, drawings, strict=True)]
        table = wandb.Table(columns=["step", "prompt", "image"], data=rows)
        self._run.log({"images": drawings, "images_table": table}, step=step)

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

    def _sends(self, step: int | None) -> bool:
        """Return whether it is sent: not on other ranks, nor what wandb has from before a restart, of which it would warn."""
        return self._run is not None and self._step(step) >= self._run.starting_step


@contextmanager
def _redacted_command() -> Iterator[None]:
    """Hide secrets in the command inside of this context: wandb keeps it with every run."""
    arguments = sys.argv
    sys.argv = [redacted_text(argument) for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments


_LONGEST_VALUE = 500  # characters that servers of any age take
_LONGEST_KEY = 250
_PER_BATCH = 100
_RUN_ID = "MLFLOW_RUN_ID"


def parameters(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield a nested recipe as MLflow's parameters: `algorithms.ema.half_life` …, with at most 500 characters as values.

    Lists of plain values are one parameter, lists of mappings one for each key in them.
    """
    if isinstance(value, dict) and value:
        for key, item in value.items():
            name = re.sub(r"[^\w\-./ ]", "_", str(key), flags=re.ASCII)
            yield from parameters(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from parameters(item, f"{path}.{index}")
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        shortened = text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
        yield path[:_LONGEST_KEY], shortened


class MLflow(Tracker, MLFlowLogger):
    """Composer's MLFlowLogger; parameters, the recipe as the artefact `config.yaml`, metrics, and drawings with their prompts.

    A resumed run goes on in the same run of MLflow, whose id is in `<run folder>/tracking.json`, unless MLFLOW_RUN_ID gives
    another or `resume` lets Composer search by name. A metric's steps that the store has are not logged again. Parameters cannot
    be changed at MLflow: those of the first start stay, and `config.yaml` is the newest start's.
    """

    name = "mlflow"
    _last_steps: dict[str, int] | None = None  # of a run that goes on

    @property
    def tracked_run(self) -> str | None:
        return self._run_id if self._enabled else None

    def _start_mlflow_run(self, state: State) -> None:
        known = remembered_run(run_folder_of(state), self.name)
        if known is None or self.resume or os.environ.get(_RUN_ID) or not self._is_there(known):
            super()._start_mlflow_run(state)
            return
        os.environ[_RUN_ID] = known  # how Composer takes a run's id
        try:
            super()._start_mlflow_run(state)
        finally:
            del os.environ[_RUN_ID]

    def _is_there(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        try:
            if self._mlflow_client.get_run(run_id).info.lifecycle_stage == "active":
                return True
            reason = "it was deleted"
        except MlflowException as error:
            reason = str(error)
        log.warning("loggers.mlflow: %s has no run %s (%s); a new one begins.", self.tracking_uri, run_id, reason)
        return False

    def after_load(self, state: State, logger: Logger) -> None:
        super().after_load(state, logger)
        self._last_steps = {} if int(state.timestamp.batch) > 0 else None

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if not self._enabled or not self._run_id:
            return
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        with self._without_stopping("the recipe"):
            known = self._mlflow_client.get_run(self._run_id).data.params
            new = [Param(key, text) for key, text in parameters(hyperparameters) if key not in known]
            for start in range(0, len(new), _PER_BATCH):
                self._mlflow_client.log_batch(self._run_id, params=new[start : start + _PER_BATCH])
            if "run_name" in hyperparameters:  # the recipe, and not one of Composer's own facts
                text = yaml.safe_dump(hyperparameters, sort_keys=False, allow_unicode=True)
                self._mlflow_client.log_text(self._run_id, text, "config.yaml")

    def _sends(self, step: int | None) -> bool:
        return self._enabled

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._enabled:
            with self._without_stopping("metrics"):
                step = self._step(step)
                new = {name: value for name, value in metrics.items() if self._last_steps is None or step > self._last(name)}
                if new:
                    super().log_metrics(new, step)

    def _last(self, name: str) -> int:
        """Return the last step of a metric that the store had when the run went on."""
        assert self._last_steps is not None and isinstance(self._run_id, str)
        if name not in self._last_steps:
            history = self._mlflow_client.get_metric_history(self._run_id, self.rename(name))
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]

    def _log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None:
        assert isinstance(self._run_id, str)
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            words = re.sub(r"[^\w\-. ]", "", prompt, flags=re.ASCII)[:80].strip()
            self._mlflow_client.log_image(self._run_id, picture(image), key=f"images/{index} {words}".strip(), step=step)

    def log_table(self, *args: Any, **options: Any) -> None:
        with self._without_stopping("tables"):
            super().log_table(*args, **options)
