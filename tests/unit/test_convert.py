"""`prx data convert`: what comes out of each kind of input, going on after an interruption, duplicates and filters."""

import io
import json
import math
from pathlib import Path
from typing import Any

import datasets
import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import contents, convert, encoded, jpeg, picture, rows, sample, settings, write_tar
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.data.buckets import Bucket, assign_bucket, make_buckets
from prx_composer.data.convert import job, units
from prx_composer.data.convert.duplicates import near_duplicates
from prx_composer.data.convert.engine import run
from prx_composer.data.convert.expressions import check_where, is_wanted
from prx_composer.data.convert.output import open_output
from prx_composer.data.convert.pixels import resize
from prx_composer.data.convert.records import Job
from prx_composer.data.convert.settings import parse_captions, parse_metadata, parse_range
from prx_composer.data.convert.sources import open_source
from prx_composer.data.dataset import ImageCaptionDataset, SampleRequest
from prx_composer.errors import UserError

SIZES = [(100, 100), (90, 160), (160, 90), (64, 64), (300, 200)]


def write_tars(folder: Path, tars: int = 3, each: int = 8) -> Path:
    for number in range(tars):
        members = []
        for i in range(each):
            seed = each * number + i
            members += sample(f"{number}/{i:03d}", jpeg(*SIZES[i % len(SIZES)], seed), f"caption {seed}", score=seed / 10)
        write_tar(folder / f"{number:03d}.tar", members)
    return folder


# ------------------------------------------------------------------------------------------- what is written


def test_every_image_has_exactly_the_size_of_the_bucket_with_the_nearest_aspect(tmp_path: Path) -> None:
    statistics = convert("webdataset", write_tars(tmp_path / "in"), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert len(found) == 24 == statistics["counts"]["kept"]
    buckets = make_buckets(64, 16)
    for row in found:
        seed = int(row["caption"].split()[1])
        assert row["bucket"] == assign_bucket(*SIZES[seed % 8 % len(SIZES)], buckets) == (row["height"], row["width"])
        assert Image.open(io.BytesIO(row["image"])).size == (row["width"], row["height"])


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    convert("webdataset", write_tars(tmp_path / "in"), tmp_path / "out")
    dataset = ImageCaptionDataset(str(tmp_path / "out"), captions={"caption": 1.0})
    assert len(dataset) == 24
    seen = {dataset[SampleRequest(i, 64, 64, 0)]["caption"] for i in range(24)}
    assert seen == {f"caption {i}" for i in range(24)} and dataset.undecodable == 0
    bucket = dataset.buckets[0]
    streamed = StreamingDataset(local=str(tmp_path / "out" / "train" / str(bucket)), batch_size=1)
    assert len(streamed) == dataset.counts[0] and streamed[0]["width"] == bucket.width


def test_an_image_that_fits_keeps_its_bytes_and_no_other_does(tmp_path: Path) -> None:
    fitting = [jpeg(64, 64, 1), encoded(picture(64, 64, 2), "PNG"), encoded(picture(64, 64, 3), "WEBP"), jpeg(80, 48, 4)]
    clear = picture(64, 64, 5)
    clear.putalpha(100)
    others = [jpeg(65, 64, 6), encoded(clear, "PNG"), encoded(picture(64, 64, 7), "BMP")]
    members = [part for i, image in enumerate(fitting + others) for part in sample(f"{i}", image, f"{i}")]
    statistics = convert("webdataset", write_tar(tmp_path / "in.tar", members), tmp_path / "out")
    stored = {row["caption"]: row["image"] for row in rows(tmp_path / "out")}
    assert [stored[str(i)] for i in range(4)] == fitting and statistics["counts"]["original_bytes"] == 4
    assert all(Image.open(io.BytesIO(stored[str(i)])).format == "JPEG" for i in range(4, 7))


@pytest.mark.parametrize(
    ("size", "bucket"), [((300, 200), Bucket(80, 48)), ((257, 511), Bucket(48, 96)), ((40, 40), Bucket(64, 64))]
)
def test_resizing_is_pillows_bicubic_of_the_centre(size: tuple[int, int], bucket: Bucket) -> None:
    image = picture(*size, 3)
    scale = max(bucket.height / size[0], bucket.width / size[1])
    height, width = bucket.height / scale, bucket.width / scale
    box = ((size[1] - width) / 2, (size[0] - height) / 2, (size[1] + width) / 2, (size[0] + height) / 2)
    expected = image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=box)
    difference = np.abs(resize(np.asarray(image), bucket).astype(int) - np.asarray(expected))
    assert difference.mean() < 1.5, "the crop is rounded to whole pixels"


