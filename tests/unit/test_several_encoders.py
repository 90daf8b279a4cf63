"""Text as the systems of diffusers' pipelines want it: what their `encode_prompt` makes of a text, ours makes of it."""

from typing import Any

import diffusers
import pytest
import torch
from architectures import of_pixels
from texts import CLIP, INSTRUCTION, LONGEST, PROMPTS, SYSTEM, clip, flux, gemma, lumina2, right, sana, sd3, t5, words
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prx_composer.commands.encode.encoding import CaptionEncoder, text_column
from prx_composer.common.errors import UserError, raise_all
from prx_composer.data.format import Bucket
from prx_composer.data.loader import Collator, split_batch
from prx_composer.data.stored import check_text_column, unpack, without_pooled
from prx_composer.models import HuggingFaceTextEncoder, TextToImage
from prx_composer.models.counting import TEXT_ENCODER
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.flow import TextConditioning
from prx_composer.models.huggingface import random_config, random_encoder
from prx_composer.models.several_encoders import SeveralTextEncoders, parts_of
from prx_composer.recipe import config
from prx_composer.training.meta_model import MetaModel
from prx_composer.training.trial import check_config

CPU = torch.device("cpu")
SIZES = {
    "SD3": dict(joint_attention_dim=24, pooled_projection_dim=12),
    "Flux": dict(joint_attention_dim=24, pooled_projection_dim=8),
}
MADE = {"SD3": sd3, "Flux": flux, "Sana": sana, "Lumina2": lumina2}


def model_of(name: str, encoder: Any, **options: Any) -> TextToImage:
    torch.manual_seed(0)
    cls = f"{name}Transformer2DModel"
    model = TextToImage(DiffusersBackbone(**{"class": cls}, **(of_pixels(cls) | SIZES.get(name, {}))), encoder, **options)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.normal_(std=0.1)
    return model


def pipeline_of(name: str, encoder: Any) -> Any:
    """Return the pipeline of these encoders, as it reads prompts; without what draws."""
    cls: Any = getattr(diffusers, {"SD3": "StableDiffusion3"}.get(name, name) + "Pipeline")
    given = dict.fromkeys(cls._get_signature_keys(cls)[0])
    for number, part in enumerate(parts_of(encoder)[0], start=1):
        tokenizer = part.tokenizer
        tokenizer.model_max_length = part.max_tokens
        ending = f"_{number}" if number > 1 else ""
        given |= {f"tokenizer{ending}": tokenizer, f"text_encoder{ending}": part.network}
    return cls(**given)


def as_its_pipeline_reads_it(name: str, pipeline: Any, prompts: list[str]) -> tuple[TextConditioning, TextConditioning | None]:
    """Return prompts and the empty prompt, as diffusers encodes them."""
    with torch.no_grad():
        if name == "SD3":
            text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, None, None, CPU, max_sequence_length=LONGEST + 2)
            every = torch.ones(text.shape[:2], dtype=torch.bool)
            return TextConditioning(text, every, pooled), TextConditioning(null, every, null_pooled)
        if name == "Flux":
            text, pooled, _ = pipeline.encode_prompt(prompts, None, CPU, max_sequence_length=LONGEST + 2)
            return TextConditioning(text, torch.ones(text.shape[:2], dtype=torch.bool), pooled), None
        own = {"complex_human_instruction": INSTRUCTION} if name == "Sana" else {"system_prompt": SYSTEM}
        text, mask, null, null_mask = pipeline.encode_prompt(prompts, device=CPU, max_sequence_length=LONGEST, **own)
        return TextConditioning(text, mask.bool()), TextConditioning(null, null_mask.bool())


