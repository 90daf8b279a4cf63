"""Which architecture learns best? Trains a recipe with one backbone after the other in its place, and compares them.

python benchmarks/architectures.py yamls/quickstart.yaml [--match parameters] [--only sd3 --only flux] [key=value …]

The first stack is `prx`, the recipe as it is. The others have the backbone of yamls/architectures/<name>.yaml, made as wide and
deep as the recipe's, on its patches and text: data, text encoder, optimizer, steps and seeds are the same for all. Matched is the
width (hidden size, heads and depth), or the number of parameters, or the FLOPs of a training step: then heads and depth are
searched for, and how far off the match remains is said. Parameters and FLOPs are counted as `prx plan` counts them.

Runs take turns, are compared with `prx` of the same seed, and go on after a kill, all as in ablate.py.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from ablate import Comparison, check_stack, defaults, known_of, length_of, train_and_compare
from ablate_report import report
from common import ROOT, parse, says_errors
from turns import Stack

from prx_composer import registry
from prx_composer.common.errors import UserError, nearest
from prx_composer.models.counting import flops_of_backbone
from prx_composer.models.signatures import Signature
from prx_composer.recipe import config
from prx_composer.recipe.arguments import split
from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel

ARCHITECTURES = ROOT / "yamls" / "architectures"
FIRST = "prx"
SCORES_OF_WORDS = ("shapes_score", "icons_score")  # of captions that training never saw
LABELS = {"name": "labels", "tokenizer": {"train": True, "by": "caption"}}
Arguments = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Frame:
    """What every backbone of a comparison has in common.

    Args:
        channels, side: of what it sees: pixels, or places of a latent.
        context: width of a text embedding. tokens: of a caption, at most.
    """

    channels: int
    side: int
    patch_size: int
    head_dim: int
    context: int
    tokens: int


@dataclass(frozen=True)
class Size:
    """A backbone's arguments and what it costs.

    Args:
        parameters: all of them. flops: of training on one image.
    """

    arguments: Arguments
    heads: int
    depth: int
    parameters: int
    flops: int


def fitted(own: Mapping[str, Any], frame: Frame, heads: int, depth: int) -> Arguments:
    """Return the arguments of a class of diffusers at another size.

    Args:
        own: those of its recipe. What is no size is kept.
        depth: blocks that image tokens go through; lists of blocks keep their shares.

    Raises:
        UserError: a class without a signature. ValueError: the class has no such size.
    """
    if "block_out_channels" in own:
        return _levels(own, frame, heads, depth)
    signature: Signature = registry.signatures.get(own["class"], "class")()
    width, grid = heads * frame.head_dim, frame.side // frame.patch_size
    own_heads = own["num_attention_heads"]
    own_dim = own.get("attention_head_dim") or own["hidden_size"] // own_heads
    values: Arguments = {
        "patch_size": frame.patch_size,
        "in_channels": frame.channels * (frame.patch_size**2 if signature.packs else 1),
        "out_channels": frame.channels,
        "sample_size": frame.side,
        "num_attention_heads": heads,
        "num_cross_attention_heads": heads,
        "num_kv_heads": _whole(own.get("num_kv_heads", 0) * heads, own_heads),
        "attention_head_dim": frame.head_dim,
        "cross_attention_head_dim": frame.head_dim,
        "hidden_size": width,
        "axes_lens": [frame.tokens, grid, grid],
        str(signature.text_width): frame.context,
        str(signature.pooled_width): frame.context,  # of the mean of the recipe's own text
        **dict.fromkeys(signature.equal_width, width),
        **_depths(own, depth),
    }
    for axes in ("axes_dims_rope", "axes_dim_rope"):
        values[axes] = [2 * _whole(frame.head_dim * dim, 2 * own_dim) for dim in own.get(axes, ())]
    found = {key: values.get(key, value) for key, value in own.items()}
    most = signature.most_patches(found)
    if most is not None and most < grid:  # positions: of a side, or of all places
        found["pos_embed_max_size"] *= math.ceil(grid / most) ** (1 if most == found["pos_embed_max_size"] else 2)
    return found


def _whole(value: int, divisor: int) -> int:
    if value % divisor:
        raise ValueError(f"{value} is no multiple of {divisor}")
    return value // divisor


def _depths(own: Mapping[str, Any], depth: int) -> dict[str, int]:
    """Share a depth among the lists of blocks as they share their own; those that refine text and image stay as they are."""
    lists = {key: value for key, value in own.items() if key.endswith("layers") and "refiner" not in key}
    left, total = depth - own.get("num_refiner_layers", 0), sum(lists.values())
    *first, last = lists
    shares = {key: max(1, round(left * lists[key] / total)) for key in first}
    shares[last] = left - sum(shares.values())
    if shares[last] < 1:
        raise ValueError(f"depth {depth} is too small")
    return shares


def _levels(own: Mapping[str, Any], frame: Frame, heads: int, depth: int) -> Arguments:
    """Return the arguments of Stable Cascade's class, whose sizes are lists by level; a depth is a three of blocks."""
    width, levels, ways = heads * frame.head_dim, len(own["block_out_channels"]), ("down", "up")
    counts = [count for way in ways for count in own[f"{way}_num_layers_per_block"]]
    shares = [*_depths({f"{index}_layers": count for index, count in enumerate(counts)}, depth).values()]
    return dict(own) | {
        "in_channels": frame.channels,
        "out_channels": frame.channels,
        "patch_size": frame.patch_size,
        "conditioning_dim": width,
        "block_out_channels": [width] * levels,
        "num_attention_heads": [heads] * levels,
        "down_num_layers_per_block": shares[:levels],
        "up_num_layers_per_block": shares[levels:],
        "clip_text_in_channels": frame.context,
        "clip_text_pooled_in_channels": frame.context,
    }


