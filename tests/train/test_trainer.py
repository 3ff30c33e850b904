"""The trainer: schedule, parameter groups, losses, bit-exact resuming, refused inputs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt2 import GPT2, calculate_loss
from fastgpt2.config import TrainConfig
from fastgpt2.data import TokenData
from fastgpt2.tokenizer import Tokenizer
from fastgpt2.train import (
    CheckpointReport,
    EvalReport,
    Processes,
    StepReport,
    Trainer,
    checkpoint_paths,
    learning_rate,
    parameter_groups,
    read_checkpoint,
)
from fastgpt2.train.run_folder import RunFolder
from tests.train.helpers import (
    CONTEXT,
    VOCAB,
    assert_same,
    make_config,
    make_model,
    metrics,
    run_command,
    weights,
)

# -- pieces -------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = TrainConfig(steps=101, warmup_steps=20, lr=1.0, min_lr=0.2)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == rates[20] == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert learning_rate(100, config.replace(min_lr=None)) == pytest.approx(0.1)
    short = TrainConfig(steps=4, warmup_steps=100, lr=1.0)
    assert [learning_rate(step, short) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]


def test_only_matrices_decay() -> None:
    model = make_model()
    decayed, others = (group["params"] for group in parameter_groups(model, 0.1))
    names = {p: name for name, p in model.named_parameters()}
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert all(p.dim() == 2 for p in decayed)
    assert all(names[p].endswith("bias") or ".ln_" in names[p] for p in others)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]


def test_evaluation_is_the_mean_cross_entropy_of_every_token(data: TokenData, tmp_path: Path) -> None:
    trainer = Trainer(make_model(dropout=0.5), data, make_config(eval_tokens=0), tmp_path)
    loss, count = trainer.evaluate()
    assert trainer.model.training
    assert data.val is not None
    ids = torch.from_numpy(data.val.tokens.astype(np.int64))
    model = trainer.model.eval()
    losses = []
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1]
        losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none"))
    assert count == 99
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path: Path) -> None:
    text = "".join(f"é{i} = {i * i}\n" for i in range(200))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    status = run_command(tmp_path / "out", "--data", tmp_path / "t.txt", "--vocab-size", 300, "--steps", 2)
    assert status == 0
    line = metrics(tmp_path / "out")[-1]
    shard = TokenData.open(tmp_path / "out" / "data").val
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert shard is not None
    assert tokenizer is not None
    targets = shard.tokens[1:].tolist()
    num_bytes = len(tokenizer.decode(targets[:-1]).encode())  # without <|endoftext|> at the end
    assert line["bits_per_byte"] == pytest.approx(line["val_loss"] * len(targets) / num_bytes / math.log(2), rel=1e-6)


def test_a_batch_can_be_learnt_by_heart(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(VOCAB, size=CONTEXT + 1).astype("<u2").tofile(tmp_path / "train.bin")
    config = make_config(steps=120, batch_size=1, eval_interval=0, log_interval=20, lr=2e-2, weight_decay=0.0)
    reports = list(Trainer(make_model(), TokenData.open(tmp_path), config, tmp_path / "out").run())
    losses = [r.loss for r in reports if isinstance(r, StepReport)]
    assert losses[0] > 1.0
    assert losses[-1] < 0.02


def test_accumulation_is_a_larger_batch(data: TokenData, tmp_path: Path) -> None:
    whole = Trainer(make_model(), data, make_config(batch_size=6, steps=3), tmp_path / "a")
    parts = Trainer(make_model(), data, make_config(batch_size=2, accumulate=3, steps=3), tmp_path / "b")
    losses = []
    for trainer in (whole, parts):
        losses.append([r.loss for r in trainer.run() if isinstance(r, StepReport)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_torch_compile_trains_the_same_model(data: TokenData, tmp_path: Path, monkeypatch) -> None:
    compile_, captured = torch.compile, []

    def capture(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        captured.append(graph)
        return graph

    # This backend runs the graph as PyTorch captured it, so it needs no C++ compiler.
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=capture))
    results = []
    for compiled in (False, True):
        trainer = Trainer(make_model(), data, make_config(steps=2, compile=compiled), tmp_path / str(compiled))
        list(trainer.run())
        results.append(weights(trainer.model))
        assert bool(captured) == compiled
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_minutes_set_the_steps(data: TokenData, tmp_path: Path) -> None:
    trainer = Trainer(make_model(), data, make_config(minutes=0.02, eval_interval=0), tmp_path)
    reports = [r for r in trainer.run() if isinstance(r, StepReport)]
    assert trainer.config.steps == reports[-1].step > 25
    assert reports[-1].lr == pytest.approx(1e-3)


def test_slow_steps_are_counted_sooner(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are so slow that the usual twenty-five timed ones would take longer than `minutes`."""
    now = [0.0]
    train_step = Trainer._train_step

    def slow_step(self: Trainer, loss_module: Any) -> Any:
        now[0] += 7.0
        return train_step(self, loss_module)

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr("fastgpt2.train.trainer.time.perf_counter", clock)
    monkeypatch.setattr(Trainer, "_train_step", slow_step)
    config = make_config(minutes=1.0, eval_interval=0, checkpoint_interval=2)
    trainer = Trainer(make_model(), data, config, tmp_path)
    for _ in trainer.run():
        if trainer.step == 4:  # the number of steps is set, and a checkpoint holds it
            trainer.stop()
    assert trainer.config.steps == 9  # in 60 s, at 7 s per step
    resumed = Trainer.resume(tmp_path, data)
    list(resumed.run())
    assert resumed.step == resumed.config.steps == 9


