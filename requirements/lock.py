"""Renew the pinned versions: `python requirements/lock.py [--upgrade]`; needs uv (`pip install uv`).

It reads `requirements/chosen.txt`, the versions that are chosen by hand, and writes two files:

- `requirements/locked.txt`: every package that `fastgpt2` and its extras need, transitive ones too, with the hashes of
  PyPI's files, for Python 3.10 and newer on every platform. Only `--upgrade` replaces versions that it already has.
- `constraints.txt`: the same versions without hashes, for `make`. PyTorch has several builds of one version (CUDA,
  ROCm, CPU). Their files differ, so hashes would allow only one of them.

The extras `eval` and `peers` are left out: they install other projects' programs, for which we promise nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKED = ROOT / "requirements/locked.txt"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("bench", "data", "dev", "docs", "hub", "lora", "plot", "tensorboard", "transformers", "triton", "wandb")
HEAD = """\
# Written by requirements/lock.py: the tested version of every package that this project needs.
"""
# PyTorch for GPUs pins a version of Triton. With PyTorch for CPUs, the newest tested version is installed.
TRITON = "triton>=3.7.1,<=3.9.0 ; sys_platform == 'linux'"


def constraints_of(locked: str) -> str:
    """The text of constraints.txt, made from that of locked.txt."""
    pins = re.findall(r"^([a-z0-9][^\s=]*==[^\\\n]*?) *\\?$", locked, re.MULTILINE)
    lines = [pin for pin in pins if not pin.startswith("triton==")]
    return HEAD + "\n".join(sorted([*lines, TRITON])) + "\n"


def main() -> None:
    options = ["--universal", "--python-version=3.10", "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
    files = ["--constraint=requirements/chosen.txt", f"--output-file={LOCKED}", "pyproject.toml"]
    extras = [f"--extra={extra}" for extra in EXTRAS]
    subprocess.run(["uv", "pip", "compile", *options, *extras, *sys.argv[1:], *files], check=True, cwd=ROOT)
    CONSTRAINTS.write_text(constraints_of(LOCKED.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
