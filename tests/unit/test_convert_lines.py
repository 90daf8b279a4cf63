"""JSON lines: every record is the object that json reads, in every encoding, or left out by a reason."""

import codecs
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import WORDS, asked, convert, jpeg, read, rows, settings

from prx_composer.commands.convert.outcome import as_text
from prx_composer.commands.convert.records import look
from prx_composer.common.errors import UserError

GOOD = jpeg(64, 64)


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16 little": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_the_objects_that_json_reads_in_every_encoding_with_a_mark_however_they_are_cut(
    tmp_path: Path, encoding: str, end: str
) -> None:
    draw = random.Random(f"{encoding}{end}")
    objects = [
        {"file": f"{i}.jpg", "txt": draw.choice(WORDS), "more": [draw.choice(WORDS), {"n": draw.random()}], "none": None}
        for i in range(60)
    ]
    texts = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in objects]
    blank = [text if draw.random() < 0.9 else f"{text}{end} " for text in texts]
    (tmp_path / "c.jsonl").write_bytes(ENCODINGS[encoding](end.join(blank) + draw.choice(["", end])))
    for part in (7, 300, 10**6):
        found = read("jsonl", tmp_path, unit_bytes=part * 1000, **asked("txt", "more.0", "more.1.n", "none"))
        assert [record.columns for record in found] == objects, part
        assert len({record.key for record in found}) == len(objects)


def test_utf16_without_a_mark_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    text = json.dumps({"file": "1.jpg", "txt": "кошка на диване."}, ensure_ascii=False) + "\r\n"
    for encoding in ("UTF-16LE", "UTF-16BE"):
        path = tmp_path / encoding / "c.jsonl"
        path.parent.mkdir()
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match="zero bytes") as refused:
            read("jsonl", path)
        command = re.findall("`(.*)`", str(refused.value))[0]
        if shutil.which("iconv"):
            subprocess.run(
                command.replace("OLD", str(path)).replace("NEW", str(path.with_name("n.jsonl"))), shell=True, check=True
            )
            assert read("jsonl", path.with_name("n.jsonl"))[0].columns["txt"] == "кошка на диване."


def test_utf16_that_breaks_off_keeps_what_came_before_and_half_a_pair_is_a_reason(tmp_path: Path) -> None:
    lines = [json.dumps({"file": "no.jpg", "txt": text}, ensure_ascii=False) for text in ("кошка", "half a \ud83d pair", "end")]
    content = "\n".join(lines).encode("utf-16-le", "surrogatepass")
    (tmp_path / "c.jsonl").write_bytes(codecs.BOM_UTF16_LE + content[:-1])
    found = read("jsonl", tmp_path)
    assert [record.columns.get("txt") for record in found[:2]] == ["кошка", "half a \ud83d pair"]
    assert [record.problem for record in found[2:]] == ["unreadable_record", "damaged_input"]
    assert "3 records were read" in found[-1].detail


def test_a_column_that_comes_late_is_taken_and_one_that_never_comes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(GOOD)
    lines = [{"file": "0.jpg", "txt": f"{i}"} | ({"score": i / 10} if i >= 55 else {}) for i in range(70)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    statistics = convert("jsonl", tmp_path, tmp_path / "out", metadata={"score": ("score", "float")})
    assert [row["score"] for row in rows(tmp_path / "out")][55:] == [i / 10 for i in range(55, 70)]
    assert "txt in 70 of 70 records; score in 15 of 70 records" in as_text(statistics)
    with pytest.raises(UserError, match="--metadata: there is no column 'scor' .*Did you mean 'score'"):
        convert("jsonl", tmp_path, tmp_path / "b", metadata={"score": ("scor", "float")})


def test_a_look_ends_where_everything_was_seen_and_says_when_it_was_not_whole(tmp_path: Path) -> None:
    endless = ({"txt": "a", "n": i} for i in range(10**9))
    assert look(endless, settings("jsonl", tmp_path)) == (["n", "txt"], [], False, None, 50)
    found = look(({"n": i} for i in range(10**9)), settings("jsonl", tmp_path), seconds=0.05)
    assert (found.missing, found.whole) == (["txt"], False)
    assert look([{"n": 1}] * 3, settings("jsonl", tmp_path)) == (["n"], ["txt"], True, None, 3)


def test_a_column_inside_that_no_record_has_is_refused_at_the_end_with_a_count(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [GOOD] * 3, "txt": ["a"] * 3, "tags": [["x"], [], ["y", "z"]]}), tmp_path / "a.parquet")
    for name in ("tags.0", "tags.1"):
        convert("parquet", tmp_path, tmp_path / name, metadata={"tag": (name, "str")})
    with pytest.raises(UserError, match=r"--metadata: none of the 3 records .* has a column 'tags.2'"):
        convert("parquet", tmp_path / "a.parquet", tmp_path / "out", metadata={"tag": ("tags.2", "str")})
    assert not (tmp_path / "out" / "train").exists()
    convert("parquet", tmp_path / "a.parquet", tmp_path / "out", metadata={"tag": ("tags.1", "str")})


def test_a_list_or_a_compressed_file_in_place_of_lines_is_said_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps([{"file": "1.jpg", "txt": "a"}]))
    with pytest.raises(UserError, match=r"no .jsonl file in .*c\.json is there: .*jq -c '\.\[\]' OLD\.json > NEW\.jsonl"):
        read("jsonl", tmp_path)
    (tmp_path / "c.json").rename(tmp_path / "c.jsonl.gz")
    with pytest.raises(UserError, match="gunzip"):
        read("jsonl", tmp_path)
    (tmp_path / "c.jsonl.gz").unlink()
    (tmp_path / "c.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.jsonl .*zero bytes"):
        read("jsonl", tmp_path)


@pytest.mark.parametrize("wrapped", [["1.jpg"], [{"path": "1.jpg"}], "bytes", {"bytes": None, "path": "1.jpg"}])
def test_an_image_alone_in_a_list_is_found_without_being_named(tmp_path: Path, wrapped: Any) -> None:
    (tmp_path / "1.jpg").write_bytes(GOOD)
    value = list(GOOD) if wrapped == "bytes" else wrapped
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": value, "txt": "a"}))
    for name in (None, "image"):
        assert [(record.image, record.problem) for record in read("jsonl", tmp_path, image=name)] == [(GOOD, "")]


@pytest.mark.parametrize("text", [json.dumps([{"file": "1.jpg", "txt": "a"}]), json.dumps({"file": "1.jpg"}, indent=1), "5"])
def test_what_is_no_line_of_json_says_what_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"unreadable_record .*such as a\.jsonl@\d+: .*(jq -c|an? int in place)"):
        convert("jsonl", tmp_path, tmp_path / "out")
