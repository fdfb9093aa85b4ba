"""What the vendors' data sheets say of the GPUs we plan for: peak rates (dense, no sparsity) and memory.

Data sheets: NVIDIA A100 (2021), H100 SXM (2023), H200 SXM (2024). None of it was measured here.
"""

import difflib
from dataclasses import dataclass

from llamagen_dist.errors import UserError

GIB = 1024**3


@dataclass(frozen=True)
class Device:
    """memory: bytes a program sees (a little under the name's figure). peaks: FLOP/s of dense matrix products by
    precision; ``fp32`` is the plain rate, since torch leaves TF32 off for matrix products."""

    name: str
    memory: int
    peaks: dict[str, float]


DEVICES: dict[str, Device] = {
    "A100-40": Device("A100-40", int(39.4 * GIB), {"bf16": 312e12, "fp32": 19.5e12}),
    "A100-80": Device("A100-80", int(79.1 * GIB), {"bf16": 312e12, "fp32": 19.5e12}),
    "H100": Device("H100", int(79.1 * GIB), {"bf16": 989.4e12, "fp32": 66.9e12}),
    "H200": Device("H200", int(139.7 * GIB), {"bf16": 989.4e12, "fp32": 66.9e12}),
}


def named(text: str) -> Device:
    """A name of DEVICES (any case), or ``custom:MEMORY_GIB:PEAK_TFLOPS``. Raises UserError."""
    if text.lower().startswith("custom:"):
        return _custom(text)
    for name, device in DEVICES.items():
        if text.lower() == name.lower():
            return device
    near = difflib.get_close_matches(text.upper(), DEVICES, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? Known" if near else "known"
    raise UserError(
        f"--gpu {text}: unknown; {hint}: {', '.join(DEVICES)}, or custom:MEMORY_GIB:PEAK_TFLOPS (custom:80:312)"
    )


def _custom(text: str) -> Device:
    try:
        memory, peak = (float(part) for part in text.split(":")[1:])
        if not (0 < memory < 1e6 and 0 < peak < 1e9):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--gpu {text}: write custom:MEMORY_GIB:PEAK_TFLOPS with two positive numbers, for example custom:80:312"
        ) from None
    # one figure for any precision: whoever gives it knows which one the run uses
    return Device(text, int(memory * GIB), {"bf16": peak * 1e12, "fp32": peak * 1e12})


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of the device that torch calls ``device_name`` (``NVIDIA H100 80GB HBM3``), or None where unknown.

    PCIe, NVL and other variants have other rates than the SXM cards of the table: unknown.
    """
    words = device_name.upper().replace("-", " ").split()
    if any(mark in words for mark in ("PCIE", "NVL", "GH200", "MIG")):
        # A100 PCIe and SXM share their peak rates; H100's differ
        return DEVICES["A100-80"].peaks.get(precision) if "A100" in words and "MIG" not in words else None
    for word, device in (("A100", "A100-80"), ("H100", "H100"), ("H200", "H200")):
        if word in words:
            return DEVICES[device].peaks.get(precision)
    return None