def check_same(ours: TextConditioning, theirs: TextConditioning) -> None:
    assert torch.equal(ours.mask, theirs.mask)
    valid = theirs.mask[..., None]
    torch.testing.assert_close(ours.embedding * valid, theirs.embedding * valid, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.pooled, theirs.pooled, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_text_is_what_the_pipeline_makes_of_it(name: str) -> None:
    encoder: Any = MADE[name]()
    model = model_of(name, encoder)
    prompts = [*PROMPTS, "A Red CIRCLE " * 9]  # the last is cut
    theirs, null = as_its_pipeline_reads_it(name, pipeline_of(name, encoder), prompts)
    check_same(model.encode_prompts(prompts, CPU), theirs)
    if null is not None:
        check_same(model.encode_prompts([""] * 3, CPU), null)
    assert theirs.embedding.std(1).min() > 1e-3 and theirs.embedding.shape[1] == encoder.max_tokens


# ----------------------------------------------------------------------------------------------- in training, and stored


def batch_of(encoder: Any, captions: list[str] = PROMPTS) -> dict[str, Any]:
    image = torch.randint(0, 256, (len(captions), 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {"image": image, **encoder.tokenize(captions), "sample_id": torch.arange(len(captions))}


@pytest.mark.parametrize("name", MADE)
def test_a_dropped_caption_is_the_empty_one_and_padding_counts_where_the_pipeline_lets_it(name: str) -> None:
    encoder: Any = MADE[name]()
    model = model_of(name, encoder, caption_dropout=0.5)
    output: Any = model(batch_of(encoder, PROMPTS * 8))
    kept, null = model.encode_prompts(PROMPTS * 8, CPU), model.encode_prompts([""], CPU)
    dropped = torch.tensor([torch.equal(mask, null.mask[0]) and torch.allclose(text, null.embedding[0], atol=1e-6)
                            for text, mask in zip(output.text.embedding, output.text.mask, strict=True)])  # fmt: skip
    assert 0 < dropped.sum() < 16
    for one, full, empty in zip(output.text, kept, null, strict=True):
        expected = torch.where(dropped.view(-1, *[1] * (one.ndim - 1)), empty, full) if full.shape[1] else full
        torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-6)
    text = kept._replace(embedding=torch.where(kept.mask[..., None], kept.embedding, kept.embedding + 1))
    arguments = torch.randn(16, 3, 16, 16), torch.full((16,), 0.5)
    with torch.no_grad():
        torch.testing.assert_close(model._predict(*arguments, text), model._predict(*arguments, kept), atol=1e-5, rtol=1e-5)
    assert kept.mask.all() == (name in ("SD3", "Flux"))


@pytest.mark.parametrize("name", MADE)
def test_every_trained_encoder_has_gradients_and_resumes_from_the_state_dict(name: str) -> None:
    encoder: Any = MADE[name](trainable=True)
    model = model_of(name, encoder, caption_dropout=0.0)
    batch = batch_of(encoder)
    output: Any = model(batch)
    model.loss(output, batch)["total"].backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None]  # DDP waits for each
    other = model_of(name, MADE[name](trainable=True))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.encode_prompts(PROMPTS, CPU), model.encode_prompts(PROMPTS, CPU), atol=0, rtol=0)


@pytest.mark.parametrize(("storage", "scale"), [("float16", 1e6), ("int8", float("inf"))])
def test_text_that_is_not_finite_as_it_is_stored_is_refused(storage: str, scale: float) -> None:
    encoder: Any = t5()
    with torch.no_grad():
        encoder.network.encoder.final_layer_norm.weight.mul_(scale)
    with pytest.raises(UserError, match=f"What was made of a caption is not finite in {storage}: give another --storage"):
        CaptionEncoder(encoder, "caption", storage, 2, CPU)(Bucket(16, 16), [{"caption": PROMPTS[0]}])


