"""Whether the data can serve every stage: splits, columns, shards, buckets and a first look at the images."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError, at_path, first, raise_all
from prx_composer.data.contents import LeftOut, SkipList, said_of_skipped
from prx_composer.data.dataset import leave_out, read_manifest
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import CAPTIONS, IMAGE, MANIFEST, Bucket, Manifest, open_local, read_row
from prx_composer.data.mixture import Shares, shares_in_words
from prx_composer.data.sampler import epoch_steps, fewer_than_a_batch
from prx_composer.data.storage import INDEX, shards_in, sizes_in
from prx_composer.data.stored import StoredColumn, encoded_folder, fetch_captions, latent_names, latent_size_problem, read_column
from prx_composer.models.prompts import not_to_be_stored
from prx_composer.recipe.arguments import data_sets, text_encoders
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import PlannedStage, stages_of
from prx_composer.recipe.times import Phase, phases_of, schedule_problems
from prx_composer.runs.folder import TOKENIZER
from prx_composer.schedule.moments import ScheduleWindow
from prx_composer.training.components import Components, Making, unmade_sources
from prx_composer.training.preflight import Result, collected, failed, passed, skipped, warned

REMOTE_TIMEOUT = 20.0  # seconds for a manifest of a few kilobytes
LOOKED_AT = 10  # samples of a bucket, if the first cannot be decoded
NAMED = 4  # broken files or small buckets that are named; the others are counted
_MANY = 0.25  # of the samples


@collected
def check_data(parts: Components) -> Iterator[Result]:
    """Check the splits of both loaders. `parts.stages` and `parts.multiple` may be unknown; what needs them is left out."""
    to_be_made: set[str] = set()
    for key in ("train_loader", "eval_loader"):
        spec = getattr(parts.recipe, key)
        if spec is not None and parts.is_wrong(key):
            yield skipped(key, "its arguments must be right first")
        elif spec is not None:
            yield from _check_loader(key, parts, to_be_made)


@collected
def _check_loader(key: str, parts: Components, to_be_made: set[str]) -> Iterator[Result]:
    recipe = parts.recipe
    spec = getattr(recipe, key)
    if spec.get("name") != "image_caption":
        yield skipped(key, f"the loader {spec.get('name')!r} is not of this package")
        return
    if key == "train_loader":
        stages = parts.stages
    else:  # it stays at one size
        size = recipe.eval_batch_size
        stages = [PlannedStage("", recipe.image_size, size, size, 1, ScheduleWindow())]
    unmade = {making.key: making for making in unmade_sources(spec, key)}
    to_be_made.update(str(making.path) for making in unmade.values())
    found = data_sets(spec)
    tables: list[dict[Bucket, int]] = []
    left_out: list[LeftOut] = []
    trained = {f"{stage.path}image_size": stage.image_size for stage in parts.stages}  # evaluation follows the stages
    for where, arguments in found.items():
        name = f"{key}.{where}" if where else key
        if name in unmade:
            yield from _check_unmade(unmade[name], arguments, stages, parts.multiple)
            if name == "train_loader" and (known := getattr(unmade[name].source, "train_samples", None)) is not None:
                yield from _check_enough(recipe, known, stages)
            continue
        if arguments["path"] in to_be_made:
            yield skipped(name, f"train_loader.source makes {arguments['path']} on first use")
            continue
        manifest = _read_manifest(name, arguments)
        if skipped_here := _left_out(name, arguments):
            left_out.append(skipped_here)
        elif arguments.get("skip"):
            yield skipped(f"{name}.skip", f"the keys lie on {arguments['remote']}, and are counted at the start of training")
        tables.append(_without(manifest.buckets, skipped_here))
        if key == "train_loader" and _makes_vocabulary(recipe):  # of all captions
            arguments = arguments | {"max_undecodable": 0}
        yield from _check_data_set(name, arguments, manifest, stages, parts.multiple, {"image_size": recipe.image_size} | trained)
    for said, lacking in said_of_skipped(left_out):
        yield warned(f"{key}.skip", said) if lacking else passed(f"{key}.skip", said)
    if key == "train_loader" and tables and len(tables) == len(found):
        phases = phases_of(spec["mix"]) if spec.get("mix") else []
        sizes = {where.removeprefix("mix."): sum(table.values()) for where, table in zip(found, tables, strict=True)}
        if phases:
            yield passed(f"{key}.mix", f"shares {shares_in_words(phases, sizes)}")
        yield from check_buckets(key, tables, phases, stages)
        total = sum(sizes.values())
        yield from _check_enough(recipe, min((phase.drawn_from(sizes) for phase in phases), default=total), stages)
        yield from _check_epochs(recipe, total)


def _makes_vocabulary(recipe: Recipe) -> bool:
    named = [encoder.get("tokenizer") or encoder.get("pretrained") for encoder in text_encoders(recipe.model).values()]
    trains = any(isinstance(spec, dict) and spec.get("train") for spec in named)
    return trains and not Path(recipe.run_folder, TOKENIZER).exists()


def _left_out(key: str, spec: dict[str, Any]) -> LeftOut | None:
    """Return what a data set's skip list leaves out; None without one, or if the keys are elsewhere."""
    if not spec.get("skip"):
        return None
    with at_path(key, TypeError, AttributeError):
        skip = SkipList.read(spec["skip"])
        return None if spec.get("remote") else leave_out(skip, Path(spec["path"]) / spec.get("split", "train"))


