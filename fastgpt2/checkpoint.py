"""Checkpoints in and out: Hugging Face folders and hub names, single files, nanoGPT's `ckpt.pt`.

Two layouts exist. Hugging Face's GPT-2 holds the weights of its linear layers as (in, out) (its Conv1D), nanoGPT and
this package as (out, in). Which one a file has follows from its format, never from its shapes: a file with nanoGPT's
`model_args` is nanoGPT's, everything else is Hugging Face's.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import GPT2Config
from fastgpt2.files import STAGE_PREFIX
from fastgpt2.model import GPT2

# The name of the small model that is shipped inside the package.
EMBEDDED = "embedded"
_ASSETS = Path(__file__).parent / "assets"

# In order of preference. An index names the files ("shards") that the weights are spread over.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
_NANOGPT_FILE = "ckpt.pt"

_WTE, _WPE, _HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
# What torch.compile and DistributedDataParallel put before the names of the modules that they wrap.
_WRAPPERS = ("_orig_mod.", "module.")
# The causal mask that old files carry.
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_LINEAR_WEIGHT = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Bytes read through a memory map before it is renewed; what was read counts as this process's memory until then.
_MAPPED_BYTES = 32 * 2**20


def load_pretrained(
    name_or_path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    revision: str | None = None,
    **config_changes: Any,
) -> GPT2:
    """A model in eval mode from a folder, a file, a name on the Hugging Face hub, or "embedded".

    Read are Hugging Face folders (safetensors or pytorch_model.bin, whole or sharded), a single such file beside its
    config.json, and nanoGPT's `ckpt.pt` or the folder that holds it. `dtype=None` keeps the dtype that the file holds
    its token embeddings in. `config_changes` are fields of `GPT2Config`; a `vocab_size` or `context_length` below the
    file's cuts the rows past it (nanoGPT pads its vocabulary to 50304). nanoGPT models without biases get zero ones,
    which compute the same. `.tokenizer` is set where the folder has one. Weights are copied tensor by tensor out of a
    memory map: the peak is one copy of them.

    OSError for what cannot be found or read, ValueError for contents that do not fit, naming keys and shapes,
    ImportError when a hub name is given without the extra: `pip install "fastgpt2[hub]"`.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"load_pretrained: dtype must be a floating-point torch.dtype; got {dtype}")
    unknown = sorted(set(config_changes) - {field.name for field in fields(GPT2Config)})
    if unknown:
        raise TypeError(f"load_pretrained: unknown argument {', '.join(unknown)}; see GPT2Config for the fields")
    source = _find(name_or_path, revision)
    config = source.config.replace(**config_changes)
    contents = {path: _open(path) for path in source.files}
    where = {
        canonical: (path, name)
        for path, tensors in contents.items()
        for name in tensors
        if not _MASK_BUFFER.fullmatch(canonical := _canonical(name))
    }
    config = _resolve_tie(config, where, contents, source.name)
    with torch.device("meta"):
        model = GPT2(config, backend=backend)
    shapes = {canonical: contents[path][name].shape for canonical, (path, name) in where.items()}
    cut = {name for field, names in _ROW_FIELDS.items() if field in config_changes for name in names}
    _check_keys(model, shapes, source, cut)

    wte_path, wte_name = where[_WTE]
    model.to(dtype=dtype or _checked_dtype(contents[wte_path][wte_name], source.name)).to_empty(device=device)
    model.tie_weights()
    targets: dict[Path, dict[str, Tensor]] = {path: {} for path in source.files}
    for canonical, tensor in _named_weights(model, transpose=not source.is_nanogpt):
        if canonical in where:
            path, name = where[canonical]
            targets[path][name] = tensor
        else:
            tensor.zero_()  # the biases that a nanoGPT model goes without
    while contents:
        path, tensors = contents.popitem()
        _copy_out(path, tensors, targets[path])
    if source.folder is not None:
        from fastgpt2.tokenizer import Tokenizer

        model.tokenizer = Tokenizer.from_folder(source.folder)
    return model.eval()


