"""What a conversion says of its input: every file, member and record is kept or counted, and a changed input is noticed."""

import json
import logging
import os
import random
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conversions import contents, convert, jpeg, rows, sample, settings, write_tar, write_tars
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.convert import as_stored, differences, make_plan, outcome, run_conversion, units
from prx_composer.commands.convert.backends import open_output
from prx_composer.commands.convert.outcome import Tally
from prx_composer.commands.convert.records import open_source
from prx_composer.common.errors import UserError
from prx_composer.data.storage import list_files, survey


def test_the_summary_names_every_file_and_member_that_is_passed_over(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "in", tars=2)
    for name in ("more.zip", "more.7z", "LICENSE", ".gitattributes", "sub/notes.md", "sub/b.zip"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(tmp_path / "nowhere", folder / "z.tar")
    with tarfile.open(folder / "000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("._000.jpg"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    statistics = convert("webdataset", folder, tmp_path / "out")
    found = statistics["input"]
    assert (found["found"], found["read"]) == (10, 2) == (2 + sum(count for count, _ in found["passed"].values()), 2)
    text = outcome.as_text(statistics)
    for part in (
        "2 of 10 files of the input were read. Passed over: 1 .7z (such as more.7z); 1 .md (such as sub/notes.md); 2 .zip",
        "1 hidden (such as .gitattributes)",
        "1 links to a folder, which --follow-links reads (such as linked/)",
        "1 links to nothing (such as z.tar)",
        "1 without a suffix (such as LICENSE)",
        "Passed over in them: 1 hidden members of tars (such as 000.tar/._000.jpg); 1 links or devices in tars (such as 000.tar",
        "16 of 16 samples",
    ):
        assert part in text
    limited = convert("webdataset", folder, tmp_path / "first", limit=3, include="*.tar")
    assert limited["input"]["passed"]["after --limit"] == [1, "001.tar"]
    assert limited["input"]["passed"]["not of --include"][0] == 5 and limited["input"]["read"] == 1


@pytest.mark.parametrize("source", ["jsonl", "mds"])
def test_files_that_are_read_by_name_are_not_called_passed_over(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "in"
    if source == "mds":
        convert("webdataset", write_tars(tmp_path / "tars", tars=1), folder)
        passed = {"hidden": [1, ".train.work.lock"], ".json": [2, "train/conversion.json"]}
        statistics = convert(source, folder, tmp_path / "out", captions={"caption": "caption"})
    else:
        folder.mkdir()
        (folder / "a.jpg").write_bytes(jpeg(100, 100))
        (folder / "all.jsonl").write_text(json.dumps({"file": "a.jpg", "txt": "x"}))
        passed = {"images, except where a record names them": [1, "a.jpg"]}
        statistics = convert(source, folder, tmp_path / "out")
    assert statistics["input"]["passed"] == passed


# --------------------------------------------------------------------- read = kept + left out, come what may


def soup(folder: Path, seed: int) -> Path:
    """Tars of all that can happen: damage, names that come twice, several images, no text, no image, hidden names."""
    rng = random.Random(seed)
    for number in range(4):
        members: list[tuple[str, bytes]] = []
        for i in range(6):
            name = f"{rng.choice(['a', 'b', 'c.d', 'e'])}{rng.randrange(4)}"
            whole = sample(name, jpeg(rng.choice([70, 100]), 100, 10 * number + i), f"{number} {i}")
            members += rng.choice(
                [whole, whole, whole, whole[:1], whole[1:], [*whole, (f"{name}.png", b"x")], [("._x.jpg", b"")]]
            )
        path = write_tar(folder / f"{number}.tar", members)
        if rng.random() < 0.5:
            content = path.read_bytes()
            path.write_bytes(content[: rng.randrange(512, len(content))])
    return folder


def test_the_counts_add_up_and_are_the_same_after_a_kill(tmp_path: Path) -> None:
    reasons = set()
    for seed in range(5):
        source = soup(tmp_path / f"in{seed}", seed)
        chosen = settings("webdataset", source, min_side=80)
        whole = run_conversion(chosen, str(tmp_path / f"whole{seed}"))
        assert whole["counts"]["read"] == whole["counts"]["kept"] + sum(whole["dropped"].values())
        assert whole["counts"]["kept"] == len(rows(tmp_path / f"whole{seed}")) == sum(whole["buckets"].values())
        reasons |= whole["dropped"].keys()
        planned, output = open_source(chosen).plan(), tmp_path / f"killed{seed}"
        make_plan(open_output(str(output), "train"), None, chosen, open_source(chosen), planned)
        for unit in planned[1:3]:
            units.convert_unit(chosen, str(output), unit, {})
        again = run_conversion(chosen, str(output))  # and then it was killed
        assert json.dumps(again) == json.dumps(whole)
        assert contents(output / "train") == contents(tmp_path / f"whole{seed}" / "train")
    assert {"damaged_input", "same_name_twice", "several_images", "no_caption", "no_image", "min_side"} <= reasons


def test_columns_are_counted_in_one_order_whatever_the_process(tmp_path: Path) -> None:
    columns: dict[str, Any] = {f"c{i}": i for i in range(6)}
    write_tar(tmp_path / "in.tar", sample("a", jpeg(100, 100), **columns))
    metadata = {name: (name, "int") for name in columns}
    statistics = convert("webdataset", tmp_path / "in.tar", tmp_path / "out", metadata=metadata)
    assert list(statistics["columns"]) == [*columns, "txt"]


def test_counts_that_do_not_add_up_end_the_conversion() -> None:
    good = {"counts": {"read": 3, "kept": 2}, "dropped": {"no_image": 1}, "buckets": {"64x64": 2}}
    Tally(good).check()
    for change in ({"dropped": {}}, {"buckets": {"64x64": 1}}, {"counts": {"read": 4, "kept": 2}}):
        with pytest.raises(RuntimeError, match="don't add up"):
            Tally(good | change).check()


# ------------------------------------------------------------------------------- another input than before


def test_more_input_after_a_conversion_is_noticed_and_what_is_printed_works(tmp_path: Path) -> None:
    source, out = write_tars(tmp_path / "in", tars=2), tmp_path / "out"
    first = convert("webdataset", source, out)
    (source / "README.md").write_text("a file that isn't read may come")
    assert convert("webdataset", source, out) == json.loads(json.dumps(first))
    write_tar(source / "002.tar", sample("new", jpeg(100, 100), "new"))
    with pytest.raises(
        UserError, match=r"--input: .* has other files than when .*/out/train was made: 1 new \(such as 002.tar\)"
    ):
        convert("webdataset", source, out)
    assert len(rows(out)) == 16, "what is there stays"
    shutil.rmtree(out / "train")  # as the message says
    assert convert("webdataset", source, out)["counts"]["kept"] == 17 == len(rows(out))
    write_tar(source / "002.tar", sample("new", jpeg(100, 100), "another caption"))
    (source / "001.tar").unlink()
    with pytest.raises(UserError, match=r"1 gone \(such as 001.tar\), 1 changed in size or time \(such as 002.tar\)"):
        convert("webdataset", source, out)
    assert convert("webdataset", source, tmp_path / "new")["counts"]["kept"] == 9, "or a new --output"


def test_images_beside_lines_are_part_of_the_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(100, 100))
    (folder / "all.jsonl").write_text(json.dumps({"file": "a.jpg", "txt": "x"}))
    convert("jsonl", folder, tmp_path / "out")
    (folder / "a.jpg").write_bytes(jpeg(120, 100, 3))
    with pytest.raises(UserError, match=r"1 changed in size or time \(such as a.jpg\)"):
        convert("jsonl", folder, tmp_path / "out")


def test_an_input_that_is_gone_and_one_that_was_not_recorded_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = write_tars(tmp_path / "in", tars=1), tmp_path / "out"
    first = json.loads(json.dumps(convert("webdataset", source, out)))
    stored = out / "train" / "conversion.json"
    with caplog.at_level(logging.WARNING):
        source.rename(tmp_path / "moved")
        assert convert("webdataset", source, out) == first and "is not there any more" in caplog.text
        old = first | {"settings": {k: v for k, v in first["settings"].items() if k != "follow_links"}}
        del old["input"]
        stored.write_text(json.dumps(old))
        assert convert("webdataset", source, out) == old and "an earlier version" in caplog.text
        assert "8 of 8 samples" in outcome.as_text(old)


def test_of_very_many_files_a_hash_is_kept() -> None:
    few, more = {"a": [1, 2]}, {"a": [1, 2], "b": [3, 4]}
    states = [as_stored(state, most) for state in (few, more, {"b": [3, 4], "a": [1, 2]}) for most in (0, 9)]
    assert [state.keys() for state in states[:2]] == [{"many", "sha256"}, {"files"}]
    assert differences(states[2], states[4]) == differences(states[3], states[5]) == ""
    assert differences(states[0], states[2]) == "1 then and 2 now, with other names, sizes or times"
    assert differences(states[1], states[3]) == "1 new (such as b)"


# --------------------------------------------------------------------------------------------- no sample left


def test_when_nothing_is_left_the_reasons_are_explained_and_the_advice_works(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i in range(2):
        (cache / "blobs" / f"b{i}").write_bytes(jpeg(100, 100, i))
        os.symlink(f"../../blobs/b{i}", snapshot / f"{i}.jpg")
    text = "".join(json.dumps({"file_name": f"{i}.jpg", "txt": f"c {i}"}) + "\n" for i in range(2))
    (snapshot / "metadata.jsonl").write_text(text + json.dumps({"file_name": "../../../secret.jpg", "txt": "x"}))
    (tmp_path / "secret.jpg").write_bytes(jpeg(100, 100))
    options = ["--source", "jsonl", "--input", str(snapshot), "--output", str(tmp_path / "out"), "--caption", "txt"]
    options += ["--base-size", "64", "--patch", "16", "--workers", "0"]
    result = CliRunner().invoke(app, ["data", "convert", *options])
    assert result.exit_code and isinstance(result.exception, UserError)
    message = str(result.exception)
    assert "none of the 3 samples" in message and "3 left out: outside_input (the record names a file outside" in message
    assert (
        f"0.jpg is or passes a symbolic link to {cache.resolve() / 'blobs' / 'b0'}" in message
        and "give --follow-links" in message
    )
    result = CliRunner().invoke(app, ["data", "convert", *options, "--follow-links"])
    assert result.exit_code == 0, result.output
    assert [row["txt"] for row in rows(tmp_path / "out")] == ["c 0", "c 1"], "a name that leads out is never opened"
    assert "secret.jpg is not below" in result.output


def test_tars_without_a_sample_say_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", [("README", b"x")])
    with pytest.raises(
        UserError, match=r"(?s)there is no sample in .*1 members of tars without a suffix \(such as a.tar/README\)"
    ):
        convert("webdataset", tmp_path / "in", tmp_path / "out")


def test_links_to_folders_are_followed_when_it_is_asked_for_and_may_lead_back(tmp_path: Path) -> None:
    write_tars(tmp_path / "disk", tars=2)
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "in" / "tars")
    os.symlink(tmp_path / "in", tmp_path / "disk" / "back")
    assert list_files(str(tmp_path / "in")) == [] and len(survey(str(tmp_path / "in"))) == 1
    assert [Path(name).name for name, _ in list_files(str(tmp_path / "in"), "*", follow_links=True)] == ["000.tar", "001.tar"]
    with pytest.raises(UserError, match="--input: no .tar"):
        convert("webdataset", tmp_path / "in", tmp_path / "out")
    assert convert("webdataset", tmp_path / "in", tmp_path / "out", follow_links=True)["counts"]["kept"] == 16


# ------------------------------------------------------------------------------------------------ the bar


def test_the_bar_shows_samples(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_conversion(settings("webdataset", write_tars(tmp_path / "in", tars=2)), str(tmp_path / "out"), progress=True)
    said: Any = capfd.readouterr().err
    assert re.search(r"Converting.*2/2.* 16 samples", said)
