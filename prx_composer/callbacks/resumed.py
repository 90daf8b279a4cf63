"""What a resume was allowed to change takes effect, though the checkpoint has the old values."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from composer.core import Callback, State, Timestamp
from composer.loggers import Logger
from torch.optim import Optimizer

from prx_composer.recipe.resume import Change

log = logging.getLogger(__name__)

_OF_SOME = "adam_"  # muon's name for what its AdamW groups call lr, betas and eps


class NewValues(Callback):
    """Puts new values where loading a checkpoint has put the old ones: into the optimizer's groups, the schedule and the seed.

    Everything else that a recipe says is held by the objects that are built from it, of which a checkpoint has counts, moments
    and weights but no settings. Which these are is tested key by key.

    Args:
        changes: that are allowed, against the recipe in the checkpoint.
    """

    def __init__(self, changes: Sequence[Change]):
        parts = [change.key.split(".") for change in changes]
        self._arguments = {part[1].partition("[")[0] for part in parts if part[0] == "optimizer" and len(part) > 1}
        self._schedule = any(part[0] == "scheduler" for part in parts)
        self._seed = any(part[0] == "seed" for part in parts)
        self._groups: list[list[dict[str, Any]]] = []  # as they were built, by optimizer
        self._built_seed = 0
        self.loaded_rate: float | None = None  # the learning rate in the checkpoint, of the first group

    def before_load(self, state: State, logger: Logger) -> None:
        self._groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in state.optimizers]
        self._built_seed = state.rank_zero_seed

    def after_load(self, state: State, logger: Logger) -> None:
        self.loaded_rate = float(state.optimizers[0].param_groups[0]["lr"])
        if self._seed:
            state.rank_zero_seed = self._built_seed
        if not (self._arguments or self._schedule):
            return
        names = {name.removeprefix(_OF_SOME) for name in self._arguments}
        for optimizer, built in zip(state.optimizers, self._groups, strict=True):
            for group, new in zip(optimizer.param_groups, built, strict=True):
                group |= {name: new[name] for name in names if name in new and name != "lr"}
            if "lr" in names or self._schedule:
                self._renew_rates(state, optimizer, [new.get("initial_lr", new["lr"]) for new in built])

    @staticmethod
    def _renew_rates(state: State, optimizer: Optimizer, rates: list[float]) -> None:
        """As if the run had had these rates and this schedule from its beginning on."""
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            before = group.get("initial_lr", group["lr"])
            group["initial_lr"] = rate
            group["lr"] = group["lr"] * rate / before if before else rate
        for scheduler in (scheduler for scheduler in state.schedulers if scheduler.optimizer is optimizer):
            scheduler.base_lrs = list(rates)
            multipliers = getattr(scheduler, "lr_lambdas", None)
            if multipliers is None:  # PyTorch's own, which has state of its own
                continue
            with _at_the_step_before(state):
                for group, rate, multiplier in zip(optimizer.param_groups, rates, multipliers, strict=True):
                    group["lr"] = rate * multiplier(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        log.info("Learning rates of the next step: %s", ", ".join(f"{group['lr']:.4g}" for group in optimizer.param_groups))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@contextmanager
def _at_the_step_before(state: State) -> Iterator[None]:
    """Composer asks a schedule at the end of a step, before it counts it, for the rate of the next one."""
    now, before = state.timestamp, state.previous_timestamp
    if int(now.batch) > 0:
        state.timestamp, state.previous_timestamp = _back(now, 1), _back(now, 2)
    try:
        yield
    finally:
        state.timestamp, state.previous_timestamp = now, before


def _back(now: Timestamp, steps: int) -> Timestamp:
    """So many steps ago, of the average size; within the epoch."""
    batch = int(now.batch)
    steps = min(steps, batch)
    samples = steps * int(now.sample) // max(batch, 1)
    return now.copy(
        batch=batch - steps,
        sample=int(now.sample) - samples,
        batch_in_epoch=max(int(now.batch_in_epoch) - steps, 0),
        sample_in_epoch=max(int(now.sample_in_epoch) - samples, 0),
    )
