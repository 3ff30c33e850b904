"""Command lines that the other commands must refuse, run in the folder that zoo.py builds."""

from __future__ import annotations

# Each command line, and the beginning of its error after "fastgpt2: ".
SCORE: dict[str, str] = {
    "score empty.txt --model model": "empty.txt: must hold at least one sequence; it holds none",
    "score text.jsonl --model ./none/here": (
        "none/here: no such file or folder (and no name of a model on the hub, like owner/name)"
    ),
    "score none.txt": "[Errno 2] No such file or directory: 'none.txt'",
    "score '*.none'": "*.none: no file matches this pattern",
    "score .": (
        ".: a file of sequences must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be hf://OWNER/NAME; got"
    ),
    "score empty": (
        "empty: a file of sequences must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be hf://OWNER/NAME;"
    ),
    "score folder.txt": "folder.txt: is a folder; name its files, as folder.txt/*.txt",
    "score zero.txt": "zero.txt: must be an ordinary file; it is not",
    "score pipe.txt": "pipe.txt: must be an ordinary file; it is not",
    "score x.doc": (
        "x.doc: a file of sequences must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be hf://OWNER/NAME;"
    ),
    "score -": "standard input is closed; name files to score",
    "score latin.txt --model model": "latin.txt line 1: must be UTF-8 text; byte 2 of the line is not",
    "score list.jsonl --model model": 'list.jsonl line 1: must be an object with either "text" or "token_ids"',
    "score deep.jsonl --model model": "deep.jsonl line 1: must be a flat JSON object; it is nested too deeply",
    "score number.jsonl --model model": 'number.jsonl line 1: "text" must be a string; got int',
    "score null.jsonl --model model": 'null.jsonl line 1: "text" must be a string; got NoneType',
    "score short.jsonl --model model": (
        "score: short.jsonl line 1 has no token with another one before it; give it a prefix, or leave it out"
    ),
    "score surrogate.jsonl --model model": "surrogate.jsonl line 1: must be Unicode text; it has an unpaired surrogate",
    "score bad-id.jsonl --model model": 'bad-id.jsonl line 1: "id" must be a string or an integer; got list',
    "score half.jsonl --model model": "half.jsonl line 1: must be JSON; Unterminated string starting at at column 17",
    "score long.txt --model model": "score: long.txt line 6 has 1600 tokens; the context scores at most 65; shorten it",
    "score other.csv": 'other.csv: must have a column "text"; it has a, b: name one with --column',
    "score plain.jsonl.zst": "plain.jsonl.zst: must be a whole .zst file",
    "score torn.parquet": "torn.parquet: must be a whole Parquet file; it is not",
    "score headless.fasta --model model": 'headless.fasta line 1: must begin with a header line, ">" and a name',
    "score text.jsonl --column words --model model": (
        'text.jsonl line 1: must be an object with "words"; it has "text": name another column with --column'
    ),
    "score text.jsonl --prompt-column words --model model": (
        'text.jsonl line 1: must have "words", which --prompt-column names'
    ),
    "score good.jsonl --prompt x --model model": "good.jsonl line 1: has a prompt of its own; leave out --prompt",
    "score text.jsonl --after-prompt --model model": (
        'text.jsonl line 1: has no prompt to score after; give --prompt or a column "prompt"'
    ),
    "score ids.jsonl --append x --model model": "ids.jsonl line 1: holds token ids; --append and --wrap are for text",
    "score ids.jsonl --wrap 3 --model model": "ids.jsonl line 1: holds token ids; --append and --wrap are for text",
    "score text.jsonl --wrap 0": "score: --wrap must be at least 1; got 0",
    "score text.jsonl --wrap -1": "score: --wrap must be at least 1; got -1",
    "score text.jsonl --batch-tokens 0": "score: --batch-tokens must be at least 1; got 0",
    "score text.jsonl --batch-tokens x": "argument --batch-tokens: invalid int value: 'x'",
    "score text.jsonl --dtype int8": "argument --dtype: invalid choice: 'int8'",
    "score text.jsonl --device gpu": "device must be one that this machine has; got gpu",
    "score text.jsonl --device cuda:99": "device must be one that this machine has; got cuda:99",
    "score text.jsonl --backend x": "argument --backend: invalid choice: 'x'",
    "score text.jsonl --resume": "score: --resume needs --out FILE; give both",
    "score text.jsonl --overwrite": "score: --overwrite needs --out FILE; give both",
    "score text.jsonl --shard 0/2": "score: --shard needs --out FILE; give both",
    "score text.jsonl --keep-best 1": "score: --keep-best needs --out FILE; give both",
    "score text.jsonl --dedupe": "score: --dedupe needs --out FILE; give both",
    "score text.jsonl --strip-special": "score: --strip-special needs --out FILE; give both",
    "score text.jsonl --out o.tsv": "o.tsv: an output must end in .jsonl, .fasta, .txt; got '.tsv'",
    "score text.jsonl --out no/o.jsonl": (
        "no/o.jsonl: is in the folder no, which does not exist; name a file in a folder that exists"
    ),
    "score text.jsonl --out o.txt --logprobs": (
        "o.txt: token ids and log-probabilities need a .jsonl output; got '.txt'"
    ),
    "score text.jsonl --out o.jsonl --shard 2/2": "a shard must be I/N with 0 <= I < N, as 0/4 .. 3/4; got '2/2'",
    "score text.jsonl --out o.jsonl --shard -1/2": "argument --shard: expected one argument",
    "score text.jsonl --out o.jsonl --shard 0/0": "a shard must be I/N with 0 <= I < N, as 0/4 .. 3/4; got '0/0'",
    "score text.jsonl --out o.jsonl --shard 0/2 --overwrite": (
        "--overwrite could drop what another process has written; remove o.jsonl and leave the option out"
    ),
    "score text.jsonl --out o.jsonl --resume --overwrite": (
        "--resume keeps what the output holds and --overwrite drops it; give one of them"
    ),
    "score text.jsonl --out text.jsonl --overwrite": (
        "text.jsonl: holds the sequences and cannot be the output; choose another --out"
    ),
    "score text.jsonl --out rows.jsonl": "rows.jsonl: exists; continue it with --resume or replace it with --overwrite",
    "score text.jsonl --out foreign.jsonl --resume --model model": "foreign.jsonl: was made by another run (",
    "score text.jsonl --out unsettled.jsonl --resume --model model": (
        "unsettled.jsonl: cannot be resumed, because unsettled.jsonl.run.json with its settings is missing;"
    ),
    "score text.jsonl --out nested.jsonl --resume --model model": (
        "nested.jsonl.run.json: must hold a run's settings; it does not: choose another output"
    ),
    "score text.jsonl --out o.csv --by logprob": "score: --by needs --keep-best; give both",
    "score text.jsonl --out o.csv --keep-best x": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got 'x'"
    ),
    "score text.jsonl --out o.csv --min-length -1": "Selection: min_length must be at least 0; got -1",
    "score text.jsonl --model no-tokenizer": (
        "score: text.jsonl line 1 is text, but the model has no tokenizer; set model.tokenizer or give ids"
    ),
    "score ids.jsonl --out o.txt --model no-tokenizer": (
        "o.txt: needs text, but the model no-tokenizer has no tokenizer; use a .jsonl output"
    ),
    "score": "the following arguments are required: FILE",
}

