"""Train a GPT-2 on text, from scratch or from a checkpoint, or resume a run; torchrun trains in several processes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from tqdm import tqdm

from fastgpt2 import data, train
from fastgpt2.checkpoint import load_pretrained
from fastgpt2.cli.options import weights_digest
from fastgpt2.config import PRESETS, GPT2Config, TrainConfig
from fastgpt2.files import atomic_file, locked_folder
from fastgpt2.gpt2 import GPT2
from fastgpt2.messages import counted, first_line
from fastgpt2.tokenizer import Tokenizer, check_vocab_size

# Sizes if neither --preset nor --init-from is given: a few million parameters, which train in minutes on a CPU.
_DEFAULT_SIZES = {"num_layers": 6, "hidden_size": 256, "num_heads": 4, "context_length": 256}
_DEFAULT_VOCAB_SIZE = 4096
_MODEL_OPTIONS = {
    "layers": ("num_layers", int, "number of blocks"),
    "hidden-size": ("hidden_size", int, "width of the hidden states"),
    "heads": ("num_heads", int, "attention heads per block"),
    "context": ("context_length", int, "tokens per training row, and the longest context of the model"),
    "feedforward-dim": ("feedforward_dim", int, "width of the MLPs (default: 4 times the hidden size)"),
    "activation": ("activation_function", str, "activation function of the MLPs"),
    "dropout": ("dropout", float, "rate of the residual, embedding and attention dropout (default: 0)"),
}
_DROPOUTS = ("residual_dropout", "embedding_dropout", "attention_dropout")


# The options that define a run besides its TrainConfig, with their defaults. The run's folder keeps them for --resume.
_RUN_DEFAULTS: dict[str, Any] = {
    "data": None,
    "suffix": [],
    "column": None,
    "val_fraction": 0.05,
    "tokenizer": None,
    "vocab_size": None,
    "init_from": None,
    "preset": None,
}

_KEPT = {*_RUN_DEFAULTS, *(name for name, _, _ in _MODEL_OPTIONS.values()), *TrainConfig.__dataclass_fields__}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    unset = argparse.SUPPRESS  # an option that is not given is not in the namespace, so a resumed run keeps its value
    files = parser.add_argument_group("data and files")
    files.add_argument(
        "--data",
        nargs="+",
        default=unset,
        metavar="PATH",
        help="text files; .jsonl, .csv, .parquet or .fasta files, in which every row is a document; patterns; "
        "directories; hf://NAME; 'stdlib' (Python's own source code); or one folder with train.bin and val.bin",
    )
    files.add_argument(
        "--column",
        default=unset,
        metavar="NAME",
        help='the column of texts in .jsonl, .csv, .parquet and hf:// (default: "text")',
    )
    files.add_argument(
        "--suffix",
        nargs="+",
        default=unset,
        help="read only files of a directory whose names end in one of these, such as .py",
    )
    files.add_argument(
        "--val-fraction",
        type=float,
        default=unset,
        help="share of the documents held out for validation (default: 0.05)",
    )
    files.add_argument("--tokenizer", default=unset, metavar="FOLDER", help="use the tokenizer in this folder")
    files.add_argument(
        "--vocab-size",
        type=int,
        default=unset,
        help=f"train a byte-level BPE tokenizer of this size on the text (default: {_DEFAULT_VOCAB_SIZE})",
    )
    files.add_argument("--out", required=True, metavar="DIR", help="folder of the run and of the finished model")
    files.add_argument("--resume", action="store_true", help="continue the run in --out, or begin one if there is none")
    files.add_argument(
        "--init-from",
        default=unset,
        metavar="NAME_OR_PATH",
        help="start from the weights of this checkpoint instead of random ones",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=PRESETS, default=unset, help="use the sizes of a published model")
    for option, (name, kind, text) in _MODEL_OPTIONS.items():
        model.add_argument(f"--{option}", dest=name, type=kind, default=unset, help=text)
    model.add_argument(
        "--backend", default="auto", choices=("auto", "triton", "native", "torch"), help="which kernels to use"
    )
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    training = parser.add_argument_group("training")
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        shown = "" if field.default is None else f" (default: {field.default!r})"
        hint = hints[field.name]
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if hint is not bool:
            (kind,) = {*get_args(hint), hint} & {int, float, str}
            choices = field.metadata.get("choices")
            options = {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        flags = [f"--{field.name.replace('_', '-')}"]
        if field.name == "log":
            flags.append("--log-to")  # torchrun takes --log for an option of its own
        training.add_argument(*flags, default=unset, help=field.metadata["help"] + shown, **options)


def run(args: argparse.Namespace) -> int:
    given = vars(args)
    processes = train.Processes.start(args.device)
    try:
        checkpoints = train.checkpoint_paths(args.out)
        last = checkpoints[-1].name if checkpoints else None
        # First of all: processes with other options would wait for each other in other places.
        options = {
            name: value for name, value in given.items() if name in _KEPT or name in ("out", "resume", "backend")
        }
        processes.check_same({**options, f"the last checkpoint in {args.out}": last})
        if "minutes" in given and "steps" in given:
            raise ValueError("train: give --steps or --minutes, not both")
        resumes = bool(checkpoints)
        if resumes and not args.resume:
            raise ValueError(f"train: {args.out} holds a run; continue it with --resume or choose another --out")
        kept = _kept_options(args.out) if args.resume else None
        with processes.first_goes_first():  # only the first process reads through the texts
            plan = None if resumes else _planned(args, {**(kept or {}), **given}, processes)
        # Nothing is written before the arguments have been checked, and then only by one run at a time.
        with locked_folder(args.out) if processes.is_first else contextlib.nullcontext():
            trainer = _resumed(args, given, kept, processes) if plan is None else _begun(args, plan, processes)
            return _follow(trainer)
    finally:
        processes.close()


def _kept_options(out: str) -> dict[str, Any] | None:
    """The options that the run in `out` began with; None if the file that holds them is missing."""
    path = Path(out, "run.json")
    if not path.exists():
        return None
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(options, dict) or options.keys() - _KEPT:
            raise ValueError("it holds something else")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: must hold a run's options as JSON; it does not ({first_line(error)}): remove it and give the "
            "options again"
        ) from error
    return options


def _keep_options(out: str, options: dict[str, Any]) -> None:
    kept = {name: value for name, value in options.items() if name in _KEPT}
    with atomic_file(Path(out, "run.json")) as file:
        file.write(json.dumps(kept, indent=2).encode())


def _train_fields(options: dict[str, Any]) -> dict[str, Any]:
    return {f.name: options[f.name] for f in dataclasses.fields(TrainConfig) if f.name in options}


def _sizes(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPT2Config among the options."""
    sizes = {name: options[name] for name, _, _ in _MODEL_OPTIONS.values() if name in options}
    if (rate := sizes.pop("dropout", None)) is not None:
        sizes |= dict.fromkeys(_DROPOUTS, rate)
    return sizes


