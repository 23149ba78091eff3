"""Weight files are data and never code."""
import os
import sys
import types

import numpy as np
import pytest
import torch

from plumbing import weightfile
from plumbing.cli import UserError


def tensors():
    return {
        "a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(3, dtype=torch.float16),
        "none": torch.empty(0, 4), "i": torch.tensor(5), "bf": torch.ones(2, dtype=torch.bfloat16)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


def test_safetensors_round_trip(tmp_path):
    weightfile.write_safetensors(tmp_path / "w", tensors())
    same(weightfile.read_file(tmp_path / "w"), tensors())


def test_torch_files_are_read_without_executing_them(tmp_path):
    parameter = {"state_dict": {**tensors(), "p": torch.nn.Parameter(torch.ones(2))}, "epoch": 3}
    torch.save(parameter, tmp_path / "w")
    found = weightfile.read_file(tmp_path / "w")
    same(found, {**tensors(), "p": torch.ones(2)})


def test_parameters_and_tensors_with_attributes_are_read_without_them(tmp_path):
    """As Megatron, DeepSpeed and torch.nn.Buffer leave them."""
    parameter, buffer = torch.nn.Parameter(torch.ones(2)), torch.nn.Buffer(torch.ones(3))
    tensor = torch.ones(4)
    parameter.partition_dim = tensor.note = 0
    torch.save({"p": parameter, "b": buffer, "t": tensor}, tmp_path / "w")
    found = weightfile.read_file(tmp_path / "w")
    same(found, {"p": torch.ones(2), "b": torch.ones(3), "t": torch.ones(4)})


@pytest.mark.parametrize("wrapped", [
    "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "base_model.model.{}",
    "_fsdp_wrapped_module.{}", "model._orig_mod.{}", "a.0._checkpoint_wrapped_module.{}"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_a_wrapper_put_into_names_is_left_out(tmp_path, wrapped, kind):
    tensors = {wrapped.format(name): torch.ones(2) for name in ("a.weight", "my_module.b", "module")}
    write = weightfile.write_safetensors if kind == "safetensors" else lambda path, t: torch.save(t, path)
    write(tmp_path / "w", tensors)
    kept = {"model._orig_mod.{}": "model.{}", "a.0._checkpoint_wrapped_module.{}": "a.0.{}"}.get(wrapped, "{}")
    assert weightfile.read_file(tmp_path / "w").keys() == {
        kept.format(name) for name in ("a.weight", "my_module.b", "module")}


@pytest.mark.parametrize("files, reason", [
    (["adapter_config.json", "adapter_model.safetensors"], "an adapter .LoRA., .* merge"),
    (["config.json", "adapter_model.bin", "non_lora_trainables.bin"], "an adapter"),
    (["vicuna-7b.Q4_K_M.gguf"], "quantised by another program: take the release in fp16"),
    (["config.json", "gptq_model-4bit-128g.safetensors"], "quantised"),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "index.json"),
    (["tf_model.h5"], "another kind"), ([], "part of a model")])
def test_a_folder_without_weights_is_judged_by_what_it_has(tmp_path, files, reason):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"no model.safetensors .*; .*{reason}"):
        weightfile.read_tensors(tmp_path)


def test_a_transposed_view_and_shared_storage_survive(tmp_path):
    t = torch.arange(12.0).view(3, 4)
    torch.save({"t": t.T, "row": t[1], "again": t}, tmp_path / "w")
    same(weightfile.read_file(tmp_path / "w"), {"t": t.T, "row": t[1], "again": t})


def test_modules_of_a_torchscript_archive_become_dotted_names(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)).half()
    torch.jit.script(module).save(str(tmp_path / "w"))
    same(weightfile.read_file(tmp_path / "w"), module.state_dict())


def test_tensors_are_views_of_the_file_and_take_no_memory_of_their_own(tmp_path):
    """Two tensors of one file lie in one map: as far apart as in the file."""
    torch.save({"a": torch.ones(300), "b": torch.zeros(300)}, tmp_path / "w")
    found = weightfile.read_file(tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    apart = content.index(bytes(1200)) - content.index(torch.ones(300).numpy().tobytes())
    assert found["b"].data_ptr() - found["a"].data_ptr() == apart


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path):
    weightfile.write_safetensors(tmp_path / "w", tensors())
    weightfile.read_file(tmp_path / "w")["a"].fill_(7)
    same(weightfile.read_file(tmp_path / "w"), tensors())


