"""Statistics of a data set as a page of text."""

from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """Return what `statistics` returned, for a terminal."""
    lines = [
        f"{found['path']}, split {found['split']}: {found['samples']:,} samples in {_count(len(found['buckets']), 'bucket')} "
        f"around {found['image_size']}² pixels, {_size(found['bytes'])}",
        _looked_at(found),
        "",
        *_buckets(found),
        "",
        *_images(found["images"]),
        *_captions(found["captions"]),
        *_metadata(found["metadata"]),
        *_features(found["features"]),
        *_stored(found["stored"]),
        *_conversion(found["conversion"]),
    ]
    return "\n".join(lines).rstrip()


def _looked_at(found: dict[str, Any]) -> str:
    seen, shards = found["looked_at"], found["looked_at"]["of_shards"]
    if seen["samples"] == found["samples"]:
        return "Every sample was read."
    if seen["shards"] < shards:
        return f"Columns: from {seen['samples']:,} samples, those of {seen['shards']:,} of {shards:,} shards, evenly spaced."
    return f"Columns: from {seen['samples']:,} samples, evenly spaced."


def _buckets(found: dict[str, Any]) -> list[str]:
    rows = [("height x width", "width/height", "samples", "share", "shards", "bytes", "")]
    for bucket in found["buckets"]:
        small = ", ".join(f"{size:,}" for size in bucket["smaller_than"])
        rows.append(
            (
                bucket["name"], f"{bucket['aspect']:.2f}", f"{bucket['samples']:,}", f"{bucket['share']:.1%}",
                f"{bucket['shards']:,}", _size(bucket["bytes"]), f"! fewer than a batch of {small}" if small else "",
            )
        )  # fmt: skip
    lines = _table(rows)
    for size in found["batch_sizes"]:
        small = [bucket for bucket in found["buckets"] if size in bucket["smaller_than"]]
        share = sum(bucket["share"] for bucket in small)
        if small:
            of = f"{len(small)} of {_count(len(found['buckets']), 'bucket')}, with {share:.1%} of the samples"
            lines.append(f"! A batch of {size:,} is filled by repetition in {of}.")
        else:
            lines.append(f"Every bucket fills a batch of {size:,}.")
    return lines


def _images(images: dict[str, Any]) -> list[str]:
    lines = ["Images", f"  bytes   {_spread(images['bytes'])}"]
    if images["smaller_than_bucket"]:
        lines.append(f"  {images['smaller_than_bucket']:,} are smaller than their bucket: training enlarges them")
    return [*lines, ""]


def _captions(captions: dict[str, Any]) -> list[str]:
    lines = ["Captions"]
    for name, caption in captions.items():
        lines += [f"  {name}", f"    characters   {_spread(caption['characters'])}"]
        if "tokens" in caption:
            cut, count = caption["cut"], caption["tokens"]["count"]
            lines.append(f"    tokens       {_spread(caption['tokens'])}")
            lines.append(f"    longer than {caption['max_tokens']} tokens, and cut: {cut:,} ({_share(cut, count)})")
            if caption["unknown"]:
                share = _share(caption["unknown"], caption["tokens_together"])
                lines.append(f"    words that the tokenizer does not know: {caption['unknown']:,} ({share} of the tokens)")
        if caption["empty"]:
            lines.append(f"    empty: {caption['empty']:,} ({_share(caption['empty'], caption['characters']['count'])})")
    return [*lines, ""]


def _metadata(metadata: dict[str, Any]) -> list[str]:
    lines = ["Metadata"] if metadata else []
    for name, column in metadata.items():
        missing = f"; missing: {column['missing']:,}" if column["missing"] else ""
        if "distinct" in column:
            most = ", ".join(f"{text!r} {count:,}" for text, count in column["most"].items())
            more = "more than " if column["or_more"] else ""
            lines.append(f"  {name}   {more}{column['distinct']:,} distinct: {most}{missing}")
        else:
            lines.append(f"  {name}   {_spread(column)}{missing}")
    return [*lines, ""] if lines else []


def _features(features: list[dict[str, Any]]) -> list[str]:
    lines = ["Features in the shards"] if features else []
    for column in features:
        arrays = sorted({array.removeprefix("ndarray:") for array in column["arrays"].values()})
        lines.append(
            f"  {column['name']}   {column['channels']} channels; {'; '.join(arrays[:3])}{' …' if len(arrays) > 3 else ''}"
        )
    return [*lines, ""] if lines else []


def _stored(stored: list[dict[str, Any]]) -> list[str]:
    lines = ["Stored beside the shards, by `prx encode`"] if stored else []
    for column in stored:
        name = f"  {column['name']} of {column['source']}   "
        if not column["whole"]:
            lines.append(f"{name}only begun, {_count(column['parts'], 'part')} done; the same `prx encode` goes on")
            continue
        cut = f", up to {column['max_tokens']} tokens" if column["max_tokens"] else ""
        cut += f" ({column['cut']:,} captions are cut)" if column["cut"] else ""
        cut += f", at {column['image_size']} px" if column["image_size"] else ""
        other = "" if column["of_this_data"] else "; ! made of other data than lies here: training refuses it"
        lines.append(
            f"{name}{column['kind']} by {column['encoder']}, {column['width']} wide, {column['storage']}{cut}: "
            f"{column['samples']:,} samples, {_size(column['bytes'])}{other}"
        )
    return [*lines, ""] if lines else []


def _conversion(conversion: dict[str, Any] | None) -> list[str]:
    if not conversion:
        return []
    counts, dropped = conversion["counts"], conversion["dropped"] or {}
    lines = [
        f"Converted from {(conversion['settings'] or {}).get('input')}",
        f"  read {counts['read']:,}, kept {counts['kept']:,}",
    ]
    return [*lines, *(f"  left out: {reason} {n:,}" for reason, n in sorted(dropped.items(), key=lambda item: -item[1]))]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}".rstrip()
        for row in rows
    ]


def _spread(column: dict[str, Any]) -> str:
    if not column["count"]:
        return "no values"
    names = ("min", "5%", "median", "95%", "max", "mean")
    return "  ".join(f"{name} {_number(column[name])}" for name in names)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
