"""`prx encode … --verify n`: some samples are encoded again and compared with what is stored of them, wherever it lies.

Another device, or another batch, gives other last bits. So a value counts as the same within what its storage rounds, and what
the encoder's own arithmetic may differ by:

|stored − made| ≤ ROUNDING · |made| + NOISE · rms(made)     rms over the token, the patch, or the whole latent
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typer import echo

from prx_composer.commands.data.split import Split, open_split
from prx_composer.commands.encode.encoding import CaptionEncoder, DataSet, Encoded, ImageEncoder
from prx_composer.common.errors import UserError, first
from prx_composer.data.format import ENCODED, IMAGE, MANIFEST, Bucket
from prx_composer.data.storage import RawShard, fetched, is_remote, join
from prx_composer.data.stored import StoredColumn, pack, read_column, unpack

ROUNDING = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-8, "int8": 2**-8}  # int8: and half of a token's scale
NOISE = {torch.float32: 2**-8, torch.float16: 2**-5, torch.bfloat16: 2**-3}  # by the encoder's dtype; TF32 among float32
_COMPARED = ("kind", "fingerprint", "width", "max_tokens", "image_size", "multiple", "downsampling", "scaling", "shift")
_SHOWN = 3


@dataclass(frozen=True)
class Comparison:
    """One sample: what is stored of it beside what was made of it now.

    Args:
        sample: what it is called in messages.
        error: |stored − made| / |made|, mean over tokens or patches; infinite if one of them is missing or of another shape.
        rounding: the same of a value that is rounded as it is stored.
        agrees: whether every value is within the tolerance. exact: whether they are the same bytes.
        pictures: squared errors of decoded latents against the image: of those stored, and of those made now.
    """

    sample: str
    error: float
    rounding: float
    agrees: bool
    exact: bool
    pictures: tuple[float, float] | None = None


def verify(
    data: DataSet,
    where: tuple[str, str, str],
    column: StoredColumn,
    work: CaptionEncoder | ImageEncoder,
    module: nn.Module,
    count: int,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> tuple[str, str]:
    """Encode some samples again, evenly spread over the split. Return what came of it, and what is wrong or "".

    Args:
        where: split, name of what is stored, and the column that it was made of.
        column: what is made now, without what came of it. work, module: what makes it, and its network.
        count: of samples; all of them, if there are fewer.
        decode: latents → uint8 images, to say what is lost in pictures.

    Raises:
        UserError: nothing is stored there, or what cannot be compared: of another kind, or made of data that have changed.
    """
    name, source = where[1:]
    images = open_split(data.address, where[0])
    folder = join(images.folder, ENCODED, name, source)
    stored = _read(folder, column.kind)
    buckets = {str(bucket): samples for bucket, samples in images.manifest.buckets.items()}
    if stored.buckets != buckets:
        raise UserError(f"--verify: {folder} was made of other data than lies beside it. Delete it and encode again.")
    if source not in (IMAGE, *images.manifest.captions):
        raise UserError(f"--verify: {images.folder} has no caption column {source!r}.")
    noise = NOISE.get(next((p.dtype for p in module.parameters()), torch.float32), NOISE[torch.float32])
    rows = _chosen(images, count)
    compared = [
        one
        for bucket, chosen in rows.items()
        for one in _compare(images, join(ENCODED, name, source), bucket, chosen, work, stored, noise, decode)
    ]
    return _told(folder, sum(buckets.values()), column, stored, compared, noise)


def tell(found: Sequence[tuple[str, str]]) -> None:
    """Say what came of every column. Raise UserError if something is wrong with one."""
    for said, _ in found:
        echo(said)
    if problems := [problem for _, problem in found if problem]:
        raise UserError("\n".join(problems))


def _read(folder: str, kind: str) -> StoredColumn:
    """Read the manifest of a stored column, also of a remote one."""
    if not is_remote(folder):
        return read_column(Path(folder), kind, "--verify")
    with tempfile.TemporaryDirectory(prefix="prx-verify.") as copy:
        target = Path(copy, *folder.rpartition("://")[2].split("/"))
        target.mkdir(parents=True)
        try:
            with fetched(join(folder, MANIFEST)) as file:
                (target / MANIFEST).write_bytes(file.read_bytes())
        except (UserError, ImportError):
            raise
        except Exception as error:  # every store's SDK has its own
            raise UserError(f"--verify: {join(folder, MANIFEST)} cannot be fetched ({error}).") from error
        return read_column(target, kind, "--verify", remote=True)


def _chosen(images: Split, count: int) -> dict[Bucket, list[int]]:
    """Return `count` rows, from the first to the last of the split, evenly spread over its buckets in order."""
    counts = {bucket: images.manifest.buckets[bucket] for bucket in sorted(images.manifest.buckets)}
    total = sum(counts.values())
    number = min(count, total)
    places = [place * (total - 1) // max(number - 1, 1) for place in range(number)]
    chosen, start = {}, 0
    for bucket, samples in counts.items():
        chosen[bucket] = [place - start for place in places if start <= place < start + samples]
        start += samples
    return {bucket: rows for bucket, rows in chosen.items() if rows}


def _rows(split: Split, below: str, chosen: list[int], columns: set[str]) -> Iterator[dict[str, bytes]]:
    """Yield rows of one bucket, or of what is stored of it, as bytes. Of a remote one a shard at a time is here."""
    folder, start = join(split.folder, below), 0
    for shard in split.listed(below):
        inside = [row - start for row in chosen if start <= row < start + int(shard["samples"])]
        start += int(shard["samples"])
        if not inside:
            continue
        with tempfile.TemporaryDirectory(prefix="prx-verify.") as cache:
            try:
                content = RawShard(folder, shard, Path(cache))
                yield from (content.read(row, columns) for row in inside)
            except (OSError, ValueError) as error:
                raise UserError(f"{folder}/{shard['raw_data']['basename']} cannot be read ({error}).") from error


def _compare(
    images: Split,
    below: str,
    bucket: Bucket,
    chosen: list[int],
    work: CaptionEncoder | ImageEncoder,
    stored: StoredColumn,
    noise: float,
    decode: Callable[[Tensor], Tensor] | None,
) -> Iterator[Comparison]:
    """Compare rows of one bucket."""
    source = below.rpartition("/")[2]
    raw = list(_rows(images, str(bucket), chosen, {source, "key"} - {*images.manifest.beside}))
    if source in images.manifest.beside:  # captions that lie beside the shards
        written = _rows(images, join(ENCODED, source, IMAGE, str(bucket)), chosen, {"values"})
        raw = [row | {source: text["values"]} for row, text in zip(raw, written, strict=True)]
    there = list(_rows(images, join(below, str(bucket)), chosen, {"shape", "values"}))
    rows: list[dict[str, Any]] = [{source: one[source] if source == IMAGE else one[source].decode()} for one in raw]
    made = replace(work, storage="float32")(bucket, rows)
    for number, row, one, exact in zip(chosen, there, raw, made, strict=True):
        sample = f"{number} of {bucket} ({one.get('key', b'').decode(errors='replace')})"
        found = _difference(sample, row, exact, stored.storage, stored.kind, noise)
        if decode is not None and isinstance(work, ImageEncoder) and math.isfinite(found.error):
            (_, picture), *_ = work.decoded(bucket, [{IMAGE: one[IMAGE]}])
            latents = [_values(row, stored.storage), _values(_row(exact), "float32")]
            drawn = [decode(latent.float()[None].to(work.device))[0].cpu() for latent in latents]
            lost = [float((image.float() - picture.float()).square().mean()) for image in drawn]
            found = replace(found, pictures=(lost[0], lost[1]))
        yield found


def _row(encoded: Encoded) -> dict[str, bytes]:
    return {"shape": "x".join(map(str, encoded.shape)).encode(), "values": encoded.values}


def _values(row: dict[str, bytes], storage: str) -> Tensor:
    return unpack({"shape": row["shape"].decode(), "values": row["values"]}, storage)


def _difference(sample: str, row: dict[str, bytes], made: Encoded, storage: str, kind: str, noise: float) -> Comparison:
    """Compare what is stored of a sample with what was made of it now, in float32."""
    if row["shape"] != _row(made)["shape"]:
        return Comparison(sample, math.inf, 0.0, agrees=False, exact=False)
    if not made.shape:  # of an image that cannot be decoded, then or now
        return Comparison(sample, 0.0, 0.0, agrees=True, exact=True)
    exact = _values(_row(made), "float32")
    packed = pack(exact, storage)
    try:
        stored = _values(row, storage).float()
    except (RuntimeError, ValueError):  # fewer bytes than its shape says
        return Comparison(sample, math.inf, 0.0, agrees=False, exact=False)
    rounded = _values({"shape": row["shape"], "values": packed}, storage).float()
    if kind == "latents":  # one vector; others have one for each token or patch
        exact, stored, rounded = (values.reshape(1, -1) for values in (exact, stored, rounded))
    limit = ROUNDING[storage] * exact.abs() + noise * exact.square().mean(-1, keepdim=True).sqrt() + 1e-12
    if storage == "int8":
        limit = limit + 0.51 * exact.abs().amax(-1, keepdim=True) / 127
    norm = exact.norm(dim=-1).clamp(min=1e-12)
    error, rounding = (float(((values - exact).norm(dim=-1) / norm).mean()) for values in (stored, rounded))
    agrees = bool(((stored - exact).abs() <= limit).all())  # not so for NaN
    return Comparison(sample, error if math.isfinite(error) else math.inf, rounding, agrees, packed == row["values"])


def _told(
    folder: str, total: int, column: StoredColumn, stored: StoredColumn, compared: list[Comparison], noise: float
) -> tuple[str, str]:
    """Return what came of a column in words, and what is wrong with it."""
    comparable = [one for one in compared if math.isfinite(one.error)]
    said = f"{folder}: {len(compared):,} of {total:,} samples were encoded again by {column.encoder}"
    if comparable:
        error, rounding = (
            sum(values) / len(comparable) for values in zip(*((c.error, c.rounding) for c in comparable), strict=True)
        )
        said += f". Relative error {error:.2%}; rounding to {stored.storage} alone makes {rounding:.2%}"
    said += f". {sum(one.exact for one in compared):,} are the same to the bit"
    if pictures := [one.pictures for one in compared if one.pictures is not None]:
        then, now = (_decibels(sum(values) / len(pictures)) for values in zip(*pictures, strict=True))
        said += f". Decoded: PSNR {then} against the images; the autoencoder's own is {now}"
    told = [
        f"{key} is {getattr(stored, key)} there and {getattr(column, key)} here"
        for key in _COMPARED
        if key != "fingerprint" and getattr(stored, key) != getattr(column, key)
    ]
    if stored.fingerprint != column.fingerprint:
        told.insert(0, f"it was made by {stored.encoder} (revision {stored.revision or 'not said'}), whose weights are others")
    if wrong := [one.sample for one in compared if not one.agrees]:
        tolerance = f"{ROUNDING[stored.storage]:.2g} of the value and {noise:.2g} of the root mean square around it"
        told.append(f"{len(wrong):,} of {len(compared):,} samples differ by more than {tolerance}: {first(wrong, _SHOWN)}")
    problem = (
        f"--verify: {folder} is not what {column.encoder} gives: {'; '.join(told)}. Name the encoder, size and data that it "
    )
    return f"{said}.", f"{problem}was made with, or delete the folder and encode again." if told else ""


def _decibels(squared: float) -> str:
    return f"{10 * math.log10(255**2 / squared):.2f} dB" if squared else "without end"
