"""A fuzzer for file readers: every damaged file must be read, or refused with an error of one sentence.

`python -m tests.reliability.fuzz tokenizer --seconds 600` runs one target for ten minutes and prints what it found.
A case depends only on the target, the seed and its number, so this repeats one:
`python -m tests.reliability.fuzz tokenizer --seed 5 --only 1234`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

MEMORY_BYTES = 8 << 30  # of address space; a reader that asks for more gets a MemoryError before the machine runs out
CASE_SECONDS = 20.0


@dataclass(frozen=True)
class Target:
    """Files to damage, and the function that reads them."""

    make: Callable[[Path], None]  # writes undamaged files into a folder
    read: Callable[[Path], object]
    files: tuple[str, ...]  # the files to damage; a case damages one of them


# -- undamaged files, and their readers ------------------------------------------------------------------------------


def _model() -> Any:
    import torch

    from fastgpt2 import GPT2

    torch.manual_seed(0)
    return GPT2(vocab_size=300, hidden_size=8, num_layers=1, num_heads=2, context_length=12)


def _save_folder(folder: Path) -> None:
    from fastgpt2.tokenizer import Tokenizer

    model = _model()
    model.tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n"] * 4, 300)
    model.save_pretrained(folder)


def _load_folder(folder: Path) -> None:
    from fastgpt2 import GPT2

    GPT2.from_pretrained(folder)


def _save_bin(folder: Path) -> None:
    import torch

    from fastgpt2.checkpoint import hf_state_dict

    _save_folder(folder)
    (folder / "model.safetensors").unlink()
    torch.save(hf_state_dict(_model()), folder / "pytorch_model.bin")


def _save_nanogpt(folder: Path) -> None:
    from fastgpt2.checkpoint import save_nanogpt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # saving warns that nanoGPT has the exact GELU
        save_nanogpt(_model(), folder)


def _read_tokenizer(folder: Path) -> None:
    from fastgpt2.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("def add(x):\n\u00e9 \U0001f600 <|endoftext|>"))


def _split_tokenizer(folder: Path) -> None:
    _save_folder(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = (" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")


_SETTINGS = {"seed": 0, "prompts": "abc"}


def _save_samples(folder: Path) -> None:
    from fastgpt2.generate import Sample
    from fastgpt2.input_files import Entry
    from fastgpt2.record_files import RecordFile
    from fastgpt2.sample_files import SampleRecord, sample_format

    for suffix in (".jsonl", ".fasta", ".txt"):
        path = folder / f"out{suffix}"
        with RecordFile(path, sample_format(path), _SETTINGS) as file:
            for index in range(6):
                sample = Sample(
                    prompt_index=index, sample_index=0, prompt_ids=[5], token_ids=[1, 2, 3], finish_reason="length",
                    logprobs=[-1.0, -2.0, -0.5],
                )  # fmt: skip
                file.write(SampleRecord(Entry(index, "a prompt", "line 1", f"name {index}"), sample, "MKV*\tx\n" * 12))


def _resume_samples(folder: Path) -> None:
    from fastgpt2.record_files import RecordFile
    from fastgpt2.sample_files import sample_format

    for suffix in (".jsonl", ".fasta", ".txt"):
        path = folder / f"out{suffix}"
        before = path.read_bytes()
        try:
            RecordFile(path, sample_format(path), _SETTINGS, resume=True, wanted=lambda key: key[0] < 6).close()
        except (ValueError, OSError):
            if path.read_bytes() != before:
                raise AssertionError(f"{path.name} was refused, but also changed") from None
            raise
        if not before.startswith(path.read_bytes()):
            raise AssertionError(f"{path.name} holds bytes that it did not hold before")


def _save_shards(folder: Path) -> None:
    from fastgpt2.data import find_documents, write_shards
    from fastgpt2.tokenizer import Tokenizer

    (folder / "text").mkdir()
    for name in "abcd":
        (folder / "text" / name).write_text(f"def {name}(x):\n    return x\n" * 30, encoding="utf-8")
    texts = ["def add(a, b):\n    return a + b\n"] * 4
    write_shards(find_documents([folder / "text"]), Tokenizer.train(texts, 280), folder, {"data": "text"})


def _read_shards(folder: Path) -> None:
    from fastgpt2.data import TokenData

    data = TokenData.open(folder)
    data.train.rows(0, 4, 16, 1)
    if data.val is not None:
        list(data.val.evaluation_batches(16, 4, None))


def _save_prompts(folder: Path) -> None:
    (folder / "p.txt").write_text("one\ntwo\n\nthree \u00e9\n", encoding="utf-8")
    (folder / "p.fasta").write_text(">one first\nMKV\nAAA\n>two\nMKL\n", encoding="utf-8")
    lines = ({"prompt": "one", "id": 1}, {"prompt_ids": [1, 2, 3]}, {"prompt": "\u00e9", "id": "b"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "p.jsonl").write_text(text, encoding="utf-8")
    (folder / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "p.csv").write_text('id,prompt\n1,one\n2,"tw\no, ""x"""\n', encoding="utf-8")
    with pyarrow.output_stream(str(folder / "p.txt.zst"), compression="zstd") as file:
        file.write(text.encode())
    rows = [{"id": number, "prompt": f"text \u00e9 {number}"} for number in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "p.parquet")


