"""Does a step cost what its FLOPs say: time of a forward and backward pass over a 16-fold range of images and of tokens.

python benchmarks/linear_cost.py --output benchmarks/results/linear-cost.json     # and a plot beside it

Images at 256 tokens, and tokens (64 to 1024 of one image size each) at a fixed batch, all in turns. In tokens, attention adds a
part that is quadratic; the FLOP formula has it, and the line that is drawn is that formula through the middle point.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from interleaved import summary, time_in_turns
from record import circumstances

from prx_composer.models import PRXBackbone

IMAGES = (1, 2, 4, 8, 16)
SIDES = (8, 12, 16, 24, 32)  # in patches: 64 to 1024 tokens
TOKENS_BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    heads = arguments.hidden_size // 64
    model = PRXBackbone(
        in_channels=16,
        patch_size=2,
        context_in_dim=256,
        hidden_size=arguments.hidden_size,
        depth=arguments.depth,
        num_heads=heads,
    )

    def step(batch: int, side: int) -> Any:
        inputs = (
            torch.randn(batch, 16, 2 * side, 2 * side),
            torch.rand(batch),
            torch.randn(batch, arguments.text_tokens, 256),
        )

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(*inputs).square().mean().backward()

        return run

    points = {f"{n} images": (n, 16) for n in IMAGES} | {f"{side * side} tokens": (TOKENS_BATCH, side) for side in SIDES}
    times = time_in_turns({name: step(*point) for name, point in points.items()}, arguments.rounds)
    series = {
        "images": [_row(n, times[f"{n} images"], n * model.flops(256, arguments.text_tokens, training=True)) for n in IMAGES],
        "tokens": [
            _row(s * s, times[f"{s * s} tokens"], TOKENS_BATCH * model.flops(s * s, arguments.text_tokens, training=True))
            for s in SIDES
        ],
    }
    result: dict[str, Any] = {
        "what": "milliseconds of a forward and backward pass over a 16-fold range; exponent 1 = linear",
        **circumstances(),
        "threads": arguments.threads,
        "hidden_size": arguments.hidden_size,
        "depth": arguments.depth,
        "exponents": {
            name: {against: round(_exponent(rows, against), 3) for against in ("x", "gflop")} for name, rows in series.items()
        },
        **series,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    _plot(series, result["exponents"], arguments.output.with_suffix(".png"))
    sys.stdout.write(json.dumps(result["exponents"]) + "\n")


def _row(x: int, times: list[float], flops: int) -> dict[str, Any]:
    milliseconds = summary(times, 2)
    return {
        "x": x,
        "gflop": round(flops / 1e9, 3),
        "ms": milliseconds,
        "gflop_per_second": round(flops / 1e6 / milliseconds["median"], 1),
    }


def _exponent(rows: list[dict[str, Any]], against: str) -> float:
    """Slope of the time in a log-log plot."""
    return float(np.polyfit(np.log([row[against] for row in rows]), np.log([row["ms"]["median"] for row in rows]), 1)[0])


def _plot(series: dict[str, list[dict[str, Any]]], exponents: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(series), figsize=(9, 3.6), constrained_layout=True)
    for axis, (name, rows) in zip(axes, series.items(), strict=True):
        x, measured = [row["x"] for row in rows], [row["ms"]["median"] for row in rows]
        middle = rows[len(rows) // 2]
        formula = [middle["ms"]["median"] * row["gflop"] / middle["gflop"] for row in rows]
        axis.loglog(x, formula, color="0.6", linewidth=1, label="FLOP formula, through the middle point")
        axis.loglog(x, measured, "o", color="tab:blue", label=f"measured, exponent {exponents[name]['x']:.2f}")
        axis.set_xticks(x, [str(value) for value in x])
        axis.minorticks_off()
        axis.set_xlabel("images at 256 tokens" if name == "images" else f"image tokens, {TOKENS_BATCH} images")
        axis.set_ylabel("forward + backward, ms")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