def test_a_fine_pattern_becomes_grey_and_no_moire() -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    found = resize(np.repeat(board[..., None], 3, 2).astype(np.uint8), Bucket(64, 64))
    assert np.abs(found.astype(int) - 127).max() <= 2


def test_a_very_large_jpeg_looks_as_if_it_was_decoded_whole(tmp_path: Path) -> None:
    from prx_composer.data.convert import pixels

    content = jpeg(1600, 1600, 4)
    full = resize(pixels.decode(pixels.open_image(content, 1 << 27), None), Bucket(64, 64))
    reduced = pixels.decode(pixels.open_image(content, 1 << 27), Bucket(64, 64))
    assert 128 <= reduced.shape[0] < 1600
    assert np.abs(resize(reduced, Bucket(64, 64)).astype(int) - full).mean() < 2


# ---------------------------------------------------------------------------------------------------- sources


def as_tar(folder: Path, data: list[dict[str, Any]]) -> dict[str, Any]:
    members = []
    for i, row in enumerate(data):
        members += [
            (f"{i:03d}.jpg", row["image"]),
            (f"{i:03d}.json", json.dumps({"txt": row["txt"], "score": row["score"]}).encode()),
        ]
    write_tar(folder / "a.tar", members)
    return {"source": "webdataset"}


def as_parquet(folder: Path, data: list[dict[str, Any]]) -> dict[str, Any]:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(data), folder / "a.parquet", row_group_size=3)
    return {"source": "parquet"}