@pytest.mark.parametrize(("storage", "error"), [("float32", 1e-6), ("bfloat16", 2**-8), ("int8", 1 / 127)])
@pytest.mark.parametrize("name", [*MADE, "mean"])
def test_what_is_stored_is_what_the_encoder_makes_in_training(name: str, storage: str, error: float) -> None:
    encoder: Any = t5(pooled="mean") if name == "mean" else MADE[name]()
    column, captions = text_column(encoder, "e", None, storage), [*PROMPTS, "a red square", "a white circle on a red square"]
    rows = CaptionEncoder(encoder, "caption", storage, 2, CPU)(Bucket(16, 16), [{"caption": text} for text in captions])
    samples: list[dict[str, Any]] = []
    for index, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        values = unpack({"shape": "x".join(map(str, row.shape)), "values": row.values}, storage)
        own: dict[str, Any] = {"text_embedding": values}
        if column.pooled:
            own["text_embedding"], own["text_pooled"] = without_pooled(values, column.pooled)
        samples.append({"caption": caption, "sample_id": index, "features": {}, **own})
    stored = split_batch(Collator(encoder.tokenizer, encoder.max_tokens)(samples), 2)
    model = model_of("Lumina2", gemma())
    model.text_encoder, online = encoder, []
    for part in stored:
        read: Any = model._encode_text(part, 0.0)
        fresh: Any = encoder.tokenize([captions[index] for index in part["sample_id"].tolist()])
        online = model._encode_text(fresh, 0.0)
        assert torch.equal(read.mask, online.mask)
        of_valid = online.embedding * online.mask[..., None]
        for found, expected in ((read.embedding, of_valid), (read.pooled, online.pooled)):
            coarse = expected.abs().amax(-1, keepdim=True) if expected.shape[1] else 1.0
            assert ((found - expected).abs() <= 1.5 * error * coarse + 1e-6).all()


def test_what_was_stored_by_other_encoders_or_in_another_way_is_refused() -> None:
    torch.manual_seed(0)
    encoder = sd3()
    column = text_column(encoder, "three", None, "int8")
    check_text_column(column, encoder, "train_loader.text_embedding")
    one, two, three = parts_of(encoder)[0]
    others = {
        "weights or": SeveralTextEncoders({"clip_l": two, "clip_g": one, "t5": three}, [["clip_l", "clip_g"], "t5"]),
        "up to 30 tokens": SeveralTextEncoders({"clip_l": one, "clip_g": two, "t5": three}, ["t5"]),
        "pooled vectors of 12 channels": t5(attend_padding=True),
    }
    others["pooled vectors of 12 channels"].max_tokens = 30
    for message, other in others.items():
        with pytest.raises(UserError, match=f"train_loader.text_embedding: .*{message}"):
            check_text_column(column, other, "train_loader.text_embedding")
    plain, torch_seed = gemma(), torch.manual_seed(1)
    assert torch_seed is not None
    plain_column = text_column(plain, "one", None, "int8")
    for settings in ({"layer": -2}, {"instruction": "draw "}, {"attend_padding": True}, {"clean": "lower"}):
        other = gemma(**settings)
        other.network.load_state_dict(plain.network.state_dict())
        with pytest.raises(UserError, match="weights or tokenizer"):
            check_text_column(plain_column, other, "train_loader.text_embedding")


# ------------------------------------------------------------------------------------------------------ what goes wrong


