"""What checkpoints cost a run: measured on the mini recipe, at several sizes of its model, and scaled to the 24-hour recipe.

python benchmarks/checkpoint_cost.py --run runs/24h_mini --output benchmarks/results/checkpoint-cost.json

Two figures: the share of a finished mini run that went into its checkpoints, from its metrics; and the seconds of a checkpoint
by its size, from which the large one follows: t = a + bytes / rate, fitted to models of several widths, with optimizer, average
and CRC, flushed to the disk. Every rank of a node writes its shard.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import circumstances

from prx_composer.commands.plan.plan import estimate_checkpoint_bytes
from prx_composer.recipe import config
from prx_composer.runs.checkpoints import write_checkpoint
from prx_composer.runs.folder import read_metrics
from prx_composer.schedule.moments import Point
from prx_composer.training.run import build_trainer

WIDTHS = (96, 256, 512, 1024)  # of the mini recipe's model


def share_of_run(folder: Path) -> dict[str, Any]:
    rows = read_metrics(folder / "metrics.jsonl")
    seconds = [row["checkpoint/seconds"] for row in rows if "checkpoint/seconds" in row]
    total = rows[-1]["train_seconds"]
    return {"checkpoints": len(seconds), "seconds": round(sum(seconds), 3), "of": total, "share": round(sum(seconds) / total, 5)}


def write_times(width: int, repeats: int) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint after one step."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run_folder={folder}/run", "max_duration=1ba", f"model.backbone.hidden_size={width}", "callbacks={}"]
        overrides += [
            "scheduler={name: constant}",
            "time_budget=24h",
            "save_interval=1dur",
            "eval_loader=null",
            "progress_bar=false",
            "preflight=false",
        ]
        trainer = build_trainer(config.load(["yamls/24h_mini.yaml", *overrides]))
        trainer.fit()
        seconds, size = [], 0
        for _ in range(repeats):
            begin = time.monotonic()
            checkpoint = write_checkpoint(trainer.state, Path(folder) / "written", {})
            seconds.append(time.monotonic() - begin)
            size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
        trainer.close()
        shutil.rmtree(folder, ignore_errors=True)
    return {"hidden_size": width, "bytes": size, "seconds": round(statistics.median(seconds), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run of yamls/24h_mini.yaml")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    recipe = config.load(["yamls/24h.yaml"])
    measured = [write_times(width, arguments.repeats) for width in WIDTHS]
    slope, fixed = np.polyfit([m["bytes"] for m in measured], [m["seconds"] for m in measured], 1)
    assert recipe.parallelism_config is not None and recipe.time_budget is not None
    shards = recipe.parallelism_config["fsdp"]["shard_degree"]
    total = estimate_checkpoint_bytes(recipe)
    interval = Point.parse(recipe.save_interval).value
    seconds = max(fixed, 0.0) + slope * total / shards
    result = {
        "what": "cost of checkpoints, measured on the mini recipe and scaled to the 24-hour recipe",
        **circumstances(),
        "mini_run": share_of_run(arguments.run),
        "by_size": measured,
        "fixed_seconds": round(float(fixed), 4),
        "bytes_per_second": round(1 / float(slope)),
        "24h": {
            "bytes": total,
            "ranks_that_write": shards,
            "bytes_per_rank": total // shards,
            "seconds_at_the_rate_measured_here": round(float(seconds), 2),
            "seconds_if_a_node_shares_that_rate": round(float(max(fixed, 0.0) + slope * total), 2),
            "interval_seconds": interval,
            "share": round(float(seconds) / interval, 5),
            "share_if_a_node_shares_that_rate": round(float(max(fixed, 0.0) + slope * total) / interval, 5),
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