def measured(arguments: Arguments, frame: Frame, heads: int, depth: int) -> Size:
    """Build a backbone without storage and count it."""
    name, given = split(arguments, "model.backbone")
    with torch.device("meta"):
        backbone = registry.backbones.get(name, "model.backbone.name")(**given)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    tokens = frame.tokens if getattr(backbone, "context_argument", "") is not None else 1  # of a label
    return Size(arguments, heads, depth, parameters, flops_of_backbone(backbone, frame.side, frame.side, tokens))


def matched(own: Mapping[str, Any], frame: Frame, first: Size, match: str) -> Size:
    """Return a class of diffusers at the size that matches the first backbone's.

    Heads are looked for from two thirds to three halves of the first one's. With each the cost grows by the same with every
    block, from which the depth follows. Of sizes within 2% the one is taken whose heads and depth are nearest to the first one's;
    without any, the nearest match.

    Args:
        match: width, parameters or flops.

    Raises:
        ValueError: it has no size at all that could.
    """

    def sized(heads: int, depth: int) -> Size:
        return measured({"name": "diffusers", **fitted(own, frame, heads, depth)}, frame, heads, depth)

    if match == "width":
        return sized(first.heads, first.depth)
    wanted, costs = getattr(first, match), dict[tuple[int, int], float]()
    for heads in range(math.ceil(2 * first.heads / 3), 3 * first.heads // 2 + 1):
        with suppress(ValueError):  # heads that the class cannot have
            few, more = (getattr(sized(heads, depth), match) for depth in (4, 8))
            depth = 4 + 4 * (wanted - few) / (more - few)
            costs |= {(heads, near): few + (near - 4) * (more - few) / 4 for near in (math.floor(depth), math.ceil(depth))}

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        off = abs(math.log(costs[size] / wanted))
        reshaped = abs(math.log(size[0] / first.heads)) + abs(math.log(size[1] / first.depth))
        return (0.0, reshaped) if off < 0.02 else (off, reshaped)

    costs = {size: cost for size, cost in costs.items() if size[1] > 0 and cost > 0}
    if not costs:
        raise ValueError("it has no size like that")
    return sized(*min(costs, key=distance))


# --------------------------------------------------------------------------------------------------------- stacks


@dataclass
class Options(Comparison):
    """The command line."""

    _: KW_ONLY
    together: Annotated[int, "runs that take turns with one another, prx among them, each in memory"] = 8
    match: Annotated[Literal["width", "parameters", "flops"], "what all have in common with the recipe's backbone"] = "width"
    only: Annotated[Sequence[str], "files of yamls/architectures, without .yaml; repeat for several; by default all"] = ()


def architectures(only: Sequence[str]) -> dict[str, Arguments]:
    """Return the arguments of diffusers' backbones, and of those like them, in yamls/architectures, by file.

    Raises:
        UserError: one of `only` isn't there.
    """
    found = dict[str, Arguments]()
    for path in sorted(ARCHITECTURES.glob("*.yaml")):
        recipe = config.load([str(path)])
        if recipe.model["backbone"]["name"] == "diffusers":
            registry.import_code(recipe.code_paths)
            found[path.stem] = {key: value for key, value in recipe.model["backbone"].items() if key != "name"}
    if unknown := [name for name in only if name not in found]:
        raise UserError(
            f"--only {unknown[0]}: there is no such backbone in yamls/architectures.{nearest(unknown[0], list(found))}"
        )
    return {name: found[name] for name in only or found}


def first_of(recipe: Recipe) -> tuple[Frame, Size]:
    """Return what all backbones have in common with the recipe's, and that one.

    Raises:
        UserError: it isn't `prx`, whose size the others take.
    """
    arguments = dict(recipe.model["backbone"])
    if arguments.pop("name") != FIRST:
        raise UserError(f"model.backbone: others are compared with {FIRST}, of whose width and depth they are.")
    planned = MetaModel(recipe).model
    backbone, heads = planned.backbone, arguments["num_heads"]
    side = recipe.image_size // planned.autoencoder.downsampling
    sizes = backbone.patch_size, backbone.hidden_size // heads, backbone.context_in_dim, planned.text_encoder.max_tokens
    frame = Frame(backbone.in_channels, side, *sizes)
    return frame, measured({"name": FIRST, **arguments}, frame, heads, backbone.depth)


def plan_stacks(options: Options) -> tuple[Recipe, dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return the recipe, what is known of every stack, and which backbones cannot be compared on it.

    Raises:
        UserError: no recipe, or one that is refused with a backbone that could be.
    """
    if not options.files:
        raise UserError("Name a recipe, such as yamls/quickstart.yaml.")
    recipe = check_stack(options.files, Stack(FIRST, ()), options.overrides)
    frame, first = first_of(recipe)
    sizes, labelled, refused = {FIRST: first}, set[str](), list[dict[str, Any]]()
    for name, own in architectures(options.only).items():
        labels = registry.signatures.get(own["class"], "class").text_width is None
        try:
            if labels and any(recipe.callbacks.get(score) not in (None, False) for score in SCORES_OF_WORDS):
                raise ValueError("it takes class labels, and the score asks for captions that training never saw")
            sizes[name] = matched(own, frame, first, options.match)
        except ValueError as error:
            refused.append({"stack": name, "changes": [], "reason": str(error)})
        labelled |= {name} if labels else set()
    known = dict[str, dict[str, Any]]()
    for name, size in sizes.items():
        code = [*recipe.code_paths, *([] if name == FIRST else config.load([str(ARCHITECTURES / f"{name}.yaml")]).code_paths)]
        sets = [] if name == FIRST else [f"model.backbone={json.dumps(size.arguments)}", f"code_paths={json.dumps(code)}"]
        sets += [f"model.text_encoder={json.dumps(LABELS)}"] if name in labelled else []
        pooled = None if name == FIRST else registry.signatures.get(size.arguments["class"], "class").pooled_width
        sets += ["model.text_encoder.pooled=mean"] if pooled else []
        try:
            own = check_stack(options.files, Stack(name, ()), [*sets, *options.overrides])
        except UserError as error:  # one of its algorithms, say, has no place in that class
            if name in options.only:
                raise
            refused.append({"stack": name, "changes": [], "reason": str(error).removeprefix(f"--stack {name}: ")})
            continue
        found = known_of(Stack(name, ()), own, recipe, [*options.files, *sets, *defaults(own), *options.overrides])
        changes = [] if name == FIRST else [f"the backbone of yamls/architectures/{name}.yaml"]
        images = recipe.global_train_batch_size
        known[name] = found | {"changes": changes, "architecture": vars(size) | {"images": images, "match": options.match}}
    return recipe, known, refused


# ---------------------------------------------------------------------------------------------------------- report


def page(result: dict[str, Any]) -> str:
    """Write Markdown: what the backbones are and cost, before what `report` says."""
    lines = report(result).split("\n")
    place = next(index for index, line in enumerate(lines) if line.startswith("## As measured"))
    first = result["stacks"][FIRST]["architecture"]
    match = first["match"]
    titles = ("backbone", "heads × depth", "parameters", "GFLOPs an image", "off the match", "images/s", "memory (MB)")
    table = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, known in result["stacks"].items():
        size, runs = known["architecture"], [run for run in result["runs"] if run["stack"] == name and run["step_ms"]]
        off = "–" if match == "width" else f"{100 * (size[match] / first[match] - 1):+.1f}%"
        speeds = [1000 * size["images"] / run["step_ms"]["median"] for run in runs]
        memory = [run["memory_mb"] for run in runs]
        measured = [f"{fmean(values):,.0f}" if values else "–" for values in (speeds, memory)]
        cost = [f"{size['parameters']:,}", f"{size['flops'] / 1e9:.3f}", off]
        table.append("| " + " | ".join([f"`{name}`", f"{size['heads']} × {size['depth']}", *cost, *measured]) + " |")
    said = f"Backbones are matched by {match}. FLOPs are of training on one image, counted; images/s follow from the median step."
    return "\n".join([*lines[:place], "## Backbones", "", said, "", *table, "", *lines[place:]])


@says_errors
def main(arguments: list[str]) -> int:
    """Train, measure, write; return 0 if all backbones trained to their end."""
    options = parse(Options, arguments, __doc__, "architectures.py")
    recipe, stacks, refused = plan_stacks(options)
    output = options.output or Path("runs", f"ablate-architectures-{Path(options.files[0]).stem}")
    what = f"backbones of one {options.match} in {' '.join(options.recipe)} ({length_of(options, recipe)})"
    command = ["benchmarks/architectures.py", *arguments]
    return train_and_compare(options, recipe, stacks, refused, output, what, command, page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
