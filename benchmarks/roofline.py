"""The time of a training step by counting: what its kernels compute, read and write, over what the device reaches.

python benchmarks/roofline.py yamls/24h.yaml                        # one of 32 H200s: every part, and where the time is lost
python benchmarks/roofline.py here --output here.json               # the same formula against the clock, on this CPU
python benchmarks/roofline.py fusion --output fusion.json           # the rule of fusion against inductor's own count
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from common import main, summary, time_in_turns
from compare import make_backbone, make_inputs, training_step
from torch import Tensor

from prx_composer.commands.plan.conditions import Conditions, find_gpu
from prx_composer.commands.plan.plan import make_plan
from prx_composer.commands.plan.roofline import PartTime, Peaks, largest_losses, times_by_part
from prx_composer.models.counting import DENOISER
from prx_composer.models.kernels import BLOCKS, OTHER, BlockRecorder, Kernel, Watching, kernels_of
from prx_composer.recipe import config

# ------------------------------------------------------------------------------------------------------- a recipe


def recipe(
    recipe: Annotated[Sequence[str], "YAML files and key=value, as for train.py"],
    *,
    gpus: int = 32,
    gpu: str = "h200",
    stored_text: Annotated[bool, "as if text embeddings came with the data"] = False,
) -> dict[str, Any]:
    """What each part of a recipe's step is predicted to take, in milliseconds, and the three largest losses."""
    plan = make_plan(config.load(list(recipe)), Conditions(find_gpu(gpu), gpus, stored_text=stored_text))
    stages = []
    for stage in plan.stages:
        parts = dict(sorted(stage.step.parts.items(), key=lambda part: -part[1].seconds))
        stages.append(
            {
                "image_size": stage.image_size,
                "images_per_second_per_gpu": round(stage.images_per_second, 1),
                "milliseconds": round(1000 * stage.step.total, 1),
                "parts": {name: _row(part) for name, part in parts.items()},
                "largest_losses_ms": {name: round(1000 * seconds, 1) for name, seconds in largest_losses(parts)},
            }
        )
    return {"gpu": gpu, "gpus": gpus, "text": plan.text, "stages": stages}


def _row(part: PartTime) -> dict[str, float]:
    return {
        "ms": round(1000 * part.seconds, 2),
        "tflop": round(part.flops / 1e12, 3),
        "gb": round(part.bytes / 1e9, 2),
        "kernels": round(part.kernels),
    }


# ------------------------------------------------------------------------------------------------------- this CPU


def _kernels(model: Any, inputs: dict[str, Tensor], compiled: bool) -> list[Kernel]:
    """Return the kernels of a forward and backward pass of a backbone, as if its blocks were compiled or not."""
    recorder = BlockRecorder([BLOCKS] if compiled else [], DENOISER, DENOISER)
    handles: list[Any] = []
    for index, block in enumerate(model.blocks):
        handles.append(block.register_forward_pre_hook(lambda *_, index=index: recorder.begin_block(index)))
        handles.append(block.register_forward_hook(lambda *_: recorder.end_block()))
    with Watching(recorder):
        loss = model(**inputs).square().mean()
        recorder.backward = True
        torch.autograd.grad(loss, list(model.parameters()))
    for handle in handles:
        handle.remove()
    return kernels_of(recorder.ops)


def _probes(rows: int, inner: int, columns: int) -> tuple[dict[str, Callable[[], Any]], Callable[[dict[str, float]], Peaks]]:
    """Return what shows this CPU's peaks, a product of a block's size and a copy that no cache holds; and how to read them."""
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    source = torch.randn(2**24)
    target, small = torch.empty_like(source), torch.zeros(1)
    steps: dict[str, Callable[[], Any]] = {
        "product": lambda: [torch.mm(a, b, out=out) for _ in range(8)],
        "copy": lambda: target.copy_(source),
        "kernels": lambda: [small.add_(1) for _ in range(1000)],
    }

    def read(ms: dict[str, float]) -> Peaks:
        flops = 8 * 2 * rows * inner * columns / ms["product"] * 1e3
        return Peaks({torch.float32: flops}, 2 * source.nbytes / ms["copy"] * 1e3, ms["kernels"] / 1e6)

    return steps, read


