"""A training step of ours against itself, changed: does it cost and round what it should?

python benchmarks/step.py linear-cost --output linear-cost.json --plot linear-cost.png
python benchmarks/step.py numerics --device cuda     # also: routing, stored-text, revisions

All steps run in turns, and those that should compute the same are compared before they are timed.
"""

import copy
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from common import ROOT, main, must_agree, ratio, save, subplots, summary, time_in_turns
from compare import Tokens, ValidText, make_backbone, make_inputs, training_step
from torch import Tensor

from prx_composer.algorithms.low_precision import apply_float8, apply_low_precision_norm, hardware_problem
from prx_composer.models import PRXBackbone
from prx_composer.models.counting import flops_of_backbone, flops_of_batch
from prx_composer.models.encoders import HuggingFaceTextEncoder, train_tokenizer
from prx_composer.models.routing import RandomRouter, Route, draw_kept_indices
from prx_composer.models.text_to_image import TextToImage

# --------------------------------------------------------------------------------------------------------- FLOPs

IMAGES = (1, 2, 4, 8, 16)
SIDES = (8, 12, 16, 24, 32)  # in patches: 64 to 1024 tokens
TOKENS_BATCH = 4


def _flops(backbone: Any, tokens: int, text_tokens: int) -> int:
    """Return the FLOPs of training on one square image of so many tokens."""
    side = backbone.patch_size * math.isqrt(tokens)
    return flops_of_backbone(backbone, side, side, text_tokens)


def linear_cost(
    *,
    hidden_size: int = 512,
    depth: int = 2,
    text_tokens: int = 64,
    rounds: int = 9,
    threads: int = 1,
    plot: Annotated[Path | None, "picture, PNG"] = None,
) -> dict[str, Any]:
    """Milliseconds of a forward and backward pass over a 16-fold range of images and of tokens; exponent 1 = linear.

    Images are of 256 tokens; tokens are 64 to 1024, of one image size each, at a fixed batch. In tokens, attention adds a part
    that is quadratic. The line that is drawn is the FLOPs, which have that part, through the middle point.
    """
    torch.set_num_threads(threads)
    sizes = dict(hidden_size=hidden_size, depth=depth, num_heads=hidden_size // 64)
    model = make_backbone(dict(in_channels=16, patch_size=2, context_in_dim=256, **sizes))
    series = {
        "images": [(count, count, 256) for count in IMAGES],
        "tokens": [(side * side, TOKENS_BATCH, side * side) for side in SIDES],
    }
    steps = {
        f"{x} {name}": training_step(model, make_inputs(model, batch, tokens, text_tokens, 1.0, "cpu"))
        for name, points in series.items()
        for x, batch, tokens in points
    }
    times = time_in_turns(steps, rounds)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in series}
    for name, points in series.items():
        for x, batch, tokens in points:
            milliseconds, flops = summary(times[f"{x} {name}"], 2), batch * _flops(model, tokens, text_tokens)
            rate = round(flops / 1e6 / milliseconds["median"], 1)
            found[name].append({"x": x, "gflop": round(flops / 1e9, 3), "ms": milliseconds, "gflop_per_second": rate})
    exponents = {name: {by: round(_exponent(rows, by), 3) for by in ("x", "gflop")} for name, rows in found.items()}
    if plot is not None:
        _plot(found, exponents, plot)
    return {"hidden_size": hidden_size, "depth": depth, "exponents": exponents, **found}


def _exponent(rows: list[dict[str, Any]], against: str) -> float:
    """Return the slope of the time in a log-log plot."""
    return float(np.polyfit(np.log([row[against] for row in rows]), np.log([row["ms"]["median"] for row in rows]), 1)[0])


