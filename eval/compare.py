"""PROGRAM: put results of eval.evaluate side by side, if they were measured alike.

    python -m eval.compare A.json B.json [C.json ...]

Another extractor, resize, number of images or reference makes another metric of the same name: such results are
refused, with the difference. How the pictures were drawn (weights, guidance, seed) may differ and is shown.
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamagen_dist.console import aligned
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.passport import settings
from llamagen_dist.evaluation.record import VALUES, common, differences, read_result
from llamagen_dist.program import run as run_program


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise UserError("usage: python -m eval.compare A.json B.json [C.json ...]")
    results = [read_result(Path(name)) for name in argv]
    shared = common(*results)
    if not shared:
        known = [f"{name}: {', '.join(result['sets']) or 'none'}" for name, result in zip(argv, results, strict=True)]
        every = "both" if len(argv) == 2 else "all"
        raise UserError(f"no set with a metric in {every} ({'; '.join(known)}); evaluate the same sets in {every}")
    differing: list[str] = []
    for name, other in zip(argv[1:], results[1:], strict=True):
        if lines := differences(results[0], other, shared):
            differing += [f"{argv[0]} and {name} were not measured alike:", *lines]
    if differing:
        raise UserError("\n".join(differing))
    letters = [_letter(number) for number in range(len(argv))]
    for letter, name in zip(letters, argv, strict=True):
        print(f"{letter}: {name}")
    print(results[0]["record"]["bias"])
    for line in sorted({line for result in results for line in _known_mistakes(result, shared)}):
        print(line)
    chosen = [settings(result) for result in results]
    keys = dict.fromkeys(key for one in chosen for key in one)
    apart = [key for key in keys if len({one.get(key) for one in chosen}) > 1]
    if apart:
        print("what differs:")
        print(aligned([(key, *(one.get(key, "-") for one in chosen)) for key in apart], left=1 + len(argv)))
    two = len(argv) == 2
    rows = [("set", "metric", *letters, *(["B - A"] if two else []))]
    for name, metrics in shared.items():
        for key in (key for metric in metrics for key in VALUES[metric]):
            values = [float(result["sets"][name][key]) for result in results]
            change = [f"{values[1] - values[0]:+.4g}"] if two else []
            rows.append((name, key, *(f"{value:.6g}" for value in values), *change))
    print(aligned(rows, left=2))


def _letter(number: int) -> str:
    """A, B … Z, A2, B2 …"""
    turn, letter = divmod(number, 26)
    return string.ascii_uppercase[letter] + (str(turn + 1) if turn else "")


def _known_mistakes(result: Mapping[str, Any], shared: Mapping[str, Any]) -> list[str]:
    known = result["record"].get("mistakes", ())
    return [f"MISTAKE in {one['set']}: {one['mistake']}: {one['what']}" for one in known if one["set"] in shared]


if __name__ == "__main__":
    run_program(main)
