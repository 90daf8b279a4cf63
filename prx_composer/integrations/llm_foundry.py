"""This package's components as llm-foundry finds and calls them, and the callback that its trainer needs to train as ours does.

llm-foundry makes one tokenizer, named at the top of its YAML, and gives it to loader and model. What else the loader must know
of the model (`max_tokens`, `multiple`) its YAML takes from there: `${model.text_encoder.max_tokens}`.
"""

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec, State
from composer.loggers import Logger
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.callbacks.checkpointing import RandomStep
from prx_composer.callbacks.monitors import DataMonitor
from prx_composer.common.distributed import GlooAverage, unwrapped
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import write_whole
from prx_composer.data.contents import column_contents
from prx_composer.data.format import MANIFEST, Manifest
from prx_composer.data.loader import ImageCaptionData, ImageCaptionLoader
from prx_composer.data.stored import check_latent_column, check_text_column
from prx_composer.integrations.foundry_names import OURS
from prx_composer.models.caption_format import format_of
from prx_composer.models.encoders import load_tokenizer
from prx_composer.models.randomness import RandomStreams
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.arguments import build, check_arguments, data_sets
from prx_composer.registry import Registry, with_size
from prx_composer.runs.model_parts import ModelParts, keep_tokenizer, trained_tokenizer
from prx_composer.runs.pretrained_models import initialise
from prx_composer.runs.stored_text import choose_of_loader
from prx_composer.training.components import make_data, read_manifests, unmade_sources

_MADE_OF = "made_of.json"  # beside a tokenizer: its captions
LOADER = "prx_image_caption"  # whether it is train_loader or eval_loader, llm-foundry doesn't say

_models: "weakref.WeakSet[TextToImage]" = weakref.WeakSet()


def _model_with(parameter: torch.Tensor) -> TextToImage | None:
    """Return the model built here that has this parameter: llm-foundry gives optimizers no more than parameters."""
    return next((model for model in _models if any(own is parameter for own in model.parameters())), None)


class Model(TextToImage):
    """Build a `TextToImage` from a recipe's `model`, with llm-foundry's tokenizer.

    Args:
        tokenizer: llm-foundry's, of the text encoder.
        seed: of every random draw of training.
        arguments: as in a recipe: backbone, text_encoder, flow, autoencoder, init_from, …

    Raises:
        UserError: as for a recipe.
    """

    def __new__(cls, tokenizer: PreTrainedTokenizerBase | None = None, **arguments: Any) -> Any:
        if "seed" not in arguments:
            raise UserError("model lacks the argument 'seed', of all that is drawn in training; write seed: ${seed}.")
        arguments = with_size(arguments)
        check_arguments(TextToImage, arguments, "model", also=frozenset({"init_from"}))
        if "tokenizer" in arguments["text_encoder"]:
            raise UserError(
                "model.text_encoder.tokenizer: llm-foundry makes it, for loader and model; at the top: tokenizer: {name: …}."
            )
        if arguments["text_encoder"].get("name") == "several":
            raise UserError("model.text_encoder: several encoders have several tokenizers, and llm-foundry one; use prx train.")
        seed = arguments.pop("seed")
        parts = ModelParts({"name": "text_to_image"} | arguments, seed, compiled=True)
        parts.tokenizer = _with_padding(tokenizer)
        if tokenizer is not None:  # which the loader has too
            tokenizer.caption_format = format_of(parts.text_encoder.tokenizer)  # pyright: ignore[reportAttributeAccessIssue]
        model: TextToImage = parts.model
        model.random = _StepStreams(seed)
        if arguments.get("init_from") is not None:
            initialise(model, arguments["init_from"])
        _models.add(model)
        return model


