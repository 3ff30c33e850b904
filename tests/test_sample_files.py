"""Sample files: every format round-trips, and a file that was cut off anywhere can be resumed."""

from __future__ import annotations

import io
import json
import random

import pytest

from fastgpt2.generate import Sample
from fastgpt2.input_files import Entry
from fastgpt2.record_files import RecordFile, unescape
from fastgpt2.sample_files import Fasta, JsonLines, SampleRecord, Text, sample_format

FORMATS = {".jsonl": JsonLines(token_ids=True, logprobs=True), ".fasta": Fasta(), ".txt": Text()}
SETTINGS = {"seed": 1, "top_p": 0.9, "stop_token_ids": (1, 2), "prompts": "ab12"}
# What text files break on: separators, escapes, what looks like a header, what JSON must escape.
ALPHABET = 'aMKL \\\n\r\t>"\x00\v\f\x1c\x1d\x1e\x85\u2028\u2029é😀*-<|endoftext|>nrtu0'


def random_row(rng: random.Random, prompt_index: int, sample_index: int) -> SampleRecord:
    count = rng.randint(1, 5)
    sample = Sample(0, sample_index, (1,), [rng.randrange(99) for _ in range(count)])
    sample.logprobs = [-rng.random() * 9 for _ in range(count)]
    sample.finish_reason = "length"
    text = "".join(rng.choice(ALPHABET) for _ in range(rng.choice((0, 1, 20, 59, 60, 61, 130))))
    identifier = rng.choice((None, "sp|P12345|X Y", "é\t1"))
    return SampleRecord(Entry(prompt_index, (1,), "here", identifier), sample, text)


def random_rows(rng: random.Random, count: int = 8) -> list[SampleRecord]:
    keys = [(p, s) for p in range(count) for s in range(2)]
    rng.shuffle(keys)
    return [random_row(rng, *key) for key in keys]


def key(row: SampleRecord) -> tuple[int, int]:
    return row.prompt.index, row.sample.sample_index


# -- samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_cut_leaves_the_whole_records_before_it(suffix, seed):
    records, rows = FORMATS[suffix], random_rows(random.Random(seed))
    encoded = [records.encode(row).encode() for row in rows]
    data = b"".join(encoded)
    ends = [sum(map(len, encoded[: i + 1])) for i in range(len(rows))]
    for cut in range(len(data) + 1):
        whole = sum(end <= cut for end in ends)
        scanned = list(records.scan(io.BytesIO(data[:cut])))
        assert scanned == [(ends[i], key(rows[i])) for i in range(whole)], f"cut at {cut}"


def test_json_rows_hold_everything(seed):
    for row in random_rows(random.Random(seed)):
        line = FORMATS[".jsonl"].encode(row)
        assert len(line.splitlines()) == 1
        back = json.loads(line)
        assert (back["prompt_index"], back["sample_index"]) == key(row)
        assert back.get("id") == row.prompt.id
        assert back["text"] == row.text
        assert back["token_ids"] == row.sample.token_ids
        assert back["logprobs"] == row.sample.logprobs
        assert back["num_tokens"] == len(row.sample.token_ids)
        assert back["mean_logprob"] == pytest.approx(sum(row.sample.logprobs) / len(row.sample.logprobs))
        assert back["perplexity"] == pytest.approx(2.718281828459045 ** -back["mean_logprob"])


def test_text_rows_come_back_as_they_were(seed):
    for row in random_rows(random.Random(seed)):
        line = Text().encode(row)
        assert line.endswith("\n")
        assert len(line.splitlines()) == 1
        prompt_index, sample_index, text = line[:-1].split("\t")
        assert (int(prompt_index), int(sample_index), unescape(text)) == (*key(row), row.text)


def test_fasta_rows_are_sequences(seed):
    row = random_row(random.Random(seed), 3, 7)
    row = SampleRecord(row.prompt, row.sample, "<|endoftext|>\nMKV >L1\n" * 9 + "A*-")
    header, *lines = Fasta().encode(row).splitlines()
    assert "".join(lines) == "MKVL" * 9 + "A*-"
    assert [len(line) for line in lines] == [39]
    assert f" prompt=3 sample=7 length=39 tokens={len(row.sample.token_ids)} finish=length perplexity=" in header
    long = Fasta().encode(SampleRecord(row.prompt, row.sample, "M" * 121)).splitlines()[1:]
    assert [len(line) for line in long] == [60, 60, 1]


def test_infinite_perplexity_is_none():
    sample = Sample(0, 0, (1,), [1], [-1e4], "stop")
    row = SampleRecord(Entry(0, "a", "here"), sample, "b")
    assert json.loads(JsonLines().encode(row))["perplexity"] is None


# -- the output file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_resume_truncates_the_torn_record_and_goes_on(suffix, tmp_path, seed):
    rng = random.Random(seed)
    records, rows = FORMATS[suffix], random_rows(rng)
    path = tmp_path / f"out{suffix}"
    with RecordFile(path, records, SETTINGS) as output:
        for row in rows:
            output.write(row)
    data = path.read_bytes()
    for cut in rng.sample(range(len(data)), 12):
        path.write_bytes(data[:cut])
        with RecordFile(path, records, SETTINGS, resume=True) as output:
            assert data.startswith(path.read_bytes())
            for row in rows:
                if key(row) not in output.done:
                    output.write(row)
        assert path.read_bytes() == data