# -- the beginning ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Plan:
    """A run that is ready to begin: its options, and what was loaded for it.

    Attributes:
        tokens: The token shards that `--data` names; None if it names text.
        corpus: The text to make token shards of; None if they exist already or another process makes them.
    """

    options: dict[str, Any]
    wanted: dict[str, Any]
    sizes: dict[str, Any]
    config: TrainConfig
    initial: GPT2 | None
    tokenizer: Tokenizer | None
    tokens: data.TokenData | None = None
    corpus: data.Corpus | None = None
    request: dict[str, Any] = dataclasses.field(default_factory=dict)


def _planned(args: argparse.Namespace, options: dict[str, Any], processes: train.Processes) -> _Plan:
    """Check everything that can be checked before the data is prepared. Nothing is written."""
    config, sizes = TrainConfig(**_train_fields(options)), _sizes(options)
    wanted = {name: options.get(name, default) for name, default in _RUN_DEFAULTS.items()}
    if not wanted["data"]:
        raise ValueError("train: there is no text to train on; give it with --data PATH, or try --data stdlib")
    if config.lora_rank and not wanted["init_from"]:
        raise ValueError("train: --lora-rank needs trained weights to adapt; name them with --init-from")
    if wanted["init_from"] and (wanted["preset"] or sizes.keys() - set(_DROPOUTS)):
        raise ValueError("train: --init-from sets the model's sizes; leave out --preset and the size options")
    if wanted["vocab_size"] and (wanted["tokenizer"] or wanted["init_from"]):
        brings = "--tokenizer" if wanted["tokenizer"] else "--init-from"
        raise ValueError(f"train: {brings} sets the vocabulary; leave out --vocab-size")
    train.check_config(config)  # last, as it may load libraries
    initial = None
    if wanted["init_from"]:
        # No dropout by default here either: the checkpoint's configuration says how the checkpoint was trained.
        changes = {**dict.fromkeys(_DROPOUTS, 0.0), **sizes}
        initial = load_pretrained(wanted["init_from"], dtype=torch.float32, backend=args.backend, **changes)
    tokenizer = _named_tokenizer(wanted["tokenizer"]) if wanted["tokenizer"] else initial.tokenizer if initial else None
    if initial and tokenizer and tokenizer.vocab_size > initial.config.vocab_size:
        raise ValueError(
            f"train: the tokenizer must fit the model of --init-from, which has {initial.config.vocab_size} tokens; "
            f"got {tokenizer.vocab_size} tokens: name another tokenizer with --tokenizer"
        )
    plan = _Plan(options, wanted, sizes, config, initial, tokenizer)
    if (folder := _shard_folder(wanted["data"])) is not None:
        plan.tokenizer = tokenizer or Tokenizer.from_folder(folder)
        plan.tokens = data.TokenData.open(folder)
        model_config = initial.config if initial else _model_config(wanted, sizes, plan.tokenizer)
        plan.tokens.train.windows_per_epoch(model_config.context_length)  # raises when there are too few tokens
        return plan
    if initial and not tokenizer:
        raise ValueError(f"train: {wanted['init_from']} has no tokenizer; name a folder that has one with --tokenizer")
    vocab_size = None if tokenizer else wanted["vocab_size"] or _DEFAULT_VOCAB_SIZE
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    if not initial:
        _model_config({**wanted, "vocab_size": vocab_size}, sizes, tokenizer)
    plan.request = {
        "sources": wanted["data"],
        "suffixes": wanted["suffix"],
        "column": wanted["column"],
        "val_fraction": wanted["val_fraction"],
        "seed": config.seed,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer.digest() if tokenizer else None,
    }
    meta = data.read_meta(Path(args.out, "data"))
    if processes.is_first and not (args.resume and meta and meta.request == plan.request):
        plan.corpus = data.find_documents(
            wanted["data"],
            suffixes=wanted["suffix"],
            column=wanted["column"],
            val_fraction=wanted["val_fraction"],
            seed=config.seed,
        )
    return plan


