"""Models from the hub: only the needed files are downloaded, all at one commit. Every error is one sentence."""

from __future__ import annotations

import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from fastgpt2 import GPT2
from fastgpt2.checkpoint import hf_state_dict, load_pretrained
from tests.formats.helpers import assert_same, one_sentence, write_folder


class Hub:
    """Stands in for huggingface_hub's download. It serves the files of a folder, and records the requests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched, self.revisions = folder, [], []

    def __call__(self, repo: str, file: str, revision: str | None = None, local_files_only: bool = False) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        self.revisions.append(revision)
        if not (self.folder / file).exists():
            raise EntryNotFoundError(file)
        self.fetched.append(file)
        return str(self.folder / file)


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the hub appear reachable."""
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: socket.socket())


def test_an_unreachable_hub_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants, file_download

    asked = []

    def refused(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError

    def never(*args: object, **options: object) -> None:
        pytest.fail("a request was made to a hub that takes no connections")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.test:8443")
    monkeypatch.setattr(file_download, "get_hf_file_metadata", never)
    with pytest.raises(OSError, match="is no file or folder here, and the hub cannot be reached") as raised:
        load_pretrained("somebody/no-such-model")
    one_sentence(raised.value)
    assert asked == [("hub.test", 8443)]


@pytest.mark.parametrize("form", ["safetensors", "sharded bin", "both"])
def test_hub_fetches_what_it_needs(tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    commit = tmp_path / "snapshots" / "0123abc"
    for one in ("safetensors", "bin") if form == "both" else (form,):
        write_folder(commit, hf_state_dict(model), form=one)
    hub = Hub(commit)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert_same(load_pretrained("somebody/tiny-gpt2", revision="v1"), model)
    weights = {file for file in hub.fetched if "model" in file and "index" not in file}
    assert len(weights) == (3 if form == "sharded bin" else 1)
    assert any("safetensors" in file for file in weights) == (form != "sharded bin")
    assert hub.revisions[0] == "v1"
    assert set(hub.revisions[1:]) == {"0123abc"}


def test_hub_errors(tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    write_folder(tmp_path, hf_state_dict(model))
    hub = Hub(tmp_path)

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nmany words")

    def refused(*args: object, **options: object) -> str:
        raise OfflineModeIsEnabled("refused\nmany words")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match="the hub cannot be reached") as raised:
        load_pretrained("somebody/tiny-gpt2")
    one_sentence(raised.value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(OSError, match=r"cannot be loaded from the hub: refused$") as raised:
        load_pretrained("somebody/tiny-gpt2")
    one_sentence(raised.value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="its repository has no weights"):
        load_pretrained("somebody/tiny-gpt2")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained("somebody/tiny-gpt2")


def test_hub_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "fastgpt2\[hub\]"') as raised:
        load_pretrained("somebody/tiny-gpt2")
    one_sentence(raised.value)
