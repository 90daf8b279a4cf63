"""`prx average`: kept checkpoints of a run, merged into weights that open like any others.

Training at a constant rate and merging its checkpoints stands for a decay of the rate (warm-up, stable, merge: arXiv:2507.17634).
A step's update counts in every checkpoint after it, thus the sum of their shares is the rate that the step is left with.
"""

import itertools
import logging
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from prx_composer.commands import show_log, writing_output
from prx_composer.common.errors import UserError, at_path

if TYPE_CHECKING:
    from torch import Tensor

    from prx_composer.runs.checkpoints import Checkpoint
    from prx_composer.runs.weights import SavedState

log = logging.getLogger(__name__)

_LAST = 5  # by default
_UNIFORM = "uniform"
_OF_THE_RUN = ("config.yaml", "tokenizer", "frozen")  # what weights are opened with
_OF_TRICKS = ("active", "current", "switching")  # what opening asks of them
_BATCH = re.compile(r"(?:ba)?(\d+)(?:ba)?")


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Options of `prx average`."""

    run: Annotated[str, Argument(metavar="RUN", help="Run folder (runs/<run_name>), here or remote (s3://…).")]
    last: Annotated[int | None, Option(min=1, help=f"The newest n. [default: {_LAST}, or all of --from and --to]")] = None
    checkpoints: Annotated[str | None, Option(metavar="LIST", help="These alone, such as ba1000,ba1500,ba2000.")] = None
    first: Annotated[str | None, Option("--from", metavar="BATCH", help="None before it, such as 1000ba.")] = None
    to: Annotated[str | None, Option(metavar="BATCH", help="None after it.")] = None
    like: Annotated[
        str,
        Option(help="uniform: their mean. linear, cosine, 1-sqrt: as if the rate had decayed so from the oldest to the newest."),
    ] = _UNIFORM
    weights: Annotated[str, Option(help="raw: the weights that were trained. ema: their averages, of a run with `ema`.")] = "raw"
    output: Annotated[str | None, Option(metavar="DIR", help="Folder to write. [default: RUN-average]")] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an average that is there.")] = False


def average_run(options: AverageOptions) -> None:
    """Merge kept checkpoints of a run: the average without a copy of the weights in training.

    The result is a run folder of one checkpoint, which generate, evaluate, export, demo and model.init_from open. It has weights
    alone: no training goes on in it. Checkpoints are read one at a time. Those that are damaged, not finite or of another recipe
    are skipped, and it is said why; one that --checkpoints names is refused instead.

    prx average runs/quickstart --last 5 --like linear
    """
    from prx_composer.data.storage import is_remote

    show_log()
    _check(options)
    remote = is_remote(options.run)
    target = _target(options, remote)
    with tempfile.TemporaryDirectory(prefix="prx-average.") if remote else nullcontext("") as scratch:
        run = _RemoteRun(options.run, Path(scratch)) if remote else _Run(options.run)
        average = _average(run, options)
        with writing_output():
            _write(average, run.folder, target, options)
    for checkpoint, share in average.shares.items():
        echo(f"{checkpoint}  {share:.4f}")
    for checkpoint, why in average.skipped.items():
        echo(f"{checkpoint}  skipped: {why}")
    if len(average.shares) == 1:
        echo("One checkpoint is its own average. More are kept with save_interval and save_num_checkpoints_to_keep.")
    if average.stages > 1:
        echo(f"They are of {average.stages} stages of progressive_resolution, and it draws at the newest's size; see --from.")
    name = (average.index["recipe"].get("scheduler") or {}).get("name", "constant")
    if len(average.shares) > 1 and name not in ("constant", "constant_with_warmup", "warmup_stable_decay"):
        echo(f"The rate of this run fell by itself (scheduler: {name}). A merge stands for a decay: it is for a constant rate.")
    echo(f"{options.like} average of {len(average.shares)}, {options.weights} weights · {target}")


def _check(o: AverageOptions) -> None:
    from prx_composer.optim import DECAYS

    if o.like not in (_UNIFORM, *DECAYS):
        raise UserError(f"--like must be one of {', '.join((_UNIFORM, *DECAYS))}, not {o.like!r}.")
    if o.weights not in ("raw", "ema"):
        raise UserError(f"--weights must be raw or ema, not {o.weights!r}.")
    if o.checkpoints is not None and (o.last, o.first, o.to) != (None, None, None):
        raise UserError("--checkpoints names all that are merged; leave --last, --from and --to out.")


def _target(o: AverageOptions, remote: bool) -> Path:
    """Return the folder to write. Raise UserError if it holds something else than an average, or --overwrite isn't given."""
    from prx_composer.runs.checkpoints import MERGED, all_checkpoints

    if o.output is None and remote:
        raise UserError(f"--output: name a folder here for the average of {o.run}.")
    run = Path(o.run).expanduser().resolve()
    target = run.with_name(f"{run.name}-average") if o.output is None else Path(o.output).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        found = all_checkpoints(target / "checkpoints")
        with at_path(f"--output: {target}"):
            if not found or not all(checkpoint.index().get(MERGED) for checkpoint in found):
                raise UserError(f"--output: {target} is not empty and holds no average; give another folder.")
        if not o.overwrite:
            raise UserError(f"--output: {target} holds an average; give another folder, or --overwrite to replace it.")
    return target


