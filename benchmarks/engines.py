"""Other projects' engines for greedy generation: how each one gets the weights, and how it is called.

Each engine is a function of (settings, dtype, inputs) that returns the call to time. The call returns the new token ids
of every row. Exported weights stay in `settings.folder` for the next cases.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Call, LeftOutError, Settings
from benchmarks.models import fresh, shared_twin, transformers_twin
from benchmarks.peers import need, need_gpu
from fastgpt2 import GPT2, GPT2Config


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (R, T), padded on the left."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(row)) + list(row) for row in prompts])
    return ids, torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in prompts])


def need_cpu(settings: Settings) -> None:
    if settings.on_gpu:
        raise LeftOutError("absent: measured on a CPU only")


def exported(settings: Settings, config: GPT2Config, name: str, write: Callable[[Path], None]) -> Path:
    """A folder of exported weights, which `write` fills when it is first needed."""
    if not settings.folder:
        raise LeftOutError("skipped: no folder to export the weights to")
    folder = Path(settings.folder) / f"{name}-{config.hidden_size}x{config.num_layers}"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        (folder / "complete").touch()
    return folder


@functools.cache
def _rounded_copy(model: Any) -> Any:
    rounded = copy.deepcopy(model)

    def as_int8(x: Tensor, dim: int) -> Tensor:
        scale = x.abs().amax(dim, keepdim=True).clamp_min(1e-12) / 127
        return (x / scale).round() * scale

    linear = [m for m in rounded.modules() if type(m).__name__ == "Conv1D" or isinstance(m, nn.Linear)]
    rounded.lm_head.weight = nn.Parameter(rounded.lm_head.weight.detach().clone())  # the embedding stays as it is
    for module in linear:
        with torch.no_grad():
            module.weight.copy_(as_int8(module.weight, 1 if isinstance(module, nn.Linear) else 0))
        module.register_forward_pre_hook(lambda module, inputs: (as_int8(inputs[0], -1),))
    return rounded


def rounded_to_int8(model: Any) -> Any:
    """transformers' model with weights (per output) and activations (per token) rounded to 8 bits."""
    return _rounded_copy(model)


# -- CTranslate2 --------------------------------------------------------------------------------------------------


def ctranslate2(settings: Settings, dtype: str, inputs: Any) -> Call:
    need_cpu(settings)
    library = need("ctranslate2")
    if dtype not in library.get_supported_compute_types("cpu"):
        raise LeftOutError(f"absent: ctranslate2 has no {dtype} on this CPU")
    folder = exported(
        settings, inputs.config, "ctranslate2", functools.partial(_write_ctranslate2, settings, inputs.config)
    )
    generator = _ctranslate2_generator(str(folder), dtype, torch.get_num_threads())
    tokens = [[str(token) for token in prompt] for prompt in inputs.prompts]

    def call() -> list[list[int]]:
        new = inputs.new_tokens
        results = generator.generate_batch(
            tokens, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )
        return [list(result.sequences_ids[0]) for result in results]

    return call


@functools.cache
def _ctranslate2_generator(folder: str, dtype: str, threads: int) -> Any:
    return need("ctranslate2").Generator(folder, device="cpu", compute_type=dtype, intra_threads=threads)


