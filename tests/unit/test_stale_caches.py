"""What was made of data is made again, or refused, when the data have changed: every cache, every kind of change."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_data import SQUARE, encode

from prx_composer.commands.encode.encoding import Encoded, encode_split
from prx_composer.common.errors import UserError
from prx_composer.data.contents import check_copy, column_contents
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.format import Bucket, BucketWriter, RawSample
from prx_composer.data.sources import FolderSource, prepare
from prx_composer.data.stored import StoredColumn, encoded_folder, manifest_path, read_column
from prx_composer.integrations.llm_foundry import caption_tokenizer
from prx_composer.metrics.real_images import DataSet, ImageFolder, open_images, reference_features

Change = Callable[[Path], Path]  # of a folder of images: where it is afterwards
COUNT, SPEC = 6, {"name": "folder"}


def picture(shade: int) -> bytes:
    return encode(Image.new("RGB", (16, 16), (shade, shade, shade)), "BMP")  # of one size, whatever is on it


def images(folder: Path) -> Path:
    folder.mkdir()
    for index in range(COUNT):
        (folder / f"{index}.bmp.png").write_bytes(picture(10 * index))
    return note(folder)


def note(folder: Path) -> Path:
    """Writes captions.jsonl of the images that are there."""
    rows = [{"file": file.name, "caption": f"number {file.name[0]}"} for file in sorted(folder.glob("*.png"))]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def other_content(folder: Path) -> Path:
    """Of the same size, and with the time that the file had, as archives restore it."""
    file = folder / "3.bmp.png"
    state = file.stat()
    file.write_bytes(picture(200))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    return folder


def swapped(folder: Path) -> Path:
    one, other = (folder / f"{index}.bmp.png" for index in (1, 2))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    return folder


def added(folder: Path) -> Path:
    (folder / "9.bmp.png").write_bytes(picture(90))
    return note(folder)


def removed(folder: Path) -> Path:
    (folder / "4.bmp.png").unlink()
    return note(folder)


def touched(folder: Path) -> Path:
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    return folder


def moved(folder: Path) -> Path:
    return folder.rename(folder.with_name("elsewhere"))


def copied(folder: Path) -> Path:
    copy = Path(shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copyfile))
    shutil.rmtree(folder)
    return copy


CHANGES = [
    (other_content, True),
    (swapped, True),
    (added, True),
    (removed, True),
    (touched, False),
    (moved, False),
    (copied, False),
]
each_change = pytest.mark.parametrize(("change", "is_other"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])


def source(folder: Path) -> FolderSource:
    return FolderSource(str(folder), image_size=16, multiple=4, min_bucket=1)


@each_change
def test_data_of_a_folder_are_refused_if_its_images_have_changed(tmp_path: Path, change: Change, is_other: bool) -> None:
    folder, made = images(tmp_path / "pictures"), tmp_path / "made"
    prepare(made, source(folder), SPEC)
    prepare(made, source(folder), SPEC)
    folder = change(folder)
    if is_other:
        with pytest.raises(ValueError, match="this source") as refused:
            prepare(made, source(folder), SPEC)
        if change in (other_content, swapped):
            names = "3.bmp.png" if change is other_content else "1.bmp.png, 2.bmp.png"
            assert f"of {COUNT} have changed ({names})" in str(refused.value) and "delete this one" in str(refused.value)
        shutil.rmtree(made)  # as the message says
    before = {file: file.read_bytes() for file in made.rglob("*.mds")} if made.exists() else None
    prepare(made, source(folder), SPEC)
    assert len(ImageCaptionDataset(str(made))) == len(list(folder.glob("*.png")))
    assert before is None or before == {file: file.read_bytes() for file in made.rglob("*.mds")}, "nothing is made again"
    record = json.loads((made / "source_files.json").read_text())
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    assert {name: entry[1] for name, entry in record.items()} == times, "what was touched or copied isn't read at every start"


def test_images_that_could_not_be_read_and_now_can_are_a_change(tmp_path: Path) -> None:
    folder = images(tmp_path / "pictures")
    whole = (folder / "5.bmp.png").read_bytes()
    (folder / "5.bmp.png").write_bytes(b"no image")
    prepare(tmp_path / "made", source(folder), SPEC)
    (folder / "5.bmp.png").write_bytes(whole)
    with pytest.raises(ValueError, match=r"1 of 6 have changed \(5.bmp.png\)"):
        prepare(tmp_path / "made", source(folder), SPEC)


def test_data_of_an_earlier_version_are_used_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "pictures")
    prepare(tmp_path / "made", source(folder), SPEC)
    (tmp_path / "made" / "source_files.json").unlink()
    prepare(tmp_path / "made", source(folder), SPEC)
    assert "doesn't say of which images it was made" in caplog.text


# -------------------------------------------------------------------------------------- what is encoded of a data set


def rows(count: int = COUNT) -> list[tuple[bytes, str]]:
    return [(picture(10 * index), f"caption {index}") for index in range(count)]


def write(data: Path, samples: list[tuple[bytes, str]]) -> None:
    """The split anew in its place; what was encoded stays beside it."""
    kept = data / "encoded"
    if (data / "train" / "encoded").exists():
        (data / "train" / "encoded").rename(kept)
    shutil.rmtree(data / "train", ignore_errors=True)
    with BucketWriter(data / "train", 16, ("caption",)) as writer:
        for index, (image, caption) in enumerate(samples):
            writer.write(SQUARE, RawSample(image, 16, 16, {"caption": caption}, str(index)))
    if kept.exists():
        kept.rename(data / "train" / "encoded")


def store(data: Path, kind: str, column: str, work: Any = None) -> StoredColumn:
    """As `prx encode` does; of each sample nothing."""
    made = StoredColumn(kind, "an encoder", None, "its weights", 1, "float32")
    folder = encoded_folder(data, "train", "stored", column)
    return encode_split(data / "train", folder, made, work or (lambda _, of: [Encoded() for _ in of]), part_size=4)


SAMPLES: dict[str, tuple[list[tuple[bytes, str]], bool, bool]] = {  # and whether that is other images, other captions
    "another image of the same size": ([*rows()[:3], (picture(200), "caption 3"), *rows()[4:]], True, False),
    "another caption of the same length": ([*rows()[:3], (picture(30), "caption X"), *rows()[4:]], False, True),
    "two reordered": ([rows()[1], rows()[0], *rows()[2:]], True, True),
    "one more": (rows(COUNT + 1), True, True),
    "one less": (rows(COUNT - 1), True, True),
    "written again": (rows(), False, False),
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize(("kind", "column"), [("text", "caption"), ("features", "image"), ("latents", "image")])
def test_what_is_encoded_is_refused_beside_other_data_and_only_then(
    tmp_path: Path, kind: str, column: str, samples: tuple[list[tuple[bytes, str]], bool, bool]
) -> None:
    write(tmp_path, rows())
    store(tmp_path, kind, column)
    write(tmp_path, samples[0])
    folder = encoded_folder(tmp_path, "train", "stored", column)
    if not samples[1 + (kind == "text")]:
        assert read_column(folder, kind, "train_loader.stored").data == store(tmp_path, kind, column).data
        return
    with pytest.raises(UserError, match=rf"train_loader.stored: {folder} was made of other data.*prx encode {kind}"):
        read_column(folder, kind, "train_loader.stored")
    with pytest.raises(UserError, match=rf"was begun with other data: the column '{column}'.*Delete the folder"):
        store(tmp_path, kind, column)  # rather than to say that all is done
    shutil.rmtree(folder)
    store(tmp_path, kind, column)
    assert read_column(folder, kind, "train_loader.stored")


def test_a_tokenizer_of_other_captions_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data", rows())
    loader, folder = {"name": "image_caption", "path": str(tmp_path / "data")}, str(tmp_path / "tokenizer")
    made = caption_tokenizer(loader, folder)
    assert caption_tokenizer(loader, folder).get_vocab() == made.get_vocab()
    with pytest.raises(UserError, match="another vocab_size"):
        caption_tokenizer(loader, folder, vocab_size=7)
    write(tmp_path / "data", [(picture(0), "other words")])
    with pytest.raises(UserError, match="other captions.*Name a new folder"):
        caption_tokenizer(loader, folder)
    assert "words" in caption_tokenizer(loader, str(tmp_path / "new")).get_vocab()


def test_half_of_one_data_set_is_not_joined_to_half_of_another(tmp_path: Path) -> None:
    def killed(bucket: Bucket, of: Any) -> list[Encoded]:
        if len(of) < 4:  # the second part
            raise KeyboardInterrupt
        return [Encoded() for _ in of]

    write(tmp_path, rows())
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, "latents", "image", killed)
    write(tmp_path, [*rows()[:-1], (picture(7), "caption 5")])
    with pytest.raises(UserError, match="was begun with other data"):
        store(tmp_path, "latents", "image")


def test_a_copied_data_set_keeps_what_is_encoded_of_it(tmp_path: Path) -> None:
    write(tmp_path / "data", rows())
    store(tmp_path / "data", "latents", "image")
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    assert read_column(encoded_folder(tmp_path / "copy", "train", "stored", "image"), "latents", "train_loader.latent")


def test_a_column_of_an_earlier_version_is_used_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, rows())
    store(tmp_path, "latents", "image")
    folder = encoded_folder(tmp_path, "train", "stored", "image")
    for file in (manifest_path(folder), folder / "settings.json"):
        content = json.loads(file.read_text())
        del content["data"]
        file.write_text(json.dumps(content))
    assert read_column(folder, "latents", "").data is None and "doesn't say of which data it was made" in caplog.text
    assert store(tmp_path, "latents", "image"), "and the same command finds it done"


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_a_copy_of_remote_data_is_refused_when_other_data_lie_there(
    tmp_path: Path, samples: tuple[list[tuple[bytes, str]], bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """By manifest and indexes, which say the size of every shard."""
    (tmp_path / "remote").mkdir()
    write(tmp_path / "remote", rows())

    remote, copy = tmp_path / "remote" / "train", tmp_path / "copy"
    copy.mkdir()
    check_copy(copy, str(remote))  # nothing is there yet
    for name in ("manifest.json", "16x16/index.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(remote / name, copy / name)
    check_copy(copy, str(remote))
    write(tmp_path / "remote", samples[0])
    if len(samples[0]) == COUNT:
        check_copy(copy, str(remote))
    else:
        with pytest.raises(
            UserError, match=r"is a copy of what lay in .* before: manifest.json is another one there now. Delete"
        ):
            check_copy(copy, str(remote))
    shutil.copy(remote / "manifest.json", copy / "manifest.json")
    assert not caplog.text
    shutil.rmtree(remote)
    check_copy(copy, str(remote))
    assert "cannot be reached" in caplog.text


# ---------------------------------------------------------------------------------------------------- reference images


class Shades:
    """An extractor that counts what it is given."""

    name, image_size, fingerprint = "shades", 4, "shades"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.float().mean((1, 2, 3))[:, None]


@each_change
def test_features_of_a_folder_of_real_images_are_those_of_its_images(tmp_path: Path, change: Change, is_other: bool) -> None:
    folder, extractor = images(tmp_path / "pictures"), Shades()

    def features(folder: Path) -> list[float]:
        real: Any = extractor
        return (
            reference_features(ImageFolder(str(folder)), real, None, tmp_path / "cache", 4, torch.device("cpu"))
            .features[:, 0]
            .tolist()
        )

    assert features(folder) == features(folder) == [10.0 * index for index in range(COUNT)] and extractor.seen == COUNT
    folder = change(folder)
    now = [float(Image.open(file).getpixel((0, 0))[0]) for file in sorted(folder.glob("*.png"))]  # pyright: ignore
    assert features(folder) == now
    assert (extractor.seen > COUNT) == is_other, "computed again for other images, and for them alone"


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_a_reference_data_set_is_known_by_its_images(tmp_path: Path, samples: tuple[list[tuple[bytes, str]], bool, bool]) -> None:
    write(tmp_path, rows())
    before = DataSet(str(tmp_path)).identity(tmp_path / "cache")
    write(tmp_path, samples[0])
    assert (open_images(str(tmp_path), "train").identity(tmp_path / "cache") != before) == samples[1]


def test_of_a_large_data_set_some_rows_and_all_sizes_are_compared(tmp_path: Path) -> None:
    found = []
    for samples in (rows(100), [(b"x", "one"), *rows(100)[1:]], [*rows(99), (picture(3), "caption 99")], rows(100)):
        write(tmp_path, samples)
        found.append(column_contents(tmp_path / "train", "image", exact=0))
    assert len({*found}) == 3 and found[0] == found[-1]


def test_a_record_that_cannot_be_read_or_written_is_said_and_costs_no_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = images(tmp_path / "pictures"), tmp_path / "cache"
    caplog.set_level(logging.WARNING)
    identity = ImageFolder(str(folder)).identity(cache)
    (record,) = (cache / "folders").iterdir()
    record.write_text("{not")
    assert ImageFolder(str(folder)).identity(cache) == identity and "the files are read again" in caplog.text
    (tmp_path / "file").touch()
    assert ImageFolder(str(folder)).identity(tmp_path / "file") == identity and "cannot be written" in caplog.text
