"""Tars: the same samples as the webdataset library where it reads them, and no member without a count where it doesn't."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conversions import settings, write_tar
from webdataset.tariterators import group_by_keys, tar_file_iterator  # the outside oracle

from prx_composer.commands.convert.records import Passed, Record, open_source
from prx_composer.commands.convert.webdataset import members, open_tar

Members = list[tuple[str, bytes]]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def read(path: Path, **options: Any) -> tuple[list[Record], Passed]:
    """All records of a tar, and what was passed over."""
    source = open_source(settings("webdataset", path, **options))
    return [record for unit in source.plan() for record in source.read(unit)], source.passed


def good(records: list[Record]) -> list[tuple[str, bytes | None, dict[str, Any]]]:
    return [(record.key.partition("/")[2], record.image, record.columns) for record in records if not record.problem]


def problems(records: list[Record]) -> Counter[str]:
    return Counter(record.problem for record in records if record.problem)


def tidy(count: int, rng: random.Random) -> Members:
    """Samples as the webdataset library writes them: adjacent, each name once, some suffixes of several parts, odd letters."""
    found: Members = []
    for number in range(count):
        key = rng.choice(["", "a/", "b c/d.e/", "x" * 120 + "/"]) + rng.choice(["", "ü ", "日本-", "-"]) + f"{number:04d}"
        found.append((f"{key}.{rng.choice(['jpg', 'PNG', 'jpeg'])}", f"image {number}".encode() * rng.randrange(1, 400)))
        suffixes = rng.sample(["txt", "cls", "long.txt", "seg.npy", "TXT2"], rng.randrange(1, 4))
        found += [(f"{key}.{suffix}", f"{suffix} {number}".encode() * rng.randrange(3)) for suffix in suffixes]
    return found


def stream(content: bytes) -> Any:
    """As `tar_file_iterator` takes it, whatever its annotation says."""
    return io.BytesIO(content)


def packed(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


# -------------------------------------------------------------------------------- what webdataset reads


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("suffix", PACKERS)
def test_tidy_tars_give_the_samples_that_the_webdataset_library_gives(tmp_path: Path, form: int, suffix: str) -> None:
    for seed in range(4):
        plain = packed(tidy(15, random.Random(seed)), form)
        path = tmp_path / f"{seed}.tar{suffix}"
        path.write_bytes(PACKERS[suffix](plain))
        expected = []
        for found in group_by_keys({"__url__": "", **part} for part in tar_file_iterator(stream(plain))):
            parts = {name: content for name, content in found.items() if not name.startswith("__")}
            images = [name for name in parts if name in ("jpg", "png", "jpeg")]
            expected.append((found["__key__"], parts.pop(images[0]), parts))
        records, passed = read(path)
        assert good(records) == expected and len(expected) == 15
        assert not problems(records) and not passed


@pytest.mark.parametrize("suffix", PACKERS)
def test_archives_written_one_after_the_other_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS[suffix]
    parts = [packed([(f"{n}{i}.{kind}", f"{n}{i}".encode()) for i in range(3) for kind in ("jpg", "txt")]) for n in range(3)]
    path = tmp_path / f"a.tar{suffix}"
    path.write_bytes(b"".join(map(pack, parts)))  # cat 1.tar 2.tar 3.tar, or of .tar.gz
    expected = [(f"{n}{i}", f"{n}{i}".encode(), {"txt": f"{n}{i}".encode()}) for n in range(3) for i in range(3)]
    records, _ = read(path)
    assert good(records) == expected == good(records[:9]) and not problems(records)
    for junk in (b"<html>", b"\xff" * 700):  # an archive, and then something that is none
        path.write_bytes(pack(parts[0] + junk.ljust(1024, b"!")))
        records, _ = read(path)
        assert good(records) == expected[:3] and problems(records) == {"damaged_input": 1}


def test_a_tar_that_is_cut_anywhere_gives_its_first_samples_and_is_counted(tmp_path: Path) -> None:
    members = [(f"{i:02d}.{kind}", bytes([65 + i]) * 700) for i in range(6) for kind in ("jpg", "txt")]
    whole = packed(members)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar] + [tar.offset]
    rng = random.Random(1)
    cuts = [*headers[1:], *(header + 512 for header in headers[:-1]), *rng.sample(range(1, headers[-1]), 40)]
    path = tmp_path / "a.tar"
    for cut in cuts:
        path.write_bytes(whole[:cut])
        records, _ = read(path)
        found, complete = good(records), cut // headers[2]
        paired = [record for record in found if record[2]]
        assert paired == [(f"{i:02d}", bytes([65 + i]) * 700, {"txt": bytes([65 + i]) * 700}) for i in range(len(paired))]
        assert len(paired) in (complete, complete + 1) and len(found) - len(paired) <= 1, "one may lack only padding, or its text"
        assert problems(records) == {"damaged_input": 1}, cut
        assert f"({len(records) - 1} samples were read)" in records[-1].detail and len(records[-1].detail) > 30
    for cut in range(headers[-1] + 512, len(whole), 512):  # within the zeros: nothing is missing
        path.write_bytes(whole[:cut])
        assert not problems(read(path)[0])


def test_a_tar_that_was_allocated_but_not_written_to_its_end_is_damaged_and_one_that_is_padded_is_not(tmp_path: Path) -> None:
    whole, path = packed([("0.jpg", b"x"), ("0.txt", b"a")]), tmp_path / "a.tar"
    path.write_bytes(whole + bytes(1 << 20))  # as `tar -b 2048` writes it
    assert not problems(read(path)[0])
    path.write_bytes(whole + bytes(5 << 20))
    records, _ = read(path)
    assert (
        len(good(records)) == 1 and problems(records) == {"damaged_input": 1} and "not written to its end" in records[-1].detail
    )


@pytest.mark.parametrize("suffix", [name for name in PACKERS if name])
def test_a_compressed_tar_that_is_cut_or_broken_gives_its_first_samples_and_is_counted(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(2)
    members = [(f"{i}.{kind}", rng.randbytes(2000)) for i in range(200) for kind in ("jpg", "txt")]
    contents = dict(members)
    content = PACKERS[suffix](packed(members))
    path = tmp_path / f"a.tar{suffix}"
    for left in (len(content) // 3, len(content) * 4 // 5, len(content) - 3):
        path.write_bytes(content[:left])
        records, _ = read(path)
        assert problems(records) == {"damaged_input": 1} and "its compression is broken" in records[-1].detail
        found = [record for record in good(records) if record[2]]
        assert [(image, columns) for _, image, columns in found] == [
            (contents[f"{i}.jpg"], {"txt": contents[f"{i}.txt"]}) for i in range(len(found))
        ]


def test_random_damage_ends_in_words_and_never_in_a_traceback(tmp_path: Path) -> None:
    rng = random.Random(3)
    whole = packed(tidy(8, rng), tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar"
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(content) // 512) * 512 + rng.randrange(512)
            content[at : at + rng.randrange(1, 20)] = rng.randbytes(rng.randrange(1, 20))
        path.write_bytes(content)
        records, _ = read(path)
        assert set(problems(records)) <= {"damaged_input", "same_name_twice", "several_images"}


def test_a_member_of_negative_size_does_not_lead_back_for_ever(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256: -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "a.tar"
    path.write_bytes(packed([("b.jpg", b"x"), ("b.txt", b"y")])[:2048] + header + bytes(1024))
    records, _ = read(path)
    assert len(good(records)) == 1 and problems(records) == {"damaged_input": 1}


# ------------------------------------------------------------------------- what it doesn't, or not rightly


def samples(names: list[str], json_too: bool = False) -> list[Members]:
    """A sample for each name; every content says which sample it belongs to."""
    found = []
    for number, name in enumerate(names):
        members = [(f"{name}.jpg", f"{number}".encode()), (f"{name}.txt", f"{number}".encode())]
        found.append([*members, *([(f"{name}.json", json.dumps({"number": number}).encode())] if json_too else [])])
    return found


def in_order(groups: list[Members], order: str, rng: random.Random) -> Members:
    every = [member for group in groups for member in group]
    if order == "sorted":
        return sorted(every, key=lambda member: member[0])
    if order == "pictures, then texts":
        return [m for m in every if m[0].endswith("jpg")] + [m for m in every if not m[0].endswith("jpg")]
    if order == "shuffled":
        rng.shuffle(every)
    return every


DOTTED = ["cat", "cat.v2", "cat.v3", "Photo 1.0 - red", "Photo 1.0 - blue", "v2.1.final", "dog", "a.b/c", "a.b/c.d", "a.b/c.d.e"]


@pytest.mark.parametrize("order", ["as written", "sorted", "pictures, then texts", "shuffled"])
@pytest.mark.parametrize("json_too", [False, True])
def test_every_sample_comes_once_with_its_own_text_in_whatever_order_members_lie(
    tmp_path: Path, order: str, json_too: bool
) -> None:
    for seed in range(6):
        rng = random.Random(seed)
        names = DOTTED + [f"{i:03d}" for i in range(12)]
        rng.shuffle(names)
        path = write_tar(tmp_path / f"{seed}.tar", in_order(samples(names, json_too), order, rng))
        records, passed = read(path)
        assert not problems(records) and not passed
        assert sorted(key for key, _, _ in good(records)) == sorted(names)
        for key, image, columns in good(records):
            assert image == columns["txt"] == str(names.index(key)).encode()
            assert not json_too or columns["number"] == names.index(key)


@pytest.mark.parametrize("order", ["as written", "sorted", "pictures, then texts"])
def test_names_that_come_twice_are_never_mixed_up(tmp_path: Path, order: str) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        names = [rng.choice(["1", "2", "cat.v2", "3"]) for _ in range(3)] + [f"x{i}" for i in range(3)]
        rng.shuffle(names)
        path = write_tar(tmp_path / f"{seed}.tar", in_order(samples(names), order, rng))
        records, _ = read(path)
        assert len(records) == len(names), "as many as there are, kept or counted"
        for _, image, columns in good(records):
            assert image == columns["txt"]
        once = {name for name, count in Counter(names).items() if count == 1}
        assert once <= {key for key, _, _ in good(records)} and set(problems(records)) <= {"same_name_twice"}


def test_a_name_that_comes_twice_says_which(tmp_path: Path) -> None:
    members = [("1.jpg", b"red"), ("1.jpg", b"blue"), ("1.txt", b"a red thing"), ("1.txt", b"a blue thing")]
    records, _ = read(write_tar(tmp_path / "a.tar", members))
    assert problems(records) == {"same_name_twice": 2} and "1.jpg 2 times, 1.txt 2 times" in records[0].detail
    with pytest.raises(ValueError, match="duplicate file name"):  # as webdataset has it
        list(group_by_keys({"__url__": "", **part} for part in tar_file_iterator(stream(packed(members)))))


def test_of_several_images_an_option_says_which(tmp_path: Path) -> None:
    left_right = [(f"{i}.{side}.jpg", f"{side} {i}".encode()) for i in range(2) for side in ("left", "right")]
    path = write_tar(tmp_path / "a.tar", sorted([*left_right, ("0.txt", b"0"), ("1.txt", b"1")]))
    records, _ = read(path)
    assert problems(records) == {"several_images": 2} and "--image left.jpg takes that one" in records[0].detail
    for side in ("left", "right"):
        records, passed = read(path, image=f"{side}.jpg")
        assert good(records) == [(f"{i}", f"{side} {i}".encode(), {"txt": f"{i}".encode()}) for i in range(2)]
        assert [record.image_column for record in records] == [f"{side}.jpg"] * 2
        assert passed.keys() == {"further images of samples"}
    both = write_tar(tmp_path / "b.tar", [("0.jpg", b"jpg"), ("0.png", b"png"), ("0.txt", b"0")])
    assert problems(read(both)[0]) == {"several_images": 1}
    assert [good(read(both, image=kind)[0])[0][1] for kind in ("jpg", "png")] == [b"jpg", b"png"]
    mask = write_tar(tmp_path / "c.tar", [("0.jpg", b"jpg"), ("0.mask.png", b"mask"), ("0.txt", b"0")])
    records, passed = read(mask)
    assert good(records) == [("0", b"jpg", {"txt": b"0"})] and passed["further images of samples"] == [1, "c.tar/0: mask.png"]


def test_an_option_that_names_a_suffix_of_several_parts_gets_it(tmp_path: Path) -> None:
    members = [(f"0.{side}.{kind}", f"{side} {kind}".encode()) for side in ("left", "right") for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members)
    assert [key for key, _, _ in good(read(path)[0])] == ["0.left", "0.right"]
    records, _ = read(path, image="right.jpg", captions={"caption": "left.txt"})
    assert [(record.key, record.image, record.columns["left.txt"]) for record in records] == [
        ("a.tar/0", b"right jpg", b"left txt")
    ]


def test_whatever_a_tar_holds_every_image_is_in_a_record_or_counted(tmp_path: Path) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        stems = [f"{folder}{name}" for folder in ("", "a/", "a.b/") for name in ("1", "2", "1.x", "1.x.y", ".h", "._1", "ü")]
        suffixes = [".jpg", ".JPG", ".png", ".txt", ".json", ".m.png", "", ".tar.gz"]
        names = [rng.choice(stems) + rng.choice(suffixes) for _ in range(rng.randrange(1, 40))]
        path = write_tar(tmp_path / f"{seed}.tar", [(name, b"%d" % i) for i, name in enumerate(names)])
        if rng.random() < 0.5:
            with tarfile.open(path, "a") as tar:
                link = tarfile.TarInfo("1.jpg")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
        records, passed = read(path)
        shown = {record.image for record in records if record.image is not None}
        counted = [record.key.partition("/")[2] for record in records if record.problem]
        further = passed.get("further images of samples", [0])[0]
        hidden = [n for n in names if n.rpartition("/")[2].startswith(".")]
        suffixless = [n for n in names if n not in hidden and "." not in n.rpartition("/")[2]]
        assert passed.get("hidden members of tars", [0])[0] == len(hidden)
        assert passed.get("members of tars without a suffix", [0])[0] == len(suffixless)
        missing = 0
        for number, name in enumerate(names):
            image = name.lower().endswith((".jpg", ".png")) and name not in hidden
            if image and b"%d" % number not in shown and not any(name.startswith(f"{key}.") for key in counted):
                missing += 1
        assert missing == further, (seed, names)
        assert len(shown) == sum(record.image is not None for record in records), "none twice"


def test_pairs_that_lie_in_two_folders_are_not_paired_and_say_what_they_are(tmp_path: Path) -> None:
    members = [("images/1.jpg", b"x"), ("texts/1.txt", b"y")]
    records, _ = read(write_tar(tmp_path / "a.tar", members))
    assert [(record.key, record.detail) for record in records] == [
        ("a.tar/images/1", "its members are jpg"),
        ("a.tar/texts/1", "its members are txt"),
    ]


def test_a_tar_made_to_fill_the_disk_is_not_unpacked_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(packed([("0.jpg", b"x"), *((f"{i}.txt", bytes(1 << 20)) for i in range(1, 9))])))
    with open_tar(path, tmp_path, 1 << 20) as (file, problem):
        assert file.seek(0, 2) < 3 << 20 and "64 times its size" in problem
        assert next(members(file))[1].name == "0.jpg"
