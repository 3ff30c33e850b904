"""Command lines that `fastgpt2 train` must refuse, run in the folder that zoo.py builds."""

from __future__ import annotations

# Each command line, and the beginning of its error after "fastgpt2: ".
TRAIN: dict[str, str] = {
    "train": "the following arguments are required: --out",
    "train --out x": "train: there is no text to train on; give it with --data PATH, or try --data stdlib",
    "train --out x --data": "argument --data: expected at least one argument",
    "train --data no/such/text --out x": "no/such/text: no such file or directory",
    "train --data '*.none' --out x": "*.none: no file matches this pattern",
    "train --data empty --out x": "no text files in empty (0 skipped)",
    "train --data empty.txt --out x": "empty.txt: must be UTF-8 text; it is empty",
    "train --data latin.txt --out x": (
        "latin.txt: must be UTF-8 text; it has bytes that are not UTF-8 (invalid start byte)"
    ),
    "train --data zeros.txt --out x": "zeros.txt: must be UTF-8 text; it has NUL bytes",
    "train --data zero.txt --out x": "zero.txt: must be a folder or an ordinary file; it is neither",
    "train --data pipe.txt --out x": "pipe.txt: must be a folder or an ordinary file; it is neither",
    "train --data file.bin --out x": (
        "file.bin: must be UTF-8 text; it has bytes that are not UTF-8 (invalid start byte)"
    ),
    "train --data text.txt --out x --suffix .none --column a": (
        "find_documents: column='a' is for .jsonl, .csv, .parquet, .fasta, .fa and hf://; got none"
    ),
    "train --data other.csv --out x": 'other.csv: must have a column "text"; it has a, b: name one with --column',
    "train --data open.csv --out x": "open.csv line 2: must be CSV (",
    "train --data ragged.csv --out x --column text": (
        "ragged.csv line 2: must have 2 fields, as the header has; it has 1"
    ),
    "train --data torn.parquet --out x": "torn.parquet: must be a whole Parquet file; it is not",
    "train --data plain.jsonl.zst --out x": "plain.jsonl.zst: must be a whole .zst file",
    "train --data list.jsonl --out x": 'list.jsonl line 1: must be an object with "text"',
    "train --data deep.jsonl --out x": "deep.jsonl line 1: must be a flat JSON object; it is nested too deeply",
    "train --data number.jsonl --out x": 'number.jsonl line 1: "text" must be a string; got int',
    "train --data text-of-ids.jsonl --out x": 'text-of-ids.jsonl line 1: "text" must be a string; got token ids',
    "train --data null.jsonl --out x": 'null.jsonl line 1: "text" must be a string; got NoneType',
    "train --data short.jsonl --out x": "short.jsonl: must have a row with text; it has none",
    "train --data text.jsonl --out x --column words": (
        'text.jsonl line 1: must be an object with "words"; it has "text": name another column with --column'
    ),
    "train --data surrogate.jsonl --out x": (
        "surrogate.jsonl line 1: must be Unicode text; it has an unpaired surrogate"
    ),
    "train --data data-odd --out x --vocab-size 300 --context 8": (
        "data-odd/train.bin: must hold uint16 tokens; its 399 bytes are not a multiple of 2"
    ),
    "train --data data-few --out x --vocab-size 300 --context 8": (
        "data-few/train.bin: has 2 tokens; a context of 8 needs at least 9: give more text or a smaller context"
    ),
    "train --data data-none --out x --vocab-size 300 --context 8": (
        "data-none/train.bin: has 0 tokens; a context of 8 needs at least 9: give more text or a smaller context"
    ),
    "train --data data-odd-val --out x --vocab-size 300 --context 8": (
        "data-odd-val/val.bin: must hold uint16 tokens; its 399 bytes are not a multiple of 2"
    ),
    "train --data data-good --out x --context 8": (
        "train: data-good has no tokenizer; give --tokenizer FOLDER, --vocab-size N or --preset NAME"
    ),
    "train --data data-good --out x --vocab-size 300 --context 1000": (
        "data-good/train.bin: has 200 tokens; a context of 1000 needs at least 1001: give more text or a smaller"
    ),
    "train --data data-good --out x --vocab-size 0": (
        "train: data-good has no tokenizer; give --tokenizer FOLDER, --vocab-size N or --preset NAME"
    ),
    "train --data data-meta-torn --out x --vocab-size 300 --context 8": (
        "data-meta-torn/meta.json: not a meta.json of fastgpt2"
    ),
    "train --data data-meta-list --out x --vocab-size 300 --context 8": (
        "data-meta-list/meta.json: not a meta.json of fastgpt2"
    ),
    "train --data data-meta-bare --out x --vocab-size 300 --context 8": (
        "data-meta-bare/meta.json: not a meta.json of fastgpt2"
    ),
    "train --data data-meta-nested --out x --vocab-size 300 --context 8": (
        "data-meta-nested/meta.json: not a meta.json of fastgpt2"
    ),
    "train --data text.txt --out x --steps 5 --minutes 1": "train: give --steps or --minutes, not both",
    "train --data text.txt --out x --steps 0": "TrainConfig: steps must be an int >= 1; got 0",
    "train --data text.txt --out x --steps -1": "TrainConfig: steps must be an int >= 1; got -1",
    "train --data text.txt --out x --steps 1.5": "argument --steps: invalid int value: '1.5'",
    "train --data text.txt --out x --minutes 0": "TrainConfig: minutes must be a finite number > 0; got 0.0",
    "train --data text.txt --out x --minutes nan": "TrainConfig: minutes must be a finite number > 0; got nan",
    "train --data text.txt --out x --batch-size 0": "TrainConfig: batch_size must be an int >= 1; got 0",
    "train --data text.txt --out x --batch-size -1": "TrainConfig: batch_size must be an int >= 1; got -1",
    "train --data text.txt --out x --accumulate 0": "TrainConfig: accumulate must be an int >= 1; got 0",
    "train --data text.txt --out x --lr 0": "TrainConfig: lr must be a finite number > 0; got 0.0",
    "train --data text.txt --out x --lr -1": "TrainConfig: lr must be a finite number > 0; got -1.0",
    "train --data text.txt --out x --lr nan": "TrainConfig: lr must be a finite number > 0; got nan",
    "train --data text.txt --out x --lr inf": "TrainConfig: lr must be a finite number > 0; got inf",
    "train --data text.txt --out x --min-lr -1": "TrainConfig: min_lr must be a finite number >= 0; got -1.0",
    "train --data text.txt --out x --warmup-steps -1": "TrainConfig: warmup_steps must be an int >= 0; got -1",
    "train --data text.txt --out x --weight-decay -1": (
        "TrainConfig: weight_decay must be a finite number >= 0; got -1.0"
    ),
    "train --data text.txt --out x --beta1 1": "TrainConfig: beta1 must be in [0, 1); got 1.0",
    "train --data text.txt --out x --beta2 -0.1": "TrainConfig: beta2 must be in [0, 1); got -0.1",
    "train --data text.txt --out x --max-grad-norm nan": (
        "TrainConfig: max_grad_norm must be a finite number >= 0; got nan"
    ),
    "train --data text.txt --out x --seed -1": "TrainConfig: seed must be an int >= 0; got -1",
    "train --data text.txt --out x --seed 9223372036854775808": (
        "TrainConfig: seed must be below 2**63; got 9223372036854775808"
    ),
    "train --data text.txt --out x --optimizer lion": "argument --optimizer: invalid choice: 'lion'",
    "train --data text.txt --out x --dtype fp8": "argument --dtype: invalid choice: 'fp8'",
    "train --data text.txt --out x --parallel tp": "argument --parallel: invalid choice: 'tp'",
    "train --data text.txt --out x --parallel fsdp": (
        "train: parallel 'fsdp' shares the weights among torchrun's processes; start the command with torchrun,"
    ),
    "train --data text.txt --out x --parallel fsdp --compile": (
        "TrainConfig: compile does not work with parallel 'fsdp'; leave one of the two out"
    ),
    "train --data text.txt --out x --export both": "argument --export: invalid choice: 'both'",
    "train --data text.txt --out x --log mlflow": "argument --log/--log-to: invalid choice: 'mlflow'",
    "train --data text.txt --out x --lora-rank -1": "TrainConfig: lora_rank must be an int >= 0; got -1",
    "train --data text.txt --out x --lora-rank 2": (
        "train: --lora-rank needs trained weights to adapt; name them with --init-from"
    ),
    "train --data text.txt --out x --lora-alpha 4": "TrainConfig: lora_alpha needs lora_rank; give both or neither",
    "train --data text.txt --out x --early-stopping 2 --eval-interval 0": (
        "TrainConfig: early_stopping needs evaluations; give an eval_interval > 0"
    ),
    "train --data text.txt --out x --log-interval 0": "TrainConfig: log_interval must be an int >= 1; got 0",
    "train --data text.txt --out x --eval-interval -1": "TrainConfig: eval_interval must be an int >= 0; got -1",
    "train --data text.txt --out x --eval-tokens -1": "TrainConfig: eval_tokens must be an int >= 0; got -1",
    "train --data text.txt --out x --checkpoint-interval 0": (
        "TrainConfig: checkpoint_interval must be an int >= 1; got 0"
    ),
    "train --data text.txt --out x --keep-checkpoints 0": "TrainConfig: keep_checkpoints must be an int >= 1; got 0",
    "train --data text.txt --out x --val-fraction 1": "find_documents: val_fraction must be in [0, 1); got 1.0",
    "train --data text.txt --out x --val-fraction -0.1": "find_documents: val_fraction must be in [0, 1); got -0.1",
    "train --data text.txt --out x --val-fraction nan": "find_documents: val_fraction must be in [0, 1); got nan",
    "train --data text.txt --out x --vocab-size 256": (
        "Tokenizer.train: vocab_size must be at least 257 (256 bytes and <|endoftext|>) and at most 1048576; got"
    ),
    "train --data text.txt --out x --vocab-size -1": (
        "Tokenizer.train: vocab_size must be at least 257 (256 bytes and <|endoftext|>) and at most 1048576; got"
    ),
    "train --data text.txt --out x --vocab-size 10000000000": (
        "Tokenizer.train: vocab_size must be at least 257 (256 bytes and <|endoftext|>) and at most 1048576; got"
    ),
    "train --data text.txt --out x --vocab-size x": "argument --vocab-size: invalid int value: 'x'",
    "train --data text.txt --out x --layers 0": "GPT2Config: num_layers must be a positive int; got 0",
    "train --data text.txt --out x --layers -1": "GPT2Config: num_layers must be a positive int; got -1",
    "train --data text.txt --out x --layers 10000000": "GPT2Config: num_layers must be at most 10000; got 10000000",
    "train --data text.txt --out x --layers 1.5": "argument --layers: invalid int value: '1.5'",
    "train --data text.txt --out x --hidden-size 0": "GPT2Config: hidden_size must be a positive int; got 0",
    "train --data text.txt --out x --hidden-size 1180591620717411303424": (
        "GPT2Config: hidden_size must be at most 2147483647; got 1180591620717411303424"
    ),
    "train --data text.txt --out x --heads 0": "GPT2Config: num_heads must be a positive int; got 0",
    "train --data text.txt --out x --heads 3": "GPT2Config: hidden_size must be a multiple of num_heads; got 256 and 3",
    "train --data text.txt --out x --context 0": "GPT2Config: context_length must be a positive int; got 0",
    "train --data text.txt --out x --context -1": "GPT2Config: context_length must be a positive int; got -1",
    "train --data text.txt --out x --context 1180591620717411303424": (
        "GPT2Config: context_length must be at most 2147483647; got 1180591620717411303424"
    ),
    "train --data text.txt --out x --feedforward-dim 0": (
        "GPT2Config: feedforward_dim must be a positive int or None; got 0"
    ),
    "train --data text.txt --out x --activation gleu": "GPT2Config: activation_function must be one of [",
    "train --data text.txt --out x --dropout 1": "GPT2Config: residual_dropout must be in [0, 1); got 1.0",
    "train --data text.txt --out x --dropout -0.1": "GPT2Config: residual_dropout must be in [0, 1); got -0.1",
    "train --data text.txt --out x --dropout nan": "GPT2Config: residual_dropout must be in [0, 1); got nan",
    "train --data text.txt --out x --preset gpt3": "argument --preset: invalid choice: 'gpt3'",
    "train --data text.txt --out x --preset gpt2 --init-from model": (
        "train: --init-from sets the model's sizes; leave out --preset and the size options"
    ),
    "train --data text.txt --out x --init-from model --layers 2": (
        "train: --init-from sets the model's sizes; leave out --preset and the size options"
    ),
    "train --data text.txt --out x --init-from model --vocab-size 300": (
        "train: --init-from sets the vocabulary; leave out --vocab-size"
    ),
    "train --data text.txt --out x --init-from ./none/here": (
        "none/here: no such file or folder (and no name of a model on the hub, like owner/name)"
    ),
    "train --data text.txt --out x --init-from weightless": (
        "weightless: has a config.json but no weights; looked for model.safetensors,"
    ),
    "train --data text.txt --out x --init-from no-tokenizer": (
        "train: no-tokenizer has no tokenizer; name a folder that has one with --tokenizer"
    ),
    "train --data text.txt --out x --tokenizer empty": (
        "empty: has no tokenizer.json, and no vocab.json with merges.txt"
    ),
    "train --data text.txt --out x --tokenizer tokenizers/torn": "tokenizers/torn/tokenizer.json: not a tokenizer.json",
    "train --data text.txt --out x --tokenizer none": "none: has no tokenizer.json, and no vocab.json with merges.txt",
    "train --data text.txt --out x --tokenizer model --vocab-size 300": (
        "train: --tokenizer sets the vocabulary; leave out --vocab-size"
    ),
    "train --data text.txt --out x --device cuda:99": "device must be one that this machine has; got cuda:99",
    "train --data text.txt --out x --device xla": "device must be one that this machine has; got xla",
    "train --data text.txt --out x --device meta": "device must be one that this machine has; got meta",
    "train --data text.txt --out x --backend cuda": "argument --backend: invalid choice: 'cuda'",
    "train --data text.txt --out taken --vocab-size 270": "[Errno 17] File exists: 'taken'",
    "train --data text.txt --out taken/x --vocab-size 270": "[Errno 20] Not a directory: 'taken/x'",
    "train --data text.txt --out x --column text": (
        "find_documents: column='text' is for .jsonl, .csv, .parquet, .fasta, .fa and hf://; got none"
    ),
    "train --data text.txt --out resumed-zero": (
        "train: resumed-zero holds a run; continue it with --resume or choose another --out"
    ),
    "train --out resumed-zero --resume": "resumed-zero/checkpoints/step-00000001.pt: not a readable checkpoint",
    "train --out resumed-junk --resume": "resumed-junk/checkpoints/step-00000001.pt: not a readable checkpoint",
    "train --out resumed-torn --resume": "resumed-torn/checkpoints/step-00000001.pt: not a readable checkpoint",
    "train --out resumed-list --resume": (
        "resumed-list/checkpoints/step-00000001.pt: not a checkpoint of format 2; train again with this version"
    ),
    "train --out resumed-bare --resume": (
        "resumed-bare/checkpoints/step-00000001.pt: not a checkpoint of format 2; train again with this version"
    ),
    "train --out resumed-format --resume": (
        "resumed-format/checkpoints/step-00000001.pt: not a checkpoint of format 2; train again with this version"
    ),
    "train --out resumed-lacking --resume": (
        "resumed-lacking/checkpoints/step-00000001.pt: lacks step, scaler, loss_sum, num_losses, best_loss,"
    ),
    "train --out begun-torn --resume": "begun-torn/run.json: must hold a run's options as JSON; it does not",
    "train --out begun-list --resume": "begun-list/run.json: must hold a run's options as JSON; it does not",
    "train --out begun-nested --resume": "begun-nested/run.json: must hold a run's options as JSON; it does not",
    "train --out begun-foreign --resume": "begun-foreign/run.json: must hold a run's options as JSON; it does not",
    "train --out x --resume": "train: there is no text to train on; give it with --data PATH, or try --data stdlib",
}
