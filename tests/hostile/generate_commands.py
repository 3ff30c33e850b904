"""Command lines that `fastgpt2 generate` must refuse, run in the folder that zoo.py builds."""

from __future__ import annotations

# Each command line, and the beginning of its error after "fastgpt2: ".
GENERATE: dict[str, str] = {
    "generate x --model ./none/here": (
        "none/here: no such file or folder (and no name of a model on the hub, like owner/name)"
    ),
    "generate x --model ''": ".: has neither config.json (Hugging Face) nor ckpt.pt (nanoGPT)",
    "generate x --model .": ".: has neither config.json (Hugging Face) nor ckpt.pt (nanoGPT)",
    "generate x --model empty": "empty: has neither config.json (Hugging Face) nor ckpt.pt (nanoGPT)",
    "generate x --model file.bin": "file.bin: not a readable file of tensors",
    "generate x --model p.txt": "p.txt: not a readable file of tensors",
    "generate x --model weightless": "weightless: has a config.json but no weights; looked for model.safetensors,",
    "generate x --model no-config": "no-config: has neither config.json (Hugging Face) nor ckpt.pt (nanoGPT)",
    "generate x --model no-config/model.safetensors": (
        "no-config/model.safetensors: needs the model's config.json beside it; there is none in no-config"
    ),
    "generate x --model bad-generation-config": "bad-generation-config/generation_config.json: not a JSON file",
    "generate x --model no-tokenizer": (
        "generate: the prompt is text, but the model has no tokenizer; set model.tokenizer or give ids"
    ),
    "generate x --model zero.txt": "zero.txt: must be a folder or an ordinary file; it is neither",
    "generate x --model pipe.txt": "pipe.txt: must be a folder or an ordinary file; it is neither",
    "generate x --model nanogpt-torn": "nanogpt-torn/ckpt.pt: not a readable file of tensors",
    "generate x --model nanogpt-empty": "nanogpt-empty/ckpt.pt: not a readable file of tensors",
    "generate x --model nanogpt-no-args": (
        "nanogpt-no-args/ckpt.pt: needs the model's config.json beside it; there is none in nanogpt-no-args"
    ),
    "generate x --model nanogpt-rope": (
        "nanogpt-rope/ckpt.pt: model_args must be nanoGPT's; missing: block_size, n_embd, n_head, n_layer,"
    ),
    "generate x --model nanogpt-list": "nanogpt-list/ckpt.pt: must hold a dictionary of tensors; got list",
    "generate x --model model --device cuda:99": "device must be one that this machine has; got cuda:99",
    "generate x --model model --device mps:1": "device must be one that this machine has; got mps:1",
    "generate x --model model --dtype fp8": "argument --dtype: invalid choice: 'fp8'",
    "generate x --model model --backend cuda": "argument --backend: invalid choice: 'cuda'",
    "generate x --model model --weights int4": "argument --weights: invalid choice: 'int4'",
    "generate x --prompts p.txt": "generate: give a prompt or --prompts FILE, not both",
    "generate --prompts none.txt": "[Errno 2] No such file or directory: 'none.txt'",
    "generate --prompts '*.none'": "*.none: no file matches this pattern",
    "generate --prompts empty.txt": "empty.txt: must hold at least one prompt; it holds none",
    "generate --prompts latin.txt --model model": "latin.txt line 1: must be UTF-8 text; byte 2 of the line is not",
    "generate --prompts zero.txt": "zero.txt: must be an ordinary file; it is not",
    "generate --prompts pipe.txt": "pipe.txt: must be an ordinary file; it is not",
    "generate --prompts loop.txt": "[Errno 40] Too many levels of symbolic links: 'loop.txt'",
    "generate --prompts folder.txt": "folder.txt: is a folder; name its files, as folder.txt/*.txt",
    "generate --prompts empty": (
        "empty: a file of prompts must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be hf://OWNER/NAME;"
    ),
    "generate --prompts x.doc": (
        "x.doc: a file of prompts must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be hf://OWNER/NAME;"
    ),
    "generate --prompts /dev/zero": (
        "/dev/zero: a file of prompts must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be"
    ),
    "generate --prompts -": "standard input is closed; give the prompt as an argument or --prompts FILE",
    "generate -": "standard input is closed; give the prompt as an argument or --prompts FILE",
    "generate --prompts list.jsonl --model model": (
        'list.jsonl line 1: must be an object with either "prompt" or "prompt_ids"'
    ),
    "generate --prompts deep.jsonl --model model": (
        "deep.jsonl line 1: must be a flat JSON object; it is nested too deeply"
    ),
    "generate --prompts digits.jsonl --model model": (
        "digits.jsonl line 1: must be JSON; it has an integer of thousands of digits"
    ),
    "generate --prompts id-of-100-digits.jsonl --model model": (
        "generate: id-of-100-digits.jsonl line 1 holds the token id 1000000000000000000000000000000000000000..."
    ),
    "generate --prompts float-ids.jsonl --model model": (
        'float-ids.jsonl line 1: "prompt_ids" must be a list of integers'
    ),
    "generate --prompts whole-float-ids.jsonl --model model": (
        'whole-float-ids.jsonl line 1: "prompt_ids" must be a list of integers'
    ),
    "generate --prompts string-ids.jsonl --model model": (
        'string-ids.jsonl line 1: "prompt_ids" must be a list of integers'
    ),
    "generate --prompts bool-ids.jsonl --model model": 'bool-ids.jsonl line 1: "prompt_ids" must be a list of integers',
    "generate --prompts negative-ids.jsonl --model model": (
        "generate: negative-ids.jsonl line 1 holds the token id -1; ids must be in [0, 274)"
    ),
    "generate --prompts high-ids.jsonl --model model": (
        "generate: high-ids.jsonl line 1 holds the token id 280; ids must be in [0, 274)"
    ),
    "generate --prompts digit-text-ids.jsonl --model model": (
        'digit-text-ids.jsonl line 1: "prompt_ids" must be a list of integers'
    ),
    "generate --prompts both.jsonl --model model": (
        'both.jsonl line 1: must be an object with either "prompt" or "prompt_ids"'
    ),
    "generate --prompts neither.jsonl --model model": (
        'neither.jsonl line 1: must be an object with either "prompt" or "prompt_ids"; it has "prompts": name'
    ),
    "generate --prompts number.jsonl --model model": 'number.jsonl line 1: "prompt" must be a string; got int',
    "generate --prompts null.jsonl --model model": 'null.jsonl line 1: "prompt" must be a string; got NoneType',
    "generate --prompts bad-id.jsonl --model model": (
        'bad-id.jsonl line 1: "id" must be a string or an integer; got list'
    ),
    "generate --prompts surrogate.jsonl --model model": (
        "surrogate.jsonl line 1: must be Unicode text; it has an unpaired surrogate"
    ),
    "generate --prompts half.jsonl --model model": (
        "half.jsonl line 1: must be JSON; Unterminated string starting at at column 17"
    ),
    "generate --prompts latin.jsonl --model model": (
        "latin.jsonl line 1: must be UTF-8 text; byte 13 of the line is not"
    ),
    "generate --prompts other.csv": 'other.csv: must have a column "prompt"; it has a, b: name one with --column',
    "generate --prompts double.csv": "double.csv: its columns must have different names; got prompt, prompt",
    "generate --prompts open.csv": "open.csv line 2: must be CSV (",
    "generate --prompts ragged.csv --model model": "ragged.csv line 2: must have 2 fields, as the header has; it has 1",
    "generate --prompts latin.csv": "latin.csv: must be UTF-8 text; it is not after line 0",
    "generate --prompts torn.parquet": "torn.parquet: must be a whole Parquet file; it is not",
    "generate --prompts headless.fasta --model model": (
        'headless.fasta line 1: must begin with a header line, ">" and a name'
    ),
    "generate --prompts plain.txt.gz": "plain.txt.gz: must be a whole .gz file",
    "generate --prompts plain.jsonl.zst": "plain.jsonl.zst: must be a whole .zst file",
    "generate --prompts torn.txt.gz": "torn.txt.gz: must be a whole .gz file",
    "generate --prompts double.parquet.gz": (
        "double.parquet.gz: a .parquet file is already compressed; its name must end in .parquet"
    ),
    "generate --prompts long.txt --model model": (
        "generate: long.txt line 6 has 1600 tokens; the context holds 64; shorten the prompt, or truncate it on"
    ),
    "generate x --column text": "generate: --column needs --prompts FILE; give both",
    "generate x --num-samples 0": "generate: --num-samples must be at least 1; got 0",
    "generate x --num-samples -1": "generate: --num-samples must be at least 1; got -1",
    "generate x --num-samples 1000000000000000000000000000000": (
        "generate: --num-samples must be at most 10,000,000; got 1000000000000000000000000000000"
    ),
    "generate x --num-samples 1.5": "argument --num-samples: invalid int value: '1.5'",
    "generate x --num-samples x": "argument --num-samples: invalid int value: 'x'",
    "generate x --batch-size 0": "generate: --batch-size must be at least 1; got 0",
    "generate x --batch-size -1": "generate: --batch-size must be at least 1; got -1",
    "generate x --batch-size all": "argument --batch-size: must be auto or a number of samples; got 'all'",
    "generate x --max-new-tokens 0": "SamplingConfig: max_new_tokens must be an int >= 1; got 0",
    "generate x --max-new-tokens -5": "SamplingConfig: max_new_tokens must be an int >= 1; got -5",
    "generate x --max-new-tokens 1e3": "argument --max-new-tokens: invalid int value: '1e3'",
    "generate x --temperature -1": "SamplingConfig: temperature must be finite and >= 0 (0 is greedy); got -1.0",
    "generate x --temperature nan": "SamplingConfig: temperature must be finite and >= 0 (0 is greedy); got nan",
    "generate x --temperature inf": "SamplingConfig: temperature must be finite and >= 0 (0 is greedy); got inf",
    "generate x --temperature hot": "argument --temperature: invalid float value: 'hot'",
    "generate x --top-k 0": "SamplingConfig: top_k must be an int >= 1 or None; got 0",
    "generate x --top-k -1": "SamplingConfig: top_k must be an int >= 1 or None; got -1",
    "generate x --top-p 0": "SamplingConfig: top_p must be in (0, 1] or None; got 0.0",
    "generate x --top-p 1.5": "SamplingConfig: top_p must be in (0, 1] or None; got 1.5",
    "generate x --top-p nan": "SamplingConfig: top_p must be in (0, 1] or None; got nan",
    "generate x --min-p -0.1": "SamplingConfig: min_p must be in [0, 1] or None; got -0.1",
    "generate x --min-p 1.1": "SamplingConfig: min_p must be in [0, 1] or None; got 1.1",
    "generate x --min-p nan": "SamplingConfig: min_p must be in [0, 1] or None; got nan",
    "generate x --repetition-penalty 0": (
        "SamplingConfig: repetition_penalty must be finite and > 0 (1 is none); got 0.0"
    ),
    "generate x --repetition-penalty inf": (
        "SamplingConfig: repetition_penalty must be finite and > 0 (1 is none); got inf"
    ),
    "generate x --repetition-penalty nan": (
        "SamplingConfig: repetition_penalty must be finite and > 0 (1 is none); got nan"
    ),
    "generate x --min-new-tokens -1": "SamplingConfig: min_new_tokens must be an int >= 0; got -1",
    "generate x --min-new-tokens 129": "SamplingConfig: min_new_tokens must be at most max_new_tokens (128); got 129",
    "generate x --no-repeat-ngram-size -1": "SamplingConfig: no_repeat_ngram_size must be an int >= 0; got -1",
    "generate x --suppress-token-id -1": "SamplingConfig: suppress_tokens must be a list of token ids; got [-1]",
    "generate x --suppress-token-id 280 --model model": (
        "generate: sequence_bias, bad_words_ids and suppress_tokens must name ids in [0, 274); got 280"
    ),
    "generate x --stop ''": "SamplingConfig: stop_strings must be non-empty strings; got ('',)",
    "generate x --stop-token-id -1": "SamplingConfig: stop_token_ids must be ints in [0, 2**31); got (-1,)",
    "generate x --stop-token-id 1000000000000000000000000000000 --model model --max-new-tokens 2": (
        "SamplingConfig: stop_token_ids must be ints in [0, 2**31); got"
    ),
    "generate x --seed -1": "SamplingConfig: seed must be an int in [0, 2**64); got -1",
    "generate x --seed 18446744073709551616": (
        "SamplingConfig: seed must be an int in [0, 2**64); got 18446744073709551616"
    ),
    "generate x --truncate right": "argument --truncate: invalid choice: 'right'",
    "generate x --score all": "argument --score: invalid choice: 'all'",
    "generate x --score whole": "generate: --score needs --out FILE; give both",
    "generate x --resume": "generate: --resume needs --out FILE; give both",
    "generate x --overwrite": "generate: --overwrite needs --out FILE; give both",
    "generate x --token-ids": "generate: --token-ids needs --out FILE; give both",
    "generate x --logprobs": "generate: --logprobs needs --out FILE; give both",
    "generate x --keep-best 1": "generate: --keep-best needs --out FILE; give both",
    "generate x --dedupe": "generate: --dedupe needs --out FILE; give both",
    "generate x --shard 0/2": "generate: --shard needs --out FILE; give both",
    "generate x --shard 2/2 --out o.jsonl": "a shard must be I/N with 0 <= I < N, as 0/4 .. 3/4; got '2/2'",
    "generate x --shard x --out o.jsonl": "a shard must be I/N with 0 <= I < N, as 0/4 .. 3/4; got 'x'",
    "generate x --out o.tsv": "o.tsv: an output must end in .jsonl, .fasta, .txt; got '.tsv'",
    "generate x --out o": "o: an output must end in .jsonl, .fasta, .txt; got ''",
    "generate x --out ''": ".: an output must end in .jsonl, .fasta, .txt; got ''",
    "generate x --out no/o.txt": (
        "no/o.txt: is in the folder no, which does not exist; name a file in a folder that exists"
    ),
    "generate x --out empty": "empty: an output must end in .jsonl, .fasta, .txt; got ''",
    "generate x --out taken/o.txt": (
        "taken/o.txt: is in the folder taken, which does not exist; name a file in a folder that exists"
    ),
    "generate x --out o.txt --logprobs": "o.txt: token ids and log-probabilities need a .jsonl output; got '.txt'",
    "generate x --out o.fasta --token-ids": (
        "o.fasta: token ids and log-probabilities need a .jsonl output; got '.fasta'"
    ),
    "generate x --out o.txt --resume --overwrite": (
        "--resume keeps what the output holds and --overwrite drops it; give one of them"
    ),
    "generate x --out p.txt": "p.txt: exists; continue it with --resume or replace it with --overwrite",
    "generate --prompts p.txt --out p.txt --overwrite": (
        "p.txt: holds the prompts and cannot be the output; choose another --out"
    ),
    "generate x --out o.csv --keep-best 0": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got '0'"
    ),
    "generate x --out o.csv --by logprob": "generate: --by needs --keep-best; give both",
    "generate x --out o.jsonl --min-length 3 --max-length 2": (
        "Selection: min_length must be at most max_length; got 3 and 2"
    ),
    "generate x --out foreign.jsonl --model model --resume": "foreign.jsonl: was made by another run (",
    "generate x --out unsettled.jsonl --model model --resume": (
        "unsettled.jsonl: cannot be resumed, because unsettled.jsonl.run.json with its settings is missing;"
    ),
    "generate x --out listed.jsonl --model model --resume": (
        "listed.jsonl.run.json: must hold a run's settings; it does not: choose another output"
    ),
    "generate x --out broken.jsonl --model model --resume": (
        "broken.jsonl.run.json: must hold a run's settings; it does not: choose another output"
    ),
    "generate x --out nested.jsonl --model model --resume": (
        "nested.jsonl.run.json: must hold a run's settings; it does not: choose another output"
    ),
    "generate x --out foreign.jsonl --model model": (
        "foreign.jsonl: exists; continue it with --resume or replace it with --overwrite"
    ),
    "generate x y": "unrecognized arguments: y",
    "generate x --no-such-option": "unrecognized arguments: --no-such-option",
    "generate x --model no-tokenizer --out o.txt": (
        "generate: the prompt is text, but the model has no tokenizer; set model.tokenizer or give ids"
    ),
    "generate x --stop a --model no-tokenizer": (
        "generate: the prompt is text, but the model has no tokenizer; set model.tokenizer or give ids"
    ),
    "generate x --stop-token-id 1000000000000000000000000000000": (
        "SamplingConfig: stop_token_ids must be ints in [0, 2**31); got (1000000000000000000000000000000,)"
    ),
    "generate x --model tokenizers/empty": "tokenizers/empty/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/torn": "tokenizers/torn/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/list": "tokenizers/list/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/nested": "tokenizers/nested/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/latin": (
        "tokenizers/latin/tokenizer.json: must be UTF-8 text; invalid start byte at byte 0"
    ),
    "generate x --model tokenizers/no-model": "tokenizers/no-model/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/other-model": "tokenizers/other-model/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/negative-id": "tokenizers/negative-id/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/huge-id": "tokenizers/huge-id/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/merges": "tokenizers/merges/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/prefix": "tokenizers/prefix/tokenizer.json: not a tokenizer.json",
    "generate x --model tokenizers/dropout": "tokenizers/dropout/tokenizer.json: not a tokenizer.json",
    "generate a\udcffb": "the prompt must be UTF-8 text; byte 2 is not",
    "generate x --num-samples " + "9" * 100: "generate: --num-samples must be at most 10,000,000; got 999999999",
    "generate x --num-samples " + "9" * 5000: "argument --num-samples: invalid int value",
}
