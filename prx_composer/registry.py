"""Names in a recipe → classes. Anybody's own join by decorator, or by an entry point in the group `prx_composer_<kind>`.

A whole library's join by a plug-in, which is asked for names that nobody else has: see `PlugIn`.

from prx_composer import registry

@registry.algorithms.register("mine")
class Mine(composer.Algorithm): ...
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import catalogue

from prx_composer.common.errors import UnknownName, UserError, nearest
from prx_composer.common.outlines import CannotTell, constructor, outline

T = TypeVar("T")


@functools.cache
def _entry_points() -> dict[str, frozenset[str]]:
    """Return the names by group, of all that is installed; nothing is loaded."""
    found = importlib.metadata.entry_points()
    return {group: frozenset(found.select(group=group).names) for group in found.groups if group.startswith("prx_composer_")}


class PlugIn(Protocol):
    """What an entry point in the group `prx_composer_plugins` names: a module, or an object, that has two functions."""

    def may_have(self, kind: str, name: str) -> bool:
        """Return whether it could have a component of that name, without importing the library behind it."""
        ...

    def find(self, kind: str, name: str) -> Any:
        """Return the class of that name. Raises LookupError, with what the user should know, if it has none."""
        ...


@functools.cache
def _plug_ins() -> list[PlugIn]:
    return [entry.load() for entry in importlib.metadata.entry_points(group="prx_composer_plugins")]


class Registry:
    """Components of one kind.

    Args:
        kind: plural, as in the entry-point group.
        builtin: name → "module:attribute", imported only when used.
        instead: name → why arguments of the others mean nothing for it.
    """

    def __init__(self, kind: str, builtin: dict[str, str], instead: dict[str, str] | None = None):
        self.kind = kind
        self.builtin = builtin
        self.instead = instead or {}
        self._added = catalogue.create("prx_composer", kind, entry_points=True)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function, which is added under `name`."""
        return self._added.register(name)

    def names(self) -> list[str]:
        registered = catalogue.Registry(("prx_composer", self.kind)).get_all()
        return sorted({*self.builtin, *registered, *self._entry_points()})

    def is_added(self, name: str) -> bool:
        """Return whether code of this process registered the name: not this package's, nor an installed one's entry point."""
        return catalogue.check_exists("prx_composer", self.kind, name)

    def is_packaged(self, name: str) -> bool:
        """Return whether it is this package that has the name, or an entry point of an installed one."""
        return not self.is_added(name) and (name in self.builtin or name in self._entry_points())

    def get(self, name: str, path: str) -> Any:
        """Return the class of that name. Raise UserError, naming the YAML path and the nearest name, if there is none."""
        if name in self._added:
            return self._added.get(name)
        if name in self.builtin:
            module, attribute = self.builtin[name].split(":")
            return getattr(importlib.import_module(module), attribute)
        missing = f"{path}: there is no {name!r} among the {self.kind}.{nearest(name, self.names())}"
        for plug_in in _plug_ins():
            try:
                return plug_in.find(self.kind, name)
            except LookupError as error:
                missing += f" {error.args[0]}" if error.args else ""
        raise UserError(UnknownName(missing))

    def described(self, name: str, path: str, imports: bool = True) -> Any:
        """Return what has the constructor of that name: the class, or its outline where nothing is to be imported.

        Raises:
            UserError: as `get`.
            CannotTell: it can't be known without importing something.
        """
        if imports or self.is_added(name):
            return self.get(name, path)
        if name in self._entry_points():
            raise CannotTell(f"{name} is another package's")
        if name not in self.builtin:
            if any(plug_in.may_have(self.kind, name) for plug_in in _plug_ins()):
                raise CannotTell(f"a plug-in may have {name}")
            return self.get(name, path)
        return outline(*self.builtin[name].split(":"))

    def constructor(self, name: str, path: str, imports: bool = True) -> Callable[..., Any]:
        """Return the function whose signature says what the component of that name takes. Raise as `described` does."""
        target = self.described(name, path, imports)
        return constructor(target)

    def _entry_points(self) -> frozenset[str]:
        return _entry_points().get(f"prx_composer_{self.kind}", frozenset())


