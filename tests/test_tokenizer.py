"""Tokenizer: round trips, Hugging Face's files, training, errors."""

from __future__ import annotations

import json
import random

import pytest

from fastgpt2.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "    if a and b:\n\tpass  \n\n", "naïve café, 日本語, 🙂🏽 \u200b\0\r\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 20, 300)


CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]


def random_text(rng: random.Random) -> str:
    return "".join(chr(rng.choice(CODE_POINTS if rng.random() < 0.3 else range(128))) for _ in range(rng.randrange(80)))


def test_round_trip_of_any_text(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    texts = ["", " ", "\n", *TEXTS, *(random_text(rng) for _ in range(100))]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_training_merges_and_reserves_the_end_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id == 0
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode())
    assert tokenizer.encode(f"a{END_OF_TEXT}b")[1] == 0
    assert tokenizer.decode(tokenizer.encode(f"a{END_OF_TEXT}b")) == f"a{END_OF_TEXT}b"


def test_a_saved_folder_gives_the_same_tokens_here_and_in_transformers(tokenizer: Tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again is not None
    assert again.eos_token_id == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == 0
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == theirs(text)["input_ids"]
        assert theirs.decode(tokenizer.encode(text)) == text


def test_vocab_and_merges_are_the_same_tokenizer(tokenizer: Tokenizer, tmp_path) -> None:
    model = json.loads(tokenizer.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    again = Tokenizer.from_folder(tmp_path)
    assert again is not None
    assert again.eos_token_id == 0
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert again.encode(END_OF_TEXT) == [0]


def test_a_folder_without_a_tokenizer_is_none(tmp_path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"tokenizer.json": b"{}"}, ValueError, "tokenizer.json: not a tokenizer.json"),
        ({"tokenizer.json": b'{"model": '}, ValueError, "tokenizer.json: not a tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe"}, ValueError, "tokenizer.json: must be UTF-8 text"),
        ({"vocab.json": b"{}"}, FileNotFoundError, "merges.txt: no such file"),
        ({"merges.txt": b""}, FileNotFoundError, "vocab.json: no such file"),
        ({"vocab.json": b"{", "merges.txt": b""}, ValueError, "vocab.json: not JSON"),
        ({"vocab.json": b'{"a": "b"}', "merges.txt": b""}, ValueError, "vocab.json: must map every token to its id"),
        ({"tokenizer.json": b"[" * 99_999}, ValueError, "tokenizer.json: not a tokenizer.json"),
        ({"tokenizer.json": b"[]"}, ValueError, 'not a tokenizer.json: it has no "model"'),
        ({"vocab.json": b"[" * 99_999, "merges.txt": b""}, ValueError, "vocab.json: not JSON"),
        ({"vocab.json": b'{"a": -1}', "merges.txt": b""}, ValueError, "vocab.json: must map every token to its id"),
        ({"vocab.json": b'{"a": true}', "merges.txt": b""}, ValueError, "vocab.json: must map every token to its id"),
        ({"vocab.json": b'{"a": 4294967296}', "merges.txt": b""}, ValueError, "vocab.json: must map every token"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, ValueError, "two tokens of vocab.json .* got 'a b'"),
    ],
)
def test_bad_files(files: dict[str, bytes], error: type[Exception], message: str, tmp_path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        Tokenizer.from_folder(tmp_path)


def damaged(tokenizer: Tokenizer, **changes: object) -> str:
    contents = json.loads(tokenizer.backend.to_str())
    for name, value in changes.items():
        (contents if name in contents else contents["model"])[name] = value
    return json.dumps(contents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continuing_subword_prefix": "#" * 50}, "in its merges must begin with '####"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Precompiled"),
        ({"dropout": 5.0}, "Dropout should be between 0 and 1"),
        ({"merges": [["", ""]]}, "out of vocabulary"),
    ],
    ids=str,
)
def test_damage_that_the_library_panics_at_is_one_sentence(changes, message, tokenizer, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(damaged(tokenizer, **changes), encoding="utf-8")
    with pytest.raises(ValueError, match=f"tokenizer.json: not a tokenizer.json: .*{message}") as raised:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "pre_tokenizer", [{"type": "FixedLength", "length": 0}, {"type": "Sequence", "pretokenizers": []}], ids=str
)
def test_texts_that_the_library_panics_at_are_one_sentence(pre_tokenizer, tokenizer, tmp_path) -> None:
    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "none"}
    (tmp_path / "tokenizer.json").write_text(
        damaged(tokenizer, pre_tokenizer=pre_tokenizer, model=model), encoding="utf-8"
    )
    loaded = Tokenizer.from_folder(tmp_path)
    for encode in (loaded.encode, lambda text: loaded.encode_batch([text])):
        with pytest.raises(ValueError, match="the tokenizer cannot encode"):
            encode("a b")


def test_padding_and_truncation_of_the_file_change_no_tokens(tokenizer, tmp_path) -> None:
    padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    for changes in (
        {"truncation": truncation},
        {"truncation": {**truncation, "stride": 5}},
        {"padding": {**padding, "strategy": "BatchLongest"}},
        {"padding": {**padding, "strategy": {"Fixed": 2**45}}},  # more memory than there is
    ):
        (tmp_path / "tokenizer.json").write_text(damaged(tokenizer, **changes), encoding="utf-8")
        loaded = Tokenizer.from_folder(tmp_path)
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert loaded.encode_batch(["a", TEXTS[0]]) == tokenizer.encode_batch(["a", TEXTS[0]])


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .* got 256"):
        Tokenizer.train(TEXTS, 256)
