"""Downloading models from the Hugging Face hub into its cache; needs the extra `fastgpt2[hub]`."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from fastgpt2.formats.huggingface import TOKENIZER_FILES, WEIGHT_FILES, shard_names
from fastgpt2.messages import first_line


def download(name: str, revision: str | None, *, config_only: bool = False) -> Path:
    """Download the files of a hub repository that a model needs; returns the repository's folder in the hub's cache."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file or folder here; to load a model of that name from the Hugging Face hub, run: "
            'pip install "fastgpt2[hub]"'
        ) from error

    cache_only = not _is_reachable()

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=cache_only))
        except LocalEntryNotFoundError as error:
            offline.append(error)
        except EntryNotFoundError:
            pass
        except (OSError, ValueError) as error:  # no such repository or revision, no access, not a name
            raise OSError(f"{name}: cannot be loaded from the hub: {first_line(error)}") from error
        return None

    offline: list[Exception] = []
    config = fetch("config.json")
    if config is None and offline:
        raise OSError(
            f"{name!r} is no file or folder here, and the hub cannot be reached and its cache does not hold it; "
            "check the name and the network"
        ) from offline[0]
    if config is None:
        raise FileNotFoundError(f"{name}: the hub's repository has no config.json")
    folder, revision = config.parent, config.parent.name  # the commit, so that all files come from the same one
    fetch("generation_config.json")
    if config_only:
        return folder
    for file in WEIGHT_FILES:
        found = fetch(file)
        if found is None:
            continue
        for shard in shard_names(found) if file.endswith(".index.json") else ():
            if fetch(shard) is None:
                raise FileNotFoundError(f"{name}: {shard}, which {file} names, could not be downloaded")
        break
    else:
        reason = "the hub cannot be reached and no weights are cached" if offline else "its repository has no weights"
        raise FileNotFoundError(f"{name}: {reason}; looked for {', '.join(WEIGHT_FILES)}")
    for file in TOKENIZER_FILES:
        fetch(file)
    return folder


def _is_reachable() -> bool:
    """Whether the hub accepts a connection. huggingface_hub would retry for 23 s before it reports that it does not.

    Behind a proxy only a complete request could tell. In that case the answer is True, and huggingface_hub finds out.
    """
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not hub.hostname or urllib.request.getproxies():
        return True
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True