def image_caption_loader(tokenizer: PreTrainedTokenizerBase | None, device_batch_size: int | float, **arguments: Any) -> DataSpec:
    """Return a recipe's `image_caption` loader; a `source` makes the data on first use.

    Args:
        tokenizer: llm-foundry's, of the model's text encoder.
        device_batch_size: samples per rank and step.
        arguments: as in a recipe, and image_size, max_tokens, multiple and seed.

    Raises:
        UserError: as for a recipe.
    """
    provided = frozenset({"tokenizer", "global_batch_size", "evaluation"})
    check_arguments(ImageCaptionData, arguments, LOADER, provided, also=frozenset({"source"}))
    if int(device_batch_size) != device_batch_size:
        raise UserError(f"{LOADER}: a batch of {device_batch_size} samples per rank is none; raise global_train_batch_size.")
    _one_node_makes(arguments)
    with dist.run_local_rank_zero_first():
        make_data(arguments, LOADER)
    read_manifests(arguments, LOADER)
    arguments = {key: value for key, value in choose_of_loader(arguments, LOADER).items() if key != "source"}
    batch_size = int(device_batch_size) * dist.get_world_size()
    evaluation = not arguments.pop("shuffle", True)  # by which llm-foundry's YAMLs tell the two loaders apart
    given: dict[str, Any] = dict(tokenizer=_with_padding(tokenizer), global_batch_size=batch_size, evaluation=evaluation)
    return build(registry.loaders, "image_caption", arguments, LOADER, **given)


class CaptionTokenizer(PreTrainedTokenizerBase):
    """Call `caption_tokenizer`; llm-foundry asks for a class."""

    def __new__(cls, **arguments: Any) -> Any:
        check_arguments(caption_tokenizer, arguments, "tokenizer.kwargs")
        return caption_tokenizer(**arguments)


def caption_tokenizer(loader: dict[str, Any], folder: str, vocab_size: int = 4096) -> PreTrainedTokenizerBase:
    """Return a word-level tokenizer of the captions that are trained on, for a text encoder that is trained along.

    Args:
        loader: the YAML's `train_loader`: `${train_loader}`.
        folder: where it is kept, and read from when the run is resumed.
        vocab_size: how many words at most.

    Raises:
        UserError: data that cannot be made or read; something else in `folder`.
    """
    note = Path(folder, _MADE_OF)
    if Path(folder).exists():
        with at_path("tokenizer.kwargs.folder"):
            tokenizer = load_tokenizer(folder)
        if note.exists() and _made_of(loader, vocab_size) not in (None, json.loads(note.read_text())):
            raise UserError(
                f"tokenizer.kwargs.folder: {folder} holds a tokenizer of other captions or another vocab_size than train_loader "
                "has now. Name a new folder for a new run; to go on with a run, give it the data that it began with."
            )
        return tokenizer
    _one_node_makes(loader)  # on which llm-foundry lets rank 0 come first; so no collective may be called here
    make_data(loader, "train_loader")
    read_manifests(loader, "train_loader")
    tokenizer = trained_tokenizer(loader, vocab_size)
    keep_tokenizer(tokenizer, Path(folder))
    if dist.get_global_rank() == 0:
        write_whole(note, json.dumps(_made_of(loader, vocab_size)).encode())
    return tokenizer


def _made_of(loader: dict[str, Any], vocab_size: int) -> list[Any] | None:
    """Return what decides a tokenizer; None if the captions aren't there (yet)."""
    made_of: list[Any] = [vocab_size]
    for part in data_sets(loader).values():
        split = Path(part["path"]) / part.get("split", "train")
        if not (split / MANIFEST).exists():
            return None
        made_of += [column_contents(split, column) for column in part.get("captions") or Manifest.read(split).captions[:1]]
    return made_of


class TrainingRun(GlooAverage, RandomStep, DataMonitor):
    """Give a run what train.py gives to every run, where the trainer is another.

    Draws belong to a step, so that a resumed run repeats the uninterrupted one. Gradients are averaged over CPU ranks. Samples
    that could not be decoded are in the log. Loaders must fit the model, since llm-foundry builds them without it.
    """

    def fit_start(self, state: State, logger: Logger) -> None:
        model = unwrapped(state.model)
        if isinstance(model, TextToImage):
            _check_loader("train_loader", state.train_dataloader, model)
            for evaluator in state.evaluators:
                _check_loader("eval_loader", evaluator.dataloader.dataloader, model)


