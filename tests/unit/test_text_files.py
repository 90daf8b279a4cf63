"""Text files come from every editor: with marks, in UTF-16, with separators inside of a line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prx_composer.common.errors import UserError
from prx_composer.common.files import read_lines, read_text, split_lines
from prx_composer.data.sources import FolderSource

TEXTS = ["a кот.", "first\u2028second", "next\u0085line", "form\ffeed", "plain", "\x1c\x1d\x1e\x0b", "zażółć gęślą", ""]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_come_out_as_they_went_in_whatever_the_editor(tmp_path: Path, encoding: str, end: str) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes("".join(text + end for text in TEXTS).encode(encoding))
    assert read_lines(file) == TEXTS


@pytest.mark.parametrize("text", ["", "one", "one\n", "one\n\ntwo", "\n", "a\rb\r\nc\n\rd", *TEXTS])
def test_lines_are_those_of_pythons_own_text_files(text: str) -> None:
    assert split_lines(text) == [line.rstrip("\n") for line in io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")]


@pytest.mark.parametrize("big_endian", [False, True])
def test_utf16_of_both_byte_orders_is_read_by_its_mark(tmp_path: Path, big_endian: bool) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffкошка".encode("utf-16-be" if big_endian else "utf-16-le"))
    assert read_text(file) == "кошка"


def test_a_file_in_another_encoding_is_refused_with_its_line_and_a_way_on(tmp_path: Path) -> None:
    file = tmp_path / "old.txt"
    file.write_bytes("ok\ncaf\u00e9\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"old\.txt is not UTF-8: byte 0xe9 in line 2 .*iconv -f WINDOWS-1252"):
        read_text(file)
    file.write_bytes("plain words".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"zero bytes.*UTF-16LE"):
        read_text(file)


@pytest.mark.parametrize("caption", [["a red square", "square"], {"en": "a red square"}, 3])
def test_a_caption_that_is_no_text_is_not_passed_over_for_another_column(tmp_path: Path, caption: Any) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "1.png", "caption": caption, "license": "CC-BY 4.0"}) + "\n")
    with pytest.raises(ValueError, match=r"captions.jsonl, line 1: caption is no text but .*; write a line for each text"):
        FolderSource(str(tmp_path), 64)


def test_half_a_surrogate_pair_in_a_caption_is_refused_with_its_line(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    lines = [{"file": "1.png", "caption": text} for text in ("a smile \U0001f600", "half a smile \ud83d")]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"captions.jsonl, line 2: caption holds half a surrogate pair"):
        FolderSource(str(tmp_path), 64)
