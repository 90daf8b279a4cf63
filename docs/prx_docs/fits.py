"""What fits where: the memory of one GPU as `prx plan` counts it, for the page about it.

`python -m prx_docs.fits` (in docs/) counts anew, in some minutes, what `fits.json` has; the page is made of that file.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
RECIPE = "yamls/one_gpu_80gb.yaml"
SIZES = {"B": (10, 5), "L": (22, 11), "1.2B": (14, 7)}  # tread.end_block and repa.block, which follow the depth
SHAPES = ((256, 16), (512, 32), (512, 16), (1024, 32))  # pixels, patch
MICROBATCH = 8
GPUS = ("rtx4090", "l40s", "h100", "h200")
RESERVE = 0.1  # as `prx plan` leaves to spare


def table() -> str:
    """Return the largest power of two that fits as a microbatch, by model, image size and GPU."""
    counted = json.loads(FILE.read_text())
    gpus = counted["gpus"]
    names = " | ".join(f"{name}, {room:.0f} GiB" for name, room in gpus.items())
    lines = [f"| `size` | image size | patch | state | per image | {names} |", f"|---|---|---|---|---|{'---|' * len(gpus)}"]
    for row in counted["rows"]:
        most = [_most(room * (1 - RESERVE), row) for room in gpus.values()]
        cells = (
            f"`{row['size']}`",
            f"{row['image_size']} px",
            row["patch"],
            f"{row['resident'] + row['beside']:.1f}",
            f"{row['per_image']:.2f}",
            *most,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"Counted on {counted['date']}; memory in GiB.", ""])


def _most(room: float, row: dict[str, Any]) -> str:
    """Return the largest microbatch for which a GPU has room: in the backward pass, and in Muon's step."""
    peaks = {2**n: row["resident"] + max(row["beside"] + 2**n * row["per_image"], row["optimizer_step"]) for n in range(10)}
    return str(max((count for count, peak in peaks.items() if peak <= room), default="–"))


def _settings(size: str, image_size: int, patch: int) -> list[str]:
    end_block, block = SIZES[size]
    return [
        RECIPE, f"model.backbone.size={size}", f"model.backbone.patch_size={patch}", f"image_size={image_size}",
        f"algorithms.tread.end_block={end_block}", f"algorithms.repa.block={block}", "algorithms.repa.end=null",
        "algorithms.progressive_resolution=false", f"device_train_microbatch_size={MICROBATCH}",
    ]  # fmt: skip


def count(file: Path) -> None:
    """Plan every model at every image size, on one GPU, with stored text; write each row when it is known."""
    import datetime

    from prx_composer.commands.plan.conditions import Conditions, find_gpu
    from prx_composer.commands.plan.plan import make_plan
    from prx_composer.recipe import config

    rows = list[dict[str, Any]]()
    for size in SIZES:
        for image_size, patch in SHAPES:
            recipe = config.load(_settings(size, image_size, patch))
            (stage,) = make_plan(recipe, Conditions(find_gpu("h100"), utilisation=0.33, samples=10**6, num_gpus=1)).stages
            m = stage.memory
            parts = {
                "resident": m.weights + m.gradients + m.optimizer + m.ema + m.frozen + m.batch,
                "beside": m.gathered + m.casts,
                "optimizer_step": m.optimizer_step,
                "per_image": m.activations / MICROBATCH,
            }
            rows.append(dict(size=size, image_size=image_size, patch=patch) | {k: round(v / 2**30, 4) for k, v in parts.items()})
            gpus = {name: find_gpu(name).memory_gib for name in GPUS}
            found = {"date": str(datetime.date.today()), "recipe": RECIPE, "gpus": gpus, "rows": rows}
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    count(FILE)
