"""An adapter whose initialisation changed the base, as plain LoRA over the original: (W − B₀·A₀) + s·B·A = W + Δ.

Δ = s·B·A − B₀·A₀ has twice the rank (PiSSA, Meng et al. 2024, appendix C). Over a quantized base the format's rounding
of W − B₀·A₀ stays behind: the original has none of it.
"""

from dataclasses import replace

import torch

from entrenar.core.errors import InputError
from entrenar.files.peft import AdapterTensors, PeftAdapter
from entrenar.files.peft_tensors import A_END, B_END
from entrenar.lora.spec import of_scale_one, spec_of


def as_plain(adapter: PeftAdapter) -> PeftAdapter:
    """The adapter itself if nothing was taken out of its base, else one of scale 1 and twice the rank.

    Raises:
        InputError: DoRA, whose rows' lengths do not let themselves be taken apart.
    """
    if not adapter.taken:
        return adapter
    if adapter.dora:
        raise InputError("a DoRA adapter that was started with a change of the base cannot be written as plain LoRA")
    spec = spec_of(adapter)
    scales = {name: spec.for_layer(name).scale for name in adapter.taken}
    layers = dict(adapter.tensors.layers)
    for name, taken in adapter.taken.items():
        a, b = layers[name][A_END], layers[name][B_END]
        layers[name] = {
            A_END: torch.cat([a, taken[A_END]]),
            B_END: torch.cat([b * scales[name], -taken[B_END]], dim=1),
        }
    ranks = {name: len(parts[A_END]) for name, parts in layers.items() if name in scales}
    tensors = AdapterTensors(layers, adapter.tensors.saved)
    return replace(adapter, **of_scale_one(ranks), rslora=False, init=True, taken={}, tensors=tensors)
