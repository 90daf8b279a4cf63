"""The builder: what a recipe's components are on the meta device and for real, and what the program gives to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import SQUARE, encode, gradient, write

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.runs.model_parts import UnknownNetwork
from prx_composer.training.components import Components

Recipe = dict[str, Any]
Write = Callable[..., str]


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("autoencoder", [False, True])
def test_on_the_meta_device_a_model_has_the_real_ones_parameters_and_no_storage(
    autoencoder: bool, tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    if autoencoder:
        sizes = {"_class_name": "AutoencoderKL", "latent_channels": 3, "block_out_channels": [8, 8], "norm_num_groups": 4}
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        tiny_recipe["model"]["autoencoder"] = {"name": "diffusers", "config": sizes | blocks}
    tiny_recipe["model"]["compile"] = True
    recipe = config.load([write_recipe(tiny_recipe)])
    meta = Components(recipe, meta=True)
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert not Path(recipe.run_folder).exists(), "nothing is made, no tokenizer either"
    real = Components(recipe, meta=False)
    assert shapes(meta.backbone) == shapes(real.model.backbone)
    words = real.model.text_encoder.network.get_input_embeddings().num_embeddings
    theirs = Components(recipe, meta=True)  # by now the run has its tokenizer
    assert shapes(theirs.model) == shapes(real.model) and len(real.model.text_encoder.tokenizer) == words
    assert meta.multiple == real.multiple == 4 * (2 if autoencoder else 1)
    assert [type(a) for a in meta.algorithms.values()] == [type(a) for a in real.algorithms.values()]
    assert len(meta.stages) == 2 and meta.optimizer.param_groups[0]["params"][0].is_meta


def test_the_24_hour_recipe_is_made_without_its_weights() -> None:
    components = Components(config.load(["yamls/24h.yaml"], 8), meta=True, num_ranks=8)
    model = components.model
    assert model.text_encoder.hidden_size == model.backbone.context_in_dim
    assert all(parameter.is_meta for parameter in [*model.parameters(), *model.text_encoder.network.parameters()])


def test_a_network_of_which_only_the_name_is_known_is_named(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": "nobody/knows-it"}
    components = Components(config.load([write_recipe(tiny_recipe)]), meta=True)
    with pytest.raises(UnknownNetwork, match=r"model\.text_encoder: the sizes of 'nobody/knows-it'"):
        _ = components.text_encoder
    assert components.backbone.depth == 2, "what doesn't need it is made all the same"


class Declares:
    """What is given to it, and what it sets itself."""

    def __init__(self, folder: str, image_size: int, seed: int = 3, source: Any = None, model: Any = None):
        self.given = folder, image_size, seed, source, model


def test_a_component_is_given_what_it_declares_and_keeps_the_defaults_that_are_its_own(
    tiny_recipe: Recipe, write_recipe: Write
) -> None:
    registry.callbacks.register("declares")(Declares)
    try:
        tiny_recipe["callbacks"] = {"declares": {}}
        path = write_recipe(tiny_recipe)
        recipe = config.load([path])
        config.check(recipe)
        made: Any = Components(recipe, meta=True).callbacks["declares"]
        assert made.given == (recipe.run_folder, 16, 3, recipe.train_loader["source"], None)
        other = config.load([path, "callbacks.declares.folder=elsewhere", "callbacks.declares.seed=5"])
        config.check(other)
        set_by_recipe: Any = Components(other, meta=True).callbacks["declares"]
        assert set_by_recipe.given[:3] == ("elsewhere", 16, 5)
    finally:
        registry.catalogue.REGISTRY.pop(("prx_composer", "callbacks", "declares"))


def test_the_folder_of_our_own_callbacks_is_the_run_s(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["callbacks"] = {"images": {"prompts": ["x"], "folder": "elsewhere", "image_size": 8}}
    with pytest.raises(UserError, match=r"^callbacks\.images\.folder: no such argument"):
        config.check(config.load([write_recipe(tiny_recipe)]))


def test_what_a_run_is_measured_on_does_not_depend_on_its_seed(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path / "d", [(SQUARE, encode(gradient(16, 16)))] * 16)
    loader = {"name": "image_caption", "path": str(data), "captions": {"caption": 1.0, "alt": 1.0}}
    tiny_recipe |= {"train_loader": loader | {"shuffle": False}, "eval_loader": loader, "algorithms": {}}
    file = write_recipe(tiny_recipe | {"global_train_batch_size": 16, "global_eval_batch_size": 6, "eval_subset_num_batches": 2})

    def captions(key: str, seed: int) -> list[list[list[int]]]:
        loader = Components(config.load([file, f"seed={seed}"]), meta=False).loader(key)
        return [batch["input_ids"].tolist() for batch in loader.dataloader]

    assert captions("train_loader", 1) != captions("train_loader", 2)
    assert captions("eval_loader", 1) == captions("eval_loader", 2)
    assert Components(config.load([file]), meta=False).evaluator is not None
    assert "an evaluation measures 12 of 16 samples (75.0%), evenly spaced" in caplog.text
