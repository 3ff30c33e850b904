"""Kernels with a mistake made on purpose: what shows that their checks can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path, folder: Path, right: str = "", wrong: str = "") -> ModuleType:
    """The kernel file `path` as a module of its own, with `wrong` in the place of `right`; written into `folder`."""
    source = path.read_text(encoding="utf-8")
    assert right in source, "the kernel has changed: change this mistake with it"
    if right:
        source = source.replace(right, wrong)
    copy = folder / f"mutant_{folder.name}.py".replace("-", "_")
    # Operators can be registered once only under a name.
    copy.write_text(source.replace("fastgpt2::", f"{copy.stem}::"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[copy.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
