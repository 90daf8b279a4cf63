"""What a person wants to look at: the folder of a data set, or the data of a recipe as its loader gives it."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prx_composer.commands.data.split import open_split
from prx_composer.common.errors import UserError, raise_all
from prx_composer.recipe import config
from prx_composer.recipe.arguments import split as split_spec
from prx_composer.recipe.data_sets import data_sets
from prx_composer.runs.folder import TOKENIZER
from prx_composer.runs.tokenizer import made_tokenizer
from prx_composer.training.components import PlannedStage
from prx_composer.training.preflight.examine import examine
from prx_composer.training.source_data import make_data


@dataclass(frozen=True)
class Subject:
    """A split, and how it is trained on if a recipe says so.

    Args:
        path, split: of the data set, local or remote.
        loader: the recipe's arguments of the loader; empty without one.
        key: of the loader in the recipe.
        seed: of the recipe.
        image_size: the recipe's first, if there is a recipe.
        multiple: of which image sides must be multiples.
        tokenizer, max_tokens: of the recipe's text encoder.
        stages: of the recipe.
    """

    path: str
    split: str
    loader: dict[str, Any] = field(default_factory=dict)
    key: str = "train_loader"
    seed: int = 0
    image_size: int | None = None
    multiple: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    max_tokens: int = 0
    stages: tuple[PlannedStage, ...] = ()

    @property
    def batch_sizes(self) -> list[int]:
        return [stage.global_batch_size for stage in self.stages]


def subject_of(arguments: list[str], split: str | None) -> Subject:
    """`[folder]`, or `[A.yaml, …, key=value, …]` as for train.py. Data that a recipe makes on first use is made.

    Args:
        split: by default the recipe's, or train.

    Raises:
        UserError: neither one folder nor a recipe; a recipe that is wrong, or whose tokenizer cannot be had.
    """
    recipes = [argument for argument in arguments if argument.endswith((".yaml", ".yml"))]
    if len(arguments) > 1 and (not recipes or any("=" not in argument for argument in arguments if argument not in recipes)):
        raise UserError(
            f"{' '.join(arguments)}: name one folder of a data set, or a recipe (.yaml) and key=value. For the data of a folder "
            "as a recipe would load it: RECIPE.yaml train_loader.path=FOLDER"
        )
    if not recipes:
        return Subject(arguments[0], split or "train")
    recipe = config.load(arguments)
    config.import_code(recipe.code_paths)
    _, parts = examine(recipe, 1)
    raise_all(parts.problems)
    own = [key for key in ("train_loader", "eval_loader") if getattr(recipe, key)]
    key = next((key for key in own if split in (None, getattr(recipe, key).get("split", "train"))), "train_loader")
    name, loader = split_spec(getattr(recipe, key), key)
    if name != "image_caption":
        raise UserError(f"{key}: the loader {name!r} is not of this package; name the folder of its data instead.")
    for made in own:
        make_data(getattr(recipe, made), made)
    loader = {argument: value for argument, value in loader.items() if argument != "source"}
    if loader.get("mix"):
        names = " or ".join(part.get("remote") or part["path"] for part in data_sets(loader).values())
        raise UserError(
            f"{key}.mix names several data sets; look at one of them: {names}. As the recipe would load it: add {key}.mix=null "
            f"{key}.path=FOLDER."
        )
    loader["split"] = split or loader.get("split", "train")
    path = loader.get("remote") or loader["path"]
    open_split(path, loader["split"])  # before a tokenizer is downloaded
    tokenizer, max_tokens = _tokenizer(recipe)
    return Subject(
        path=path,
        split=loader["split"],
        loader=loader,
        key=key,
        seed=recipe.seed,
        image_size=recipe.image_size,
        multiple=parts.multiple,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        stages=tuple(parts.stages) if key == "train_loader" else (),
    )


def _tokenizer(recipe: config.Recipe) -> tuple[PreTrainedTokenizerBase | None, int]:
    """The run's, if it was trained already; nothing is written to its folder."""
    spec = recipe.model.get("text_encoder")
    if not isinstance(spec, dict):
        return None, 0
    with tempfile.TemporaryDirectory(prefix="prx-look.") as scratch:
        run = Path(recipe.run_folder)
        try:
            tokenizer = made_tokenizer(spec, recipe.train_loader, run if (run / TOKENIZER).exists() else Path(scratch))
        except UserError as error:
            raise UserError(f"{error} Without it: name the folder of the data, {recipe.train_loader.get('path')}") from error
    return tokenizer, int(spec.get("max_tokens", 256))
