"""entrenar: fine-tune a language model with 4-bit QLoRA, fuse it and ship it.

The public names are loaded when they are first used, so that `import entrenar` needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entrenar.core.errors import EntrenarError, InputError, StoppedError
    from entrenar.layers.quantized_linear import QuantizedLinear
    from entrenar.lora.adapter_io import load_adapter, save_adapter
    from entrenar.lora.attach import attach_lora
    from entrenar.lora.lora_layer import LoRALayer
    from entrenar.lora.low_rank import MemoryStats
    from entrenar.lora.qlora_layer import QLoRALayer
    from entrenar.lora.several import Adapters
    from entrenar.lora.token_rows import resize_vocabulary
    from entrenar.opening.load import load
    from entrenar.opening.original import original_weights
    from entrenar.quant.tensor import QuantizedTensor, dequantize_4bit, quantize, quantize_4bit
    from entrenar.recipes.check import check
    from entrenar.recipes.evaluate import evaluate
    from entrenar.recipes.export import export
    from entrenar.recipes.extract import extract_adapter
    from entrenar.recipes.inspect import inspect
    from entrenar.recipes.merge import merge
    from entrenar.recipes.train import TrainResult, train

__version__ = "0.1.0"

_HOMES = {
    "Adapters": "lora.several",
    "EntrenarError": "core.errors",
    "InputError": "core.errors",
    "StoppedError": "core.errors",
    "LoRALayer": "lora.lora_layer",
    "MemoryStats": "lora.low_rank",
    "QLoRALayer": "lora.qlora_layer",
    "QuantizedLinear": "layers.quantized_linear",
    "QuantizedTensor": "quant.tensor",
    "TrainResult": "recipes.train",
    "attach_lora": "lora.attach",
    "check": "recipes.check",
    "dequantize_4bit": "quant.tensor",
    "evaluate": "recipes.evaluate",
    "export": "recipes.export",
    "extract_adapter": "recipes.extract",
    "inspect": "recipes.inspect",
    "load": "opening.load",
    "load_adapter": "lora.adapter_io",
    "merge": "recipes.merge",
    "original_weights": "opening.original",
    "quantize": "quant.tensor",
    "quantize_4bit": "quant.tensor",
    "resize_vocabulary": "lora.token_rows",
    "save_adapter": "lora.adapter_io",
    "train": "recipes.train",
}

__all__ = [
    "Adapters",
    "EntrenarError",
    "InputError",
    "LoRALayer",
    "MemoryStats",
    "QLoRALayer",
    "QuantizedLinear",
    "QuantizedTensor",
    "StoppedError",
    "TrainResult",
    "attach_lora",
    "check",
    "dequantize_4bit",
    "evaluate",
    "export",
    "extract_adapter",
    "inspect",
    "load",
    "load_adapter",
    "merge",
    "original_weights",
    "quantize",
    "quantize_4bit",
    "resize_vocabulary",
    "save_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'entrenar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"entrenar.{_HOMES[name]}"), name)
