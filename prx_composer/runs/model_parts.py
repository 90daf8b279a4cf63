"""The model of a recipe and its parts, for real or on the meta device, with what the run keeps: tokenizer and frozen parts.

runs/<run_name>/tokenizer/                              the one that the recipe names, or one trained on its captions
runs/<run_name>/frozen/text_encoder  frozen/autoencoder
Of several text encoders, each has a folder of its name in these.
"""

import copy
import functools
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import sync
from prx_composer.common.outlines import constructor
from prx_composer.data.format import Manifest, iterate_captions
from prx_composer.models.autoencoder import Pixels, stored_config
from prx_composer.models.caption_format import FORMAT, CaptionFormat, cleaner, with_format
from prx_composer.models.class_labels import train_label_tokenizer
from prx_composer.models.encoders import load_tokenizer, train_tokenizer
from prx_composer.models.huggingface import known_config
from prx_composer.models.processes import Process
from prx_composer.recipe.arguments import Spec, build, data_sets, split, text_encoders
from prx_composer.recipe.consistency import downsampling_of
from prx_composer.registry import UNNAMED, Registry
from prx_composer.runs.folder import FROZEN, TOKENIZER

log = logging.getLogger(__name__)

MOST_WORDS = 4096  # of a tokenizer that is still to be trained, unless the recipe says
_OF_TRAINING = ("compile", "activation_memory_budget", "attention")  # arguments of `model` that don't change what it draws
_WHERE = ("pretrained", "subfolder", "revision")  # arguments that say where a network's weights are
_LOADERS = ("huggingface", "diffusers")  # the components that load folders
_WEIGHTS = (".safetensors", ".bin")  # the first of these that is there
_ENCODER = "model.text_encoder"


_Train = Callable[[Iterable[str], int], PreTrainedTokenizerBase]
TRAINED_BY: dict[str, _Train] = {"word": train_tokenizer, "caption": train_label_tokenizer}


class UnknownNetwork(UserError):
    """A network of which only the name is known here: no folder, nothing in the hub's cache or in the table of encoders."""

    def __init__(self, path: str, network: str):
        super().__init__(f"{path}: the sizes of {network!r} are not known here.")
        self.network = network


class Vocabulary:
    """Stand in for a tokenizer on the meta device."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Return as many tokens as a text of that length has in English, about four characters to each."""
        return [0] * (2 + len(text) // 4)

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        return dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(len(texts), max_length, dtype=torch.int64))


