"""`prx demo`: a page of this machine on which one types prompts and sees what one or two models draw.

It draws and saves with the functions of `prx generate`. Whatever asks, one drawing is made at a time.
"""

import errno
import logging
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Argument, Option, echo

from prx_composer.commands import CodeOption, generate, made_folder, parse_weights, show_log, writing_output
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.installation import adding

if TYPE_CHECKING:
    import torch
    import uvicorn
    from gradio import Blocks
    from PIL.Image import Image

    from prx_composer.runs.opening import Trained

log = logging.getLogger(__name__)

PORTS = range(7860, 7960)  # which are tried without --port
MOST_STEPS = 1000
MOST_SIDES = 4  # times the side that a model was trained at: nobody's slip of a digit takes all memory
LOOK_EVERY = 0.2  # seconds between two looks at an unfinished drawing
STYLE = """
.small img { image-rendering: pixelated; }
.drawing img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.drawing .image-frame, .drawing .image-container button { width: 100%; height: 100%; }
.gradio-container { max-width: 60rem !important; margin: auto; }
"""
# Whatever a version of gradio asks for, the browser fetches from this server alone.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `prx demo`."""

    models: Annotated[list[str], Argument(metavar="MODEL", help="As for generate. Two are drawn side by side.")]
    output: Annotated[str | None, Option(metavar="DIR", help="Keep every drawing here. [default: only while it runs]")] = None
    host: Annotated[str, Option(help="Address to listen at. 0.0.0.0: the whole network, without a password.")] = "127.0.0.1"
    port: Annotated[int | None, Option(min=0, max=65535, help=f"[default: the first free one from {PORTS[0]} on]")] = None
    guidance: Annotated[str, Option(help="cfg, self, internal, or run, as for generate.")] = "run"
    code: CodeOption = field(default_factory=list)
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1 … [default: a GPU if there is one]")] = None
    precision: Annotated[str | None, Option(help="fp32, or bf16 (GPU). [default: bf16 on a GPU, fp32 on the CPU]")] = None


def show_demo(options: DemoOptions) -> None:
    """Serve a page on which one types prompts and watches them being drawn, until Ctrl-C.

    Seed, steps, guidance, size and kind of weights are set there. The images are those of `prx generate`, with the same metadata.
    The page is for this machine alone, unless --host says otherwise. Nothing is fetched from elsewhere or sent there.

    prx demo runs/quickstart

    prx demo runs/mine/checkpoints/ba1000 runs/mine
    """
    show_log()
    with tempfile.TemporaryDirectory(prefix="prx-demo-", ignore_cleanup_errors=True) as scratch:
        server, listener = open_demo(options, Path(scratch))
        host = f"[{options.host}]" if ":" in options.host else options.host
        echo(f"{' | '.join(options.models)} · http://{host}:{listener.getsockname()[1]} · Ctrl-C ends it")
        with listener, suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def open_demo(options: DemoOptions, scratch: Path) -> "tuple[uvicorn.Server, socket.socket]":
    """Open the models and the port; return the server of the page, and the socket that it is to be run with.

    Args:
        scratch: folder of what is served.

    Raises:
        UserError: gradio is not installed; a model, an option or a port that cannot be had.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(scratch / "served")}  # gradio reads them
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"prx demo needs gradio: {adding('demo')}") from error
    studio = Studio(options, scratch)
    listener = listen(options.host, options.port)
    return make_server(build_page(studio), studio, listener), listener


# ---------------------------------------------------------------------------------------------------------- drawing


class Asked(NamedTuple):
    """What stands in the page's fields when a drawing is asked for."""

    prompt: str
    seed: str  # text: a browser's numbers have 53 bits
    steps: float | None
    guidance_scale: float | None
    size: str
    weights: tuple[str | None, ...]  # of every model


class Seen(NamedTuple):
    """What changes on the page: a model's drawing, unless it is None, and what is said."""

    column: int
    image: "Image | str | None"  # a look at it while it is drawn, or the path of its file
    said: str


class _Opened(NamedTuple):
    """A model that is ready to draw, and the hash of its weights."""

    trained: "Trained"
    digest: str