class HistoryBuffer:
    """As in an mmengine checkpoint: an object of a library that is not here, with numpy inside."""


def test_an_mmengine_checkpoint_is_read_past_its_log(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer, HistoryBuffer.__module__ = HistoryBuffer, module.__name__
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = HistoryBuffer()
    buffer.__dict__ = {"_log_history": np.arange(3.0), "last": np.float64(2.5), "call": getattr}
    checkpoint = {"meta": {"epoch": 1}, "message_hub": {"loss": buffer}, "state_dict": {"w": torch.ones(2)}}
    torch.save(checkpoint, tmp_path / "w.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    same(weightfile.read_file(tmp_path / "w.pth"), {"w": torch.ones(2)})


@pytest.mark.parametrize("cut", [30, 200, 1200, -30])
def test_a_cut_torch_file_is_one_line(tmp_path, cut):
    torch.save({"a": torch.ones(300)}, tmp_path / "w")
    (tmp_path / "bad").write_bytes((tmp_path / "w").read_bytes()[:cut])
    with pytest.raises(UserError, match="bad"):
        weightfile.read_file(tmp_path / "bad")


def test_a_load_that_does_not_fit_is_a_line_with_an_example_of_each_kind_and_the_likely_reason():
    module = torch.nn.Linear(2, 3)
    tensors = {"weight": torch.zeros(3, 5), **{f"x.lora_A.{i}": torch.zeros(1) for i in range(28)}}
    with pytest.raises(UserError) as e:
        weightfile.load_into(module, tensors, "file.bin")
    assert str(e.value) == (
        "file.bin: does not fit this model: "
        "1 missing, as bias: nothing in the file, (3,) in the model; "
        "28 unexpected, as x.lora_A.0: (1,) float32 in the file, nothing in the model; "
        "1 of another size or dtype, as weight: (3, 5) float32 in the file, (3, 2) in the model; "
        "it looks like an adapter (LoRA), not a model: merge it into the one it was trained on")


def test_whole_numbers_are_no_weights():
    weights = {"weight": torch.zeros(3, 2, dtype=torch.int8), "bias": torch.zeros(3)}
    with pytest.raises(UserError, match=r"1 of another size or dtype.* \(3, 2\) int8 in the file"):
        weightfile.load_into(torch.nn.Linear(2, 3), weights, "file.bin")


@pytest.mark.parametrize("name, reason", [
    ("model.layers.0.self_attn.q_proj.bias", "Qwen"), ("model.layers.0.self_attn.q_norm.weight", "Qwen"),
    ("model.layers.0.mlp.experts.0.w1.weight", "Qwen"),
    ("language_model.model.norm.weight", "original release"),
    ("vision_model.post_layernorm.bias", "a CLIP"),
    ("down_blocks.0.conv1.weight", "another kind")])
def test_the_likely_reason_is_told_from_the_names_that_are_left_over(name, reason):
    with pytest.raises(UserError, match=reason):
        weightfile.load_into(torch.nn.Identity(), {name: torch.zeros(1)}, "file.bin")


def test_a_name_from_a_file_cannot_speak_to_the_terminal():
    with pytest.raises(UserError) as e:
        weightfile.load_into(torch.nn.Identity(), {"a\x1b[2J\nb" + "c" * 500: torch.zeros(1)}, "file.bin")
    assert str(e.value).isprintable() and len(str(e.value)) < 300


def test_a_cut_safetensors_file_says_so(tmp_path):
    weightfile.write_safetensors(tmp_path / "w", tensors())
    whole = os.path.getsize(tmp_path / "w")
    os.truncate(tmp_path / "w", whole - 20)
    with pytest.raises(UserError, match=f"cut, .*: {whole - 20} bytes, but .* ends at"):
        weightfile.read_file(tmp_path / "w")