def _check_loader(key: str, loader: Any, model: TextToImage) -> None:
    """Raise UserError for sizes that aren't the model's, and for what was stored by another text encoder or autoencoder."""
    if not isinstance(loader, ImageCaptionLoader):
        return
    collator: Any = loader.collate_fn
    multiple = model.backbone.patch_size * model.autoencoder.downsampling
    for name, given, needed in (
        ("multiple", loader.batch_sampler.multiple, multiple),
        ("max_tokens", collator.max_tokens, model.text_encoder.max_tokens),
    ):
        if given != needed:
            raise UserError(f"{key}.{name} is {given}, but the model's is {needed}.")
    for column in loader.dataset.text_columns.values():
        check_text_column(column, model.text_encoder, f"{key}.text_embedding")
    for column in loader.dataset.latent_columns.values():
        check_latent_column(column, model.autoencoder, f"{key}.latent")


class _StepStreams(RandomStreams):
    """Refuse to draw for a step that nobody has begun."""

    _begun = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomStreams:
        return RandomStreams(self.seed)  # of a copy that is counted, which is no run

    def begin_step(self, step: int) -> None:
        self._begun = True
        super().begin_step(step)

    def next_microbatch(self) -> None:
        if not self._begun:
            raise UserError(
                "callbacks lacks prx_run, which ties noise and timesteps to the step; write callbacks: {prx_run: {}}."
            )
        super().next_microbatch()


def _with_padding(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError(
            "tokenizer: name the text encoder's, a hub id or folder: tokenizer: {name: google/t5gemma-2b-2b-ul2}. To train one "
            "on the captions: tokenizer: {name: prx_captions, kwargs: {loader: ${train_loader}, folder: runs/mine/tokenizer}}."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _one_node_makes(spec: dict[str, Any]) -> None:
    if dist.get_world_size() == dist.get_local_world_size():
        return
    for making in unmade_sources(spec, "train_loader"):
        raise UserError(f"{making.key}.source: make {making.path} on one node first; several would get in each other's way.")


# ------------------------------------------------------------------ algorithms, callbacks, loggers, optimizers, schedulers
# llm-foundry asks an entry point for a class of Composer's kind and calls it with what its YAML says. A class here makes no
# object of its own: calling it checks and builds the component as a recipe's is, so that wrong arguments are answered alike.

_ELSEWHERE_PROVIDED = ("folder", "source")  # a recipe has these for every component; here they are arguments like others


class _Published:
    """Offer the components of one kind as attributes, by name."""

    def __init__(self, components: Registry, path: str):
        self._components, self._path = components, path

    def __getattr__(self, name: str) -> Any:
        if name not in self._components.builtin:
            raise AttributeError(name)
        target = self._components.get(name, name)
        path = self._path.format(name=OURS + name)

        def build_instead(cls: type, **arguments: Any) -> Any:
            provided = {key: arguments.pop(key) for key in _ELSEWHERE_PROVIDED if key in arguments}
            return self._build(target, name, arguments, path, provided)

        return type(target)(target.__name__, (target,), {"__new__": build_instead, "__doc__": target.__doc__})

    def _build(self, target: Any, name: str, arguments: dict[str, Any], path: str, provided: dict[str, Any]) -> Any:
        check_arguments(target, arguments, path, frozenset(provided))
        return build(self._components, name, arguments, path, **provided)


class _PublishedOptimizers(_Published):
    """Build optimizers of a model from its parameters, all that llm-foundry has; ours ask it which decay or are for Muon."""

    def _build(self, target: Any, name: str, arguments: dict[str, Any], path: str, provided: dict[str, Any]) -> Any:
        params: Iterable[Any] = arguments.pop("params")
        first = next(iter(params), None)
        if isinstance(first, dict):
            raise UserError(
                f"{path}.param_groups: {OURS}{name} makes its own; leave them out, or name an optimizer of llm-foundry's."
            )
        model = _model_with(first) if isinstance(first, torch.Tensor) else None
        if model is None:
            raise UserError(f"{path}.name: {OURS}{name} trains {OURS}text_to_image; name an optimizer of llm-foundry's.")
        return super()._build(target, name, arguments, path, {"model": model})


algorithms = _Published(registry.algorithms, "algorithms.{name}")
callbacks = _Published(registry.callbacks, "callbacks.{name}")
loggers = _Published(registry.loggers, "loggers.{name}")
optimizers = _PublishedOptimizers(registry.optimizers, "optimizer")
schedulers = _Published(registry.schedulers, "scheduler")
