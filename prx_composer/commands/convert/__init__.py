"""`prx data convert`: from what people have (tars, parquet, JSON lines, MDS) to the bucketed shards that `data.format` defines.

This file holds the command and a whole conversion: checks, plan, perhaps a pass that finds duplicates, all units, and the indexes
that make them a data set. Then, in reading order: `settings.py` what was asked for; `records.py` what an input gives, read by
`webdataset.py`, `tables.py` and `jsonl_mds.py`; `units.py` one work unit and one sample; `outcome.py` what came of them;
`backends.py` where units run and where their results are kept.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from tqdm import tqdm
from typer import Option, echo

from prx_composer.commands import Parsed
from prx_composer.commands.convert import backends
from prx_composer.commands.convert.outcome import Tally, as_text, columns_text, decide, files_text, left_out_text, write_report
from prx_composer.commands.convert.records import Passed, Seen, Source, Unit, open_source
from prx_composer.commands.convert.settings import MEASURED, Settings, check_where, whole_path
from prx_composer.common.errors import UserError, nearest
from prx_composer.common.installation import require
from prx_composer.data.format import HELDOUT, MANIFEST, Bucket, Manifest
from prx_composer.data.storage import INDEX, Entry, is_included, relative_name, survey

log = logging.getLogger(__name__)

PLAN = "plan.json"
MAX_PICTURES = 24  # of one reason, in the statistics
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
LISTED = 10_000  # files whose names are kept; of more only how many there are, and a hash of the list


@dataclass(frozen=True, kw_only=True)
class Running:
    """Options of `prx data convert` that do not change what it makes."""

    output: Annotated[str, Parsed(str, whole_path), Option(help="Folder of the data set, local or remote: train_loader.path.")]
    workers: Annotated[int, Option(min=0, help="Processes. 0: this one alone; with Ray: all CPUs of the cluster.")] = 1
    engine: Annotated[str, Option(help="local or ray.")] = "local"
    ray_address: Annotated[str | None, Option(help="Ray cluster to run on, such as auto. [default: one on this machine]")] = None
    report: Annotated[str | None, Option(metavar="FILE", help="Write an HTML page about it.")] = None


def convert_data(settings: Settings, running: Running) -> None:
    """Make a data set of aspect-ratio buckets out of tars, parquet, JSON lines or MDS.

    Killed and given again, the same command goes on where it was. What is left out and why: recipes/data/README.md
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    require("data", "prx data convert")
    statistics = run_conversion(settings, running.output, running.workers, running.engine, running.ray_address, progress=True)
    if running.report is not None:
        write_report(statistics, running.output, running.report)
    echo(as_text(statistics))