def test_existing_output_is_refused_and_untouched(tmp_path, seed):
    path = tmp_path / "out.txt"
    path.write_text("precious\n", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"exists; continue it with --resume or replace it with --overwrite"):
        RecordFile(path, Text(), SETTINGS)
    with pytest.raises(
        ValueError, match=r"cannot be resumed, because out\.txt\.run\.json with its settings is missing"
    ):
        RecordFile(path, Text(), SETTINGS, resume=True)
    assert path.read_text(encoding="utf-8") == "precious\n"
    with RecordFile(path, Text(), SETTINGS, overwrite=True) as output:
        output.write(random_row(random.Random(seed), 0, 0))
    assert path.read_text(encoding="utf-8").startswith("0\t0\t")


def test_resume_as_another_run_is_refused(tmp_path, seed):
    path = tmp_path / "out.jsonl"
    with RecordFile(path, JsonLines(), SETTINGS) as output:
        output.write(random_row(random.Random(seed), 0, 0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"made by another run \(seed was 1 and is 2, top_p was 0\.9 and is None\)"):
        RecordFile(path, JsonLines(), {**SETTINGS, "seed": 2, "top_p": None}, resume=True)
    (tmp_path / "out.jsonl.run.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must hold a run's settings"):
        RecordFile(path, JsonLines(), SETTINGS, resume=True)
    assert path.read_bytes() == before


def test_settings_that_a_killed_run_was_writing_are_cleared_away(tmp_path):
    for name in (".out.txt.run.json.tmp12", ".other.txt.run.json.tmp12"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    with RecordFile(tmp_path / "out.txt", Text(), SETTINGS):
        pass
    assert {path.name for path in tmp_path.glob(".*")} == {".other.txt.run.json.tmp12"}


def test_resume_of_nothing_begins(tmp_path):
    with RecordFile(tmp_path / "out.txt", Text(), SETTINGS, resume=True) as output:
        assert not output.done


@pytest.mark.parametrize(
    ("suffix", "content", "line"),
    [(".jsonl", '{"prompt_index": 0}\n', 1),
     *((".jsonl", f'{{"prompt_index": {index}, "sample_index": 0}}\n', 1)
       for index in ('"0"', "0.0", "true", "null", "[0]", "Infinity", "1e999", "[" * 99_999)),
     *((".jsonl", f'{{"prompt_index": 0, "sample_index": {index}}}\n', 1) for index in ('"0"', "0.5", "false")),
     (".jsonl", "[" * 99_999 + "\n", 1), (".txt", "+0\t0\ta\n", 1),
     (".txt", "0\t 0\ta\n", 1), (".txt", "1_0\t0\ta\n", 1), (".txt", "0\t0\ta\nx\n", 2), (".fasta", ">a\nMK\n", 1),
     (".fasta", ">a_0 prompt=0 sample=0 length=70 \nMK\n>b\n", 2)],
)  # fmt: skip
def test_foreign_rows_are_not_touched(suffix, content, line, tmp_path):
    path = tmp_path / f"out{suffix}"
    RecordFile(path, FORMATS[suffix], SETTINGS).close()
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"line {line} is not .*; it cannot be resumed"):
        RecordFile(path, FORMATS[suffix], SETTINGS, resume=True)
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("suffix", FORMATS)
def test_samples_that_are_not_wanted_are_not_counted(suffix, tmp_path, seed):
    path = tmp_path / f"out{suffix}"
    with RecordFile(path, FORMATS[suffix], SETTINGS) as output:
        output.write(random_row(random.Random(seed), 1, 1))
        output.write(random_row(random.Random(seed), 5, 7))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"holds sample 7 of prompt 5, which is not part of this run; it cannot be resumed"
    ):
        RecordFile(path, FORMATS[suffix], SETTINGS, resume=True, wanted=lambda key: key[1] < 7)
    assert path.read_bytes() == before


def test_second_writer_is_refused(tmp_path, seed):
    path = tmp_path / "out.txt"
    with RecordFile(path, Text(), SETTINGS) as output:
        output.write(random_row(random.Random(seed), 0, 0))
        before = path.read_bytes()
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(BlockingIOError, match="another process is writing to it"):
                RecordFile(path, Text(), SETTINGS, **how)
        assert path.read_bytes() == before


def test_full_disk_leaves_whole_records(tmp_path, seed, monkeypatch):
    rows = random_rows(random.Random(seed))
    path = tmp_path / "out.txt"
    output = RecordFile(path, Text(), SETTINGS)
    output.write(rows[0])
    before = path.read_bytes()
    raw = output._file

    class Full:
        """Write three bytes, then fail because the disk is full."""

        def __init__(self) -> None:
            self.room = 3

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            taken, self.room = raw.write(data[: self.room]), 0
            return taken

        def __getattr__(self, name: str):
            return getattr(raw, name)

    monkeypatch.setattr(output, "_file", Full())
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); its records are whole"):
        output.write(rows[1])
    output.close()
    assert path.read_bytes() == before


def test_output_names(tmp_path):
    with pytest.raises(ValueError, match=r"an output must end in \.jsonl, \.fasta, \.txt; got '\.csv'"):
        sample_format(tmp_path / "out.csv")
    with pytest.raises(ValueError, match=r"need a \.jsonl output"):
        sample_format(tmp_path / "out.txt", logprobs=True)
    with pytest.raises(ValueError, match=r"is a folder"):
        RecordFile(tmp_path, Text(), SETTINGS)
    with pytest.raises(ValueError, match=r"which does not exist"):
        RecordFile(tmp_path / "no" / "out.txt", Text(), SETTINGS)
    with pytest.raises(ValueError, match=r"give one of them"):
        RecordFile(tmp_path / "out.txt", Text(), SETTINGS, resume=True, overwrite=True)
