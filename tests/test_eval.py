"""Local tasks of the LM Evaluation Harness give the same results with our operators and with transformers' own."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest

from fastgpt2.cli import main

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
# One task chooses among four continuations, the other measures the perplexity of texts.
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""
PERPLEXITY = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture
def tasks(tmp_path: Path, seed: int) -> Path:
    """A folder with two tasks over random texts of many lengths."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(["def", "add", "a,", "b", "return", "x +"]) for _ in range(rng.randint(least, most)))

    rows = [
        {"question": text(1, 60), "choices": [" " + text(1, 9) for _ in range(4)], "answer": rng.randrange(4)}
        for _ in range(12)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, kind, rest in (
        ("toy_choice", "multiple_choice", CHOICE),
        ("toy_perplexity", "loglikelihood_rolling", PERPLEXITY),
    ):
        task = TASK.format(name=name, data=data, kind=kind) + rest
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra eval is installed")
def test_without_the_harness_it_names_the_extra(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", str(tiny_checkpoint), "--tasks", "hellaswag", "--device", "cpu"]) == 2
    assert 'pip install "fastgpt2[eval]"' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_log_likelihoods_are_those_of_transformers(
    tiny_checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They agree for every request, and so do the metrics that the harness computes from them."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    import fastgpt2.integrations.lm_eval as harness

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers: list[list[float]] = []
    for method in ("loglikelihood", "loglikelihood_rolling"):
        theirs = getattr(HFLM, method)

        def noted(self, *args, theirs=theirs, **kwargs):
            found = theirs(self, *args, **kwargs)
            answers[-1] += [x for answer in found for x in (answer if isinstance(answer, tuple) else [answer])]
            return found

        monkeypatch.setattr(HFLM, method, noted)
    results = []
    for change in (harness.accelerate, lambda model: model):
        monkeypatch.setattr(harness, "accelerate", change)
        answers.append([])
        out = tmp_path / "results.json"
        options = ["--include-path", str(tasks), "--out", str(out), "--device", "cpu", "--dtype", "fp32"]
        assert main(["eval", "--model", str(tiny_checkpoint), "--tasks", "toy_choice,toy_perplexity", *options]) == 0
        results.append(json.loads(out.read_text(encoding="utf-8"))["results"])
    ours, plain = answers
    assert len(ours) == len(plain) == 12 * 4 * 2 + 12
    assert ours == pytest.approx(plain, rel=1e-4)
    assert [*results[0]] == ["toy_choice", "toy_perplexity"]
    for task, metrics in results[0].items():
        for name, value in metrics.items():
            expected = results[1][task][name]
            assert value == (pytest.approx(expected, rel=1e-4) if isinstance(value, float) else expected), name