def _without(buckets: dict[Bucket, int], left_out: LeftOut | None) -> dict[Bucket, int]:
    """Return the samples by bucket, without those that are left out, and without buckets that then have none."""
    if left_out is None:
        return buckets
    counts = {bucket: buckets[bucket] - len(places) for bucket, places in zip(sorted(buckets), left_out.places, strict=True)}
    return {bucket: count for bucket, count in counts.items() if count}


def _check_enough(recipe: Recipe, samples: int, stages: list[PlannedStage]) -> Iterator[Result]:
    """Check that the batch that the loader begins with, and that of every stage, are at most what there is to train on."""
    sizes = {"": recipe.global_train_batch_size} | {stage.path: stage.global_batch_size for stage in stages}
    for path, size in sizes.items():
        if problem := fewer_than_a_batch(samples, size, path):
            yield failed(problem)


def _check_epochs(recipe: Recipe, samples: int) -> Iterator[Result]:
    """Check what the recipe says in epochs, now that their length is known; all but what could be said without."""
    if stages_of(vars(recipe))[1:]:
        return
    known = schedule_problems(vars(recipe))
    found = schedule_problems(vars(recipe), samples / recipe.global_train_batch_size)
    yield from (failed(problem) for problem in found if problem not in known)


def _check_unmade(making: Making, spec: dict[str, Any], stages: list[PlannedStage], multiple: int | None) -> Iterator[Result]:
    for stored in ("text_embedding", "latent"):
        if spec.get(stored):
            yield failed(
                f"{making.key}.{stored}: nothing is stored beside data that {making.key}.source still has to make; leave it out."
            )
    yield skipped(making.key, f"the source {making.spec['name']!r} makes the data on first use, in {making.path}")
    for note in getattr(making.source, "notes", ()):
        yield warned(f"{making.key}.source", note)
    yield from _check_sizes(making.key, making.source.buckets, making.source.image_size, stages, multiple)


