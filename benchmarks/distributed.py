"""What many ranks cost, as far as CPUs can tell: bytes that they send to each other, and checkpoints.

OMP_NUM_THREADS=1 python benchmarks/distributed.py communication --output communication.json
python benchmarks/distributed.py checkpoints --run runs/24h_mini
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from common import environment, main, train_command
from composer.core import Callback, State
from composer.loggers import Logger
from stalls import PARTS
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from prx_composer import registry
from prx_composer.commands.plan.step_cost import DDP, GATHER, MUON, MUON_REPLICAS, REDUCE, muon_plan, traffic
from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.runs.checkpoints import CheckpointWriter
from prx_composer.runs.folder import read_metrics
from prx_composer.schedule.moments import Point
from prx_composer.training.meta_model import MetaModel, training_state
from prx_composer.training.run import build_trainer

# ------------------------------------------------------------------------------------------- counting collectives

SMALL = "all else"


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for item in value for t in _tensors(item)]


class _Counter(TorchDispatchMode):
    """Adds up bytes by purpose; `in_optimizer` says whether the backward pass is over."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.in_optimizer = self.in_hook = False

    def add(self, purpose: str, sent: float) -> None:
        self.bytes[purpose] += sent
        self.calls[purpose] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with what the tensor consists of
        if getattr(func, "namespace", "") == "c10d" and not self.in_hook:
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        ranks = dist.get_world_size()  # of every group: there are no replicas of shards on gloo
        if name == "_allgather_base_":
            self.add(MUON_REPLICAS if self.in_optimizer else GATHER, (ranks - 1) * args[1].nbytes)
        elif name == "_reduce_scatter_base_":
            self.add(REDUCE, (ranks - 1) * args[0].nbytes)
        elif name == "alltoall_base_":
            sent, to_each = args[1], list(args[4]) or [len(args[1]) // ranks] * ranks
            self.add(MUON, sent.nbytes * (1 - to_each[dist.get_rank()] / max(sum(to_each), 1)))
        elif name not in ("barrier", "monitored_barrier_"):
            tensors = args[0] if name.startswith(("allreduce", "broadcast")) else args[1]
            self.add(SMALL, 2 * (ranks - 1) / ranks * sum(tensor.nbytes for tensor in _tensors(tensors)))


@registry.callbacks.register("count_collectives")
class CountCollectives(Callback):
    """Writes `rank-<n>.json` with the bytes and calls of one step, by purpose, counted where torch dispatches them.

    DDP's own all-reduces leave from C++ and pass no Python; its buckets are counted by a communication hook that reduces them as
    DDP would.

    Args:
        folder: for the files.
        batch: the step that is counted, from 0; a later one than those in which DDP makes its buckets anew.
    """

    def __init__(self, folder: str, batch: int = 3):
        self._folder, self._batch = Path(folder), batch
        self._counter: _Counter | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if isinstance(state.model, DistributedDataParallel):
            state.model.register_comm_hook(None, self._reduce)

    # DDP insists on these annotations.
    def _reduce(self, _: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self._counter is None:
            return allreduce_hook(dist.group.WORLD, bucket)  # pyright: ignore[reportArgumentType]
        ranks = dist.get_world_size()
        self._counter.add(DDP, 2 * (ranks - 1) / ranks * bucket.buffer().nbytes)
        self._counter.in_hook = True
        try:
            return allreduce_hook(dist.group.WORLD, bucket)  # pyright: ignore[reportArgumentType]
        finally:
            self._counter.in_hook = False

    def batch_start(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self._batch:
            self._counter = _Counter()
            self._counter.__enter__()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if self._counter is not None:
            self._counter.in_optimizer = True

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            found = {"bytes": self._counter.bytes, "calls": self._counter.calls}
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
            self._counter = None


# -------------------------------------------------------------------------------------------------- communication

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
    """Return what makes a recipe small, and what the formula needs to know of the run."""
    silent = [f"callbacks.{name}=false" for name in config.load([recipe]).callbacks]
    microbatch = f"device_train_microbatch_size={BATCH // ranks // MICROBATCHES}"
    return [*SMALLER, *silent, microbatch, f"parallelism_config={WAYS[way]}"]


def counted(recipe: str, way: str, ranks: int) -> dict[str, dict[str, float]]:
    """Train; return bytes of the rank that sends most, and number of collectives, by purpose."""
    with tempfile.TemporaryDirectory(prefix="communication-") as temporary:
        folder = Path(temporary)
        where = [f"run_folder={folder / 'run'}", f"callbacks.count_collectives.folder={folder}", f"code_paths=[{__file__}]"]
        command = train_command([recipe, *overrides(recipe, way, ranks), *where], ranks)
        finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST, check=False)
        if finished.returncode != 0:
            raise SystemExit(f"{way} on {ranks} ranks failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}")
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    purposes = sorted({purpose for one in found for purpose in one["bytes"]})
    return {kind: {p: max(one[kind].get(p, 0) for one in found) for p in purposes} for kind in ("bytes", "calls")}


def planned(recipe: str, way: str, ranks: int) -> dict[str, float]:
    """Return what the formula says, by purpose."""
    loaded = config.load([recipe, *overrides(recipe, way, ranks)])
    model = MetaModel(loaded)
    found = traffic(model, loaded, ranks, MICROBATCHES, muon_plan(model, loaded, ranks), on_gpu=False)
    return {one.purpose: one.bytes for one in found}


def compare(recipe: str, way: str, ranks: int) -> dict[str, Any]:
    count, formula = counted(recipe, way, ranks), planned(recipe, way, ranks)
    sent = count["bytes"]
    purposes = [purpose for purpose in {**formula, **sent} if purpose != SMALL]

    def row(counted: float, said: float) -> dict[str, Any]:
        ratio = round(counted / said, 5) if said else None
        return {"counted_bytes": round(counted), "formula_bytes": round(said), "ratio": ratio}

    return {
        "parallelism": way,
        "ranks": ranks,
        **row(sum(sent.get(purpose, 0) for purpose in purposes), sum(formula.values())),
        "not_in_the_formula_bytes": round(sent.get(SMALL, 0)),
        "collectives": count["calls"],
        "by_purpose": {purpose: row(sent.get(purpose, 0), formula.get(purpose, 0)) for purpose in purposes},
    }


def communication(
    *, recipe: str = "yamls/24h_mini.yaml", ranks: Sequence[int] = (2, 4, 8), ways: Sequence[str] = tuple(WAYS)
) -> dict[str, Any]:
    """Bytes that the busiest rank sends in one optimizer step: counted on gloo ranks, and by the plan's formula.

    The mini recipe, made smaller still, is trained by train.py for a few steps, as DDP and as FSDP2, in two microbatches. Every
    collective of one step is counted on every rank by its tensors' sizes, with the bytes that a ring sends. Of HSDP there is a
    formula only: gloo averages over no replicas, so it cannot run on CPUs.
    """
    if unknown := [way for way in ways if way not in WAYS]:
        raise UserError(f"--ways {unknown[0]}: some of {', '.join(WAYS)}.")
    runs = []
    for count in ranks:
        for way in ways:
            runs.append(compare(recipe, way, count))
            sys.stderr.write(json.dumps(runs[-1]) + "\n")
    return {
        "recipe": recipe,
        "overrides": SMALLER,
        "microbatches": MICROBATCHES,
        "convention": "ring: gather and reduce-scatter send n-1 shards, an all-reduce 2(n-1)/n of the whole",
        "not_in_the_formula": "norm of gradients, losses, flags, clocks, DDP's buffers",
        "not_run": "HSDP: gloo has no average over replicas, so that only the formula covers it",
        "runs": runs,
    }


# ---------------------------------------------------------------------------------------------------- checkpoints

WIDTHS = (96, 256, 512, 1024)  # of the mini recipe's model


def share_of_run(folder: Path) -> dict[str, Any]:
    """Return how much of a finished run its checkpoints held up, from its metrics."""
    rows = read_metrics(folder / "metrics.jsonl")
    seconds = [row["checkpoint/stalled_seconds"] for row in rows if "checkpoint/stalled_seconds" in row]
    total = rows[-1]["train_seconds"]
    return {"checkpoints": len(seconds), "seconds": round(sum(seconds), 3), "of": total, "share": round(sum(seconds) / total, 5)}


def beside(work: Future[Any], thread: ThreadPoolExecutor) -> tuple[float, float]:
    """Compute in Python until a thread's work is done; return the processor's seconds that this thread and that one had."""
    own, count = time.thread_time(), 0
    while not work.done():
        count += 1
    own = time.thread_time() - own
    return own, thread.submit(time.thread_time).result()


def even_share(megabytes: int = 200) -> float:
    """Return what `beside` finds, the first over the second, for work that leaves Python to others: a checksum."""
    content, shares = bytes(megabytes << 20), []
    for _ in range(5):
        with ThreadPoolExecutor(1) as thread:
            before = thread.submit(time.thread_time).result()
            own, other = beside(thread.submit(zlib.crc32, content), thread)
        shares.append(own / (other - before))
    return statistics.median(shares)


def write_times(width: int, repeats: int, even: float) -> dict[str, Any]:
    """Return bytes of a checkpoint after one step, seconds of staging and of writing it, and what it takes from Python meanwhile.

    Two threads have even shares of the processors, however busy the machine is, unless one keeps Python from the other. So the
    thread that computes beside the write lacks what the write kept from it: more than any step would, which also waits elsewhere.

    Args:
        even: of `even_share`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        changes = [f"run_folder={folder}/run", "max_duration=1ba", f"model.backbone.hidden_size={width}", "callbacks={}"]
        changes += ["scheduler={name: constant}", "time_budget=24h", "save_interval=1dur"]
        changes += ["eval_loader=null", "progress_bar=false", "preflight=false"]
        trainer = build_trainer(config.load(["yamls/24h_mini.yaml", *changes]))
        trainer.fit()
        found: dict[str, list[float]] = defaultdict(list)
        writer, size = CheckpointWriter(Path(folder) / "written"), 0
        for _ in range(repeats):
            busy, begin = writer.thread.submit(time.thread_time).result(), time.monotonic()
            writer.begin(trainer.state, {})
            found["staging_seconds"].append(time.monotonic() - begin)
            assert writer.written is not None
            own, other = beside(writer.written, writer.thread)
            found["processor_seconds"].append(other - busy)
            found["kept_from_python_seconds"].append(other - busy - own / even)
            size = sum(file.stat().st_size for file in writer.finish().path.iterdir())
            found["seconds"].append(writer.seconds)
        writer.close()
        trainer.close()
    return {"hidden_size": width, "bytes": size} | {key: round(statistics.median(values), 4) for key, values in found.items()}


def stalls(width: int, ranks: int) -> dict[str, Any]:
    """Return medians of what training waits for where a checkpoint is begun, of the rank that waits longest, and of writes.

    The run saves every third step; what was begun while another was still being written doesn't count.
    """
    with tempfile.TemporaryDirectory(prefix="stalls-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        changes = [*overrides("yamls/24h_mini.yaml", "DDP" if ranks == 1 else "FSDP2", ranks), f"run_folder={folder / 'run'}"]
        changes += [f"model.backbone.hidden_size={width}", "model.backbone.mlp_ratio=3.5"]
        changes += [
            "max_duration=13ba",
            "save_interval=3ba",
            "optimizer={name: adamw, lr: 1.0e-4}",
        ]  # Muon's steps take long here
        changes += ["device_train_microbatch_size=2", f"global_train_batch_size={2 * ranks}", "save_num_checkpoints_to_keep=1"]
        changes += [f"callbacks.stalls.folder={folder}", f"code_paths=[{Path(__file__).with_name('stalls.py')}]"]
        command = train_command(["yamls/24h_mini.yaml", *changes], None if ranks == 1 else ranks)
        finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST, check=False)
        if finished.returncode != 0:
            raise SystemExit(f"{ranks} ranks failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}")
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
        rows = read_metrics(folder / "run" / "metrics.jsonl")
        writes = [row["checkpoint/seconds"] for row in rows if "checkpoint/seconds" in row]
        size = sum(file.stat().st_size for file in (folder / "run" / "checkpoints").rglob("*") if file.is_file())
    longest = [max(of_ranks, key=lambda row: row["stalled"]) for of_ranks in zip(*found, strict=True)]
    alone = [row for row in longest if row.get("for_a_write", 0) < 1e-3]  # it asks for what is done, too
    seconds = {key: statistics.median(row[key] for row in alone) for key in ("stalled", *PARTS, "processor")}
    write = statistics.median(writes)
    return {
        "ranks": ranks,
        "hidden_size": width,
        "bytes": size,
        "checkpoints": len(alone),
        "waited_for_a_write": len(longest) - len(alone),
        "write_seconds": round(write, 4),
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
        "share_of_the_write": {key: round(value / write, 4) for key, value in seconds.items()},
    }


def checkpoints(
    *,
    run: Annotated[Path | None, "a finished run of yamls/24h_mini.yaml"] = None,
    widths: Sequence[int] = WIDTHS,
    repeats: int = 5,
    stalled_width: Annotated[int, "of the model whose training is looked at while it saves"] = 384,
) -> dict[str, Any]:
    """Cost of checkpoints, measured on the mini recipe and scaled to the 24-hour recipe.

    Four figures: the share of a finished mini run that its checkpoints held up; by size, the seconds that training waits for a
    copy of the state, and what the write keeps from the thread that trains; and the seconds of the write, from which the large
    one follows: t = a + bytes / rate, with optimizer, average and CRC, flushed to the disk. Every rank writes its shard. And what
    training waits for while it saves, on one process and on two ranks with FSDP2, by part and as a share of the write.
    """
    recipe = config.load(["yamls/24h.yaml"])
    even = even_share()
    measured = [write_times(width, repeats, even) for width in widths]
    slope, fixed = (float(x) for x in np.polyfit([m["bytes"] for m in measured], [m["seconds"] for m in measured], 1))
    assert recipe.parallelism_config is not None and recipe.time_budget is not None
    shards, total = recipe.parallelism_config["fsdp"]["shard_degree"], training_state(MetaModel(recipe)).checkpoint
    interval = Point.parse(recipe.save_interval).value
    seconds, shared = (max(fixed, 0.0) + slope * size for size in (total / shards, total))
    return {
        "mini_run": None if run is None else share_of_run(run),
        "even_share": round(even, 3),
        "by_size": measured,
        "stalls": [stalls(stalled_width, ranks) for ranks in (1, 2)],
        "fixed_seconds": round(fixed, 4),
        "bytes_per_second": round(1 / slope),
        "24h": {
            "bytes": total,
            "ranks_that_write": shards,
            "bytes_per_rank": total // shards,
            "seconds_at_the_rate_measured_here": round(seconds, 2),
            "seconds_if_a_node_shares_that_rate": round(shared, 2),
            "interval_seconds": interval,
            "share": round(seconds / interval, 5),
            "share_if_a_node_shares_that_rate": round(shared / interval, 5),
        },
    }


if __name__ == "__main__":
    sys.exit(main(__doc__, communication, checkpoints))
