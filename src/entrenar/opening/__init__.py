"""Opening a model: from a path to a model in memory, with or without an adapter.

`source`: what lies at a path, a directory, a hub id (`hub`) or a GGUF, as a ModelSource: config, tokenizer and where
its tensors lie; no weight is read. `directory`, `plausible` and `reading` see that broken files end in a sentence.
`load`: the model of a source, weights and all. Its steps: `build` (the model on `meta`), `match` (which tensor is which
parameter), `as_stored` (what is not converted), `place` (tensors into their modules), `complete` (ties, buffers).
`adapted`: a model with an adapter over it, the way the adapter was trained. `original`: single weights as files have
them. `compute`: device and dtype.
"""
