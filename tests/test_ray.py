"""The classes for Ray Data, called as Ray calls them, and inside Ray with an actor that is killed."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import GPT2
from fastgpt2.integrations.ray import Generate, Score

PROMPTS = 24
OPTIONS = {"num_samples": 2, "max_new_tokens": 6}


def test_batches_of_ray_data(tiny_checkpoint):
    """The classes are called as Ray calls them. The samples do not depend on the batches."""
    generate = Generate(str(tiny_checkpoint), index="n", num_samples=2, max_new_tokens=5, seed=3)
    batch = {"prompt": ["def", "return", "x"], "n": [0, 1, 2], "other": [7, 8, 9]}
    whole = generate(batch)
    assert whole["other"].tolist() == [7, 7, 8, 8, 9, 9]
    last = generate({name: values[2:] for name, values in batch.items()})
    assert [ids.tolist() for ids in last["token_ids"]] == [ids.tolist() for ids in whole["token_ids"][4:]]
    assert [s.token_ids for s in generate.model.generate(["def"], num_samples=2, max_new_tokens=5, seed=3)] == [
        ids.tolist() for ids in whole["token_ids"][:2]
    ]
    scored = Score(generate.model, column="token_ids", prefix_column="prompt", after_prefix=True)(whole)
    assert scored["logprob"] == pytest.approx(whole["logprob"], abs=1e-3)
    assert scored["other"] is whole["other"]
    by_text = Generate(generate.model, num_samples=1, max_new_tokens=5)
    assert by_text({"prompt": ["x"]})["text"].tolist() == by_text({"prompt": ["def", "x"]})["text"].tolist()[1:]
    with pytest.raises(ValueError, match="the batch must have a column 'prompt'; it has text"):
        by_text({"text": ["x"]})


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local Ray with two CPUs, which leaves no files behind."""
    ray = pytest.importorskip("ray", reason="Ray Data is not installed: pip install 'fastgpt2[ray]'")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # without it Ray writes one into the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            yield ray
        finally:
            ray.shutdown()


class GenerateAndDie(Generate):
    """Writes down which actor did which batch. The first actor to begin a second batch dies in the middle of it."""

    def __init__(self, *args: Any, records: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.records, self.batches = Path(records), 0

    def __call__(self, batch: Any) -> dict[str, Any]:
        samples = super().__call__(batch)
        self.batches += 1
        killed = self.records / "killed"
        if self.batches == 2 and not killed.exists():
            killed.write_text(f"{os.getpid()} {batch['id'].tolist()}")
            os.kill(os.getpid(), signal.SIGKILL)
        (self.records / f"{os.getpid()}-{self.batches}").write_text(str(batch["id"].tolist()))
        return samples


@pytest.mark.slow
def test_a_killed_actor_loses_nothing(tiny_checkpoint, tmp_path, local_ray, seed):
    """One of two actors is killed midway. Every sample is there once, and is the same as in a plain run."""
    texts = [("def", "return", "x", "a, b")[number % 4] for number in range(PROMPTS)]
    options = {**OPTIONS, "seed": seed}
    rows = local_ray.data.from_items([{"id": number, "prompt": text} for number, text in enumerate(texts)])
    samples = rows.map_batches(
        GenerateAndDie,
        fn_constructor_args=(str(tiny_checkpoint),),
        fn_constructor_kwargs={"index": "id", "device": "cpu", "records": str(tmp_path), **options},
        batch_size=2,
        compute=local_ray.data.ActorPoolStrategy(size=2),
    ).take_all()

    killed, lost = (tmp_path / "killed").read_text().split(" ", 1)
    done = {path.name: path.read_text() for path in tmp_path.glob("*-*")}
    assert f"{killed}-1" in done
    assert f"{killed}-2" not in done
    assert lost in done.values(), "no other actor repeated the lost batch"

    plain = GPT2.from_pretrained(tiny_checkpoint).generate(texts, sample_ids=list(range(PROMPTS)), **options)
    expected = {(s.prompt_index, s.sample_index): (s.text, s.token_ids, s.finish_reason) for s in plain}
    found = [(row["id"], row["sample_index"]) for row in samples]
    assert sorted(found) == sorted(expected)
    for row in samples:
        key = row["id"], row["sample_index"]
        assert (row["text"], list(row["token_ids"]), row["finish_reason"]) == expected[key]
        assert row["prompt"] == texts[row["id"]]
