"""fastgpt2: a Triton-accelerated GPT-2 for PyTorch.

Nothing is loaded before it is used: `import fastgpt2` takes no time, and the first of its names loads PyTorch.
"""

import importlib

TYPE_CHECKING = False  # as typing's, which type checkers know by its name; to import typing takes time
if TYPE_CHECKING:
    from fastgpt2.acceleration import accelerate, unaccelerate
    from fastgpt2.cache import KVCache
    from fastgpt2.config import GPT2Config, SamplingConfig
    from fastgpt2.gpt2 import GPT2
    from fastgpt2.loss import calculate_loss, train_step
    from fastgpt2.scoring import Score, score
    from fastgpt2.selfcheck import check
else:

    def __getattr__(name: str) -> object:
        """Load a public name, or a module of the package, when it is first asked for."""
        if name in _MODULES:
            value = getattr(importlib.import_module(f"fastgpt2.{_MODULES[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"fastgpt2.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"fastgpt2.{name}":
                    raise
        raise AttributeError(f"module 'fastgpt2' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "GPT2Config",
    "KVCache",
    "SamplingConfig",
    "Score",
    "__version__",
    "accelerate",
    "calculate_loss",
    "check",
    "score",
    "train_step",
    "unaccelerate",
]

# The module of each public name. None may be named as a module of the package is: to import that replaces the name.
_MODULES = {
    "GPT2": "gpt2",
    "GPT2Config": "config",
    "KVCache": "cache",
    "SamplingConfig": "config",
    "Score": "scoring",
    "accelerate": "acceleration",
    "calculate_loss": "loss",
    "check": "selfcheck",
    "score": "scoring",
    "train_step": "loss",
    "unaccelerate": "acceleration",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