def _write_ctranslate2(settings: Settings, config: GPT2Config, folder: Path) -> None:
    loader = need("ctranslate2.converters.transformers").GPT2Loader()
    spec = loader.get_model_spec(transformers_twin(fresh(settings, config)))
    loader.set_vocabulary(spec, [str(token) for token in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.save(str(folder))


# -- ONNX Runtime -------------------------------------------------------------------------------------------------


def onnxruntime(settings: Settings, dtype: str, inputs: Any) -> Call:
    """The graph that ONNX Runtime's own builder makes for a GPT-2: one attention node per layer, on a shared cache."""
    need_cpu(settings)
    library, onnx = need("onnxruntime"), need("onnx")
    config = inputs.config
    folder = exported(settings, config, "onnx", functools.partial(_write_onnx, onnx, settings, config))
    path = folder / "model.onnx"
    if dtype == "int8":
        write = functools.partial(_quantize_onnx, path)
        path = exported(settings, config, "onnx-int8", write) / "model.onnx"
    session = _onnx_session(library, str(path), torch.get_num_threads())
    H, D, L = config.num_heads, config.head_dim, config.num_layers
    lengths = [len(prompt) for prompt in inputs.prompts]
    R, T, room = len(lengths), max(lengths), max(lengths) + inputs.new_tokens
    padded = np.zeros((R, T), dtype=np.int64)
    for row, prompt in enumerate(inputs.prompts):
        padded[row, : len(prompt)] = prompt
    caches = [np.zeros((R, H, room, D), dtype=np.float32) for _ in range(2 * L)]
    values = [library.OrtValue.ortvalue_from_numpy(cache) for cache in caches]

    def step(ids: np.ndarray, positions: np.ndarray, used: np.ndarray, last: np.ndarray) -> np.ndarray:
        binding = session.io_binding()
        feeds = {
            "ids": ids, "positions": positions, "last": last, "seqlens_k": (used - 1).astype(np.int32),
            "total": np.array(used.max(), dtype=np.int32),
        }  # fmt: skip
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for i, value in enumerate(values):
            binding.bind_ortvalue_input(f"past{i}", value)
            binding.bind_ortvalue_output(f"present{i}", value)
        binding.bind_output("next", "cpu")
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    def call() -> list[list[int]]:
        used = np.array(lengths, dtype=np.int64)
        token = step(padded, np.broadcast_to(np.arange(T), (R, T)).copy(), used, used - 1)
        chosen = [token]
        for _ in range(inputs.new_tokens - 1):
            positions = used[:, None].copy()
            used = used + 1
            token = step(token[:, None], positions, used, np.zeros(R, dtype=np.int64))
            chosen.append(token)
        return np.stack(chosen, 1).tolist()

    return call


@functools.cache
def _onnx_session(library: Any, path: str, threads: int) -> Any:
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    return library.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _quantize_onnx(path: Path, folder: Path) -> None:
    quantization, onnx = need("onnxruntime.quantization"), need("onnx")
    logging.disable(logging.WARNING)  # it recommends an optimizer that does not know GroupQueryAttention
    try:
        quantization.quantize_dynamic(
            str(path), str(folder / "model.onnx"), per_channel=True, use_external_data_format=True,
            weight_type=quantization.QuantType.QInt8, op_types_to_quantize=["MatMul"],
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def _write_onnx(onnx: Any, settings: Settings, config: GPT2Config, folder: Path) -> None:
    """Write a graph from ids and positions (R, T) to each row's next token. It updates the caches in place.

    Its input `last` (R,) is the index of each row's last token, after which the next one is chosen.
    """
    helper, numpy_helper, types = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    C, H = config.hidden_size, config.num_heads
    nodes: list[Any] = []
    weights = {name: t.detach().numpy() for name, t in fresh(settings, config).state_dict().items()}
    initializers = {
        "wte": weights["transformer.wte.weight"], "wpe": weights["transformer.wpe.weight"],
        "head": np.ascontiguousarray(weights["transformer.wte.weight"].T),
    }  # fmt: skip

    def node(kind: str, sources: list[str], count: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        outputs = [f"{kind}_{len(nodes)}_{i}" for i in range(count)]
        nodes.append(helper.make_node(kind, sources, outputs, domain=domain, **attributes))
        return outputs

    def linear(x: str, name: str) -> str:
        initializers[name + ".w"] = np.ascontiguousarray(weights[name + ".weight"].T)
        initializers[name + ".b"] = weights[name + ".bias"]
        return node("Add", [node("MatMul", [x, name + ".w"])[0], name + ".b"])[0]

    def norm(x: str, name: str) -> str:
        initializers[name + ".w"], initializers[name + ".b"] = weights[name + ".weight"], weights[name + ".bias"]
        return node("LayerNormalization", [x, name + ".w", name + ".b"], epsilon=config.layer_norm_epsilon)[0]

    x = node("Add", [node("Gather", ["wte", "ids"])[0], node("Gather", ["wpe", "positions"])[0]])[0]
    for layer in range(config.num_layers):
        h, past = f"transformer.h.{layer}", [f"past{2 * layer}", f"past{2 * layer + 1}"]
        qkv = node("Split", [linear(norm(x, h + ".ln_1"), h + ".attn.c_attn")], 3, axis=2, num_outputs=3)
        sources = [*qkv, *past, "seqlens_k", "total"]
        outputs = [f"attended{layer}", f"present{2 * layer}", f"present{2 * layer + 1}"]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                sources,
                outputs,
                domain="com.microsoft",
                num_heads=H,
                kv_num_heads=H,
                scale=config.attention_scale(layer),
            )
        )
        x = node("Add", [x, linear(outputs[0], h + ".attn.c_proj")])[0]
        up = node("Gelu", [linear(norm(x, h + ".ln_2"), h + ".mlp.c_fc")], approximate="tanh")[0]
        x = node("Add", [x, linear(up, h + ".mlp.c_proj")])[0]
    # The head runs only on the last token of each row.
    initializers["axis"] = np.array([1], dtype=np.int64)
    initializers["width"] = np.array([1, 1, C], dtype=np.int64)
    index = node("Unsqueeze", [node("Unsqueeze", ["last", "axis"])[0], "axis2"])[0]
    initializers["axis2"] = np.array([2], dtype=np.int64)
    picked = node("GatherElements", [x, node("Expand", [index, "width"])[0]], axis=1)[0]
    row = node("Squeeze", [picked, "axis"])[0]
    logits = node("MatMul", [norm(row, "transformer.ln_f"), "head"])[0]
    nodes.append(helper.make_node("ArgMax", [logits], ["next"], axis=1, keepdims=0))
    integers = {"ids": ["R", "T"], "positions": ["R", "T"], "last": ["R"]}
    cache = ["R", H, "S", config.head_dim]
    graph = helper.make_graph(
        nodes, "gpt2",
        [
            *(helper.make_tensor_value_info(n, types.INT64, shape) for n, shape in integers.items()),
            helper.make_tensor_value_info("seqlens_k", types.INT32, ["R"]),
            helper.make_tensor_value_info("total", types.INT32, []),
            *(helper.make_tensor_value_info(f"past{i}", types.FLOAT, cache) for i in range(2 * config.num_layers)),
        ],
        [
            *(helper.make_tensor_value_info(f"present{i}", types.FLOAT, cache) for i in range(2 * config.num_layers)),
            helper.make_tensor_value_info("next", types.INT64, ["R"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(proto, str(folder / "model.onnx"), save_as_external_data=True, location="weights")


# -- OpenVINO -----------------------------------------------------------------------------------------------------


class _Step(nn.Module):
    """Maps new tokens (R, T), padded on the left, after P cached ones to the last one's logits and the longer caches.

    OpenVINO turns this form into one attention with a cache of its own: caches picked by `beam`, which must be int32,
    then a concatenation, then SDPA.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, beam: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        R, T = ids.shape
        transformer, caches = self.model.transformer, []
        x = transformer.wte(ids) + transformer.wpe(positions)
        for i, block in enumerate(transformer.h):
            q, k, v = (
                t.view(R, T, self.model.config.num_heads, -1).transpose(1, 2)
                for t in block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            )
            k = torch.cat([past[2 * i].index_select(0, beam), k], 2)
            v = torch.cat([past[2 * i + 1].index_select(0, beam), v], 2)
            caches += [k, v]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=block.scale)
            x = x + block.attn.c_proj(out.transpose(1, 2).reshape(R, T, -1))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
        return self.model.lm_head(transformer.ln_f(x[:, -1])), *caches


def openvino(settings: Settings, dtype: str, inputs: Any) -> Call:
    need_cpu(settings)
    library = need("openvino")
    if dtype == "int8":
        raise LeftOutError("absent: int8 weights need nncf, which this suite does not use")
    config = inputs.config
    write = functools.partial(_write_openvino, library, settings, config)
    folder = exported(settings, config, "openvino", write)
    request = _openvino_request(library, str(folder / "model.xml"), dtype, torch.get_num_threads())
    ids, valid = left_padded(inputs.prompts)
    R, T = ids.shape
    beam = np.arange(R, dtype=np.int32)
    rows = np.arange(T + inputs.new_tokens)
    causal = rows[None, :] <= rows[:, None]
    keys = np.concatenate([valid.numpy().astype(bool), np.ones((R, inputs.new_tokens), dtype=bool)], 1)
    # A padding token attends to itself, so that its softmax has at least one key.
    bias = np.where(keys[:, None, None] & causal | np.eye(len(rows), dtype=bool), 0.0, -1e30).astype(np.float32)
    first = (valid.cumsum(1) - 1).clamp_min(0).numpy()

    def step(ids: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return request.infer({"ids": ids, "positions": positions, "mask": mask, "beam": beam})[0].argmax(-1)

    def call() -> list[list[int]]:
        request.reset_state()
        token = step(ids.numpy(), first, bias[:, :, :T, :T])
        chosen, position = [token], first[:, -1:]
        for i in range(T, T + inputs.new_tokens - 1):
            position = position + 1
            token = step(token[:, None], position, bias[:, :, i : i + 1, : i + 1])
            chosen.append(token)
        return np.stack(chosen, 1).tolist()

    return call


@functools.cache
def _openvino_request(library: Any, path: str, dtype: str, threads: int) -> Any:
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    options["KV_CACHE_PRECISION"] = precision  # the default is 8 bits
    return library.Core().compile_model(path, "CPU", options).create_infer_request()


def _write_openvino(library: Any, settings: Settings, config: GPT2Config, folder: Path) -> None:
    L, R, T, P = config.num_layers, 2, 3, 4
    past = [torch.zeros(R, config.num_heads, P, config.head_dim) for _ in range(2 * L)]
    mask, beam = torch.zeros(R, 1, T, P + T), torch.arange(R, dtype=torch.int32)
    example = (torch.zeros(R, T, dtype=torch.int64), torch.zeros(R, T, dtype=torch.int64), mask, beam, *past)
    model = _Step(fresh(settings, config))
    with torch.no_grad(), quiet():
        graph = library.convert_model(model, example_input=example)
    names = ["ids", "positions", "mask", "beam", *(f"past{i}" for i in range(2 * L))]
    for port, name in zip(graph.inputs, names, strict=True):
        port.get_tensor().set_names({name})
        shape = [-1] * len(port.partial_shape)
        if name.startswith("past"):
            shape = [-1, config.num_heads, -1, config.head_dim]
        elif name == "mask":
            shape = [-1, 1, -1, -1]
        port.get_node().set_partial_shape(library.PartialShape(shape))
    for i, port in enumerate(graph.outputs[1:]):
        port.get_tensor().set_names({f"present{i}"})
    graph.validate_nodes_and_infer_types()
    stateful = need("openvino._offline_transformations", "openvino").apply_make_stateful_transformation
    stateful(graph, {f"past{i}": f"present{i}" for i in range(2 * L)})
    # Attention with its own cache must be told what an empty cache is.
    ops = need("openvino.opset13", "openvino")
    fixed = np.array([config.num_heads, 0, config.head_dim], dtype=np.int64)
    empty = ops.broadcast(np.float32(0), ops.concat([ops.shape_of(graph.input("beam"), "i64"), fixed], axis=0))
    for op in graph.get_ops():
        if op.get_type_name() == "ReadValue":
            op.set_arguments(empty.outputs())
    graph.validate_nodes_and_infer_types()
    library.save_model(graph, str(folder / "model.xml"), compress_to_fp16=False)


# -- llama.cpp ----------------------------------------------------------------------------------------------------


def llama_cpp(settings: Settings, dtype: str, inputs: Any) -> Call:
    need_cpu(settings)
    library, gguf = need("llama_cpp", "llama-cpp-python"), need("gguf")
    write = functools.partial(_write_gguf, gguf, settings, inputs.config, dtype)
    folder = exported(settings, inputs.config, f"gguf-{dtype}", write)
    R = len(inputs.prompts)
    room = max(map(len, inputs.prompts)) + inputs.new_tokens
    context, vocab = _llama_context(library, str(folder / "model.gguf"), R, room, torch.get_num_threads())
    prompt_tokens = sum(map(len, inputs.prompts))
    batch = library.llama_batch_init(max(prompt_tokens, R), 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode entries (token, position, row, whether its next token is wanted). Returns the next tokens."""
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = row
        if library.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanted = [i for i, entry in enumerate(entries) if entry[3]]
        rows = (np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), (vocab,)) for i in wanted)
        return [int(row.argmax()) for row in rows]

    def call() -> list[list[int]]:
        library.llama_memory_clear(library.llama_get_memory(context), True)
        positions = [len(prompt) for prompt in inputs.prompts]
        tokens = decode(
            [(t, i, r, i + 1 == len(p)) for r, p in enumerate(inputs.prompts) for i, t in enumerate(p)]
        )  # fmt: skip
        chosen = [tokens]
        for _ in range(inputs.new_tokens - 1):
            tokens = decode([(t, p, r, True) for r, (t, p) in enumerate(zip(tokens, positions, strict=True))])
            positions = [p + 1 for p in positions]
            chosen.append(tokens)
        return [list(row) for row in zip(*chosen, strict=True)]

    weakref.finalize(call, _free_llama, library, context, batch)
    return call


def _free_llama(library: Any, context: Any, batch: Any) -> None:
    with quiet():
        library.llama_free(context)
        library.llama_batch_free(batch)


def _llama_context(library: Any, path: str, rows: int, room: int, threads: int) -> tuple[Any, int]:
    with quiet():
        library.llama_backend_init()
        model = _llama_model(library, path)
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = rows * room, rows * room, 512
        options.n_seq_max, options.n_threads, options.n_threads_batch = rows, threads, threads
        context = library.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError("llama.cpp made no context")
    return context, library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))


@functools.cache
def _llama_model(library: Any, path: str) -> Any:
    model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp did not load {path}")
    return model


_GGUF_NAMES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def _write_gguf(gguf: Any, settings: Settings, config: GPT2Config, dtype: str, folder: Path) -> None:
    model = fresh(settings, config)
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "gpt2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.inner_dim)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)

    def add(name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().contiguous()
        if dtype == "bfloat16" and tensor.dim() == 2 and name != "position_embd.weight":
            words = tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(name, words, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())

    add("token_embd.weight", model.transformer.wte.weight)
    add("position_embd.weight", model.transformer.wpe.weight)
    add("output_norm.weight", model.transformer.ln_f.weight)
    add("output_norm.bias", model.transformer.ln_f.bias)
    for layer, block in enumerate(model.transformer.h):
        for ours, theirs in _GGUF_NAMES.items():
            module = block.get_submodule(ours)
            for kind in ("weight", "bias"):
                add(f"blk.{layer}.{theirs}.{kind}", getattr(module, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- vLLM ---------------------------------------------------------------------------------------------------------


def vllm(settings: Settings, dtype: str, inputs: Any) -> Call:
    need_gpu(settings)
    library = need("vllm")
    save = shared_twin(settings, inputs.config, torch.float32).save_pretrained
    folder = exported(settings, inputs.config, "transformers", save)
    engine = _vllm_engine(library, str(folder), dtype)
    new = inputs.new_tokens
    sampling = library.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in inputs.prompts]

    def call() -> list[list[int]]:
        return [list(out.outputs[0].token_ids) for out in engine.generate(prompts, sampling, use_tqdm=False)]

    return call


@functools.cache
def _vllm_engine(library: Any, folder: str, dtype: str) -> Any:
    return library.LLM(model=folder, skip_tokenizer_init=True, dtype=dtype, gpu_memory_utilization=0.4)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard the output and warnings of libraries and of their native code, while they convert."""
    saved = [os.dup(fd) for fd in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for fd in (1, 2):
            os.dup2(nowhere.fileno(), fd)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
            os.close(old)
