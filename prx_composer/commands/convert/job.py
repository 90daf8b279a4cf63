"""A whole conversion: checks, plan, perhaps a pass that finds duplicates, all units, and the indexes that make it a data set."""

import dataclasses
import hashlib
import json
import logging
from typing import Any

from tqdm import tqdm

from prx_composer.commands.convert import engine
from prx_composer.commands.convert.input_files import account, differences
from prx_composer.commands.convert.outcome import Tally, columns_text, files_text, left_out_text
from prx_composer.commands.convert.output import STATS, Output, open_output
from prx_composer.commands.convert.records import Job, Seen, Source, Unit, limited, open_source
from prx_composer.commands.convert.settings import MEASURED, METADATA_TYPES, Settings, check_where
from prx_composer.common.errors import UserError, nearest
from prx_composer.data.format import MANIFEST, Bucket, Manifest
from prx_composer.data.storage import survey

log = logging.getLogger(__name__)

PLAN = "plan.json"
MAX_PICTURES = 24  # of one reason, in the statistics


def convert(
    settings: Settings, output: str, workers: int = 0, on: str = "local", address: str | None = None, progress: bool = False
) -> dict[str, Any]:
    """Convert, or go on where an earlier call with the same settings was stopped.

    Args:
        output: folder of the data set, local or remote.
        workers: processes; 0 for this one alone.
        on: engine, "local" or "ray".
        address: of the Ray cluster, if there is one already.

    Returns:
        The statistics, as they are stored in conversion.json.

    Raises:
        UserError: what was asked for cannot be done, or the output holds another conversion.
    """
    if on not in engine.ENGINES:
        raise UserError(f"--engine: there is no {on!r}.{nearest(on, list(engine.ENGINES))}")
    store = open_output(output, settings.split)
    with store.lock():
        finished = store.finished()
        if finished is not None:
            _compare(finished["settings"], settings, output)
            _check_finished(finished.get("input"), settings, f"{output}/{settings.split}")
            return finished
        stored = store.get(PLAN)
        if stored is not None:
            _compare(json.loads(stored)["settings"], settings, output)
        source = open_source(settings)
        units = source.plan()
        seen = check_columns(settings, source, units)
        engine.prepare(on, workers)
        units, files = _planned(store, stored, settings, source, units)
        job = Job(dataclasses.replace(settings, image=seen.image or settings.image), output)

        def run(function: str, tasks: list[tuple[Any, ...]], done: int, what: str) -> None:
            with tqdm(total=done + len(tasks), initial=done, desc=what, unit="unit", disable=not progress) as bar:

                def seen(records: int) -> None:
                    bar.set_postfix_str(f"{records:,} samples")

                for _ in engine.run(on, workers, f"{engine.UNITS}:{function}", tasks, address, seen):
                    bar.update()

        duplicates: list[dict[int, str]] = [{} for _ in units]
        if settings.duplicates != "keep":
            there = store.names("hashes")
            run("hash_unit", [(job, unit) for unit in units if unit.name not in there], len(there), "Hashing")
            duplicates = _decide(store, units, settings)
        there = store.names("units")
        tasks = [(job, unit, duplicates[unit.number]) for unit in units if unit.name not in there]
        run("convert_unit", tasks, len(there), "Converting")
        return _finish(store, units, settings, files, source.notes)


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


def _check_found(tally: Tally, settings: Settings, store: Output) -> None:
    """Raise UserError if no record at all had a column that the settings name."""
    records = tally.counts["with_columns"]
    for option, column in settings.asked:
        if records and settings.limit is None and not tally.columns[column]:
            store.clean()
            raise UserError(
                f"{option}: none of the {records} records that could be read in {settings.input} has a column {column!r}. "
                f"Nothing was put in place. Name another column (and in an object store another --output), or leave it out."
            )


def _compare(stored: dict[str, Any], settings: Settings, output: str) -> None:
    asked = json.loads(json.dumps(settings.to_json()))
    stored = {"follow_links": False} | stored  # perhaps of a version without it
    different = sorted(name for name in stored.keys() | asked.keys() if stored.get(name) != asked.get(name))
    if different:
        was = "; ".join(f"{name} was {stored.get(name)!r}, now {asked.get(name)!r}" for name in different)
        raise UserError(f"--output: {output} holds a conversion with other settings ({was}). Name a new folder, or delete it.")


