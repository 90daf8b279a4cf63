"""The Composer side of every algorithm that is an auxiliary loss: attach, open, close, let go."""

from abc import abstractmethod
from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from prx_composer.common.errors import UserError
from prx_composer.models.losses import AuxiliaryLoss
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.optim.groups import add_parameters
from prx_composer.schedule.moments import ScheduleWindow


class AuxiliaryLossAlgorithm(Algorithm):
    """Fills `model.auxiliary_losses[name]` with what `build_loss` returns, and keeps it active inside of a window.

    Trainable parts of the loss join the optimizer; their first weights depend on the run's seed and `name` alone. When the
    window has closed for good the loss releases its teacher, and the blocks that it read are no longer tapped.

    Args:
        start, end: window, as time strings.
    """

    name: str  # in the recipe, in `model.auxiliary_losses`, and in the log as loss/train/<name>

    def __init__(self, start: str = "0ba", end: str | None = None):
        self.window = ScheduleWindow(start, end)
        self.loss: AuxiliaryLoss | None = None
        self._tapping = False

    @property
    def needs_image(self) -> bool:
        """Whether the loss looks at `batch["image"]`, which stored latents leave out unless train_loader.images is true."""
        return False

    @abstractmethod
    def build_loss(self, model: Any) -> AuxiliaryLoss:
        """The loss for this model. Raises UserError for a model that it cannot be used with, and for missing weights."""

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._attach(state)
        else:
            self._follow_window(state)

    def _attach(self, state: State) -> None:
        model: Any = state.model
        if not hasattr(model, "auxiliary_losses"):
            raise UserError(f"algorithms.{self.name} needs a model with `auxiliary_losses`, such as text_to_image.")
        if self.name in model.auxiliary_losses:
            raise UserError(f"algorithms.{self.name} is there twice; one of them is enough.")
        with seeded_initialisation(model.random.seed, self.name):
            try:
                self.loss = self.build_loss(model)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"algorithms.{self.name}: {error}") from error
        for block in self.loss.taps:
            if not 0 <= block < model.backbone.depth:
                raise UserError(
                    f"algorithms.{self.name}.block: {block} is no block of model.backbone, which has {model.backbone.depth}, "
                    f"counted from 0 to {model.backbone.depth - 1}."
                )
        self.loss.active = False
        model.auxiliary_losses[self.name] = self.loss
        add_parameters(state.optimizers[0], self.loss)

    def _follow_window(self, state: State) -> None:
        assert self.loss is not None
        self.loss.active = self.window.contains(state)
        if self.loss.active != self._tapping:
            self._tapping = self.loss.active
            backbone: Any = getattr(state.model, "module", state.model).backbone
            taps = list(backbone.taps)
            for block in self.loss.taps:
                taps.append(block) if self._tapping else taps.remove(block)
            backbone.taps = tuple(sorted(taps))
        if self.window.is_over(state):
            self.loss.release()
