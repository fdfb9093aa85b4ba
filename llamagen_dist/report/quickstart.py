"""The report of a quickstart: what was run, what came out, what it cost, how to go on."""

import json
import math
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text
from llamagen_dist.report import advice, html, samples, scaling, scores, sections, tokenizer
from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Markdown, Number, Numbers, Report, literal
from llamagen_dist.report.collect import Run, Summary, collect, results


def write(out: Path, page: Path | None = None) -> tuple[Path, Path]:
    """Write OUT/report.html (or ``page``) and OUT/results.json; returns both paths.

    Raises UserError if OUT is no quickstart folder or a file in it is damaged; then nothing is written.
    """
    summary = collect(out)
    text = html.render(build(summary))
    page, numbers = page or out / "report.html", out / "results.json"
    try:
        write_text(page, text)
        write_text(numbers, json.dumps(results(summary), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be written ({error.strerror}); choose another --out or free the disk"
        ) from None
    return page, numbers


def build(summary: Summary) -> Report:
    """Blocks from what is there; a part that was not run is named, not invented."""
    made = [
        part(summary)
        for part in (
            sections.stages,
            tokenizer.section,
            sections.ladder,
            samples.section,
            scores.section,
            scaling.section,
            sections.parity,
            sections.cost,
            advice.environment,
            advice.go_on,
        )
    ]
    return Report(
        summary.title or "Images to tokens to a ladder of Llamas",
        (_headline(summary), _numbers(summary), *(section for section in made if section is not None)),
        _subtitle(summary),
    )


def _subtitle(s: Summary) -> str:
    record = next((run.record for run in (s.tokenizer, *s.ladder) if run and run.record), {})
    parts = [
        f"llamagen-dist {record['llamagen_dist']}" if "llamagen_dist" in record else None,
        f"{record['cpus']} CPU cores" if "cpus" in record else None,
        str(record.get("started", ""))[:10] or None,
    ]
    return " · ".join(part for part in parts if part)


def _headline(s: Summary) -> Markdown:
    known = results(s)
    text = []
    if "tokenizer" in known:
        t = known["tokenizer"]
        quality = ", ".join(
            part
            for part in (
                f"PSNR **{t['psnr']:.1f} dB**" if "psnr" in t else "",
                f"SSIM **{t['ssim']:.3f}**" if "ssim" in t else "",
            )
            if part
        )
        text.append(
            f"A tokenizer learnt to turn images into tokens and back ({quality} on held-out images)."
            if quality
            else "A tokenizer learnt to turn images into tokens and back."
        )
    best = _best(s)
    if best:
        run, loss = best
        many = f"{len(s.ladder)} GPTs" if len(s.ladder) > 1 else "one GPT"
        size = f" with {q.count(run.params)} parameters" if run.params else ""
        text.append(
            f"On its tokens {many} trained; the best, {literal(run.name)}{size}, reaches a held-out loss of "
            f"**{q.loss(loss)} nats** per token."
        )
    found = known.get("eval", {})
    if "fid" in found and "fid_real" in found:
        text.append(
            f"Its samples score FID **{found['fid']:.1f}**, real held-out images **{found['fid_real']:.1f}** "
            f"(from {found['n']:,} images a side, too few to compare with published figures)."
        )
    law = known.get("scaling", {})
    if law:
        band = law.get("ci95")
        held = band and band[0] <= law["measured"] <= band[1]
        text.append(
            f"A scaling law fitted to the smaller models foretold **{law['predicted']:.3f}** for the largest"
            f"{_after(law)}; it came to **{law['measured']:.3f}**"
            + (f", {'inside' if held else 'outside'} the law's band." if band else ".")
        )
    if s.parity and s.parity.max_abs_loss_diff is not None:
        text.append(
            "The same training split over tensor-parallel ranks agrees within "
            f"**{q.small(s.parity.max_abs_loss_diff)} nats** over {sections.window(s.parity)}."
        )
    seconds = sum(known.get("time_s", {}).values())
    if seconds:
        text.append(f"All of it took **{q.duration(seconds)}**.")
    return Markdown(" ".join(text) or "Nothing has finished yet.")


def _numbers(s: Summary) -> Numbers:
    known = results(s)
    items = []
    t = known.get("tokenizer", {})
    if "psnr" in t:
        usage = f", {t['codebook_usage']:.0%} of the codes in use" if "codebook_usage" in t else ""
        items.append(
            Number("Tokenizer PSNR", f"{t['psnr']:.1f} dB", f"SSIM {t['ssim']:.3f}{usage}" if "ssim" in t else "")
        )
    sizes = [run.params for run in s.ladder if run.params]
    if sizes:
        ends = (
            f"{q.count(sizes[0])} to {q.count(sizes[-1])} parameters"
            if len(sizes) > 1
            else f"{q.count(sizes[0])} parameters"
        )
        items.append(Number("GPTs trained", str(len(s.ladder)), ends))
    best = _best(s)
    if best:
        guess = f"; guessing blindly {math.log(s.vocab_size):.2f}" if s.vocab_size else ""
        items.append(Number("Best held-out loss", f"{best[1]:.3f}", f"nats per token, {best[0].name}{guess}"))
    items += _scores(known)
    if s.parity and s.parity.max_abs_loss_diff is not None:
        items.append(
            Number(
                "Split against whole",
                q.small(s.parity.max_abs_loss_diff),
                f"nats, largest loss difference over {sections.window(s.parity)}",
            )
        )
    if known.get("time_s"):
        items.append(
            Number("Wall-clock time", q.duration(sum(known["time_s"].values())), f"{len(known['time_s'])} stages")
        )
    if "peak_rss_gb" in known:
        items.append(Number("Peak memory", q.gigabytes(known["peak_rss_gb"]), "largest single process"))
    return Numbers(tuple(items))


def _scores(known: dict[str, Any]) -> list[Number]:
    """FID between what it can be at best and at worst; the law's word against the measurement."""
    items = []
    found = known.get("eval", {})
    if "fid" in found:
        anchors = (("fid_real", "real images"), ("rfid", "tokenizer alone"), ("fid_untrained", "untrained"))
        parts = [f"{name} {found[key]:.1f}" for key, name in anchors if key in found]
        items.append(Number("FID of the samples", f"{found['fid']:.1f}", "; ".join([*parts, f"N = {found['n']:,}"])))
    if "class_agreement" in found:
        real = f"; of real images {found['class_agreement_real']:.0%}" if "class_agreement_real" in found else ""
        items.append(
            Number("Class recognised", f"{found['class_agreement']:.0%}", f"of the samples, by a classifier{real}")
        )
    law = known.get("scaling", {})
    if law:
        band = "95% band {:.3f} to {:.3f}; ".format(*law["ci95"]) if "ci95" in law else ""
        items.append(
            Number(
                "Loss foretold for the largest",
                f"{law['predicted']:.3f}",
                f"{band}measured {law['measured']:.3f}{_after(law)}",
            )
        )
    return items


def _after(law: dict[str, Any]) -> str:
    return f" after {q.count(law['tokens'])} tokens" if "tokens" in law else ""


def _best(s: Summary) -> tuple[Run, float] | None:
    """The rung with the lowest last held-out loss."""
    last = [(run, run.validation[-1]["val_loss"]) for run in s.ladder if run.validation]
    return min((pair for pair in last if math.isfinite(pair[1])), key=lambda pair: pair[1], default=None)
