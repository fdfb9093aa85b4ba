"""The report from a made-up quickstart with known numbers: exact results.json, a page that asks for nothing."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llamagen_dist.cli import main
from llamagen_dist.config import UserError, dump, load
from llamagen_dist.report import html, plots, quickstart
from llamagen_dist.report.blocks import ImageGrid, Markdown, Report, Section, Table, describe, literal
from llamagen_dist.report.collect import collect, results

SIZES = {"g30k": 30_128, "g130k": 131_072, "g560k": 560_640}
TOKENS, BATCH, STEPS = 49, 64, 120
BUDGETS = (40, 80, 120)  # steps with a validation line
EVIL = "<script>alert(1)</script>"


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_loss(name: str, step: int, shift: float = 0.0) -> float:
    """A learning curve with wiggles that are the same in every layout."""
    level = 1.9 - 0.16 * math.log(SIZES[name] / 30_000)
    return level + 3.2 * (step + 2) ** -0.45 + 0.04 * math.sin(12.9898 * step) + shift


def write_run(folder: Path, name: str, tensor: int = 1, apart: float = 0.0) -> None:
    """apart: how far from the ladder's loss at step 7, the largest difference within the first 50 steps."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, STEPS + 1):
        seen = step * BATCH
        noise = apart * (1 if step == 7 else 0.25 * abs(math.sin(step)) if step <= 50 else 1.08 ** (step - 50))
        lines.append({"step": step, "images_seen": seen, "loss": train_loss(name, step, noise), "grad_norm": 1.0, "lr": 1e-3,
                      "images_per_s": 900.0})
        if step in BUDGETS:
            held_out = round(train_loss(name, step) + 0.03 + 8 * apart, 6)
            lines.append({"step": step, "images_seen": seen, "val_loss": held_out, "val_loss_null": held_out + 0.25})
    write_lines(folder / "metrics.jsonl", lines)
    layout = {"ranks": 2, "tensor": tensor, "data": 2 // tensor, "zero": 1}
    (folder / "summary.json").write_text(json.dumps(
        {"images_seen": STEPS * BATCH, "step": STEPS, "seconds": 20.5, "peak_rss_gb": 0.71, "layout": layout, "name": name,
         "params": SIZES[name], "tokens_per_image": TOKENS}))
    (folder / "record.json").write_text(json.dumps(
        {"llamagen_dist": "0.1.0", "torch": "2.14.1", "python": "3.11.9", "host": "secret-host", "cpus": 2,
         "git": {"commit": "0123abc"}, "started": "2026-05-04T10:00:00+0000"}))
    config = load(Path(__file__).parents[2] / "configs/gpt/ladder.yaml", {"run_dir": str(folder), "parallel": {"tensor": tensor}})
    (folder / "config.yaml").write_text(dump(config))


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines: list[dict] = []
    for step in range(1, 201):
        lines.append({"step": step, "images_seen": step * 32, "loss": 0.02 + 0.9 * step**-0.7 * (1 + 0.2 * math.sin(9 * step)),
                      "grad_norm": 0.5, "lr": 1e-3, "images_per_s": 120.0})
        if step % 50 == 0:
            lines.append({"step": step, "images_seen": step * 32, "val_loss": 0.03 + 0.9 * step**-0.7,
                          "psnr": 16.0 + 2 * math.log(step), "ssim": 0.4 + 0.08 * math.log(step), "codebook_usage": 0.875})
    lines[-1] |= {"psnr": 25.5, "ssim": 0.8125}
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "summary.json").write_text(json.dumps(
        {"images_seen": 6400, "step": 200, "seconds": 61.0, "peak_rss_gb": 0.93, "params": 182_340,
         "layout": {"ranks": 2, "tensor": 1, "data": 2, "zero": 0}}))
    (folder / "config.yaml").write_text(f"""
kind: tokenizer
run_dir: {folder}
model: {{channels: 8, channel_multipliers: [1, 1], res_blocks: 1, z_channels: 16, codebook_size: 64, codebook_dim: 4}}
data: {{train: images/train, validation: images/validation, image_size: 28, random_crop: false}}
loss: {{perceptual: none, discriminator: {{start_images: 4800}}}}
train: {{images: 6400, global_batch: 32}}
""")