def here(
    *,
    hidden_size: int = 512,
    depth: int = 2,
    text_tokens: int = 64,
    batch_size: int = 4,
    rounds: int = 9,
    threads: int = 1,
) -> dict[str, Any]:
    """Predicted over measured time of a forward and backward pass on this CPU, in fp32.

    Peaks are timed in the same rounds, and each round is predicted with its own: what slows the machine down slows both.
    `spread_of_peak`, the largest over the smallest, says how quiet it was.
    """
    torch.set_num_threads(threads)
    sizes = dict(in_channels=16, patch_size=2, context_in_dim=256, hidden_size=hidden_size, depth=depth)
    eager, compiled = (make_backbone(sizes | {"num_heads": hidden_size // 64}) for _ in range(2))
    compiled.compile_graphs(per_block=True)
    steps, kernels = dict[str, Callable[[], Any]](), dict[str, list[Kernel]]()
    for tokens in (256, 1024):
        given = make_inputs(eager, batch_size, tokens, text_tokens, 1.0, "cpu")
        for name, model in (("eager", eager), ("compiled", compiled)):
            steps[f"{name}, {tokens} tokens"] = training_step(model, given)
            kernels[f"{name}, {tokens} tokens"] = _kernels(eager, given, name == "compiled")
    probes, read = _probes(256 * batch_size, hidden_size, 3 * hidden_size)
    times = time_in_turns(probes | steps, rounds)
    peaks = [read({name: times[name][number] for name in probes}) for number in range(rounds)]
    flops = [one.flops[torch.float32] / 1e9 for one in peaks]
    rows = {}
    for name, own in kernels.items():
        predicted = [1000 * sum(part.seconds for part in times_by_part(own, one).values()) for one in peaks]
        rows[name] = {
            "measured_ms": summary(times[name], 1),
            "predicted_ms": summary(predicted, 1),
            "predicted_over_measured": summary([a / b for a, b in zip(predicted, times[name], strict=True)]),
            "kernels": len(own),
        }
    said = {"gflop_per_second": summary(flops, 1), "gb_per_second": summary([one.bandwidth / 1e9 for one in peaks], 2)}
    return {"peaks": said, "spread_of_peak": round(max(flops) / min(flops), 2), "steps": rows}


# --------------------------------------------------------------------------------------------------------- fusion


def fusion(*, hidden_size: int = 256, batch_size: int = 4, text_tokens: int = 64) -> dict[str, Any]:
    """Bytes of a compiled block by the rule of fusion, over what inductor's scheduler on this CPU counts for it, in fp32."""
    import torch._inductor.metrics as metrics  # pyright: ignore[reportMissingImports]

    torch._inductor.config.fx_graph_cache = False  # pyright: ignore[reportAttributeAccessIssue]
    sizes = dict(in_channels=16, patch_size=2, context_in_dim=256, hidden_size=hidden_size, depth=1, num_heads=hidden_size // 64)
    found = {}
    for tokens in (256, 1024):
        model = make_backbone(sizes)
        inputs = make_inputs(model, batch_size, tokens, text_tokens, 1.0, "cpu")
        ours = [one for one in _kernels(model, inputs, True) if one.part == BLOCKS]
        model.compile_graphs(per_block=True)
        torch._dynamo.reset()
        metrics.reset()
        loss = model(**inputs).square().mean()
        forward = metrics.num_bytes_accessed
        loss.backward()
        counts = {"forward": forward, "backward": metrics.num_bytes_accessed - forward}
        for name, theirs in counts.items():
            own = [one for one in ours if one.backward == (name == "backward")]
            found[f"{name}, {tokens} tokens"] = {
                "ours_mb": round(sum(one.bytes for one in own) / 1e6, 2),
                "of_it_fused_mb": round(sum(one.bytes for one in own if one.kind == OTHER) / 1e6, 2),
                "inductor_mb": round(theirs / 1e6, 2),
                "ratio": round(sum(one.bytes for one in own) / theirs, 3) if theirs else math.nan,
            }
    return {"hidden_size": hidden_size, "batch_size": batch_size, "passes": found}


if __name__ == "__main__":
    raise SystemExit(main(__doc__, recipe, here, fusion))
