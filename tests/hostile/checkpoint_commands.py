"""Command lines that `fastgpt2 info` and `convert` must refuse, run in the folder that zoo.py builds."""

from __future__ import annotations

# Each command line, and the beginning of its error after "fastgpt2: ".
INFO: dict[str, str] = {
    "info --model ./none/here": (
        "none/here: no such file or folder (and no name of a model on the hub, like owner/name)"
    ),
    "info --model empty": "empty: has neither config.json (Hugging Face) nor ckpt.pt (nanoGPT)",
    "info --model file.bin": "file.bin: not a readable file of tensors",
    "info --model zero.txt": "zero.txt: must be a folder or an ordinary file; it is neither",
    "info --model p.txt": "p.txt: not a readable file of tensors",
    "info --model model --revision main": "load_pretrained: revision needs a name on the hub; model is on this machine",
    "info --model nanogpt-torn": "nanogpt-torn/ckpt.pt: not a readable file of tensors",
    "info --model nanogpt-rope": (
        "nanogpt-rope/ckpt.pt: model_args must be nanoGPT's; missing: block_size, n_embd, n_head, n_layer,"
    ),
    "info --model nanogpt-list": "nanogpt-list/ckpt.pt: must hold a dictionary of tensors; got list",
    "info x": "unrecognized arguments: x",
    "info --json x": "unrecognized arguments: x",
    "info --model configs/empty": "configs/empty: configs/empty/config.json: not a JSON file",
    "info --model configs/torn": "configs/torn: configs/torn/config.json: not a JSON file",
    "info --model configs/list": "configs/list: configs/list/config.json: must hold a JSON object; got list",
    "info --model configs/null": "configs/null: configs/null/config.json: must hold a JSON object; got NoneType",
    "info --model configs/number": "configs/number: configs/number/config.json: must hold a JSON object; got int",
    "info --model configs/nested": "configs/nested: configs/nested/config.json: not a JSON file",
    "info --model configs/latin": "configs/latin: configs/latin/config.json: not a JSON file",
    "info --model configs/digits": "configs/digits: configs/digits/config.json: not a JSON file",
    "info --model configs/llama": "configs/llama: config.json: model_type must be 'gpt2'; got 'llama'",
    "info --model configs/cross": (
        "configs/cross: config.json: add_cross_attention=True is not supported (it would change what the model"
    ),
    "info --model configs/pruned": (
        "configs/pruned: config.json: pruned_heads={'0': [1]} is not supported (it would change what the model"
    ),
    "info --model configs/wide": "configs/wide: GPT2Config: hidden_size must be a positive int; got 'wide'",
    "info --model configs/float-width": "configs/float-width: GPT2Config: hidden_size must be a positive int; got 32.5",
    "info --model configs/bool-width": "configs/bool-width: GPT2Config: hidden_size must be a positive int; got True",
    "info --model configs/no-width": "configs/no-width: GPT2Config: hidden_size must be a positive int; got 0",
    "info --model configs/negative-width": (
        "configs/negative-width: GPT2Config: hidden_size must be a positive int; got -32"
    ),
    "info --model configs/null-width": "configs/null-width: GPT2Config: hidden_size must be a positive int; got None",
    "info --model configs/100-digits": "configs/100-digits: GPT2Config: hidden_size must be at most 2147483647; got",
    "info --model configs/past-64-bits": (
        "configs/past-64-bits: GPT2Config: vocab_size must be at most 2147483647; got 1180591620717411303424"
    ),
    "info --model configs/tensors-past-64-bits": (
        "configs/tensors-past-64-bits: GPT2Config: feedforward_dim must be at most 2147483647; got"
    ),
    "info --model configs/layers": "configs/layers: GPT2Config: num_layers must be at most 10000; got 10000000",
    "info --model configs/no-layers": "configs/no-layers: GPT2Config: num_layers must be a positive int; got 0",
    "info --model configs/heads": (
        "configs/heads: GPT2Config: hidden_size must be a multiple of num_heads; got 32 and 3"
    ),
    "info --model configs/no-heads": "configs/no-heads: GPT2Config: num_heads must be a positive int; got 0",
    "info --model configs/no-vocab": "configs/no-vocab: GPT2Config: vocab_size must be a positive int; got 0",
    "info --model configs/no-context": "configs/no-context: GPT2Config: context_length must be a positive int; got 0",
    "info --model configs/epsilon": "configs/epsilon: GPT2Config: layer_norm_epsilon must be a positive number; got 0",
    "info --model configs/nan-epsilon": (
        "configs/nan-epsilon: GPT2Config: layer_norm_epsilon must be a positive number; got nan"
    ),
    "info --model configs/text-epsilon": (
        "configs/text-epsilon: GPT2Config: layer_norm_epsilon must be a positive number; got '1e-5'"
    ),
    "info --model configs/dropout": "configs/dropout: GPT2Config: residual_dropout must be in [0, 1); got 1.5",
    "info --model configs/activation": "configs/activation: GPT2Config: activation_function must be one of",
    "info --model configs/list-activation": "configs/list-activation: GPT2Config: activation_function must be one of",
    "info --model configs/range": "configs/range: GPT2Config: initializer_range must be a positive number; got -1",
    "info --model configs/infinite-epsilon": (
        "configs/infinite-epsilon: GPT2Config: layer_norm_epsilon must be a positive number; got inf"
    ),
    "info --model configs/text-eos": "configs/text-eos: GPT2Config: eos_token_id must be a token id or None; got 'end'",
    "info --model configs/bool-pad": "configs/bool-pad: GPT2Config: pad_token_id must be a token id or None; got True",
    "info --model configs/list-bos": "configs/list-bos: GPT2Config: bos_token_id must be a token id or None; got [1]",
    "info --model configs/text-in-eos": (
        "configs/text-in-eos: GPT2Config: eos_token_id must be a token id or None; got (1, 'end')"
    ),
}