class ModelParts:
    """Make a recipe's model and its parts, each when it is first asked for.

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
    def flow(self) -> Process:
        """What is learned."""
        name, arguments = split(self._given.get("flow") or {}, "model.flow", UNNAMED["flow"])
        return build(registry.processes, name, arguments, "model.flow")

    @cached_property
    def autoencoder(self) -> Any:
        """The autoencoder between pixels and the backbone."""
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
        """The text encoder's tokenizer: the run's, or else the one that the recipe names; nothing is written without `loader`."""
        return self._tokenizer_of(self.arguments("text_encoder"), _ENCODER)

    def _tokenizer_of(self, encoder: Spec, path: str) -> PreTrainedTokenizerBase:
        if self._loader is not None and self._folder is not None:
            return made_tokenizer(encoder, self._loader, self._folder, path)
        kept = tokenizer_folder(self._folder or Path(), path)
        with at_path(f"{path}.tokenizer"):
            if self._folder is not None and kept.exists():
                return load_tokenizer(str(kept))
            if (named := _named_tokenizer(encoder)) is not None:
                return named
            raise UserError(
                f"{path}.tokenizer: it was trained with the run and lies in its folder; there is no {kept}. "
                "Put the checkpoint where the run wrote it: <run folder>/checkpoints/."
            )

    @cached_property
    def text_encoder(self) -> Any:
        """The text encoder with its tokenizer; on the meta device with a stand-in of it."""
        name, arguments = self._spec("text_encoder")
        given = arguments.get("encoders")
        if name != "several" or not isinstance(given, dict):
            return self._encoder(name, arguments, _ENCODER)
        paths = {inner: f"{_ENCODER}.encoders.{inner}" for inner in given}
        made = {inner: self._encoder(*split(given[inner], path), path) for inner, path in paths.items()}
        return build(registry.text_encoders, name, arguments | {"encoders": made}, _ENCODER)

    def _encoder(self, name: str, arguments: Spec, path: str) -> Any:
        if not self.meta:
            tokenizer = self.tokenizer if path == _ENCODER else self._tokenizer_of(arguments, path)
            own = {key: value for key, value in arguments.items() if key != "tokenizer"}
            return build(registry.text_encoders, name, own, path, tokenizer=tokenizer)
        named = arguments.pop("tokenizer", None)
        if _has_configuration(registry.text_encoders, name):
            pretrained, revision = arguments.get("pretrained"), arguments.get("revision")
            known = known_config(pretrained, revision, reads_text=True) if pretrained else None
            arguments = _from_configuration(arguments, known, path)
        arguments.pop("clean", None)
        stand_in = Vocabulary((arguments.get("config") or {}).get("vocab_size") or self._vocabulary_size(named, path))
        with self._device:
            return build(registry.text_encoders, name, arguments, path, tokenizer=stand_in)

    def _vocabulary_size(self, tokenizer: Any, path: str) -> int:
        if self._folder is not None and (kept := tokenizer_folder(self._folder, path)).exists():
            return len(load_tokenizer(str(kept)))
        return int(tokenizer.get("vocab_size", MOST_WORDS)) if isinstance(tokenizer, dict) else MOST_WORDS


def _has_configuration(components: Registry, name: str) -> bool:
    """Return whether a network can be made from its configuration instead of its weights."""
    return {"pretrained", "config"} <= inspect.signature(constructor(components.get(name, name))).parameters.keys()


def _from_configuration(arguments: dict[str, Any], known: dict[str, Any] | None, path: str) -> dict[str, Any]:
    config = arguments.get("config") or known
    if config is None:
        raise UnknownNetwork(path, str(arguments.get("pretrained")))
    return {key: value for key, value in arguments.items() if key not in _WHERE} | {"config": config}


# Frozen parts that a recipe names by a folder are kept with the run, since no checkpoint holds them, and folders go. They are
# hard links where the disk allows, or else copies. Parts of the hub are found again by their id and revision.


def with_kept(model: dict[str, Any], run_folder: Path) -> dict[str, Any]:
    """Return a recipe's `model`, which names what its run has kept instead of folders of elsewhere."""
    changed = copy.deepcopy(model)
    for path, spec in _loading(changed).items():
        kept = run_folder / FROZEN / _below(path)
        if _named_folder(spec) is None or not kept.is_dir():
            continue
        spec |= {"pretrained": str(kept)} | ({"subfolder": None} if "subfolder" in spec else {})
        if spec["name"] == "huggingface" and (own := tokenizer_folder(run_folder, path)).is_dir():
            spec["tokenizer"] = str(own)
    return changed


