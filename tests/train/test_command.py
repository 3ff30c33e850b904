"""`fastgpt2 train`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt2 import GPT2, GPT2Config
from fastgpt2.cli import train as command
from fastgpt2.data import TokenData
from fastgpt2.files import locked_folder
from fastgpt2.tokenizer import Tokenizer
from fastgpt2.train import (
    SampleReport,
    Trainer,
    checkpoint_paths,
)
from tests.train.helpers import (
    CONTEXT,
    TINY,
    VOCAB,
    assert_same,
    make_config,
    make_model,
    metrics,
    run_command,
    weights,
)


def test_the_command_trains_a_model_that_loads_and_resumes_to_the_bit(text: Path, tmp_path: Path, capsys) -> None:
    options = ["--data", text, "--vocab-size", 270, "--steps", 9, "--checkpoint-interval", 4, "--eval-interval", 3]
    options += ["--sample-interval", 5, "--dropout", 0.1]
    assert run_command(tmp_path / "whole", *options) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "whole")
    assert "step 9/9: loss" in err
    assert "bits per byte" in err
    assert "sample" in err
    model = GPT2.from_pretrained(tmp_path / "whole")
    assert model.tokenizer is not None
    assert model.config.eos_token_id == model.tokenizer.eos_token_id == 0
    assert run_command(tmp_path / "parts", *options, "--steps", 9) == 0
    for path in checkpoint_paths(tmp_path / "parts")[1:]:
        path.unlink()  # so that the run resumes from an earlier one
    assert run_command(tmp_path / "parts", "--resume") == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert_same(weights(GPT2.from_pretrained(tmp_path / "parts")), weights(model))


def test_the_command_finetunes_and_takes_nanogpt_data(text: Path, tmp_path: Path, capsys) -> None:
    assert run_command(tmp_path / "a", "--data", text, "--vocab-size", 270, "--steps", 2) == 0
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = ["--data", str(text), "--init-from", str(tmp_path / "a"), "--steps", "1", "--lr", "1e-9"]
    assert command.run(parser.parse_args([*arguments, "--out", str(tmp_path / "b")])) == 0
    before, after = GPT2.from_pretrained(tmp_path / "a"), GPT2.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(after.lm_head.weight, before.lm_head.weight)
    (tmp_path / "nano").mkdir()
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "nano" / "train.bin")
    assert run_command(tmp_path / "c", "--data", tmp_path / "nano", "--vocab-size", 100, "--steps", 1) == 0
    assert GPT2.from_pretrained(tmp_path / "c").config.vocab_size == 100
    assert run_command(tmp_path / "c", "--resume", "--steps", 2) == 0
    assert "continuing from step 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], ValueError, "there is no text to train on; give it with --data PATH"),
        (["--data", "nowhere"], FileNotFoundError, "nowhere: no such file or directory"),
        (["--data", "{text}", "--steps", 1, "--minutes", 1], ValueError, "give --steps or --minutes, not both"),
        (["--data", "{text}", "--tokenizer", "{dir}"], FileNotFoundError, "has no tokenizer.json"),
        (["--data", "{text}", "--tokenizer", "x", "--vocab-size", 300], ValueError, "leave out --vocab-size"),
        (["--data", "{text}", "--vocab-size", 100], ValueError, "vocab_size must be at least 257"),
        (["--data", "{text}", "--init-from", "x"], ValueError, "leave out --preset and the size options"),
        (["--data", "{dir}/nano"], ValueError, "nano has no tokenizer; give --tokenizer FOLDER, --vocab-size N or"),
        (["--data", "{text}", "--heads", 3], ValueError, "hidden_size must be a multiple of num_heads; got 16 and 3"),
        (["--data", "{text}", "--activation", "gleu"], ValueError, "activation_function must be one of"),
        (["--data", "{text}", "--layers", 0], ValueError, "num_layers must be a positive int"),
        (
            ["--data", "{text}", "--vocab-size", 10**10],
            ValueError,
            "vocab_size must be at least 257 .* at most 1048576",
        ),
        (
            ["--data", "{dir}/nano", "--vocab-size", 100, "--context", 100],
            ValueError,
            "a context of 100 needs at least",
        ),
        (["--data", "{dir}/nano", "--suffix", ".py", "--vocab-size", 0], ValueError, "has no tokenizer; give"),
        (["--data", "{dir}/empty"], ValueError, "no text files in"),
        (["--data", "{text}", "--lr", -1], ValueError, "lr must be a finite number > 0"),
        (["--data", "{text}", "--device", "cuda"], ValueError, "device must be one that this machine has"),
        (["--data", "{text}", "--parallel", "fsdp"], ValueError, "parallel 'fsdp' shares the weights among torchrun's"),
        (["--data", "{text}", "--lora-rank", 2], ValueError, "--lora-rank needs trained weights to adapt; name them"),
        (["--data", "{text}", "--val-fraction", 2], ValueError, r"val_fraction must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_bad_commands(
    arguments: list[object], error: type[Exception], message: str, text: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "nano").mkdir()
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "nano" / "train.bin")
    filled = [str(a).format(text=text, dir=tmp_path) for a in arguments]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([*TINY, "--out", str(tmp_path / "out"), *filled])
    with pytest.raises(error, match=message):
        command.run(args)
    assert not (tmp_path / "out").exists(), "the folder was made before the arguments were checked"


def test_one_run_at_a_time_writes_to_a_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked_folder(out):  # as another process would
        for resume in ([], ["--resume"]):
            with pytest.raises(BlockingIOError, match="out: another process is writing to it; wait for it or name"):
                run_command(out, "--data", text, "--vocab-size", 270, "--steps", 1, *resume)
        assert list(out.iterdir()) == []
    assert run_command(out, "--data", text, "--vocab-size", 270, "--steps", 1) == 0
    with locked_folder(out), pytest.raises(BlockingIOError, match="another process is writing to it"):
        run_command(out, "--resume", "--steps", 2)
    assert run_command(out, "--resume", "--steps", 2) == 0


def test_one_is_one(text: Path, tmp_path: Path, capsys) -> None:
    assert run_command(tmp_path / "out", "--data", text, "--vocab-size", 270, "--steps", 1, "--val-fraction", 0) == 0
    printed = capsys.readouterr().err
    assert "1 document (" in printed
    assert " 1 process\n" in printed
    assert ", 0 skipped\n" in printed


def test_rows_of_a_table_are_trained_on(tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text("".join(f'{{"code": "x = {i} and more", "id": {i}}}\n' for i in range(40)), encoding="utf-8")
    with pytest.raises(ValueError, match=r'rows\.jsonl line 1: must be an object with "text"; it has "code", "id"'):
        run_command(out, "--data", path, "--vocab-size", 257, "--steps", 1)
    assert not out.exists()
    assert run_command(out, "--data", path, "--column", "code", "--vocab-size", 257, "--steps", 1) == 0
    assert "40 documents (2 for validation), 0 skipped" in capsys.readouterr().err
    tokenizer = Tokenizer.from_folder(out / "data")
    assert tokenizer is not None
    text = tokenizer.decode(TokenData.open(out / "data").train.tokens.tolist())
    assert text.startswith("x = 0 and more<|endoftext|>x = ") or text.startswith("x = 1 and more")
    assert run_command(out, "--resume", "--steps", 2) == 0
    with pytest.raises(ValueError, match="resume: column must stay 'code' as the run began; got 'text'"):
        run_command(out, "--resume", "--column", "text")


def test_a_run_is_not_overwritten_nor_resumed_as_another(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_command(out, "--data", text, "--vocab-size", 270, "--steps", 1) == 0
    with pytest.raises(ValueError, match="out holds a run; continue it with --resume or choose another --out"):
        run_command(out, "--data", text)
    for option, value, message in (
        ("--data", "stdlib", r"resume: data must stay \['.*text.txt'\] as the run began; got \['stdlib'\]"),
        ("--vocab-size", 300, "resume: vocab_size must stay 270 as the run began; got 300"),
        ("--layers", 2, "resume: num_layers must stay 1 as the run began; got 2"),
        ("--preset", "gpt2", "resume: preset must stay None as the run began; got 'gpt2'"),
        ("--seed", 3, "resume: seed must stay 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_command(out, "--resume", option, value)
    for content in ("{", "[]", "[" * 99_999, '{"colour": 3}'):
        (out / "run.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"run.json: must hold a run's options as JSON"):
            run_command(out, "--resume")


def test_samples_are_text_of_the_model(text: Path, tmp_path: Path) -> None:
    assert run_command(tmp_path / "a", "--data", text, "--vocab-size", 270, "--steps", 1) == 0
    shards = TokenData.open(tmp_path / "a" / "data")
    tokenizer = Tokenizer.from_folder(tmp_path / "a")
    config = make_config(steps=2, sample_interval=1, sample_prompt="x1 =", eval_interval=0)
    trainer = Trainer(make_model(vocab_size=270), shards, config, tmp_path / "b", tokenizer=tokenizer)
    samples = [r for r in trainer.run() if isinstance(r, SampleReport)]
    assert [s.step for s in samples] == [1, 2]
    assert all(s.text.startswith("x1 =") and len(s.text) > 4 for s in samples)


def test_the_model_configuration_survives_a_checkpoint(data: TokenData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        VOCAB, CONTEXT, 16, 1, 2, activation_function="gelu", tie_word_embeddings=False, eos_token_id=(1, 2)
    )
    list(Trainer(GPT2(config), data, make_config(steps=1), tmp_path).run())
    assert Trainer.resume(tmp_path, data).model.config == config