def run_conversion(
    settings: Settings,
    output: str,
    workers: int = 0,
    engine: str = "local",
    address: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Convert, or go on where an earlier call with the same settings was stopped.

    Args:
        output: folder of the data set, local or remote.
        workers: processes; 0 for this one alone.
        engine: "local" or "ray".
        address: of the Ray cluster, if there is one already.
        progress: show a bar.

    Returns:
        The statistics, as they are stored in conversion.json.

    Raises:
        UserError: what was asked for cannot be done, or the output holds another conversion.
    """
    if engine not in backends.ENGINES:
        raise UserError(f"--engine: there is no {engine!r}.{nearest(engine, list(backends.ENGINES))}")
    store = backends.open_output(output, settings.split)
    with store.lock(), contextlib.nullcontext() if settings.heldout is None else backends.open_output(output, HELDOUT).lock():
        if (finished := store.finished()) is not None:
            _check_finished(finished, settings, output, store)
            return finished
        stored = store.get(PLAN)
        if stored is not None:
            _compare(json.loads(stored)["settings"], settings, output)
        source = open_source(settings)
        units = source.plan()
        seen = check_columns(settings, source, units)
        backends.prepare(engine, workers)
        units, files = make_plan(store, stored, settings, source, units)
        chosen = dataclasses.replace(settings, image=seen.image or settings.image)

        def run(function: str, arguments: list[tuple[Any, ...]], folder: str, what: str) -> None:
            there = store.names(folder)
            tasks = [(chosen, output, *each) for each in arguments if each[0].name not in there]
            with tqdm(total=len(units), initial=len(there), desc=what, unit="unit", disable=not progress, **_bar()) as bar:

                def seen(records: int) -> None:
                    bar.set_postfix_str(f"{records:,} samples", refresh=False)
                    bar.update(0)

                for _ in backends.run(engine, workers, f"{backends.UNITS}:{function}", tasks, address, seen):
                    bar.update()

        duplicates: list[dict[int, str]] = [{} for _ in units]
        if settings.duplicates != "keep":
            run("hash_unit", [(unit,) for unit in units], "hashes", "Hashing")
            duplicates = decide([store.get(f"hashes/{unit.name}") or b"" for unit in units], settings)
        run("convert_unit", list(zip(units, duplicates, strict=True)), "units", "Converting")
        return _finish(store, units, settings, files, source.notes)


class _Lines(io.TextIOBase):
    """Takes the states of a bar, each a line of the log."""

    def write(self, text: str) -> int:
        return sys.stderr.write(f"{text.strip()}\n") if text.strip() else 0


def _bar() -> dict[str, Any]:
    """Return how a bar is shown: one that moves on a terminal, and elsewhere a line a minute."""
    if sys.stderr.isatty():
        return {"miniters": 0}
    return {"miniters": 0, "mininterval": 60, "maxinterval": 60, "file": _Lines(), "ncols": 100, "ascii": " #"}


def check_columns(settings: Settings, source: Source, units: list[Unit]) -> Seen:
    """Raise UserError if a column that the settings name is not there; warn, if it may still come."""
    if settings.where:
        check_where(settings.where)
    seen = source.columns(units)
    if not seen.names:
        return seen  # nothing of the beginning can be read: what is wrong with it is said at the end
    for option, column in settings.asked:
        if column in seen.missing:
            missing = f"{option}: there is no column {column!r} in"
            there = nearest(column, [*seen.names, *(MEASURED if option == "--where" else ())])
            if seen.whole:
                raise UserError(f"{missing} {settings.input}.{there}")
            log.warning("%s the first %s records. If no other has it, this ends with an error.%s", missing, seen.looked_at, there)
    return seen


def make_plan(
    store: backends.Output, stored: bytes | None, settings: Settings, source: Source, units: list[Unit]
) -> tuple[list[Unit], dict[str, Any]]:
    """Return the plan that an earlier call stored, if the input is still the same, or a new one; and the account of the files."""
    cut = hashlib.sha256(json.dumps([dataclasses.astuple(unit) for unit in units]).encode()).hexdigest()
    if stored is not None:
        plan = json.loads(stored)
        began, way_on = "when this conversion began", "Name a new --output, or delete this one's folder to begin anew."
        _check_same(plan["input"], units, settings, began, way_on)
        if plan["inputs"] != cut:
            raise UserError(f"--input: {settings.input} is cut into other units than {began}. {way_on}")
        return [Unit(**unit) for unit in plan["units"]], plan["input"]
    if settings.heldout is not None and store.has_heldout():
        raise UserError(f"--heldout: there is a split {HELDOUT} in --output already. Delete it, or name a new --output.")
    planned = units if settings.limit is None else _limited(source, units, settings.limit)
    files = account(settings, units, planned)
    plan = {
        "settings": settings.to_json(),
        "inputs": cut,
        "units": [dataclasses.asdict(unit) for unit in planned],
        "input": files,
    }
    store.put(PLAN, json.dumps(plan).encode())
    return planned, files


def _limited(source: Source, units: list[Unit], limit: int) -> list[Unit]:
    """Return the first units, as many as hold `limit` records, the last of them cut. Read that many records, and no more."""
    kept: list[Unit] = []
    for unit in units:
        count = sum(1 for _ in itertools.islice(source.read(unit), limit))
        kept.append(dataclasses.replace(unit, take=count))
        limit -= count
        if limit <= 0:
            break
    return kept


def _finish(
    store: backends.Output, units: list[Unit], settings: Settings, files: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Write the indexes of all buckets, then the manifest. Order and content depend on the units alone."""
    tally, pictures = Tally(), dict[str, list[str]]()
    shards: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        result = store.result(unit)
        tally.include(Tally(result))
        for reason, some in result["pictures"].items():
            pictures.setdefault(reason, []).extend(some[: MAX_PICTURES - len(pictures.get(reason, []))])
        for bucket, written in result["shards"].items():
            for shard in written:
                shard["raw_data"]["basename"] = f"{unit.name}/{shard['raw_data']['basename']}"
                shards.setdefault(bucket, []).append(shard)
    tally.check()
    _check_found(tally, settings, store)
    stats = {"settings": settings.to_json(), **tally.to_json(), "pictures": pictures, "input": files, "notes": notes}
    stats["asked"] = [column for _, column in settings.asked]
    if not tally.buckets:
        what = f"none of the {tally.counts['read']} samples of {settings.input} is left"
        if not tally.counts["read"]:
            what = f"there is no sample in {settings.input}"
        if tally.heldout:
            what += f": --heldout {settings.heldout} takes the {tally.counts['kept']} that are kept, so give a smaller share"
        way_on = store.clean()  # or what it holds would be in the way of the next try, with other options
        said = [*files_text(stats), *columns_text(stats), *notes, *left_out_text(stats)]
        raise UserError("\n".join([f"--input: {what}.{way_on}", *said]))
    contents = {
        f"{bucket}/{INDEX}": json.dumps({"version": 2, "shards": parts}, sort_keys=True) for bucket, parts in shards.items()
    }
    for place, counts in ((f"{HELDOUT}/", tally.heldout), ("", tally.buckets)):
        buckets = {Bucket.parse(bucket): count for bucket, count in counts.items()}
        manifest = Manifest(settings.image_size, tuple(settings.captions), buckets, metadata=settings.metadata_encodings)
        if counts:
            contents |= {f"{place}{backends.STATS}": json.dumps(stats, indent=1), f"{place}{MANIFEST}": manifest.to_json()}
    store.finish(units, sorted(shards), {name: content.encode() for name, content in contents.items()})
    return stats


def _check_found(tally: Tally, settings: Settings, store: backends.Output) -> None:
    """Raise UserError if no record at all had a column that the settings name."""
    records = tally.counts["with_columns"]
    for option, column in settings.asked:
        if records and settings.limit is None and not tally.columns[column]:
            store.clean()
            raise UserError(
                f"{option}: none of the {records} records that could be read in {settings.input} has a column {column!r}. "
                f"Nothing was put in place. Name another column (and in an object store another --output), or leave it out."
            )


# Going on, or not: whether an earlier call had the same settings and the same input.


def _compare(stored: dict[str, Any], settings: Settings, output: str) -> None:
    """Raise UserError if the settings are not those of an earlier call."""
    asked = settings.to_json()
    stored = {"follow_links": False} | stored  # perhaps of a version without it
    different = sorted(name for name in stored.keys() | asked.keys() if stored.get(name) != asked.get(name))
    if different:
        was = "; ".join(f"{name} was {stored.get(name)!r}, now {asked.get(name)!r}" for name in different)
        raise UserError(f"--output: {output} holds a conversion with other settings ({was}). Name a new folder, or delete it.")


def _check_finished(finished: dict[str, Any], settings: Settings, output: str, store: backends.Output) -> None:
    """Raise UserError if the same command would read something else now than what a finished conversion was made of."""
    _compare(finished["settings"], settings, output)
    final = f"{output}/{settings.split}"
    if finished.get("heldout") and not store.has_heldout():
        raise UserError(f"--output: {output}/{HELDOUT}, made with {final}, is gone. Name a new --output, or delete {final}, too.")
    if "input" not in finished:
        log.warning("%s was made by an earlier version, which didn't store what its input was: it may have changed.", final)
    elif not survey(settings.input, settings.follow_links):
        log.warning("%s is there and whole. Its input, %s, is not there any more.", final, settings.input)
    else:
        both = f" and {output}/{HELDOUT}" if finished.get("heldout") else ""
        way_on = f"Name a new --output, or delete {final}{both} and give the command again: then all of it is converted."
        _check_same(finished["input"], open_source(settings).plan(), settings, f"when {final} was made", way_on)


def _check_same(before: dict[str, Any], units: list[Unit], settings: Settings, made: str, way_on: str) -> None:
    """Raise UserError if the files that matter are not what they were. Say what is new, gone and changed.

    Args:
        before: what `account` returned then.
        units: of all that can be read now.
        made: what was made of the files, for the message.
        way_on: what to do, for the message.
    """
    if found := differences(before, account(settings, units, units)):
        raise UserError(f"--input: {settings.input} has other files than {made}: {found}. {way_on}")


def account(settings: Settings, units: list[Unit], converted: list[Unit]) -> dict[str, Any]:
    """Return how many files the input has and how many are read, why others are not, and the state of those that matter.

    What matters are the files that can be read, and images that records may name.

    Args:
        units: all that can be read.
        converted: those that are converted, fewer with `--limit`.
    """
    entries = survey(settings.input, settings.follow_links)
    readable, read = _files_of(units, entries, settings), _files_of(converted, entries, settings)
    passed, state = Passed(), dict[str, list[Any]]()
    for entry in entries:
        name = relative_name(entry.path, settings.input)
        if entry.path not in read:
            passed.add("after --limit" if entry.path in readable else _why(entry, name, settings), name)
        if entry.path in readable or _may_be_named(entry.path, settings):
            state[name] = [entry.size, entry.stamp]
    return {"found": len(entries), "read": len(read), "passed": dict(passed)} | as_stored(state)


def as_stored(state: dict[str, list[Any]], most: int = LISTED) -> dict[str, Any]:
    """Return the state of files by name, or a hash of it if there are more than `most`."""
    if len(state) <= most:
        return {"files": state}
    return {"many": len(state), "sha256": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}


def _files_of(units: list[Unit], entries: Iterable[Entry], settings: Settings) -> set[str]:
    """Return the files at the paths of units; of an MDS folder, all that is in it."""
    paths = {unit.path for unit in units}
    if settings.source != "mds":
        return {entry.path for entry in entries if entry.path in paths}
    folders = tuple(f"{path.rstrip('/')}/" for path in paths)
    inside = [entry.path for entry in entries if entry.path.startswith(folders)]
    return {path for path in inside if not _is_hidden(relative_name(path, settings.input))}


def _may_be_named(path: str, settings: Settings) -> bool:
    """Return whether a file is an image that a record may name."""
    return settings.source in ("jsonl", "parquet") and path.lower().endswith(IMAGES)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _why(entry: Entry, name: str, settings: Settings) -> str:
    """Return the kind of a file that is not read."""
    if _is_hidden(name):
        return "hidden"
    if entry.size is None and entry.stamp is None:
        return "links to a folder, which --follow-links reads" if entry.path.endswith("/") else "links to nothing"
    if _may_be_named(name, settings):
        return "images, except where a record names them"
    if not is_included(name, settings.include):
        return "not of --include"
    file = name.rpartition("/")[2]
    return f".{file.rpartition('.')[2].lower()}" if "." in file else "without a suffix"


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say what is new, gone or changed; "" for nothing."""
    then, here = before.get("files"), now.get("files")
    if then is None or here is None:
        same = (before.get("many"), before.get("sha256")) == (now.get("many"), now.get("sha256"))
        many = [len(state["files"]) if "files" in state else state.get("many") for state in (before, now)]
        return "" if same else f"{many[0]} then and {many[1]} now, with other names, sizes or times"
    kinds = {
        "new": sorted(here.keys() - then.keys()),
        "gone": sorted(then.keys() - here.keys()),
        "changed in size or time": sorted(name for name in here.keys() & then.keys() if list(here[name]) != list(then[name])),
    }
    return ", ".join(f"{len(names)} {kind} (such as {names[0]})" for kind, names in kinds.items() if names)