def keep_frozen(model: dict[str, Any], run_folder: Path) -> None:
    """Keep what a recipe's `model` names by a folder with its run, once; on one rank.

    Raises:
        OSError: it cannot be written.
    """
    for path, spec in _loading(model).items():
        source, kept = _named_folder(spec), run_folder / FROZEN / _below(path)
        if source is None or kept.exists() or not source.is_dir():
            continue
        files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix == ".json"]
        weights = ([file for file in sorted(source.glob(f"*{suffix}")) if file.is_file()] for suffix in _WEIGHTS)
        files += next((found for found in weights if found), [])
        partial = kept.with_name(f".{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copied = sum(_link_or_copy(file.resolve(), partial / file.name) for file in files)
        sync(partial)
        partial.rename(kept)
        how = f"copied ({copied / 1e9:.2f} GB)" if copied else "linked"
        log.info("%s: %s is %s into %s, so that the run needs it no more.", path, source, how, kept)


def _loading(model: dict[str, Any]) -> dict[str, Spec]:
    """Return what of a recipe's `model` may be loaded from a folder, by YAML path."""
    parts: dict[str, Any] = text_encoders(model) | {"model.autoencoder": model.get("autoencoder")}
    return {path: spec for path, spec in parts.items() if isinstance(spec, dict)}


def _below(path: str) -> Path:
    """Return where in a folder of the run a part of the model is kept: text_encoder, or text_encoder/<name> of several."""
    return Path(*path.removeprefix("model.").replace(".encoders.", ".").split(".", 1))


def tokenizer_folder(folder: Path, path: str) -> Path:
    """Return where a run keeps the tokenizer of the text encoder at a YAML path."""
    return folder / TOKENIZER / _below(path).relative_to("text_encoder")


def _named_folder(spec: Spec) -> Path | None:
    """Return the folder that `pretrained` would be; an id of the hub is none that is there."""
    if spec.get("name") not in _LOADERS or not isinstance(spec.get("pretrained"), str):
        return None
    return Path(spec["pretrained"]).expanduser() / (spec.get("subfolder") or "")


def _link_or_copy(source: Path, target: Path) -> int:
    """Return the number of bytes that were copied."""
    try:
        os.link(source, target)
        return 0
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        sync(target)
        return target.stat().st_size


def made_tokenizer(encoder: Spec, loader: Spec, folder: Path, path: str = _ENCODER) -> PreTrainedTokenizerBase:
    """Return a text encoder's tokenizer, made and kept in the run's folder if it isn't there yet; on all ranks alike.

    Args:
        encoder: of a recipe's `model`, at the YAML path.
        loader: its `train_loader`, for a tokenizer that is trained on the captions.
        folder: of the run.

    Raises:
        UserError: one that cannot be had.
    """
    kept = tokenizer_folder(folder, path)
    with dist.run_local_rank_zero_first():
        if kept.exists():
            tokenizer = load_tokenizer(str(kept))
        else:
            tokenizer = _new(encoder, loader, f"{path}.tokenizer")
            keep_tokenizer(tokenizer, kept)
    with at_path(path):
        return with_format(tokenizer, **{key: encoder[key] for key in FORMAT if key in encoder})


def _named_tokenizer(encoder: Spec) -> PreTrainedTokenizerBase | None:
    named = encoder.get("tokenizer") or encoder.get("pretrained")
    return load_tokenizer(named, encoder.get("revision")) if isinstance(named, str) else None


def _new(encoder: Spec, loader: Spec, path: str) -> PreTrainedTokenizerBase:
    spec: Any = encoder.get("tokenizer") or encoder.get("pretrained")
    with at_path(path):
        if (named := _named_tokenizer(encoder)) is not None:
            return named
        if isinstance(spec, dict) and spec.keys() <= {"train", "vocab_size", "by"} and spec.get("train"):
            if spec.get("by", "word") not in TRAINED_BY:
                raise ValueError(f"by must be {' or '.join(TRAINED_BY)}, not {spec['by']!r}.")
            form = CaptionFormat(encoder.get("clean", "none"), encoder.get("instruction", ""))
            read = functools.partial(form.of, clean=cleaner(form.cleaning))
            return trained_tokenizer(loader, spec.get("vocab_size", MOST_WORDS), read, TRAINED_BY[spec.get("by", "word")])
    raise UserError(f"{path}: give a hub id or folder, or {{train: true}} to train one on the captions, not {spec!r}.")


def trained_tokenizer(
    loader: Spec, vocab_size: int = MOST_WORDS, clean: Callable[[str], str] = str, train: _Train = train_tokenizer
) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the captions that a loader trains on, as they are cleaned; by default a word-level one."""

    def captions() -> Iterator[str]:
        for part in data_sets(loader).values():
            folder = Path(part["path"]) / part.get("split", "train")
            for column in part.get("captions") or Manifest.read(folder).captions[:1]:
                yield from iterate_captions(folder, column)

    return train(map(clean, captions()), vocab_size)


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer to a new folder, whole or not at all, on rank 0."""
    if dist.get_global_rank() == 0:
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(partial))
        partial.rename(folder)
