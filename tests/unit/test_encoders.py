"""Text encoders and autoencoders: the real classes with tiny random weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import QWEN3_VL_TEXT, T5GEMMA_HALF
from host_reads import HostReads
from safetensors.torch import save_file

from prx_composer.models import HuggingFaceTextEncoder
from prx_composer.models.autoencoder import DiffusersAutoencoder, Pixels
from prx_composer.models.encoders import load_tokenizer, train_tokenizer

CAPTIONS = ["a red circle on the left of a white background", "a blue ring", ""]


def saved_t5gemma(folder: Path) -> transformers.T5GemmaEncoderModel:
    config = transformers.T5GemmaConfig(encoder=T5GEMMA_HALF, decoder=T5GEMMA_HALF, is_encoder_decoder=False)
    torch.manual_seed(0)
    model = transformers.T5GemmaEncoderModel(config).eval()
    model.save_pretrained(folder)
    return model


def test_t5gemma_by_folder_gives_its_own_hidden_states(tokenizer: Any, tmp_path: Path) -> None:
    reference = saved_t5gemma(tmp_path)
    encoder = HuggingFaceTextEncoder(tokenizer, pretrained=str(tmp_path), max_tokens=12)
    assert encoder.hidden_size == 24
    tokens = encoder.tokenize(CAPTIONS)
    expected = reference(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"].long()).last_hidden_state
    torch.testing.assert_close(encoder(**tokens), expected.detach())
    assert not list(encoder.parameters()) and not encoder.state_dict()


def test_t5gemma_as_diffusers_own_prx_folders_hold_it_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    """They hold the inner T5GemmaEncoder's weights beside the whole model's configuration."""
    reference = saved_t5gemma(tmp_path)
    save_file(
        {name: tensor.clone() for name, tensor in reference.encoder.state_dict().items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    encoder = HuggingFaceTextEncoder(tokenizer, pretrained=str(tmp_path), max_tokens=12)
    tokens = encoder.tokenize(CAPTIONS)
    expected = reference(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"].long()).last_hidden_state
    torch.testing.assert_close(encoder(**tokens), expected.detach())


ENCODERS: list[dict[str, Any]] = [
    {"model_type": "t5gemma", "encoder": T5GEMMA_HALF, "decoder": T5GEMMA_HALF},
    QWEN3_VL_TEXT,
    {"model_type": "t5", "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    {
        "model_type": "clip_text_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
]


@pytest.mark.parametrize("config", ENCODERS, ids=lambda config: config["model_type"])
def test_encoders_by_config_train_and_ignore_padding(tokenizer: Any, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = HuggingFaceTextEncoder(tokenizer, config=config, max_tokens=12, trainable=True).eval()
    tokens = encoder.tokenize(CAPTIONS)
    embedding = encoder(**tokens)
    assert embedding.shape == (3, 12, 24)
    embedding[tokens["attention_mask"]].square().sum().backward()
    table = encoder.encoder.get_input_embeddings().weight.grad  # pyright: ignore
    assert table.abs().sum() > 0
    scrambled = torch.where(tokens["attention_mask"], tokens["input_ids"], torch.full_like(tokens["input_ids"], 3))
    again = encoder(scrambled, tokens["attention_mask"])
    valid = tokens["attention_mask"]
    torch.testing.assert_close(embedding[valid], again[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", ENCODERS, ids=lambda config: config["model_type"])
def test_no_encoder_has_the_host_look_at_its_mask(tokenizer: Any, config: dict[str, Any]) -> None:
    """transformers looks for padding, and leaves out a mask that has none: what comes out is the same."""
    torch.manual_seed(0)
    encoder = HuggingFaceTextEncoder(tokenizer, config=config, max_tokens=12)
    for captions in (CAPTIONS, ["a red circle on the left of a white background, a blue ring and more"]):
        tokens = encoder.tokenize(captions)
        with HostReads() as reads:
            found = encoder(**tokens)
        assert not reads.found
        theirs = copy.deepcopy(encoder.network)
        for module in theirs.modules():
            if isinstance(module, transformers.PreTrainedModel) and "sdpa" in module.config._attn_implementation:
                module.set_attn_implementation("sdpa")
        expected: Any = theirs(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"].long())
        torch.testing.assert_close(found, expected.last_hidden_state.detach())
    assert tokens["attention_mask"].all()


def test_multimodal_models_give_their_text_tower(tokenizer: Any, tmp_path: Path) -> None:
    text = {key: value for key, value in QWEN3_VL_TEXT.items() if key != "model_type"} | {"vocab_size": 64}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=24, deepstack_visual_indexes=[0])
    model = transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    encoder = HuggingFaceTextEncoder(tokenizer, pretrained=str(tmp_path), max_tokens=12)
    tokens = encoder.tokenize(CAPTIONS[:2])
    expected = model.eval().language_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"].long())
    torch.testing.assert_close(encoder(**tokens), expected.last_hidden_state.detach())


def test_a_trained_tokenizer_knows_the_words_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "A blue circle, zebra"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.convert_ids_to_tokens(loaded(text)["input_ids"]) == ["a", "blue", "circle", "<unk>", "<unk>", "</s>"]
    assert len(loaded("")["input_ids"]) == 1, "the empty caption is one real token"


def test_wrong_encoders_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    t5 = dict(model_type="t5", d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="either `pretrained`.*or `config`"):
        HuggingFaceTextEncoder(tokenizer)
    with pytest.raises(ValueError, match="model_type"):
        HuggingFaceTextEncoder(tokenizer, config={"d_model": 24})
    with pytest.raises(ValueError, match="tokens but the text encoder only 5 embeddings"):
        HuggingFaceTextEncoder(tokenizer, config=t5 | {"vocab_size": 5})
    with pytest.raises(OSError, match="nowhere"):
        HuggingFaceTextEncoder(tokenizer, pretrained=str(tmp_path / "nowhere"))


# fmt: off
KL = dict(_class_name="AutoencoderKL", block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2,
          up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1)
DC = dict(_class_name="AutoencoderDC", latent_channels=4, attention_head_dim=4, encoder_block_out_channels=[8, 8],
          decoder_block_out_channels=[8, 8], encoder_layers_per_block=[1, 1], decoder_layers_per_block=[1, 1],
          encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=[[], []],
          decoder_qkv_multiscales=[[], []], scaling_factor=0.3)
# fmt: on


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_exact_both_ways() -> None:
    encoded = Pixels().encode(images())
    assert encoded.min() >= -1 and encoded.max() <= 1 and torch.equal(Pixels().decode(encoded), images())


@pytest.mark.parametrize("config", [KL, DC], ids=["kl", "dc"])
def test_latents_are_diffusers_shifted_and_scaled(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    autoencoder = DiffusersAutoencoder(config=config)
    module = autoencoder._frozen.module
    pixels = images().float() / 127.5 - 1
    with torch.no_grad():
        encoded: Any = module.encode(pixels)  # pyright: ignore[reportCallIssue]
        expected = encoded.latent_dist.mode() if config is KL else encoded.latent
    scaled = (expected - config.get("shift_factor", 0.0)) * config["scaling_factor"]
    latent = autoencoder.encode(images())
    torch.testing.assert_close(latent, scaled)
    assert latent.shape == (2, autoencoder.channels, 16 // autoencoder.downsampling, 24 // autoencoder.downsampling)
    with torch.no_grad():
        decoded = module.decode(expected).sample  # pyright: ignore[reportCallIssue]
    assert (autoencoder.decode(latent).int() - Pixels().decode(decoded).int()).abs().max() <= 1


def test_wrong_autoencoders_are_refused() -> None:
    with pytest.raises(ValueError, match="either `pretrained`"):
        DiffusersAutoencoder()
    with pytest.raises(ValueError, match="AutoencoderKL or AutoencoderDC"):
        DiffusersAutoencoder(config={"_class_name": "UNet2DModel"})
