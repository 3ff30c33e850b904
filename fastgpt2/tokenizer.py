"""Tokenizers, built on the `tokenizers` library: reading Hugging Face's files, and training a byte-level BPE."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt2.files import atomic_file
from fastgpt2.messages import first_line, shown

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# The smallest vocabulary of a byte-level BPE: the 256 bytes and END_OF_TEXT.
MIN_VOCAB_SIZE = 257
# Training reserves memory for the whole vocabulary before it looks at a text.
MAX_VOCAB_SIZE = 1 << 20


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows its end-of-text id. `<|endoftext|>` in a text is encoded as that one token.

    Args:
        backend: The tokenizer; its truncation and padding are turned off.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A tokenizer.json can ask for both, which would change the tokens of a text. transformers ignores it too.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json`.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not a tokenizer.
        """
        import tokenizers

        text = _read(Path(path))
        _check_json(text, path)
        with _library_errors(f"{path}: not a tokenizer.json"):
            return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def from_folder(cls, folder: str | PathLike[str]) -> Tokenizer | None:
        """Read the tokenizer in a folder: `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.

        Args:
            folder: The folder.

        Returns:
            The tokenizer, or None if the folder has none.

        Raises:
            OSError: A file cannot be read, or one of `vocab.json` and `merges.txt` is missing.
            ValueError: The files are not a tokenizer.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            return cls.from_file(folder / "tokenizer.json")
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if vocab.exists() and merges.exists():
            return cls._from_vocab_and_merges(vocab, merges)
        if vocab.exists() or merges.exists():
            missing = merges if vocab.exists() else vocab
            raise FileNotFoundError(f"{missing}: no such file; vocab.json and merges.txt go together")
        return None

    @classmethod
    def _from_vocab_and_merges(cls, vocab_path: Path, merges_path: Path) -> Tokenizer:
        import tokenizers

        try:
            vocab = json.loads(_read(vocab_path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{vocab_path}: not JSON: {first_line(error)}") from error
        if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < 1 << 31 for i in vocab.values()):
            raise ValueError(f"{vocab_path}: must map every token to its id, an integer in [0, 2**31)")
        lines = (line.rstrip("\r\n") for line in _read(merges_path).split("\n"))
        merges = []
        for line in lines:
            if line and not line.startswith("#version"):
                left, _, right = line.partition(" ")
                if left not in vocab or right not in vocab or left + right not in vocab:
                    raise ValueError(
                        f"{merges_path}: every line must be two tokens of {vocab_path.name} that join to a third; "
                        f"got {line!r}"
                    )
                merges.append((left, right))
        with _library_errors(f"{vocab_path}, {merges_path.name}: not a tokenizer"):
            backend = _byte_level(tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges)))
        if END_OF_TEXT in vocab:
            backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return cls(backend)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE (Radford et al. 2019) on texts.

        `<|endoftext|>` has the id 0, and all 256 bytes are in the vocabulary.

        Args:
            texts: The training texts.
            vocab_size: The size of the vocabulary. It becomes smaller if the texts have too few pairs to merge.

        Raises:
            ValueError: `vocab_size` is out of range.
        """
        import tokenizers

        check_vocab_size(vocab_size)
        backend = _byte_level(tokenizers.Tokenizer(tokenizers.models.BPE()))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(iter(texts), trainer)
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; ValueError if the tokenizer cannot encode it."""
        with _library_errors("the tokenizer cannot encode this text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text; ValueError if the tokenizer cannot encode one."""
        with _library_errors("the tokenizer cannot encode these texts"):
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; special tokens are spelled out."""
        return self.backend.decode(ids, skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_token_id(self) -> int | None:
        """The id of `<|endoftext|>`, or None if the vocabulary lacks it."""
        return self.backend.token_to_id(END_OF_TEXT)

    def digest(self) -> str:
        """A hash of the whole tokenizer, by which a resumed run recognizes it."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def save(self, folder: str | PathLike[str]) -> None:
        """Write `tokenizer.json`, and the `tokenizer_config.json` that transformers' AutoTokenizer needs.

        Args:
            folder: The folder; it is created if it is missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.eos_token_id is not None:
            config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
        for name, text in (
            ("tokenizer.json", self.backend.to_str()),
            ("tokenizer_config.json", json.dumps(config, indent=2)),
        ):
            with atomic_file(folder / name) as file:
                file.write(f"{text}\n".encode())


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError if `Tokenizer.train` cannot make a vocabulary of this size."""
    if not isinstance(vocab_size, int) or not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"Tokenizer.train: vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}) and at most "
            f"{MAX_VOCAB_SIZE}; got {shown(vocab_size)}"
        )


def as_token_id(token: Any, caller: str, name: str) -> int:
    """Return an integer (Python's, NumPy's or PyTorch's) as an int. Floats, strings and bools are refused.

    Args:
        token: The value.
        caller: The name that an error begins with.
        name: What holds the value, as an error calls it.

    Raises:
        TypeError: `token` is not an integer.
    """
    try:
        if isinstance(token, bool) or (isinstance(token, Tensor) and token.dtype == torch.bool):
            raise TypeError
        return operator.index(token)
    except TypeError:
        raise TypeError(f"{caller}: token ids must be integers; {name} holds {shown(token)}") from None


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn errors of the tokenizers library into a ValueError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # The library raises bare Exceptions. For panics of its Rust code it raises a BaseException whose class it does
        # not export.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {first_line(error)}") from error


def _check_json(text: str, path: str | PathLike[str]) -> None:
    """Raise ValueError for a damaged tokenizer.json on which the library would panic, and print more than our error."""
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer.json: {first_line(error)}") from error
    model = contents.get("model") if isinstance(contents, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f'{path}: not a tokenizer.json: it has no "model"')
    prefix = model.get("continuing_subword_prefix")
    merges = model.get("merges")
    if isinstance(prefix, str) and isinstance(merges, list):
        for merge in merges:
            right = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] if merge else ""
            if not str(right).startswith(prefix):
                raise ValueError(
                    f"{path}: not a tokenizer.json: {shown(right)} in its merges must begin with {prefix!r}"
                )


def _byte_level(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    import tokenizers

    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text; {error.reason} at byte {error.start}") from error
