"""The page of a made-up quickstart: it fetches nothing, shows names as text and pictures as they are."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llamagen_dist.build import build_vq
from llamagen_dist.cli import main
from llamagen_dist.config import dump, load
from llamagen_dist.data.images import load_images
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.models.vq import VQModel, to_uint8
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.report import html, plots, quickstart, reconstructions
from llamagen_dist.report.blocks import ImageGrid, Markdown, Report, Section, Table, describe, literal
from llamagen_dist.report.collect import collect, results
from tests import checkpoints as store
from tests.unit.quickstart_folder import BATCH, SIZES, TOKENS, make, train_loss

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quickstart, made once; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("quickstart") / "OUT"
    make(folder)
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "OUT"))


class Loaded(HTMLParser):
    """Everything a browser would fetch, and every element it would make."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"an event handler: {name}"
            if name in ("src", "srcset", "data", "poster", "background") or (name == "href" and tag != "a"):
                self.fetched.append(value or "")
            elif name == "href":
                self.links.append(value or "")


def test_the_command_writes_a_small_page_that_fetches_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(out)])
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "results.json")]
    page = (out / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert json.loads((out / "results.json").read_text()) == results(collect(out))
    assert len(page) < 3_000_000
    seen = Loaded(page)
    assert len(seen.fetched) >= 5
    assert all(address.startswith("data:image/") for address in seen.fetched)
    assert not {"script", "link", "iframe", "object", "embed"} & set(seen.tags)
    assert not re.search(r"url\(|@import", page)
    for address in seen.fetched:
        if address.startswith("data:image/svg+xml"):
            svg = base64.b64decode(address.partition(",")[2]).decode()
            assert not re.search(r"(?:href|src)=.(?!#)|<script|<!DOCTYPE|@import", svg)
    for text in ("25.5 dB", "3.0 × 10⁻⁶", "over the first 50 steps", "0123abc", "g560k", "LPIPS"):
        assert text in page, text
    assert "secret-host" not in page
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))


