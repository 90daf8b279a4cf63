"""Bytes per optimizer step that ranks really send, against the formula that `prx plan` uses.

OMP_NUM_THREADS=1 python benchmarks/communication.py --output benchmarks/results/communication.json

The mini recipe, made smaller still, is trained by `train.py` for a few steps on 2, 4 and 8 gloo ranks, as DDP and as FSDP2, in
two microbatches. Every collective of one step is counted on every rank by its tensors' sizes (see count_collectives.py), with the
bytes that a ring sends. Of HSDP there is a formula only: gloo averages over no replicas, so it cannot run on CPUs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from count_collectives import SMALL
from record import circumstances

from prx_composer.commands.plan.communication import muon_plan, traffic
from prx_composer.commands.plan.planned_model import plan_model
from prx_composer.recipe import config

HERE = Path(__file__).parent
MICROBATCHES = 2
BATCH = 32
WAYS = {"DDP": "null", "FSDP2": "{fsdp: {}}", "FSDP2, not resharded": "{fsdp: {reshard_after_forward: false}}"}
LONGEST = 500  # seconds of one run
SMALLER = [
    "model.backbone.hidden_size=48",
    "model.backbone.mlp_ratio=3.25",  # 156 rows, which no 8 ranks divide
    "model.backbone.bottleneck_size=20",
    "model.backbone.depth=5",
    "algorithms.progressive_resolution=false",
    "algorithms.repa.end=null",
    "train_loader.num_workers=0",
    "eval_loader=null",
    "time_budget=null",
    "preflight=false",
    "autoresume=false",
    "progress_bar=false",
    "max_duration=5ba",
    "save_interval=1000ba",
    "scheduler.t_warmup=1ba",
    f"global_train_batch_size={BATCH}",
]


def overrides(recipe: str, way: str, ranks: int) -> list[str]:
    """What makes a recipe small, and what the formula needs to know of the run."""
    silent = [f"callbacks.{name}=false" for name in config.load([recipe]).callbacks]
    microbatch = f"device_train_microbatch_size={BATCH // ranks // MICROBATCHES}"
    return [*SMALLER, *silent, microbatch, f"parallelism_config={WAYS[way]}"]


def counted(recipe: str, way: str, ranks: int) -> dict[str, dict[str, float]]:
    """Trains; bytes of the rank that sends most, and number of collectives, by purpose."""
    with tempfile.TemporaryDirectory(prefix="communication-") as temporary:
        folder = Path(temporary)
        where = [f"run_folder={folder / 'run'}", f"callbacks.count_collectives.folder={folder}"]
        where.append(f"code_paths=[{HERE / 'count_collectives.py'}]")
        composer = str(Path(sys.executable).with_name("composer"))
        command = [composer, "-n", str(ranks), str(HERE.parent / "train.py"), recipe, *overrides(recipe, way, ranks), *where]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
        if finished.returncode != 0:
            raise SystemExit(f"{way} on {ranks} ranks failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}")
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    purposes = sorted({purpose for one in found for purpose in one["bytes"]})
    return {kind: {p: max(one[kind].get(p, 0) for one in found) for p in purposes} for kind in ("bytes", "calls")}


def planned(recipe: str, way: str, ranks: int) -> dict[str, float]:
    """What the formula says, by purpose."""
    loaded = config.load([recipe, *overrides(recipe, way, ranks)])
    model = plan_model(loaded)
    found = traffic(model, loaded, ranks, MICROBATCHES, muon_plan(model, loaded, ranks), on_gpu=False)
    return {one.purpose: one.bytes for one in found}


def compare(recipe: str, way: str, ranks: int) -> dict[str, Any]:
    count, formula = counted(recipe, way, ranks), planned(recipe, way, ranks)
    purposes = [purpose for purpose in {**formula, **count["bytes"]} if purpose != SMALL]
    found, said = sum(count["bytes"].get(p, 0) for p in purposes), sum(formula.values())
    return {
        "parallelism": way,
        "ranks": ranks,
        "counted_bytes": round(found),
        "formula_bytes": round(said),
        "counted_over_formula": round(found / said, 5),
        "not_in_the_formula_bytes": round(count["bytes"].get(SMALL, 0)),
        "collectives": count["calls"],
        "by_purpose": {
            purpose: {
                "counted_bytes": round(count["bytes"].get(purpose, 0)),
                "formula_bytes": round(formula.get(purpose, 0)),
                "ratio": round(count["bytes"].get(purpose, 0) / formula[purpose], 5) if formula.get(purpose) else None,
            }
            for purpose in purposes
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="yamls/24h_mini.yaml")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs = []
    for ranks in arguments.ranks:
        for way in arguments.ways:
            runs.append(compare(arguments.recipe, way, ranks))
            sys.stderr.write(json.dumps(runs[-1]) + "\n")
    result = {
        "what": "bytes that the busiest rank sends in one optimizer step: counted on gloo ranks, and by the plan's formula",
        **circumstances(),
        "recipe": arguments.recipe,
        "overrides": SMALLER,
        "microbatches": MICROBATCHES,
        "convention": "ring: gather and reduce-scatter send n-1 shards, an all-reduce 2(n-1)/n of the whole",
        "not_in_the_formula": "norm of gradients, losses, flags, clocks, DDP's buffers",
        "not_run": "HSDP: gloo has no average over replicas, so that only the formula covers it",
        "runs": runs,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