class Studio:
    """One or two models that draw what the page asks for, one drawing at a time.

    Args:
        options: of the verb.
        scratch: folder of the drawings that are shown; `options.output` gets a copy of each.

    Raises:
        UserError: a model, device, precision or guidance that cannot be had.
    """

    def __init__(self, options: DemoOptions, scratch: Path):
        from prx_composer.registry import import_code

        if len(options.models) > 2:
            raise UserError(f"prx demo shows one model, or two side by side, not {len(options.models)}.")
        self.names = options.models
        self.folder = made_folder(str(scratch / "drawn"))
        self._kept = None if options.output is None else made_folder(options.output)
        before = [path.name.partition("-")[0] for path in self._kept.glob("*-*.png")] if self._kept else []
        self._drawings = max((int(number) + 1 for number in before if number.isdecimal()), default=0)
        self._guidance, self._precision = options.guidance, options.precision
        self._drawing = threading.Lock()
        self._device = generate.find_device(options.device)
        import_code(options.code, "--code")
        self._opened = [self._load(name, None) for name in options.models]
        self.settings = [self._settings(trained) for trained in self.trained]

    @property
    def trained(self) -> "list[Trained]":
        """The models, with the weights that were last drawn with."""
        return [opened.trained for opened in self._opened]

    def draw(self, asked: Asked) -> Iterator[Seen]:
        """Yield what is to be seen until all models have drawn. An iterator that is closed ends its drawing at the next step.

        Raises:
            UserError: what `prx generate` would refuse, and what is too much for a page; no drawing has begun then.
        """
        found: SimpleQueue[Seen | BaseException | None] = SimpleQueue()
        closed = threading.Event()

        def work() -> None:
            try:
                with self._drawing:
                    self._draw(asked, found.put, closed)
                found.put(None)
            except BaseException as error:  # whatever it is, who waits for the queue is told
                found.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (seen := found.get()) is not None:
                if isinstance(seen, BaseException):
                    raise seen
                yield seen
        finally:
            closed.set()

    def _draw(self, asked: Asked, show: Callable[[Seen], None], closed: threading.Event) -> None:
        prompt, seed, steps = _parsed(asked)
        scale = math.nan if asked.guidance_scale is None else float(asked.guidance_scale)
        settings = []
        for column, weights in enumerate(asked.weights):
            if closed.is_set():
                return
            if weights not in (None, self.trained[column].weights):
                show(Seen(column, None, f"opens {weights} weights …"))
                self._opened[column] = self._load(self.names[column], weights)
            settings.append(self._settings(self.trained[column], asked.size.strip() or None, steps, scale))
        for column, ((trained, digest), chosen) in enumerate(zip(self._opened, settings, strict=True)):
            show(Seen(column, None, "begins …"))
            with suppress(_Closed):
                watch = _watch(trained, column, chosen.num_inference_steps, show, closed)
                ((_, image),) = generate.draw(trained.model, [prompt], [seed], chosen, 1, watch)
                path = self._save(
                    image, {"prompt": prompt, "seed": seed} | generate.metadata(trained, chosen, digest, self._device)
                )
                show(Seen(column, str(path), "\n".join([generate.drawn_with(trained, chosen), *trained.model.unread([prompt])])))

    def _load(self, name: str, weights: str | None) -> _Opened:
        from prx_composer.runs.opening import load_trained

        trained = load_trained(name, parse_weights(weights))
        digest = generate.weights_hash(trained.model)
        trained.model.to(self._device)
        return _Opened(trained, digest)

    def _settings(self, trained: "Trained", *asked: Any) -> generate.DrawingSettings:
        """Return the settings of a size, steps and guidance scale that are asked for, in this order; without any, the run's."""
        size, *others = asked or (None,)
        settings = generate.chosen_settings(trained, self._device, size, self._guidance, self._precision, *others)
        side = MOST_SIDES * trained.image_size
        if size is not None and settings.height * settings.width > side**2:
            raise UserError(f"--size: the page draws at most the area of {side}x{side} pixels; prx generate draws larger images.")
        generate.check_settings(trained.model, settings, self._device)
        return settings

    def _save(self, image: "torch.Tensor", facts: dict[str, Any]) -> Path:
        path = self.folder / generate.file_name(self._drawings, facts["seed"], facts["prompt"])
        with writing_output():
            generate.save_png(image, path, facts)
            if self._kept:
                generate.save_png(image, self._kept / path.name, facts)
        self._drawings += 1
        return path


class _Closed(Exception):
    """Nobody waits for the drawing any more."""


def _watch(
    trained: "Trained", column: int, steps: int, show: Callable[[Seen], None], closed: threading.Event
) -> "Callable[[int, torch.Tensor], None]":
    """Return what is called at every step: it shows, now and then, what the drawing will be, or ends it."""
    from prx_composer.common.pages import picture

    last = time.monotonic()

    def watch(index: int, predicted: "torch.Tensor") -> None:
        nonlocal last
        if closed.is_set():
            raise _Closed
        if time.monotonic() - last >= LOOK_EVERY:
            look = picture(trained.model.autoencoder.decode(predicted)[0].cpu())
            show(Seen(column, look, f"step {index + 1} of {steps} …"))
            last = time.monotonic()

    return watch


def _parsed(asked: Asked) -> tuple[str, int, int]:
    """Return prompt, seed and steps. Raise UserError for what is none."""
    from prx_composer.models.flow import check_seeds

    prompt = generate.check_prompt(asked.prompt.strip(), "The prompt")
    if not prompt:
        raise UserError("What is to be drawn? Type a prompt.")
    digits = asked.seed.strip()
    if not digits.isdecimal():
        raise UserError(f"--seed: {digits!r} is no whole number from 0 on.")
    with at_path("--seed"):
        seed = int(digits)
        check_seeds([seed], "too large")
    steps = asked.steps
    if steps is None or not 1 <= steps <= MOST_STEPS or steps % 1:
        raise UserError(f"--steps must be a whole number from 1 to {MOST_STEPS}, not {steps}.")
    return prompt, seed, int(steps)