SELECT: dict[str, str] = {
    "select none.jsonl o.jsonl": "[Errno 2] No such file or directory: 'none.jsonl'",
    "select rows.txt o.jsonl": "rows.txt: records to select from must be a .jsonl file; got '.txt'",
    "select rows.jsonl o.tsv": "o.tsv: an output must end in .jsonl, .fasta, .txt, .csv, .parquet; got '.tsv'",
    "select rows.jsonl o": "o: an output must end in .jsonl, .fasta, .txt, .csv, .parquet; got ''",
    "select rows.jsonl rows.jsonl": "rows.jsonl: exists; replace it with --overwrite",
    "select rows.jsonl rows.jsonl --overwrite": (
        "rows.jsonl: holds the records and cannot be the output; choose another"
    ),
    "select rows.jsonl no/o.jsonl": (
        "no/o.jsonl: cannot be written (No such file or directory); rows.jsonl holds all records"
    ),
    "select rows.jsonl empty": "empty: an output must end in .jsonl, .fasta, .txt, .csv, .parquet; got ''",
    "select empty o.jsonl": "empty: records to select from must be a .jsonl file; got ''",
    "select rows-list.jsonl o.jsonl": "rows-list.jsonl line 1: must be a record, a JSON object; it is not",
    "select rows-deep.jsonl o.jsonl": "rows-deep.jsonl line 1: must be a record, a JSON object; it is not",
    "select rows-latin.jsonl o.jsonl": "rows-latin.jsonl line 1: must be a record, a JSON object; it is not",
    "select half.jsonl o.jsonl": "half.jsonl line 1: must be a record, a JSON object; it is not",
    "select zero.txt o.jsonl": "zero.txt: records to select from must be a .jsonl file; got '.txt'",
    "select rows.jsonl o.jsonl --keep-best 0": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got '0'"
    ),
    "select rows.jsonl o.jsonl --keep-best -3": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got '-3'"
    ),
    "select rows.jsonl o.jsonl --keep-best x": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got 'x'"
    ),
    "select rows.jsonl o.jsonl --keep-best 0%": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got '0%'"
    ),
    "select rows.jsonl o.jsonl --keep-best 101%": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got '101%'"
    ),
    "select rows.jsonl o.jsonl --keep-best nan%": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got 'nan%'"
    ),
    "select rows.jsonl o.jsonl --keep-best 1000000000000000000000000000000": (
        "Selection: keep_best must be a number from 1 on or a percentage up to 100%; got"
    ),
    "select rows.jsonl o.jsonl --by logprob": "select: --by needs --keep-best; give both",
    "select rows.jsonl o.jsonl --by loss": "argument --by: invalid choice: 'loss'",
    "select rows.jsonl o.jsonl --min-length -1": "Selection: min_length must be at least 0; got -1",
    "select rows.jsonl o.jsonl --max-length -1": "Selection: max_length must be at least 0; got -1",
    "select rows.jsonl o.jsonl --min-length 3 --max-length 2": (
        "Selection: min_length must be at most max_length; got 3 and 2"
    ),
    "select rows.jsonl o.jsonl --min-length x": "argument --min-length: invalid int value: 'x'",
    "select rows.jsonl o.jsonl --special x": "select: --special needs --strip-special; give both",
    "select rows.jsonl o.jsonl --strip-special": (
        "select: --strip-special reads the special tokens from rows.jsonl.run.json, which cannot be read; name"
    ),
    "select nested.jsonl o.jsonl --strip-special": (
        "select: --strip-special reads the special tokens from nested.jsonl.run.json, which cannot be read; name"
    ),
    "select listed.jsonl o.jsonl --strip-special": (
        "select: --strip-special reads the special tokens from listed.jsonl.run.json, which cannot be read; name"
    ),
    "select rows-bare.jsonl o.jsonl --keep-best 1": (
        'rows-bare.jsonl line 1: has no "perplexity" to select by; generate or score the records anew'
    ),
    "select rows-bare.jsonl o.jsonl --drop-truncated": (
        'rows-bare.jsonl line 1: has no "finish_reason" to select by; generate or score the records anew'
    ),
    "select rows-bare.jsonl o.jsonl --dedupe": (
        'rows-bare.jsonl line 1: has no "text" to select by; generate or score the records anew'
    ),
    "select rows-no-text.jsonl o.jsonl --dedupe": 'rows-no-text.jsonl line 1: "text" must be a string; got NoneType',
    "select rows-no-text.jsonl o.jsonl --min-length 1": (
        'rows-no-text.jsonl line 1: "text" must be a string; got NoneType'
    ),
    "select rows-no-perplexity.jsonl o.jsonl --keep-best 1": (
        'rows-no-perplexity.jsonl line 1: "perplexity" must be a number; got str'
    ),
    "select rows-bool-perplexity.jsonl o.jsonl --keep-best 1": (
        'rows-bool-perplexity.jsonl line 1: "perplexity" must be a number; got bool'
    ),
    "select rows-no-reason.jsonl o.jsonl --drop-truncated": (
        'rows-no-reason.jsonl line 1: "finish_reason" must be a string; got int'
    ),
    "select rows-list-logprob.jsonl o.jsonl --keep-best 1 --by logprob": (
        'rows-list-logprob.jsonl line 1: "logprob" must be a number; got list'
    ),
    "select rows-list-logprob.jsonl o.fasta": 'select: "logprob" of prompt0 must be a number; got list',
    "select rows-no-perplexity.jsonl o.fasta": 'select: "perplexity" of prompt0 must be a number; got str',
    "select rows.jsonl": "the following arguments are required: OUT",
    "select": "the following arguments are required: IN, OUT",
}

