"""What each fast path rounds, beside what bf16 alone does: errors of the prediction and of the gradients, against fp32.

python benchmarks/numerics.py --device cuda --output benchmarks/results/numerics-h200.json
python benchmarks/numerics.py --hidden-size 64 --depth 3 --tokens 64 --text-tokens 16     # on a CPU, small; without flex

The reference is the eager backbone in fp32 (no TF32) with a mask, half of the tokens routed past its inner blocks. An error is
‖ours − reference‖ / ‖reference‖, of the gradients all in one vector. bf16 is the least that training rounds, so a path that
only computes the same otherwise (compiled, FlexAttention) may be off by no more than 1.5 times as much; paths that round more on
purpose (low_precision_norm, float8) are reported beside it.
"""

import argparse
import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import make_backbone, make_inputs
from record import circumstances
from torch import Tensor

from prx_composer.algorithms.float8 import apply_float8, hardware_problem
from prx_composer.algorithms.low_precision_norm import apply_low_precision_norm
from prx_composer.models import PRXBackbone
from prx_composer.models.routing import Route, draw_kept_indices

ALLOWED = 1.5  # times bf16's own error
SAME = ("compiled", "compiled, flex")

Prepare = Callable[[PRXBackbone], Any]


def sizes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the 24-hour recipe's proportions."""
    hidden = arguments.hidden_size
    sizes: dict[str, Any] = dict(in_channels=3, patch_size=32, bottleneck_size=max(hidden // 7, 8), mlp_ratio=3.5)
    return sizes | dict(
        hidden_size=hidden, depth=arguments.depth, num_heads=max(hidden // 64, 1), context_in_dim=arguments.text_size
    )


def paths(arguments: argparse.Namespace) -> dict[str, Prepare]:
    """Changes to a copy of the backbone, by name."""

    def float8(backbone: PRXBackbone) -> None:
        apply_float8(backbone, emulate=hardware_problem() is not None)
        backbone.compile_graphs(per_block=True)

    found: dict[str, Prepare] = {
        "eager": lambda backbone: None,
        "compiled": lambda backbone: backbone.compile_graphs(per_block=True),
        "low_precision_norm, compiled": lambda backbone: (apply_low_precision_norm(backbone), backbone.compile_graphs(True)),
    }
    if arguments.device != "cpu":  # where it stands down
        found["compiled, flex"] = lambda backbone: backbone.compile_graphs(per_block=True, flex_attention=True)
    if importlib.util.find_spec("torchao"):
        found["float8, compiled"] = float8
    return found


def pass_through(backbone: PRXBackbone, inputs: dict[str, Tensor], route: Route, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Prediction and all gradients as one vector, both in fp32 on the CPU."""
    device = inputs["hidden_states"].device.type
    with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        output = backbone(**inputs, route=route)
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    (output.float() * weight).sum().backward()
    gradients = [parameter.grad.float().flatten().cpu() for parameter in backbone.parameters() if parameter.grad is not None]
    return output.detach().float().cpu(), torch.cat(gradients)


def error(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden-size", type=int, default=1792)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens, a square")
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--text-size", type=int, default=2304)
    parser.add_argument("--valid-text", type=float, default=0.4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    device = torch.device(arguments.device)
    backbone = make_backbone(sizes_of(arguments), device)
    inputs = make_inputs(arguments, backbone, device)
    kept = draw_kept_indices(arguments.batch_size, arguments.tokens, arguments.tokens // 2, torch.Generator().manual_seed(0))
    route = Route(1, arguments.depth - 1, kept.to(device))
    reference = pass_through(copy.deepcopy(backbone), inputs, route, torch.float32)
    errors: dict[str, dict[str, float]] = {}
    for name, prepare in paths(arguments).items():
        changed = copy.deepcopy(backbone)
        prepare(changed)
        found = pass_through(changed, inputs, route, torch.bfloat16)
        errors[name] = {what: error(found[i], reference[i]) for i, what in enumerate(("outputs", "gradients"))}
        sys.stderr.write(f"{name}: {errors[name]}\n")
        del changed, found
    worse = {
        name: round(max(found[what] / errors["eager"][what] for what in found), 3)
        for name, found in errors.items()
        if name != "eager"
    }
    result = {
        "what": "errors of fast paths in bf16 against eager fp32; how much larger than eager bf16's they are",
        **circumstances(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "float8_emulated": hardware_problem() is not None,
        "errors": errors,
        "times_eager": worse,
    }
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    if beyond := [name for name in SAME if worse.get(name, 0) > ALLOWED]:
        sys.exit(f"off by more than {ALLOWED} times what bf16 rounds: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