# -- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"dtype": "bf16"}, {"accumulate": 2, "batch_size": 2}, {"optimizer": "muon", "recompute": True}],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    fields: dict[str, Any], data: TokenData, tmp_path: Path, seed: int
) -> None:
    config = make_config(seed=seed, **fields)
    whole = Trainer(make_model(dropout=0.2), data, config, tmp_path / "whole")
    list(whole.run())
    for stop_after in range(1, 13) if not fields else (2, 5, 7, 11):
        out = tmp_path / f"stopped-{stop_after}"
        trainer = Trainer(make_model(dropout=0.2), data, config, out)
        for report in trainer.run():
            if report.step >= stop_after:
                break  # like a kill, this skips everything that was due after the report
        torch.manual_seed(stop_after)  # the resumed run must not depend on the generator's state
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 11, "loss": 0.0}\n{"step": 12, "lo')
        if checkpoint_paths(out):
            trainer = Trainer.resume(out, data)
        else:
            trainer = Trainer(make_model(dropout=0.2), data, config, out)
        list(trainer.run())
        assert_same(weights(whole.model), weights(trainer.model))
        assert metrics(out) == metrics(tmp_path / "whole")


def test_recomputing_changes_no_bit_and_keeps_less(data: TokenData, tmp_path: Path) -> None:
    """Recomputing draws the same random numbers again, so dropout is the same too."""
    results, kept = [], []
    for recompute in (False, True):
        trainer = Trainer(make_model(dropout=0.3), data, make_config(recompute=recompute), tmp_path / str(recompute))
        list(trainer.run())
        results.append(weights(trainer.model))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            calculate_loss(trainer.model.train(), *data.train.rows(0, 4, CONTEXT, 0))
        kept.append(sum(sizes))
    assert_same(*results)
    # What the embeddings and the loss store does not change.
    assert kept[1] < 0.5 * kept[0]


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(data: TokenData, tmp_path: Path) -> None:
    trainers = {}
    for name in ("adamw", "muon"):
        config = make_config(optimizer=name, steps=1, warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0)
        trainers[name] = Trainer(make_model(), data, config, tmp_path / name)
        list(trainers[name].run())
    first, ends = weights(make_model()), {name: weights(trainer.model) for name, trainer in trainers.items()}
    for name, start in first.items():
        is_hidden = ".h." in name and start.dim() == 2
        assert torch.equal(ends["adamw"][name], ends["muon"][name]) != is_hidden, name
        if is_hidden:
            step = (ends["muon"][name] - start).double()
            # Muon's step is an orthogonal matrix, up to the iteration's error, scaled to the size of AdamW's steps.
            values = torch.linalg.svdvals(step) / (1e-2 * 0.2 * math.sqrt(max(step.shape)))
            assert values.max() < 1.4, name
            assert values.median() > 0.5, name
    with pytest.raises(ValueError, match="optimizer 'muon' needs dtype bf16 or fp32; got fp16"):
        Trainer(make_model(), data, make_config(optimizer="muon", dtype="fp16"), tmp_path / "fp16")


def test_muon_without_muon(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"optimizer 'muon' needs PyTorch 2.9 or newer; this is .*: upgrade it"):
        Trainer(make_model(), data, make_config(optimizer="muon"), tmp_path)


def test_early_stopping_counts_evaluations_also_across_a_stop(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.5, 10: 1.5, 12: 1.6, 14: 9.0}
    monkeypatch.setattr(Trainer, "evaluate", lambda self: (losses.get(self.step, 1.0), 10))
    fields = {"steps": 40, "eval_interval": 2, "checkpoint_interval": 100, "early_stopping": 3}
    whole = Trainer(make_model(), data, make_config(**fields), tmp_path / "whole")
    list(whole.run())
    assert (whole.step, whole.is_stopped_early) == (14, True)
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert read_checkpoint(checkpoint_paths(tmp_path / "whole")[-1])["step"] == 14
    parts = Trainer(make_model(), data, make_config(**fields), tmp_path / "parts")
    for report in parts.run():
        if report.step == 10:
            parts.stop()
    assert (parts.step, parts.is_finished) == (11, False)
    parts = Trainer.resume(tmp_path / "parts", data)
    list(parts.run())
    assert parts.step == 14
    assert_same(weights(parts.model), weights(whole.model))
    assert list(Trainer.resume(tmp_path / "parts", data).run()) == []
    patient = Trainer.resume(tmp_path / "parts", data, early_stopping=100)
    list(patient.run())
    assert patient.step == 40
    with pytest.raises(ValueError, match="early_stopping needs a validation set; give a val_fraction > 0"):
        Trainer(make_model(), dataclasses.replace(data, val=None), make_config(early_stopping=1), tmp_path / "none")


def test_adapters_alone_are_trained_and_merged_at_the_end(data: TokenData, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    start, config = weights(make_model()), make_config(lora_rank=2, export="last", checkpoint_interval=4)
    whole = Trainer(make_model(), data, config, tmp_path / "whole")
    list(whole.run())
    trained = {name: value for name, value in whole.parameters.items() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    final = GPT2.from_pretrained(tmp_path / "whole")
    ids = torch.from_numpy(data.train.tokens[:16].astype(np.int64)).view(2, 8)
    torch.testing.assert_close(final(ids), whole.model.eval()(ids))
    changed = {name for name, value in weights(final).items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if "c_" in name and name.endswith("weight")}
    parts = Trainer(make_model(), data, config, tmp_path / "parts")
    for report in parts.run():
        if report.step == 6:
            parts.stop()
    list(Trainer.resume(tmp_path / "parts", data).run())
    assert_same(weights(GPT2.from_pretrained(tmp_path / "parts")), weights(final))


def test_stop_finishes_the_step_and_writes_a_checkpoint(data: TokenData, tmp_path: Path) -> None:
    trainer = Trainer(make_model(), data, make_config(log_interval=1), tmp_path)
    for report in trainer.run():
        if report.step == 7:
            trainer.stop()
    assert trainer.step == 8
    assert not trainer.is_finished
    assert read_checkpoint(checkpoint_paths(tmp_path)[-1])["step"] == 8
    assert not (tmp_path / "model.safetensors").exists()


def test_the_latest_checkpoints_and_the_best_are_kept(data: TokenData, tmp_path: Path) -> None:
    trainer = Trainer(make_model(), data, make_config(steps=30, eval_interval=7, keep_checkpoints=2), tmp_path)
    reports = list(trainer.run())
    written = [r.step for r in reports if isinstance(r, CheckpointReport)]
    assert [int(p.stem[-8:]) for p in checkpoint_paths(tmp_path)] == written[-2:]
    best = min((r for r in reports if isinstance(r, EvalReport)), key=lambda r: r.val_loss)
    state = read_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert state["step"] == best.step
    loaded = GPT2.from_pretrained(tmp_path)
    for name, value in state["model"].items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_resumed_run_that_lost_its_best_checkpoint_says_so(
    how: str, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda self: (1 + self.step / 100, 10))  # the first evaluation is the best
    trainer = Trainer(make_model(), data, make_config(steps=30, eval_interval=5, checkpoint_interval=5), tmp_path)
    for report in trainer.run():
        if report.step == 15:
            trainer.stop()
    best = tmp_path / "checkpoints" / "best.pt"
    whole = best.read_bytes()
    best.unlink()
    if how == "damaged":
        best.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="checkpoints: the best checkpoint is missing or damaged"):
        resumed = Trainer.resume(tmp_path, data)
    evaluated = [report.step for report in resumed.run() if isinstance(report, EvalReport)]
    assert read_checkpoint(best)["step"] == evaluated[0] > 15
    assert best.with_name("best.pt.damaged").exists() == (how == "damaged")


def test_the_best_checkpoint_is_found_whether_it_is_a_file_or_a_folder(tmp_path: Path) -> None:
    """A run that is resumed once with and once without sharding has both kinds of checkpoints."""
    folder, alone = RunFolder(tmp_path), Processes(0, 1, torch.device("cpu"))
    folder.prepare(0, None)
    checkpoints = tmp_path / "checkpoints"

    def save(step: int, kind: str, best_loss: float, is_best: bool) -> None:
        state: dict[str, Any] = {"step": step, "best_loss": best_loss}
        if kind == "file":
            folder.save_checkpoint(step, state, is_best=is_best, keep=1)
        else:
            tensors = {"model.x": torch.full((3,), float(step))}
            folder.save_shards(step, state, tensors, alone, is_best=is_best, keep=1)

    def names() -> list[str]:
        return sorted(path.name for path in checkpoints.iterdir())

    assert folder.best(math.inf) is None
    save(1, "folder", 3.0, True)
    save(2, "folder", 3.0, False)
    save(3, "folder", 3.0, False)
    assert names() == ["step-00000001", "step-00000003"]
    assert folder.best(3.0) == checkpoints / "step-00000001"
    assert folder.has_best(3.0)
    assert folder.best(2.5) is None  # no checkpoint has this loss; the one left is an earlier best
    save(4, "file", 2.0, True)
    assert names() == ["best.pt", "step-00000004.pt"]
    assert folder.best(2.0) == checkpoints / "best.pt"
    save(5, "folder", 1.0, True)
    save(6, "file", 1.0, False)
    assert names() == ["step-00000005", "step-00000006.pt"]
    assert folder.best(1.0) == checkpoints / "step-00000005"
    save(6, "folder", 1.0, False)
    assert names() == ["step-00000005", "step-00000006"]
    save(6, "folder", 1.0, False)
    save(6, "file", 1.0, False)
    assert names() == ["step-00000005", "step-00000006.pt"]
    shard = next((checkpoints / "step-00000005").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not folder.has_best(1.0)
    assert names() == ["step-00000005.damaged", "step-00000006.pt"]
    assert checkpoint_paths(tmp_path) == [checkpoints / "step-00000006.pt"]


def test_the_last_weights_can_be_the_finished_model(data: TokenData, tmp_path: Path) -> None:
    trainer = Trainer(make_model(), data, make_config(lr=0.3, export="last"), tmp_path)
    list(trainer.run())
    last = read_checkpoint(checkpoint_paths(tmp_path)[-1])
    assert torch.equal(GPT2.from_pretrained(tmp_path).lm_head.weight, last["model"]["lm_head.weight"])
    # Resuming a finished run only writes the model again.
    (tmp_path / "model.safetensors").unlink()
    assert list(Trainer.resume(tmp_path, data).run()) == []
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"resume: seed must stay 0 as in step-\d+.pt; got 1"),
        ({"lr": 1.0}, r"resume: lr must stay 0.01 .* got 1.0"),
        ({"dtype": "bf16"}, r"resume: dtype must stay 'fp32'"),
        ({"minutes": 5.0}, r"resume: minutes must stay None"),
        ({"batch_size": 8}, r"batch_size x accumulate x processes must stay 4 rows a step .* got 8"),
        ({"beta2": 0.5}, r"resume: beta2 must stay 0.95"),
    ],
    ids=str,
)
def test_a_change_that_makes_another_run_is_refused(
    changes: dict[str, Any], message: str, data: TokenData, tmp_path: Path
) -> None:
    list(Trainer(make_model(), data, make_config(steps=1), tmp_path).run())
    with pytest.raises(ValueError, match=message):
        Trainer.resume(tmp_path, data, **changes)


