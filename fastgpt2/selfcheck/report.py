"""What a self-check found: plain data, which `fastgpt2 check` prints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    backend: what computed it. share: the largest error as a share of its budget; None where results must be equal.
    detail: what was compared, what went wrong, or why it was left out.
    """

    name: str
    backend: str
    status: Status
    share: float | None
    detail: str


@dataclass(frozen=True)
class Timing:
    """One operator's time at one size, in seconds of one call.

    limit_share: of what this device was measured to do, by bytes or by matrix products, whichever binds. tflops and
    gbps: of what has to be computed, and read and written, at least. peer_seconds: of PyTorch's way, `peer`.
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
    """The findings of a self-check, and the machine that they are of.

    limits: bytes a second of a copy, and FLOP/s of a matrix product by dtype, measured in the same run.
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
        """Everything as plain values, for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}
