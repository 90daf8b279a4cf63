"""The model of a recipe and its parts, for real or on the meta device, with what the run keeps: tokenizer and frozen parts."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.common.outlines import constructor
from prx_composer.models.autoencoder import Pixels, stored_config
from prx_composer.models.known_configs import known_config
from prx_composer.models.text_encoder import load_tokenizer
from prx_composer.recipe.arguments import Spec, build, split
from prx_composer.recipe.consistency import downsampling_of
from prx_composer.registry import Registry
from prx_composer.runs.folder import TOKENIZER
from prx_composer.runs.frozen_parts import with_kept
from prx_composer.runs.tokenizer import kept_tokenizer, made_tokenizer

MOST_WORDS = 4096  # of a tokenizer that is still to be trained, unless the recipe says
_OF_TRAINING = ("compile", "activation_memory_budget", "attention")  # arguments of `model` that don't change what it draws
_WHERE = ("pretrained", "subfolder", "revision")  # arguments that say where a network's weights are


class UnknownNetwork(UserError):
    """A network of which only the name is known here: no folder, nothing in the hub's cache or in the table of encoders."""


class Vocabulary:
    """Stands for a tokenizer on the meta device."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        return dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(len(texts), max_length, dtype=torch.int64))


class ModelParts:
    """Makes a recipe's model and its parts, each when it is first asked for.

    Args:
        spec: a recipe's `model`.
        seed: of every random draw of training.
        folder: of the run, which keeps its tokenizer and its frozen parts; None without a run.
        loader: the recipe's `train_loader`, if the tokenizer is to be made and kept in the folder where it isn't there yet.
        meta: whether networks are made without storage, from their configuration alone; nothing is loaded or downloaded then.
        compiled: whether the model is compiled if the recipe says so.

    Every property raises a UserError for what is wrong with the recipe, and for weights that cannot be had.
    """

    def __init__(
        self,
        spec: Spec,
        seed: int,
        folder: Path | None = None,
        *,
        loader: Spec | None = None,
        meta: bool = False,
        compiled: bool = False,
    ):
        self._given, self._seed, self._folder, self._loader = spec, seed, folder, loader
        self.meta = meta
        self._compiled = compiled and not meta

    @property
    def _device(self) -> AbstractContextManager[Any]:
        return torch.device("meta") if self.meta else nullcontext()

    def arguments(self, part: str | None = None) -> dict[str, Any]:
        """Return the arguments of the model, or of one of its parts; frozen parts are those that the run has kept."""
        return self._spec(part)[1]

    def _spec(self, part: str | None = None) -> tuple[str, dict[str, Any]]:
        name, arguments = split(self._given if self._folder is None else with_kept(self._given, self._folder), "model")
        return (name, arguments) if part is None else split(arguments.get(part), f"model.{part}")

    @cached_property
    def model(self) -> Any:
        """The ComposerModel. The text encoder is made first, then the other parts in the recipe's order."""
        name, arguments = self._spec()
        begins_elsewhere = arguments.pop("init_from", None) is not None
        if not self._compiled:
            arguments = {key: value for key, value in arguments.items() if key not in _OF_TRAINING}
        for part in ("text_encoder", "backbone", "autoencoder") if self.meta else ("text_encoder",):
            if part in arguments:
                arguments[part] = getattr(self, part)
        model = build(registry.models, name, arguments, "model", seed=self._seed)
        if begins_elsewhere:
            model.knows_empty_caption = True
        return model

    @cached_property
    def backbone(self) -> Any:
        """The denoiser alone."""
        name, arguments = self._spec("backbone")
        with self._device:
            return build(registry.backbones, name, arguments, "model.backbone")

    @cached_property
    def autoencoder(self) -> Any:
        """What is between pixels and the backbone."""
        if self._given.get("autoencoder") is None:
            return Pixels()
        name, arguments = self._spec("autoencoder")
        if self.meta and _has_configuration(registry.autoencoders, name):
            arguments = _from_configuration(arguments, stored_config(arguments), "model.autoencoder")
        with self._device:
            return build(registry.autoencoders, name, arguments, "model.autoencoder")

    @property
    def downsampling(self) -> int | None:
        """Image side / side of what the backbone sees; None if only the autoencoder's weights tell it."""
        if self._given.get("autoencoder") is None:
            return 1
        name, arguments = self._spec("autoencoder")
        of_class = getattr(registry.autoencoders.get(name, "model.autoencoder"), "downsampling", None)
        if isinstance(of_class, int):
            return of_class
        settings = arguments.get("config")
        if settings is None and _has_configuration(registry.autoencoders, name):
            settings = stored_config(arguments)
        return None if settings is None else downsampling_of(settings)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The text encoder's."""
        encoder = self.arguments("text_encoder")
        if self._loader is None or self._folder is None:
            return kept_tokenizer(encoder, self._folder)
        return made_tokenizer(encoder, self._loader, self._folder)

    @cached_property
    def text_encoder(self) -> Any:
        """With its tokenizer; on the meta device with a stand-in of it."""
        path = "model.text_encoder"
        name, arguments = self._spec("text_encoder")
        named = arguments.pop("tokenizer", None)
        if not self.meta:
            return build(registry.text_encoders, name, arguments, path, tokenizer=self.tokenizer)
        if _has_configuration(registry.text_encoders, name):
            pretrained, revision = arguments.get("pretrained"), arguments.get("revision")
            known = known_config(pretrained, revision, reads_text=True) if pretrained else None
            arguments = _from_configuration(arguments, known, path)
        arguments.pop("clean", None)
        stand_in = Vocabulary((arguments.get("config") or {}).get("vocab_size") or self._vocabulary_size(named))
        with self._device:
            return build(registry.text_encoders, name, arguments, path, tokenizer=stand_in)

    def _vocabulary_size(self, tokenizer: Any) -> int:
        if self._folder is not None and (self._folder / TOKENIZER).exists():
            return len(load_tokenizer(str(self._folder / TOKENIZER)))
        return int(tokenizer.get("vocab_size", MOST_WORDS)) if isinstance(tokenizer, dict) else MOST_WORDS


def _has_configuration(components: Registry, name: str) -> bool:
    """Return whether a network can be made from its configuration instead of its weights."""
    return {"pretrained", "config"} <= inspect.signature(constructor(components.get(name, name))).parameters.keys()


def _from_configuration(arguments: dict[str, Any], known: dict[str, Any] | None, path: str) -> dict[str, Any]:
    config = arguments.get("config") or known
    if config is None:
        raise UnknownNetwork(f"{path}: the sizes of {arguments.get('pretrained')!r} are not known here.")
    return {key: value for key, value in arguments.items() if key not in _WHERE} | {"config": config}
