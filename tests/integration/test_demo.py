"""`prx demo`: it draws what `prx generate` draws, one drawing at a time, on a page that a browser shows."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import commands
import pytest
from browser import chromium, needs_chromium, set_width
from commands import prx
from conftest import train_once
from PIL import Image

from prx_composer.commands.demo import Asked, DemoOptions, Studio, listen, open_demo
from prx_composer.common.errors import UserError

PROMPT, OTHER = "a red circle on the left of a white background", "a blue ring in the centre of a black background"
ASKED = Asked(PROMPT, "7", 3, 2, "16x24", ("ema",))  # whole numbers come as such from the page


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    return train_once(tmp_path_factory, shapes_data, callbacks={"images": {"prompts": [OTHER], "interval": "1dur"}})


@pytest.fixture
def studio(trained: Path, tmp_path: Path) -> Callable[..., Studio]:
    """Opens models for a page: the run, unless others are named."""

    def opened(*models: Path, **options: Any) -> Studio:
        return Studio(DemoOptions(models=[str(model) for model in models or [trained]], **options), tmp_path)

    return opened


def drawn(studio: Studio, asked: Asked) -> list[bytes]:
    """What is saved of a drawing, model by model."""
    seen = list(studio.draw(asked))
    return [Path(one.image).read_bytes() for one in seen if isinstance(one.image, str)]


def generated(trained: Path, folder: Path, *options: Any) -> bytes:
    """The file that `prx generate` writes with the settings of `ASKED` and others."""
    settings = ("-p", PROMPT, "--seed", 7, "--steps", 3, "--guidance-scale", 2, "--size", "16x24", "--no-grid")
    prx("generate", trained, *settings, "--output", folder, *options)
    (path,) = folder.glob("*.png")
    return path.read_bytes()


def test_a_drawing_is_the_file_that_generate_writes(trained: Path, studio: Callable[..., Studio], tmp_path: Path) -> None:
    """The same bytes: pixels and metadata. Two models, or two kinds of weights of one, are side by side."""
    ema, raw = (generated(trained, tmp_path / kind, "--weights", kind) for kind in ("ema", "raw"))
    early = generated(trained / "checkpoints" / "ba4", tmp_path / "early")
    assert len({ema, raw, early}) == 3
    two = studio(trained / "checkpoints" / "ba4", trained)
    assert drawn(two, ASKED._replace(weights=("ema", "raw"))) == [early, raw]
    assert drawn(two, ASKED._replace(weights=("ema", "ema"))) == [early, ema]


def test_drawings_asked_for_at_once_are_those_of_one_after_the_other(studio: Callable[..., Studio]) -> None:
    one = studio()
    asked = [ASKED._replace(prompt=p, seed=str(s), weights=(w,)) for p in (PROMPT, OTHER) for s in (1, 2) for w in ("ema", "raw")]
    alone = [drawn(one, each) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda each: drawn(one, each), asked)) == alone
    assert len({file for (file,) in alone}) == len(asked)


def test_what_is_seen_while_it_is_drawn_changes_nothing_and_who_leaves_ends_it(studio: Callable[..., Studio]) -> None:
    one = studio()
    *before, last = one.draw(ASKED._replace(steps=200))
    looks = [seen.image for seen in before if seen.image is not None]
    assert looks and all(isinstance(look, Image.Image) and look.size == (24, 16) for look in looks)
    assert "16×24 with ema weights of batch 8" in last.said and last.image is not None
    left = one.draw(ASKED._replace(steps=1000))
    next(seen for seen in left if seen.image is not None)
    left.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert drawn(one, ASKED._replace(steps=200)) == [Path(str(last.image)).read_bytes()]
    assert len(list(one.folder.glob("*.png"))) == 2, "what nobody waited for was not finished"


def test_drawings_are_kept_where_it_is_said_and_nothing_there_is_written_over(
    studio: Callable[..., Studio], tmp_path: Path
) -> None:
    for _ in range(2):
        (tmp_path / "kept").mkdir(exist_ok=True)
        drawn(studio(output=str(tmp_path / "kept")), ASKED)
    paths = sorted((tmp_path / "kept").iterdir())
    assert [path.name[:10] for path in paths] == ["0000-seed7", "0001-seed7"]
    facts: dict[str, str] = Image.open(paths[1]).text  # pyright: ignore[reportAttributeAccessIssue]
    assert json.loads(facts["prx"])["num_inference_steps"] == 3 and facts["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(prompt=" \n"), "Type a prompt"),
        (dict(prompt="\ud800"), "The prompt is no Unicode text"),
        (dict(seed="-1"), "--seed: '-1' is no whole number"),
        (dict(seed=str(2**64)), "--seed: too large"),
        (dict(seed="9" * 5000), "--seed: Exceeds the limit"),
        (dict(steps=0), "--steps must be a whole number from 1 to 1000, not 0"),
        (dict(steps=2.5), "not 2.5"),
        (dict(steps=float("inf")), "not inf"),
        (dict(steps=None), "not None"),
        (dict(guidance_scale=0.5), "--guidance-scale must be a number from 1 on"),
        (dict(guidance_scale=None), "--guidance-scale must be a number from 1 on"),
        (dict(size="large"), "--size: 'large' is no size"),
        (dict(size="17x19"), "the nearest is 16x20"),
        (dict(size="-8x-8"), "--size: the sides"),
        (dict(size="128"), "at most the area of 64x64 pixels; prx generate draws larger"),
        (dict(size="9" * 400), "at most the area"),
        (dict(weights=("best",)), "--weights must be ema or raw"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_drawn(opened: Studio, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(opened.draw(ASKED._replace(**changes)))
    assert not list(opened.folder.iterdir())


@pytest.fixture(scope="module")
def opened(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(DemoOptions(models=[str(trained)]), tmp_path_factory.mktemp("opened"))


def test_what_cannot_be_served_is_said(
    trained: Path, studio: Callable[..., Studio], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="one model, or two side by side, not 3"):
        studio(trained, trained, trained)
    with listen(DemoOptions.host, 0) as taken:
        host, port = taken.getsockname()
        assert host == "127.0.0.1", "the page is for this machine, unless another host is named"
        with pytest.raises(UserError, match=f"--port: {port} is taken"):
            listen(host, port)
    with pytest.raises(UserError, match="--host 203.0.113.7: it cannot listen"):
        listen("203.0.113.7", 0)
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"prx demo needs gradio: uv sync --inexact --extra demo"):
        open_demo(DemoOptions(models=[str(trained)]), tmp_path)


SPY = """
import sys