models = Registry("models", {"text_to_image": "prx_composer.models.text_to_image:TextToImage"})
backbones = Registry(
    "backbones",
    {
        "diffusers": "prx_composer.models.diffusers_backbone:DiffusersBackbone",
        "prx": "prx_composer.models.backbone:PRXBackbone",
    },
)
signatures = Registry(  # of what the backbone `diffusers` can train, by the name of diffusers' class
    "signatures",
    {
        "AuraFlowTransformer2DModel": "prx_composer.models.signatures:AuraFlow",
        "DiTTransformer2DModel": "prx_composer.models.signatures:DiT",
        "FluxTransformer2DModel": "prx_composer.models.signatures:Flux",
        "Lumina2Transformer2DModel": "prx_composer.models.signatures:Lumina2",
        "PixArtTransformer2DModel": "prx_composer.models.signatures:PixArt",
        "SD3Transformer2DModel": "prx_composer.models.signatures:SD3",
        "SanaTransformer2DModel": "prx_composer.models.signatures:Sana",
        "StableCascadeUNet": "prx_composer.models.signatures:StableCascade",
    },
)
text_encoders = Registry(
    "text_encoders",
    {
        "huggingface": "prx_composer.models.encoders:HuggingFaceTextEncoder",
        "labels": "prx_composer.models.class_labels:ClassLabels",
        "several": "prx_composer.models.several_encoders:SeveralTextEncoders",
    },
)
autoencoders = Registry(
    "autoencoders",
    {
        "pixels": "prx_composer.models.autoencoder:Pixels",
        "diffusers": "prx_composer.models.autoencoder:DiffusersAutoencoder",
    },
)
processes = Registry(
    "processes",
    {
        "ddpm": "prx_composer.models.diffusion:DDPM",
        "edm": "prx_composer.models.diffusion:EDM",
        "flow_matching": "prx_composer.models.processes:FlowMatching",
    },
    {
        "ddpm": "Its noise is that of its betas, its times are drawn alike, and its loss has no weight",
        "edm": "Its noise is exp(N(p_mean, p_std²)), and its loss is weighted by EDM's own rule",
        "flow_matching": "Its path is straight, its times are a shifted logit-normal, and its steps are Euler's",
    },
)
loaders = Registry("loaders", {"image_caption": "prx_composer.data.loader:ImageCaptionData"})
sources = Registry(
    "sources",
    {
        "digits": "prx_composer.data.sources:DigitsSource",
        "folder": "prx_composer.data.sources:FolderSource",
        "icons": "prx_composer.data.icons:IconsSource",
        "shapes": "prx_composer.data.sources:ShapesSource",
    },
)
algorithms = Registry(
    "algorithms",
    {
        "contrastive_flow_matching": "prx_composer.algorithms.contrastive_flow_matching:ContrastiveFlowMatching",
        "deferred_masking": "prx_composer.algorithms.token_routing:DeferredMasking",
        "ema": "prx_composer.algorithms.ema:EMA",
        "float8": "prx_composer.algorithms.low_precision:Float8",
        "gradient_clipping": "prx_composer.algorithms.gradients:GradientClipping",
        "internal_guidance": "prx_composer.algorithms.readouts:GuidingReadout",
        "irepa": "prx_composer.algorithms.repa:IREPA",
        "lora": "prx_composer.algorithms.lora:LoRA",
        "low_precision_norm": "prx_composer.algorithms.low_precision:LowPrecisionNorm",
        "lpips": "prx_composer.algorithms.perceptual:LPIPS",
        "perceptual_dino": "prx_composer.algorithms.perceptual:PerceptualDINO",
        "progressive_resolution": "prx_composer.algorithms.resolution:ProgressiveResolution",
        "readouts": "prx_composer.algorithms.readouts:Readouts",
        "repa": "prx_composer.algorithms.repa:REPA",
        "resolution_aware": "prx_composer.algorithms.resolution:ResolutionAware",
        "skip_nonfinite": "prx_composer.algorithms.gradients:SkipNonfinite",
        "sprint": "prx_composer.algorithms.token_routing:SPRINT",
        "timestep_phases": "prx_composer.algorithms.timestep_phases:TimestepPhases",
        "tread": "prx_composer.algorithms.token_routing:TREAD",
    },
)
callbacks = Registry(
    "callbacks",
    {
        "digits_score": "prx_composer.callbacks.drawings:DigitsScore",
        "garbage_collection": "prx_composer.callbacks.watchdog:GarbageCollection",
        "generation_metrics": "prx_composer.callbacks.drawings:GenerationMetrics",
        "icons_score": "prx_composer.callbacks.icons_score:IconsScore",
        "images": "prx_composer.callbacks.drawings:Images",
        "loss_spikes": "prx_composer.callbacks.monitors:LossSpikes",
        "lr_monitor": "composer.callbacks:LRMonitor",
        "memory_monitor": "composer.callbacks:MemoryMonitor",
        "optimizer_monitor": "composer.callbacks:OptimizerMonitor",
        "runtime_estimator": "composer.callbacks:RuntimeEstimator",
        "shapes_score": "prx_composer.callbacks.drawings:ShapesScore",
        "stop_after": "prx_composer.callbacks.checkpointing:StopAfter",
        "speed_monitor": "prx_composer.callbacks.monitors:SpeedMonitor",
        "watchdog": "prx_composer.callbacks.watchdog:Watchdog",
    },
)
loggers = Registry(
    "loggers",
    {
        "file": "composer.loggers:FileLogger",
        "metrics_file": "prx_composer.loggers.trackers:MetricsFile",
        "mlflow": "prx_composer.loggers.tracking_servers:MLflow",
        "tensorboard": "prx_composer.loggers.trackers:TensorBoard",
        "wandb": "prx_composer.loggers.tracking_servers:WandB",
    },
)
optimizers = Registry(
    "optimizers",
    {
        "adamw": "prx_composer.optim:AdamW",
        "decoupled_adamw": "composer.optim:DecoupledAdamW",
        "muon": "prx_composer.optim.muon:Muon",
    },
)
schedulers = Registry(
    "schedulers",
    {
        "constant": "composer.optim:ConstantScheduler",
        "constant_with_warmup": "composer.optim:ConstantWithWarmupScheduler",
        "cosine_with_warmup": "composer.optim:CosineAnnealingWithWarmupScheduler",
        "linear_decay_with_warmup": "composer.optim:LinearWithWarmupScheduler",
        "warmup_stable_decay": "prx_composer.optim:WarmupStableDecay",
    },
)


