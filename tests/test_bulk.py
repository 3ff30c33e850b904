"""Bulk generation end to end: the recipes of docs/bulk.md at toy size, and several processes that share a run."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from fastgpt2 import GPT2
from fastgpt2.cli.main import main
from fastgpt2.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/bulk.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def proteins(tmp_path_factory) -> Path:
    """A folder with a tiny random GPT-2 of letters and the special tokens of ZymCTRL and ProtGPT2."""
    folder = tmp_path_factory.mktemp("proteins")
    tokenizer = Tokenizer.train(["M K V"], 257)
    tokenizer.backend.add_special_tokens(["<sep>", "<start>", "<end>", "<pad>"])
    torch.manual_seed(random.randrange(2**31))
    model = GPT2(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, context_length=64,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size - 1 :] += 0.02
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


def recipe(name: str) -> list[str]:
    """The arguments of the page's command that contains `name`."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    (command,) = [shlex.split(block.replace("\\\n", " ")) for block in blocks if name in block and "generate" in block]
    assert command.pop(0) == "fastgpt2"
    return command


def replaced(words: list[str], **options: object) -> list[str]:
    for name, value in options.items():
        words[words.index(f"--{name.replace('_', '-')}") + 1] = str(value)
    return words


def read_fasta(path: Path) -> list[tuple[str, str]]:
    entries = path.read_text(encoding="utf-8").removeprefix(">").split("\n>")
    return [(entry.split("\n", 1)[0], "".join(entry.split("\n")[1:])) for entry in entries]


@pytest.mark.parametrize(("name", "percent"), [("AI4PD/ZymCTRL", 5), ("nferruz/ProtGPT2", 10)])
def test_recipes(name, percent, proteins, tmp_path, capsys):
    out = tmp_path / "best.fasta"
    words = replaced(recipe(name), model=proteins, out=out, num_samples=150, max_new_tokens=12)
    if "--min-length" in words:
        replaced(words, min_length=3)
    # So many stop tokens that some samples end.
    words += [
        "--token-ids",
        "--device",
        "cpu",
        *(a for token in range(100, 140) for a in ("--stop-token-id", str(token))),
    ]
    assert main(words) == 0
    records = [json.loads(line) for line in (tmp_path / "best.all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["sample_index"] for record in records] == list(range(150))
    model = GPT2.from_pretrained(proteins)
    twin = GPT2LMHeadModel.from_pretrained(proteins).eval()
    prompt = model.tokenizer.encode(words[1])
    left = []
    for record in records:
        # As the script of the published recipe does: the loss of prompt and continuation together.
        ids = torch.tensor([prompt + record["token_ids"]])
        with torch.no_grad():
            loss = twin(ids, labels=ids).loss.item()
        assert record["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
        assert record["scored"] == "whole"
        text = re.sub("<[a-z|]+>|[^A-Za-z*-]", "", record["text"])
        if record["finish_reason"] == "stop" and len(text) >= (3 if "--min-length" in words else 0):
            left.append((record["perplexity"], text))
    distinct = {text: perplexity for perplexity, text in reversed(left)}
    best = sorted((perplexity, text) for text, perplexity in distinct.items())[: -(-len(distinct) * percent // 100)]
    assert 1 <= len(best) < len(distinct) < len(records)
    entries = read_fasta(out)
    assert [sequence for _, sequence in entries] == [text for _, text in best]
    assert all(" finish=stop " in header and "scored=whole" in header for header, _ in entries)
    # Another selection needs no new run.
    assert main(["select", str(tmp_path / "best.all.jsonl"), str(tmp_path / "all.csv"), "--strip-special"]) == 0
    again = [*replaced(words, out=out), "--resume"]
    before = out.read_bytes()
    assert main(again) == 0
    assert "150 of 150 samples" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize("suffix", [".jsonl", ".fasta", ".txt"])
def test_shares_of_prompts_make_one_output(suffix, tiny_checkpoint, tmp_path, seed):
    rng = random.Random(seed)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt_ids": [rng.randrange(256) for _ in range(rng.randint(1, 20))]}) + "\n" for _ in range(9)
        ),
        encoding="utf-8",
    )

    def run(out: Path, *arguments: object) -> None:
        options = ["--num-samples", 3, "--max-new-tokens", 8, "--device", "cpu", "--batch-size", rng.randint(1, 9)]
        words = ["generate", "--model", tiny_checkpoint, "--prompts", prompts, "--out", out, *options, *arguments]
        assert main([str(word) for word in words]) == 0

    run(tmp_path / f"one{suffix}", "--score", "whole")
    expected = (tmp_path / f"one{suffix}").read_bytes()
    for count in (2, 4):
        out = tmp_path / f"{count}{suffix}"
        for share in rng.sample(range(count), count):
            assert not out.exists() or out.read_bytes() != expected
            run(out, "--score", "whole", "--shard", f"{share}/{count}")
        assert out.read_bytes() == expected
    assert not list(tmp_path.glob("*.part-*"))


@pytest.mark.slow
def test_under_torchrun(tiny_checkpoint, tmp_path):
    (tmp_path / "p.txt").write_text("def\nreturn\nx\n", encoding="utf-8")
    for count in (1, 2):
        arguments = ["generate", "--model", tiny_checkpoint, "--prompts", "p.txt", "--out", f"{count}.jsonl"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--master-port", "0"]
        done = subprocess.run(
            [str(word) for word in (*launch, "-m", "fastgpt2", *arguments, "--num-samples", 2, "--max-new-tokens", 9)],
            cwd=tmp_path,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part-*"))