def _plot(series: dict[str, list[dict[str, Any]]], exponents: dict[str, dict[str, float]], path: Path) -> None:
    figure, [grid] = subplots(1, len(series), (9, 3.6))
    for axes, (name, rows) in zip(grid, series.items(), strict=True):
        x, measured, middle = [row["x"] for row in rows], [row["ms"]["median"] for row in rows], rows[len(rows) // 2]
        formula = [middle["ms"]["median"] * row["gflop"] / middle["gflop"] for row in rows]
        axes.loglog(x, formula, color="0.6", linewidth=1, label="FLOPs, through the middle point")
        axes.loglog(x, measured, "o", color="tab:blue", label=f"measured, exponent {exponents[name]['x']:.2f}")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set_xlabel("images at 256 tokens" if name == "images" else f"image tokens, {TOKENS_BATCH} images")
        axes.set_ylabel("forward + backward, ms")
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def routing(
    *,
    hidden_size: int = 256,
    depth: int = 16,
    rate: float = 0.5,
    batch_size: int = 8,
    text_tokens: int = 64,
    rounds: int = 15,
    threads: int = 1,
) -> dict[str, Any]:
    """Forward + backward of 256 image tokens, dense over TREAD around all but the first two and the last block.

    Both have the same weights. With every token kept, the routed pass must be the dense one.
    """
    torch.set_num_threads(threads)
    sizes = dict(hidden_size=hidden_size, depth=depth, num_heads=hidden_size // 64)
    backbone = make_backbone(dict(in_channels=3, patch_size=4, context_in_dim=256, **sizes))
    inputs = make_inputs(backbone, batch_size, 256, text_tokens, 1.0, "cpu")
    router, generator = RandomRouter("tread", 2, depth - 1, rate), torch.Generator().manual_seed(0)
    everything = Route(router.start, router.end, torch.arange(256).expand(batch_size, -1))
    with torch.no_grad():
        difference = float((backbone(**inputs, route=everything) - backbone(**inputs)).abs().max())
    must_agree({"outputs": difference}, 1e-4)
    steps = {
        "dense": training_step(backbone, inputs),
        "tread": training_step(backbone, inputs, route=lambda: router.draw(batch_size, 256, generator)),
    }
    times = time_in_turns(steps, rounds)
    flops = [_flops(backbone, 256, text_tokens)]
    backbone.router = router
    flops.append(_flops(backbone, 256, text_tokens))
    return {
        "largest_difference_with_every_token_kept": difference,
        "milliseconds": {name: summary(values, 1) for name, values in times.items()},
        "ratios": {"dense / tread": ratio(times, "dense", "tread")},
        "ratio_of_flops": round(flops[0] / flops[1], 3),
    }


def stored_text(*, batch_size: int = 8, text_tokens: int = 64, rounds: int = 21, threads: int = 1) -> dict[str, Any]:
    """A step of TextToImage without its optimizer, text encoder online over embeddings stored; above 1 stored is faster.

    The encoder is a T5 with random weights whose forward pass is about as much of the step as T5Gemma-2B's is of the 24-hour
    recipe's at 512 px.
    """
    torch.set_num_threads(threads)
    sizes = dict(hidden_size=256, depth=6, num_heads=4, bottleneck_size=48)
    backbone = make_backbone(dict(in_channels=3, patch_size=4, context_in_dim=256, **sizes))
    tokenizer = train_tokenizer(["a photograph of a lighthouse on a cliff above the sea at dawn"] * 2, 256)
    config = dict(model_type="t5", d_model=256, d_kv=64, d_ff=1024, num_layers=8, num_heads=4, dropout_rate=0.0)
    encoder = HuggingFaceTextEncoder(tokenizer, config=config, max_tokens=text_tokens)
    model = TextToImage(backbone, encoder, caption_dropout=0.0)
    tokens = encoder.tokenize(["a photograph of a lighthouse above the sea"] * batch_size)
    online = {"image": torch.randint(0, 256, (batch_size, 3, 64, 64), dtype=torch.uint8), **tokens}
    stored = online | {"text_embedding": encoder(**tokens)}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        model.random.begin_step(0)
        return model.loss(model(batch), batch)["total"]

    def step(batch: dict[str, Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        loss(batch).backward()

    difference = float((loss(online) - loss(stored)).abs())
    must_agree({"losses": difference}, 1e-5)
    times = time_in_turns({"online": lambda: step(online), "stored": lambda: step(stored)}, rounds)
    return {
        "difference_of_losses": difference,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratios": {"online / stored": ratio(times, "online", "stored")},
        "ratio_of_flops": round(flops_of_batch(model, online) / flops_of_batch(model, stored), 3),
    }


# ------------------------------------------------------------------------------------------------------- rounding

ALLOWED = 1.5  # times bf16's own error
SAME = ("compiled", "compiled, flex")


def fast_paths(on_gpu: bool) -> dict[str, Callable[[PRXBackbone], Any]]:
    """Return changes to a copy of the backbone, by name."""

    def float8(backbone: PRXBackbone) -> None:
        apply_float8(backbone, emulate=hardware_problem() is not None)
        backbone.compile_graphs(per_block=True)

    found: dict[str, Callable[[PRXBackbone], Any]] = {
        "eager": lambda backbone: None,
        "compiled": lambda backbone: backbone.compile_graphs(per_block=True),
        "low_precision_norm, compiled": lambda backbone: (apply_low_precision_norm(backbone), backbone.compile_graphs(True)),
    }
    if on_gpu:  # on a CPU it stands down
        found["compiled, flex"] = lambda backbone: backbone.compile_graphs(per_block=True, flex_attention=True)
    if importlib.util.find_spec("torchao"):
        found["float8, compiled"] = float8
    return found


def pass_through(backbone: PRXBackbone, inputs: dict[str, Tensor], route: Route, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return prediction and all gradients as one vector, both in fp32 on the CPU."""
    with torch.autocast(inputs["hidden_states"].device.type, dtype, enabled=dtype is not torch.float32):
        output = backbone(**inputs, route=route)
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    (output.float() * weight).sum().backward()
    gradients = [parameter.grad.float().flatten().cpu() for parameter in backbone.parameters() if parameter.grad is not None]
    return {"outputs": output.detach().float().cpu(), "gradients": torch.cat(gradients)}


def numerics(
    *,
    device: str = "cpu",
    hidden_size: int = 1792,
    depth: int = 6,
    tokens: Tokens = 1024,
    text_tokens: int = 256,
    text_size: int = 2304,
    valid_text: ValidText = 0.4,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Errors of fast paths in bf16 against eager fp32; how much larger than eager bf16's they are.

    The reference is the eager backbone in fp32 (no TF32) with a mask, half the tokens routed past its inner blocks. An error is
    ‖ours − reference‖ / ‖reference‖, of the gradients all in one vector. bf16 is the least that training rounds. A path that only
    computes the same otherwise (compiled, FlexAttention) may be off by no more than 1.5 times as much. Paths that round more on
    purpose (low_precision_norm, float8) are reported beside it.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes: dict[str, Any] = dict(in_channels=3, patch_size=32, bottleneck_size=max(hidden_size // 7, 8), mlp_ratio=3.5)
    sizes |= dict(hidden_size=hidden_size, depth=depth, num_heads=max(hidden_size // 64, 1), context_in_dim=text_size)
    backbone = make_backbone(sizes, device)
    inputs = make_inputs(backbone, batch_size, tokens, text_tokens, valid_text, device)
    kept = draw_kept_indices(batch_size, tokens, tokens // 2, torch.Generator().manual_seed(0))
    route = Route(1, depth - 1, kept.to(device))
    reference = pass_through(copy.deepcopy(backbone), inputs, route, torch.float32)
    errors: dict[str, dict[str, float]] = {}
    for name, prepare in fast_paths(device != "cpu").items():
        changed = copy.deepcopy(backbone)
        prepare(changed)
        found = pass_through(changed, inputs, route, torch.bfloat16)
        errors[name] = {
            what: float((found[what].double() - right.double()).norm() / right.double().norm())
            for what, right in reference.items()
        }
        sys.stderr.write(f"{name}: {errors[name]}\n")
        del changed, found
    eager = errors["eager"]
    worse = {name: round(max(off[what] / eager[what] for what in off), 3) for name, off in errors.items() if name != "eager"}
    beyond = [name for name in SAME if worse.get(name, 0) > ALLOWED]
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "float8_emulated": hardware_problem() is not None,
        "errors": errors,
        "times_eager": worse,
        "failed": [f"{name} is off by more than {ALLOWED} times what bf16 rounds" for name in beyond],
    }


# ------------------------------------------------------------------------------------------------------ revisions

# Only what both revisions have: the model, its loss, the optimizer.
WORKER = """
import sys, time, torch
from prx_composer.models import FlowMatching, HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.encoders import train_tokenizer
from prx_composer.optim import AdamW

torch.manual_seed(0)
tokenizer = train_tokenizer(["a red circle on the left of a white background"])
t5 = dict(model_type="t5", d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0)
text_encoder = HuggingFaceTextEncoder(tokenizer, config=t5, max_tokens=14, trainable=True)
backbone = PRXBackbone(in_channels=3, patch_size=4, hidden_size=128, depth=4, num_heads=4, context_in_dim=128)
model = TextToImage(backbone, text_encoder, FlowMatching())
optimizer = AdamW(model, lr=1e-3)
image = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
batch = {"image": image, **text_encoder.tokenize(["a red circle"] * 64)}
for line in sys.stdin:
    for _ in range(int(line)):
        loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(loss.item(), flush=True)
"""


class Worker:
    """A process that has imported one revision."""

    def __init__(self, folder: Path):
        environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        command, pipe = [sys.executable, "-W", "ignore", "-c", WORKER], subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def steps(self, count: int) -> float:
        """Make so many steps; return the loss of the last."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def revisions(
    *,
    base: Annotated[str, "revision to compare the checkout with"],
    rounds: int = 40,
    steps: Annotated[int, "per turn"] = 5,
) -> dict[str, Any]:
    """Training step of the quickstart's model with all algorithms off, an earlier revision over this one; above 1 this is faster.

    Each revision is imported by a process of its own, which makes a turn of steps when it is told to; both start from the same
    weights.
    """

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "base"
        git("worktree", "add", "--detach", str(earlier), base)
        workers = {"base": Worker(earlier), "now": Worker(ROOT)}
        try:
            losses = {name: [worker.steps(1) for _ in range(5)] for name, worker in workers.items()}
            times = time_in_turns({name: lambda worker=worker: worker.steps(steps) for name, worker in workers.items()}, rounds)
        finally:
            for worker in workers.values():
                worker.process.terminate()
                worker.process.wait()
            git("worktree", "remove", "--force", str(earlier))
    per_step = {name: [milliseconds / steps for milliseconds in values] for name, values in times.items()}
    return {
        "revisions": {"base": base, "now": git("rev-parse", "--short", "HEAD")},
        "equal_losses": losses["base"] == losses["now"],
        "milliseconds": {name: summary(values, 2) for name, values in per_step.items()},
        "ratios": {"base / now": ratio(times, "base", "now")},
    }


if __name__ == "__main__":
    sys.exit(main(__doc__, linear_cost, routing, stored_text, numerics, revisions))