def _check_data_set(
    key: str,
    spec: dict[str, Any],
    manifest: Manifest,
    stages: list[PlannedStage],
    multiple: int | None,
    image_sizes: dict[str, int],
) -> Iterator[Result]:
    path, name = spec["path"], spec.get("split", "train")
    folder = Path(path) / name
    facts, broken = [f"{sum(manifest.buckets.values()):,} samples in {counted(len(manifest.buckets), 'bucket')}"], None
    if not spec.get("remote"):
        fact, broken = _check_shards(key, folder, manifest, spec)
        facts.append(fact)
    captions = spec.get("captions") or dict.fromkeys(manifest.captions[:1], 1)
    if not captions:
        raise UserError(f"{key}.captions: the data set has no caption column; `prx data caption` writes one.")
    facts.append(f"captions: {', '.join(captions)}")
    for written in () if spec.get("remote") else [caption for caption in captions if caption in manifest.beside]:
        column = read_column(encoded_folder(path, name, written, IMAGE), CAPTIONS, f"{key}.captions")
        facts.append(f"{written} was written by {column.encoder}")
    stored = spec.get("text_embedding")
    if stored and (problem := not_to_be_stored(captions)):
        yield failed(f"{key}.{problem}")
    elif stored and not spec.get("remote"):
        for caption in captions:
            column = read_column(encoded_folder(path, name, stored, caption), "text", f"{key}.text_embedding")
            facts.append(f"embeddings of {caption} by {column.encoder}, {column.storage}")
    latents = {}
    if not spec.get("remote"):
        for column_name in latent_names(spec.get("latent")):
            made = encoded_folder(path, name, column_name, IMAGE)
            latents[column_name] = column = read_column(made, "latents", f"{key}.latent")
            facts.append(f"latents of {column.image_size} px by {column.encoder}, {column.storage}")
    yield passed(key, f"{spec.get('remote') or path}/{name}: {'; '.join(facts)}")
    yield from _check_sizes(key, list(manifest.buckets), manifest.image_size, stages, multiple)
    if latents and multiple is not None:
        yield from _check_latents(key, latents, manifest, image_sizes, multiple)
    if spec.get("remote"):
        yield skipped(f"{key}: shards and images", f"they lie on {spec['remote']}")
    elif broken:
        yield warned(key, broken)
    else:
        yield from _check_images(key, folder, manifest)


# ------------------------------------------------------------------------------------------------------- manifests


def _read_manifest(key: str, spec: dict[str, Any]) -> Manifest:
    """Read the manifest of a data set, which is fetched if only the object store has it."""
    name = spec.get("split", "train")
    if not spec.get("remote"):
        with at_path(key, TypeError, AttributeError):
            return read_manifest(spec["path"], name, spec.get("captions"), spec.get("features"))
    from streaming.base.storage import CloudDownloader

    source = f"{spec['remote']}/{name}/{MANIFEST}"
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / name).mkdir()
        try:
            CloudDownloader.get(source).download(source, f"{temporary}/{name}/{MANIFEST}", timeout=REMOTE_TIMEOUT)
        except Exception as error:  # every cloud's SDK has its own, and one that is missing
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise UserError(
                f"{key}.remote: {source} cannot be fetched ({reason}); check the address and your credentials."
            ) from error
        with at_path(f"{key}.remote", TypeError, AttributeError):
            fetch_captions(Path(temporary) / name, f"{spec['remote']}/{name}", spec.get("captions") or {})
            return read_manifest(temporary, name, spec.get("captions"), spec.get("features"))


# ---------------------------------------------------------------------------------------------------------- shards