def _paths(units: list[Unit]) -> set[str]:
    return {unit.path for unit in units}


def _check_same(before: dict[str, Any], units: list[Unit], settings: Settings, made: str, way_on: str) -> None:
    """Raise UserError if the files that matter are not what they were. Say what is new, gone and changed.

    Args:
        before: what `account` returned then.
        units: of all that can be read now.
        made: what was made of the files, for the message.
        way_on: what to do, for the message.
    """
    if found := differences(before, account(settings, _paths(units), _paths(units))):
        raise UserError(f"--input: {settings.input} has other files than {made}: {found}. {way_on}")


def _check_finished(before: dict[str, Any] | None, settings: Settings, final: str) -> None:
    """Raise UserError if the same command would read something else now than what a finished conversion was made of.

    Args:
        before: of the finished conversion; None if it was made before that was stored.
        final: where it lies.
    """
    if before is None:
        log.warning("%s was made by an earlier version, which didn't store what its input was: it may have changed.", final)
    elif not survey(settings.input, settings.follow_links):
        log.warning("%s is there and whole. Its input, %s, is not there any more.", final, settings.input)
    else:
        way_on = f"Name a new --output, or delete {final} and give the command again: then all of it is converted."
        _check_same(before, open_source(settings).plan(), settings, f"when {final} was made", way_on)


def _planned(
    store: Output, stored: bytes | None, settings: Settings, source: Source, units: list[Unit]
) -> tuple[list[Unit], dict[str, Any]]:
    """Return the plan that an earlier call stored, if the input is still the same, or a new one; and the account of the files."""
    cut = hashlib.sha256(json.dumps([dataclasses.astuple(unit) for unit in units]).encode()).hexdigest()
    if stored is not None:
        plan = json.loads(stored)
        began, way_on = "when this conversion began", "Name a new --output, or delete this one's folder to begin anew."
        _check_same(plan.get("input", {}), units, settings, began, way_on)
        if plan["inputs"] != cut:
            raise UserError(f"--input: {settings.input} is cut into other units than {began}. {way_on}")
        return [Unit(**unit) for unit in plan["units"]], plan["input"]
    planned = units
    if settings.limit is not None:
        units = limited(source, units, settings.limit)
    files = account(settings, _paths(planned), _paths(units))
    plan = {"settings": settings.to_json(), "inputs": cut, "units": [dataclasses.asdict(unit) for unit in units], "input": files}
    store.put(PLAN, json.dumps(plan).encode())
    return units, files


def _decide(store: Output, units: list[Unit], settings: Settings) -> list[dict[int, str]]:
    from prx_composer.commands.convert.units import decide

    contents = [store.get(f"hashes/{unit.name}") for unit in units]
    return decide([content for content in contents if content is not None], settings)


def _finish(store: Output, units: list[Unit], settings: Settings, files: dict[str, Any], notes: list[str]) -> dict[str, Any]:
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
    if not shards:
        what = f"none of the {tally.counts['read']} samples of {settings.input} is left"
        if not tally.counts["read"]:
            what = f"there is no sample in {settings.input}"
        way_on = store.clean()  # or what it holds would be in the way of the next try, with other options
        said = [*files_text(stats), *columns_text(stats), *notes, *left_out_text(stats)]
        raise UserError("\n".join([f"--input: {what}.{way_on}", *said]))
    manifest = Manifest(
        settings.image_size,
        tuple(settings.captions),
        {Bucket.parse(bucket): count for bucket, count in tally.buckets.items()},
        metadata={name: METADATA_TYPES[kind] for name, (_, kind) in settings.metadata.items()},
    )
    files = {
        f"{bucket}/index.json": json.dumps({"version": 2, "shards": parts}, sort_keys=True) for bucket, parts in shards.items()
    }
    files |= {STATS: json.dumps(stats, indent=1), MANIFEST: manifest.to_json()}
    store.finish(units, sorted(shards), {name: content.encode() for name, content in files.items()})
    return stats
