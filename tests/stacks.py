"""The stack of the 24-hour recipe at toy size."""

import copy
from pathlib import Path
from typing import Any

import yaml

Recipe = dict[str, Any]
REPOSITORY = Path(__file__).parents[1]

TEACHER = {
    "config": dict(model_type="dinov2", hidden_size=12, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16)
}


def stack_of_24h(recipe: Recipe) -> Recipe:
    """The algorithms, optimizer and flow of yamls/24h.yaml as they are written there, at toy size and with toy teachers."""
    full = yaml.safe_load((REPOSITORY / "yamls" / "24h.yaml").read_text())
    recipe = copy.deepcopy(recipe)
    recipe["model"]["flow"] = full["model"]["flow"]
    recipe["model"]["backbone"] |= {"depth": 4, "bottleneck_size": 16}
    recipe["optimizer"], recipe["scheduler"] = full["optimizer"], full["scheduler"] | {"t_warmup": "2ba"}
    algorithms = full["algorithms"]
    algorithms["tread"] |= {"start_block": 1, "end_block": 2}
    algorithms["repa"] |= {"teacher": TEACHER, "block": 2, "end": "4ba", "projector_hidden": 16}
    algorithms["lpips"] |= {"net": "squeeze", "random_weights": True, "scale": 1.25}
    algorithms["perceptual_dino"] |= {"teacher": TEACHER, "image_size": 16}
    algorithms["ema"]["update_interval"] = "2ba"
    stages = [
        {"until": "4ba", "image_size": 16, "global_train_batch_size": 24},
        {"image_size": 24, "global_train_batch_size": 12},
    ]
    algorithms["progressive_resolution"]["stages"] = [s | {"device_train_microbatch_size": 6} for s in stages]
    small = {"global_train_batch_size": 24, "device_train_microbatch_size": 6, "image_size": 16}
    return recipe | {"algorithms": algorithms, "max_duration": "6ba", "save_interval": "6ba"} | small