def _begun(args: argparse.Namespace, plan: _Plan, processes: train.Processes) -> train.Trainer:
    with processes.first_goes_first():
        if processes.is_first:
            _keep_options(args.out, plan.options)
        tokens, tokenizer = _prepared(Path(args.out, "data"), plan)
    torch.manual_seed(plan.config.seed)
    if plan.initial:
        processes.check_same({"the hash of --init-from": weights_digest(plan.initial)})
    model = plan.initial or GPT2(_model_config(plan.wanted, plan.sizes, tokenizer), backend=args.backend)
    return train.Trainer(model, tokens, plan.config, args.out, tokenizer=tokenizer, processes=processes)


def _prepared(folder: Path, plan: _Plan) -> tuple[data.TokenData, Tokenizer | None]:
    """Open the token shards and their tokenizer; the first process writes them if they do not exist yet."""
    if plan.tokens is not None:
        return plan.tokens, plan.tokenizer
    tokenizer = plan.tokenizer
    if (corpus := plan.corpus) is not None:
        _say(f"{counted(len(corpus), 'document')} ({corpus.num_val} for validation), {corpus.skipped:,} skipped")
        if tokenizer is None:
            pieces = (piece for segment in corpus.train for piece in segment.pieces())
            tokenizer = Tokenizer.train(pieces, plan.request["vocab_size"])
        tokenizer.save(folder)
        meta = data.write_shards(corpus, tokenizer, folder, plan.request)
        _say(
            f"{meta.train_tokens:,} tokens to train on, {meta.val_tokens:,} for validation, "
            f"vocabulary {meta.vocab_size:,}, {meta.train_bytes / max(1, meta.train_tokens):.2f} bytes per token"
        )
    return data.TokenData.open(folder), tokenizer or Tokenizer.from_folder(folder)


def _shard_folder(sources: list[str]) -> Path | None:
    """The folder of token shards that `--data` names; None if it names text."""
    return Path(sources[0]) if len(sources) == 1 and data.is_data_folder(sources[0]) else None


def _named_tokenizer(folder: str) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise FileNotFoundError(
            f"{folder}: has no tokenizer.json, and no vocab.json with merges.txt; name another folder with --tokenizer"
        )
    return tokenizer