def _check_shards(key: str, folder: Path, manifest: Manifest, spec: dict[str, Any]) -> tuple[str, str | None]:
    """Compare what lies in the folder with the index of every bucket, by name and size.

    Return what was looked at, and what is to be said of files that are missing or cut short, if training survives that.

    Raises:
        UserError: more of the samples in such files than `max_undecodable`, an index with other samples or columns than the
            manifest's.
    """
    problems, broken, shards, lost, total = [], [], 0, 0, sum(manifest.buckets.values())
    captions = {*(spec.get("captions") or manifest.captions)} - {*manifest.beside}
    wanted = {"image", *captions, *manifest.features.keys() & {*(spec.get("features") or [])}}
    for bucket, count in manifest.buckets.items():
        index = folder / str(bucket) / INDEX
        try:
            listed = shards_in(index.parent)
            files = [(shard["raw_data"]["basename"], int(shard["raw_data"]["bytes"]), int(shard["samples"])) for shard in listed]
            sizes = sizes_in(index.parent, {str(Path(name).parent) for name, *_ in files})
            samples = sum(int(shard["samples"]) for shard in listed)
            columns = set(listed[0]["column_names"]) if listed else set()
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{key}: {index} cannot be read ({error}); copy or convert bucket {bucket} again.")
            continue
        shards += len(files)
        for name, size, held in files:
            if sizes.get(name) != size:
                lost += held
                state = f"{sizes[name]:,} of {size:,} bytes" if name in sizes else "missing"
                broken.append(f"{bucket}/{name} ({state})")
        if samples != count:
            problems.append(
                f"{key}: {index} lists {samples:,} samples, but {folder / MANIFEST} {count:,}; convert the data again."
            )
        if lacking := sorted(wanted - columns):
            problems.append(f"{key}: the shards of bucket {bucket} have no column {', '.join(lacking)}; convert the data again.")
    if broken:
        said = f"{len(broken)} of {counted(shards, 'shard file')} in {folder} missing or cut short: {first(broken, NAMED)}."
        if not problems and lost <= spec.get("max_undecodable", 0.01) * total:
            instead = f"Training takes others for their {lost:,} samples ({lost / total:.2%}, within max_undecodable)"
            return f"{counted(shards - len(broken), 'shard file')} there and whole by size", f"{said} {instead}"
        problems.append(f"{key}: {said} Copy or convert them again.")
    raise_all(problems)
    return f"{counted(shards, 'shard file')}, all there and whole by size", None


def _check_images(key: str, folder: Path, manifest: Manifest) -> Iterator[Result]:
    """Decode the first image of every bucket."""
    undecodable = []
    for bucket, count in manifest.buckets.items():
        samples = open_local(folder / str(bucket))
        for index in range(min(count, LOOKED_AT)):
            row = {}
            try:
                row = read_row(samples, index)
                decode_image(row["image"], *bucket)
                break
            except UNDECODABLE as error:
                undecodable.append(f"{bucket}: {row.get('key') or f'sample {index}'} ({error})")
        else:
            yield failed(
                f"{key}: none of the first {min(count, LOOKED_AT)} images of bucket {bucket} in {folder} can be decoded, such as "
                f"{undecodable[-1]}. Convert the data again."
            )
            return
    if undecodable:
        named = ", ".join(undecodable[:NAMED])
        yield warned(key, f"{counted(len(undecodable), 'image')} at the beginning of a bucket cannot be decoded: {named}")
    else:
        each = "the first image of every bucket decodes" if len(manifest.buckets) > 1 else "the first image decodes"
        yield passed(key, each)


# --------------------------------------------------------------------------------------------------------- buckets


def _check_sizes(
    key: str, buckets: list[Bucket], base_size: int, stages: list[PlannedStage], multiple: int | None
) -> Iterator[Result]:
    if multiple is None:
        return
    uneven = sorted(
        {
            bucket
            for bucket in buckets
            for stage in stages
            if any(side % multiple for side in bucket.at(stage.image_size, base_size, multiple))
        }
    )
    if uneven:
        yield failed(
            f"{key}: {counted(len(uneven), 'bucket')} cannot be cut into patches of {multiple}: {first(uneven, NAMED)}. Convert "
            "the data with that multiple, or change model.backbone.patch_size."
        )


def _check_latents(
    key: str, latents: dict[str, StoredColumn], manifest: Manifest, image_sizes: dict[str, int], multiple: int
) -> Iterator[Result]:
    """Check that there are latents of every image size, which are given by YAML path."""
    buckets = sorted(manifest.buckets)
    for image_size in sorted(set(image_sizes.values())):
        sizes = [bucket.at(image_size, manifest.image_size, multiple) for bucket in buckets]
        if problem := latent_size_problem(latents, buckets, manifest.image_size, image_size, sizes):
            path = next(path for path, size in image_sizes.items() if size == image_size)
            yield failed(f"{key}.latent: {path}: {problem}")