def _read_prompts(folder: Path) -> None:
    from fastgpt2.input_files import PROMPTS, EntryError, find_sources, read_entries

    for path in sorted(folder.glob("p.*")):
        for prompt in read_entries(find_sources([str(path)]), PROMPTS, with_fields=True):
            if isinstance(prompt, EntryError):
                _check_sentence(prompt)


def _save_training(folder: Path) -> None:
    (folder / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 200, encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        status = _train(folder, "1")
    if status:
        raise AssertionError("the run to resume did not finish")


def _train(folder: Path, steps: str) -> int:
    from fastgpt2.cli import main

    sizes = ["--layers", "1", "--heads", "2", "--hidden-size", "8", "--context", "16", "--vocab-size", "280"]
    arguments = ["train", "--data", "text.txt", "--out", "run", "--steps", steps, "--batch-size", "2", "--resume"]
    before = os.getcwd()
    os.chdir(folder)  # relative, because a resumed run must name its data by the same path
    try:
        return main([*arguments, *sizes])
    finally:
        os.chdir(before)


def _resume_training(folder: Path) -> None:
    """Resume from the command line. A refusal is exit status 2 and one line; it is raised as a ValueError."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = _train(folder, "2")
    if status:
        sentence = said.getvalue()[said.getvalue().rfind("fastgpt2: ") :].rstrip("\n")
        raise ValueError(
            f"{folder.name}: {sentence}" if re.search(r"\brun\b|text\.txt|\bdata\b", sentence) else sentence
        )


TARGETS = {
    "safetensors": Target(_save_folder, _load_folder, ("model.safetensors",)),
    "configuration": Target(_save_folder, _load_folder, ("config.json", "generation_config.json")),
    "bin": Target(_save_bin, _load_folder, ("pytorch_model.bin",)),
    "nanogpt": Target(_save_nanogpt, _load_folder, ("ckpt.pt",)),
    "tokenizer": Target(_save_folder, _read_tokenizer, ("tokenizer.json",)),
    "vocabulary": Target(_split_tokenizer, _read_tokenizer, ("vocab.json", "merges.txt")),
    "records": Target(
        _save_samples, _resume_samples,
        ("out.jsonl", "out.fasta", "out.txt", "out.jsonl.run.json", "out.fasta.run.json"),
    ),
    "shards": Target(_save_shards, _read_shards, ("train.bin", "val.bin", "meta.json")),
    "training": Target(
        _save_training, _resume_training,
        ("run/checkpoints/step-00000001.pt", "run/metrics.jsonl", "run/data/meta.json", "run/data/train.bin"),
    ),
    "prompts": Target(
        _save_prompts,
        _read_prompts,
        ("p.txt", "p.fasta", "p.jsonl", "p.csv", "p.jsonl.gz", "p.txt.zst", "p.parquet"),
    ),
}  # fmt: skip


# -- damage ---------------------------------------------------------------------------------------------------------

_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 256, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    2**70, 10**40, -(2**63), 0.5, -0.0,
    1e308, float("inf"), float("nan"), "", "a", "\u00e9", "\ud800", "0", "../x", "a" * 5000, [], {}, [[]], {"a": 1},
    [None], [1, "a"],
)  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four random changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        structured = _json_span(data)
        if structured is not None and rng.random() < 0.7:
            start, end, value = structured
            data = data[:start] + _dump(_change(value, rng), data[start:end]) + data[end:]
        else:
            data = _change_bytes(data, rng)
    return data


def _json_span(data: bytes) -> tuple[int, int, Any] | None:
    """Find JSON in a file: a safetensors header, else the whole file, else its first line. None if there is none."""
    if len(data) > 8 and data[8:9] == b"{" and (size := int.from_bytes(data[:8], "little")) <= len(data) - 8:
        candidates = [(8, 8 + size)]
    else:
        candidates = [(0, len(data)), (0, data.find(b"\n"))]
    for start, end in candidates:
        try:
            return start, end, json.loads(data[start:end])
        except (ValueError, RecursionError):
            continue
    return None


def _dump(value: Any, before: bytes) -> bytes:
    try:
        text = json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return before
    # A safetensors header states its length, so shorter JSON is padded with blanks to keep the header valid.
    return text.ljust(len(before)) if len(text) <= len(before) else text


def _change(value: Any, rng: random.Random) -> Any:
    """Change the JSON value in one random place."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            if len(places) < 5000:
                collect(node[key])

    collect(value)
    if not places or rng.random() < 0.02:
        return rng.choice(_ODD_VALUES)
    # Prefer places near the root. There are the few settings; deeper down are thousands of merges.
    node, key = places[min(int(rng.expovariate(1 / 20)), len(places) - 1)] if rng.random() < 0.6 else rng.choice(places)
    kind = rng.random()
    if kind < 0.15:
        del node[key]
    elif kind < 0.25 and isinstance(node, dict):
        node[rng.choice(("", "x", "type", str(key) * 2))] = node.pop(key)
    elif kind < 0.35:
        other, name = rng.choice(places)
        try:
            node[key] = other[name]
        except (KeyError, IndexError):
            node[key] = None
    elif kind < 0.5 and type(node[key]) is int:
        node[key] += rng.choice((-1, 1, 7, -node[key], 2**31, 2**62))
    else:
        node[key] = rng.choice(_ODD_VALUES)
    return value


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    # Half of the changes are within the first 512 bytes, where headers are.
    limit = len(data) if rng.random() < 0.5 else min(len(data), 512)
    at = rng.randrange(limit + 1)
    count = min(int(rng.expovariate(1 / 8)) + 1, 64)
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + count :]
    if kind == 2:
        return data[:at] + rng.randbytes(count) + data[at:]
    if kind == 3:
        return data[:at] + data[at : at + count] * 3 + data[at + count :]
    if kind == 4:
        return (
            data[:at]
            + rng.choice((b"\0", b"\xff", b"\x80", b"{", b"[", b'"', b"\n", b"9")) * count
            + data[at + count :]
        )
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3)) if data else 0):
        place = rng.randrange(min(limit, len(changed)) or 1)
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


