"""A recipe's model without storage, with its tricks attached: what is trained, what is frozen, and what a step costs.

Nothing is downloaded: networks are made from their configuration, which is in the recipe, in a folder, in the hub's cache, or in
the table of `models.huggingface`.
"""

import functools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from composer.core import Algorithm
from torch import Tensor, nn
from torch.optim import Optimizer

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError, at_path, nearest
from prx_composer.models.counting import AUTOENCODER, DENOISER, TEXT_ENCODER, CannotCount, StepCount, StepCounter
from prx_composer.models.huggingface import Frozen, UnknownConfiguration, frozen_inside
from prx_composer.models.kernels import BLOCKS, OTHER, Recorder, kernels_of
from prx_composer.models.several_encoders import parts_of
from prx_composer.optim import state_after_a_step
from prx_composer.recipe.arguments import encoder_title, entries, split, text_encoders
from prx_composer.recipe.config import Recipe
from prx_composer.runs.folder import TOKENIZER
from prx_composer.runs.model_parts import UnknownNetwork
from prx_composer.training.components import Components
from prx_composer.training.trainer import sharding

OPTION = "--leave-out"
# A schedule that is moved until it fits is planned often, and its steps cost the same, as those of its optimizer do.
_counts: dict[tuple[Any, ...], StepCount] = {}
_states: dict[tuple[Any, ...], tuple[list[Tensor], str]] = {}
_traffic: dict[tuple[Any, ...], tuple[int, int]] = {}
_IMAGES = 2  # of the step that is counted, at least: a loss may need an image's neighbour


@dataclass
class Uncounted:
    """Networks that are not counted.

    Args:
        leave_out: their names, as `--leave-out` takes them. None: nothing is refused; what cannot be counted is named.
        told: in words, what is not counted.
    """

    leave_out: Collection[str] | None = None
    told: list[str] = field(default_factory=list)

    def leaves(self, name: str, path: str) -> bool:
        """Return whether that network is to be left out; if so, it is told."""
        if name not in (self.leave_out or ()):
            return False
        self.told.append(f"{path}: left out, as {OPTION} {name} says: hours and memory are those of a run without it")
        return True

    def refuse(self, name: str, path: str, why: str, ways: str = "") -> None:
        """Tell what cannot be counted, and raise UserError if that stops the plan.

        Args:
            why: a clause without a full stop.
            ways: sentences that say what else could be done.
        """
        if self.leave_out is None:
            self.told.append(f"{path}: {why}; it is not counted")
            return
        raise UserError(f"{path} cannot be counted: {why}. {ways}{' ' if ways else ''}To plan without it: {OPTION} {name}")

    def refuse_unknown(self, name: str, path: str, network: str) -> None:
        """Refuse a network by hub id of which nothing is known here."""
        self.refuse(
            name,
            path,
            f"{network} is no folder with a config.json, is not in the hub's cache on this machine and not in the table of known "
            "encoders",
            "Give its folder (config.json is enough); or run `hf download "
            f"{network} config.json` where there is a network; or give its configuration as `config:` in place of `pretrained:`.",
        )


class _StandIn(nn.Module):
    """Stand for a text encoder or an autoencoder that cannot be made; it never runs."""

    def __init__(self, **sizes: Any):
        super().__init__()
        self.trainable = False
        vars(self).update(sizes)


