"""Text to token ids and back, through the `tokenizers` library: Hugging Face's files, and byte-level BPE training."""

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
# The 256 bytes and END_OF_TEXT: the smallest vocabulary of a byte-level BPE.
MIN_VOCAB_SIZE = 257
# Training reserves memory for the whole vocabulary before it looks at a text.
MAX_VOCAB_SIZE = 1 << 20


class Tokenizer:
    """A `tokenizers.Tokenizer` with its end-of-text id: the spelling `<|endoftext|>` in a text is that one token."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A tokenizer.json can ask for both, which would change texts' tokens; transformers does not heed it either.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json`. OSError when it cannot be read, ValueError when it is not a tokenizer."""
        import tokenizers

        text = _read(Path(path))
        _check_json(text, path)
        with _library_errors(f"{path}: not a tokenizer.json"):
            return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def from_folder(cls, folder: str | PathLike[str]) -> Tokenizer | None:
        """Read `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`, from a folder; None if it has neither."""
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
                        f"{merges_path}: every line must be two tokens of {vocab_path.name} whose join is one too; "
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
        """Train a byte-level BPE (Radford et al. 2019) on texts; `<|endoftext|>` is id 0, all bytes are in it.

        The vocabulary ends up smaller than `vocab_size` where the texts have fewer pairs to merge.
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
        with _library_errors("the tokenizer cannot encode this text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _library_errors("the tokenizer cannot encode these texts"):
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, special tokens keep their spelling."""
        return self.backend.decode(ids, skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_token_id(self) -> int | None:
        return self.backend.token_to_id(END_OF_TEXT)

    def digest(self) -> str:
        """A hash of the whole tokenizer, by which a resumed run knows it again."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def save(self, folder: str | PathLike[str]) -> None:
        """Write `tokenizer.json`, and the `tokenizer_config.json` with which transformers' AutoTokenizer takes it."""
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
    """ValueError for a vocabulary that `Tokenizer.train` does not make."""
    if not isinstance(vocab_size, int) or not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"Tokenizer.train: vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}) and at most "
            f"{MAX_VOCAB_SIZE}; got {shown(vocab_size)}"
        )


def as_token_id(token: Any, caller: str, name: str) -> int:
    """An int, or NumPy's or PyTorch's integer, as an int; what `int` would convert to one is refused.

    Raises:
        TypeError: `token` is no integer; the message begins with `caller` and says that `name` holds it.
    """
    try:
        if isinstance(token, bool) or (isinstance(token, Tensor) and token.dtype == torch.bool):
            raise TypeError
        return operator.index(token)
    except TypeError:
        raise TypeError(f"{caller}: token ids must be integers; {name} holds {shown(token)}") from None


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Errors of the tokenizers library as a ValueError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # It raises bare Exceptions, and BaseExceptions for panics of its Rust code, whose class it does not export.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {first_line(error)}") from error


def _check_json(text: str, path: str | PathLike[str]) -> None:
    """Refuse what a damaged tokenizer.json holds and the library would panic at: it prints more than one sentence."""
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