# -- cases ----------------------------------------------------------------------------------------------------------


def _check_sentence(error: BaseException, name: str = "") -> None:
    """Raise AssertionError unless the error is one sentence, and names the folder of the damaged file if given."""
    text = str(error)
    if not text or "\n" in text or len(text) > 800 or name not in text:
        raise AssertionError(
            f"the error must be one sentence that names {name!r}; got {type(error).__name__} {text[:700]!r}"
        )


def run_case(target: Target, good: Path, folder: Path, rng: random.Random) -> str:
    """Damage one file in a fresh copy of the folder, and read the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    path = folder / rng.choice(target.files)
    path.write_bytes(damage(path.read_bytes(), rng))
    return read(target, folder)


def read(target: Target, folder: Path) -> str:
    """Return "read", or the class of the error that refused the files. Other errors and bad sentences are raised."""
    try:
        target.read(folder)
    except (ValueError, OSError) as error:
        _check_sentence(error, folder.name)
        return type(error).__name__
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return "not enough memory"
    return "read"


def _serve(name: str, seed: int, first: int, last: int, good: Path, work: Path, connection: Connection) -> None:
    """Run cases in this process. For each, send (number, "begin"), then (number, its result); "FAULT ..." is a bug."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faulthandler.disable()  # it would print into the output of the tests
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    errors = os.open(work / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(errors, 2)
    for number in range(first, last):
        connection.send((number, "begin"))
        os.ftruncate(2, 0)
        try:
            if number == first:
                shutil.rmtree(work / "case", ignore_errors=True)
                shutil.copytree(good, work / "case")
                if read(TARGETS[name], work / "case") != "read":
                    raise AssertionError("the undamaged files were refused")
            result = run_case(TARGETS[name], good, work / "case", random.Random(f"{name} {seed} {number}"))
        except BaseException as error:
            result = f"FAULT {type(error).__name__}: {str(error)[:400]}"
        if os.fstat(2).st_size:
            result = f"FAULT printed {(work / 'stderr').read_text(errors='replace')[:400]!r} ({result})"
        connection.send((number, result))
    connection.close()


def run(name: str, seed: int, *, cases: int, seconds: float = float("inf"), first: int = 0) -> dict[str, int]:
    """Count the results of up to `cases` cases, as many as `seconds` allow. A result "FAULT ..." is a bug."""
    results: collections.Counter[str] = collections.Counter()
    found: dict[str, int] = {}  # the first case with each result
    context = multiprocessing.get_context("fork")
    stop = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        good, work = Path(folder, "good"), Path(folder, "work")
        good.mkdir()
        work.mkdir()
        TARGETS[name].make(good)
        number, last = first, first + cases
        while number < last and time.monotonic() < stop:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(name, seed, number, last, good, work, theirs))
            process.start()
            theirs.close()
            problem = ""
            while not problem and number < last and time.monotonic() < stop:
                if not ours.poll(CASE_SECONDS):
                    problem = f"FAULT took longer than {CASE_SECONDS} s"
                    break
                try:
                    number, result = ours.recv()
                except EOFError:
                    process.join()
                    problem = f"FAULT ended the process with exit code {process.exitcode}"
                    break
                if result == "begin":
                    continue
                results[result] += 1
                found.setdefault(result, number)
                number += 1
            if problem:
                results[problem] += 1
                found.setdefault(problem, number)
                number += 1
            process.kill()
            process.join()
    return {f"{text} (case {found[text]})" if text.startswith("FAULT") else text: n for text, n in results.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=60.0, help="the time for each target")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", type=int, default=None, metavar="NUMBER", help="run only this case, in this process")
    args = parser.parse_args()
    seed = random.randrange(2**31) if args.seed is None else args.seed
    status = 0
    for name in TARGETS if args.target == "all" else [args.target]:
        if args.only is not None:
            with tempfile.TemporaryDirectory() as folder:
                good = Path(folder, "good")
                good.mkdir()
                TARGETS[name].make(good)
                print(run_case(TARGETS[name], good, Path(folder, "case"), random.Random(f"{name} {seed} {args.only}")))
            continue
        results = run(name, seed, cases=10**9, seconds=args.seconds)
        print(f"{name}: {sum(results.values()):,} cases, seed {seed}")
        for result, count in sorted(results.items(), key=lambda item: -item[1]):
            print(f"  {count:8,}  {result}")
            status |= result.startswith("FAULT")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