def as_datasets(folder: Path, data: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    features = datasets.Features({"image": datasets.Image(), "txt": datasets.Value("string"), "score": datasets.Value("float64")})
    rows = [row | {"image": {"bytes": row["image"], "path": None}} for row in data]
    made = datasets.Dataset.from_list(rows, features=features)
    if kind == "arrow":
        made.save_to_disk(str(folder))
    else:
        folder.mkdir()
        made.to_parquet(str(folder / "train-00000-of-00001.parquet"), batch_size=4)
    return {"source": "parquet"}


def as_lines(folder: Path, data: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, row in enumerate(data):
        (folder / "images" / f"{i}.jpg").write_bytes(row["image"])
        lines.append(json.dumps({"file": f"images/{i}.jpg", "txt": row["txt"], "score": row["score"]}))
    (folder / "all.jsonl").write_text("\n".join(lines))  # no newline at the end
    return {"source": "jsonl"}


def as_mds(folder: Path, data: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    columns = {"image": "bytes", "txt": "str", "score": "float64"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=6000, **options) as writer:
        for row in data:
            writer.write(row)
    return {"source": "mds"}


MAKERS = {
    "tar": as_tar,
    "parquet": as_parquet,
    "datasets on disk": lambda folder, data: as_datasets(folder, data, "arrow"),
    "datasets from the hub": lambda folder, data: as_datasets(folder, data, "parquet"),
    "lines": as_lines,
    "mds": as_mds,
    "mds, compressed": lambda folder, data: as_mds(folder, data, compression="zstd:3"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_samples_come_out_of_every_kind_of_input_however_it_is_cut(tmp_path: Path, kind: str) -> None:
    data = [{"image": jpeg(100, 100, i), "txt": f"Ünï {i}", "score": i / 4} for i in range(20)]
    source = MAKERS[kind](tmp_path / "in", data)["source"]
    expected = [row["image"] for row in rows_of_plain(tmp_path, data)]
    for unit_bytes in (1 << 28, 5000):
        output = tmp_path / f"{unit_bytes}"
        chosen = {"metadata": {"score": ("score", "float")}, "unit_bytes": unit_bytes}
        convert(source, tmp_path / "in", output, **chosen)
        found = rows(output)
        assert [(row["caption"], row["score"]) for row in found] == [(row["txt"], row["score"]) for row in data]
        assert [row["image"] for row in found] == expected
        assert len({row["key"] for row in found}) == 20


def rows_of_plain(tmp_path: Path, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    as_tar(tmp_path / "plain", data)
    convert("webdataset", tmp_path / "plain", tmp_path / "plain-out")
    return rows(tmp_path / "plain-out")


def test_cutting_lines_loses_and_repeats_none(tmp_path: Path) -> None:
    names = ["a" * (i * 37 % 90) for i in range(200)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"file": "no.jpg", "txt": name}) + "\n" for name in names))
    for part in (1, 7, 50, 1000, 10**6):
        source = open_source(settings("jsonl", tmp_path / "x.jsonl", unit_bytes=part * 1000))
        planned = source.plan()
        assert [record.columns["txt"] for unit in planned for record in source.read(unit)] == names
    assert len(planned) == 1


def test_nested_columns_and_renamed_captions(tmp_path: Path) -> None:
    members = sample("0", jpeg(64, 64), "plain", meta={"texts": ["first", "second"], "n": 7})
    captions = parse_captions(["txt", "long=meta.texts.1"])
    convert(
        "webdataset",
        write_tar(tmp_path / "a.tar", members),
        tmp_path / "out",
        captions=captions,
        metadata=parse_metadata(["n=meta.n:int", "who=meta.who:str"]),
    )
    row = rows(tmp_path / "out")[0]
    assert (row["txt"], row["long"], row["n"], row["who"]) == ("plain", "second", 7, "")
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["captions"] == ["txt", "long"] and manifest["metadata"] == {"n": "int", "who": "str"}


def test_a_limit_takes_the_first_samples(tmp_path: Path) -> None:
    write_tars(tmp_path / "in")
    statistics = convert("webdataset", tmp_path / "in", tmp_path / "out", limit=11)
    assert {row["caption"] for row in rows(tmp_path / "out")} == {f"caption {i}" for i in range(11)}
    assert statistics["counts"]["read"] == 11


# ------------------------------------------------------------------------------------------------- going on


def test_processes_and_an_interruption_change_no_byte(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "in", tars=4)
    convert("webdataset", source, tmp_path / "whole", duplicates="perceptual")
    chosen = settings("webdataset", source, duplicates="perceptual")
    other = tmp_path / "other"
    planned = open_source(chosen).plan()
    store = open_output(str(other), "train")
    job._planned(store, None, chosen, open_source(chosen), planned)
    units.hash_unit(Job(chosen, str(other)), planned[2])
    with store.scratch() as half:
        (half / "64x64").mkdir()
        (half / "64x64" / "shard.00000.mds").write_bytes(b"half")
        half.rename(half.with_name(".left-behind"))
    job.convert(chosen, str(other), workers=2)
    assert contents(tmp_path / "whole" / "train") == contents(other / "train")
    assert not (other / ".train.work").exists()


def test_an_interrupted_last_step_goes_on(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "in")
    convert("webdataset", source, tmp_path / "whole")
    chosen = settings("webdataset", source)
    store, planned = open_output(str(tmp_path / "b"), "train"), open_source(chosen).plan()
    job._planned(store, None, chosen, open_source(chosen), planned)
    for unit in planned:
        units.convert_unit(Job(chosen, str(tmp_path / "b")), unit, {})
    work = tmp_path / "b" / ".train.work"
    (work / "whole" / "64x64").mkdir(parents=True)
    (work / "units" / "000001" / "64x64").rename(work / "whole" / "64x64" / "000001")  # and then it was killed
    convert("webdataset", source, tmp_path / "b")
    assert contents(tmp_path / "b" / "train") == contents(tmp_path / "whole" / "train")


def test_a_finished_conversion_is_not_done_again(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "in")
    first = convert("webdataset", source, tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "train").rglob("*")}
    assert convert("webdataset", source, tmp_path / "out") == json.loads(json.dumps(first))
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "train").rglob("*")}


def test_a_worker_that_is_killed_again_and_again_ends_the_conversion_by_name() -> None:
    with pytest.raises(UserError, match="killed 3 times.*9"):
        list(run("local", 1, "signal:raise_signal", [(9,)]))


@pytest.mark.parametrize("duplicates", ["keep", "exact"])
def test_ray_writes_the_same_bytes(tmp_path: Path, duplicates: str) -> None:
    pytest.importorskip("ray")
    source = write_tars(tmp_path / "in")
    convert("webdataset", source, tmp_path / "local", duplicates=duplicates)
    convert("webdataset", source, tmp_path / "ray", 2, "ray", duplicates=duplicates)
    assert contents(tmp_path / "local" / "train") == contents(tmp_path / "ray" / "train")


# --------------------------------------------------------------------------------------------------- curation