def _model_config(wanted: dict[str, Any], sizes: dict[str, Any], tokenizer: Tokenizer | None) -> GPT2Config:
    # No dropout by default: a GPT-2 that is trained for a few epochs is better without it.
    changes: dict[str, Any] = dict.fromkeys(_DROPOUTS, 0.0)
    if tokenizer is not None:
        changes["vocab_size"] = tokenizer.vocab_size
        changes["bos_token_id"] = changes["eos_token_id"] = tokenizer.eos_token_id
    elif wanted["vocab_size"]:
        changes["vocab_size"] = wanted["vocab_size"]
    elif not wanted["preset"]:
        folder = wanted["data"][0]
        raise ValueError(f"train: {folder} has no tokenizer; give --tokenizer FOLDER, --vocab-size N or --preset NAME")
    if wanted["preset"]:
        return GPT2Config.preset(wanted["preset"], **{**changes, **sizes})
    return GPT2Config(**{**_DEFAULT_SIZES, **changes, **sizes})


def _resumed(
    args: argparse.Namespace, given: dict[str, Any], kept: dict[str, Any] | None, processes: train.Processes
) -> train.Trainer:
    was = {name: (given if kept is None else kept).get(name, default) for name, default in _RUN_DEFAULTS.items()}
    for name in given.keys() & was.keys():
        if given[name] != was[name]:
            raise ValueError(
                f"resume: {name} must stay {was[name]!r} as the run began; got {given[name]!r}: leave it out"
            )
    folder = _shard_folder(was["data"] or []) or Path(args.out, "data")
    trainer = train.Trainer.resume(
        args.out, data.TokenData.open(folder), processes=processes, backend=args.backend, **_train_fields(given)
    )
    for name, value in _sizes(given).items():
        before = getattr(trainer.model.config, name)
        if value != before:
            raise ValueError(f"resume: {name} must stay {before!r} as the run began; got {value!r}: leave it out")
    if kept is None and processes.is_first:
        _keep_options(args.out, given)  # run.json was lost; the checkpoint still checks that the data is the same
    _say(f"continuing from step {trainer.step} of {trainer.config.steps}", processes.is_first)
    return trainer


# -- the run ------------------------------------------------------------------------------------------------------


def _follow(trainer: train.Trainer) -> int:
    """Run a trainer to its end, or until a signal, and show its reports; returns the exit status."""
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        trainer.stop()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    first = trainer.processes.is_first
    try:
        trained = sum(p.numel() for p in trainer.parameters.values() if p.requires_grad)
        some = "" if not trainer.config.lora_rank else f" ({trained:,} in adapters, the only ones trained)"
        parameters = f"{trainer.model.num_parameters():,} parameters{some}"
        _say(
            f"{parameters}, {trainer.global_rows} rows of {trainer.context} tokens "
            f"per step, {trainer.config.dtype} on {trainer.device}, {counted(trainer.processes.count, 'process')}",
            first,
        )
        with tqdm(
            total=trainer.config.steps, initial=trainer.step, unit="step", disable=not (first and sys.stderr.isatty())
        ) as bar:
            for report in trainer.run():
                bar.total = trainer.config.steps
                bar.update(report.step - bar.n)
                if isinstance(report, train.StepReport):
                    line = f"loss {report.loss:.4f}, {report.tokens_per_s:,.0f} tokens/s, MFU {report.mfu:.1%}"
                    bar.set_postfix_str(line)
                    if bar.disable:
                        _say(f"step {report.step}/{trainer.config.steps}: {line}, lr {report.lr:.2e}", first)
                elif isinstance(report, train.EvalReport) and first:  # all processes yield the same report
                    bits = "" if report.bits_per_byte is None else f" ({report.bits_per_byte:.3f} bits per byte)"
                    bar.write(f"step {report.step}: validation loss {report.val_loss:.4f}{bits}", file=sys.stderr)
                elif isinstance(report, train.SampleReport):
                    bar.write(f"step {report.step}: sample\n{report.text}\n", file=sys.stderr)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if trainer.is_stopped_early and trainer.step < trainer.config.steps:
        evaluations = counted(trainer.stale_evaluations, "evaluation")
        _say(f"stopped early at step {trainer.step}: no new lowest validation loss in {evaluations}", first)
    if not trainer.is_finished:
        _say(f"stopped at step {trainer.step}; --resume continues", first)
        return 128 + received[0] if received else 1
    if first:
        print(trainer.out)
    return 0


def _say(line: str, first: bool = True) -> None:
    if first:
        print(line, file=sys.stderr, flush=True)
