"""The base of every trick: read this file alone to write one of your own.

A trick is a Composer algorithm that changes a model before training and acts inside of a window of it. Say what it is in class
attributes, take its settings in `__init__`, fill the model's seams in `attach`, and follow the window in `set_active`:

    @registry.algorithms.register("louder")
    class Louder(Trick):
        name = "louder"

        shapes_sampling = True  # the model draws with it too

        def __init__(self, gain: float = 2.0, start: str = "0ba", end: str | None = None):
            super().__init__(start, end)
            self.gain = gain

        def attach(self, model, optimizer):
            with seeded_initialisation(model.random.seed, self.name):
                self.conditioner = Gain(model.backbone.hidden_size, self.gain)  # a module, Conditioning → Conditioning
            model.backbone.conditioners[self.name] = self.conditioner
            add_parameters(optimizer, self.conditioner)

        def set_active(self, model, active):
            self.conditioner.active = active

An auxiliary loss is a `LossTrick`: it says `loss` and, if it trains or loads something, `build`. An algorithm that needs other
events than these two overrides `match` and `apply`, as `ema` does. The seams are listed in algorithms/README.md.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

from prx_composer.common.distributed import unwrapped
from prx_composer.common.errors import UserError
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.flow import AuxiliaryLoss, FlowOutput
from prx_composer.models.processes import Process
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.optim import add_parameters
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import PlannedStage
from prx_composer.recipe.evidence import Evidence, hurting
from prx_composer.schedule.moments import Moment, ScheduleWindow

log = logging.getLogger(__name__)


class Trick(Algorithm):
    """A Composer algorithm that the program can check, plan, switch on and off, and attach again to draw images.

    Args:
        start, end: window, as time strings.

    Attributes:
        name: in the recipe, in the log, and in messages as `algorithms.<name>`.
        window: when the trick acts.
        active: whether the window was open when the last step began. Before the first step: whether it opens with the run.
        has_begun: whether it has begun for good, so that it goes on, also when a longer run puts its `start` off.
        needs_image: whether it looks at `batch["image"]`, which stored latents leave out unless train_loader.images is true.
        instead_of_images: what else could be done then, for the message that says so; begins with ", or".
        shapes_sampling: whether it changes how the model draws, so that `generate` and `export` must attach it too.
        experimental: whether nobody has measured yet what it is good for. A run says so once; nothing is refused for it.
        saves_memory: whether a step takes less memory while it acts, so that one without it is tried before training too.
        weight_copies: how many copies of the trained weights it keeps, on the device and in checkpoints.
        weight_passes: for `prx plan`: how often it reads or writes all of the trained weights or their gradients in a step, on
            average. The search for gradients that are not finite is not in it: every run makes it.
        columns: what it reads of a batch beside images, captions and latents: column → channels of a grid (h, w, channels).
        not_counted: for `prx plan`: what the count of a step cannot tell of it, in words.
        evidence: what was measured of it, at which image size. It is read from the source: literals and PRX_PART_2.
    """

    name: str
    needs_image: bool = False
    instead_of_images: str = ""
    shapes_sampling: bool = False
    experimental: bool = False
    saves_memory: bool = False
    weight_copies: int = 0
    weight_passes: float = 0.0
    columns: Mapping[str, int] = {}
    not_counted: str = ""
    evidence: Sequence[Evidence] = ()
    has_begun: bool = False

    def __init__(self, start: str = "0ba", end: str | None = None):
        self.window = ScheduleWindow(start, end)
        self.active = self.window.start.is_beginning
        self._released = False

    @property
    def windows(self) -> dict[str, ScheduleWindow]:
        """Return when it does what, by what follows `algorithms.` in messages."""
        return {self.name: self.window}

    @property
    def schedule(self) -> str:
        """Return what it does when, in words for `prx plan`; "" where its window tells."""
        return ""

    @property
    def next_switch(self) -> Moment | None:
        """Return when the run goes over to another image size, which a time budget tells; None if the trick doesn't know."""
        return None

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        """Raise UserError for what the trick cannot be combined with, before anything is attached or loaded.

        Args:
            recipe: of the run; None in a Trainer of one's own, which has none.
            others: the other algorithms of the run, this one left out.
            backbone: on any device, meta too; None if it isn't known.
        """

    def advise(self, stages: Sequence[PlannedStage]) -> Iterator[str]:
        """Yield what should be known of the trick in a run that trains all the same: lines `!` of `prx check`.

        By default that is what its `evidence` says against it, at the image sizes at which it acts.

        Args:
            stages: of the run, with their image sizes, batches and windows.
        """
        acting = [stage for stage in stages if not stage.window.is_disjoint_from(self.window)]
        for size in sorted({stage.image_size for stage in acting}):
            for one in hurting(self.evidence, size):
                yield (
                    f"at {size} px it may do harm: {one}. Leave it out at that size, by algorithms.{self.name}.start and end, "
                    "or compare runs with and without it."
                )

    def check_flow(self, flow: Process) -> None:
        """Raise UserError for a process, `model.flow`, that the trick means nothing with; before and while it is attached."""

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Fill the model's seams, once, before DDP or FSDP2 wrap it. Then `set_active` is told whether the trick begins on.

        Under `torch.device("meta")` it is asked to do the same without storage, so that the run can be checked and counted
        anywhere: networks are then made from their configuration, and nothing is downloaded or loaded.

        Args:
            model: such as `TextToImage`.
            optimizer: takes what is trained (`optim.add_parameters`); None for a model that is only drawn from.

        Raises:
            UserError, ValueError: the trick cannot be used with this model; the latter is given the path `algorithms.<name>`.
        """

    def set_active(self, model: Any, active: bool) -> None:
        """Switch what was attached on or off, when the window opens and closes; it may be told the same twice.

        Whoever tries or counts a step calls it too, and afterwards sets it back to `active`.
        """

    def release(self) -> None:
        """Let go of what is needed no more, such as a teacher, when the window has closed for good."""

    def hardware_problem(self) -> str | None:
        """Return why the GPU that this process uses cannot run the trick, in words; None if it can."""
        return None

    def find_weights(self, timeout: float) -> str | None:
        """Return where the weights are that the trick downloads by itself, for `prx check`; None if it downloads none.

        What `teacher` names, a vision encoder by hub id or folder or as a `TeacherSpec`, is looked for without it.

        Args:
            timeout: in seconds, of one answer.

        Raises:
            UserError: they cannot be had.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the trick; `active` is what a model is drawn with afterwards."""
        return {"active": self.active}

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self.attach_to(state)
        elif event == Event.BATCH_START:
            self.follow_window(state)

    def attach_to(self, state: State) -> None:
        """Check and attach, at Event.INIT."""
        model = unwrapped(state.model)
        others = [other for other in state.algorithms if other is not self]
        self.check(None, others, getattr(model, "backbone", None))
        try:
            self.attach(model, state.optimizers[0] if state.optimizers else None)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"algorithms.{self.name}: {error}") from error
        self.set_active(model, self.active)
        if self.experimental and dist.get_global_rank() == 0:
            log.warning("algorithms.%s is experimental: what it is good for has not been measured yet.", self.name)

    def follow_window(self, state: State) -> None:
        """Tell `set_active` when the window opens or closes, and `release` when it has closed for good; at Event.BATCH_START."""
        active = self.window.contains(state)
        if active != self.active:
            self.active = active
            self.set_active(unwrapped(state.model), active)
        if not self._released and self.window.is_over(state):
            self._released = True
            self.release()


class _Term(AuxiliaryLoss):
    """Hold what a `LossTrick` trains, as a module of the model, for checkpoints, optimizer, DDP and FSDP2."""

    def __init__(self, trick: "LossTrick", trained: Mapping[str, nn.Module | nn.Parameter]):
        super().__init__(trick.weight)
        self.active = False
        self.trick = trick
        for name, part in trained.items():
            setattr(self, name, part)

    def forward(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        return self.trick.loss(outputs, batch)


def unsuited(name: str, backbone: Any, why: str) -> UserError:
    """Return the error of an algorithm, by its name, that means nothing with a kind of backbone; `why` is a clause."""
    title = getattr(backbone, "class_name", type(backbone).__name__)
    return UserError(f"algorithms.{name} doesn't go with {title}: {why}. Leave it out, or train another backbone.")


def no_block(path: str, block: int, depth: int) -> str:
    """Return the message for a block that a backbone of that depth doesn't have, given at a YAML path."""
    return f"{path}: {block} is no block of model.backbone, which has {depth}, counted from 0 to {depth - 1}."


