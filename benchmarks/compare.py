"""Our code against other code that does the same: which is faster, and by how much.

python benchmarks/compare.py --json                            # models; the last line: {"eager": …, "compiled": …, "tread": …}
python benchmarks/compare.py memory --tokens 1024 --valid-text 0.4
python benchmarks/compare.py optimizers                        # also: generate

Both run in one process and in turns. Before anything is timed, they must have computed the same. Ratios are theirs over ours,
taken round by round, so above 1 we are faster.
"""

import copy
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from common import main, must_agree, ratio, summary, time_in_turns
from common import memory as resident_memory
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline
from quality import PlainMuon
from torch import Tensor, nn

from prx_composer.algorithms.ema import WeightAverage
from prx_composer.commands.export.pipeline import write_pipeline, written_aside
from prx_composer.data.sources import all_scenes
from prx_composer.models import HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.encoders import train_tokenizer
from prx_composer.models.routing import RandomRouter
from prx_composer.optim.muon import Muon, muon_parameters
from prx_composer.runs.opening import Trained, load_trained

TOLERANCE = 1e-4

Tokens = Annotated[int, "image tokens, a square"]
ValidText = Annotated[float, "share of text tokens that are not padding, on average"]


# --------------------------------------------------------------------------------------------------------- models


def make_backbone(sizes: dict[str, Any], device: str = "cpu") -> PRXBackbone:
    """Make one with random weights, none of which is zero: at its start half of the network has no gradient."""
    torch.manual_seed(0)
    backbone = PRXBackbone(**sizes)
    for parameter in backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return backbone.to(device).train()