# -------------------------------------------------------------------------------------------------------- the page


def build_page(studio: Studio) -> "Blocks":
    """Return the page of the models, whose queue draws one at a time."""
    import gradio as gr

    settings, first = studio.settings[0], studio.trained[0]
    prompts, _ = generate.recipe_settings(first)
    kinds = [("averaged (ema)", "ema"), ("raw", "raw")]
    shape = ["drawing", "small"] if first.image_size < 128 else ["drawing"]
    with gr.Blocks(title="prx demo", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        prompt = gr.Textbox((prompts or [""])[0], label="prompt", lines=2, max_lines=6, elem_id="prompt")
        with gr.Row():
            button = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
            another = gr.Button("Next seed", min_width=100, elem_id="another")
            stop = gr.Button("Stop", min_width=80, elem_id="stop")
        said = gr.Textbox(show_label=False, interactive=False, lines=1, max_lines=8, elem_id="said")
        images, weights = [], []
        with gr.Row():
            for column, (name, trained) in enumerate(zip(studio.names, studio.trained, strict=True)):
                with gr.Column(min_width=240):
                    look: dict[str, Any] = dict(elem_id=f"image{column}", elem_classes=shape, buttons=["download", "fullscreen"])
                    images.append(gr.Image(label=name, type="filepath", format="png", interactive=False, height=360, **look))
                    chosen = trained.weights if trained.weights in ("ema", "raw") else None  # an exported folder has one kind
                    weights.append(gr.Radio(kinds, value=chosen, label="weights", visible=chosen is not None))
        with gr.Row():
            seed = gr.Textbox("0", label="seed", min_width=120, elem_id="seed")
            steps = gr.Number(settings.num_inference_steps, label="steps", min_width=120, elem_id="steps")
            scale = gr.Number(settings.guidance_scale, label="guidance scale", min_width=120, elem_id="scale")
            size = gr.Textbox(f"{settings.height}x{settings.width}", label="size, HxW", min_width=120, elem_id="size")
        call: dict[str, Any] = dict(
            fn=_teller(studio), inputs=[prompt, seed, steps, scale, size, *weights], outputs=[*images, said],
            concurrency_id="drawing", concurrency_limit=1, show_progress="minimal", show_progress_on=said,
        )  # fmt: skip
        events: list[Any] = [button.click(**call, api_name="draw"), prompt.submit(**call, api_visibility="private")]
        events.append(
            another.click(
                lambda n: str(int(n) + 1) if n.strip().isdecimal() else n, seed, seed, queue=False, api_visibility="private"
            ).then(**call)
        )
        stop.click(lambda: "stopped", outputs=said, cancels=events, queue=False, api_visibility="private")
    return page.queue(max_size=32, default_concurrency_limit=1, api_open=False)


def _teller(studio: Studio) -> Callable[..., Iterator[list[Any]]]:
    """Return the page's handler: it yields every model's image, or that it stays, and what is said."""
    import gradio as gr
    import torch

    def tell(prompt: str, seed: str, steps: float | None, scale: float | None, size: str, *weights: str | None) -> Any:
        lines = [""] * len(weights)
        stay: list[Any] = [gr.skip()] * len(weights)
        images: list[Any] = [None] * len(weights)  # a first picture takes the old ones away
        try:
            for seen in studio.draw(Asked(prompt, seed, steps, scale, size, weights)):
                lines[seen.column] = seen.said
                told = "\n".join(f"{name} · {line}" for name, line in zip(studio.names, lines, strict=True) if line)
                if seen.image is not None:
                    images[seen.column] = seen.image
                    yield [*images, told]
                    images = list(stay)
                else:
                    yield [*stay, told]
        except UserError as error:
            yield [*stay, str(error)]
        except torch.OutOfMemoryError:
            yield [*stay, "There is not enough memory for that. Choose a smaller size."]
        except Exception as error:
            log.exception("What the page asked for could not be drawn.")
            yield [*stay, f"It could not be drawn: {error} The terminal says where."]

    return tell


# ------------------------------------------------------------------------------------------------------- the server


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens there, or at the first free port. Raise UserError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in PORTS if port is None else [port]:
        try:
            return socket.create_server((host, number), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"--host {host}: it cannot listen at port {number} there: {error.strerror}.") from error
    raise UserError(f"--port: {port or 'every port that is tried'} is taken; give another one.")


def make_server(page: "Blocks", studio: Studio, listener: socket.socket) -> "uvicorn.Server":
    """Return the server of the page: without share link, telemetry, history, uploads or any page beside it."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    host, port = listener.getsockname()[:2]
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, "/", server_name=host, server_port=port,
        footer_links=[], run_history=False, allowed_paths=[str(studio.folder)], max_file_size="1kb", css=STYLE,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, show_error=False,
    )  # fmt: skip
    app.middleware("http")(_with_policy)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


async def _with_policy(request: Any, call_next: Callable[..., Any]) -> Any:
    answer = await call_next(request)
    answer.headers["content-security-policy"] = POLICY
    return answer
