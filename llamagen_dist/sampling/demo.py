"""``llamagen generate --interactive``: a page on this machine to draw with, through gradio. Nothing goes elsewhere."""

import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.sampling import drawing
from llamagen_dist.sampling.conditions import encoded_captions
from llamagen_dist.sampling.guidance import SCHEDULES
from llamagen_dist.sampling.load import class_number
from llamagen_dist.sampling.pictures import Settings

HOST, PORT = "127.0.0.1", 7860
MOST_AT_ONCE = 16


def gradio() -> Any:
    """The package. Raises UserError where it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would otherwise report to its makers
    try:
        import gradio
    except ImportError:
        raise UserError("--interactive needs gradio: pip install 'llamagen-dist[demo]'") from None
    return gradio


def check_port(port: int) -> None:
    """Raises UserError for a port that another program listens at, or that this user may not take."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be used ({error.strerror}); choose another with --port") from None


class Studio:
    """What the page's button does: draws, and keeps every picture as a PNG with its record."""

    def __init__(self, opened: drawing.Source, weights: str | None, text_encoder: Path | None, folder: Path) -> None:
        self.opened, self.weights, self.text_encoder, self.folder = opened, weights, text_encoder, folder
        self._drawn = 0

    def draw(self, wanted: str | None, settings: Settings, seed: float | None, count: int) -> Path:
        """The file of one row of ``count`` pictures with the seeds from ``seed`` on.

        wanted: a class by name or number, or a caption; None and no seed are fields of the page that were emptied.
        Raises UserError.
        """
        if seed is None or seed != int(seed) or not 0 <= seed <= (1 << 31) - MOST_AT_ONCE:
            raise UserError(f"seed {seed}: give a whole number from 0 to {(1 << 31) - MOST_AT_ONCE}")
        opened, captions = self.opened, None
        if opened.gpt.config.condition == "class":
            rows = [class_number((wanted or "").strip(), opened.gpt.classes)]
        else:
            captions, rows = [wanted or ""], [0]
            assert opened.encoder is not None
            opened = replace(opened, conditions=encoded_captions(captions, opened.gpt, opened.encoder))
        pictures = [(int(seed) + number, 0) for number in range(count)]
        asked = drawing.drawing(opened, self.weights, captions, self.text_encoder, rows, pictures, settings, {})
        self._drawn += 1
        path = self.folder / f"{self._drawn:04d}.png"
        drawing.save(path, asked, drawing.page(asked, opened, drawing.draw_tokens(asked, opened)))
        return path


def build(studio: Studio) -> Any:
    """The page, a ``gradio.Blocks`` that is not started yet."""
    gr = gradio()
    by_class = studio.opened.gpt.config.condition == "class"
    codes, free = studio.opened.gpt.config.vocab_size, studio.opened.gpt.config.guidance == "free"

    def draw(*given: Any) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]], str]:
        wanted, cfg, guidance, temperature, top_k, top_p, seed, count, history = given
        # the strength of a scale; a guidance-free GPT takes it as its inverse
        guided: dict[str, Any] = {"beta": 1 / float(cfg)} if free else {"cfg_scale": float(cfg), "guidance": guidance}
        settings = Settings(
            **guided,
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
        )
        try:
            path = studio.draw(wanted, settings, seed, int(count))
        except UserError as error:
            raise gr.Error(str(error)) from None
        words = f"{wanted}: guidance {cfg:g} {guidance}, temperature {temperature:g}, top-k {top_k}, top-p {top_p:g}"
        words += f", seed {seed}"
        history = [(str(path), words), *history]
        return str(path), history, history, str(path)

    with gr.Blocks(title="llamagen", analytics_enabled=False) as page:
        gr.Markdown(f"# {studio.opened.gpt.path.name}")
        with gr.Row():
            with gr.Column():
                if by_class:
                    classes = studio.opened.gpt.classes
                    wanted = gr.Dropdown(classes, value=classes[0], label="Class", allow_custom_value=True)
                else:
                    wanted = gr.Textbox(label="Caption")
                cfg = gr.Slider(1, 20, 2, step=0.1, label="Guidance")
                guidance = gr.Dropdown(
                    list(SCHEDULES), value=SCHEDULES[0], label="Guidance along the image", visible=not free
                )
                top_k = gr.Slider(0, codes, 0, step=1, label="Top-k (0: all codes)")
                top_p = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p")
                temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature (0: greedy)")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed of the first picture")
                count = gr.Slider(1, MOST_AT_ONCE, 4, step=1, label="Pictures")
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=2):
                shown = gr.Image(
                    type="filepath", format="png", label="Picture", interactive=False, buttons=["fullscreen"]
                )
                download = gr.DownloadButton("Download")
                gr.Markdown("The file says how it was made: `llamagen generate --again FILE` draws it again.")
        gallery = gr.Gallery(
            label="History", format="png", columns=2, object_fit="contain", interactive=False, buttons=["fullscreen"]
        )
        history = gr.State([])
        button.click(
            draw,
            [wanted, cfg, guidance, temperature, top_k, top_p, seed, count, history],
            [shown, gallery, history, download],
        )
    return page


def start(studio: Studio, port: int) -> Any:
    """Serve the page on HOST, from a thread; returns the ``gradio.Blocks``. Raises UserError, see ``check_port``."""
    check_port(port)
    gr = gradio()
    page = build(studio)
    page.launch(
        server_name=HOST,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,  # which would want a Node.js
        show_error=True,
        footer_links=[],
        allowed_paths=[str(studio.folder)],
        theme=gr.themes.Base(font=["sans-serif"], font_mono=["monospace"]),  # the default fetches fonts from far away
    )
    return page


def run(opened: drawing.Source, weights: str | None, text_encoder: Path | None, port: int, say: Any = print) -> None:
    """Serve the page until the program is interrupted; its pictures go when it ends."""
    with tempfile.TemporaryDirectory(prefix="llamagen-") as folder:
        page = start(Studio(opened, weights, text_encoder, Path(folder)), port)
        say(f"http://{HOST}:{port}    # Ctrl-C ends it")
        page.block_thread()