STAGES = [("pack", "images into shards", 1, 3.25, 0.3), ("tokenizer", "learn to turn images into tokens", 2, 130.5, 0.93),
          ("extract", "every image into tokens, once", 2, 14.0, 0.5), ("ladder", "three GPTs of growing size", 2, 262.0, 0.71),
          ("tp2", "one rung again, split over two ranks", 2, 96.75, 1.375)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quickstart, made once; tests that change it copy it."""
    out = tmp_path_factory.mktemp("quickstart") / "OUT"
    for number, (name, why, ranks, seconds, peak) in enumerate(STAGES):
        folder = out / "stages" / name
        folder.mkdir(parents=True)
        (folder / "DONE.json").write_text(json.dumps(
            {"name": name, "why": why, "seconds": seconds, "started": f"2026-05-04T10:0{number}:00+0000", "peak_rss_gb": peak,
             "ranks": ranks, "module": "llamagen_dist.cli", "config_sha256": "0" * 64}))
    write_tokenizer(out / "tokenizer")
    for name in SIZES:
        write_run(out / "ladder" / name, name)
    write_run(out / "tp2" / "g130k", "g130k", tensor=2, apart=3e-6)
    (out / "tokens" / "train").mkdir(parents=True)
    (out / "tokens" / "train" / "manifest.json").write_text(json.dumps({"kind": "tokens", "vocab_size": 512}))
    return out


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


def test_results_hold_exactly_what_the_runs_wrote(out: Path) -> None:
    found = results(collect(out))
    assert found["tokenizer"] == {"psnr": 25.5, "ssim": 0.8125, "codebook_usage": 0.875}
    expected = [
        {"name": name, "params": SIZES[name], "tokens_seen": step * BATCH * TOKENS,
         "val_loss": round(train_loss(name, step) + 0.03, 6), "layout": {"ranks": 2, "tensor": 1, "data": 2, "zero": 1}}
        for name in ("g30k", "g130k", "g560k") for step in BUDGETS
    ]
    assert found["gpt"] == expected
    assert found["parity"].pop("tp_max_abs_loss_diff") == pytest.approx(3e-6, rel=1e-6)
    assert found["parity"].pop("tp_final_val_loss_diff") == pytest.approx(2.4e-5, rel=1e-6)
    assert found["parity"] == {"steps": 50, "rung": "g130k"}
    assert found["time_s"] == {"pack": 3.25, "tokenizer": 130.5, "extract": 14.0, "ladder": 262.0, "tp2": 96.75}
    assert found["peak_rss_gb"] == 1.375
    assert set(found) == {"tokenizer", "gpt", "parity", "time_s", "peak_rss_gb"}


def test_a_shifted_step_shows_in_the_parity_figure(out: Path) -> None:
    """Sabotage: the split run's log is one step late; agreement must be gone."""
    path = out / "tp2" / "g130k" / "metrics.jsonl"
    lines = lines_of(path)
    losses = [line["loss"] for line in lines if "loss" in line]
    late = iter([losses[0], *losses[:-1]])
    write_lines(path, [line | {"loss": next(late)} if "loss" in line else line for line in lines])
    assert results(collect(out))["parity"]["tp_max_abs_loss_diff"] > 0.05


def test_a_difference_after_step_50_does_not_count_but_one_at_step_50_does(out: Path) -> None:
    path = out / "tp2" / "g130k" / "metrics.jsonl"
    original = lines_of(path)
    for step, expected in ((51, 3e-6), (50, 0.5)):
        changed = [line | {"loss": train_loss("g130k", step) + 0.5} if line["step"] == step and "loss" in line else line
                   for line in original]
        write_lines(path, changed)
        assert results(collect(out))["parity"]["tp_max_abs_loss_diff"] == pytest.approx(expected, rel=1e-6)


def test_steps_that_saw_other_images_are_not_compared(out: Path) -> None:
    path = out / "tp2" / "g130k" / "metrics.jsonl"
    write_lines(path, [line | {"images_seen": line["images_seen"] + 1} for line in lines_of(path)])
    assert "parity" not in results(collect(out))
    assert "no step or validation point in common" in html.render(quickstart.build(collect(out)))


def test_what_is_missing_is_absent_and_the_rest_stays(out: Path) -> None:
    whole = results(collect(out))
    shutil.rmtree(out / "tp2")
    found = results(collect(out))
    assert "parity" not in found
    assert found["gpt"] == whole["gpt"]
    (out / "ladder" / "g30k" / "summary.json").unlink()  # still training: its size is not known yet
    last = results(collect(out))["gpt"][-1]
    assert last == {"name": "g30k", "val_loss": round(train_loss("g30k", 120) + 0.03, 6)}
    for folder in ("tokenizer", "ladder", "tokens"):
        shutil.rmtree(out / folder)
    assert set(results(collect(out))) == {"time_s", "peak_rss_gb"}
    page = html.render(quickstart.build(collect(out)))
    assert "tokenizer learnt" not in page
    for file in (out / "stages").glob("*/DONE.json"):
        file.unlink()
    assert results(collect(out)) == {}
    assert "Nothing has finished yet" in html.render(quickstart.build(collect(out)))


def test_a_half_written_last_line_is_not_there_yet_but_a_broken_one_is_named(out: Path) -> None:
    path = out / "ladder" / "g30k" / "metrics.jsonl"
    text, whole = path.read_text(), results(collect(out))
    path.write_text(text + '{"step": 121, "ima')
    assert results(collect(out)) == whole
    assert len(collect(out).ladder[0].steps) == STEPS
    path.write_text(text.replace('"loss"', '"loss', 1))
    with pytest.raises(UserError, match=r"g30k/metrics.jsonl, line 1: not a metrics line"):
        collect(out)


def test_a_loss_that_is_not_finite_stays_out_of_the_json(out: Path) -> None:
    path = out / "ladder" / "g30k" / "metrics.jsonl"
    write_lines(path, [line | {"val_loss": math.nan} if "val_loss" in line else line for line in lines_of(path)])
    main(["report", str(out)])
    found = json.loads((out / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert [("val_loss" in point) for point in found["gpt"]] == [False] * 3 + [True] * 6
    assert "not finite" in (out / "report.html").read_text()


def test_the_command_writes_a_small_page_that_fetches_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(out)])
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "results.json")]
    page = (out / "report.html").read_text()
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


def test_another_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a quickstart folder"):
        quickstart.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    done = out / "stages" / "pack" / "DONE.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"why": EVIL}))
    grid = ImageGrid(np.zeros((1, 4, 4, 3), np.uint8), (EVIL,))
    block = Section(EVIL, (grid, Table((EVIL,), ((EVIL,),), caption=EVIL), Markdown(f"{EVIL} `{EVIL}` {literal(EVIL)}")))
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
    figures = [b for s in made["blocks"] for c in s.get("blocks", []) for b in c.get("blocks", []) if b["block"] == "figure"]
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
    assert Image.open(io.BytesIO(figure.image)).size == (round(5.2 * 192), round((0.55 + 0.68) * 192))
