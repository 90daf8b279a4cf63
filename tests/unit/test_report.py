"""`prx report`: what the page says is what the run logged, whatever state its folder is in."""

import json
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from prx_composer.commands.report import make_page, write_page
from prx_composer.commands.report.charts import POINTS, chart_sections, thinned
from prx_composer.commands.report.reported_run import History, gpu_hours, read_run, stage_rows
from prx_composer.common.errors import UserError
from prx_composer.common.pages import cut, image_grid
from prx_composer.runs.folder import record_environment

PROMPTS = [
    "a red circle",
    "<script>alert(1)</script> & a square",
    "a ring",
    "a cross",
    "a dot",
    "a star",
    "a seventh, longer, prompt " * 9,
]


def rows(steps: int, switch: int = 10_000) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {"batch": batch, "seconds": 0.5 * batch, "stage/image_size": 16 if batch <= switch else 32, "time/sample": batch * 64}
        | {"loss/train/total": float(1 / batch + random.random()), "loss/train/flow": float(random.random())}
        | {
            "throughput/device/samples_per_sec": 128.0 if batch <= switch else 32.0,
            "throughput/samples_per_sec": 512.0 if batch <= switch else 128.0,
        }
        for batch in range(1, steps + 1)
    ]


def save_rows(folder: Path, logged: Iterable[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))


def grid(seed: int, prompts: list[str] = PROMPTS, height: int = 32, width: int = 32) -> tuple[torch.Tensor, Image.Image]:
    images = torch.randint(
        0, 256, (len(prompts), 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return images, image_grid(images, prompts)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    (folder / "images").mkdir(parents=True)
    recipe = {"run_name": "mine", "callbacks": {"images": {"prompts": PROMPTS}}, "image_size": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    logged = rows(40, switch=30)
    logged[19] |= {"metrics/eval/validation_loss": 0.1234567, "fid": 31.25}
    logged[39] |= {"metrics/eval/validation_loss": 0.0765432, "heldout_accuracy": 0.625, "train_seconds": 21.0}
    save_rows(folder, logged)
    (folder / "clock.json").write_text('{"elapsed": 3600.0}\n')
    for batch in (20, 40):
        grid(batch)[1].save(folder / f"images/ba{batch:06d}.png")
    return folder


def page_of(folder: Path, **options: Any) -> str:
    write_page(str(folder), **options)
    return (folder / "report.html").read_text()


def test_the_pages_numbers_are_those_of_the_metrics(run: Path) -> None:
    page = page_of(run, price=2.5)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert f"{last['loss/train/total']:#.4g} last loss" in text and "40 steps" in text and "62.5% held-out accuracy" in text
    assert f"Total loss {last['loss/train/total']:#.4g} at step 40" in text
    assert f"Loss: flow {last['loss/train/flow']:#.4g} at step 40" in text
    assert "eval/validation_loss 0.1235 0.07654" in text and "fid 31.25 –" in text and "heldout_accuracy – 0.6250" in text
    assert "16 px – 1 – 30 the end 15s 128" in text and "32 px – 31 – 40 the end 5s 32" in text
    assert "1h00m of training" in text and "4 GPU-hours at $2.50, $10.00" in re.sub(r" ([,.])", r"\1", text.replace("4.000", "4"))
    assert "Finished." in text


def test_stages_are_those_that_were_trained(run: Path) -> None:
    first, second = stage_rows(read_run(str(run)))
    assert (first.image_size, first.start, first.end, first.seconds) == (16, 0, 30, 15.0)
    assert (second.image_size, second.start, second.end, second.seconds) == (32, 30, 40, 5.0)


def test_stages_of_one_image_size_are_told_apart_and_are_the_recipe_s(run: Path) -> None:
    given = (("10ba", 16, 8), ("30ba", 16, 16), (None, 32, 8))
    stages = [{"until": until, "image_size": size, "global_train_batch_size": batch} for until, size, batch in given]
    recipe = yaml.safe_load((run / "config.yaml").read_text()) | {"algorithms": {"progressive_resolution": {"stages": stages}}}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    save_rows(run, [row | {"stage/index": (row["batch"] > 10) + (row["batch"] > 30)} for row in rows(40, 30)])
    found = [(row.image_size, row.until, row.batch_size, row.start, row.end) for row in stage_rows(read_run(str(run)))]
    assert found == [(16, "10ba", 8, 0, 10), (16, "30ba", 16, 10, 30), (32, None, 8, 30, 40)]


def test_text_of_the_recipe_and_the_metrics_is_never_markup(run: Path) -> None:
    evil = "</pre></style><script>alert(2)</script><img src=x onerror=alert(3)>"
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe |= {"run_name": evil, "optimizer": {"name": evil, evil: evil}, "algorithms": {evil: {}}}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    logged = rows(3)
    for row in logged:
        row |= {
            f"loss/train/{evil}": 1.0,
            f"metrics/{evil}": 2.0,
            f"{evil}/$x^": 1.0,
            f"{evil}/b": 1.0,
            f"lr-{evil}$": row["batch"],
        }
    save_rows(run, logged)
    (run / "spikes.jsonl").write_text(json.dumps({"batch": evil, "loss": evil, "median": evil}) + "\n")
    (run / "environment.jsonl").write_text(
        json.dumps({"ranks": 1, "devices": {evil: 1}, "command": evil, "versions": {evil: evil}})
    )
    page = page_of(run, title=evil)
    assert "<script" not in page and "<img src=x" not in page and "onerror=alert(3)&gt;" in page
    assert page.count("</pre>") == 1


def test_a_cut_last_line_is_left_out_and_said(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[:-30])
    page = page_of(run)
    assert "1 lines of metrics.jsonl cannot be read" in page
    assert History(run / "metrics.jsonl").steps == 39 and "Not finished" in page


def test_a_repeated_step_replaces_what_it_repeats(tmp_path: Path) -> None:
    again = [row | {"loss/train/total": -1.0} for row in rows(12)[5:]]
    save_rows(tmp_path, [*rows(10), *again])
    history = History(tmp_path / "metrics.jsonl")
    total = history.columns["loss/train/total"]
    assert total.batches.tolist() == list(range(1, 13)) and history.repeated == 5
    assert total.values.tolist() == [row["loss/train/total"] for row in rows(5)] + [-1.0] * 7


def test_values_that_are_not_finite_are_said_and_break_no_chart(run: Path) -> None:
    save_rows(run, [row | {"loss/train/total": None, "loss/train/flow": 0.0} for row in rows(20)])
    assert "not finite at step 20" in page_of(run)


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl"])
def test_a_folder_with_little_in_it_gives_a_page_that_says_what_is_missing(run: Path, left: str) -> None:
    for path in run.rglob("*"):
        if path.is_file() and path.name != left:
            path.unlink()
    page = page_of(run)
    absent = {"config.yaml": "no metrics.jsonl", "metrics.jsonl": "no config.yaml"}[left]
    assert absent in page and "No images were drawn" in page and "There is no environment.jsonl" in page


@pytest.mark.parametrize("content", ["", "{", "[]\n3\n", "a: [\n"])
def test_files_of_any_content_give_a_page(run: Path, content: str) -> None:
    for name in ("config.yaml", "metrics.jsonl", "clock.json", "environment.jsonl", "spikes.jsonl", "images/ba000020.png"):
        (run / name).write_text(content)
    assert "no step was finished" in page_of(run)


def test_a_long_run_stays_small_and_its_curve_keeps_every_extreme(run: Path) -> None:
    names = [f"loss/train/term{index}" for index in range(8)]
    with (run / "metrics.jsonl").open("w") as file:
        for batch in range(1, 120_001):
            row = {"batch": batch, "seconds": 0.7 * batch} | dict.fromkeys(names, batch * 7919 % 1013 / 1013)
            file.write(json.dumps(row) + "\n")
    for batch in range(1000, 120_000, 4000):
        grid(batch, height=256, width=256)[1].save(run / f"images/ba{batch:06d}.png")
    assert len(page_of(run).encode()) < 2e6
    column = History(run / "metrics.jsonl").columns[names[0]]
    _, medians, least, greatest = thinned(column.batches, column.values)
    assert len(medians) == POINTS and least.min() == column.values.min() and greatest.max() == column.values.max()


def test_axes_say_small_numbers_in_full(run: Path) -> None:
    save_rows(run, [row | {"lr-AdamW/group0": 1e-4 + 1e-8 * row["batch"]} for row in rows(300)])
    chart = next(chart for _, charts in chart_sections(read_run(str(run))) for chart in charts if chart.title == "Learning rate")
    labels = re.findall(r"<text[^>]*>\s*([\d.]+)\s*</text>", chart.svg)
    decimals = [float(label) for label in labels if "." in label]
    assert len(set(decimals)) == len(decimals) >= 3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 32), (48, 32)])
