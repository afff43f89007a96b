"""`entrenar init`: write a commented config."""

from pathlib import Path
from typing import Annotated

import typer

from entrenar.core.atomic import refuse_existing, write_text
from entrenar.core.terminal import printable, write_line

TEMPLATE = """\
# Fine-tune with: entrenar train {name}       (look first with: entrenar check {name})
output: runs/my-run            # config, metrics, checkpoints and the adapter go here; new, or this run's, to go on

model:
  path: path/to/model          # Hugging Face directory or id, or a .gguf file
  # quantize: nf4              # nf4 | fp4 | int4 | int8 | none | keep; default: nf4, for a .gguf keep, its own blocks
  double_quant: false          # hold the block scales in 8 bits: 4.13 instead of 4.5 bits a weight
  search: false                # nf4, fp4: choose each block's scale for the least error; slower to load, no other cost
  block_size: 64               # weights that share a scale: a power of two from 16 to 4096
  dtype: auto                  # auto (bfloat16 where it is native, else float32) | float32 | bfloat16 | float16
  device: auto                 # auto: a GPU where torch sees one | cpu | cuda | cuda:1

data:
  train: path/to/train.jsonl   # JSON, CSV, Parquet or Arrow; a row has messages | prompt, completion | text | ...
  # train: [rows/*.jsonl, a/directory, org/dataset]    # patterns, directories, hub datasets; a list is read in order
  # train: [{{path: a.jsonl, weight: 3}}, {{path: b.jsonl, weight: 1}}]    # mixed by weight, or rows: 500 of an entry
  # validation: path/to/validation.jsonl
  validation_fraction: 0.05    # or a share of the training rows, chosen by a hash of each row
  max_length: 1024             # tokens
  too_long: error              # error | truncate | drop
  train_on: all                # of a conversation's answers: all | last | marked (weight: 1 or train: true)
  # columns: {{messages: chat}}          # our name of a column: the file's
  # template: {{enable_thinking: false}} # variables for the model's chat template
  # date: 2026-11-30           # what a chat template that writes the date writes; default: the run's first day
  packing: true                # lay short rows into one of up to max_length tokens: faster, the same loss

lora:
  rank: 16
  alpha: 32                    # scale = alpha / rank
  dropout: 0.0
  targets: all-linear          # or a list of names (q_proj, v_proj), or a regular expression
  # exclude: [shared_expert_gate]      # left out of the targets
  rslora: false                # scale = alpha / sqrt(rank)
  dora: false                  # train the length of each row of the adapted weights as well
  init: default                # default | gaussian | pissa | pissa_niter_4 | loftq_5
  # rank_pattern: {{down_proj: 32}}      # other ranks and alphas by name
  # modules_to_save: [embed_tokens]    # trained whole beside the adapter
  # new_tokens: ["<tool>"]             # added to the tokenizer; of embedding and head only their rows are trained

optimizer:
  lr: 2e-4
  lora_plus_ratio: 1.0         # learning rate of B as a multiple of lr (LoRA+: 16)
  # lora_plus_embedding_lr: 1e-6       # with LoRA+: the learning rate of adapted embeddings
  schedule: cosine             # cosine | linear | constant
  warmup_steps: 5
  weight_decay: 0.0
  max_grad_norm: 1.0           # 0: no clipping

training:
  epochs: 3
  # max_steps: 100             # updates in all, whatever epochs says
  batch_size: 16               # rows of the data in one update: global, never changes with memory
  micro_batch: auto            # rows of up to max_length tokens at a time: changes memory and speed, not the result
  memory: auto                 # auto: what the machine has free | min | 6GB: recompute and split only as far as needed
  seed: 0

eval:
  # every_steps: 50            # default: once an epoch
  patience: 0                  # evaluations without a better loss before stopping early; 0: never

checkpoint:
  every_steps: 50
  keep: 2

log:
  progress: true
"""


def init(path: Annotated[str, typer.Argument(metavar="PATH", help="File to write.")] = "entrenar.yaml") -> None:
    """Write a commented config to start from."""
    target = Path(path)
    refuse_existing(target)
    write_text(target, TEMPLATE.format(name=printable(path)))
    shown = printable(path)
    write_line(f"wrote {shown}: set model.path and data.train, then run `entrenar check {shown}`")
