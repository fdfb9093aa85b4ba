"""What eval.tokenizers measured: the table, every score against the probe's FID, and how far the agreement goes."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from llamagen_dist.console import aligned
from llamagen_dist.report.blocks import Figure, Panel, Section, Series, literal
from llamagen_dist.report.figures import share
from llamagen_dist.report.text import section as from_template

_SCORES = {
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ssim_llamagen": ("SSIM, range 2", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "lpips-hed": ("lpips-hed", "{:.4f}"),
    "lpips-custom": ("lpips-custom", "{:.4f}"),
    "rfid": ("rFID", "{:.2f}"),
    "pfid": ("pFID", "{:.2f}"),
    "codebook_usage": ("usage", "{:.1%}"),
    "codebook_perplexity": ("perplexity", "{:.1f}"),
    "bits_per_pixel": ("bits/px", "{:.4f}"),
    "entropy_bits_per_pixel": ("entropy bits/px", "{:.4f}"),
}
_SPEED = {
    "encode_images_per_s": ("encode/s", "{:.0f}"),
    "decode_images_per_s": ("decode/s", "{:.0f}"),
    "encode_cpu_s_per_image": ("encode CPU ms", "{:.2f}"),
    "decode_cpu_s_per_image": ("decode CPU ms", "{:.2f}"),
}
_DRAWN = ("psnr", "ssim", "lpips", "lpips-hed", "lpips-custom", "rfid", "pfid", "codebook_perplexity")
_CHANCE = 0.05


def section(content: Mapping[str, Any]) -> Section:
    """content: of results.json."""
    made = from_template(
        "tokenizers", parts(content), SimpleNamespace(tokenizers=content), SimpleNamespace(**facts(content))
    )
    assert made is not None
    return made


def parts(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"curves": figure(content) if content["probe"] else None}


def facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the template says: the rows of the three tables, and the verdict."""
    rows = table(content)
    return {
        "heads": rows[0],
        "rows": [[literal(name), *cells] for name, *cells in rows[1:]],
        "agreement": _agreement(content),
        "verdict": verdict(content),
    }


def table(content: Mapping[str, Any]) -> list[list[str]]:
    """Head and a row for each tokenizer, best probe first; a score that none has is no column."""
    every = content["tokenizers"]
    scores = {key: words for key, words in _SCORES.items() if any(key in one for one in every.values())}
    heads = ["tokenizer", "quantizer", "codes", "tokens", *(name for name, _ in scores.values())]
    heads += [name for name, _ in _SPEED.values()]
    if content["probe"]:
        heads += ["probe FID", "probe loss"]
    lines = []
    for name, one in sorted(every.items(), key=lambda item: item[1].get("probe", {}).get("fid", 0.0)):
        cells = [name, one["quantizer"], f"{one['codes']:,}", f"{one['tokens']:,}"]
        cells += [form.format(one[key]) if key in one else "–" for key, (_, form) in scores.items()]
        for key, (_, form) in _SPEED.items():
            cells.append(form.format(one["speed"][key] * (1000 if "cpu" in key else 1)))
        if content["probe"]:
            losses = [seed["val_loss"] for seed in one["probe"]["seeds"].values()]
            cells += [_fid(one["probe"]), f"{np.mean(losses):.3f}"]
        lines.append(cells)
    return [heads, *lines]


def _fid(probe: Mapping[str, Any]) -> str:
    return f"{probe['fid']:.2f}" + ("" if probe["fid_sd"] is None else f" ± {probe['fid_sd']:.2f}")


def _agreement(content: Mapping[str, Any]) -> list[list[str]]:
    """Score, Spearman and Kendall with their p-values; the best agreement first."""
    known = sorted(content["correlations"].items(), key=lambda item: -item[1]["spearman"])
    return [
        [
            _SCORES[score][0],
            f"{one['spearman']:+.2f}",
            f"{one['spearman_p']:.4f}",
            f"{one['kendall']:+.2f}",
            f"{one['kendall_p']:.4f}",
        ]
        for score, one in known
    ]


def verdict(content: Mapping[str, Any]) -> str:
    """What the correlations can say, and what they cannot."""
    known = content["correlations"]
    if not content["probe"]:
        return "Without a probe nothing says which score to trust."
    if not known:
        return "Fewer than three tokenizers, or scores that are all the same: there is no order to compare."
    best = max(known, key=lambda score: known[score]["spearman"])
    n, names = known[best]["n"], [_SCORES[s][0] for s, one in known.items() if one["spearman_p"] < _CHANCE / len(known)]
    text = (
        f"{_SCORES[best][0]} orders the {n} tokenizers most as the probe's FID does (Spearman "
        f"{known[best]['spearman']:+.2f}). "
    )
    tried = f"of {len(known)} scores at once, at 5 % in all (Bonferroni)"
    text += f"Beyond chance, {tried}: {', '.join(names) or 'none'}."
    if content["noise_share"] is not None:
        text += f" {content['noise_share']:.0%} of the variance of the probes' FIDs lies between seeds."
    return text


def figure(content: Mapping[str, Any]) -> Figure:
    """Every score against the FID of the probe, a colour for each tokenizer and a point for each seed."""
    every = sorted(content["tokenizers"].items(), key=lambda item: item[1].get("probe", {}).get("fid", 0.0))
    shown = [score for score in _DRAWN if all(score in one for _, one in every)]
    if not content["probe"]:
        shown = shown[:1]
    panels = []
    for number, score in enumerate(shown):
        series = []
        for rank, (name, one) in enumerate(every):
            seeds = one["probe"]["seeds"].values() if content["probe"] else ()
            fids = sorted(seed["fid"] for seed in seeds) or [float(rank)]
            x, y = np.array(fids, np.float64), np.full(len(fids), one[score], np.float64)
            series.append(Series(name, x, y, "dotted line", share(rank, len(every)), "" if number else name))
        known = content["correlations"].get(score)
        note = "" if known is None else f" (ρ {known['spearman']:+.2f}, p {known['spearman_p']:.3f})"
        panels.append(Panel(_SCORES[score][0] + note, tuple(series)))
    names = ", ".join(_SCORES[score][0] for score in shown)
    caption = (
        "A colour for each tokenizer, a point for each seed of its probe. ρ: Spearman's rank correlation with the FID, "
        "+1 where the better score goes with the lower FID."
    )
    if not content["probe"]:
        return Figure(tuple(panels), names, ticks=tuple(name for name, _ in every))
    return Figure(
        tuple(panels), f"{names} against the FID of the probe", "FID of the probe's pictures", caption=caption
    )


def terminal(content: Mapping[str, Any]) -> str:
    """Both tables and the verdict as plain text."""
    blocks = [aligned(table(content), left=2)]
    if rows := _agreement(content):
        blocks.append(aligned([["score", "Spearman", "p", "Kendall", "p"], *rows]))
    return "\n\n".join([*blocks, verdict(content)])
