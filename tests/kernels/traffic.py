"""Count what a launch reads and writes, under Triton's interpreter."""

from __future__ import annotations

import torch


class Traffic:
    """Counts how often launches under Triton's interpreter read and write each element of some tensors."""

    def __init__(self, monkeypatch, **tensors):
        from triton.runtime import interpreter

        self.tensors = tensors
        self.reads = {name: torch.zeros(t.shape, dtype=torch.int64) for name, t in tensors.items()}
        self.writes = {name: torch.zeros(t.shape, dtype=torch.int64) for name, t in tensors.items()}
        load, store = interpreter._interpreter.load, interpreter._interpreter.store

        class Recorder:
            @staticmethod
            def load(pointers, mask, *rest):
                self.count(self.reads, pointers, mask)
                return load(pointers, mask, *rest)

            @staticmethod
            def store(pointers, value, mask):
                self.count(self.writes, pointers, mask)
                return store(pointers, value, mask)

            def __getattr__(self, name):
                return getattr(interpreter_module, name)

        interpreter_module = interpreter._interpreter
        monkeypatch.setattr(interpreter, "_interpreter", Recorder())

    def count(self, into, pointers, mask):
        pointers = torch.from_numpy(pointers.astype("int64")).flatten()[torch.from_numpy(mask.astype(bool)).flatten()]
        for name, t in self.tensors.items():
            index = (pointers - t.data_ptr()) // t.element_size()
            index = index[(index >= 0) & (index < t.numel())]
            into[name].view(-1).index_add_(0, index, torch.ones_like(index))