class MetaModel:
    """The model and optimizer of a recipe on the meta device, with what its tricks attach to them.

    Args:
        recipe: checked.
        stored_text: text embeddings come with the data, so that no text encoder runs.
        leave_out: names of networks that are not to be counted; see `Uncounted`.

    Attributes:
        model, optimizer: on the meta device.
        tricks: those of the recipe's algorithms that are attached, by name.
        frozen: bytes of frozen weights by part: the text encoder, the autoencoder, each trick by name.
        text: how the text embeddings come about, in words.
        uncounted: what is not counted.

    Raises:
        UserError: parts that don't fit together, a model that isn't `text_to_image`, or a network that cannot be counted.
    """

    def __init__(self, recipe: Recipe, stored_text: bool = False, leave_out: Collection[str] | None = None):
        self._recipe, self._components = recipe, Components(recipe, meta=True)
        self.uncounted = Uncounted(leave_out)
        allowed = ["text_encoder", "autoencoder", *(name for name, _ in entries(recipe.algorithms, "algorithms"))]
        if unknown := [name for name in leave_out or () if name not in allowed]:
            raise UserError(f"{OPTION}: the recipe has no {unknown[0]!r} to leave out.{nearest(unknown[0], allowed)}")
        name = split(recipe.model, "model")[0]
        if "backbone" not in recipe.model:
            raise UserError(f"model: prx plan counts text_to_image with a backbone, not {name!r}.")
        self.frozen: dict[str, int] = {}
        self._stores_latents = bool(recipe.train_loader.get("latent"))
        self._stores_text = stored_text
        self.text = ""
        self._add_autoencoder()
        self._add_text_encoder()
        self.model: Any = self._components.model
        self.optimizer: Optimizer = self._components.optimizer
        self.tricks: dict[str, Trick] = {}
        for name, algorithm in self._components.algorithms.items():
            if not self.uncounted.leaves(name, f"algorithms.{name}"):
                self._attach(name, algorithm)

    @functools.cached_property
    def _counter(self) -> StepCounter:
        return StepCounter(self.model, list(self.tricks.values()), self.amp, self.graphs)

    @property
    def graphs(self) -> list[str]:
        """The parts that `torch.compile` makes graphs of, as `StepCounter` names them."""
        compiled = self._recipe.model.get("compile")
        found = [BLOCKS if compiled == "blocks" else DENOISER] if compiled else []
        encoders, _ = parts_of(self.model.text_encoder)
        found += [TEXT_ENCODER] if any(getattr(one, "compiled", False) for one in encoders) else []
        teachers = {name: getattr(trick, "teacher", None) for name, trick in self.tricks.items()}
        return found + [
            name
            for name, trick in self.tricks.items()
            if True in (getattr(one, "compile", None) for one in (trick, teachers[name]))
        ]

    @property
    def _identity(self) -> tuple[Any, ...]:
        """All that the cost of a step follows from, but for the size of images and what is active."""
        untimed = {
            name: {key: value for key, value in arguments.items() if key not in ("start", "end", "stages", "phases")}
            for name, arguments in entries(self._recipe.algorithms, "algorithms")
            if name in self.tricks
        }
        given = [self._recipe.model, untimed, self._recipe.train_loader, self._stores_text, self._stores_latents, self.amp]
        return json.dumps(given, sort_keys=True, default=str), *(type(trick) for trick in self.tricks.values())

    @property
    def optimizer_identity(self) -> tuple[Any, ...]:
        """All that an optimizer's first step follows from."""
        groups = self.optimizer.param_groups
        shapes = tuple(tuple((p.shape, p.dtype) for p in group["params"]) for group in groups)
        return type(self.optimizer), shapes, repr([group | {"params": None} for group in groups]), repr(self._recipe.optimizer)

    @property
    def amp(self) -> bool:
        return self._recipe.precision.startswith("amp")

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def switched(self) -> list[Trick]:
        """The tricks whose windows change what a step does."""
        return [trick for trick in self.tricks.values() if type(trick).set_active is not Trick.set_active]

    def image_tokens(self, image_size: int, path: str) -> int:
        """Return how many tokens an image of that size is. Raise UserError, at `path`, if it isn't cut into patches."""
        side = image_size // self.model.autoencoder.downsampling
        with at_path(path):
            return self.model.backbone.num_tokens(side, side)

    def count(self, image_size: int, active: Collection[str], images: int = _IMAGES) -> StepCount:
        """Return the cost of a step on square images of that size.

        Args:
            active: names of the tricks whose windows are open.
            images: of a microbatch; two are counted where it has one.

        Raises:
            UserError: a network whose work cannot be told from its shapes.
        """
        images = max(images, _IMAGES)
        key = (*self._identity, image_size, frozenset(active), images)
        try:
            if key not in _counts:
                _counts[key] = self._counter.count(self._batch(image_size, images), active)
            return _counts[key]
        except CannotCount as error:
            if error.part == DENOISER:  # without which there is nothing to plan
                raise UserError(f"model.backbone cannot be counted: {error}. It must work on tensors without content.") from error
            part = {TEXT_ENCODER: "text_encoder", AUTOENCODER: "autoencoder"}.get(error.part, error.part)
            path = f"algorithms.{part}" if part == error.part else f"model.{part}"
            self.uncounted.refuse(part, path, str(error))
            raise UserError(f"{path}: {error}") from error

    def _batch(self, image_size: int, images: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        encoder, autoencoder, loader = self.model.text_encoder, self.model.autoencoder, self._recipe.train_loader
        tokens, side = encoder.max_tokens, image_size // autoencoder.downsampling
        read = tokens if self._stores_text else encoder.tokenize([""])["input_ids"].shape[1]
        batch: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "input_ids": ((read,), torch.int64),
            "attention_mask": ((read,), torch.bool),
        }
        if self._stores_text:
            batch["text_embedding"] = ((tokens, encoder.hidden_size), torch.bfloat16)
            if pooled := getattr(encoder, "pooled_size", 0):
                batch["text_pooled"] = ((pooled,), torch.bfloat16)
        if self._stores_latents:
            batch["latent"] = ((autoencoder.channels, side, side), torch.bfloat16)
        if not loader.get("latent") or loader.get("images"):
            batch["image"] = ((3, image_size, image_size), torch.uint8)
        grid = side // self.model.backbone.patch_size
        for trick in self.tricks.values():
            batch |= {name: ((grid, grid, channels), torch.bfloat16) for name, channels in trick.columns.items()}
        return {name: ((images, *shape), dtype) for name, (shape, dtype) in batch.items()}

    # ------------------------------------------------------------------------------------------------------ parts

    def _make(self, part: str, title: str, needed: bool) -> tuple[Any, int]:
        """Return a part of the model and the bytes that are frozen in it; None if it cannot be made and isn't needed.

        Raises:
            UserError: it is needed and cannot be made, or the recipe is wrong there.
        """
        path = f"model.{part}"
        left_out = needed and self.uncounted.leaves(part, path)
        try:
            with frozen_inside() as made:
                return getattr(self._components, part), _bytes(made)
        except Exception as error:  # whatever a network's code raises
            if needed and not left_out:
                if isinstance(error, UnknownNetwork):
                    self.uncounted.refuse_unknown(part, path, error.network)
                elif isinstance(error, UserError):
                    raise
                else:
                    self.uncounted.refuse(part, path, f"{title} cannot be made without storage ({error})")
            return None, 0

    def _add_autoencoder(self) -> None:
        """Make the autoencoder; where it cannot be made or is left out, the step that is counted begins with latents."""
        path, spec = "model.autoencoder", self._recipe.model.get("autoencoder")
        name, arguments = ("pixels", {}) if spec is None else split(spec, path)
        pretrained = str(arguments.get("pretrained") or name)
        autoencoder, frozen = self._make("autoencoder", pretrained, needed=not self._stores_latents)
        if autoencoder is None:
            named = re.search(r"f(\d+)c\d+", pretrained)  # as DC-AEs are called
            downsampling = int(named[1]) if named else 8
            self.uncounted.told.append(f"{path}: taken to divide an image's sides by {downsampling}")
            channels = self._components.backbone.in_channels
            self._components.autoencoder = _StandIn(channels=channels, downsampling=downsampling)
        if autoencoder is None or "autoencoder" in (self.uncounted.leave_out or ()):
            self._stores_latents = True
        elif not self._stores_latents:
            self.frozen["autoencoder"] = frozen

    def _add_text_encoder(self) -> None:
        """Make the text encoder; where it cannot be made or is left out, the step that is counted begins with embeddings."""
        path = "model.text_encoder"
        specs, title = text_encoders(self._recipe.model), encoder_title(self._recipe.model)[0]
        encoder, frozen = self._make("text_encoder", title, needed=not self._stores_text)
        if encoder is None:
            backbone, max_tokens = self._components.backbone, sum(int(one.get("max_tokens", 256)) for one in specs.values())
            sizes = dict(hidden_size=backbone.context_in_dim, pooled_size=getattr(backbone, "pooled_dim", 0))
            self._components.text_encoder = _StandIn(**sizes, max_tokens=max_tokens)
            self.text, self._stores_text = f"{title}, not counted", True
            return
        if self._stores_text and encoder.trainable:
            raise UserError(f"--stored-text: {path} is trained along, so that its embeddings cannot be stored.")
        for path, spec in specs.items():
            config = spec.get("config") or {}
            if config and "vocab_size" not in config and not (Path(self._recipe.run_folder) / TOKENIZER).exists():
                told = f"{path}.tokenizer: not trained yet; taken to know {len(encoder.tokenizer):,} words, which is the most"
                self.uncounted.told.append(told)
        if self._stores_text:
            self.text = f"embeddings of {title} stored with the data"
        elif "text_encoder" in (self.uncounted.leave_out or ()):
            self.text, self._stores_text = f"{title}, not counted", True
        else:
            padded = f"run online, on valid tokens; counted as if captions had all {encoder.max_tokens}, which is the most"
            self.text = f"{title}, {'trained along' if encoder.trainable else padded}"
            self.frozen["text_encoder"] = frozen

    def _attach(self, name: str, algorithm: Algorithm) -> None:
        path = f"algorithms.{name}"
        if not isinstance(algorithm, Trick):
            self.uncounted.told.append(f"{path}: what it costs is not known to the plan, and not counted")
            return
        if algorithm.not_counted:
            self.uncounted.told.append(f"{path}: {algorithm.not_counted}")
        try:
            with at_path(path), torch.device("meta"), frozen_inside() as made:
                algorithm.attach(self.model, self.optimizer)
        except UserError as error:
            if not isinstance(error.__cause__, UnknownConfiguration):
                raise
            self.uncounted.refuse_unknown(name, str(error).partition(":")[0], error.__cause__.name)
            return
        self.tricks[name] = algorithm
        self.frozen[name] = _bytes(made)


