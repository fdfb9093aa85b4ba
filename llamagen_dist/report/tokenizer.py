"""The tokenizer's section of a report: pictures, measurements, the training curve, which losses were on."""

import numpy as np

from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.report import plots, reconstructions
from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Block, Columns, Figure, Markdown, Section, Table
from llamagen_dist.report.collect import Run, Summary

_MEASURED = (
    ("psnr", "held-out PSNR", "{:.2f} dB"),
    ("ssim", "held-out SSIM", "{:.4f}"),
    ("codebook_usage", "codes in use", "{:.1%}"),
)
_NAMES = {
    ("reconstruction", "l2"): "squared error of pixels in [−1, 1]",
    ("reconstruction", "l1"): "absolute error of pixels in [−1, 1]",
}


def section(s: Summary) -> Section | None:
    run, config = s.tokenizer, s.tokenizer_config
    if run is None:
        return None
    blocks: list[Block] = []
    grid = reconstructions.grid(config, run.folder, s.folder / "images" / "validation") if config else None
    if grid:
        blocks.append(grid)
    else:
        blocks.append(Markdown("No reconstructions: the tokenizer's checkpoint or the held-out images are not there."))
    losses = (Markdown(_losses(config)),) if config else ()
    blocks.append(Columns((_curves(run, config), _facts(run, config))))
    return Section(
        "The tokenizer",
        (*blocks, *losses),
        "A convolutional autoencoder around a codebook: each image becomes a small grid of code numbers, and "
        "these become an image again.",
    )


def _facts(run: Run, config: TokenizerConfigFile | None) -> Table:
    last = run.validation[-1] if run.validation else {}
    rows = [(name, form.format(last[key])) for key, name, form in _MEASURED if key in last]
    if run.params:
        rows.append(("parameters", q.count(run.params)))
    if config:
        codes = f"{q.count(config.model.codebook_size)} × {config.model.codebook_dim} numbers"
        rows += [("codebook", codes), ("images shown", q.count(config.train.images))]
    return Table(
        ("tokenizer", "measured"),
        tuple(rows),
        (1,),
        "PSNR and SSIM: means over held-out images, as 8-bit pictures without padding. Codes in use: share "
        "of the codebook that occurs at all among them."
        if last
        else "",
    )


def _curves(run: Run, config: TokenizerConfigFile | None) -> Figure:
    """The reconstruction term where it was logged: the sum of all jumps when the discriminator joins."""
    part = "reconstruction" if all("reconstruction" in line for line in run.training) else "loss"
    squared = config is not None and config.loss.reconstruction == "l2" and part == "reconstruction"
    held_out = run.validation if squared else ()  # validation measures the squared error, whatever is trained
    curve = plots.Curve(
        _NAMES.get((part, config.loss.reconstruction if config else ""), f"tokenizer {part}"),
        run.images_seen.astype(float),
        np.array([line[part] for line in run.training], float),
        np.array([p["images_seen"] for p in held_out], float),
        np.array([p["val_loss"] for p in held_out], float),
    )
    psnr = [(float(p["images_seen"]), float(p["psnr"])) for p in run.validation if "psnr" in p]
    events = []
    gan = config.loss.discriminator if config else None
    if config and gan and gan.kind != "none" and gan.weight and gan.start_images < config.train.images:
        events.append((float(gan.start_images), "discriminator joins"))
    return plots.tokenizer_curves(curve, psnr, events)


def _losses(config: TokenizerConfigFile) -> str:
    """Which parts of the objective (paper section 2.2) were on, and why the others were not."""
    loss, total = config.loss, config.train.images
    on = [f"reconstruction ({loss.reconstruction}, weight {loss.reconstruction_weight:g})"]
    on += [
        f"{name} (weight {weight:g})"
        for name, weight in (
            ("codebook", loss.codebook_weight),
            ("commitment", loss.commitment_weight),
            ("entropy", loss.entropy_weight),
        )
        if weight
    ]
    off = []
    if loss.perceptual == "lpips" and loss.perceptual_weight:
        on.append(f"perceptual (LPIPS, weight {loss.perceptual_weight:g})")
    else:
        off.append(
            "- The **perceptual** loss (LPIPS) is off: it needs VGG16 weights trained on ImageNet, which are "
            "not part of this package. With a local copy, set `loss.perceptual=lpips` and "
            "`loss.vgg16_weights=PATH`. Without it, reconstructions come out smoother than they could."
        )
    gan = loss.discriminator
    if gan.kind == "none" or not gan.weight:
        off.append("- The **adversarial** loss is off (`loss.discriminator.kind=none`).")
    elif gan.start_images >= total:
        off.append(
            f"- The **adversarial** loss never began: it starts at image {q.count(gan.start_images)}, "
            f"and training ended at {q.count(total)}."
        )
    else:
        on.append(f"adversarial ({gan.kind}, weight {gan.weight:g}, from image {q.count(gan.start_images)})")
    return "\n\n".join(["### Which losses were on", f"On: {', '.join(on)}.", *(["\n".join(off)] if off else [])])
