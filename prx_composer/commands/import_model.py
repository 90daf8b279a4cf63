"""`prx import`: a diffusers PRX model as the beginning of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from prx_composer.commands.options import show_log


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of `prx import`."""

    folder: Annotated[str, Argument(metavar="DIR", help="Folder of a diffusers PRXPixelPipeline or PRXPipeline.")]
    output: Annotated[str, Option(metavar="FILE", help="YAML to write.")]


def import_model(options: ImportOptions) -> None:
    """Write a YAML that trains on from a diffusers PRX model: its sizes, text encoder, flow, and model.init_from.

    It is merged over a recipe: composer train.py RECIPE.yaml FILE run_name=…
    """
    from prx_composer.runs.pretrained_models import write_fragment

    show_log()
    target = Path(options.output).expanduser()
    write_fragment(options.folder, target)
    echo(f"{target} · composer train.py RECIPE.yaml {target} run_name=…")