CONVERT: dict[str, str] = {
    "convert": "the following arguments are required: SOURCE, OUT_FOLDER",
    "convert model": "the following arguments are required: OUT_FOLDER",
    "convert ./none/here o": "none/here: no such file or folder (and no name of a model on the hub, like owner/name)",
    "convert model empty --to gguf": "argument --to: invalid choice: 'gguf'",
    "convert model taken": "taken: must be a folder, as a checkpoint is one; it is a file: name another",
    "convert model model": "model: the folder is not empty; name another, or write into it with --force",
    "convert model taken/o": "[Errno 20] Not a directory: 'taken/o'",
    "convert model o --dtype int8": "argument --dtype: invalid choice: 'int8'",
    "convert model o --vocab-size 0": "GPT2Config: vocab_size must be a positive int; got 0",
    "convert model o --vocab-size -1": "GPT2Config: vocab_size must be a positive int; got -1",
    "convert model o --vocab-size 1000": (
        "model: the weights do not fit the configuration; other shapes: transformer.wte.weight is (274, 32) in"
    ),
    "convert model o --vocab-size x": "argument --vocab-size: invalid int value: 'x'",
    "convert model o --revision main": "load_pretrained: revision needs a name on the hub; model is on this machine",
    "convert weightless o": "weightless: has a config.json but no weights; looked for model.safetensors,",
    "convert no-config o": "no-config: has neither config.json (Hugging Face) nor ckpt.pt (nanoGPT)",
    "convert file.bin o": "file.bin: not a readable file of tensors",
    "convert zero.txt o": "zero.txt: must be a folder or an ordinary file; it is neither",
    "convert configs/wide o": "configs/wide: GPT2Config: hidden_size must be a positive int; got 'wide'",
    "convert nanogpt-torn o": "nanogpt-torn/ckpt.pt: not a readable file of tensors",
    "convert nanogpt-no-args o --to nanogpt": (
        "nanogpt-no-args/ckpt.pt: needs the model's config.json beside it; there is none in nanogpt-no-args"
    ),
    "convert weights/empty o": "weights/empty/model.safetensors: not a readable safetensors file",
    "convert weights/torn o": "weights/torn/model.safetensors: not a readable safetensors file",
    "convert weights/short o": "weights/short/model.safetensors: not a readable safetensors file",
    "convert weights/header-past-the-end o": (
        "weights/header-past-the-end/model.safetensors: not a readable safetensors file"
    ),
    "convert weights/header-of-2-64 o": "weights/header-of-2-64/model.safetensors: not a readable safetensors file",
    "convert weights/no-json o": "weights/no-json/model.safetensors: not a readable safetensors file",
    "convert weights/pointer o": "weights/pointer/model.safetensors: not a readable safetensors file",
    "convert weights/missing o": "weights/missing/model.safetensors: not a readable safetensors file",
    "convert weights/shape o": (
        "weights/shape: the weights do not fit the configuration; other shapes: transformer.h.0.attn.c_attn.bias"
    ),
    "convert weights/dtype o": "weights/dtype/model.safetensors: not a readable safetensors file",
    "convert weights/integers o": (
        "weights/integers/model.safetensors: transformer.h.0.attn.c_attn.bias: weights must be float64, float32,"
    ),
    "convert weights/overlap o": "weights/overlap/model.safetensors: not a readable safetensors file",
    "convert weights/negative o": "weights/negative/model.safetensors: not a readable safetensors file",
    "convert weights/outside o": "weights/outside/model.safetensors: not a readable safetensors file",
    "convert bins/list o": "bins/list/pytorch_model.bin: must hold a dictionary of tensors; got list",
    "convert bins/text o": "bins/text/pytorch_model.bin: must map names to tensors; other entries: a",
    "convert bins/code o": "bins/code/pytorch_model.bin: not a readable file of tensors",
    "convert bins/bare o": "bins/bare: the weights do not fit the configuration; missing keys: transformer.wte.weight,",
    "convert indices/no-map o": (
        "indices/no-map/model.safetensors.index.json: must map every weight to a file of its folder under"
    ),
    "convert indices/list-map o": (
        "indices/list-map/model.safetensors.index.json: must map every weight to a file of its folder under"
    ),
    "convert indices/outside o": (
        "indices/outside/model.safetensors.index.json: must map every weight to a file of its folder under"
    ),
    "convert indices/absent o": "indices/absent: the index names files that are missing: model-00001.safetensors",
    "convert indices/torn o": "indices/torn/model.safetensors.index.json: not a JSON file",
}
