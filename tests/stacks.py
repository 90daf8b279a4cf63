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
    algorithms["lpips"] |= {"net": "squeeze", "random_weights": True, "scale": 1.25, "compile": False}
    algorithms["perceptual_dino"] |= {"teacher": TEACHER, "image_size": 16}
    algorithms["ema"]["update_interval"] = "2ba"
    stages = [
        {"until": "4ba", "image_size": 16, "global_train_batch_size": 24},
        {"image_size": 24, "global_train_batch_size": 12},
    ]
    algorithms["progressive_resolution"]["stages"] = [s | {"device_train_microbatch_size": 6} for s in stages]
    small = {"global_train_batch_size": 24, "device_train_microbatch_size": 6, "image_size": 16}
    return recipe | {"algorithms": algorithms, "max_duration": "6ba", "save_interval": "6ba"} | small


TEXT = dict(model_type="t5", d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)


def at_toy_size(name: str, data: Path, folder: Path, steps: int = 3) -> Recipe:
    """A recipe for GPUs as it is written, at toy size, with toy networks, over a data set of shapes; its last step is stage 2."""
    recipe = yaml.safe_load((REPOSITORY / "yamls" / f"{name}.yaml").read_text())
    model, algorithms, switch = recipe["model"], recipe["algorithms"], f"{steps - 1}ba"
    assert model["backbone"].pop("size")
    model["backbone"] |= dict(hidden_size=32, depth=4, num_heads=2, patch_size=4, bottleneck_size=16, context_in_dim=24)
    encoder = dict(name="huggingface", config=TEXT, tokenizer={"train": True}, max_tokens=14)
    model |= {"compile": False, "text_encoder": encoder}
    for key in ("train_loader", "eval_loader"):
        recipe[key] |= {"path": str(data), "text_embedding": None, "num_workers": 0}
    algorithms["tread"] |= {"start_block": 1, "end_block": 2}
    algorithms["repa"] |= {"teacher": TEACHER, "block": 2, "end": switch, "projector_hidden": 16}
    algorithms["lpips"] |= {"net": "squeeze", "random_weights": True, "scale": 1.25, "compile": False}
    algorithms["perceptual_dino"] |= {"teacher": TEACHER, "image_size": 16}
    first, second = algorithms["progressive_resolution"]["stages"]
    first |= {"until": switch, "image_size": 16, "global_train_batch_size": 16, "device_train_microbatch_size": 8}
    second |= {"image_size": 24, "global_train_batch_size": 8, "device_train_microbatch_size": 4}
    recipe |= {key: value for key, value in first.items() if key != "until"} | {"global_eval_batch_size": 30}
    recipe["scheduler"]["t_warmup"] = "1ba"
    if recipe.get("parallelism_config"):
        recipe["parallelism_config"]["fsdp"]["shard_degree"] = -1
    recipe["callbacks"]["images"] |= {"interval": f"{steps}ba", "num_inference_steps": 1}
    ends = {"max_duration": f"{steps}ba", "eval_interval": f"{steps}ba"}
    return recipe | ends | {"precision": "fp32", "run_folder": str(folder / name), "progress_bar": False}
