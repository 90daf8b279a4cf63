"""Whether buckets fill batches: what is shown more often than its share, and what an epoch leaves to the next one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prx_composer.data.buckets import Bucket
from prx_composer.data.mixture import Shares
from prx_composer.data.sampler import epoch_steps
from prx_composer.training.preflight.examine import PlannedStage
from prx_composer.training.preflight.result import Result, passed, warned

_NAMED = 4  # buckets that are named; the others are counted
_MANY = 0.25  # of the samples


def check_buckets(
    key: str, tables: Sequence[Mapping[Bucket, int]], weights: Mapping[str, float] | None, stages: list[PlannedStage], mixed: bool
) -> Iterator[Result]:
    """Says what the batches of every stage, each of one bucket, do to samples of rare ones.

    Args:
        tables: samples by bucket, of every data set.
        weights: of a mixture, if it has some.
    """
    total = sum(sum(table.values()) for table in tables)
    for stage in stages:
        if total < stage.global_batch_size:  # a mistake, which is said elsewhere
            continue
        if mixed:
            yield from _of_mixture(key, tables, weights, stage)
        else:
            yield from _of_one(key, tables[0], stage)


def _of_one(key: str, buckets: Mapping[Bucket, int], stage: PlannedStage) -> Iterator[Result]:
    total, batch_size = sum(buckets.values()), stage.global_batch_size
    small = {bucket: count for bucket, count in buckets.items() if count < batch_size}
    if small:
        rarest = min(small, key=lambda bucket: small[bucket])
        yield warned(
            key,
            f"{len(small)} of {counted(len(buckets), 'bucket')}, with {sum(small.values()) / total:.1%} of the "
            f"samples, hold fewer than a batch of {batch_size} ({stage.image_size} px) and fill it by repetition: "
            f"{some(list(small))}. A sample of {rarest} is seen up to {-(-batch_size // small[rarest])} times an epoch; "
            "convert the data into fewer buckets if that matters",
        )
    if waiting := sum(count % batch_size for count in buckets.values() if count >= batch_size):
        steps = epoch_steps(list(buckets.values()), batch_size, shuffle=True)
        said = (
            f"an epoch of {counted(steps, 'batch')} of {batch_size} ({stage.image_size} px) leaves out {waiting:,} of {total:,} "
            "samples, which fill no batch of their bucket; they are other ones in every epoch"
        )
        yield warned(key, said) if waiting > _MANY * total else passed(key, said)


def _of_mixture(
    key: str, tables: Sequence[Mapping[Bucket, int]], weights: Mapping[str, float] | None, stage: PlannedStage
) -> Iterator[Result]:
    total = sum((Counter(table) for table in tables), Counter())
    buckets, batch_size = sorted(total), stage.global_batch_size
    counts = [[table.get(bucket, 0) for bucket in buckets] for table in tables]
    shares = Shares(counts, list((weights or {}).values()) or [float(sum(row)) for row in counts], batch_size)
    rare = {bucket: due for bucket, due in zip(buckets, shares.due, strict=True) if due < 1}
    if rare:
        rarest = min(rare, key=lambda bucket: rare[bucket])
        yield warned(
            key,
            f"{len(rare)} of {counted(len(buckets), 'bucket')} are due less than a batch of {batch_size} in an epoch "
            f"({stage.image_size} px): {some(list(rare))}. Each has its first batch at once, then as its share comes up: "
            f"{rarest} in one of {float(1 / rare[rarest]):,.1f} epochs, a sample up to {-(-batch_size // total[rarest])} times "
            "in it; convert the data into fewer buckets if that matters",
        )


def some(buckets: list[Bucket]) -> str:
    """Some of them by name, and how many more there are."""
    return ", ".join(map(str, buckets[:_NAMED])) + (f" and {len(buckets) - _NAMED} more" if len(buckets) > _NAMED else "")


def counted(number: int, noun: str) -> str:
    """A number and what it is of."""
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{plural}"