# ------------------------------------------------------------------------------------------------------------- shares


def decay_shares(batches: Sequence[int], like: str = _UNIFORM) -> list[float]:
    """Return the shares of checkpoints in their average: theirs of a mean, or those that stand for a decay of the rate.

    With fixed gradients and SGD, the average is what training with that decay from the oldest to the newest would end at, up to
    what a checkpoint cannot tell apart: the steps between two of them, which get their mean rate (arXiv:2507.17634, theorem 3.1:
    a step's rate is the sum of the shares of the checkpoints after it).

    Args:
        batches: of the checkpoints, ascending.
        like: "uniform", or one of `optim.DECAYS`, whose rate after s of N steps is that of `warmup_stable_decay`.

    Returns:
        Shares of at least 0; their sum is not scaled.
    """
    from prx_composer.optim import DECAYS

    if like == _UNIFORM or len(batches) == 1:
        return [1.0] * len(batches)
    oldest, length = batches[0], batches[-1] - batches[0]
    rates = [
        statistics.fmean(DECAYS[like]((batch - oldest) / length) for batch in range(before + 1, after + 1))
        for before, after in itertools.pairwise(batches)
    ]
    return [more - less for more, less in itertools.pairwise([1.0, *rates, 0.0])]


class WeightedMean:
    """A weighted mean of models, added one by one, in fp64: 8 bytes for each weight.

    Tensors that are no floating-point numbers are those of the model that was added first.
    """

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._total = 0.0

    def add(self, tensors: "Mapping[str, Tensor]", share: float) -> None:
        """Raise ValueError for names or shapes that are not those of the first model."""
        if not self._sums:
            self._begin(tensors)
        elif wrong := self._difference(tensors):
            raise ValueError(wrong)
        for name, total in self._sums.items():
            total.add_(tensors[name].double(), alpha=share)
        self._total += share

    def _begin(self, tensors: "Mapping[str, Tensor]") -> None:
        import torch

        self._first = {name: torch.empty_like(t) if t.is_floating_point() else t.clone() for name, t in tensors.items()}
        self._sums = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in tensors.items() if t.is_floating_point()}

    def _difference(self, tensors: "Mapping[str, Tensor]") -> str | None:
        if names := sorted(self._first.keys() ^ tensors.keys()):
            return f"it has other weights than the newest: {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1)
        for name, first in self._first.items():
            if tensors[name].shape != first.shape:
                return f"{name} is {tuple(tensors[name].shape)} in it and {tuple(first.shape)} in the newest"
        return None

    def result(self) -> "dict[str, Tensor]":
        """Return the mean, rounded once to the types of the first model. What was summed up is given free on the way."""
        for name in list(self._sums):
            self._first[name].copy_(self._sums.pop(name).div_(self._total))
        return self._first


# ------------------------------------------------------------------------------------------------------------ merging


