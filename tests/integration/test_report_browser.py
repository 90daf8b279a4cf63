"""The page of a run in a browser, at a desk's and a phone's width, without a network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from browser import chromium, needs_chromium, set_width

from prx_composer.commands.report import write_page
from prx_composer.common.pages import image_grid

pytest.importorskip("selenium")
pytestmark = [pytest.mark.slow, needs_chromium]
PROMPTS = ["a red circle <b>on</b> the left", "pneumonoultramicroscopicsilicovolcanoconiosis" * 4, "a ring", "a cross"]
STEPS = 600


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "run_name": "a-name-without-any-space-in-it-" * 8,
        "model": {"name": "text_to_image", "backbone": {"name": "prx", "path": "/a/path/that/is/long" * 20}},
        "callbacks": {"images": {"prompts": PROMPTS}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    rows: list[dict[str, Any]] = []
    for batch in range(1, STEPS + 1):
        rows.append({"batch": batch, "seconds": batch / 2, "stage/image_size": 16 if batch < 300 else 32})
        rows[-1] |= {"loss/train/total": 2 / batch, "lr-AdamW/group0": 1e-3, "throughput/device/samples_per_sec": 99.5}
        rows[-1] |= {f"metrics/eval/mse_of_{letter * 30}": batch / 7 for letter in "abcd"} if batch % 60 == 0 else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "images").mkdir()
    for batch in range(50, STEPS + 1, 50):
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))
        image_grid(images, PROMPTS).save(folder / f"images/ba{batch:06d}.png")
    write_page(str(folder))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_and_fits_the_screen(browser: Any, page: Path, width: int) -> None:
    set_width(browser, width)
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    browser.get(page.as_uri())
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    naturals = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(naturals) == 8 * len(PROMPTS) and min(naturals) > 0  # 8 of the 12 times
    charts = browser.execute_script("return [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(charts) >= 4 and all(300 < chart < width for chart in charts)
    letters = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
    )
    assert min(letters) >= 9  # pixels
    assert browser.execute_script(
        "return performance.getEntriesByType('resource').every(entry => entry.name.startsWith('data:'))"
    )
    assert browser.get_log("browser") == []
