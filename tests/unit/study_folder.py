"""A finished scaling study: what the stages fit to advise of configs/pipeline/scaling.yaml write."""

from pathlib import Path

import numpy as np

from llamagen_dist.cli import main
from tests.unit.scaling_points import chinchilla


def make(out: Path) -> Path:
    """By the commands themselves, of five sizes at three budgets with a known law and some scatter."""
    out.mkdir()
    random, lines = np.random.default_rng(0), ["run,params,tokens,loss"]
    for number, n in enumerate(np.geomspace(2e7, 6e8, 5)):
        for flops in (1e18, 3e18, 1e19):
            d = flops / (6 * n)
            measured = float(chinchilla(n, d)) * np.exp(0.002 * random.standard_normal())
            lines.append(f"size-{number},{n:.0f},{d:.0f},{measured:.6f}")
    (out / "runs.csv").write_text("\n".join(lines) + "\n")
    runs = str(out / "runs.csv")
    main(["scaling", "fit", runs, "--hold-out", "largest", "--out", str(out / "held-out.json")])
    main(["scaling", "fit", runs, "--out", str(out / "scaling.json")])
    main(["scaling", "isoflop", runs, "--at", "1e20", "--out", str(out / "isoflop.json")])
    words = ["--budget", "1e20", "--unit", "flops", "--gpu", "h100", "--unique-images", "1281167"]
    main(["scaling", "advise", str(out / "scaling.json"), *words, "--out", str(out / "advice.json")])
    return out