def of_clip(**settings: Any) -> HuggingFaceTextEncoder:
    return HuggingFaceTextEncoder(right(words("<s> $A </s>")), **({"config": CLIP, "max_tokens": LONGEST} | settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model_of("SD3", t5()), r"takes a pooled vector \(pooled_projection_dim: 12\), .* gives none; set its pooled"),
        (lambda: model_of("SD3", t5(pooled="mean")), r"gives one 24 wide; set pooled_projection_dim: 24"),
        (lambda: model_of("Sana", t5(pooled="mean")), r"which this backbone doesn't take; leave its `pooled` out"),
        (lambda: model_of("SD3", SeveralTextEncoders({"a": clip(pooled="end")})), r"joint_attention_dim is 24, .* 8 wide; set"),
        (lambda: t5(pooled="projected"), "pooled: projected is of CLIP's text encoders, not of t5; pooled: mean is of all"),
        (lambda: of_clip(max_tokens=17), "max_tokens: 17 are more than the 16 that CLIP has positions for"),
        (lambda: of_clip(pooled="end", config=CLIP | {"eos_token_id": 5}), "taken at token 5.*config.eos_token_id: 1"),
        (lambda: gemma(layer=-2, trainable=True), "layer: -2 leaves out layers that trainable: true would train"),
        (lambda: gemma(keep_instruction=False), "keep_instruction: false is for an instruction"),
        (lambda: SeveralTextEncoders({"a": t5()}, ["b"]), "tokens: there is no encoder 'b'; encoders has a"),
        (lambda: SeveralTextEncoders({"a": t5()}, []), "tokens: name every encoder"),
        (
            lambda: SeveralTextEncoders({"a": t5(), "b": clip()}, [["a", "b"]]),
            "side by side, so that they need the same max_tokens",
        ),
        (lambda: SeveralTextEncoders({"a": t5(), "b": clip()}, ["a"]), "encoders.b gives neither tokens nor a pooled vector"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_encoder_that_reads_most_says_what_is_lost_of_a_prompt() -> None:
    encoder: Any = sd3()
    fits, cut = encoder.readings(["red " * LONGEST, "red " * 20])
    assert fits.is_whole and cut.tokens == 21 and len(cut.ids) == LONGEST + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoders.t5.max_token=3", r"model\.text_encoder\.encoders\.t5\.max_token: no such argument. Did you mean 'max_tokens'"),
        ("encoders.t5.name=t5", r"model\.text_encoder\.encoders\.t5: .*'t5'"),
        ("encoders.t5.max_tokens=0", r"model\.text_encoder\.encoders\.t5\.max_tokens: 0 would leave nothing"),
        ("encoders.clip_l.pooled=both", r"model\.text_encoder\.encoders\.clip_l\.pooled: expected .*'both'"),
        ("tokenizer=t5-small", r"model\.text_encoder\.tokenizer: no such argument"),
        ("encoders=null", r"model\.text_encoder\.encoders must be a mapping"),
        ("encoders.t5={name: several, encoders: {}}", r"encoders\.t5.*must be a mapping such as"),
        ("tokens=[t6]", r"model\.text_encoder: tokens: there is no encoder 't6'"),
        ("encoders.clip_l.max_tokens=20", r"model\.text_encoder\.encoders\.clip_l: max_tokens: 20 are more than the 14"),
        ("encoders.clip_l.pooled=null", r"model\.backbone takes a pooled vector .* gives one 64 wide; set pooled_projection_dim"),
        ("encoders.clip_l.config.hidden_size=256", r"model\.backbone\.joint_attention_dim is 128, .* 320 wide"),
    ],
)
def test_mistakes_of_a_recipe_are_named_with_their_path(change: str, message: str) -> None:
    recipe = config.load(["yamls/architectures/sd3.yaml", f"model.text_encoder.{change}"])
    with pytest.raises(UserError, match=message):
        raise_all([one.text for one in check_config(recipe) if one.mark == "✗"])


def test_a_plan_counts_the_weights_and_the_work_of_all_encoders() -> None:
    recipe = config.load(["yamls/architectures/sd3.yaml"])
    planned = MetaModel(recipe)
    parts = parts_of(planned.model.text_encoder)[0]
    assert planned.frozen["text_encoder"] == sum(weight.nbytes for part in parts for weight in part.network.parameters())
    ids = torch.ones(1, 14, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        for spec in recipe.model["text_encoder"]["encoders"].values():
            network = random_encoder(random_config(spec["config"], vocab_size=9), spec.get("pooled"))
            network(input_ids=ids, attention_mask=ids)
    assert planned.count(32, []).flops[TEXT_ENCODER] == counter.get_total_flops()