def test_near_duplicates_are_those_of_a_plain_comparison_of_all_with_all() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 400).astype(np.uint64)
    for _ in range(400):  # relatives of others, at distances from 0 to 9 bits
        flipped = hashes[rng.integers(len(hashes))]
        for bit in rng.choice(64, rng.integers(0, 10), replace=False):
            flipped ^= np.uint64(1) << np.uint64(bit)
        hashes = np.append(hashes, flipped)
    for distance in (0, 1, 4, 7):
        kept: list[int] = []
        expected = []
        for value in hashes.tolist():
            near = any((value ^ other).bit_count() <= distance for other in kept)
            expected.append(near)
            if not near:
                kept.append(value)
        assert near_duplicates(hashes, distance).tolist() == expected


def curated(tmp_path: Path, members: list[tuple[str, bytes]], **changes: Any) -> tuple[list[str], dict[str, int]]:
    """Captions that are left and reasons that are not, with the input in one tar and in two."""
    outcomes = []
    starts = [index for index, (name, _) in enumerate(members) if name.endswith(".jpg")]
    middle = starts[len(starts) // 2]
    for name, parts in (("one", [members]), ("two", [members[:middle], members[middle:]])):
        for number, part in enumerate(parts):
            write_tar(tmp_path / name / f"{number}.tar", part)
        statistics = convert("webdataset", tmp_path / name, tmp_path / f"{name}-out", **changes)
        outcomes.append((sorted(row["caption"] for row in rows(tmp_path / f"{name}-out")), statistics["dropped"]))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def test_the_first_of_exact_duplicates_stays_wherever_they_are(tmp_path: Path) -> None:
    images = [jpeg(100, 100, seed) for seed in (0, 1, 0, 2, 1, 0)]
    members = [part for i, image in enumerate(images) for part in sample(f"{i}", image, f"{i}")]
    assert curated(tmp_path, members, duplicates="exact") == (["0", "1", "3"], {"duplicate": 3})


def test_a_resized_and_recompressed_copy_is_a_near_duplicate(tmp_path: Path) -> None:
    first, other = picture(200, 300, 1), picture(200, 300, 2)
    copy = first.resize((120, 80))
    assert imagehash.phash(first) - imagehash.phash(copy) <= 4 < imagehash.phash(first) - imagehash.phash(other)
    images = [encoded(first, quality=95), encoded(other), encoded(copy, quality=60), encoded(first, "PNG")]
    members = [part for i, image in enumerate(images) for part in sample(f"{i}", image, f"{i}")]
    assert curated(tmp_path, members, duplicates="perceptual") == (["0", "1"], {"near_duplicate": 2})


def test_a_duplicate_is_never_left_out_for_one_that_is_left_out_itself(tmp_path: Path) -> None:
    image = jpeg(100, 100)
    members = [*sample("0", image, " "), *sample("1", image, "short"), *sample("2", image, "long enough")]
    found = curated(tmp_path, members, duplicates="exact", caption_chars=(8, None))
    assert found == (["long enough"], {"no_caption": 1, "caption_length": 1})


def test_filters_leave_out_what_they_say_and_count_it(tmp_path: Path) -> None:
    members = [
        *sample("0", jpeg(100, 100, 0), "good", score=5),
        *sample("1", jpeg(40, 100, 1), "thin", score=5),
        *sample("2", jpeg(60, 300, 2), "wide", score=5),
        *sample("3", jpeg(100, 100, 3), "a caption of many words", score=5),
        *sample("4", jpeg(100, 100, 4), "ugly", score=1),
        *sample("5", jpeg(100, 100, 5), "odd", score="five"),
    ]
    found = curated(tmp_path, members, min_side=50, max_aspect=3.0, caption_chars=(1, 10), where="score > 2")
    reasons = ["min_side", "max_aspect", "caption_length", "where", "where_failed"]
    assert found == (["good"], dict.fromkeys(reasons, 1))


@pytest.mark.parametrize(
    "where",
    [
        "__import__('os').system('true')",
        "score.__class__",
        "(lambda: 1)()",
        "[x for x in score]",
        "open('/etc/passwd')",
        "score >",
        "9**9**9 +",
    ],
)
def test_an_expression_that_is_more_than_one_is_refused(where: str) -> None:
    with pytest.raises(UserError, match="--where"):
        check_where(where, ["score"])


def test_an_expression_cannot_take_forever_or_all_memory() -> None:
    for where in ("9 ** 9 ** 9 > 0", "'a' * 10 ** 12 == ''", "len(txt * 10 ** 9) > 1"):
        assert is_wanted(where, {"txt": "text"}) is None


def test_expressions_over_metadata_and_sizes() -> None:
    columns = {"score": 5.5, "txt": b"A Cat", "width": 100, "nan": math.nan}
    assert is_wanted("score > 5 and width >= 100 and 'cat' in lower(txt)", columns) is True
    assert is_wanted("missing > 5", columns) is None and is_wanted("nan > 5", columns) is False


# ------------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "/nowhere/at/all"}, "--input: there is no /nowhere/at/all"),
        (
            {"captions": {"caption": "text"}},
            "--caption: there is no column 'text'.*Did you mean 'txt'.*Allowed: json|--caption.*Did you mean 'txt'",
        ),
        ({"metadata": {"a": ("scor", "float")}}, "--metadata: there is no column 'scor'.*Did you mean 'score'"),
        ({"where": "scor > 1"}, "--where: there is no column 'scor'.*Did you mean 'score'"),
        ({"include": "*.zip"}, "--input: no .tar"),
        ({"image_size": 100}, "--base-size 100 is not a multiple of --patch 16"),
        ({"source": "webdatset"}, "--source.*Did you mean 'webdataset'"),
        ({"captions": {"key": "txt"}}, "'key' is the name of a column that every data set has"),
        ({"split": "../up"}, "--split must be a plain name"),
        ({"quality": 0}, "--quality"),
        ({"duplicates": "fuzzy"}, "--duplicates"),
        ({"caption_chars": (500, None)}, "none of the 8 samples of .* is left: caption_length 8"),
    ],
)
def test_a_mistake_is_said_before_work_begins(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_tars(tmp_path / "in", tars=1)
    with pytest.raises(UserError, match=message):
        job.convert(
            settings(**{"source": "webdataset", "path": changes.pop("input", tmp_path / "in")} | changes), str(tmp_path / "o")
        )
    assert not (tmp_path / "o" / "train").exists()


def test_another_conversion_is_not_mixed_in(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "in")
    convert("webdataset", source, tmp_path / "done")
    with pytest.raises(UserError, match="other settings \\(quality was 92, now 80\\)"):
        convert("webdataset", source, tmp_path / "done", quality=80)
    chosen = settings("webdataset", source)
    store = open_output(str(tmp_path / "half"), "train")
    job._planned(store, None, chosen, open_source(chosen), open_source(chosen).plan())
    with pytest.raises(UserError, match="other settings"):
        convert("webdataset", source, tmp_path / "half", min_side=7)
    write_tar(source / "zzz.tar", sample("new", jpeg(64, 64)))
    with pytest.raises(UserError, match="other files than when this conversion began"):
        convert("webdataset", source, tmp_path / "half")
    with store.lock(), pytest.raises(UserError, match="another conversion is writing"):
        convert("webdataset", source, tmp_path / "half")
    (tmp_path / "mine" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="was not written by `prx data convert`"):
        convert("webdataset", source, tmp_path / "mine")


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (lambda text: parse_captions([text]), "name="),
        (lambda text: parse_captions([text, text]), "twice"),
        (lambda text: parse_metadata([text]), "score"),
        (lambda text: parse_metadata([text]), "score:double"),
        (lambda text: parse_range("--caption-chars", text), "5"),
        (lambda text: parse_range("--caption-chars", text), "9:5"),
        (lambda text: parse_range("--caption-chars", text), "a:b"),
    ],
)
def test_a_malformed_option_is_said(parse: Any, text: str) -> None:
    with pytest.raises(UserError, match="expected"):
        parse(text)


def test_the_command_reports_every_reason_and_its_page_shows_them(tmp_path: Path) -> None:
    members = (
        sample("good", jpeg(100, 100, 1), "<b>bold</b> & co") + sample("twin", jpeg(100, 100, 1), "again") + sample("empty", b"")
    )
    write_tar(tmp_path / "in" / "a.tar", members)
    options = ["--source", "webdataset", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--caption", "txt"]
    options += [
        "--base-size",
        "64",
        "--patch",
        "16",
        "--workers",
        "0",
        "--duplicates",
        "exact",
        "--report",
        str(tmp_path / "r.html"),
    ]
    result = CliRunner().invoke(app, ["data", "convert", *options])
    assert result.exit_code == 0, result.output
    assert "1 of 3 samples" in result.output and "1 left out: empty_file" in result.output and "a.tar/empty" in result.output
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; co" in page and "<b>bold" not in page
    assert page.count("data:image/jpeg") == 2, "one kept, one duplicate"
    assert all(reason in page for reason in ("empty_file", "duplicate", "64x64")) and page.count("data:image/png") == 3
    assert "http" not in page, "the page needs nothing from elsewhere"