def constructor_in_diffusers(name: Any, path: str) -> Callable[..., Any]:
    """Return the constructor of a class of diffusers that has a signature, read from its source.

    Raises:
        UserError: there is no such class, or no signature of it.
        CannotTell: its source says it in another way.
    """
    if name not in signatures.names():
        missing = f"{path}: {name!r} has no signature, which says what goes into a class of diffusers and where its blocks are."
        missing += f"{nearest(str(name), signatures.names())} A file that code_paths names can add one: "
        raise UserError(UnknownName(f"{missing}prx_composer/models/README.md."))
    if signatures.is_added(name) and (own := signatures.get(name, path).model) is not None:
        return constructor(own)
    package = importlib.util.find_spec("diffusers")  # imports nothing
    folders = [] if package is None else package.submodule_search_locations or []
    for file in (file for folder in folders for file in sorted(Path(folder, "models").glob("*/*.py"))):
        if f"\nclass {name}(" in file.read_text(encoding="utf-8"):
            return constructor(outline(f"diffusers.models.{file.parent.name}.{file.stem}", name))
    raise UserError(f"{path}: the diffusers that is installed has no class {name}.")


# A component nested in another's arguments is looked up by the argument's name.
NESTED = {"backbone": backbones, "text_encoder": text_encoders, "autoencoder": autoencoders, "source": sources}
NESTED |= {"flow": processes}
UNNAMED = {"flow": "flow_matching"}  # what a nested component is that has no `name`

# The components that keys of a recipe name: one by `name`, or several by their own keys.
BY_KEY = {"model": models, "optimizer": optimizers, "scheduler": schedulers, "train_loader": loaders, "eval_loader": loaders}
BY_NAME = {"algorithms": algorithms, "callbacks": callbacks, "loggers": loggers}

# Sizes of the backbone `prx` by name: widths and depths of DiT (arXiv:2212.09748) with the reference's heads of 64 channels, and
# the reference itself. recipes/README.md has what each weighs and costs.
SIZES: dict[str, dict[str, int]] = {
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=18),
    "1.2B": dict(hidden_size=1792, depth=16, num_heads=28),
}


def with_size(model: Any) -> Any:
    """Return a recipe's `model` with its backbone's `size` written out, as if the recipe had its numbers instead.

    Whatever reads a recipe does so after this, and a run keeps the numbers: they stay what they are if the table changes.

    Raises:
        UserError: no such size, or numbers beside it that are others.
    """
    backbone = model.get("backbone") if isinstance(model, dict) else None
    if not isinstance(backbone, dict) or backbone.get("name") != "prx" or "size" not in backbone:
        return model
    size, rest = backbone["size"], {key: value for key, value in backbone.items() if key != "size"}
    if size is None:
        return model | {"backbone": rest}
    if size not in list(SIZES):
        raise UserError(f"model.backbone.size: there is no size {size!r}.{nearest(str(size), list(SIZES))}")
    numbers = SIZES[size]
    others = {key: rest[key] for key, number in numbers.items() if rest.get(key) not in (None, number)}
    if others:
        raise UserError(
            f"model.backbone.size: {size} stands for {_set(numbers)}, but there is {_set(others)}. Give the numbers and no size, "
            f"{_set({'size': None} | numbers | others)}; or the size alone, {_set(dict.fromkeys(others))}."
        )
    return model | {"backbone": rest | numbers}


def _set(arguments: dict[str, Any]) -> str:
    """Return what sets arguments of the backbone on a command line."""
    return " ".join(f"model.backbone.{key}={'null' if value is None else value}" for key, value in arguments.items())


# ---------------------------------------------------------------------------------------------------- a user's own files


def import_code(paths: Sequence[str], option: str | None = None) -> None:
    """Import a user's Python files, so that what they register is found.

    Only files that the user names belong here: of their own recipe, or by `--code`. Never what a run folder or data name.

    Args:
        option: of the command line, that named them; by default they are the recipe's `code_paths`.

    Raises:
        UserError: a file that isn't there.
    """
    for index, name in enumerate(paths):
        path = Path(name).expanduser()
        for problem in missing_code(name, option or f"code_paths[{index}]"):
            raise UserError(problem)
        module_name = f"prx_composer_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)


def missing_code(name: str, where: str) -> list[str]:
    """Return what is wrong with a Python file that `code_paths`, or a command's option, names."""
    path = Path(name).expanduser()
    is_python = path.is_file() and path.suffix == ".py"  # Python imports no file of another name
    return [] if is_python else [f"{where}: there is no Python file {name} (*.py); looked for in {path.absolute().parent}."]
