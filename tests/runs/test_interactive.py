"""llamagen generate --interactive: the page is used in Chromium as a person would, and what it gives is drawn again."""

import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamagen_dist import cli
from llamagen_dist.errors import UserError
from llamagen_dist.sampling import demo, drawing
from llamagen_dist.sampling.pictures import Settings
from llamagen_dist.sampling.png_record import read_record
from tests.runs.chromium import browser
from tests.runs.sampling_work import make_work

WAIT = 60_000  # ms; the machine may be busy


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("interactive"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((demo.HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def studio(work, tmp_path) -> demo.Studio:
    opened = drawing.open_source(work / "gpt", None, None, None, None, either=True)
    return demo.Studio(opened, None, None, tmp_path)


@pytest.fixture
def tab(studio) -> Any:
    """The page in Chromium, and every address that it asks for."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    port = free_port()
    with browser() as chromium:
        page = demo.start(studio, port)
        try:
            found = chromium.new_page(viewport={"width": 1280, "height": 1400})
            found.asked = []
            found.on("request", lambda request: found.asked.append(request.url))
            found.goto(f"http://{demo.HOST}:{port}")
            yield found
        finally:
            page.close()


def draw(tab: Any, name: str, **numbers: str) -> None:
    tab.get_by_label("Class", exact=True).fill(name)
    tab.get_by_label("Class", exact=True).press("Enter")
    for label, value in numbers.items():
        tab.get_by_label(label).first.fill(value)
        tab.get_by_label(label).first.press("Tab")
    tab.get_by_role("button", name="Draw", exact=True).click()


@pytest.mark.long  # gradio takes ten seconds to load
def test_the_page_draws_keeps_a_history_and_gives_pictures_that_can_be_drawn_again(work, tab, tmp_path, capsys):
    draw(tab, "class 2", Seed="5")
    tab.locator(".thumbnail-item").first.wait_for(timeout=WAIT)
    with tab.expect_download(timeout=WAIT) as download:
        tab.get_by_role("button", name="Download", exact=True).click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    record, _ = read_record(saved)
    assert (record["names"], record["pictures"]) == (["class 2"], [[5, 0], [6, 0], [7, 0], [8, 0]])
    words = ["--class", "2", "--seeds", "5-8", "--out", f"{tmp_path}/line.png"]
    cli.main(["generate", str(work / "gpt"), *words])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "line.png")), np.asarray(Image.open(saved)))
    cli.main(["generate", "--again", str(saved)])
    assert "pixel by pixel" in capsys.readouterr().out
    draw(tab, "class 2", Seed="6")
    tab.wait_for_function("document.querySelectorAll('.thumbnail-item').length === 2", timeout=WAIT)
    other, _ = read_record(tmp_path / "0002.png")
    assert other["pictures"][0] == [6, 0]
    assert other["pixels_sha256"] != record["pixels_sha256"], "the twin: another seed, another picture"
    draw(tab, "klass 1")
    toast = tab.get_by_text("class 'klass 1' is unknown; did you mean").first
    toast.wait_for(timeout=WAIT)
    assert not [url for url in tab.asked if not url.startswith((f"http://{demo.HOST}", "data:", "blob:"))]


def test_what_the_page_cannot_do_is_one_sentence_on_the_command_line(work, monkeypatch, tmp_path):
    words = ["generate", str(work / "gpt"), "--interactive"]
    with socket.socket() as taken:
        taken.bind((demo.HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setitem(sys.modules, "gradio", sys)  # any module will do: the port is looked at first
        with pytest.raises(
            UserError, match=rf"--port {port}: cannot be used \(Address already in use\); choose another"
        ):
            cli.main([*words, "--port", port])
    monkeypatch.setattr(demo, "run", lambda opened, weights, encoder, port: None)
    cli.main([*words, "--port", port])  # the twin: the port is free now
    for more, sentence in (
        (["--port", "70000"], "--port 70000: give 1 or more, at most 65535"),
        (["--cfg", "3"], "--cfg: is set on the page"),
        (["--out", "x.png"], "--out: the page has a button"),
    ):
        with pytest.raises(UserError, match=sentence):
            cli.main([*words, *more])
    with pytest.raises(UserError, match="--port: belongs to --interactive"):
        cli.main(["generate", str(work / "gpt"), "--class", "0", "--out", "x.png", "--port", "7000"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"--interactive needs gradio: pip install 'llamagen-dist\[demo\]'"):
        cli.main(words)


def test_fields_that_were_emptied_and_numbers_that_the_page_lets_through_are_refused(studio):
    for seed in (-1.0, 0.5, float(1 << 31), None):
        with pytest.raises(UserError, match="give a whole number from 0 to 2147483632"):
            studio.draw("0", Settings(), seed, 1)
    with pytest.raises(UserError, match="class '' is unknown"):
        studio.draw(None, Settings(), 0, 1)
