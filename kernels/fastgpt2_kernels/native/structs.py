"""The arguments of the extension's operations: the structs of kernels/native/api.h, field by field."""

from __future__ import annotations

import ctypes

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

LAYOUT, PACK, LINEAR, ATTENTION, SAMPLE, FORWARD = range(6)


class LayoutArgs(ctypes.Structure):
    _fields_ = [
        ("panel", _int), ("group", _int * 3), ("operand", _int * 3), ("row_padding", _int), ("key_split", _int),
        ("private_rows", _int), ("scratch_bytes", _int), ("vocab", _int), ("positions", _int), ("head_size", _int),
        ("width", _int),
    ]  # fmt: skip


class Linear(ctypes.Structure):
    _fields_ = [
        ("weight", _pointer), ("bias", _pointer), ("scale", _pointer), ("sums", _pointer), ("n", _int), ("k", _int),
        ("type", _int),
    ]  # fmt: skip


class LayerNorm(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("bias", _pointer), ("eps", _float)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("ln_1", LayerNorm), ("qkv", Linear), ("projection", Linear), ("ln_2", LayerNorm), ("up", Linear),
        ("down", Linear), ("attention_scale", _float),
    ]  # fmt: skip


class PackArgs(ctypes.Structure):
    _fields_ = [
        ("source", _pointer), ("packed", _pointer), ("sums", _pointer), ("n", _int), ("k", _int), ("type", _int),
        ("source_stride", _int), ("threads", _int),
    ]  # fmt: skip


class Epilogue(ctypes.Structure):
    _fields_ = [
        ("activation", _int), ("residual", _pointer), ("residual_stride", _int), ("out", _pointer),
        ("out_stride", _int), ("operand", _pointer), ("operand_type", _int), ("operand_stride", _int),
    ]  # fmt: skip


class LinearArgs(ctypes.Structure):
    _fields_ = [
        ("linear", Linear), ("to", Epilogue), ("x", _pointer), ("layer_norm", ctypes.POINTER(LayerNorm)),
        ("operand", _pointer), ("operand_scale", _pointer), ("scratch", _pointer), ("rows", _int), ("x_stride", _int),
        ("threads", _int), ("scratch_bytes", _int),
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = [
        ("keys", _pointer), ("values", _pointer), ("layer_stride", _int), ("slot_stride", _int), ("head_stride", _int),
        ("slots", _int), ("capacity", _int), ("type", _int),
    ]  # fmt: skip


class Rows(ctypes.Structure):
    _fields_ = [
        ("num_rows", _int), ("num_tokens", _int), ("slots", _pointer), ("starts", _pointer), ("counts", _pointer),
        ("pasts", _pointer), ("tasks", _pointer), ("done", _pointer),
    ]  # fmt: skip


class Attention(ctypes.Structure):
    _fields_ = [
        ("cache", ctypes.POINTER(Cache)), ("rows", ctypes.POINTER(Rows)), ("layer", _int), ("heads", _int),
        ("head_size", _int), ("scale", _float), ("qkv", _pointer), ("qkv_stride", _int), ("parts", _pointer),
        ("out", _pointer), ("out_stride", _int), ("operand", _pointer), ("operand_type", _int),
        ("operand_stride", _int),
    ]  # fmt: skip


class AttentionArgs(ctypes.Structure):
    _fields_ = [("attention", Attention), ("scratch", _pointer), ("threads", _int), ("scratch_bytes", _int)]


class Slots(ctypes.Structure):
    _fields_ = [
        ("tokens", _pointer), ("status", _pointer), ("lengths", _pointer), ("produced", _pointer), ("limits", _pointer),
        ("keys", _pointer), ("logprobs", _pointer), ("num_slots", _int),
    ]  # fmt: skip


class Sampling(ctypes.Structure):
    _fields_ = [
        ("temperature", _pointer), ("top_k", _pointer), ("top_p", _pointer), ("min_p", _pointer), ("penalty", _pointer),
        ("seen", _pointer), ("seen_stride", _int),
    ]  # fmt: skip


class SampleArgs(ctypes.Structure):
    _fields_ = [
        ("state", Slots), ("sampling", Sampling), ("logits", _pointer), ("slots", _pointer), ("scratch", _pointer),
        ("rows", _int), ("vocab", _int), ("logits_stride", _int), ("threads", _int), ("scratch_bytes", _int),
    ]  # fmt: skip


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)), ("num_layers", _int), ("ln_f", LayerNorm), ("head", Linear),
        ("wte", _pointer), ("wpe", _pointer), ("embedding_type", _int), ("wte_stride", _int), ("wpe_stride", _int),
        ("vocab", _int), ("width", _int), ("context", _int), ("heads", _int), ("inner", _int), ("activation", _int),
        ("state", Slots), ("sampling", Sampling), ("stop_ids", _pointer), ("num_stops", _int), ("cache", Cache),
        ("rows", Rows), ("token_ids", _pointer), ("x", _pointer), ("qkv", _pointer), ("hidden", _pointer),
        ("operand", _pointer), ("operand_2", _pointer), ("operand_scale", _pointer), ("parts", _pointer),
        ("logits", _pointer), ("active", _pointer), ("scratch", _pointer), ("logits_stride", _int), ("threads", _int),
        ("scratch_bytes", _int), ("times", _pointer), ("steps", _int), ("steps_done", _int), ("more", _int),
        ("step_tokens", _pointer), ("step_logprobs", _pointer),
    ]  # fmt: skip
