"""Kernels with a deliberate mistake, to show that their checks can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path, folder: Path, right: str = "", wrong: str = "") -> ModuleType:
    """Load the kernel file `path` as a separate module in which `wrong` replaces `right`. It is written to `folder`."""
    source = path.read_text(encoding="utf-8")
    assert right in source, "the kernel has changed: adapt this mistake to it"
    if right:
        source = source.replace(right, wrong)
    copy = folder / f"mutant_{folder.name}.py".replace("-", "_")
    # An operator's name can be registered only once.
    source = source.replace("fastgpt2::", f"{copy.stem}::").replace("torch.ops.fastgpt2.", f"torch.ops.{copy.stem}.")
    copy.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[copy.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