def test_a_grid_is_taken_apart_into_its_images(height: int, width: int) -> None:
    images, sheet = grid(1, height=height, width=width)
    tiles = cut(sheet, PROMPTS, width / height)
    assert tiles is not None and len(tiles) == len(PROMPTS)
    for image, tile in zip(images, tiles, strict=True):
        small = tile.resize((width, height), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(small), image.permute(1, 2, 0).numpy())


def test_a_grid_of_other_prompts_is_shown_whole(run: Path) -> None:
    grid(0, PROMPTS[:5])[1].save(run / "images/ba000020.png")
    page = page_of(run)
    assert page.count("<img") == 2 and 'alt="Samples at step 20"' in page


def test_every_prompt_is_the_text_of_its_images(run: Path) -> None:
    page = page_of(run)
    assert page.count("<img") == 2 * len(PROMPTS) and page.count('alt="a ring (step ') == 2


def test_gpu_hours_count_every_start_with_its_own_gpus(run: Path) -> None:
    starts = [
        {"spent": 0.0, "ranks": 8, "devices": {"NVIDIA H100": 8}},
        {"spent": 1800.0, "ranks": 2, "devices": {"NVIDIA H100": 2}},
    ]
    (run / "environment.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert gpu_hours(read_run(str(run))) == pytest.approx(8 * 0.5 + 2 * 0.5)


def test_a_start_is_recorded_without_the_host(tmp_path: Path) -> None:
    record_environment(tmp_path, 0, 0.0)
    record_environment(tmp_path, 7, 3.5)
    first, second = (json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (second["batch"], second["spent"], second["ranks"]) == (7, 3.5, 1)
    assert first["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert sum(first["devices"].values()) == 1 and shlex.split(first["command"])[1:] == sys.argv[1:]
    import socket

    assert socket.gethostname() not in json.dumps(first | {"command": ""})


def test_a_path_that_is_no_run_names_those_nearby(run: Path) -> None:
    with pytest.raises(UserError, match=r"min is no folder\. Runs nearby: .*runs/mine"):
        read_run(str(run.parent / "min"))
    with pytest.raises(UserError, match=r"runs holds no run .*Runs nearby: .*runs/mine"):
        read_run(str(run.parent))


def test_a_page_that_cannot_be_written_is_said(run: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file"):
        write_page(str(run), str(run))
    with pytest.raises(UserError, match="cannot be written"):
        write_page(str(run), str(run / "nowhere/page.html"))


def test_the_page_asks_for_nothing_from_a_network(run: Path) -> None:
    page = make_page(read_run(str(run)), None, None)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "url(http" not in page and "@import" not in page