def test_a_change_that_does_not_is_taken(data: TokenData, tmp_path: Path) -> None:
    list(Trainer(make_model(), data, make_config(steps=1), tmp_path).run())
    trainer = Trainer.resume(tmp_path, data, steps=5, batch_size=2, accumulate=2, log_interval=1)
    assert [r.step for r in trainer.run() if isinstance(r, StepReport)] == [2, 3, 4, 5]


def test_other_data_and_broken_checkpoints_are_refused(data: TokenData, tmp_path: Path) -> None:
    list(Trainer(make_model(), data, make_config(steps=1), tmp_path).run())
    tokens = data.train.tokens.copy()
    tokens[5] = (tokens[5] + 1) % VOCAB
    tokens.tofile(tmp_path / "data" / "train.bin")
    with pytest.raises(ValueError, match=r"resume: data must be what the run began with; .*train.bin holds other"):
        Trainer.resume(tmp_path, TokenData.open(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        Trainer.resume(tmp_path / "other", data)
    path = checkpoint_paths(tmp_path)[-1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000001.pt: not a readable checkpoint \(.*\); remove it"):
        Trainer.resume(tmp_path, data)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=r"not a checkpoint of format 2"):
        Trainer.resume(tmp_path, data)


@pytest.mark.parametrize("what", ["halved", "empty", "missing"])
def test_another_validation_set_is_refused(what: str, data: TokenData, tmp_path: Path) -> None:
    list(Trainer(make_model(), data, make_config(steps=1), tmp_path).run())
    val = tmp_path / "data" / "val.bin"
    if what == "missing":
        val.unlink()
    else:
        val.write_bytes(val.read_bytes()[:100] if what == "halved" else b"")
    message = "is missing" if what == "missing" else "holds other tokens"
    with pytest.raises(ValueError, match=rf"resume: data must be what the run began with; .*val.bin {message}"):
        Trainer.resume(tmp_path, TokenData.open(tmp_path / "data"))


def test_another_tokenizer_is_refused(data: TokenData, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a b"], 257)
    list(Trainer(make_model(vocab_size=257), data, make_config(steps=1), tmp_path, tokenizer=tokenizer).run())
    assert Trainer.resume(tmp_path, data).tokenizer is not None
    Tokenizer.train(["ab ab ab"], 258).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"resume: the tokenizer must be what .*tokenizer.json is another: put it back"
    ):
        Trainer.resume(tmp_path, data)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"resume: the tokenizer must be what .*tokenizer.json is missing: put it back"
    ):
        Trainer.resume(tmp_path, data)


def test_a_checkpoint_of_an_earlier_version_resumes(data: TokenData, tmp_path: Path) -> None:
    """The checkpoint was written before other optimizers, sharding, adapters and early stopping existed."""
    list(Trainer(make_model(), data, make_config(), tmp_path / "whole").run())
    trainer = Trainer(make_model(), data, make_config(), tmp_path / "parts")
    for report in trainer.run():
        if report.step == 6:
            trainer.stop()
    (*_, path) = checkpoint_paths(tmp_path / "parts")
    state = read_checkpoint(path)
    del state["stale_evaluations"]
    for name in ("optimizer", "parallel", "recompute", "lora_rank", "lora_alpha", "early_stopping", "log"):
        del state["train_config"][name]
    torch.save(state, path)
    list(Trainer.resume(tmp_path / "parts", data).run())
    assert_same(weights(GPT2.from_pretrained(tmp_path / "parts")), weights(GPT2.from_pretrained(tmp_path / "whole")))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def no_optimizer_state(state: dict[str, Any]) -> None:
    state["optimizer"]["state"] = {}


DAMAGE: dict[str, tuple[Any, str]] = {
    "no step": (lambda state: state.pop("step"), "lacks step; remove it"),
    "no model": (lambda state: state.pop("model"), "lacks model; remove it"),
    "optimizer without state": (no_optimizer_state, "not a whole checkpoint .*optimizer's state does not belong"),
    "empty optimizer": (lambda state: state["optimizer"].clear(), "not a whole checkpoint"),
    "optimizer of another kind": (lambda state: state.update(optimizer=3), "not a whole checkpoint"),
    "weight missing": (lambda state: state["model"].popitem(), "not a whole checkpoint"),
    "weights of another kind": (lambda state: state.update(model=[]), "not a whole checkpoint"),
    "size missing": (lambda state: state["model_config"].update(hidden_size=None), "not a whole checkpoint"),
    "foreign setting": (lambda state: state["train_config"].update(colour="red"), "not a whole checkpoint"),
    "step of another kind": (lambda state: state.update(step="1"), "not a whole checkpoint"),
    "loss of another kind": (lambda state: state.update(loss_sum="x"), "not a whole checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_one_sentence(kind: str, data: TokenData, tmp_path: Path) -> None:
    list(Trainer(make_model(), data, make_config(steps=1), tmp_path).run())
    (path,) = checkpoint_paths(tmp_path)
    state = read_checkpoint(path)
    damage, message = DAMAGE[kind]
    damage(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"step-00000001.pt: {message}") as raised:
        Trainer.resume(tmp_path, data)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_with_a_flipped_bit_is_refused(data: TokenData, tmp_path: Path) -> None:
    list(Trainer(make_model(), data, make_config(steps=1), tmp_path).run())
    (path,) = checkpoint_paths(tmp_path)
    content = bytearray(path.read_bytes())
    weight = read_checkpoint(path)["model"]["transformer.wte.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000001.pt: is damaged \(Bad CRC-32"):
        read_checkpoint(path)


class RunsCode:
    """An object whose unpickling creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"format": 2, "model": RunsCode(tmp_path / "made")}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "step.pt")
    assert not (tmp_path / "made").exists()


def test_every_process_and_step_has_random_numbers_of_its_own(data: TokenData, tmp_path: Path) -> None:
    seeds = []
    for rank in range(3):
        processes = Processes(rank, 1, torch.device("cpu"))
        trainer = Trainer(make_model(), data, make_config(), tmp_path, processes=processes)
        for step in range(3):
            trainer.step = step
            trainer._train_step(trainer._wrapped())
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 9


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    what: str, data: TokenData, tmp_path: Path
) -> None:
    trainer = Trainer(make_model(), data, make_config(eval_interval=0), tmp_path)
    bias = trainer.model.get_parameter("transformer.ln_f.bias")

    def poison() -> None:
        if what == "loss":
            with torch.no_grad():
                bias[0] = math.nan
        else:
            bias.register_hook(lambda grad: grad * math.inf)

    reports = trainer.run()
    while not isinstance(next(reports), CheckpointReport):
        pass
    poison()
    with pytest.raises(ValueError, match=rf"the {what} became (nan|inf) by step 6; step-00000005.pt is the last good"):
        list(reports)
    state = read_checkpoint(checkpoint_paths(tmp_path)[-1])
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be an int >= 1; got 0"),
        ({"batch_size": 1.5}, "batch_size must be an int >= 1; got 1.5"),
        ({"lr": 0}, "lr must be a finite number > 0; got 0"),
        ({"lr": math.nan}, "lr must be a finite number > 0; got nan"),
        ({"min_lr": -1.0}, "min_lr must be a finite number >= 0; got -1.0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\); got 1.0"),
        ({"dtype": "fp8"}, "dtype must be one of auto, bf16, fp16, fp32; got 'fp8'"),
        ({"export": "both"}, "export must be one of best, last; got 'both'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, muon; got 'lion'"),
        ({"parallel": "tp"}, "parallel must be one of ddp, fsdp; got 'tp'"),
        ({"log": "mlflow"}, "log must be one of tensorboard, wandb; got 'mlflow'"),
        ({"lora_rank": -1}, "lora_rank must be an int >= 0; got -1"),
        ({"lora_alpha": 4.0}, "lora_alpha needs lora_rank; give both or neither"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha must be a finite number > 0; got 0"),
        ({"early_stopping": 2, "eval_interval": 0}, "early_stopping needs evaluations; give an eval_interval > 0"),
        ({"parallel": "fsdp", "compile": True}, "compile does not work with parallel 'fsdp'; leave one of the two out"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63"),
    ],
    ids=str,
)
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig(**fields)


def test_models_that_do_not_go_with_the_data_are_refused(data: TokenData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights must be float32"):
        Trainer(make_model().to(torch.bfloat16), data, make_config(), tmp_path)
    with pytest.raises(ValueError, match=r"train.bin: has 600 tokens; a context of 600 needs at least 601"):
        Trainer(make_model(context_length=600), data, make_config(), tmp_path)