def make_pair(hidden_size: int, depth: int, device: str) -> tuple[PRXTransformer2DModel, PRXBackbone]:
    """Make theirs and ours with the same weights."""
    sizes = dict(hidden_size=hidden_size, depth=depth, num_heads=max(hidden_size // 64, 1))
    ours = make_backbone(dict(in_channels=16, patch_size=2, context_in_dim=256, **sizes), device)
    theirs: Any = PRXTransformer2DModel(**ours.config)
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(device).train(), ours


def make_inputs(
    model: PRXBackbone, batch_size: int, tokens: int, text_tokens: int, valid_text: float, device: str
) -> dict[str, Tensor]:
    """Draw inputs of so many image tokens, and captions of which a share is no padding; without a mask if there is none."""
    if int(tokens**0.5) ** 2 != tokens:
        raise SystemExit(f"--tokens must be a square such as 256, not {tokens}.")
    side = model.patch_size * round(tokens**0.5)
    text = torch.randn(batch_size, text_tokens, model.context_in_dim)
    inputs = {"hidden_states": torch.randn(batch_size, model.in_channels, side, side)}
    if valid_text < 1:
        lengths = (text_tokens * valid_text * (0.5 + torch.rand(batch_size))).clamp(1, text_tokens)
        inputs["attention_mask"] = torch.arange(text_tokens)[None] < lengths[:, None]
    inputs |= {"timestep": torch.rand(batch_size), "encoder_hidden_states": text}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def largest_difference(theirs: nn.Module, ours: nn.Module, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Return those of outputs and gradients, relative to the largest entry of each tensor."""
    outputs = [theirs(**inputs, return_dict=False)[0], ours(**inputs)]
    weight = torch.linspace(-1, 1, outputs[0].numel(), device=outputs[0].device).view_as(outputs[0])
    for output in outputs:
        (output.float() * weight).sum().backward()
    found, gradients = {"outputs": _relative(*outputs), "gradients": 0.0}, dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        mine = gradients[name].grad
        assert parameter.grad is not None and mine is not None, name
        found["gradients"] = max(found["gradients"], _relative(parameter.grad, mine))
    theirs.zero_grad()
    ours.zero_grad()
    return found


def _relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


def training_step(model: Callable[..., Any], inputs: dict[str, Tensor], **also: Any) -> Callable[[], None]:
    """Return a forward and backward pass; of further arguments, functions are called in every step."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        output = model(**inputs, **{name: value() if callable(value) else value for name, value in also.items()})
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def models(
    *,
    hidden_size: int = 256,
    depth: int = 6,
    tokens: Tokens = 256,
    text_tokens: int = 64,
    valid_text: ValidText = 1.0,
    batch_size: int = 8,
    rounds: int = 21,
    threads: int = 1,
    device: str = "cpu",
    compile: bool = True,
) -> dict[str, Any]:
    """Forward + backward, diffusers' PRXTransformer2DModel over PRXBackbone; above 1 ours is faster.

    `tread` is our eager step with half of the tokens routed around all but the first and the last block, over their eager step:
    it computes less, on purpose.
    """
    torch.set_num_threads(threads)
    theirs, ours = make_pair(hidden_size, depth, device)
    inputs = make_inputs(ours, batch_size, tokens, text_tokens, valid_text, device)
    differences = largest_difference(theirs, ours, inputs)
    must_agree(differences, TOLERANCE)

    generator = torch.Generator(device).manual_seed(0)
    router = RandomRouter("tread", 1, depth - 1, 0.5)
    steps: dict[str, Callable[[], None]] = {
        "diffusers": training_step(theirs, inputs, return_dict=False),
        "ours": training_step(ours, inputs),
        "ours, tread": training_step(ours, inputs, route=lambda: router.draw(batch_size, tokens, generator)),
    }
    pairs = {"eager": ("diffusers", "ours"), "tread": ("diffusers", "ours, tread")}
    if compile:
        compiled: list[Any] = [torch.compile(model, fullgraph=model is ours, dynamic=False) for model in (theirs, ours)]
        steps["diffusers, compiled"] = training_step(compiled[0], inputs, return_dict=False)
        steps["ours, compiled"] = training_step(compiled[1], inputs)
        pairs["compiled"] = ("diffusers, compiled", "ours, compiled")
    times = time_in_turns(steps, rounds)
    return {
        "largest_difference": differences,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratios": {name: ratio(times, *pair) for name, pair in pairs.items()},
    }


def memory(
    *,
    hidden_size: int = 256,
    depth: int = 6,
    tokens: Tokens = 256,
    text_tokens: int = 64,
    valid_text: ValidText = 1.0,
    batch_size: int = 8,
    threads: int = 1,
    device: str = "cpu",
    start: Annotated[Literal["spawn", "fork"], "fork saves the imports; numbers are those of spawn only"] = "spawn",
) -> dict[str, Any]:
    """Peak memory of a forward + backward, ours over diffusers' PRXTransformer2DModel.

    It is what a pass takes above what was there before, each in a fresh process.
    """
    context, found = multiprocessing.get_context(start), {}
    sizes = (hidden_size, depth, device), (batch_size, tokens, text_tokens, valid_text, device)
    for name in ("diffusers", "ours"):
        pool = context.Pool(1)
        found[name] = pool.apply(_peak_of_a_step, (name, threads, *sizes))
        pool.close()  # not terminate, of which Composer's signal handler would make a traceback
        pool.join()
    return {
        "image_tokens": tokens,
        "peak_mb": {name: round(peak / 1e6, 1) for name, peak in found.items()},
        "ratios": {"memory": {"median": round(found["ours"] / found["diffusers"], 3)}},
    }


def _peak_of_a_step(name: str, threads: int, of_model: tuple[Any, ...], of_inputs: tuple[Any, ...]) -> int:
    torch.set_num_threads(threads)
    theirs, ours = make_pair(*of_model)
    inputs = make_inputs(ours, *of_inputs)
    model, also = (theirs, {"return_dict": False}) if name == "diffusers" else (ours, {})
    for parameter in model.parameters():  # gradients are there before, and as large in both
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    on_gpu = of_model[-1] != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = torch.cuda.memory_allocated() if on_gpu else resident_memory("VmRSS")
    output = model(**inputs, **also)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return (torch.cuda.max_memory_allocated() if on_gpu else resident_memory()) - before


# ----------------------------------------------------------------------------------------------------- optimizers

SMOOTHING = 0.999
LR = 1e-3
SIZES: dict[str, dict[str, Any]] = {
    "host time, 16 blocks": dict(hidden_size=8, num_heads=2, depth=16),
    "16 blocks, hidden 64": dict(hidden_size=64, num_heads=4, depth=16),
    "6 blocks, hidden 256": dict(hidden_size=256, num_heads=4, depth=6),
}


class Average:
    """A weight average one tensor after the other."""

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, smoothing: float) -> None:
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.mul_(smoothing).add_(parameter, alpha=1 - smoothing)


def after_backward(average: Any, *optimizers: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what a step does after its backward pass."""

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()
        average.update(SMOOTHING)

    return step


def torch_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Make torch's own Muon, which it has from 2.9 on, with fused AdamW for the rest."""
    matrices = list(muon_parameters(model).values())
    taken = {id(weight) for weight in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    muon: Any = vars(torch.optim)["Muon"]
    return [muon(matrices, lr=LR, weight_decay=0.0), torch.optim.AdamW(rest, lr=LR, fused=True)]


def optimizers(*, rounds: int = 21, threads: int = 1) -> dict[str, Any]:
    """Optimizer and weight average, other ways over ours; above 1 ours is faster.

    The loop is Muon as it is usually published, one matrix after the other, and AdamW and EMA one tensor after the other. The
    smallest size has the structure of the 24-hour model and hardly any arithmetic: what it costs is the host's time.
    """
    torch.set_num_threads(threads)
    return {name: _compare_optimizers(size, rounds) for name, size in SIZES.items()}


def _compare_optimizers(size: dict[str, Any], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=64, **size)
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]

    def trained() -> nn.Module:
        one = copy.deepcopy(model)
        for parameter, gradient in zip(one.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        return one

    mine, other, plain = trained(), trained(), trained()
    average, loop_average = WeightAverage(mine), Average(other)
    steps = {
        "ours": after_backward(average, Muon(mine, lr=LR)),
        "loop": after_backward(loop_average, PlainMuon(other, lr=LR)),
        "AdamW, fused": after_backward(WeightAverage(plain), torch.optim.AdamW(plain.parameters(), lr=LR, fused=True)),
    }
    for _ in range(3):
        steps["ours"]()
        steps["loop"]()
    pairs = {"weights": (average.parameters, loop_average.parameters), "averages": (average.average, loop_average.average)}
    differences = {
        what: max(float((a - b).abs().max()) for a, b in zip(ours.values(), theirs, strict=True))
        for what, (ours, theirs) in pairs.items()
    }
    must_agree(differences, TOLERANCE)
    if hasattr(torch.optim, "Muon"):
        steps["torch.optim.Muon"] = after_backward(WeightAverage(other := trained()), *torch_muon(other))
    times = time_in_turns(steps, rounds)
    return {
        **size,
        "matrices": len(muon_parameters(model)),
        "largest_difference_after_3_steps": differences,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratios": {f"{name} / ours": ratio(times, name, "ours") for name in steps if name != "ours"},
    }


# ------------------------------------------------------------------------------------------------------- drawing

PROMPT = "a red circle on the left of a white background"
T5: dict[str, Any] = dict(model_type="t5", d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0)


def generate(
    *, size: int = 32, steps: int = 20, guidance_scale: float = 3.0, batch: int = 8, rounds: int = 25, threads: int = 1
) -> dict[str, Any]:
    """Drawing with diffusers' pipeline and with this package from the same exported model; above 1 ours is faster.

    Both start from the prompt and a seed and end with pixels in memory. The model has patches of 4 px, 1.4M parameters and random
    weights. One prompt at a time, since diffusers' PRX pipelines take no more; and, for this package alone, a batch.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "exported"
        with written_aside(folder) as partial:
            write_pipeline(Trained(_drawing_model(), Path("benchmark"), "raw", size), partial)
        ours = load_trained(str(folder)).model
        ours.flow = replace(ours.flow, clamp_sampling=True)  # the steps of the pipeline
        pipeline = PRXPixelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options: Any = dict(height=size, width=size, num_inference_steps=steps, guidance_scale=guidance_scale)

    def theirs(output_type: str = "np") -> Any:
        generator = torch.Generator().manual_seed(7)
        fixed: Any = dict(use_resolution_binning=False, return_dict=False)
        return pipeline(PROMPT, generator=generator, output_type=output_type, **fixed, **options)[0]

    calls: list[int] = []
    hook = ours.backbone.register_forward_pre_hook(lambda module, args: calls.append(1))
    difference = float((ours.sample([PROMPT], seeds=[7], **options) - theirs("pt")).abs().max())
    hook.remove()
    must_agree({"images": difference}, TOLERANCE)
    turns = {
        "diffusers": theirs,
        "ours": lambda: ours.generate([PROMPT], seeds=[7], **options),
        "batch": lambda: ours.generate([PROMPT] * batch, seeds=list(range(batch)), **options),
    }
    times = time_in_turns(turns, rounds)
    times["per_image_in_batch"] = [milliseconds / batch for milliseconds in times.pop("batch")]
    return {
        "settings": {**options, "batch": batch, "rounds": rounds},
        "largest_difference": difference,
        "backbone_calls_per_step": len(calls) / steps,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratios": {name: ratio(times, "diffusers", name) for name in ("ours", "per_image_in_batch")},
    }


def _drawing_model() -> TextToImage:
    torch.manual_seed(0)
    words = train_tokenizer(scene.caption for scene in all_scenes())
    encoder = HuggingFaceTextEncoder(words, config=T5, max_tokens=14, trainable=True)
    sizes: dict[str, Any] = dict(hidden_size=128, depth=4, num_heads=4, mlp_ratio=3.5, context_in_dim=128)
    return TextToImage(make_backbone(dict(in_channels=3, patch_size=4, **sizes)), encoder).eval()


if __name__ == "__main__":
    sys.exit(main(__doc__, models, memory, optimizers, generate))
