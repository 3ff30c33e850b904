"""Files that are written atomically get the permissions that the umask leaves."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt2.checkpoint import load_pretrained, save_nanogpt
from fastgpt2.cli.main import main
from fastgpt2.files import atomic_file, create_file, link_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def expected(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set a umask, and return the mode that every new file must have."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}


@pytest.mark.filterwarnings("ignore:save_nanogpt")
def test_every_file_of_a_checkpoint_has_the_mode_that_the_umask_says(expected, tiny_checkpoint, tmp_path) -> None:
    model = load_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "new")
    save_nanogpt(model, tmp_path / "nano")
    # The same holds if the new files replace older ones with another mode.
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    for path in (tmp_path / "old").iterdir():
        path.chmod(0o400)
    model.save_pretrained(tmp_path / "old")
    found = modes(tmp_path)
    assert {"model.safetensors", "config.json", "tokenizer.json", "ckpt.pt"} <= found.keys()
    for folder in ("new", "nano", "old"):
        assert {name: oct(mode) for name, mode in modes(tmp_path / folder).items() if mode != expected} == {}


def test_every_file_of_an_output_has_the_mode_that_the_umask_says(expected, tiny_checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "out.csv"
    arguments = ["--model", str(tiny_checkpoint), "--out", str(out), "--max-new-tokens", "2", "--num-samples", "2"]
    assert main(["generate", "x", "--keep-best", "1", *arguments]) == 0
    with atomic_file(tmp_path / "whole") as file:
        file.write(b"x")
    create_file(tmp_path / "created", b"x")
    link_file(tmp_path / "whole", tmp_path / "linked")
    found = modes(tmp_path)
    assert {"out.csv", "out.all.jsonl", "out.all.jsonl.run.json", "whole", "created", "linked"} == found.keys()
    assert {name: oct(mode) for name, mode in found.items() if mode != expected} == {}