def _bytes(frozen: list[Frozen]) -> int:
    return sum(parameter.nbytes for one in frozen for parameter in one.module.parameters())


@dataclass(frozen=True)
class State:
    """Bytes that a run carries from step to step, over all GPUs, each counted once.

    Args:
        weights, optimizer, ema: what a checkpoint holds.
        muon: bytes of the weights whose updates Muon orthogonalises.
    """

    weights: int
    optimizer: int
    ema: int
    muon: int = 0

    @property
    def checkpoint(self) -> int:
        return self.weights + self.optimizer + self.ema


def bytes_of(tensors: Iterable[Tensor], shards: int = 1) -> int:
    """Return the bytes of one of `shards` equal parts, cut along the first dimension, the last of which may be padded."""
    return sum(t.nbytes if shards == 1 or t.ndim == 0 else -(-t.shape[0] // shards) * t[:1].nbytes for t in tensors)


def muon_groups(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Return the groups of parameters that are trained with Muon, if any are, by their index."""
    return {index: group for index, group in enumerate(optimizer.param_groups) if group.get("algorithm") == "muon"}


def training_state(planned: MetaModel, shards: int = 1) -> State:
    """Return the state of one GPU that holds one of `shards` parts; of the whole run with one."""
    weights = bytes_of(planned.trained.values(), shards)
    copies = sum(trick.weight_copies for trick in planned.tricks.values())
    muon = [parameter for group in muon_groups(planned.optimizer).values() for parameter in group["params"]]
    return State(weights, bytes_of(optimizer_state(planned), shards), copies * weights, bytes_of(muon, shards))


def staged_bytes(planned: MetaModel, recipe: Recipe, num_gpus: int, on_node: int) -> int:
    """Return the bytes of a node's memory that its GPUs' shares of the state are copied to for a checkpoint; of DDP rank 0's.

    PyTorch pins memory in powers of two, for every tensor by itself, and keeps it for the next checkpoint.
    """
    shards, copies = sharding(recipe, num_gpus), 1 + sum(trick.weight_copies for trick in planned.tricks.values())
    state = [*copies * list(planned.trained.values()), *optimizer_state(planned)]
    share = sum(1 << (bytes_of([tensor], shards) - 1).bit_length() for tensor in state)
    return share if recipe.parallelism_config is None else on_node * share


def optimizer_state(planned: MetaModel) -> list[Tensor]:
    """Return what the optimizer keeps after its first step."""
    key = planned.optimizer_identity
    if key not in _states:
        _states[key] = state_after_a_step(planned.optimizer)
    state, guessed = _states[key]
    if guessed and (said := f"optimizer: {guessed}") not in planned.uncounted.told:
        planned.uncounted.told.append(said)
    return state


def optimizer_traffic(planned: MetaModel) -> tuple[int, int]:
    """Return the bytes that an optimizer's step reads and writes beside its matrix products, and in how many kernels."""
    key = planned.optimizer_identity
    if key not in _traffic:
        recorder = Recorder("optimizer")
        state_after_a_step(planned.optimizer, recorder)
        kernels = [kernel for kernel in kernels_of(recorder.ops) if kernel.kind == OTHER]
        _traffic[key] = sum(kernel.bytes for kernel in kernels), len(kernels)
    return _traffic[key]
