"""Outputs that several processes write: shares, merging and sorting, kills, and full disks."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import re
import threading
import time
from pathlib import Path

import pytest

from fastgpt2 import record_files
from fastgpt2.record_files import Key, Lines, RecordFile, Shard

CONTEXT = multiprocessing.get_context("forkserver")


class Numbers(Lines[tuple[int, int, str]]):
    """A format with lines of `a b text`."""

    what = "three words"

    def encode(self, record: tuple[int, int, str]) -> str:
        return f"{record[0]} {record[1]} {record[2]}\n"

    def key(self, line: bytes) -> Key:
        first, second, _ = line.split(b" ", 2)
        return int(first), int(second)

    def describe(self, key: Key) -> str:
        return f"line {key}"


KEYS = [(i, j) for i in range(12) for j in range(2)]
SETTINGS = {"seed": 3}


def record(key: Key) -> tuple[int, int, str]:
    return *key, "x" * (7 * key[0] % 11)


WHOLE = "".join(Numbers().encode(record(key)) for key in KEYS).encode()


def is_complete(keys: set[Key]) -> bool:
    return keys == set(KEYS)


def work(path: Path, shard: Shard, resume: bool, rng: random.Random, stop: float = 2.0, **options) -> bool:
    """Run one process: write the missing records of its share in random order. A `stop` below 1 ends it at random."""
    with RecordFile(path, Numbers(), SETTINGS, resume=resume, shard=shard, **options) as output:
        missing = [key for key in KEYS if shard.has(key[0]) and key not in output.done]
        rng.shuffle(missing)
        for key in missing:
            if rng.random() > stop:
                return False
            output.write(record(key))
        return output.finish(is_complete)


def tear(path: Path, rng: random.Random) -> None:
    """Leave a torn record, as a kill during a write does."""
    for file in (path, *path.parent.glob("out.txt.part-*")):
        if file.exists() and rng.random() < 0.5:
            with open(file, "ab") as torn:
                torn.write(Numbers().encode(record(rng.choice(KEYS))).encode()[: rng.randrange(4)])


@pytest.mark.parametrize("attempt", range(8))
def test_any_number_of_processes_any_number_of_times(attempt, tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "out.txt"
    begun = False
    for _ in range(rng.randrange(6)):
        count = rng.choice((1, 2, 3, 5))
        shares = [Shard(i, count) for i in range(count)]
        rng.shuffle(shares)
        for share in shares[: rng.randint(1, count)]:
            with contextlib.suppress(FileExistsError):  # another share has begun the run, and this one does not resume
                work(path, share, begun, rng, stop=0.8)
            tear(path, rng)
            begun = True
    count = rng.choice((1, 2, 4))
    finished = [work(path, Shard(i, count), begun, rng) for i in range(count)]
    assert finished == [False] * (count - 1) + [True] or begun
    assert finished[-1]
    assert path.read_bytes() == WHOLE
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.txt", "out.txt.run.json"]
    assert work(path, Shard(0, 3), True, rng)  # nothing is left to do
    assert path.read_bytes() == WHOLE


def test_processes_at_once_leave_one_output(tmp_path, seed):
    """Threads lock each other out like processes, because each opens its own files."""
    rng, finished = random.Random(seed), []
    for attempt in range(10):
        path = tmp_path / f"out{attempt}.txt"
        threads = [
            threading.Thread(
                target=lambda i=i, path=path: finished.append(work(path, Shard(i, 4), False, random.Random(i)))
            )
            for i in range(4)
        ]
        rng.shuffle(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert path.read_bytes() == WHOLE
    assert len(finished) == 40
    assert finished.count(True) >= 10
    assert list(tmp_path.glob("*.part-*")) == []


def test_a_second_writer_of_a_share_is_refused(tmp_path):
    path = tmp_path / "out.txt"
    with RecordFile(path, Numbers(), SETTINGS, shard=Shard(1, 2)) as output:
        output.write(record(KEYS[2]))
        with pytest.raises(BlockingIOError, match=r"out\.txt\.part-1: another process is writing to it"):
            RecordFile(path, Numbers(), SETTINGS, resume=True, shard=Shard(1, 2))
        with RecordFile(path, Numbers(), SETTINGS, shard=Shard(0, 2)) as other:
            assert other.done == {KEYS[2]}
            assert not other.finish(is_complete)
    assert path.with_name("out.txt.part-1").read_bytes() == Numbers().encode(record(KEYS[2])).encode()


def test_processes_with_other_settings_are_refused(tmp_path):
    path = tmp_path / "out.txt"
    with (
        RecordFile(path, Numbers(), SETTINGS, shard=Shard(0, 2)),
        pytest.raises(
            ValueError,
            match=r"was made by another run \(seed was 3 and is 4\); resume it with the settings it began with",
        ),
    ):
        RecordFile(path, Numbers(), {"seed": 4}, shard=Shard(1, 2))
    with pytest.raises(ValueError, match=r"was made by another run \(seed was 3 and is 4\)"):
        RecordFile(path, Numbers(), {"seed": 4}, shard=Shard(1, 2), resume=True)


def test_what_is_there_is_not_begun_anew(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "out.txt"
    work(path, Shard(1, 2), False, rng)
    for shard in (Shard(1, 2), Shard(0, 1)):
        with pytest.raises(FileExistsError, match=r"out\.txt\.part-1: exists; continue it with --resume"):
            work(path, shard, False, rng)
    with pytest.raises(ValueError, match="--overwrite could drop what another process has written"):
        work(path, Shard(1, 2), False, rng, overwrite=True)
    assert work(path, Shard(0, 1), False, rng, overwrite=True)
    assert path.read_bytes() == WHOLE
    assert list(tmp_path.glob("*.part-*")) == []
    with pytest.raises(FileExistsError, match=r"out\.txt: exists"):
        work(path, Shard(1, 2), False, rng)


def test_a_disk_that_is_full_in_the_merge_loses_nothing(tmp_path, seed, monkeypatch):
    rng, path = random.Random(seed), tmp_path / "out.txt"
    work(path, Shard(1, 2), False, rng)

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    @contextlib.contextmanager
    def full(path):
        yield Full()

    with monkeypatch.context() as patch:
        patch.setattr(record_files, "atomic_file", full)
        with pytest.raises(
            OSError, match=r"cannot be put in order \(No space left on device\); all of its records are"
        ):
            work(path, Shard(0, 2), False, rng)
    assert work(path, Shard(0, 2), True, rng)
    assert path.read_bytes() == WHOLE


def killed_worker(path: Path, index: int, count: int, seed: int) -> None:
    original = Numbers.encode

    def slow(self, record):
        time.sleep(0.002)
        return original(self, record)

    Numbers.encode = slow
    work(path, Shard(index, count), True, random.Random(seed))


@pytest.mark.slow
def test_killed_processes_lose_nothing(tmp_path, seed):
    """Random shares are killed 20 times with SIGKILL, and resumed by another number of processes."""
    CONTEXT.set_forkserver_preload(["fastgpt2", __name__])
    rng, kills = random.Random(seed), 0
    while kills < 20:
        path = tmp_path / f"out{kills}.txt"
        for _ in range(3):
            count = rng.choice((2, 3, 4))
            workers = [CONTEXT.Process(target=killed_worker, args=(path, i, count, rng.random())) for i in range(count)]
            for worker in workers:
                worker.start()
            time.sleep(rng.random() * 0.4)
            victim = rng.choice(workers)
            victim.kill()
            kills += 1
            for worker in workers:
                worker.join()
        count = rng.choice((1, 2))
        finished = [work(path, Shard(i, count), True, rng) for i in range(count)]
        assert finished[-1]
        assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("text", ["", "1", "1/0", "1/1", "-1/2", "0/2/3", "a/b", "1 /2", "0/" + "9" * 99])
def test_shards(text):
    assert Shard.parse("3/4") == Shard(3, 4)
    with pytest.raises(ValueError, match=re.escape("a shard must be I/N with 0 <= I < N, as 0/4 .. 3/4; got")):
        Shard.parse(text)
