"""A held-out share that images' bytes decide: the same in every order, by every way in, and however often it was stopped."""

import hashlib
import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import convert, jpeg, rows, sample, write_tar
from streaming import MDSWriter

from prx_composer.commands.convert.outcome import as_text, write_report
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.format import is_held_out
from prx_composer.data.sampler import SampleRequest
from prx_composer.data.sources import FolderSource

IMAGES = {str(seed): jpeg(64, (64, 96)[seed % 2], seed) for seed in range(40)}
SHARE = 0.3
HELD = {name for name, image in IMAGES.items() if int(hashlib.sha256(image).hexdigest()[:16], 16) / 2**64 < SHARE}


def captions(output: Path, split: str) -> list[str]:
    return sorted(row["caption"] for row in rows(output, split))


def put_tar(file: Path, names: list[str]) -> Path:
    return write_tar(file, [part for name in names for part in sample(name, IMAGES[name], name)])


def put_parquet(file: Path, names: list[str]) -> None:
    pq.write_table(pa.table({"image": [IMAGES[name] for name in names], "txt": names}), file)


def put_lines(file: Path, names: list[str]) -> None:
    for name in names:
        (file.parent / f"{name}.jpg").write_bytes(IMAGES[name])
    file.write_text("".join(json.dumps({"file": f"{name}.jpg", "txt": name}) + "\n" for name in names))


def put_shards(file: Path, names: list[str]) -> None:
    with MDSWriter(out=str(file), columns={"image": "bytes", "txt": "str"}) as writer:
        for name in names:
            writer.write({"image": IMAGES[name], "txt": name})


# ------------------------------------------------------------------------------------------------ the share


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5])
def test_the_share_is_a_binomial_draw_and_a_larger_one_holds_a_smaller(share: float) -> None:
    rng, count = np.random.default_rng(0), 40_000
    files = [rng.bytes(12) for _ in range(count)]
    held = [is_held_out(file, share) for file in files]
    deviation = math.sqrt(count * share * (1 - share))
    assert abs(sum(held) - count * share) < 4.5 * deviation
    runs = sum(a != b for a, b in itertools.pairwise(held))  # neighbours are independent
    assert abs(runs - 2 * share * (1 - share) * count) < 9 * deviation
    assert all(is_held_out(file, 2 * share if share < 0.5 else 0.99) for file, out in zip(files, held, strict=True) if out)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_said(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="--heldout must lie between 0 and 1"):
        convert("webdataset", tmp_path, tmp_path / "out", heldout=share)


# ------------------------------------------------------------------------------------------- which images


def test_an_image_falls_on_the_same_side_in_any_order_from_any_source_and_when_more_come(tmp_path: Path) -> None:
    names, less = list(IMAGES), list(IMAGES)[:25]
    mixed = random.Random(1).sample(names, len(names))
    inputs: dict[str, tuple[str, list[str]]] = {"one": ("webdataset", names), "fewer": ("webdataset", less)}
    inputs |= {"several": ("webdataset", mixed), "table": ("parquet", mixed), "lines": ("jsonl", names), "shards": ("mds", mixed)}
    for name, (source, some) in inputs.items():
        folder = tmp_path / name
        folder.mkdir()
        if source == "parquet":
            put_parquet(folder / "a.parquet", some)
        elif source == "jsonl":
            put_lines(folder / "a.jsonl", some)
        elif source == "mds":
            put_shards(folder / "s", some)
        else:
            parts = [some[:7], some[7:9], some[9:]] if name == "several" else [some]
            for number, part in enumerate(parts):
                put_tar(folder / f"{number}.tar", part)
        size: dict[str, Any] = {"image_size": 128, "quality": 50} if name == "table" else {}  # what is made of them matters not
        found = convert(source, folder, tmp_path / f"{name}-out", heldout=SHARE, **size)
        assert captions(tmp_path / f"{name}-out", "heldout") == sorted(HELD & set(some)), name
        assert captions(tmp_path / f"{name}-out", "train") == sorted(set(some) - HELD), name
        assert found["counts"]["kept"] == len(some) and sum(found["heldout"].values()) == len(HELD & set(some))
    assert 4 <= len(HELD) <= 20


