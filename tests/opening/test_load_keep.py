"""A GGUF as the base in its own blocks: the numbers, the memory, what is shared, what it refuses."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from entrenar.core.errors import InputError
from entrenar.core.memory import anonymous_bytes
from entrenar.gguf.reader import GGUFFile
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.models.forward import target_loss
from entrenar.opening.adapted import open_model
from entrenar.opening.load import load

MakeGGUF = Callable[..., Path]
IDS = torch.tensor([[1, 40, 80, 120, 7, 9, 200, 3]])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
def test_logits_are_those_of_the_dequantized_model(make_gguf: MakeGGUF, kind: str) -> None:
    path = make_gguf(kind)
    kept, _ = load(str(path), dtype="float32")
    plain, _ = load(str(path), "none", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(kept(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    layers = [module for module in kept.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == (0 if kind == "F32" else 15)  # seven in each of two layers, and the head
    assert {layer.quantized_weight.format for layer in layers} <= {kind.lower()}


def test_what_is_held_is_the_file_to_the_byte_and_the_tied_head_shares_it(make_gguf: MakeGGUF) -> None:
    path = make_gguf("Q5_0")
    model, _ = load(str(path), dtype="float32")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert head.weight_codes is embedding.weight_codes
    file = GGUFFile(path)
    assert torch.equal(embedding.weight_codes, file.blocks("token_embd.weight").read())
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    assert torch.equal(down.get_parameter("weight_codes"), file.blocks("blk.1.ffn_down.weight").read())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held == sum(info.size for info in file.tensors.values())


def test_types_are_mixed_within_a_file(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    """As a real mixture is: one tensor in another type."""
    path = _retyped(
        make_gguf("Q4_0"), tmp_path / "mixed.gguf", {"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_up.weight": "F16"}
    )
    kept, _ = load(str(path), dtype="float32")
    plain, _ = load(str(path), "none", dtype="float32")
    formats = {layer.quantized_weight.format for layer in kept.modules() if isinstance(layer, QuantizedLinear)}
    assert formats == {"q4_0", "q8_0", "f16"}
    with torch.no_grad():
        torch.testing.assert_close(kept(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def _retyped(source: Path, target: Path, types: dict[str, str]) -> Path:
    """The same file with some tensors in other types, through the gguf package."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType[types.get(tensor.name, tensor.tensor_type.name)]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    _finish(writer)
    return target


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split(source: Path, count: int) -> list[Path]:
    """The same model in parts, as llama.cpp's gguf-split writes them."""
    reader, parts = gguf.GGUFReader(source), []
    for number in range(count):
        path = source.with_name(f"part-{number + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            _copy_metadata(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        _finish(writer)
        parts.append(path)
    return parts


def test_a_split_file_loads_as_the_whole_by_any_of_its_parts(make_gguf: MakeGGUF) -> None:
    path = make_gguf("Q8_0")
    whole, _ = load(str(path), dtype="float32")
    parts = _split(path, 3)
    for part in (parts[0], parts[2]):
        model, _ = load(str(part), dtype="float32")
        for (name, one), (_, other) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(one, other), name


def test_a_split_file_that_is_not_complete_is_an_input_error(make_gguf: MakeGGUF) -> None:
    parts = _split(make_gguf("Q8_0"), 3)
    parts[1].rename(parts[1].with_name("elsewhere.gguf"))
    with pytest.raises(InputError, match="missing: part-00002-of-00003"):
        load(str(parts[0]))
    parts[2].replace(parts[1])
    parts[0].with_name("elsewhere.gguf").replace(parts[2])
    with pytest.raises(InputError, match="is not part 2 of 3"):
        load(str(parts[0]))


def test_training_reaches_the_adapter_and_costs_the_blocks_and_little_more(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    model, _ = load(str(make_gguf("Q4_0")), dtype="float32")
    attach_lora(model, rank=4)
    targets = torch.ones_like(IDS, dtype=torch.bool)
    targets[:, 0] = False
    target_loss(model, IDS, torch.arange(8)[None], targets).backward()
    layers = dict(adapted_layers(model))
    assert len(layers) == 14
    assert all(layer.lora_b.grad is not None and layer.lora_b.grad.abs().sum() > 0 for layer in layers.values())
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        live = model(input_ids=IDS).logits
        again, _ = open_model(str(tmp_path / "model.gguf"), str(tmp_path / "adapter"), dtype="float32")
        torch.testing.assert_close(again(input_ids=IDS).logits, live)
    kinds = [type(module).__name__ for _, module in adapted_layers(again)]
    assert set(kinds) == {"QLoRALayer"}


def test_an_adapter_trained_on_a_gguf_asks_for_one(make_gguf: MakeGGUF, tiny_model_dir: Path, tmp_path: Path) -> None:
    model, _ = load(str(make_gguf("Q4_0")), dtype="float32")
    attach_lora(model, rank=4)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is not a \.gguf file: choose nf4"):
        open_model(str(tiny_model_dir), str(tmp_path / "adapter"))
    plain, _ = open_model(str(tiny_model_dir), quantize="none")
    load_adapter(plain, tmp_path / "adapter")


def test_loading_costs_the_file_and_little_more(smollm2: Path) -> None:
    load(str(smollm2), dtype="float32")  # libraries and their caches
    before = anonymous_bytes()
    model, _ = load(str(smollm2), dtype="float32")
    tensors = sum(info.size for info in GGUFFile(smollm2).tensors.values())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held == tensors
    assert anonymous_bytes() - before < tensors + 60_000_000


def test_a_model_cut_at_any_of_200_places_is_an_input_error(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    content = make_gguf("Q8_0").read_bytes()
    places = np.random.default_rng(0).integers(0, len(content) - 32, 200)  # the last bytes may be padding
    cut = tmp_path / "cut.gguf"
    for place in places:
        cut.write_bytes(content[:place])
        with pytest.raises(InputError, match=r"cut\.gguf"):
            load(str(cut))


def test_a_type_that_is_not_read_is_refused_before_anything_is_loaded(make_gguf: MakeGGUF) -> None:
    path = make_gguf("F32")
    content = path.read_bytes()
    name = b"blk.0.attn_v.weight"
    at = content.index(name) + len(name) + 4 + 16  # its type, behind two dimensions
    path.write_bytes(content[:at] + (26).to_bytes(4, "little") + content[at + 4 :])  # I32, as large as F32
    with pytest.raises(InputError, match=r"v_proj\.weight is i32, which is not read"):
        load(str(path))


def test_a_type_that_is_decoded_but_not_kept_is_refused_with_the_way_out(make_gguf: MakeGGUF) -> None:
    path = make_gguf("MXFP4")
    with pytest.raises(InputError, match=r"is mxfp4, which is not kept as it is .*: set quantize to none, nf4"):
        load(str(path))
    model, _ = load(str(path), "none", dtype="float32")
    assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()