class _Run:
    """A run's folder.

    Args:
        name: the folder.

    Raises:
        UserError: it is none, or has no checkpoint.
    """

    def __init__(self, name: str):
        from prx_composer.runs.checkpoints import all_checkpoints
        from prx_composer.runs.weights import locate

        self.folder = Path(name).expanduser()
        if not (self.folder / "config.yaml").is_file():
            raise UserError(
                f"{name} is no run folder: it has no config.yaml. Give runs/<run_name>; --checkpoints names some of it."
            )
        self.checkpoints = all_checkpoints(self.folder / "checkpoints")
        if not self.checkpoints:
            locate(name)  # says what is there instead

    @contextmanager
    def opened(self, checkpoint: "Checkpoint") -> "Iterator[SavedState]":
        """Give what a checkpoint holds. Raise UserError as `read_checkpoint` does."""
        from prx_composer.runs.weights import read_checkpoint

        yield read_checkpoint(checkpoint)


class _RemoteRun(_Run):
    """A run on remote storage, copied to a folder here but for the contents of its checkpoints, which come one at a time."""

    def __init__(self, name: str, scratch: Path):
        from prx_composer.common.files import inside
        from prx_composer.data.storage import download, join, survey
        from prx_composer.runs.checkpoints import INDEX

        self._files: dict[str, list[tuple[str, Path]]] = {}  # of a checkpoint: where they are, and where they come to
        base = name.rstrip("/")
        for path, *_ in survey(base):
            relative = path.removeprefix(f"{base}/")
            room, _, rest = relative.partition("/")
            with at_path(name):
                target = inside(scratch, relative)
            if room == "checkpoints" and target.name != INDEX:
                self._files.setdefault(rest.partition("/")[0], []).append((path, target))
            elif room in (*_OF_THE_RUN, "checkpoints", "changes.jsonl"):
                download(join(base, relative), target)
        super().__init__(str(scratch))

    @contextmanager
    def opened(self, checkpoint: "Checkpoint") -> "Iterator[SavedState]":
        from prx_composer.data.storage import download

        files = self._files.get(checkpoint.path.name, [])
        try:
            for source, target in files:
                download(source, target)
            with super().opened(checkpoint) as state:
                yield state
        finally:
            for _, target in files:
                target.unlink(missing_ok=True)


class _UnfitError(Exception):
    """A checkpoint that cannot be merged, and why."""


@dataclass(frozen=True)
class _Average:
    """What came of it.

    Args:
        tensors: parameter and buffer names → weights.
        shares: checkpoint → share, of a sum of 1, oldest first.
        skipped: checkpoint → why.
        index: of the newest that was merged; `state` is the rest of it.
        stages: of progressive_resolution that they are of.
    """

    tensors: "dict[str, Tensor]"
    shares: dict[str, float]
    skipped: dict[str, str]
    index: dict[str, Any]
    state: dict[str, Any]
    stages: int


def _average(run: _Run, o: AverageOptions) -> _Average:
    """Average what is asked for. What turns out to be unfit is left out, and those that are asked for chosen anew."""
    from prx_composer.runs.weights import SavedState

    skipped: dict[str, str] = {}
    while True:
        chosen = _chosen([found for found in run.checkpoints if found.path.name not in skipped], o)
        if not chosen:
            said = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
            kept = ", ".join(found.path.name for found in run.checkpoints)
            raise UserError(f"{o.run} has no checkpoint to merge among those asked for; it keeps {kept}.{said}")
        shares = decay_shares([checkpoint.batch for checkpoint in chosen], o.like)
        mean, facts, unfit = WeightedMean(), list[tuple[dict[str, Any], dict[str, Any]]](), ""
        try:
            for checkpoint, share in reversed(list(zip(chosen, shares, strict=True))):  # others are held to the newest
                unfit = checkpoint.path.name
                facts.append(_merge(run, checkpoint, chosen[-1], o.weights, mean, share))
        except _UnfitError as error:
            if o.checkpoints is not None:
                raise UserError(f"--checkpoints: {unfit} cannot be merged: {error}") from error
            skipped[unfit] = str(error)
            continue
        total = sum(shares)
        named = {checkpoint.path.name: share / total for checkpoint, share in zip(chosen, shares, strict=True)}
        stages = {SavedState({}, algorithms=dict(state["algorithms"])).stage for _, state in facts}
        return _Average(mean.result(), named, skipped, *facts[0], len(stages))


