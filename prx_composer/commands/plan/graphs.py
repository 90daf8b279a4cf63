"""What `torch.compile` has to compile in a run: graphs of the backbone for every number of tokens, and of frozen networks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prx_composer.commands.plan.step_cost import Segment
from prx_composer.commands.plan.timeline import Span
from prx_composer.data.format import Bucket, Manifest, make_buckets
from prx_composer.models.counting import DENOISER
from prx_composer.models.kernels import BLOCKS
from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel

# Neither is measured with this package. Starting to finetune Llama-3 8B, whose layers are one graph forward and backward, took
# 20 s on an A100 (pytorch/torchtune#1445); a backward pass has about twice the kernels of a forward pass.
FORWARD = 7.0  # seconds for a forward pass of a graph; three times as many with its backward pass
KEPT = 0.1  # of that, where the graph is read from the run folder: it is traced again, and no kernel is made


@dataclass(frozen=True)
class Compiling:
    """What a run compiles.

    Args:
        graphs: how many, by what they are of.
        seconds: that they take on the first start. seconds_again: and where the run goes on.
    """

    graphs: dict[str, int]
    seconds: float
    seconds_again: float

    @property
    def count(self) -> int:
        return sum(self.graphs.values())


def compiling(
    planned: MetaModel,
    recipe: Recipe,
    stages: Sequence[tuple[Span, Sequence[Segment]]],
    manifests: Mapping[Path, Manifest] | None,
    num_gpus: int,
) -> Compiling:
    """Return what is compiled over the stages of a run, each graph once.

    What draws images is left out: a graph or two for each stage.

    Args:
        manifests: of the data, for their sizes; None: those that `prx data convert` makes for the largest stage.
    """
    base, buckets = _buckets(planned, recipe, [span.image_size for span, _ in stages], manifests)
    keys = set[tuple[Any, ...]]()
    for span, segments in stages if {BLOCKS, DENOISER} & {*planned.graphs} else ():
        every = {bucket.at(span.image_size, base, _multiple(planned)) for bucket in buckets}
        sizes = {size for size in every if _is_taken(planned, size)}
        for segment in segments:
            keys |= {(*key, span.microbatch_size) for size in sizes for key in _training(planned, size, segment.active)}
        if recipe.eval_loader is not None:
            own = (recipe.global_eval_batch_size or span.batch_size) // num_gpus
            keys |= {("backbone (evaluation)", _shape(planned, size), own) for size in sizes}
    graphs = {name: sum(key[0] == name for key in keys) for name in sorted({key[0] for key in keys})}
    graphs |= {name: 2 for name in planned.graphs if name not in (BLOCKS, DENOISER)}  # with gradients, and without
    passes = sum(count if name == "backbone (evaluation)" else 3 * count for name, count in graphs.items())
    return Compiling(graphs, FORWARD * passes, KEPT * FORWARD * passes)


def _multiple(planned: MetaModel) -> int:
    return planned.model.backbone.patch_size * planned.model.autoencoder.downsampling


def _buckets(
    planned: MetaModel, recipe: Recipe, sizes: Sequence[int], manifests: Mapping[Path, Manifest] | None
) -> tuple[int, set[Bucket]]:
    """Return the data's image size, and the buckets at that size."""
    if manifests:
        base = next(iter(manifests.values())).image_size
        return base, {bucket for manifest in manifests.values() for bucket in manifest.buckets}
    return max(sizes), {*make_buckets(max(sizes), _multiple(planned))}


def _is_taken(planned: MetaModel, size: Bucket) -> bool:
    """Return whether a backbone has such images; some have square ones alone."""
    try:
        return bool(planned.model.backbone.num_tokens(*(side // planned.model.autoencoder.downsampling for side in size)))
    except ValueError:
        return False


def _shape(planned: MetaModel, size: Bucket) -> Any:
    """Return what of an image's size a graph depends on: of a block the number of tokens alone."""
    down = planned.model.autoencoder.downsampling
    return planned.model.backbone.num_tokens(*(side // down for side in size)) if BLOCKS in planned.graphs else size


def _training(planned: MetaModel, size: Bucket, active: frozenset[str]) -> Iterator[tuple[Any, ...]]:
    """Yield what is compiled for a size in training, with these tricks on."""
    backbone, down = planned.model.backbone, planned.model.autoencoder.downsampling
    for trick in planned.switched:
        trick.set_active(planned.model, trick.name in active)
    try:
        tokens = backbone.num_tokens(*(side // down for side in size))
        route = None if backbone.router is None else backbone.router.draw(1, tokens, torch.Generator())
    finally:
        for trick in planned.switched:
            trick.set_active(planned.model, trick.active)
    shape, whole = _shape(planned, size), DENOISER in planned.graphs
    if route is None or not whole:
        yield "backbone", shape
    if route is not None:
        yield "backbone (routed)", shape if whole else route.kept_indices.shape[1]