def noted(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        print("connects to", arguments[1], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1"):
        print("asks for", arguments[0], file=sys.stderr, flush=True)

sys.addaudithook(noted)
"""


@pytest.fixture
def served(trained: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the verb's page, of the run and of an earlier checkpoint. Ctrl-C ends it; it talks to nobody else."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    (tmp_path / "spy.py").write_text(SPY)
    models = (trained, trained / "checkpoints" / "ba4")
    process = commands.start("prx", "demo", *models, "--port", 0, "--code", tmp_path / "spy.py", text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    yield line.split(" · ")[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), "130: of what stands for the process, see warm.py"
    assert not any(word in errors for word in ("connects to", "asks for", "Traceback")), errors


def until(browser: Any, condition: Callable[[], Any], seconds: float = 60) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: condition())


@pytest.mark.slow
@needs_chromium
def test_the_page_draws_in_a_browser_of_a_phone_s_width(served: str, trained: Path, tmp_path: Path) -> None:
    """Looks are seen, then generate's very file; a mistake is a sentence; nothing is asked of another host."""
    pytest.importorskip("selenium")
    with chromium(tmp_path / "chromium", performance="ALL") as browser:
        set_width(browser, 390)
        browser.get(served)

        def find(path: str) -> Any:
            return browser.find_elements("css selector", path)

        def fill(field: str, text: str) -> None:
            (box,) = find(f"#{field} :is(input, textarea)")
            box.clear()
            box.send_keys(text)

        def source(column: int) -> str:
            return browser.execute_script("return document.querySelector(arguments[0])?.src ?? ''", f"#image{column} img")

        def said() -> str:
            return browser.execute_script("return document.querySelector('#said textarea')?.value ?? ''")

        until(browser, lambda: find("#draw"))
        assert find("#prompt textarea")[0].get_property("value") == OTHER, "the run's own"
        bottom = browser.execute_script("return document.querySelector('#draw').getBoundingClientRect().bottom")
        assert browser.execute_script("return innerWidth") == 390 and 0 < bottom < 900, "reached without scrolling"
        for field, text in dict(prompt=PROMPT, seed="7", steps="400", scale="2", size="16x24").items():
            fill(field, text)
        find("#draw")[0].click()
        look = until(browser, lambda: source(0))
        until(browser, lambda: source(0) not in ("", look))
        until(browser, lambda: said().count("16×24 with ema weights") == 2)
        assert "of batch 8" in said() and "of batch 4" in said()
        saved = [source(0), source(1)]
        shown = browser.execute_script("return document.querySelector('#image0 img').getBoundingClientRect().width")
        assert 200 < shown <= 390, "24 pixels, enlarged"
        assert urlopen(saved[0]).read() == generated(trained, tmp_path / "a", "--steps", 400)
        assert urlopen(saved[1]).read() == generated(trained / "checkpoints" / "ba4", tmp_path / "b", "--steps", 400)
        link = find("#image0 a[download]")[0]
        assert link.get_attribute("download").startswith("0000-seed7-a-red-circle") and link.get_attribute("href") == source(0)
        fill("size", "17x19")
        find("#draw")[0].click()
        until(browser, lambda: "the nearest is 16x20" in said())
        assert source(0) == saved[0], "a mistake leaves the picture"
        for width in (390, 1280):
            set_width(browser, width)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [entry["params"]["request"]["url"] for entry in log if entry["method"] == "Network.requestWillBeSent"]
        outside = [url for url in asked if url.startswith(("http:", "https:", "ws")) and not url.startswith(served)]
        assert len(asked) > 10 and outside == []
        assert browser.get_log("browser") == []
