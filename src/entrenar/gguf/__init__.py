"""What is GGUF's, both ways. Nothing here knows of adapters, nor of a model in memory.

Files: `reader` (one file), `split` (one model in several), `values` (keys that can be computed with), `writer`, `types`
(which type each tensor gets).
Models: `families` (one row each: names, order of rows, norms), `keys` (a family's keys beside those that all have),
`config` (hyper-parameters), `rope` (scaled frequencies), `weights` (tensors as transformers has them).
Vocabularies: `special_tokens`, `pre_tokenizers`, `tokenizer` (from a file), `vocabulary` (into a file),
`vocabulary_probe` (whether llama.cpp will make the same tokens).

A new family is one row of `families`, with two functions in `keys` where its keys differ.
"""
