"""LoRA (arXiv:2106.09685): low-rank adapters of the blocks' matrices are trained, the weights that they adapt are not."""

from typing import Any

import torch

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError
from prx_composer.models.layers import BLOCK_LAYERS, add_adapters
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.optim import add_parameters, drop_frozen


class LoRA(Trick):
    """Train adapters instead of the backbone, usually from the weights of `model.init_from`.

    Checkpoints hold the frozen weights too, so that a run goes on without `init_from` (the run folder keeps the text encoder).
    `prx export` merges the adapters into the weights, or with `--format lora` writes them alone.

    Args:
        rank: of the adapters' products.
        alpha: scale: the product counts alpha / rank. By default the rank, which makes it 1.
        targets: ends of the names of the layers that are adapted; by default every matrix of a block but its modulation.

    Raises:
        ValueError: a rank or alpha that isn't positive, or no targets.
    """

    name = "lora"
    shapes_sampling = True

    def __init__(self, rank: int = 16, alpha: float | None = None, targets: list[str] | None = None):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}.")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha must be positive, not {alpha}.")
        if targets is not None and not targets:
            raise ValueError("targets is empty; leave it out for every matrix of a block but its modulation.")
        super().__init__()
        self.rank, self.alpha, self.targets = rank, float(alpha or rank), tuple(targets or ())

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        if not hasattr(model, "backbone"):
            raise UserError("algorithms.lora needs a model with a `backbone`, such as text_to_image.")
        if model.text_encoder.trainable:
            raise UserError(
                "algorithms.lora trains adapters of model.backbone only, but model.text_encoder.trainable is true; set it to "
                "false."
            )
        added = [name for name in ("fusion", "conditioners") if getattr(model.backbone, name, None)]
        if getattr(getattr(model.backbone, "resolution_embedder", None), "added", False):
            added.append("resolution_embedder")
        if added:
            raise UserError(
                f"algorithms.lora freezes what the backbone has when it comes, and an algorithm before it has given it "
                f"{' and '.join(added)}, which would never be trained; write lora first."
            )
        with seeded_initialisation(model.random.seed, self.name):
            targets = self.targets or getattr(model.backbone, "block_layers", BLOCK_LAYERS)
            add_adapters(model.backbone, self.rank, self.alpha, targets)
        if optimizer is not None:
            drop_frozen(optimizer)
        add_parameters(optimizer, model.backbone)
