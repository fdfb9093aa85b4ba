"""Figures that others published, as points: LlamaGen's FIDs of ImageNet 256 x 256 after 300 epochs."""

from dataclasses import replace
from importlib.resources import files

from llamagen_dist.scaling.points import Points, parse_csv

NAME = "llamagen-fid"
CAVEAT = (
    "every size has the guidance scale that suits it best (2.25, 2.0, 1.75, 1.75, 1.65), so this is no controlled "
    "sweep: the FIDs are of tuned sampling as much as of size; held-out losses make better laws"
)


def fid(grid: int = 24) -> Points:
    """FID (as ``loss``) against all parameters. grid: tokens per side, 24 (five sizes) or 16 (two)."""
    text = (files("llamagen_dist.scaling") / "llamagen_fid.csv").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    chosen = [line.rsplit(",", 2)[0] for line in lines[1:] if line.split(",")[-1] == str(grid)]
    points, _, _ = parse_csv("\n".join([lines[0].rsplit(",", 2)[0], *chosen]), "llamagen_fid.csv")
    return replace(points, metric="FID")