# -------------------------------------------------------------------------- whether buckets fill batches


def check_buckets(
    key: str, tables: Sequence[Mapping[Bucket, int]], phases: Sequence[Phase], stages: list[PlannedStage]
) -> Iterator[Result]:
    """Say what the batches of every stage, each of one bucket, do to samples of rare ones.

    Args:
        tables: samples by bucket, of every data set.
        phases: of a mixture; none of a single data set.
    """
    total = sum(sum(table.values()) for table in tables)
    for stage in stages:
        if total < stage.global_batch_size:  # a mistake, which is said elsewhere
            continue
        if not phases:
            yield from _of_one(key, tables[0], stage)
        for before, phase in zip([None, *phases], phases, strict=False):
            window = ScheduleWindow(before.until if before and before.until else "0ba", phase.until)
            if not window.is_disjoint_from(stage.window):
                yield from _of_mixture(f"{key}.mix, {phase}" if phases[1:] else key, tables, phase, stage)


def _of_one(key: str, buckets: Mapping[Bucket, int], stage: PlannedStage) -> Iterator[Result]:
    total, batch_size = sum(buckets.values()), stage.global_batch_size
    small = {bucket: count for bucket, count in buckets.items() if count < batch_size}
    if small:
        rarest = min(small, key=lambda bucket: small[bucket])
        yield warned(
            key,
            f"{len(small)} of {counted(len(buckets), 'bucket')}, with {sum(small.values()) / total:.1%} of the "
            f"samples, hold fewer than a batch of {batch_size} ({stage.image_size} px) and fill it by repetition: "
            f"{first(small, NAMED)}. A sample of {rarest} is seen up to {-(-batch_size // small[rarest])} times an epoch; "
            "convert the data into fewer buckets if that matters",
        )
    if waiting := sum(count % batch_size for count in buckets.values() if count >= batch_size):
        steps = epoch_steps(list(buckets.values()), batch_size, shuffle=True)
        said = (
            f"an epoch of {counted(steps, 'batch')} of {batch_size} ({stage.image_size} px) leaves out {waiting:,} of {total:,} "
            "samples, which fill no batch of their bucket; they are other ones in every epoch"
        )
        yield warned(key, said) if waiting > _MANY * total else passed(key, said)


def _of_mixture(key: str, tables: Sequence[Mapping[Bucket, int]], phase: Phase, stage: PlannedStage) -> Iterator[Result]:
    weights = list(phase.weights.values()) or [float(sum(table.values())) for table in tables]
    drawn = [(table, weight) for table, weight in zip(tables, weights, strict=True) if weight]
    total = sum((Counter(table) for table, _ in drawn), Counter())
    buckets, batch_size = sorted(total), stage.global_batch_size
    counts = [[table.get(bucket, 0) for bucket in buckets] for table, _ in drawn]
    shares = Shares(counts, [weight for _, weight in drawn], batch_size)
    rare = {bucket: due for bucket, due in zip(buckets, shares.due, strict=True) if due < 1}
    if rare:
        rarest = min(rare, key=lambda bucket: rare[bucket])
        yield warned(
            key,
            f"{len(rare)} of {counted(len(buckets), 'bucket')} are due less than a batch of {batch_size} in an epoch "
            f"({stage.image_size} px): {first(rare, NAMED)}. Each has its first batch at once, then as its share comes up: "
            f"{rarest} in one of {float(1 / rare[rarest]):,.1f} epochs, a sample up to {-(-batch_size // total[rarest])} times "
            "in it; convert the data into fewer buckets if that matters",
        )


def counted(number: int, noun: str) -> str:
    """Return a number and what it is of."""
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{plural}"