def _chosen(found: "Sequence[Checkpoint]", o: AverageOptions) -> "list[Checkpoint]":
    """Return the checkpoints that are asked for, oldest first. Raise UserError for one that is named and isn't there."""
    if o.checkpoints is not None:
        batches = {_batch(name, "--checkpoints") for name in o.checkpoints.split(",") if name.strip()}
        if missing := sorted(batches - {checkpoint.batch for checkpoint in found}):
            kept = ", ".join(checkpoint.path.name for checkpoint in found)
            raise UserError(f"--checkpoints: {o.run} keeps no ba{missing[0]}; there are {kept}.")
        return [checkpoint for checkpoint in found if checkpoint.batch in batches]
    first = 0 if o.first is None else _batch(o.first, "--from")
    to = None if o.to is None else _batch(o.to, "--to")
    within = [checkpoint for checkpoint in found if checkpoint.batch >= first and (to is None or checkpoint.batch <= to)]
    last = o.last or (_LAST if o.first is None and o.to is None else 0)
    return within[-last:]  # 0: all


def _batch(text: str, option: str) -> int:
    if (match := _BATCH.fullmatch(text.strip())) is None:
        raise UserError(f"{option}: {text!r} is no checkpoint; write ba1000, 1000ba or 1000.")
    return int(match[1])


def _merge(
    run: _Run, checkpoint: "Checkpoint", newest: "Checkpoint", weights: str, mean: WeightedMean, share: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add a checkpoint to the mean; return its index and what sampling needs to know beside weights.

    Raises:
        _UnfitError: it is damaged, not finite, of another recipe, or has no such weights, or others.
        UserError: it is an average already.
    """
    from prx_composer.common.distributed import clean_name
    from prx_composer.runs.checkpoints import MERGED
    from prx_composer.runs.folder import is_allowed, read_changes, recipe_changes
    from prx_composer.runs.weights import nonfinite

    try:
        index, reference = checkpoint.index(), newest.index()
        allowed = {key: change["now"] for start in read_changes(run.folder) for key, change in start["changes"].items()}
        changes = recipe_changes(index["recipe"], reference["recipe"], index["ranks"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _UnfitError(f"its index cannot be read ({error})") from error
    if index.get(MERGED):
        raise UserError(f"{run.folder} is an average already.")
    binding = [change for change in changes if change.rule.may in ("asked", "never")]
    if others := [str(change) for change in binding if not is_allowed(change, (), allowed)]:
        raise _UnfitError(f"it is of another recipe than {newest.path.name}: {', '.join(others)}")
    try:
        with run.opened(checkpoint) as state:
            if weights == "ema" and not state.average:
                raise _UnfitError("it has no averaged weights: the recipe has no `ema`, or it had not begun")
            tensors = {clean_name(name): tensor for name, tensor in state.model.items()}
            tensors |= state.average if weights == "ema" else {}
            if wrong := nonfinite(tensors):
                raise _UnfitError(wrong)
            mean.add(tensors, share)
            units = {unit: int(state.timestamp.get(unit, 0)) for unit in ("batch", "epoch", "sample")}
            tricks = [(name, {key: own[key] for key in _OF_TRICKS if key in own}) for name, own in state.algorithms.items()]
            clock = {"TrainingClock": dict(state.clock)}
            return index, {"timestamp": {"Timestamp": units}, "callbacks": clock, "algorithms": tricks}
    except ValueError as error:
        raise _UnfitError(str(error).replace(str(checkpoint.path), checkpoint.path.name)) from error


def _write(average: _Average, run_folder: Path, target: Path, o: AverageOptions) -> None:
    """Write a run folder of one checkpoint, whole or not at all."""
    from prx_composer.commands.export.pipeline import written_aside
    from prx_composer.runs.checkpoints import MERGED, write_merged

    content = {"model": average.tensors, **average.state}
    merged = {"like": o.like, "weights": o.weights, "checkpoints": average.shares, "skipped": average.skipped}
    with written_aside(target) as partial:
        for name in _OF_THE_RUN:
            source = run_folder / name
            if source.is_dir():
                shutil.copytree(source, partial / name, copy_function=_link_or_copy if name == "frozen" else shutil.copy)
            elif source.is_file():
                shutil.copy(source, partial / name)
        write_merged(partial / "checkpoints", content, average.index | {MERGED: merged})


def _link_or_copy(source: str, target: str) -> None:
    """Take a file that nobody changes, and that may be large."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
