"""`prx data convert`: what is written, going on after an interruption, and what is said."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import SIZES, contents, convert, encoded, jpeg, picture, rows, sample, settings, write_tar, write_tars
from PIL import Image
from streaming import StreamingDataset
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.convert import make_plan, run_conversion, units
from prx_composer.commands.convert.backends import open_output, run
from prx_composer.commands.convert.records import open_source
from prx_composer.commands.convert.settings import parse_captions, parse_metadata, parse_range
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.decoding import decode, open_image, resize
from prx_composer.data.format import Bucket, assign_bucket, make_buckets
from prx_composer.data.sampler import SampleRequest

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
    content = jpeg(1600, 1600, 4)
    full = resize(decode(content, open_image(content)), Bucket(64, 64))
    reduced = decode(content, open_image(content), (128, 128))
    assert 128 <= reduced.shape[0] < 1600
    assert np.abs(resize(reduced, Bucket(64, 64)).astype(int) - full).mean() < 2


# ------------------------------------------------------------------------------------------------- going on


def test_processes_and_an_interruption_change_no_byte(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "in", tars=4)
    convert("webdataset", source, tmp_path / "whole", duplicates="perceptual", heldout=0.3)
    chosen = settings("webdataset", source, duplicates="perceptual", heldout=0.3)
    other = tmp_path / "other"
    planned = open_source(chosen).plan()
    store = open_output(str(other), "train")
    make_plan(store, None, chosen, open_source(chosen), planned)
    units.hash_unit(chosen, str(other), planned[2])
    with store.scratch() as half:
        (half / "64x64").mkdir()
        (half / "64x64" / "shard.00000.mds").write_bytes(b"half")
        half.rename(half.with_name(".left-behind"))
    run_conversion(chosen, str(other), workers=2)
    for split in ("train", "heldout"):
        assert contents(tmp_path / "whole" / split) == contents(other / split) != {}
    assert not (other / ".train.work").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_progress_moves_inside_of_a_unit(workers: int) -> None:
    seen: list[int] = []
    done = list(run("local", workers, "slow_unit:slow_unit", [(20,), (20,)], seen=seen.append))
    assert done == [20, 20] and seen == sorted(seen) and seen[-1] == 40
    assert len({count for count in seen if 0 < count < 20}) >= 2


@pytest.mark.parametrize("held_out_is_in_place", [False, True])
def test_an_interrupted_last_step_goes_on(tmp_path: Path, held_out_is_in_place: bool) -> None:
    source = write_tars(tmp_path / "in")
    convert("webdataset", source, tmp_path / "whole", heldout=0.3)
    chosen = settings("webdataset", source, heldout=0.3)
    store, planned = open_output(str(tmp_path / "b"), "train"), open_source(chosen).plan()
    make_plan(store, None, chosen, open_source(chosen), planned)
    for unit in planned:
        units.convert_unit(chosen, str(tmp_path / "b"), unit, {})
    work = tmp_path / "b" / ".train.work"
    (work / "whole" / "64x64").mkdir(parents=True)
    (work / "units" / "000001" / "64x64").rename(work / "whole" / "64x64" / "000001")
    (work / "whole" / ".manifest.json.123").write_text("{")  # and then it was killed
    if held_out_is_in_place:  # or then
        shutil.copytree(tmp_path / "whole" / "heldout", tmp_path / "b" / "heldout")
        for unit in (work / "units").iterdir():
            shutil.rmtree(unit / "heldout", ignore_errors=True)
        about = tmp_path / "b" / "heldout" / "conversion.json"
        ours = about.read_bytes()
        about.write_bytes(b"{}")  # of another conversion
        with pytest.raises(UserError, match="something else has made .*b/heldout meanwhile"):
            convert("webdataset", source, tmp_path / "b", heldout=0.3)
        about.write_bytes(ours)
    convert("webdataset", source, tmp_path / "b", heldout=0.3)
    for split in ("train", "heldout"):
        assert contents(tmp_path / "b" / split) == contents(tmp_path / "whole" / split) != {}
    assert not work.exists()


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
        ({"caption_chars": (500, None)}, "(?s)none of the 8 samples of .* is left.*8 left out: caption_length"),
    ],
)
def test_a_mistake_is_said_before_work_begins(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_tars(tmp_path / "in", tars=1)
    with pytest.raises(UserError, match=message):
        run_conversion(
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
    make_plan(store, None, chosen, open_source(chosen), open_source(chosen).plan())
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
        (parse_range, "5"),
        (parse_range, "9:5"),
        (parse_range, "a:b"),
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
    assert "http:" not in page and "https:" not in page, "the page needs nothing from elsewhere"
