"""Every command and public function refuses bad inputs in one clear sentence, and changes nothing.

The files in tests/hostile/ list the inputs and the errors.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastgpt2
from fastgpt2.cli.main import main
from fastgpt2.cli.parser import COMMANDS
from tests.hostile import checkpoint_commands, generate_commands, library, other_commands, train_commands, zoo
from tests.hostile.library import MODEL

LIBRARY = {
    "configuration": library.CONFIGURATION,
    "models": library.MODELS,
    "loss": library.LOSS,
    "operators": library.OPERATORS,
    "generation": library.GENERATION,
    "files": library.FILES,
}
COMMAND_LINES = {
    "generate": generate_commands.GENERATE,
    "score": other_commands.SCORE,
    "select": other_commands.SELECT,
    "train": train_commands.TRAIN,
    "plot": other_commands.PLOT,
    "eval": other_commands.EVAL,
    "check": other_commands.CHECK,
    "warmup": other_commands.WARMUP,
    "info": checkpoint_commands.INFO,
    "convert": checkpoint_commands.CONVERT,
    "no command": other_commands.NONE,
}
# Extreme inputs that are valid, so the exit status is 0.
DEFINED = [
    *(
        f"generate x --model model --max-new-tokens 2 {option}"
        for option in (
            "--temperature 1e-300", "--temperature 1e300", "--temperature 0", f"--top-k {10**30}", "--top-p 1e-46",
            "--top-p 1e-320", "--min-p 1", "--repetition-penalty 1e300", "--repetition-penalty 1e-300",
            f"--no-repeat-ngram-size {10**30}", f"--batch-size {10**11}", f"--seed {2**64 - 1}",
        )
    ),
    f"generate x --model model --max-new-tokens {10**30}",
    "generate --prompts zeros.txt --model model --max-new-tokens 1",
    "generate x --model nanogpt --max-new-tokens 1",
]  # fmt: skip
CASES = {name: case for cases in LIBRARY.values() for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_sentence(name):
    call, kind, sentence = CASES[name]
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700


def test_there_are_enough_of_them():
    """There are at least this many cases of each kind, and in all."""
    least = {
        "generate": 140,
        "train": 120,
        "score": 55,
        "select": 40,
        "info": 45,
        "convert": 40,
        "plot": 15,
        "eval": 12,
    }
    least |= {"check": 6, "warmup": 14, "no command": 5}
    least |= {"configuration": 20, "models": 18, "loss": 18, "operators": 12, "generation": 20, "files": 4}
    there = {name: len(cases) for name, cases in (COMMAND_LINES | LIBRARY).items()}
    assert {*COMMANDS, "no command"} == COMMAND_LINES.keys()
    assert {name: there[name] for name in least if there[name] < least[name]} == {}
    assert sum(there.values()) >= 600
    assert sum(map(len, COMMAND_LINES.values())) >= 300


@pytest.fixture(scope="module")
def bad_files(tiny_checkpoint, tmp_path_factory) -> Path:
    if sys.platform == "win32":
        pytest.skip("links and pipes are POSIX's")
    folder = tmp_path_factory.mktemp("zoo")
    zoo.build(folder, tiny_checkpoint)
    return folder


@pytest.fixture
def in_the_zoo(bad_files, monkeypatch) -> Iterator[None]:
    """Make the zoo the current folder. The command may not change a file in it, or take longer than 60 s."""
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(sys, "stdin", None)  # as Python sets it if it was closed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = contents(bad_files)

    def too_long(number: int, frame: object) -> None:
        raise AssertionError("took longer than 60 s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert contents(bad_files) == before, "made or changed a file before the arguments were checked"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and modification time of every file, and zeros for every folder."""
    found = {}
    for parent, folders, files in os.walk(folder):
        found |= {os.path.join(parent, name): (0, 0) for name in folders}
        for name in files:
            stat = os.lstat(os.path.join(parent, name))
            found[os.path.join(parent, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


def status_of(line: str) -> object:
    try:
        return main(shlex.split(line))
    except SystemExit as end:  # argparse ends this way
        return end.code


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        pytest.param(line, sentence, id=line if len(line) < 80 and line.isascii() else f"{kind} {number}")
        for kind, lines in COMMAND_LINES.items()
        for number, (line, sentence) in enumerate(lines.items())
    ],
)
def test_the_command_line_says_it_in_one_line_and_exits_with_2(line, sentence, in_the_zoo, capfd):
    assert status_of(line) == 2
    said = capfd.readouterr()
    assert said.err.startswith(f"fastgpt2: {sentence}")
    assert said.err.count("\n") == 1
    assert len(said.err) < 3000
    assert said.out in ("", "x")  # the prompt x may have been printed already


@pytest.mark.parametrize("line", DEFINED)
def test_extremes_that_have_a_result(line, in_the_zoo, capfd):
    assert status_of(line) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_prompts_without_an_end(in_the_zoo, capfd, monkeypatch):
    """The uncompressed size of a compressed file is limited."""
    monkeypatch.setattr("fastgpt2.cli.generate._MOST_PROMPT_BYTES", 1000)
    for name in ("bomb.txt.gz", "blank.jsonl.gz", "bomb.fasta.gz", "bomb.csv.gz", "blank.csv.gz"):
        assert status_of(f"generate --prompts {name} --model model") == 2
        assert capfd.readouterr().err == f"fastgpt2: {name}: must hold at most 1,000 bytes; it has more: split it\n"


def broken_config(folder: Path) -> str:
    MODEL.save_pretrained(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    return "not a JSON file"


def no_weights(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(MODEL.config.to_hf()), encoding="utf-8")
    return "has a config.json but no weights"


def torn_weights(folder: Path) -> str:
    MODEL.save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return "not a readable safetensors file"


def other_sizes(folder: Path) -> str:
    MODEL.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MODEL.config.replace(vocab_size=12).to_hf()), encoding="utf-8")
    return "transformer.wte.weight is (11, 8) in the file and (12, 8) in the configuration"


@pytest.mark.parametrize("spoil", [broken_config, no_weights, torn_weights, other_sizes])
def test_spoilt_checkpoints(spoil, tmp_path):
    sentence = spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)) as caught:
        fastgpt2.GPT2.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_that_are_not_there(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["generate", "x", "--device", device]) == 2
    assert capsys.readouterr().err == (
        f"fastgpt2: device must be one that this machine has; got {device}: use auto, cpu\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_not_there_is_one_sentence(error, capsys, monkeypatch):
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr("fastgpt2.cli.info.run", run)
    assert main(["info"]) == 2
    said = "fastgpt2: there is not enough memory for this; use a smaller model, batch or context\n"
    assert capsys.readouterr().err == said


def test_more_memory_than_there_is(tiny_checkpoint, capsys):
    """`main` recognizes the real message of an allocator that runs out of memory."""
    text = tiny_checkpoint / "config.json"
    # More than a process can address, because some machines promise more memory than they have.
    for option, value in (("--batch-size", 10**14), ("--context", 2**31 - 1)):
        out = tiny_checkpoint.parent / f"no-memory{option}"
        arguments = ["train", "--data", str(text), "--out", str(out), "--steps", "1", "--vocab-size", "257"]
        sizes = [
            "--layers",
            "1",
            "--hidden-size",
            "65536" if option == "--context" else "16",
            "--context",
            "8",
            "--dtype",
            "fp32",
        ]
        status = main([*arguments, *sizes, option, str(value)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert status == 2
        assert "there is not enough memory" in error


def test_an_interruption_while_modules_load_is_no_traceback(capsys, monkeypatch):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "fastgpt2: interrupted\n"
