"""What makes models fast: faster forwards that are tried on the model at hand, not looked up by its name.

docs/acceleration.md tells how; here is where. From what is called first to what everything rests on:

    confirmed           make_fast: swap forwards, compare the whole model's logits, or take all of them out again
    verdicts            that comparison's outcome, remembered by content
    in_float32          a model that computes in float32 for a while, for the comparison
    fast_forwards       goes through a model's modules and swaps what agrees
    fast_attention      ... attention modules
    fast_layers         ... whole decoder layers
    module_forwards     the faster forwards of norms, gated MLPs and heads
    layer_forward       the faster forward of a decoder layer
    activations         what decoder layers save for their backward, seen in a trial pass and chosen
    recognised          which norm, gated MLP or activation a module is
    attention_structure how attention puts its parts together
    layer_structure     how a decoder layer does
    rotation            which function rotates, and whether as ours does
    watched             what a forward asks its module for
    planted             tensors that stand for what parts compute
    proxy               modules some of whose parts are replaced
    other_globals       a forward's code with other global functions
    agreement           comparisons, and what modules are called with in a trial run
    attention           our kernel in transformers' attention interface
    swapped             which modules have a faster forward, and how to take it out
"""