def test_the_same_folder_gives_the_same_bytes(out: Path) -> None:
    assert html.render(quickstart.build(collect(out))) == html.render(quickstart.build(collect(out)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_rungs(out: Path, count: int) -> None:
    for name in list(SIZES)[count:]:
        shutil.rmtree(out / "ladder" / name)
    summary = collect(out)
    page = html.render(quickstart.build(summary))
    assert page.count("Validation loss against parameters") == (count > 1)
    assert len(results(summary)["gpt"]) == 3 * count


def test_names_are_shown_not_run(out: Path) -> None:
    """A run, a stage and a class called like a tag; the twin shows that unescaped text would be caught."""
    (out / "ladder" / "g30k").rename(out / "ladder" / EVIL.replace("/", "|"))
    done = out / "stages" / "pack" / "launch" / "DONE.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"why": EVIL}))
    grid = ImageGrid(np.zeros((1, 4, 4, 3), np.uint8), (EVIL,))
    block = Section(
        EVIL, (grid, Table((EVIL,), ((EVIL,),), caption=EVIL), Markdown(f"{EVIL} `{EVIL}` {literal(EVIL)}"))
    )
    for page in (html.render(quickstart.build(collect(out))), html.render(Report(EVIL, (block,), EVIL))):
        assert "script" not in Loaded(page).tags
        assert "&lt;script&gt;" in page
    assert "script" in Loaded(page.replace("&lt;", "<").replace("&gt;", ">")).tags


def test_links_only_lead_to_the_web_or_down_the_page() -> None:
    page = html.markdown("[a](https://example.org/x?y=1&z=2) [b](javascript:alert(1)) [c](#s1) [d](data:text/html,x)")
    assert Loaded(page).links == ["https://example.org/x?y=1&z=2", "#s1"]


@given(st.text())
def test_literal_text_comes_out_as_it_went_in(text: str) -> None:
    flat = " ".join(text.split())
    shown: list[str] = []
    parser = HTMLParser()
    parser.handle_data = shown.append  # type: ignore[method-assign]
    parser.feed(html.markdown("x " + literal(text)))
    parser.close()
    expected = "".join(c for c in f"x {flat}".strip() if c.isprintable() or c.isspace())
    assert " ".join("".join(shown).split()) == " ".join(expected.split())


@given(st.text())
def test_no_text_becomes_an_element_or_a_foreign_link(text: str) -> None:
    seen = Loaded(html.markdown(text))
    assert set(seen.tags) <= {"p", "ul", "li", "strong", "code", "pre", "a", "h3", "h4", "h5"}
    assert all(link.startswith(("https://", "http://", "#")) for link in seen.links)


def test_the_markdown_subset() -> None:
    text = "## Head\n\nOne **bold** `a<b`\nline\n\n- first\n- second\n  goes on\n\n```sh\ncp <a> b\n```"
    assert html.markdown(text) == (
        "<h3>Head</h3><p>One <strong>bold</strong> <code>a&lt;b</code> line</p>"
        "<ul><li>first</li><li>second goes on</li></ul>"
        '<pre class="scroll" tabindex="0"><code>cp &lt;a&gt; b</code></pre>'
    )


def test_pictures_are_enlarged_with_hard_edges() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), np.uint8)
    page = html.render(Report("t", (ImageGrid(images, ("x",), width=21),)))
    png = base64.b64decode(Loaded(page).fetched[0].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert shown.shape == (30, 42, 3)
    assert (shown == images[0].repeat(6, 0).repeat(6, 1)).all()


def test_the_description_is_json_and_keeps_the_plots_numbers(out: Path) -> None:
    made = json.loads(json.dumps(describe(quickstart.build(collect(out)))))
    figures = [
        b for s in made["blocks"] for c in s.get("blocks", []) for b in c.get("blocks", []) if b["block"] == "figure"
    ]
    ladder = next(f for f in figures if "curves" in f["data"])
    assert [curve["name"] for curve in ladder["data"]["curves"]] == ["g30k", "g130k", "g560k"]
    assert ladder["data"]["curves"][1]["loss"][6] == train_loss("g130k", 7)
    assert ladder["data"]["curves"][0]["x"][0] == BATCH * TOKENS


def test_smoothing_keeps_a_straight_line_and_the_mean() -> None:
    line = np.linspace(3.0, 1.0, 41)
    assert plots.smooth(line, 9) == pytest.approx(line)
    spike = np.zeros(41)
    spike[20] = 9.0
    assert plots.smooth(spike, 9)[20] == 1.0
    assert plots.smooth(spike, 9).sum() == pytest.approx(9.0)


def test_a_png_is_drawn_at_twice_its_size() -> None:
    figure = plots.bars(["a", "b"], [1.0, 2.0], ["1 s", "2 s"], "time", format="png")
    assert Image.open(io.BytesIO(figure.image)).size == (round(4.7 * 192), round((0.55 + 0.68) * 192))


def with_pictures(out: Path, source: Path) -> VQModel:
    """Held-out shards of two classes (2 and 3 images, one called like a tag) and a tokenizer's checkpoint."""
    for label, (name, count) in enumerate({"<b>boot": 2, "coat": 3}.items()):
        (source / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(10 * label + number).integers(0, 256, (28, 28, 3), np.uint8)
            Image.fromarray(pixels).save(source / name / f"{number}.png")
    pack(str(source), out / "images" / "validation", PackOptions(size=28))
    config = load(out / "tokenizer" / "config.yaml")
    torch.manual_seed(0)
    model = build_vq(config.model).eval()
    entries = [replicated("weights", name, tensor) for name, tensor in model.state_dict().items()]
    store.save(out / "tokenizer", 200, entries, {}, Topology(), config_text=dump(config))
    return model


def rows_of(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tile of 28-pixel images -> its upper and its lower row, uint8 [2, 28, 28, 3]."""
    assert tile.shape == (57, 57, 3)
    upper, lower = ([tile[top : top + 28, left : left + 28] for left in (0, 29)] for top in (0, 29))
    return np.stack(upper), np.stack(lower)


def test_reconstructions_stand_below_their_originals(out: Path, tmp_path: Path) -> None:
    model = with_pictures(out, tmp_path / "source")
    shards = open_shards(out / "images" / "validation")
    grid = reconstructions.grid(load(out / "tokenizer" / "config.yaml"), out / "tokenizer", shards.folder)
    assert grid is not None
    assert grid.captions == ("<b>boot", "coat")
    labels = shards.labels(range(5)).tolist()
    for label, tile in enumerate(grid.images):
        numbers = [number for number in range(5) if labels[number] == label][:2]
        originals = load_images(shards, numbers, 28)
        upper, lower = rows_of(tile)
        assert (upper == originals).all()
        floats = torch.from_numpy(originals).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            expected = to_uint8(model.decode(model.encode(floats))).permute(0, 2, 3, 1).numpy()
        assert np.abs(lower.astype(int) - expected.astype(int)).max() <= 1  # batches may round differently
        assert np.abs(lower.astype(int) - np.roll(expected, 1, axis=0).astype(int)).max() > 1  # twin: swapped
    page = html.render(quickstart.build(collect(out)))
    assert "&lt;b&gt;boot" in page
    assert "<b>" not in page


def test_a_damaged_tokenizer_is_named_not_shown(out: Path, tmp_path: Path) -> None:
    with_pictures(out, tmp_path / "source")
    weights = next((out / "tokenizer" / "checkpoints").glob("step_*/weights-*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="every checkpoint there is damaged"):
        quickstart.write(out)
    assert not (out / "report.html").exists()


def test_the_tokenizer_curve_is_the_reconstruction_term_and_says_what_was_off(out: Path) -> None:
    """The sum of all terms falls below zero when the discriminator joins; the drawn term does not."""
    blocks = describe(quickstart.build(collect(out)))["blocks"]
    section = next(b for b in blocks if b.get("title") == "The tokenizer")
    columns = next(b for b in section["blocks"] if b["block"] == "columns")
    drawn = columns["blocks"][0]["data"]
    assert min(drawn["loss"]) > 0 > collect(out).tokenizer.loss.min()  # type: ignore[union-attr]
    assert drawn["events"] == [[4800.0, "discriminator joins"]]
    text = section["blocks"][-1]["text"]
    assert "**perceptual** loss (LPIPS) is off: it needs VGG16" in text
    assert "adversarial (patchgan, weight 0.5, from image 4,800)" in text
    path = out / "tokenizer" / "config.yaml"
    path.write_text(path.read_text().replace("start_images: 4800", "start_images: 6400"))
    assert "never began: it starts at image 6,400" in html.render(quickstart.build(collect(out)))


def test_the_commands_it_shows_are_whole_and_their_settings_load(out: Path) -> None:
    """Every code block is one shell script without a syntax error; its settings fit the config it names."""
    texts = describe(quickstart.build(collect(out)))["blocks"][-1]["blocks"][0]["text"]
    scripts = re.findall(r"^```sh\n(.*?)^```$", texts, flags=re.MULTILINE | re.DOTALL)
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
    for script in scripts[1:3]:
        path = re.search(r"CONFIG=(\S+)", script)
        assert path is not None
        settings = re.findall(r"(?<![\w-])(?:run_dir|parallel\.\w+|model\.\w+)=[\w/.]+", script)
        config = load(path[1], settings, kind="gpt")
        assert (config.parallel.tensor, config.model.n_layer, config.model.dim) == (2, 4, 64)
    assert f"llamagen report {out}" in scripts[3]
