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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llamagen_dist.cli import main
from llamagen_dist.config import load
from llamagen_dist.data.images import load_images
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.report import figures, page, pictures, plots
from llamagen_dist.report.blocks import Figure, ImageGrid, Markdown, Numbers, Panel, Report, Section, Series, literal
from llamagen_dist.report.collect import collect
from llamagen_dist.report.results import results
from tests.unit.quickstart_folder import BATCH, SIZES, TOKENS, make, train_loss
from tests.unit.report_pages import Loaded, described, html, inside, section, series, table, text_of

TABLE = ("div", "table", "thead", "tbody", "tr", "th", "td")
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


def test_the_command_writes_a_small_page_that_fetches_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(out)])
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "results.json")]
    text = (out / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert json.loads((out / "results.json").read_text()) == results(collect(out))
    assert len(text) < 3_000_000
    seen = Loaded(text)
    assert len(seen.fetched) >= 4
    assert all(address.startswith("data:image/") for address in seen.fetched)
    assert not {"script", "link", "iframe", "object", "embed"} & set(seen.tags)
    assert not re.search(r"url\(|@import", text)
    for address in seen.fetched:
        if address.startswith("data:image/svg+xml"):
            svg = base64.b64decode(address.partition(",")[2]).decode()
            assert not re.search(r"(?:href|src)=.(?!#)|<script|<!DOCTYPE|@import", svg)
    for words in ("25.5 dB", "3.0 × 10⁻⁶", "over the first 50 steps", "0123abc", "g560k", "LPIPS"):
        assert words in text, words
    assert "secret-host" not in text
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))


def test_the_same_folder_gives_the_same_bytes(out: Path) -> None:
    assert html(out) == html(out)


def test_what_is_no_python_goes_into_the_wheel() -> None:
    root = Path(__file__).parents[2]
    (line,) = re.findall(r"^llamagen_dist = \[(.*)\]$", (root / "pyproject.toml").read_text(), flags=re.MULTILINE)
    patterns = re.findall(r'"(.+?)"', line)
    packed = {path for pattern in patterns for path in (root / "llamagen_dist").glob(pattern)}
    files = {path for path in (root / "llamagen_dist").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} == packed
    assert (root / "llamagen_dist/report/templates/page.css") in packed


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_rungs(out: Path, count: int) -> None:
    for name in list(SIZES)[count:]:
        shutil.rmtree(out / "ladder" / name)
    summary = collect(out)
    text = html(out)
    assert text.count("Validation loss against parameters") == (count > 1)
    assert len(results(summary)["gpt"]) == 3 * count


def test_names_are_shown_not_run(out: Path) -> None:
    """A run, a stage and a class called like a tag; the twin shows that unescaped text would be caught."""
    (out / "ladder" / "g30k").rename(out / "ladder" / EVIL.replace("/", "|"))
    done = out / "stages" / "pack" / "launch" / "DONE.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"why": EVIL}))
    grid = ImageGrid(np.zeros((1, 4, 4, 3), np.uint8), (EVIL,))
    plot = Figure((Panel(EVIL, (Series(EVIL, np.arange(2.0), np.arange(2.0), label=EVIL),), note=EVIL),), EVIL, EVIL)
    text = Markdown(f"{EVIL} `{EVIL}` {literal(EVIL)}\n\n| {EVIL} | {literal(EVIL)} |\n|---|---|\n| {EVIL} | x |")
    block = Section(EVIL, (grid, text, plot, Numbers(((EVIL, EVIL, EVIL),))), EVIL)
    for shown in (html(out), page.render(Report(EVIL, (block,), EVIL))):
        assert "script" not in Loaded(shown).tags
        assert "&lt;script&gt;" in shown
    assert "script" in Loaded(shown.replace("&lt;", "<").replace("&gt;", ">")).tags
    assert b"<script" not in plots.draw(plot)