class LossTrick(Trick):
    """A loss beside the flow-matching one, as `model.auxiliary_losses[name]` and, in the log, `loss/train/<name>`.

    Trained parts join the optimizer. Their first weights depend on the run's seed and `name` alone. The blocks whose output the
    loss reads are tapped inside of the window alone.

    Args:
        weight: of the term in the total loss.
        start, end: window, as time strings.

    Attributes:
        flow: the process that the model learns, once attached; `flow.to_x0` tells the predicted image.
        taps: indices of the blocks whose output it reads from `FlowOutput.taps`, and `TIME_VECTOR` if it reads that.
        needs_whole_image: whether it has no meaning when some tokens have no prediction.
        term: the module in the model, once attached. A bare parameter is read from it, since FSDP2 puts others in its place.

    Raises:
        ValueError: a negative weight.
    """

    taps: tuple[int, ...] = ()
    needs_whole_image: bool = False

    def __init__(self, weight: float, start: str = "0ba", end: str | None = None):
        super().__init__(start, end)
        if weight < 0:
            raise ValueError(f"weight must not be negative, but is {weight}.")
        self.weight = weight
        self.flow: Any = None  # a Process
        self.term: Any = None

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        """Load what the loss needs, keep it in attributes, and return what is trained by its name in checkpoints.

        Raises:
            UserError, ValueError: a model that the loss cannot be used with, weights that cannot be had.
        """
        return {}

    @abstractmethod
    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a microbatch, a scalar before `weight`: a mean over the images, so that microbatches add up."""

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        self._check_taps(backbone)

    def _check_taps(self, backbone: Any) -> None:
        if backbone is None:
            return
        if self.taps and not (hasattr(backbone, "depth") and hasattr(backbone, "taps")):
            raise unsuited(self.name, backbone, "it says neither depth nor taps, from which the outputs of its blocks come")
        for block in self.taps:
            if block != TIME_VECTOR and not 0 <= block < backbone.depth:
                raise UserError(no_block(f"algorithms.{self.name}.block", block, backbone.depth))

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        if not hasattr(model, "auxiliary_losses"):
            raise UserError(f"algorithms.{self.name} needs a model with `auxiliary_losses`, such as text_to_image.")
        if self.name in model.auxiliary_losses:
            raise UserError(f"algorithms.{self.name} is there twice; one of them is enough.")
        self.check_flow(model.flow)
        self.flow = model.flow
        with seeded_initialisation(model.random.seed, self.name):
            trained = self.build(model)
        self._check_taps(getattr(model, "backbone", None))
        self.term = _Term(self, trained)
        model.auxiliary_losses[self.name] = self.term
        add_parameters(optimizer, self.term)

    def set_active(self, model: Any, active: bool) -> None:
        if active == self.term.active:
            return
        self.term.active = active
        if self.taps:
            taps = list(model.backbone.taps)
            for block in self.taps:
                taps.append(block) if active else taps.remove(block)
            model.backbone.taps = tuple(sorted(taps))
