"""PROGRAM: put two results of eval.evaluate side by side, if they were measured alike.

    python -m eval.compare A.json B.json

Another extractor, resize, number of images or reference makes another metric of the same name: such results are
refused, with the difference.
"""

from pathlib import Path

from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.record import VALUES, common, differences, read_result
from llamagen_dist.program import run as run_program


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("usage: python -m eval.compare A.json B.json")
    a, b = (read_result(Path(name)) for name in argv)
    shared = common(a, b)
    if not shared:
        known = [f"{name}: {', '.join(result['sets']) or 'none'}" for name, result in zip(argv, (a, b), strict=True)]
        raise UserError(f"no set with a metric in both ({'; '.join(known)}); evaluate the same sets in both")
    differing = differences(a, b)
    if differing:
        raise UserError("\n".join([f"{argv[0]} and {argv[1]} were not measured alike:", *differing]))
    rows = [("set", "metric", "A", "B", "B - A")]
    for name, metrics in shared.items():
        for key in (key for metric in metrics for key in VALUES[metric]):
            left, right = float(a["sets"][name][key]), float(b["sets"][name][key])
            rows.append((name, key, f"{left:.6g}", f"{right:.6g}", f"{right - left:+.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    print(f"A: {argv[0]}\nB: {argv[1]}\n{a['record']['bias']}")
    for row in rows:
        words = [
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(words).rstrip())


if __name__ == "__main__":
    run_program(main)