def test_links_only_lead_to_the_web_or_down_the_page() -> None:
    text = page.markdown("[a](https://example.org/x?y=1&z=2) [b](javascript:alert(1)) [c](#s1) [d](data:text/html,x)")
    assert Loaded(text).links == ["https://example.org/x?y=1&z=2", "#s1"]


@given(st.text())
def test_literal_text_comes_out_as_it_went_in(text: str) -> None:
    flat = " ".join(text.split())
    shown: list[str] = []
    parser = HTMLParser()
    parser.handle_data = shown.append  # type: ignore[method-assign]
    parser.feed(page.markdown("x " + literal(text)))
    parser.close()
    expected = "".join(c for c in f"x {flat}".strip() if c.isprintable() or c.isspace())
    assert " ".join("".join(shown).split()) == " ".join(expected.split())


@given(st.text(alphabet="-+#=.)1>*_` |x"))
def test_literal_text_begins_neither_a_list_nor_a_heading(text: str) -> None:
    assert set(Loaded(page.markdown("- " + literal(text))).tags) <= {"ul", "li"}
    assert "h2" in Loaded(page.markdown("- # x")).tags, "the twin: not made literal"


@given(st.text())
def test_no_text_becomes_an_element_or_a_foreign_link(text: str) -> None:
    seen = Loaded(page.markdown(text))
    assert set(seen.tags) <= {
        *("p", "ul", "ol", "li", "strong", "em", "code", "pre", "a", "h2", "h3", "h4", "h5", "h6", "br"),
        *TABLE,
    }
    assert all(link.startswith(("https://", "http://", "#")) for link in seen.links)


def test_the_markdown_of_reports() -> None:
    text = "## Head\n\nOne **bold** `a<b`\nline\n\n- first\n- second\n  of two\n\n```sh\ncp <a> b\n```"
    assert page.markdown(text) == (
        "<h3>Head</h3>\n<p>One <strong>bold</strong> <code>a&lt;b</code>\nline</p>\n"
        "<ul>\n<li>first</li>\n<li>second\nof two</li>\n</ul>\n"
        '<pre tabindex="0"><code>cp &lt;a&gt; b</code></pre>'
    )
    assert Loaded(page.markdown("![a](https://example.org/a.png) <img src=x> <b>")).fetched == []