PLOT: dict[str, str] = {
    "plot": "the following arguments are required: RUN",
    "plot none": "none/metrics.jsonl: no such file; name the folder of a training run",
    "plot runs/empty": "runs/empty/metrics.jsonl: is empty; a run writes its first line after log_interval steps",
    "plot runs/text": (
        "runs/text/metrics.jsonl: line 1 is not a line that a training run wrote; mend the file or move it away"
    ),
    "plot runs/list": (
        "runs/list/metrics.jsonl: line 1 is not a line that a training run wrote; mend the file or move it away"
    ),
    "plot runs/nested": (
        "runs/nested/metrics.jsonl: line 1 is not a line that a training run wrote; mend the file or move it away"
    ),
    "plot runs/no-step": (
        "runs/no-step/metrics.jsonl: line 1 is not a line that a training run wrote; mend the file or move it"
    ),
    "plot runs/text-step": (
        "runs/text-step/metrics.jsonl: line 1 is not a line that a training run wrote; mend the file or move it"
    ),
    "plot runs/torn": (
        "runs/torn/metrics.jsonl: line 2 is not a line that a training run wrote; mend the file or move it away"
    ),
    "plot runs/latin": (
        "runs/latin/metrics.jsonl: line 1 is not a line that a training run wrote; mend the file or move it away"
    ),
    "plot p.txt": "p.txt/metrics.jsonl: no such file; name the folder of a training run",
    "plot runs/good --out x.gif": "x.gif: must end in .png or .svg; name another",
    "plot runs/good --out x": "x: must end in .png or .svg; name another",
    "plot runs/good --out no/x.png": "[Errno 2] No such file or directory: 'no/x.png'",
    "plot runs/good --out empty": "empty: must end in .png or .svg; name another",
    "plot runs/good runs/good": "plot: a picture of several runs needs a name; give it with --out FILE",
    "plot runs/good runs/empty --out x.png": (
        "runs/empty/metrics.jsonl: is empty; a run writes its first line after log_interval steps"
    ),
    "plot runs/text-loss": 'runs/text-loss/metrics.jsonl: "loss" must be a number in every line; it is not',
    "plot runs/list-loss": 'runs/list-loss/metrics.jsonl: "loss" must be a number in every line; it is not',
}

