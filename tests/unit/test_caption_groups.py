"""Captions are encoded in groups of similar length: the same values, fewer tokens, and no look at the device."""

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU
from host_reads import HostReads
from test_encoders import ENCODERS
from torch import Tensor

from prx_composer.data.loader import caption_groups, split_batch
from prx_composer.models import HuggingFaceTextEncoder, TextToImage
from prx_composer.models.counting import _Counter
from prx_composer.models.huggingface import known_config

GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "sliding_window": 8,
}
BERT = {"model_type": "bert", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = next(config for config in ENCODERS if config["model_type"] == "t5")
WORDS = ["a", "red", "circle", "on", "the", "left", "of", "a", "white", "background", "and", "a", "blue", "ring"]


def captions(*lengths: int) -> list[str]:
    return [" ".join(WORDS[(index + place) % len(WORDS)] for place in range(length)) for index, length in enumerate(lengths)]


def frozen(tokenizer: Any, config: dict[str, Any], max_tokens: int = 64, side: str = "right") -> HuggingFaceTextEncoder:
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = side
    torch.manual_seed(0)
    return HuggingFaceTextEncoder(tokenizer, config=config, max_tokens=max_tokens)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("config", [*ENCODERS, GEMMA, BERT], ids=lambda config: config["model_type"])
def test_groups_give_valid_tokens_the_values_of_all_captions_together(tokenizer: Any, config: dict[str, Any], side: str) -> None:
    """To 2e-5 of the largest value, in fp32. Places of padding are zero."""
    encoder = frozen(tokenizer, config, side=side)
    tokens = encoder.tokenize(captions(40, 3, 60, 0, 17, 9, 30, 62))
    groups = caption_groups(tokens["attention_mask"])
    assert groups["text_groups"] == ((3, 16), (2, 32), (3, 64))
    whole, grouped, valid = encoder(**tokens), encoder(**tokens, order=groups["text_order"], groups=groups["text_groups"]), None
    valid = tokens["attention_mask"]
    assert encoder._cuts and grouped.shape == whole.shape and grouped.dtype == whole.dtype
    assert (grouped - whole)[valid].abs().max() <= 2e-5 * whole[valid].abs().max()
    assert not grouped[~valid].any()


def test_an_encoder_that_reads_padding_is_given_all_of_it(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "embedding_size": 24}
    encoder = frozen(tokenizer, {"model_type": "convbert", **sizes, "initializer_range": 0.5})
    tokens = encoder.tokenize(captions(40, 3, 60, 12))
    groups = caption_groups(tokens["attention_mask"])
    assert torch.equal(encoder(**tokens, order=groups["text_order"], groups=groups["text_groups"]), encoder(**tokens))
    assert "depends on padding" in caplog.text


def test_groups_are_those_that_pad_least() -> None:
    """Held against every way to cut captions in order of length into at most four groups."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths = rng.integers(1, 129, 9)
        found = caption_groups(torch.arange(128) < torch.from_numpy(lengths)[:, None]).get("text_groups", ((9, 128),))
        rounded = np.sort(-(-lengths // 16) * 16)
        costs = []
        for ends in (e for n in range(4) for e in itertools.combinations(range(1, 9), n)):
            parts = np.split(rounded, ends)
            costs.append(sum(len(part) * part[-1] for part in parts) + 32 * len(ends))
        assert sum(count * tokens for count, tokens in found) + 32 * (len(found) - 1) == min(costs)
        assert sum(count for count, _ in found) == 9


def test_groups_are_of_a_microbatch_and_known_to_the_host() -> None:
    mask = torch.arange(64) < torch.tensor([3, 60, 20, 5, 64, 64, 64, 64])[:, None]
    batch = {"input_ids": torch.arange(512).view(8, 64), "attention_mask": mask}
    first, second = (DeviceCPU().batch_to_device(microbatch) for microbatch in split_batch(batch, 4))
    assert first["text_groups"] == ((2, 16), (1, 32), (1, 64)) and first["text_order"].tolist() == [0, 3, 2, 1]
    assert "text_groups" not in second, "all of it is valid"
    assert [part["text_groups"] for part in split_batch(first, 2)] == [((1, 16), (1, 64)), ((2, 32),)]
    assert caption_groups(torch.zeros(3, 64, dtype=torch.bool))["text_groups"] == ((3, 16),)
    assert caption_groups(mask[:, :14]) == {}
    assert "text_groups" not in split_batch(batch | {"text_embedding": torch.zeros(8, 64, 2)}, 4)[0], "nothing is encoded"
    assert len(split_batch({"input_ids": torch.zeros(4, 2)}, 2)) == 2, "another loader's batch"
    with warnings.catch_warnings(action="error"):  # the last batch of an evaluation
        assert len(split_batch({"input_ids": torch.zeros(4, 2)}, 5)) == 1


def batch_of(model: TextToImage, batch: dict[str, Tensor]) -> dict[str, Any]:
    tokens = model.text_encoder.tokenize(captions(40, 3, 20, 9))
    (microbatch,) = split_batch(batch | tokens, 4)
    assert microbatch["text_groups"] == ((2, 16), (2, 48))
    return microbatch


@pytest.fixture
def model(tokenizer: Any, tiny_model: Callable[..., TextToImage]) -> TextToImage:
    made = tiny_model(trainable_text=False)
    made.text_encoder = frozen(tokenizer, T5)
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_has_the_loss_of_the_step_without_groups(
    model: TextToImage, tiny_batch: dict[str, Tensor], dropout: float
) -> None:
    model.caption_dropout = dropout
    batch, losses = batch_of(model, tiny_batch), []
    for one in (batch, {key: value for key, value in batch.items() if key not in ("text_order", "text_groups")}):
        model.random.begin_step(3)
        outputs = model(one)
        losses.append(float(model.loss(outputs, one)["total"]))
        if dropout:
            assert 0 < (outputs.text.mask.sum(1) == 1).sum() < 4, "some captions are the empty one"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_backbone_reads_no_place_of_padding(model: TextToImage, tiny_batch: dict[str, Tensor]) -> None:
    model.caption_dropout = 0.0
    batch, losses = batch_of(model, tiny_batch), []
    embedding = model.text_encoder(batch["input_ids"], batch["attention_mask"])
    for noise in (0.0, 1e3):
        model.random.begin_step(3)
        one = batch | {"text_embedding": embedding.masked_fill(~batch["attention_mask"][..., None], noise)}
        losses.append(model.loss(model(one), one)["total"])
    assert torch.equal(*losses)


def test_a_step_with_groups_has_the_host_read_nothing(model: TextToImage, tiny_batch: dict[str, Tensor]) -> None:
    batch = batch_of(model, tiny_batch)
    model(batch)  # whether padding may be cut off is tried once
    with HostReads() as reads:
        model(batch)
    assert not reads.found, reads.found


def test_captions_of_102_tokens_on_average_take_less_than_half_of_256(tokenizer: Any) -> None:
    """In FLOPs of a layer as wide as T5Gemma-2B's, in microbatches of 32 as 24h.yaml has them."""
    known = known_config("google/flan-t5-xl")
    assert known is not None
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(93), 0.45, 256), 8, 256).astype(int)
    assert 100 < lengths.mean() < 104
    flops = [0, 0]
    for chosen in np.split(lengths, 8):
        groups = caption_groups(torch.arange(256) < torch.from_numpy(chosen)[:, None])
        with torch.device("meta"):
            encoder = HuggingFaceTextEncoder(tokenizer, config=known | {"num_layers": 1}, max_tokens=256)
            encoder._cuts, ids, order = True, torch.ones(32, 256, dtype=torch.int64), torch.arange(32)
            for index, given in enumerate(({}, {"order": order, "groups": groups["text_groups"]})):
                with _Counter() as counter:
                    encoder(ids, ids.bool(), **given)
                flops[index] += counter.flops
    assert 0.40 < flops[1] / flops[0] < 0.48, flops[1] / flops[0]