def test_pictures_are_enlarged_with_hard_edges() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), np.uint8)
    text = page.render(Report("t", (ImageGrid(images, ("x",), width=21),)))
    png = base64.b64decode(Loaded(text).fetched[0].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert shown.shape == (30, 42, 3)
    assert (shown == images[0].repeat(6, 0).repeat(6, 1)).all()


def test_the_description_is_json_and_keeps_the_plots_numbers(out: Path) -> None:
    json.dumps(described(out))
    curves = series(inside(section(out, "The ladder"), "figure")[0])
    assert [name for name in curves if "," not in name] == ["g30k", "g130k", "g560k"]
    assert curves["g130k, as logged"]["y"][6] == train_loss("g130k", 7)
    assert curves["g30k, as logged"]["x"][0] == BATCH * TOKENS
    assert table(section(out, "The ladder"))[1][:3] == ["g30k", "30.1 k", f"{train_loss('g30k', 40) + 0.03:.4f}"]


def test_smoothing_keeps_a_straight_line_and_the_mean() -> None:
    line = np.linspace(3.0, 1.0, 41)
    assert figures.smooth(line, 9) == pytest.approx(line)
    spike = np.zeros(41)
    spike[20] = 9.0
    assert figures.smooth(spike, 9)[20] == 1.0
    assert figures.smooth(spike, 9).sum() == pytest.approx(9.0)


def test_a_png_is_drawn_at_twice_its_size() -> None:
    figure = Figure((Panel("y", (Series("a", np.arange(3.0), np.ones(3)),)),), "a line")
    assert Image.open(io.BytesIO(plots.draw(figure, "png"))).size == tuple(2 * side for side in plots.size(figure))


def test_long_runs_are_thinned_out_by_means() -> None:
    x, y = figures.thin(np.arange(1.0, 100_001), np.full(100_000, 2.0))
    assert len(x) < 610
    assert y == pytest.approx(np.full(len(y), 2.0))
    assert x[-1] > 99_000


def with_pictures(out: Path, source: Path) -> np.ndarray:
    """Held-out shards of two classes (2 and 3 images, one called like a tag), and eval.reconstruct's file of them.

    Returns what the file says the tokenizer made of them, uint8 [5, 28, 28, 3]."""
    for label, (name, count) in enumerate({"<b>boot": 2, "coat": 3}.items()):
        (source / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(10 * label + number).integers(0, 256, (28, 28, 3), np.uint8)
            Image.fromarray(pixels).save(source / name / f"{number}.png")
    pack(str(source), out / "images" / "validation", PackOptions(size=28))
    shutil.copytree(out / "images" / "validation", out / "images" / "train")
    rebuilt = np.random.default_rng(7).integers(0, 256, (5, 28, 28, 3), np.uint8)
    (out / "reconstructions").mkdir()
    labels = open_shards(out / "images" / "validation").labels(range(5))
    np.savez(out / "reconstructions" / "reconstruction.npz", arr_0=rebuilt, labels=labels)
    (out / "reconstructions" / "record.json").write_text(json.dumps({"psnr": 21.5}))
    return rebuilt


def rows_of(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tile of 28-pixel images -> its upper and its lower row, uint8 [2, 28, 28, 3]."""
    assert tile.shape == (57, 57, 3)
    upper, lower = ([tile[top : top + 28, left : left + 28] for left in (0, 29)] for top in (0, 29))
    return np.stack(upper), np.stack(lower)


def test_reconstructions_stand_below_their_originals(out: Path, tmp_path: Path) -> None:
    rebuilt = with_pictures(out, tmp_path / "source")
    found = collect(out)
    assert found.reconstructions is not None
    grid = pictures.reconstructions(found.reconstructions, found.held_out)
    assert grid.captions == ("<b>boot", "coat")
    shards = open_shards(out / "images" / "validation")
    labels = shards.labels(range(5)).tolist()
    for label, tile in enumerate(grid.images):
        numbers = [number for number in range(5) if labels[number] == label][:2]
        upper, lower = rows_of(tile)
        assert (upper == load_images(shards, numbers, 28)).all()
        assert (lower == rebuilt[numbers]).all()
        assert not (lower == rebuilt[numbers[::-1]]).all(), "the twin: another order is seen"
    text = html(out)
    assert "&lt;b&gt;boot" in text
    assert "<b>" not in text
    shutil.rmtree(out / "images" / "validation")
    assert "originals are not there" in html(out)
    shutil.rmtree(out / "reconstructions")
    assert "No reconstructions" in html(out)


def test_the_tokenizer_curve_is_the_reconstruction_term_and_says_what_was_off(out: Path) -> None:
    """The sum of all terms falls below zero when the discriminator joins; the drawn term does not."""
    shown = section(out, "The tokenizer")
    drawn = inside(shown, "figure")[0]
    run = collect(out).tokenizer
    assert run is not None
    assert min(series(drawn)["tokenizer, as logged"]["y"]) > 0 > run.points("loss")[1].min()
    assert drawn["events"] == [[4800.0, "discriminator joins"]]
    assert "**perceptual** loss (LPIPS) is off" in text_of(shown)
    assert "adversarial (patchgan, weight 0.5, from image 4,800)" in text_of(shown)
    path = out / "tokenizer" / "config.yaml"
    path.write_text(path.read_text().replace("start_images: 4800", "start_images: 6400"))
    assert "never began: it starts at image 6,400" in html(out)


def test_the_commands_it_shows_are_whole_and_their_settings_load(out: Path) -> None:
    """Every code block is one shell script without a syntax error; its settings fit the config it names."""
    texts = text_of(section(out, "Next steps"))
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
