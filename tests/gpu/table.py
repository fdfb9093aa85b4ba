"""The one table that ``make gpu-check`` prints, to be pasted into an issue."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Row:
    """One finding. ok: None where there is nothing to pass or fail."""

    check: str
    setting: str
    found: str
    wanted: str = ""
    ok: bool | None = None

    @property
    def verdict(self) -> str:
        return "" if self.ok is None else "ok" if self.ok else "FAIL"


def below(check: str, setting: str, found: float, limit: float) -> Row:
    """A difference that must stay under a limit; NaN fails."""
    return Row(check, setting, f"{found:.1e}", f"< {limit:.0e}", found < limit)


def lines(rows: Sequence[Row]) -> list[str]:
    """Aligned plain text, a heading first."""
    cells = [("", "check", "setting", "found", "wanted")]
    cells += [(r.verdict, r.check, r.setting, r.found, r.wanted) for r in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def environment(device: str) -> list[str]:
    """What the figures were made with: device names and memory, versions."""
    import torch

    if device == "cuda":
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        where = "; ".join(f"{p.name} ({p.total_memory / 2**30:.1f} GiB)" for p in names)
        where += f"; CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    else:
        where = f"CPU, {torch.get_num_threads()} threads"
    return [f"device: {where}", f"versions: {versions()}"]


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "deepspeed", "megatron-core", "llamagen-dist"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
