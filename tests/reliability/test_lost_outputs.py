"""A file that `generate` or `score` wrote is halved, emptied or removed. The run resumes to the same output, or is
refused in one sentence. No record is lost or written twice."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastgpt2.cli import main
from tests.helpers import without_rounding
from tests.reliability.test_lost_files import HOWS, spoil

SHARES = 3
COMMANDS = {
    "generate": "generate --prompts {texts} --num-samples 2 --max-new-tokens 6",
    # Enough sequences that each share has more than one group. They are short, so scoring takes an instant.
    "score": "score {texts}",
}
COUNTS = {"generate": 6, "score": 520}
# Output files, with further options. The last one makes the command write all records, and a selection of them.
OUTPUTS = {"out.jsonl": "", "out.fasta": "", "out.txt": "", "chosen.fasta": "--max-length 9999"}


@dataclass
class Run:
    """A command, and the folder that it writes to."""

    arguments: list[str]
    folder: Path
    output: str

    def start(self, *more: str) -> tuple[int, str]:
        """Begin or resume the run. Return its exit status and its stderr."""
        said = io.StringIO()
        arguments = [*self.arguments, "--out", str(self.folder / self.output), "--resume", *more]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return main(arguments), said.getvalue()

    def start_shares(self) -> tuple[int, str]:
        """Run the shares' processes one after the other, until one fails. Return the last one's status and stderr."""
        for share in range(SHARES):
            status, said = self.start("--shard", f"{share}/{SHARES}")
            if status:
                break
        return status, said

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    @property
    def records(self) -> list[Path]:
        """The files that hold records."""
        return sorted(path for path in self.folder.iterdir() if path.suffix != ".json" and "chosen.f" not in path.name)

    def whole_lines(self) -> Counter[bytes]:
        return Counter(line for path in self.records for line in path.read_bytes().split(b"\n")[:-1])


def stop_early(run: Run, shares: bool, rng: random.Random) -> None:
    """Leave the files as a process does that is killed while it writes."""
    if shares:
        for share in rng.sample(range(SHARES), SHARES - 1):
            assert run.start("--shard", f"{share}/{SHARES}")[0] == 0
    else:
        assert run.start()[0] == 0
        (run.folder / "chosen.fasta").unlink(missing_ok=True)
    path = rng.choice([path for path in run.records if path.stat().st_size])
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(1, len(data))])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_lost_a_file_goes_on_or_says_so(command: str, tiny_checkpoint: Path, tmp_path: Path, seed) -> None:
    """Every file of one kind of output is damaged once, in one of three ways."""
    rng = random.Random(seed)
    _check(command, [rng.choice(list(OUTPUTS))], tiny_checkpoint, tmp_path, lambda: [rng.choice(HOWS)], rng)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_lost_a_file_in_any_way_goes_on_or_says_so(
    command: str, tiny_checkpoint: Path, tmp_path: Path, seed: int
) -> None:
    _check(command, list(OUTPUTS), tiny_checkpoint, tmp_path, lambda: list(HOWS), random.Random(seed))


def _check(
    command: str, outputs: list[str], checkpoint: Path, tmp_path: Path, hows: Callable[[], list[str]],
    rng: random.Random,
) -> None:  # fmt: skip
    texts = tmp_path / "texts.jsonl"
    name = "prompt" if command == "generate" else "text"
    rows = ({name: f"def f{i}(x{'y' * rng.randint(0, 9)}):"} for i in range(COUNTS[command]))
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = [*COMMANDS[command].format(texts=texts).split(), "--model", str(checkpoint), "--device", "cpu"]
    for output in outputs:
        run = Run([*base, *OUTPUTS[output].split()], tmp_path / "whole", output)
        run.folder.mkdir()
        assert run.start()[0] == 0
        whole = run.contents()
        for shares in (False, True):
            stopped = Run(run.arguments, tmp_path / "stopped", output)
            stopped.folder.mkdir()
            stop_early(stopped, shares, rng)
            for path in sorted(stopped.folder.iterdir()):
                for how in hows():
                    _check_file(stopped, path.name, how, shares, whole)
            for path in sorted(run.folder.iterdir()):
                for how in hows():
                    _check_file(run, path.name, how, shares, whole)
            shutil.rmtree(stopped.folder)
        shutil.rmtree(run.folder)


def _check_file(run: Run, name: str, how: str, shares: bool, whole: dict[str, bytes]) -> None:
    """Damage a file in a copy of the run's folder, resume, and check what comes out."""
    case = Run(run.arguments, run.folder.with_name("case"), run.output)
    shutil.rmtree(case.folder, ignore_errors=True)
    shutil.copytree(run.folder, case.folder)
    spoil(case.folder / name, how)
    before, lines = case.contents(), case.whole_lines()
    status, said = case.start_shares() if shares else case.start()
    what = f"{run.folder.name} {name} {how} {'shares' if shares else ''}: {said}"
    after = case.contents()
    if status == 0:
        assert after.keys() == whole.keys(), what
        wrong = [n for n in whole if without_rounding(after[n]) != without_rounding(whole[n])]
        assert not wrong, f"{what}: these files differ at the end: {wrong}"
    else:
        assert status == 2, what
        sentence = said.splitlines()[-1]
        assert sentence.startswith("fastgpt2: "), what
        assert name in sentence, what
        assert lines <= case.whole_lines(), f"{what}: records were lost"
        assert {n: after.get(n) for n in before if n.endswith(".json")} == {
            n: data for n, data in before.items() if n.endswith(".json")
        }, f"{what}: settings were changed"
    assert not [n for n in after if n.startswith(".")], f"{what}: temporary files are left over"


@pytest.mark.parametrize("shares", [False, True])
def test_records_without_their_settings_are_not_mixed_with_those_of_another_run(
    shares: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Without its settings, nothing shows that the records have another seed."""
    texts = tmp_path / "texts.txt"
    texts.write_text("def\nclass\nimport\n", encoding="utf-8")
    run = Run(["generate", "--prompts", str(texts), "--model", str(tiny_checkpoint)], tmp_path / "run", "out.jsonl")
    run.folder.mkdir()
    assert run.start("--seed", "1", "--shard", "0/3")[0] == 0
    (run.folder / "out.jsonl.run.json").unlink()
    before = {name: data for name, data in run.contents().items() if data}
    status, said = run.start("--seed", "2", *(["--shard", "1/3"] if shares else []))
    assert status == 2
    assert said.splitlines()[-1].startswith("fastgpt2: ")
    assert "out.jsonl.run.json with its settings is missing" in said
    assert {name: data for name, data in run.contents().items() if data} == before