EVAL: dict[str, str] = {
    "eval": "the following arguments are required: --tasks",
    "eval --tasks": "argument --tasks: expected at least one argument",
    "eval --tasks x --batch-size 0": (
        "eval: --batch-size must be 1 or more, --num-fewshot 0 or more and --limit above 0; got 0, None and None"
    ),
    "eval --tasks x --batch-size -1": (
        "eval: --batch-size must be 1 or more, --num-fewshot 0 or more and --limit above 0; got -1, None and None"
    ),
    "eval --tasks x --batch-size x": "argument --batch-size: invalid int value: 'x'",
    "eval --tasks x --num-fewshot -1": (
        "eval: --batch-size must be 1 or more, --num-fewshot 0 or more and --limit above 0; got 8, -1 and None"
    ),
    "eval --tasks x --limit 0": (
        "eval: --batch-size must be 1 or more, --num-fewshot 0 or more and --limit above 0; got 8, None and 0.0"
    ),
    "eval --tasks x --limit -1": (
        "eval: --batch-size must be 1 or more, --num-fewshot 0 or more and --limit above 0; got 8, None and -1.0"
    ),
    "eval --tasks x --limit nan": (
        "eval: --batch-size must be 1 or more, --num-fewshot 0 or more and --limit above 0; got 8, None and nan"
    ),
    "eval --tasks x --include-path nowhere": "eval: --include-path must be a folder; got nowhere",
    "eval --tasks x --include-path p.txt": "eval: --include-path must be a folder; got p.txt",
    "eval --tasks x --model ./none/here": (
        "none/here: no such file or folder (and no name of a model on the hub, like owner/name)"
    ),
    "eval --tasks x --model weightless": "weightless: has a config.json but no weights; looked for model.safetensors,",
    "eval --tasks x --device cuda:99": "device must be one that this machine has; got cuda:99",
    "eval --tasks x --dtype fp8": "argument --dtype: invalid choice: 'fp8'",
}

