"""MLflow: one run for all of a run's restarts, in a store on the disk or on a server."""

import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import yaml
from composer.core import State
from composer.loggers import Logger, MLFlowLogger
from torch import Tensor

from prx_composer.common.pages import picture
from prx_composer.loggers.tracker import Tracker, remembered_run, run_folder_of

log = logging.getLogger(__name__)

_LONGEST_VALUE = 500  # characters that servers of any age take
_LONGEST_KEY = 250
_PER_BATCH = 100
_RUN_ID = "MLFLOW_RUN_ID"


def parameters(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """A nested recipe as MLflow's parameters: `algorithms.ema.half_life` and so on, values as text of at most 500 characters.

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

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._enabled:
            with self._without_stopping("metrics"):
                step = self._step(step)
                new = {name: value for name, value in metrics.items() if self._last_steps is None or step > self._last(name)}
                if new:
                    super().log_metrics(new, step)

    def _last(self, name: str) -> int:
        """The last step of a metric that the store had when the run went on."""
        assert self._last_steps is not None and isinstance(self._run_id, str)
        if name not in self._last_steps:
            history = self._mlflow_client.get_metric_history(self._run_id, self.rename(name))
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]

    def log_images(self, *args: Any, **options: Any) -> None:
        with self._without_stopping("images"):
            super().log_images(*args, **options | {"step": self._step(options.get("step"))})

    def log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None:
        if not self._enabled:
            return
        with self._without_stopping("images"):
            assert isinstance(self._run_id, str)
            for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                words = re.sub(r"[^\w\-. ]", "", prompt, flags=re.ASCII)[:80].strip()
                self._mlflow_client.log_image(
                    self._run_id, picture(image), key=f"images/{index} {words}".strip(), step=self._step(step)
                )

    def log_table(self, *args: Any, **options: Any) -> None:
        with self._without_stopping("tables"):
            super().log_table(*args, **options)