def test_copies_of_a_file_are_never_on_both_sides_whatever_is_written_about_them(tmp_path: Path) -> None:
    members = [part for copy in range(5) for name in IMAGES for part in sample(f"{name}-{copy}", IMAGES[name], f"{name}-{copy}")]
    write_tar(tmp_path / "in" / "a.tar", members)
    convert("webdataset", tmp_path / "in", tmp_path / "out", heldout=SHARE)
    assert captions(tmp_path / "out", "heldout") == sorted(f"{name}-{copy}" for name in HELD for copy in range(5))
    convert("webdataset", tmp_path / "in", tmp_path / "few", heldout=SHARE, duplicates="exact")
    assert captions(tmp_path / "few", "heldout") == sorted(f"{name}-0" for name in HELD)


def test_an_evaluation_reads_the_split_and_both_lie_in_buckets(tmp_path: Path) -> None:
    put_tar(tmp_path / "a.tar", list(IMAGES))
    found = convert("webdataset", tmp_path / "a.tar", tmp_path / "out", heldout=SHARE)
    dataset = ImageCaptionDataset(str(tmp_path / "out"), "heldout")
    assert {dataset[SampleRequest(i, 64, 64, 0)]["caption"] for i in range(len(dataset))} == HELD
    assert len(found["buckets"]) == 2 == len(found["heldout"]) and dataset.counts == list(
        dict(sorted(found["heldout"].items())).values()
    )
    said = as_text(found)
    share = len(HELD) / 40
    assert f"{len(HELD)} of them ({share:.2%}) are held out in the split heldout: --heldout 0.3 of 40 is 12 on average" in said
    write_report(found, str(tmp_path / "out"), str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "held out in the split heldout" in page
    shown = [float(share) for share in re.findall(r"([\d.]+)%</td></tr>", page)]
    assert sum(shown) == pytest.approx(100, abs=0.1)


def test_a_share_of_too_few_images_is_said(tmp_path: Path) -> None:
    put_tar(tmp_path / "a.tar", [name for name in IMAGES if name not in HELD])
    found = convert("webdataset", tmp_path / "a.tar", tmp_path / "out", heldout=0.01)
    expected = 0.01 * (40 - len(HELD))
    assert (
        f"None is held out, and there is no split heldout: --heldout 0.01 of {40 - len(HELD)} is {expected:.3g} on average"
        in (as_text(found))
    )
    assert not (tmp_path / "out" / "heldout").exists()
    assert convert("webdataset", tmp_path / "a.tar", tmp_path / "out", heldout=0.01) == json.loads(json.dumps(found))
    with pytest.raises(UserError, match=r"heldout was 0.01, now 0.02"):
        convert("webdataset", tmp_path / "a.tar", tmp_path / "out", heldout=0.02)
    put_tar(tmp_path / "b.tar", sorted(HELD))
    with pytest.raises(UserError, match=f"none of the {len(HELD)} samples .* is left: --heldout 0.3 takes the {len(HELD)} that"):
        convert("webdataset", tmp_path / "b.tar", tmp_path / "all", heldout=SHARE)
    assert not (tmp_path / "all" / "heldout").exists() and not (tmp_path / "all" / "train").exists()


def test_what_lies_in_the_place_of_the_split_is_not_overwritten(tmp_path: Path) -> None:
    put_tar(tmp_path / "a.tar", list(IMAGES))
    with pytest.raises(UserError, match="--heldout 0.3 and --split heldout"):
        convert("webdataset", tmp_path / "a.tar", tmp_path / "out", heldout=SHARE, split="heldout")
    convert("webdataset", tmp_path / "a.tar", tmp_path / "out", split="heldout")
    with pytest.raises(UserError, match="there is a split heldout in --output already"):
        convert("webdataset", tmp_path / "a.tar", tmp_path / "out", heldout=SHARE)
    convert("webdataset", tmp_path / "a.tar", tmp_path / "whole", heldout=SHARE)
    shutil.rmtree(tmp_path / "whole" / "heldout")
    with pytest.raises(UserError, match="whole/heldout, made with .*whole/train, is gone"):
        convert("webdataset", tmp_path / "a.tar", tmp_path / "whole", heldout=SHARE)


def test_data_made_on_first_use_hold_out_the_same_images(tmp_path: Path) -> None:
    put_lines(tmp_path / "captions.jsonl", list(IMAGES))
    source = FolderSource(str(tmp_path), image_size=64, multiple=16, heldout=SHARE, heldout_by="content")
    held = {made.captions["txt"] for split, made in source.samples() if split == "heldout"}
    assert held == HELD and source.train_samples == 40 - len(HELD)
    assert any("heldout: 0.0001 takes none of 40 images" in note for note in _source(tmp_path, 0.0001).notes)


def _source(folder: Path, share: float) -> FolderSource:
    return FolderSource(str(folder), image_size=64, multiple=16, heldout=share, heldout_by="content")