CHECK: dict[str, str] = {
    "check --device cuda:99": "device must be one that this machine has; got cuda:99",
    "check --device gpu": "device must be one that this machine has; got gpu",
    "check --device meta": "device must be one that this machine has; got meta",
    "check --device ''": "device must be one that this machine has; got ",
    "check x": "unrecognized arguments: x",
    "check --speed": "unrecognized arguments: --speed",
}

WARMUP: dict[str, str] = {
    "warmup": "there is no GPU here; name a target, such as sm_90",
    "warmup --target h100": "a target must be like sm_90 or gfx942",
    "warmup --target sm_x": "a target must be like sm_90 or gfx942",
    "warmup --target sm_10": "a target must be like sm_90 or gfx942",
    "warmup --target sm_999": "a target must be like sm_90 or gfx942",
    "warmup --target gfx1": "a target must be like sm_90 or gfx942",
    "warmup --target ''": "a target must be like sm_90 or gfx942",
    "warmup --rows 0 --target sm_90": "warmup: --rows and --jobs must be 1 or more; got [0] and None",
    "warmup --rows x --target sm_90": "argument --rows: invalid int value: 'x'",
    "warmup --rows --target sm_90": "argument --rows: expected at least one argument",
    "warmup --jobs 0 --target sm_90": "warmup: --rows and --jobs must be 1 or more; got [1, 2, 8, 16, 32] and 0",
    "warmup --jobs -1 --target sm_90": "warmup: --rows and --jobs must be 1 or more; got [1, 2, 8, 16, 32] and -1",
    "warmup --dtype fp8": "argument --dtype: invalid choice: 'fp8'",
    "warmup --model ./none/here --target sm_90": (
        "none/here: no such file or folder (and no name of a model on the hub, like owner/name)"
    ),
    "warmup --model configs/layers --target sm_90": (
        "configs/layers: GPT2Config: num_layers must be at most 10000; got 10000000"
    ),
    "warmup --model p.txt --target sm_90": "p.txt: not a readable file of tensors",
}

NONE: dict[str, str] = {
    "write": "argument {generate,score,select,train,plot,eval,check,warmup,info,convert}: invalid choice: 'write'",
    "generat": "argument {generate,score,select,train,plot,eval,check,warmup,info,convert}: invalid choice: 'generat'",
    "--no-such-option": (
        "the following arguments are required: {generate,score,select,train,plot,eval,check,warmup,info,convert}"
    ),
    "''": "argument {generate,score,select,train,plot,eval,check,warmup,info,convert}: invalid choice: ''",
    " ": "the following arguments are required: {generate,score,select,train,plot,eval,check,warmup,info,convert}",
}
