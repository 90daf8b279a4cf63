"""Run on two ranks: a run whose steps were tried before it began repeats, bit for bit, the losses of one in which they weren't.

Arguments: recipe.yaml, and a folder for the runs. Under DDP and FSDP2, from the beginning and on a resume.
"""

import sys
from pathlib import Path

import torch.distributed as torch_dist
from composer.utils import dist

from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training.preflight.step import RECORD
from prx_composer.training.run import run

recipe, folder = sys.argv[1], Path(sys.argv[2])


def losses(name: str, *changes: str) -> list[dict[str, float]]:
    for stop in ("2ba", "5ba"):
        (folder / name / RECORD).unlink(missing_ok=True)  # so that the resumed run tries them too
        run(config.load([recipe, f"run_name={name}", f"callbacks.stop_after.time={stop}", *changes]))
        torch_dist.barrier()
        assert (folder / name / RECORD).exists() == ("preflight=false" not in changes)
        torch_dist.barrier()
    rows = read_metrics(folder / name / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key.startswith("loss/")} for row in rows]


for kind, sharding in (("ddp", "parallelism_config=null"), ("fsdp", "parallelism_config={fsdp: {}}")):
    tried, plain = losses(f"{kind}_tried", sharding), losses(f"{kind}_plain", sharding, "preflight=false")
    if dist.get_global_rank() == 0:
        assert len(tried) == 5 and tried == plain, (kind, tried, plain)
        sys.stdout.write(f"{kind}: the same {len(tried)} steps\n")
