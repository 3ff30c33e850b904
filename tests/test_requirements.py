"""Every package is pinned, and locked.txt (with hashes) and constraints.txt pin the same versions."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = runpy.run_path(str(ROOT / "requirements/lock.py"))
LOCKED = (ROOT / "requirements/locked.txt").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PYTHONS = ("3.10.14", "3.11.9", "3.12.4", "3.13.1")


def requirements(text: str) -> list[Requirement]:
    lines = (line.rstrip("\\ ") for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("#", " "))]


def pins(text: str, python: str) -> dict[str, Requirement]:
    """The pins that apply to a Python version on Linux x86-64, by package name."""
    environment = {**default_environment(), "sys_platform": "linux", "platform_machine": "x86_64"}
    environment |= {"platform_system": "Linux", "os_name": "posix", "platform_python_implementation": "CPython"}
    environment |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    found: dict[str, Requirement] = {}
    for requirement in requirements(text):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} has two versions for Python {python}"
            found[name] = requirement
    return found


def declared() -> list[Requirement]:
    """The requirements of the package and of the extras that are locked."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^([\w-]+) = (\[\n(?:  .*\n)*\]|\[.*\])$", text.split("[project.scripts]")[0], re.MULTILINE)
    names = {"dependencies", *LOCK["EXTRAS"]}
    assert names <= {name for name, _ in lists}
    return [Requirement(r) for name, list_ in lists if name in names for r in re.findall(r'"([^"]+)"', list_)]


def test_constraints_are_the_locked_versions() -> None:
    assert LOCK["constraints_of"](LOCKED) == CONSTRAINTS


def test_every_locked_package_has_hashes_and_one_version() -> None:
    blocks = re.split(r"\n(?=\w)", LOCKED)
    assert len(blocks) > 100
    for block in blocks:
        assert re.fullmatch(r"[\w.-]+==[^\\\n]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", block), block[:200]
    assert "://" not in LOCKED + CONSTRAINTS, "the files must not name any package index"


def test_what_is_chosen_is_locked() -> None:
    chosen = (ROOT / "requirements/chosen.txt").read_text(encoding="utf-8")
    for python in PYTHONS:
        locked = pins(LOCKED, python)
        for name, requirement in pins(chosen, python).items():
            assert locked[name].specifier == requirement.specifier, f"{name} for {python}"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("text", [LOCKED, CONSTRAINTS], ids=["locked", "constraints"])
def test_everything_that_is_asked_for_is_pinned(text: str, python: str) -> None:
    found = pins(text, python)
    for requirement in declared():
        pinned = found[canonicalize_name(requirement.name)].specifier
        version = next(iter(pinned)).version
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {pinned}"


def test_what_is_installed_here_needs_nothing_that_is_not_pinned() -> None:
    """Requirements are followed from the package and its extras through every installed package."""
    environment = default_environment()
    waiting = [r for r in declared() if r.marker is None or r.marker.evaluate({**environment, "extra": ""})]
    pinned, seen = {canonicalize_name(r.name) for r in requirements(CONSTRAINTS)}, set[str]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no line in constraints.txt"
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # its extra is not installed
            continue
        extras = requirement.extras or {""}
        waiting += [
            r for r in map(Requirement, needs)
            if r.marker is None or any(r.marker.evaluate({**environment, "extra": extra}) for extra in extras)
        ]  # fmt: skip
    assert {"torch", "numpy", "pytest", "triton"} <= seen


def test_make_installs_what_is_pinned() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"-m pip install .*", makefile)
    assert len(commands) == 3
    assert all("-c constraints.txt" in command for command in commands)
