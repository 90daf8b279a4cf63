"""What is counted of networks from their configuration, held against the real classes at work; and of images that are cropped."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prx_composer import registry
from prx_composer.commands.plan.conditions import Conditions, find_gpu
from prx_composer.commands.plan.plan import make_plan
from prx_composer.common.errors import UserError
from prx_composer.data.format import NOTICED, Bucket, assign_bucket, make_buckets, share_cropped
from prx_composer.data.sources import FolderSource, prepare
from prx_composer.models import HuggingFaceTextEncoder
from prx_composer.models.autoencoder import DiffusersAutoencoder
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.counting import StepCounter, shape_of
from prx_composer.models.huggingface import known_config, random_config, random_encoder
from prx_composer.models.kernels import Recorder, Watching
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe import config
from prx_composer.runs.model_parts import Vocabulary
from prx_composer.training.components import Components
from prx_composer.training.preflight.data_fit import check_data

Write = Callable[..., str]
CONDITIONS = Conditions(find_gpu("h200"), utilisation=1.0)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
HALF = dict(SMALL, num_key_value_heads=1, head_dim=8, vocab_size=64)
ARCHITECTURES: list[dict[str, Any]] = [
    dict(model_type="t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"),
    dict(model_type="umt5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2),
    dict(model_type="mt5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2),
    dict(model_type="t5gemma", encoder=HALF, decoder=HALF, vocab_size=64),
    dict(model_type="clip", text_config=dict(SMALL), vision_config=dict(SMALL)),
    dict(model_type="clip_text_model", **SMALL),
    dict(model_type="bert", **SMALL),
    dict(model_type="xlm-roberta", **SMALL),
    dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2),  # its matrices are no Linear
    dict(model_type="qwen2", num_key_value_heads=1, **SMALL),
    dict(model_type="gemma3_text", **HALF),
    dict(model_type="bart", d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48),
]


def counted(settings: dict[str, Any], tokens: int, tokenizer: Any = None) -> int:
    """FLOPs of the text encoder in a step of a small model, per caption."""
    with torch.device("meta"):
        encoder = HuggingFaceTextEncoder(tokenizer or Vocabulary(64), config=settings, max_tokens=tokens)  # pyright: ignore[reportArgumentType]
        backbone = PRXBackbone(3, 4, encoder.hidden_size, hidden_size=32, num_heads=2, depth=1)
    ids, mask = torch.zeros(2, tokens, dtype=torch.int64), torch.ones(2, tokens, dtype=torch.bool)
    batch = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "input_ids": ids, "attention_mask": mask}
    return StepCounter(TextToImage(backbone, encoder)).count(shape_of(batch)).flops["text encoder"]


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=lambda settings: settings["model_type"])
def test_flops_of_text_encoders_are_those_of_the_real_class_at_work(settings: dict[str, Any]) -> None:
    settings = settings if "encoder" in settings or "text_config" in settings else {"vocab_size": 64} | settings
    network = random_encoder(random_config(settings)).eval()
    ids = torch.ones(3, 20, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=ids, attention_mask=ids)
    # The angles of rotary embeddings are computed once for the batch.
    assert 3 * counted(settings, 20) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (4, False), (12, False), (1, True), (4, True)])
def test_convolutions_cost_as_much_for_each_gradient_as_forward(groups: int, transposed: bool) -> None:
    layer: Any = (nn.ConvTranspose2d if transposed else nn.Conv2d)(12, 24, 3, groups=groups, padding=1)
    recorder = Recorder()
    with Watching(recorder):
        layer(torch.zeros(2, 12, 5, 7, requires_grad=True)).sum().backward()
    assert sum(op.flops for op in recorder.ops) == 3 * 2 * (2 * 5 * 7) * 9 * 12 * 24 // groups


@pytest.mark.parametrize("name", ["google/t5-v1_1-large", "google/flan-t5-large", "google/t5-v1_1-small"])
def test_a_t5_encoder_is_counted_as_its_closed_form(
    name: str, tiny_recipe: dict[str, Any], write_recipe: Write, tokenizer: Any, tmp_path: Path
) -> None:
    settings = known_config(name)
    assert settings is not None
    d, inner, ff, layers, heads, t = *(settings[k] for k in ("d_model",)), 64 * settings["num_heads"], *(
        settings[k] for k in ("d_ff", "num_layers", "num_heads")
    ), 100  # fmt: skip
    flops = layers * (2 * t * 4 * d * inner + 2 * 2 * t * t * inner + 2 * t * 3 * d * ff)
    parameters = settings["vocab_size"] * d + layers * (4 * d * inner + 3 * d * ff + 2 * d) + d + 32 * heads
    assert counted(settings, t) == flops
    tiny_recipe["model"]["backbone"]["context_in_dim"] = d
    for number, given in enumerate(({"pretrained": name}, {"config": settings}, {"pretrained": str(tmp_path / "folder")})):
        if number == 2:  # a folder with a configuration and nothing else
            random_config(settings).save_pretrained(tmp_path / "folder")
        tiny_recipe["model"]["text_encoder"] = {"name": "huggingface", "tokenizer": "some/words", "max_tokens": t, **given}
        stage = make_plan(config.load([write_recipe(tiny_recipe)]), CONDITIONS).stages[0]
        assert (stage.flops["text encoder"], stage.memory.frozen) == (flops, 4 * parameters)


def test_what_chooses_its_work_by_what_it_reads_is_refused(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    experts = dict(model_type="mixtral", num_key_value_heads=1, num_local_experts=2, vocab_size=500, **SMALL)
    tiny_recipe["model"]["text_encoder"] |= {"config": experts, "trainable": False}
    tiny_recipe["model"]["backbone"]["context_in_dim"] = 32
    recipe = config.load([write_recipe(tiny_recipe)])
    with pytest.raises(UserError, match=r"model.text_encoder cannot be counted: .*FLOPs of mixtral .* --leave-out text_encoder"):
        make_plan(recipe, CONDITIONS)


class _Reads(PRXBackbone):
    def forward(self, hidden_states: Any, *given: Any, **named: Any) -> Any:
        return super().forward(hidden_states * hidden_states.mean().item(), *given, **named)


def test_a_backbone_that_reads_its_input_is_named_and_not_left_out(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    registry.backbones.register("reads")(_Reads)
    tiny_recipe["model"]["backbone"]["name"] = "reads"
    recipe = config.load([write_recipe(tiny_recipe)])
    try:
        with pytest.raises(UserError, match=r"^model.backbone cannot be counted: .*It must work on tensors without") as refused:
            make_plan(recipe, CONDITIONS)
    finally:
        registry.catalogue.REGISTRY.pop(("prx_composer", "backbones", "reads"))
    assert "--leave-out" not in str(refused.value)


def test_an_autoencoder_at_work_in_training_is_counted_as_the_real_one(
    tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path
) -> None:
    settings = dict(
        _class_name="AutoencoderKL", block_out_channels=[8, 16], latent_channels=4, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    real = DiffusersAutoencoder(config=settings)
    tiny_recipe["model"]["backbone"] |= {"in_channels": 4, "patch_size": 2}
    real.module.save_config(tmp_path / "vae")
    for given in ({"config": settings}, {"pretrained": str(tmp_path / "vae")}):
        tiny_recipe["model"]["autoencoder"] = {"name": "diffusers", **given}
        stages = make_plan(config.load([write_recipe(tiny_recipe)]), CONDITIONS).stages
        for stage in stages:
            image = torch.zeros(1, 3, stage.image_size, stage.image_size, dtype=torch.uint8)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                real.encode(image)
            assert stage.flops["autoencoder"] == counter.get_total_flops() > 0
            assert stage.memory.frozen == 4 * sum(p.numel() for p in real.module.parameters())
    tiny_recipe["model"]["autoencoder"] = {"name": "diffusers", "pretrained": "some/dc-ae-f2c4"}
    recipe = config.load([write_recipe(tiny_recipe)])
    with pytest.raises(UserError, match=r"model.autoencoder cannot be counted: some/dc-ae-f2c4 .* --leave-out autoencoder"):
        make_plan(recipe, CONDITIONS)
    tiny_recipe["train_loader"]["latent"] = "latent"  # it doesn't run then
    plan = make_plan(config.load([write_recipe(tiny_recipe)]), CONDITIONS)
    assert "autoencoder" not in plan.stages[0].flops and "taken to divide an image's sides by 2" in "".join(plan.unknown)


# ------------------------------------------------------------------------------------------------------- cropping


def test_the_share_cropped_is_what_a_scaled_image_has_outside_of_its_bucket() -> None:
    rng = random.Random(0)
    buckets = make_buckets(256, 32)
    for _ in range(300):
        height, width = rng.randint(20, 3000), rng.randint(20, 3000)
        bucket = assign_bucket(height, width, buckets)
        scale = max(bucket.height / height, bucket.width / width)
        visible = (bucket.height / scale) * (bucket.width / scale)
        assert share_cropped(height, width, bucket) == pytest.approx(1 - visible / (height * width))
    assert share_cropped(100, 150, Bucket(64, 64)) == pytest.approx(1 / 3)


def mixed(folder: Path, shapes: list[tuple[int, int]]) -> str:
    folder.mkdir()
    rows = []
    for index, (width, height) in enumerate(shapes):
        Image.new("RGB", (width, height)).save(folder / f"{index}.png")
        rows.append(json.dumps({"file": f"{index}.png", "caption": "a picture"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return str(folder)


def cropped(source: FolderSource) -> int:
    rows = [(sample.height, sample.width) for _, sample in source.samples()]
    return sum(share_cropped(*row, assign_bucket(*row, source.buckets)) > NOTICED for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 64, "multiple": 32}, "64x64"),
        ({"image_size": 64, "multiple": 64, "min_bucket": 1}, "64x64"),
        ({"image_size": 256, "multiple": 8, "min_bucket": 30}, "more of them: min_bucket: 1"),
        ({"image_size": 256, "multiple": 8, "min_bucket": 1, "max_aspect": 1.2}, "more of them: max_aspect: 1.5"),
    ],
)
def test_mixed_shapes_that_become_squares_are_said_and_the_advice_keeps_them(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = mixed(tmp_path / "photos", [(96, 64), (64, 96), (90, 60), (64, 64)] * 10)
    source = FolderSource(folder, **options)
    (note,) = source.notes
    lost = Counter(
        round(share_cropped(s.height, s.width, assign_bucket(s.height, s.width, source.buckets)), 9) for _, s in source.samples()
    )
    assert note.startswith(f"{cropped(source)} of 40 images are cropped by more than 15% of their area") and said in note
    assert f"{max(lost):.0%} at most" in note
    advice = note.partition("keep more of them: ")[2].partition(" (multiple")[0].rstrip(".").split("; or ")
    assert advice and advice[0]
    for remedy in advice:
        changes: dict[str, Any] = {name: float(value) for name, value in (part.split(": ") for part in remedy.split(" with "))}
        whole: dict[str, Any] = {name: int(value) for name, value in changes.items() if name != "max_aspect"}
        followed = FolderSource(folder, **options | changes | whole)
        assert 2 * cropped(followed) <= cropped(source)


def test_cropping_is_said_when_the_data_is_made_and_by_check(
    tmp_path: Path, tiny_recipe: dict[str, Any], write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mixed(tmp_path / "photos", [(96, 64)] * 10)
    spec = {"name": "folder", "folder": folder, "image_size": 16, "multiple": 16}
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(tmp_path / "data"), "source": spec}
    found = list(check_data(Components(config.load([write_recipe(tiny_recipe)]), meta=True)))
    assert any(result.mark == "!" and "10 of 10 images are cropped" in result.text for result in found)
    prepare(tmp_path / "data", FolderSource(folder, image_size=16, multiple=16), {})
    assert "10 of 10 images are cropped by more than 15%" in caplog.text
    assert FolderSource(mixed(tmp_path / "squares", [(64, 64)] * 3), image_size=64, multiple=32).notes == []
