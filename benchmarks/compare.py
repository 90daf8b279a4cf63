"""The same model and training step in diffusers' code and in ours: which is faster, and by how much.

python benchmarks/compare.py --output benchmarks/results/compare-cpu.json
python benchmarks/compare.py --json                # the last line: {"eager": …, "compiled": …, "tread": …}
python benchmarks/compare.py --entry memory --tokens 1024 --valid-text 0.4
python benchmarks/compare.py --entry optimizers    # also: text

`PRXTransformer2DModel` in a plain PyTorch loop against `PRXBackbone`, with the same weights, in one process and in turns. Before
anything is timed, outputs and the gradients of every parameter must agree. A step is a forward and a backward pass; ratios are
theirs over ours, taken round by round, so above 1 we are faster. `tread` is our eager step with half of the tokens routed around
all but the first and the last block, over their eager step: it computes less, on purpose.
"""

import argparse
import gc
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from interleaved import ratio, summary, time_in_turns
from optimizers import compare_optimizers
from record import circumstances
from stored_text import compare_stored_text
from torch import Tensor, nn

from prx_composer.models import PRXBackbone
from prx_composer.models.routing import RandomRouter

TOLERANCE = 1e-4  # relative to the largest entry


def make_backbone(sizes: dict[str, Any], device: torch.device) -> PRXBackbone:
    """With random weights, none of which is zero: at its start half of the network has no gradient."""
    torch.manual_seed(0)
    backbone = PRXBackbone(**sizes)
    for parameter in backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return backbone.to(device).train()


def make_pair(sizes: dict[str, Any], device: torch.device) -> tuple[PRXTransformer2DModel, PRXBackbone]:
    """Theirs and ours with the same weights."""
    ours = make_backbone(sizes, device)
    theirs: Any = PRXTransformer2DModel(**ours.config)
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(device).train(), ours


def make_inputs(arguments: argparse.Namespace, model: PRXBackbone, device: torch.device) -> dict[str, Tensor]:
    side = model.patch_size * round(arguments.tokens**0.5)
    text = torch.randn(arguments.batch_size, arguments.text_tokens, model.context_in_dim)
    image = torch.randn(arguments.batch_size, model.in_channels, side, side)
    mask = torch.ones(arguments.batch_size, arguments.text_tokens, dtype=torch.bool)
    if arguments.valid_text < 1:
        shares = arguments.valid_text * (0.5 + torch.rand(arguments.batch_size))
        lengths = (arguments.text_tokens * shares).clamp(1, arguments.text_tokens)
        mask = torch.arange(arguments.text_tokens)[None] < lengths[:, None]
    inputs = {
        "hidden_states": image,
        "timestep": torch.rand(arguments.batch_size),
        "encoder_hidden_states": text,
        "attention_mask": mask,
    }
    if arguments.valid_text == 1:
        del inputs["attention_mask"]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def largest_difference(theirs: nn.Module, ours: nn.Module, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Of outputs and gradients, relative to the largest entry of each tensor."""
    found = {"outputs": 0.0, "gradients": 0.0}
    outputs = [theirs(**inputs, return_dict=False)[0], ours(**inputs)]
    weight = torch.linspace(-1, 1, outputs[0].numel(), device=outputs[0].device).view_as(outputs[0])
    for output in outputs:
        (output.float() * weight).sum().backward()
    found["outputs"] = _relative(*outputs)
    gradients = dict(ours.named_parameters())
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
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        output = model(**inputs, **{name: value() if callable(value) else value for name, value in also.items()})
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def model_sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = dict(hidden_size=arguments.hidden_size, depth=arguments.depth, num_heads=max(arguments.hidden_size // 64, 1))
    return dict(in_channels=16, patch_size=2, context_in_dim=256, **sizes)


def compare_models(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    theirs, ours = make_pair(model_sizes(arguments), device)
    inputs = make_inputs(arguments, ours, device)
    differences = largest_difference(theirs, ours, inputs)
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"Outputs or gradients differ by {differences}: there is nothing to compare.")

    generator = torch.Generator(device).manual_seed(0)
    router = RandomRouter("tread", 1, arguments.depth - 1, 0.5)
    steps: dict[str, Callable[[], None]] = {
        "diffusers": training_step(theirs, inputs, return_dict=False),
        "ours": training_step(ours, inputs),
        "ours, tread": training_step(ours, inputs, route=lambda: router.draw(arguments.batch_size, arguments.tokens, generator)),
    }
    pairs = {"eager": ("diffusers", "ours"), "tread": ("diffusers", "ours, tread")}
    if not arguments.no_compile:
        compiled: list[Any] = [torch.compile(model, fullgraph=model is ours, dynamic=False) for model in (theirs, ours)]
        steps["diffusers, compiled"] = training_step(compiled[0], inputs, return_dict=False)
        steps["ours, compiled"] = training_step(compiled[1], inputs)
        pairs["compiled"] = ("diffusers, compiled", "ours, compiled")
    times = time_in_turns(steps, arguments.rounds)
    return {
        "largest_difference": differences,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratios": {name: ratio(times, *pair) for name, pair in pairs.items()},
    }


def compare_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak of one forward and backward pass above what was there before, each in a fresh process."""
    start, found = multiprocessing.get_context("spawn"), {}
    for name in ("diffusers", "ours"):
        pool = start.Pool(1)
        found[name] = pool.apply(_peak_of_a_step, (name, arguments))
        pool.close()  # not terminate, of which Composer's signal handler would make a traceback
        pool.join()
    return {
        "image_tokens": arguments.tokens,
        "peak_mb": {name: round(peak / 1e6, 1) for name, peak in found.items()},
        "ratios": {"memory": {"median": round(found["ours"] / found["diffusers"], 3)}},
    }


def _peak_of_a_step(name: str, arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    theirs, ours = make_pair(model_sizes(arguments), device)
    inputs = make_inputs(arguments, ours, device)
    model, also = (theirs, {"return_dict": False}) if name == "diffusers" else (ours, {})
    for parameter in model.parameters():  # gradients are there before, and as large in both
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = _status("VmRSS")
    output = model(**inputs, **also)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")) - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


ENTRIES: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "models": ("forward + backward, diffusers' PRXTransformer2DModel over PRXBackbone; above 1 ours is faster", compare_models),
    "memory": (
        "peak memory of a forward + backward, ours over diffusers' PRXTransformer2DModel",
        compare_memory,
    ),
    "text": (
        "a step of TextToImage without its optimizer, text encoder online over embeddings stored; above 1 stored is faster",
        lambda arguments: compare_stored_text(arguments.batch_size, arguments.text_tokens, arguments.rounds),
    ),
    "optimizers": (
        "optimizer and weight average, other ways over ours; above 1 ours is faster",
        lambda arguments: compare_optimizers(arguments.rounds),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", choices=list(ENTRIES), default="models")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="image tokens, a square")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--valid-text", type=float, default=1.0, help="share of text tokens that are not padding, on average")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the median ratios as the last line")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if int(arguments.tokens**0.5) ** 2 != arguments.tokens:
        parser.error(f"--tokens must be a square such as 256, not {arguments.tokens}.")
    torch.set_num_threads(arguments.threads)

    what, compare = ENTRIES[arguments.entry]
    result = {"what": what, **circumstances(), "threads": arguments.threads, **compare(arguments)}
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    if arguments.json and "ratios" in result:
        sys.stdout.write(json.dumps({name: found["median"] for name, found in result["ratios"].items()}) + "\n")


if __name__ == "__main__":
    main()