def read_config(name_or_path: str | PathLike[str], *, revision: str | None = None) -> GPT2Config:
    """The configuration of what `load_pretrained` would load; of a hub name nothing else is downloaded."""
    path = _local(name_or_path, revision)
    folder = _download(os.fspath(name_or_path), revision, config_only=True) if path is None else path
    return _hf_config(folder) if (folder / "config.json").exists() else _find(folder, None).config


def save_pretrained(model: GPT2, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that `load_pretrained` and transformers' `GPT2LMHeadModel.from_pretrained` load bit for bit.

    Holds config.json, model.safetensors, generation_config.json and the model's tokenizer if it has one. All files are
    written in full before the first takes its name, and each replaces an older one in a single step: a crash leaves
    the checkpoint that was there. `dtype` converts the weights on the way.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _staged(path) as stage:
        state = {name: _detached(tensor, dtype) for name, tensor in hf_state_dict(model).items()}
        try:
            save_file(state, stage / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: the weights cannot be written: {_first_line(error)}") from error
        config = model.config.to_hf()
        _write_json(stage / "config.json", {**config, "dtype": str(dtype or model.dtype).removeprefix("torch.")})
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        if ids:
            _write_json(stage / "generation_config.json", ids)
        if model.tokenizer is not None:
            model.tokenizer.save(stage)


def save_nanogpt(model: GPT2, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write `ckpt.pt` into the folder `path` as nanoGPT's sample.py loads it; there is no optimizer state in it.

    nanoGPT has one architecture: ValueError, naming the fields, for a model that it would compute differently. The
    exception is the tanh-GELU, which nanoGPT replaces by the exact one (differences of about 1e-3 an activation), as it
    does when it loads OpenAI's weights: a warning says so. What `ckpt.pt` has no place for is kept in an extra entry,
    so that `load_pretrained` gives the same model back.
    """
    config = model.config
    wrong = [name for name, value in _NANOGPT_FIELDS.items() if getattr(config, name) != value]
    if config.inner_dim != 4 * config.hidden_size:
        wrong.append("feedforward_dim")
    if not config.residual_dropout == config.embedding_dropout == config.attention_dropout:
        wrong.append(
            "embedding_dropout" if config.residual_dropout == config.attention_dropout else "attention_dropout"
        )
    if config.activation_function not in (*_EXACT_GELU, *_TANH_GELU):
        wrong.append("activation_function")
    if wrong:
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise ValueError(f"save_nanogpt: nanoGPT cannot compute this model; what it has no setting for: {got}")
    if config.activation_function in _TANH_GELU:
        warnings.warn(
            "save_nanogpt: nanoGPT computes the exact GELU; this model was made with its tanh approximation",
            stacklevel=2,
        )
    args = {theirs: getattr(config, ours) for theirs, ours in _NANOGPT_ARGS.items()}
    state = {name: _detached(tensor, dtype) for name, tensor in _named_weights(model, transpose=False)}
    state[_HEAD] = state[_WTE]
    with _staged(path) as stage:
        contents = {"model_args": {**args, "bias": True}, "model": state, _OUR_CONFIG: config.to_hf()}
        torch.save(contents, stage / _NANOGPT_FILE)
        if model.tokenizer is not None:
            model.tokenizer.save(stage)


def hf_state_dict(model: GPT2) -> dict[str, Tensor]:
    """The weights under Hugging Face's names and in its layout, as views of the model's own; without a tied head."""
    return dict(_named_weights(model, transpose=True))


def load_hf_views(model: GPT2, state: Mapping[str, Tensor]) -> None:
    """Make the weights of `model` views of `state`, which has Hugging Face's names and layout: nothing is copied.

    The model's own tensors are given up (it may be on the meta device). ValueError for keys or shapes that do not fit.
    """
    by_name = {_canonical(name): tensor for name, tensor in state.items()}
    by_name = {name: tensor for name, tensor in by_name.items() if not _MASK_BUFFER.fullmatch(name)}
    if model.config.tie_word_embeddings:
        by_name.pop(_HEAD, None)
    source = _Source("the model's state_dict", model.config, (), None)
    _check_keys(model, {name: tensor.shape for name, tensor in by_name.items()}, source, set())
    views = {name: t.t() if _LINEAR_WEIGHT.fullmatch(name) else t for name, t in by_name.items()}
    if model.config.tie_word_embeddings:
        views[_HEAD] = views[_WTE]
    model.load_state_dict(views, assign=True)
    model.tie_weights()


# -- finding the files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    name: str  # for messages
    config: GPT2Config
    files: tuple[Path, ...]
    folder: Path | None  # where a tokenizer may lie
    is_nanogpt: bool = False
    has_biases: bool = True


def _find(name_or_path: str | PathLike[str], revision: str | None) -> _Source:
    path = _local(name_or_path, revision)
    if path is None:
        return _find_in_folder(_download(os.fspath(name_or_path), revision))
    return _find_in_folder(path) if path.is_dir() else _find_file(path)


def _local(name_or_path: str | PathLike[str], revision: str | None) -> Path | None:
    """The file or folder of that name; None where there is none and it may be a name on the hub."""
    path = _ASSETS if name_or_path == EMBEDDED else Path(name_or_path).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"load_pretrained: revision is for hub names; {path} is on this machine")
        return path
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", os.fspath(name_or_path))
    if not is_hub_name or path.suffix in (".safetensors", ".bin", ".pt"):
        raise FileNotFoundError(f"{path}: no such file or folder (and no name of a model on the hub, like owner/name)")
    return None


def _find_in_folder(folder: Path) -> _Source:
    if not (folder / "config.json").exists():
        if (folder / _NANOGPT_FILE).exists():
            return _find_file(folder / _NANOGPT_FILE)
        raise FileNotFoundError(f"{folder}: has neither config.json (Hugging Face) nor {_NANOGPT_FILE} (nanoGPT)")
    for name in _WEIGHT_FILES:
        if (folder / name).exists():
            names = _shards(folder / name) if name.endswith(".index.json") else [name]
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise FileNotFoundError(f"{folder}: the index names files that are missing: {_listed(missing)}")
            return _Source(str(folder), _hf_config(folder), tuple(folder / name for name in names), folder)
    raise FileNotFoundError(f"{folder}: has a config.json but no weights; looked for {', '.join(_WEIGHT_FILES)}")


def _find_file(path: Path) -> _Source:
    contents = {} if path.suffix == ".safetensors" else _torch_load(path)
    if "model_args" in contents and "model" in contents:
        config, has_biases = _nanogpt_config(contents, path)
        return _Source(str(path), config, (path,), path.parent, is_nanogpt=True, has_biases=has_biases)
    if not (path.parent / "config.json").exists():
        raise FileNotFoundError(f"{path}: needs the model's config.json beside it; there is none in {path.parent}")
    return _Source(str(path), _hf_config(path.parent), (path,), path.parent)


def _shards(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(f, str) and Path(f).name == f for f in weight_map.values()
    ):
        raise ValueError(f'{index}: must map every weight to a file of its folder under "weight_map"')
    return sorted(set(weight_map.values()))


def _download(name: str, revision: str | None, *, config_only: bool = False) -> Path:
    """The files of a hub repository that are needed, in the hub's cache; its folder there."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file or folder here; to load a model of that name from the Hugging Face hub, "
            'pip install "fastgpt2[hub]"'
        ) from error

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except LocalEntryNotFoundError as error:
            offline.append(error)
        except EntryNotFoundError:
            pass
        except (OSError, ValueError) as error:  # no such repository or revision, no access, not a name
            raise OSError(f"{name}: cannot be loaded from the hub: {_first_line(error)}") from error
        return None

    offline: list[Exception] = []
    config = fetch("config.json")
    if config is None and offline:
        raise OSError(
            f"{name!r} is no file or folder here, and the hub cannot be reached and has not been read before"
        ) from offline[0]
    if config is None:
        raise FileNotFoundError(f"{name}: the hub's repository has no config.json")
    folder, revision = config.parent, config.parent.name  # the commit, so that all files are of one state
    fetch("generation_config.json")
    if config_only:
        return folder
    for file in _WEIGHT_FILES:
        found = fetch(file)
        if found is None:
            continue
        for shard in _shards(found) if file.endswith(".index.json") else ():
            if fetch(shard) is None:
                raise FileNotFoundError(f"{name}: {shard}, which {file} names, could not be downloaded")
        break
    else:
        reason = "the hub cannot be reached and no weights are cached" if offline else "its repository has no weights"
        raise FileNotFoundError(f"{name}: {reason}; looked for {', '.join(_WEIGHT_FILES)}")
    for file in _TOKENIZER_FILES:
        fetch(file)
    return folder


# -- configurations -------------------------------------------------------------------------------------------------


def _hf_config(folder: Path) -> GPT2Config:
    try:
        config = GPT2Config.from_hf(_read_json(folder / "config.json"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error
    generation = folder / "generation_config.json"
    # Where both have end-of-text ids, transformers' generate goes by these.
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if eos is None else config.replace(eos_token_id=eos)


# nanoGPT's model_args and our fields; `dropout` is all three of ours, `bias` is seen to by the loader.
_NANOGPT_ARGS = {
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "hidden_size",
    "block_size": "context_length",
    "vocab_size": "vocab_size",
    "dropout": "residual_dropout",
}
# What nanoGPT computes and has no setting for.
_NANOGPT_FIELDS: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
}
_EXACT_GELU = ("gelu", "gelu_python")
_TANH_GELU = ("gelu_new", "gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh")
# The entry of a ckpt.pt in which `save_nanogpt` keeps the whole configuration.
_OUR_CONFIG = "fastgpt2_config"


def _nanogpt_config(contents: Mapping[str, Any], path: Path) -> tuple[GPT2Config, bool]:
    args = contents["model_args"]
    unknown = sorted(set(args) - set(_NANOGPT_ARGS) - {"bias"})
    missing = sorted(set(_NANOGPT_ARGS) - set(args) - {"dropout"})
    if unknown or missing:
        raise ValueError(
            f"{path}: model_args must be nanoGPT's; missing: {_listed(missing)}; unknown: {_listed(unknown)}"
        )
    has_biases = bool(args.get("bias", True))
    if _OUR_CONFIG in contents:
        return GPT2Config.from_hf(contents[_OUR_CONFIG]), has_biases
    dropout = args.get("dropout", 0.0)
    config = {ours: args[theirs] for theirs, ours in _NANOGPT_ARGS.items() if theirs in args}
    config |= {"embedding_dropout": dropout, "attention_dropout": dropout, "activation_function": "gelu"}
    return GPT2Config(**config), has_biases


# -- keys and shapes ------------------------------------------------------------------------------------------------

# Fields of the configuration that may be smaller than the file's, and the weights whose rows are cut then.
_ROW_FIELDS = {"vocab_size": (_WTE, _HEAD), "context_length": (_WPE,)}


def _canonical(name: str) -> str:
    """Our name of a file's weight: no wrapper's prefix, always with `transformer.`."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _resolve_tie(
    config: GPT2Config, where: dict[str, tuple[Path, str]], contents: Mapping[Path, Mapping[str, Tensor]], source: str
) -> GPT2Config:
    """Leave one of the two names of a tied weight in `where`. As transformers, untie what the file has as two."""
    if not config.tie_word_embeddings or _HEAD not in where:
        return config
    if _WTE in where:
        wte, head = (contents[path][name] for path, name in (where[_WTE], where[_HEAD]))
        if wte.shape != head.shape or not _equal(wte, head):
            warnings.warn(
                f"{source}: tie_word_embeddings is true, but the file holds two different weights; they stay untied",
                stacklevel=3,
            )
            return config.replace(tie_word_embeddings=False)
        where.pop(_HEAD)
    else:
        where[_WTE] = where.pop(_HEAD)
    return config


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _check_keys(model: GPT2, shapes: dict[str, torch.Size], source: _Source, cut: set[str]) -> None:
    expected = {name: t.shape for name, t in _named_weights(model, transpose=not source.is_nanogpt)}
    if source.is_nanogpt and not source.has_biases:
        shapes = {**{name: shape for name, shape in expected.items() if name.endswith(".bias")}, **shapes}
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"missing keys: {_listed(missing)}")
    if unexpected := [name for name in shapes if name not in expected]:
        problems.append(f"unexpected keys: {_listed(unexpected)}")
    wrong = [
        f"{name} is {tuple(shapes[name])} in the file and {tuple(shape)} in the configuration"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape and not (name in cut and _is_cut(shape, shapes[name]))
    ]
    if wrong:
        problems.append(f"other shapes: {_listed(wrong)}")
    if problems:
        raise ValueError(f"{source.name}: the weights do not fit the configuration; {'; '.join(problems)}")


def _is_cut(shape: torch.Size, of: torch.Size) -> bool:
    return len(shape) == len(of) and shape[0] < of[0] and shape[1:] == of[1:]


def _named_weights(model: GPT2, *, transpose: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights by name as detached views, with `transpose` in Hugging Face's layout; without a tied head."""
    for name, tensor in model.state_dict().items():
        if name == _HEAD and model.config.tie_word_embeddings:
            continue
        yield name, tensor.t() if transpose and _LINEAR_WEIGHT.fullmatch(name) else tensor


def _checked_dtype(tensor: Tensor, source: str) -> torch.dtype:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{source}: weights must be float64, float32, bfloat16 or float16; got {tensor.dtype}")
    return tensor.dtype


# -- reading --------------------------------------------------------------------------------------------------------


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, memory-mapped where the format allows it: nothing is read yet."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({_first_line(error)}); is it whole?") from error
    else:
        contents = _torch_load(path)
        tensors = contents["model"] if "model_args" in contents and "model" in contents else contents
        others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(f"{path}: must map names to tensors; other entries: {_listed(others)}")
    for name, tensor in tensors.items():
        if not _MASK_BUFFER.fullmatch(_canonical(name)):
            _checked_dtype(tensor, f"{path}: {name}")
    return tensors


def _torch_load(path: Path) -> dict[str, Any]:
    try:
        # Files of PyTorch before 1.6 are no zip archives, and only those can be mapped.
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable file of tensors ({_first_line(error)}); is it whole?") from error
    if not isinstance(contents, dict) or not all(isinstance(key, str) for key in contents):
        raise ValueError(f"{path}: must hold a dictionary of tensors; got {type(contents).__name__}")
    return contents


def _copy_out(path: Path, tensors: dict[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into `targets`, a block of rows at a time, with few pages of its map in memory."""
    is_mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
    resident = 0
    with torch.no_grad():
        for name, target in targets.items():
            if target.dim() == 0:
                target.copy_(tensors[name])
                continue
            row_bytes = tensors[name][:1].numel() * tensors[name].element_size()
            rows = max(1, _MAPPED_BYTES // max(row_bytes, 1))
            for start in range(0, target.shape[0], rows):
                if is_mapped and resident >= _MAPPED_BYTES:
                    tensors.clear()
                    tensors, resident = _open(path), 0
                block = target[start : start + rows]
                block.copy_(tensors[name][start : start + block.shape[0]])
                resident += block.shape[0] * row_bytes
            if not is_mapped:
                tensors.pop(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not JSON
        raise ValueError(f"{path}: not a JSON file ({_first_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    return value


# -- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def _staged(path: str | PathLike[str]) -> Iterator[Path]:
    """A folder to write files into; when all are there and on disk, they move into the folder `path`."""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a checkpoint is a folder, and this is a file; name another")
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=folder))
    try:
        yield stage
        files = sorted(stage.iterdir())
        for file in files:
            _sync(file)
        for file in files:
            os.replace(file, folder / file.name)
        _sync(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _detached(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _listed(items: list[str]) -> str:
    shown = ", ".join(items[:6]) or "none"
    return f"{shown} and {len(items) - 6} more" if len(items) > 6 else shown


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:; ")
