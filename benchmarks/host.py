"""What the host does in a step of the 24-hour recipe beside asking for its passes.

python benchmarks/host.py --base 648b281 --output host.json    # this checkout against an earlier commit

A CPU answers that: the step has the recipe's structure, its 16 blocks, its algorithms and FSDP2's DTensors, and matrices so
small that they take no time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from common import ROOT, main, summary
from stages import with_synthetic_batches, write_recipe

from prx_composer.recipe import config

RECIPE = "yamls/24h.yaml"
T5 = dict(model_type="t5", d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
TEACHER = dict(model_type="dinov2", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16)


def small_recipe(folder: Path, steps: int) -> dict[str, Any]:
    """Return the 24-hour recipe at its structure with small matrices, in fp32, on one synthetic batch of one microbatch."""
    recipe: dict[str, Any] = dict(vars(config.load([str(ROOT / RECIPE)])))
    model, algorithms = recipe["model"], recipe["algorithms"]
    model["backbone"] |= dict(hidden_size=16, num_heads=1, bottleneck_size=4, context_in_dim=32)
    model |= {
        "compile": False,
        "text_encoder": {"name": "huggingface", "config": T5, "tokenizer": {"train": True}, "max_tokens": 8},
    }
    algorithms["repa"] |= {"teacher": {"config": TEACHER}, "projector_hidden": 16, "end": None}
    algorithms["lpips"] |= {"net": "squeeze", "random_weights": True, "compile": False}
    algorithms["perceptual_dino"] |= {"teacher": {"config": TEACHER}, "image_size": 16}
    del algorithms["progressive_resolution"], recipe["callbacks"]["images"]
    changes = dict(image_size=64, global_train_batch_size=2, device_train_microbatch_size=2, max_duration=f"{steps}ba")
    changes |= dict(run_folder=str(folder / "run"), precision="fp32", eval_loader=None, preflight=False, progress_bar=False)
    changes |= dict(autoresume=False, save_interval="1000h", time_budget="1000h", parallelism_config={"fsdp": {}})
    return with_synthetic_batches(recipe | changes, folder, 0.5, True, True)


# Only what both revisions have: the Trainer, its events, its algorithms and callbacks.
WORKER = """
import json, sys, time
from collections import defaultdict
from prx_composer.recipe import config
from prx_composer.training.run import build_trainer

PARTS = {"gradient_clipping": "clip", "skip_nonfinite": "not finite", "_ReadLast": "not finite", "ema": "EMA"}
PARTS["Checkpointing"] = "beside steps"  # at the end of a turn
spent, stack = defaultdict(float), []

def timed(function, part):
    def wrapped(*arguments, **options):
        now = time.thread_time()
        if stack:
            spent[stack[-1][0]] += now - stack[-1][1]
        stack.append([part, now])
        try:
            return function(*arguments, **options)
        finally:
            now = time.thread_time()
            spent[part] += now - stack.pop()[1]
            if stack:
                stack[-1][1] = now
    return wrapped

trainer = build_trainer(config.load([sys.argv[1]]))
state = trainer.state
for algorithm in state.algorithms:
    algorithm.apply = timed(algorithm.apply, PARTS.get(getattr(algorithm, "name", ""), "other algorithms"))
for callback in state.callbacks:
    in_a_step = timed(callback.run_event, PARTS.get(type(callback).__name__, "callbacks"))
    of_the_run = timed(callback.run_event, "beside steps")
    callback.run_event = lambda event, *given, both=(in_a_step, of_the_run): both["fit" in event.value](event, *given)
state.optimizers[0].step = timed(state.optimizers[0].step, "optimizer")
trainer._train_microbatch = timed(trainer._train_microbatch, "passes")
trainer._train_batch = timed(trainer._train_batch, "the rest of Composer's loop")
trainer.engine.run_event = timed(trainer.engine.run_event, "the rest of Composer's loop")
trainer.logger.log_metrics = timed(trainer.logger.log_metrics, "loggers")
print(flush=True)
for line in sys.stdin:
    spent.clear()
    trainer.fit(duration=line.strip() + "ba")
    said = [float(value) for value in state.total_loss_dict.values()]
    print(json.dumps({"spent": spent, "losses": said}), flush=True)
"""


class Worker:
    """A process that trains with the package of one revision."""

    def __init__(self, folder: Path, recipe: Path):
        paths = [str(folder), str(ROOT / "benchmarks")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command, pipe = [sys.executable, "-W", "ignore", "-c", WORKER, str(recipe)], subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A worker ended: what it said is above.")
        return line

    def steps(self, count: int) -> dict[str, Any]:
        """Make so many steps; return milliseconds of each part in one of them, and the losses of the last."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answer = json.loads(self.read())
        spent = {name: 1000 * seconds / count for name, seconds in answer["spent"].items()}
        return {"parts": spent, "losses": answer["losses"]}

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextmanager
def checkout(revision: str | None, folder: Path) -> Iterator[Path]:
    """Give a folder with the files of a revision, or this one."""
    if revision is None:
        yield ROOT
        return
    subprocess.run(["git", "worktree", "add", "--detach", str(folder), revision], cwd=ROOT, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True, capture_output=True)


def step(
    *,
    base: Annotated[str | None, "an earlier commit, in turns with this checkout"] = None,
    turns: int = 15,
    steps: Annotated[int, "of a turn; EMA updates in every tenth"] = 10,
) -> dict[str, Any]:
    """Milliseconds of the host in a training step, by part, beside forward and backward passes; sum without these.

    One process with FSDP2, so that weights, gradients and moments are DTensors. It is the CPU time of the thread that trains,
    which others on the machine don't lengthen by much. It includes the small kernels themselves, where a GPU's are launched.
    """
    with tempfile.TemporaryDirectory(prefix="host-") as temporary, checkout(base, Path(temporary) / "base") as earlier:
        folder = Path(temporary)
        folders = ({"base": earlier} if base else {}) | {"now": ROOT}
        workers, found = dict[str, Worker](), dict[str, list[dict[str, Any]]]()
        try:
            for name, own in folders.items():
                (folder / name).mkdir(exist_ok=True)
                recipe = write_recipe(small_recipe(folder / name, 10**6), folder / f"{name}.yaml")
                workers[name], found[name] = Worker(own, recipe), []
            for turn in range(turns + 1):
                for name in list(workers) if turn % 2 else reversed(list(workers)):
                    found[name].append(workers[name].steps(steps))
        finally:
            for worker in workers.values():
                worker.end()
    losses = [[turn["losses"] for turn in each] for each in found.values()]
    milliseconds = {name: _by_part([turn["parts"] for turn in each[1:]]) for name, each in found.items()}
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {
        "revisions": ({"base": base} if base else {}) | {"now": revision.stdout.strip()},
        "equal_losses": losses[0] == losses[-1],
        "steps": steps * turns,
        "milliseconds": milliseconds,
    }


def _by_part(turns: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians and quartiles of every part, with the sum of all of a step but the passes."""
    parts = {name: [turn.get(name, 0.0) for turn in turns] for name in turns[0]}
    beside = [sum(ms for name, ms in turn.items() if name not in ("passes", "beside steps")) for turn in turns]
    order = sorted(parts, key=lambda name: -statistics.median(parts[name]))
    return {"beside the passes": summary(beside, 2)} | {name: summary(parts[name], 2) for name in order}


if __name__ == "__main__":
    sys.exit(main(__doc__, step))
