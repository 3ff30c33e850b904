"""The results of a self-check as plain data, which `fastgpt2 check` prints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        backend: The backend that computed it.
        status: "ok", "failed" or "skipped".
        share: The largest error as a share of its budget. None if nothing was compared with a budget, for example
            because the results must be equal, or if the error is not finite.
        detail: What was compared, what went wrong, or why the check was skipped.
    """

    name: str
    backend: str
    status: Status
    share: float | None
    detail: str


def error_finding(name: str, backend: str, place: str, error: Exception, status: Status = "failed") -> Finding:
    """The finding of a check that an error ended."""
    sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return Finding(name, backend, status, None, f"{place}: {sentence}" if place else sentence)


@dataclass(frozen=True)
class Timing:
    """The time of one operator at one size.

    Attributes:
        name: The operator.
        backend: The backend that was timed.
        size: The sizes as text, such as "N=8192 C=768 with backward".
        dtype: The dtype of the tensors.
        seconds: Seconds per call.
        tflops: TFLOP/s, counting the least arithmetic that is needed; None if there are no matrix products.
        gbps: GB/s, counting the least memory traffic that is needed.
        limit_share: The least time that the device's measured bandwidth and matrix products allow, as a share of
            `seconds`.
        peer: The name of PyTorch's version of the operator.
        peer_seconds: Seconds per call of PyTorch's version.
    """

    name: str
    backend: str
    size: str
    dtype: str
    seconds: float
    tflops: float | None
    gbps: float | None
    limit_share: float
    peer: str
    peer_seconds: float


@dataclass
class Report:
    """The results of a self-check, and the machine that it ran on.

    Attributes:
        versions: The versions of Python and packages.
        device: The machine.
        findings: The results of the checks.
        limits: The measured bandwidth in bytes per second, and FLOP/s of matrix products by dtype.
        timings: The times of the kernels.
        seconds: How long everything took.
    """

    versions: dict[str, str]
    device: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}
