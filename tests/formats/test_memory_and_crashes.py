"""Loading holds only one copy of the weights. A save that is killed at any moment is complete or has no effect."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from fastgpt2 import GPT2
from fastgpt2.checkpoint import hf_state_dict, load_pretrained, save_nanogpt, save_pretrained
from fastgpt2.cli import main
from tests.formats.helpers import assert_same, write_folder
from tests.helpers import TINY, random_model


def status(field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def load_and_measure(big: Path, tiny: Path, results: Connection) -> None:
    """Measure, in a separate process, the peak memory that loading `big` adds, and the size of its weights."""
    load_pretrained(tiny)  # so that what loading imports is not counted
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    model = load_pretrained(big)
    results.send((status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters())))


@pytest.fixture(scope="module")
def large_model() -> GPT2:
    """A model of 205 MB, half of which are token embeddings."""
    return GPT2(
        TINY.replace(vocab_size=50257, hidden_size=512, num_layers=8, context_length=256, activation_function="gelu")
    )


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("form", ["safetensors", "bin", "nanogpt"])
def test_loading_holds_one_copy(
    tmp_path: Path, seed: int, large_model: GPT2, form: str, forkserver: BaseContext
) -> None:
    save_pretrained(random_model(seed), tmp_path / "tiny")
    if form == "nanogpt":
        save_nanogpt(large_model, tmp_path / "big")
    else:
        write_folder(tmp_path / "big", hf_state_dict(large_model), large_model.config, form=form)
    ours, theirs = forkserver.Pipe()
    process = forkserver.Process(target=load_and_measure, args=(tmp_path / "big", tmp_path / "tiny", theirs))
    process.start()
    theirs.close()
    peak, size = ours.recv()
    process.join()
    assert size > 190e6
    assert size <= peak <= 1.35 * size, f"peak {peak / size:.2f} x the weights"


def save_in_turns(models: list[GPT2], folder: Path, ready: Event) -> None:
    ready.set()
    while True:
        for model in models:
            save_pretrained(model, folder)


def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path, seed: int, forkserver: BaseContext) -> None:
    """A process that saves two models by turns is killed at random moments. The file then holds one of them."""
    models = [random_model(s, vocab_size=3000, hidden_size=128) for s in (1, 2)]
    save_pretrained(models[0], tmp_path)
    delays = torch.rand(4, generator=torch.Generator().manual_seed(seed)) * 0.2
    for delay in delays.tolist():
        ready = forkserver.Event()
        process = forkserver.Process(target=save_in_turns, args=(models, tmp_path, ready))
        process.start()
        ready.wait()
        time.sleep(delay)
        process.kill()
        process.join()
        loaded = load_pretrained(tmp_path)
        equal = [i for i, m in enumerate(models) if all(map(torch.equal, loaded.parameters(), m.parameters()))]
        assert len(equal) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are POSIX's")
@pytest.mark.parametrize("form", ["hf", "nanogpt"])
def test_a_full_disk_while_converting_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, seed: int, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    save_pretrained(random_model(seed, activation_function="gelu"), tmp_path / "in")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file can grow beyond this, as on a full disk
    try:
        status = main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", form])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert status == 2
    assert f"fastgpt2: {tmp_path / 'out'}: the weights cannot be written: " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(seed)
    save_pretrained(model, tmp_path)
    files = sorted(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(random_model(seed + 1), tmp_path)
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == files
    assert_same(load_pretrained(tmp_path), model)
