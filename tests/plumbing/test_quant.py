"""quant.py: how far rounding may be off, whole numbers exact, files written once. CPU, offline."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from clip import load_clip
from llm import KVCache, LLaMA, LLaMAConfig, generate, load_llama
from model import open_chat
from plumbing import quant
from plumbing.cli import UserError
from plumbing.quant import GROUP, SCHEMES, Int4Linear, Int8Linear, quantize
from plumbing.store import state_of

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LLAVA = os.path.join(ROOT, "weights", "tiny", "llava")


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def linear(K, N, dtype=torch.float32, bias=False):
    return nn.Linear(K, N, bias=bias).to(dtype)


def error(y, reference):
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


def layer(scheme, m):
    return SCHEMES[scheme](SCHEMES[scheme].convert(m.weight), m.bias)


def small(layers=2, **sizes):
    """A LLaMA whose layers all fit int4."""
    sizes = {"vocab_size": 100, "width": 128, "heads": 4, "mlp": 192, "context_length": 64, **sizes}
    return LLaMA(LLaMAConfig(layers=layers, **sizes)).eval()


# ---------------------------------------------------------------------------------------- rounding
@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_no_number_of_a_row_is_off_by_more_than_half_a_step(size, levels):
    x = torch.randn(50, 333) * torch.logspace(-3, 3, 50)[:, None] * size
    q, scale = quant.round_rows(x, levels)
    assert ((x.double() - q.double() * scale.double()).abs() <= scale.double() * (0.5 + 1e-5)).all()
    assert (q.abs().amax(1) == levels).all()   # the whole range is used


def test_a_row_of_zeros_stays_zeros():
    q, scale = quant.round_rows(torch.zeros(2, 64))
    assert (q == 0).all() and (scale > 0).all()
    assert (layer("int8", linear(64, 64))(torch.zeros(1, 64)) == 0).all()
    q, scale, middle = quant.round_groups(torch.zeros(2, GROUP))
    assert ((q.float() - 8) * scale.float() + middle.float()).abs().max() < 1e-28


@pytest.mark.parametrize("kind", ["normal", "all positive", "far from zero", "one outlier"])
def test_no_number_of_a_group_is_off_by_more_than_half_a_step(kind):
    w = torch.randn(64, 4 * GROUP) * 0.02
    w = {"normal": w, "all positive": w.abs(), "far from zero": w + 3,
         "one outlier": w.index_fill(1, torch.tensor(70), 5)}[kind]
    q, scale, middle = (t.double() for t in quant.round_groups(w))
    back = ((q.view(64, -1, GROUP) - 8) * scale[..., None] + middle[..., None]).flatten(1)
    steps = (w.double() - back).abs().view(64, -1, GROUP) / scale[..., None]
    assert steps.max() <= 0.5
    assert len(q.unique()) == (1 if kind == "far from zero" else 16)   # its step is the distance


def test_an_outlier_in_a_group_leaves_the_other_groups_alone():
    w = torch.randn(64, 4 * GROUP)
    wild = w.clone()
    wild[:, 70] = 1000   # in group 1
    q, _, _ = quant.round_groups(w)
    other, _, _ = quant.round_groups(wild)
    same = (q == other).view(64, 4, GROUP).flatten(2).all(2).all(0)
    assert same.tolist() == [True, False, True, True]


# ---------------------------------------------------------------------------------------- bf16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_same_with_and_without_arithmetic_for_them(dtype, monkeypatch):
    m, x = linear(96, 2000, dtype), torch.randn(5, 96)
    for fast in (True, False):
        monkeypatch.setattr(quant, "fast_bf16", lambda: fast)
        assert error(layer("bf16", m)(x), x @ m.weight.float().T) < (0.005 if fast else 1e-6)
    assert layer("bf16", m).weight.data_ptr() == m.weight.data_ptr()   # no copy


# ---------------------------------------------------------------------------------------- int8
def test_int8_is_exact_in_whole_numbers():
    """The layer computes the product of what it rounded, as exactly as fp32, for one row as for many."""
    m = linear(256, 96)
    x = torch.randn(40, 256)
    q8 = layer("int8", m)
    xq, x_scale = quant.round_rows(x)
    exact = (xq.double() * x_scale.double()) @ (q8.weight[:, :256].double() * q8.scale[:, None].double()).T
    assert error(q8(x), exact) < 1e-6
    assert error(torch.cat([q8(row[None]) for row in x]), exact) < 1e-6


def test_an_outlier_row_does_not_hurt_its_neighbours():
    q8, x = layer("int8", linear(256, 96)), torch.randn(8, 256)
    before = q8(x)
    x[3] *= 1e6
    assert torch.equal(q8(x)[[0, 1, 2, 4, 5, 6, 7]], before[[0, 1, 2, 4, 5, 6, 7]])


def test_a_row_with_extreme_channels_is_as_exact_as_the_weights_are(monkeypatch):
    m, x = linear(4096, 64), torch.randn(4, 4096)
    m.weight[:, 7] = 0   # what the large channel is multiplied by, so that only the others count
    x[2, 7] = 1000
    q8, true = layer("int8", m), x @ m.weight.T
    assert error(q8(x)[2], true[2]) < 0.015
    monkeypatch.setattr(quant, "EXTREME", float("inf"))
    assert error(q8(x)[2], true[2]) > 0.5   # with steps of 1000 / 127, the others are all zero


@pytest.mark.parametrize("onednn, aten, packing", [
    ("AVX2", "avx2", "(32, False)"), ("SSE41", "default", "(32, True)")])
def test_a_cpu_without_vnni_gets_weights_of_seven_bits_and_exact_sums(onednn, aten, packing):
    """This machine as oneDNN and torch see it without VNNI and AVX512, and without AVX, in a new process."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        pytest.skip("not an x86 CPU with AVX2")
    program = """if True:
        import torch
        from plumbing import quant
        torch.manual_seed(0)
        m, x = torch.nn.Linear(256, 64, bias=False), torch.randn(20, 256)
        with torch.no_grad():
            for name, kind in (("int8", quant.Int8Linear), ("int4", quant.Int4Linear)):
                y, true = kind(kind.convert(m.weight)), x @ m.weight.T
                for rows in (y(x), torch.cat([y(row[None]) for row in x])):
                    error = (rows - true).norm() / true.norm()
                    print(name, quant.weight_levels(), quant.packing(), error.item())"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten})
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    rows = [[name, levels, *rest.rsplit(maxsplit=1)] for name, levels, rest in rows]
    assert [row[:3] for row in rows] == 2 * [["int8", "63", packing]] + 2 * [["int4", "63", packing]]
    assert all(float(row[3]) < (0.03 if row[0] == "int8" else 0.12) for row in rows)


def test_a_machine_without_exact_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: torch.zeros(len(x), w.shape[1], dtype=torch.int32))
    quant.weight_levels.cache_clear()
    with pytest.raises(UserError, match="not exact; choose --quantize none"):
        quant.weight_levels()
    quant.weight_levels.cache_clear()


# ---------------------------------------------------------------------------------------- int4
def test_unpacking_gives_back_what_torch_packed():
    q = torch.randint(0, 16, (192, 128), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2)
    assert torch.equal(quant.unpack(packed, *quant.packing()).T.int(), q)


def floats(q4):
    """The weight (N, K) that an Int4Linear stands for."""
    scale, middle = q4.groups.float().unbind(-1)
    return torch.cat([(q4.numbers(g) - 8) * scale[g] + middle[g] for g in range(len(scale))]).T


def test_the_packed_kernel_computes_what_the_unpacked_numbers_say():
    m = linear(256, 128)
    q4, x = layer("int4", m), torch.randn(1, 256).bfloat16()
    w = floats(q4)
    q, scale, middle = (t.float() for t in quant.round_groups(m.weight))
    scale, middle = (t.repeat_interleave(GROUP, 1) for t in (scale, middle))
    assert torch.allclose(w, (q - 8) * scale + middle, atol=1e-7)
    assert error(q4(x), x.float() @ w.T) < 0.005   # the result is bf16


def test_many_rows_in_int4_are_hardly_worse_than_its_weights():
    m, x = linear(512, 256), torch.randn(300, 512)
    q4, true = layer("int4", m), x @ m.weight.T
    weights_only = error(x @ floats(q4).T, true)
    assert 0.05 < weights_only < error(q4(x), true) < 1.05 * weights_only


# ---------------------------------------------------------------------------------------- every scheme
BOUND = {"bf16": 0.006, "int8": 0.015, "int4": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_is_near_the_original_for_one_row_and_for_300(scheme, dtype):
    m = linear(256, 128, torch.bfloat16, bias=True)
    m.bias += 1
    x = torch.randn(3, 100, 256)
    y, true = layer(scheme, m)(x.to(dtype)), nn.functional.linear(x, m.weight.float(), m.bias.float())
    assert y.dtype == dtype and y.shape == (3, 100, 128)
    one = layer(scheme, m)(x[1:2, 5:6].to(dtype))
    assert error(y - 1, true - 1) < BOUND[scheme] + (dtype == torch.bfloat16) * 0.01
    assert error(one, y[1, 5]) < 0.02


@pytest.mark.parametrize("scheme", SCHEMES)
def test_there_is_no_gradient_and_it_is_said(scheme):
    q = layer(scheme, linear(128, 64))
    assert not list(q.parameters())
    with torch.enable_grad(), pytest.raises(RuntimeError, match="for inference"):
        q(torch.randn(2, 128, requires_grad=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_change_of_dtype_leaves_scales_and_weights_as_they_are(scheme):
    q = layer(scheme, linear(128, 64, torch.bfloat16))
    before = {name: t.clone() for name, t in q.state_dict().items()}
    q.to(torch.float16)
    after = q.state_dict()
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in after.items())
    assert all(t.is_meta for t in q.to("meta").state_dict().values())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_empty_says_what_convert_makes(scheme):
    made = SCHEMES[scheme].convert(linear(128, 192, torch.bfloat16).weight)
    empty = SCHEMES[scheme].empty(192, 128)
    assert all(t.is_meta for t in empty.values())
    made, empty = ([(name, t.shape, t.dtype) for name, t in tensors.items()] for tensors in (made, empty))
    assert made == empty


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cached_decoding_equals_full_forward(scheme):
    model = quantize(small(), scheme)
    ids = torch.randint(0, 100, (1, 20))
    cache = KVCache(model.config, 1, 64, "cpu", torch.float32)
    rows = [model(part, kv_cache=cache) for part in ids.split([12] + [1] * 8, dim=1)]
    # a row of int8 is itself, whoever is beside it; in bf16 and int4 few rows take another way than many
    assert error(torch.cat(rows, 1), model(ids)) < {"bf16": 0.02, "int8": 1e-2, "int4": 0.05}[scheme]


def test_every_linear_is_replaced_and_nothing_else_is():
    model = small()
    embed = model.model.embed_tokens
    quantize(model, "int4")
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)] and model.model.embed_tokens is embed
    assert isinstance(model.lm_head, Int8Linear)   # its rows are the words
    assert isinstance(model.model.layers[0].self_attn.q_proj, Int4Linear)


def test_a_tied_lm_head_is_quantised_and_the_embeddings_stay():
    model = small(tied=True)
    words = model.model.embed_tokens.weight.clone()
    quantize(model, "int8")
    assert isinstance(model.lm_head, Int8Linear) and torch.equal(model.model.embed_tokens.weight, words)


def test_int8_takes_any_size_and_int4_leaves_odd_sizes_to_int8():
    assert error(layer("int8", m := linear(33, 7))(x := torch.randn(5, 33)), m(x)) < 0.03
    model = small(layers=1, mlp=352)
    quantize(model, "int4")
    layer_0 = model.model.layers[0]
    assert isinstance(layer_0.mlp.down_proj, Int8Linear) and isinstance(layer_0.self_attn.o_proj, Int4Linear)


@pytest.mark.parametrize("scheme, bound", [("int8", 0.02), ("int4", 0.15)])
def test_the_tiny_llava_says_nearly_the_same(scheme, bound, recwarn):
    """Logits of a trained model on ids of its own, and the answer it gives."""
    true, tokenizer, _ = load_llama(LLAVA)
    text = "USER: A red circle moves left. What does the shape do? ASSISTANT:"
    true, ids = true.float().eval(), torch.tensor([[1] + tokenizer.encode(text)])
    reference, answer = true(ids), list(generate(true, ids, max_new_tokens=8, stop_ids=tokenizer.stop_ids))
    model = quantize(true, scheme)
    logits = model(ids)
    assert error(logits - logits.mean(-1, keepdim=True), reference - reference.mean(-1, keepdim=True)) < bound
    assert list(generate(model, ids, max_new_tokens=8, stop_ids=tokenizer.stop_ids)) == answer


def test_the_clip_trunk_may_be_int8():
    clip, _ = load_clip(os.path.join(ROOT, "weights", "tiny", "clip"))
    clip, size = clip.float().eval(), clip.config.image_size
    pixels = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    reference = clip.encode_image(pixels)
    quantize(clip.vision_model, "int8")
    assert not [m for m in clip.vision_model.modules() if isinstance(m, nn.Linear)]
    assert error(clip.encode_image(pixels), reference) < 0.05


# ---------------------------------------------------------------------------------------- files
@pytest.fixture
def folder(tmp_path):
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    return tmp_path


def load(folder, scheme="int8"):
    torch.manual_seed(1)
    return quant.quantized(small(), scheme, str(folder), state_of(folder))


def kept(folder):
    """The one file of quantised weights in a folder."""
    file, = folder.glob("quantised_int*")
    return file


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_second_load_maps_the_file_and_rounds_nothing(folder, scheme, monkeypatch):
    ids = torch.arange(10)[None]
    first = load(folder, scheme)(ids)
    monkeypatch.setattr(Int8Linear, "convert", None)
    monkeypatch.setattr(Int4Linear, "convert", None)
    assert torch.equal(load(folder, scheme)(ids), first)
    assert re.fullmatch(rf"quantised_{scheme}_[0-9a-f]{{32}}\.safetensors", kept(folder).name)


def test_what_is_read_is_what_would_be_quantised_in_memory(folder):
    from_file = load(folder)(torch.arange(10)[None])
    torch.manual_seed(1)
    assert torch.equal(from_file, quantize(small(), "int8")(torch.arange(10)[None]))


def change_size(source):
    status = os.stat(source)
    source.write_bytes(b"longer than before" * 100)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [
    lambda source, _: os.utime(source, ns=(1, 1)), lambda source, _: change_size(source),
    lambda source, _: source.rename(source.parent / "model.bin"),
    lambda _, patch: patch.setattr(quant, "weight_levels", lambda: 63),
    lambda _, patch: patch.setattr(quant, "packing", lambda: (128, False)),
    lambda _, patch: patch.setattr(quant, "VERSION", quant.VERSION + 1)],
    ids=["time", "size", "name", "levels", "packing", "version"])
def test_other_weights_settings_or_machines_get_another_file_and_the_old_one_goes(
        folder, change, monkeypatch):
    load(folder, "int4")
    before = kept(folder).name
    (folder / "quantised_int8_of_another_scheme").touch()
    change(folder / "pytorch_model.bin", monkeypatch)
    load(folder, "int4")
    after = {file.name for file in folder.glob("quantised_*")} - {"quantised_int8_of_another_scheme"}
    assert len(after) == 1 and before not in after and len(os.listdir(folder)) == 3


def test_what_a_killed_process_left_half_written_goes(folder):
    (folder / f"quantised_int8_{0:032x}.safetensors.99999999.tmp").touch()
    load(folder)
    assert kept(folder).suffix == ".safetensors"


def test_where_nothing_can_be_written_the_model_is_quantised_in_memory_with_a_warning(folder, monkeypatch):
    expected = load(folder)(torch.arange(10)[None])
    os.remove(kept(folder))

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="cannot write: No space left .*; quantising in memory") as said:
        assert torch.equal(load(folder)(torch.arange(10)[None]), expected)
    assert len(said) == 1 and os.listdir(folder) == ["pytorch_model.bin"]


def test_a_chat_keeps_its_quantised_llama_beside_the_originals(weights, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "w")
    open_chat(folder).load(scheme="int8")
    assert kept(folder / "llava").name.startswith("quantised_int8_")


def test_clip_is_rounded_once_too(weights, tmp_path, monkeypatch):
    folder = shutil.copytree(weights, tmp_path / "w")
    first = open_chat(folder).load(scheme="int8").clip.vision_model.state_dict()
    monkeypatch.setattr(Int8Linear, "convert", None)
    second = open_chat(folder).load(scheme="int8").clip.vision_model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_are_replaced_while_they_are_open_are_not_filed_under_the_new_ones(weights, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "w")
    opened = open_chat(folder)
    os.utime(folder / "llava" / "model.safetensors", ns=(1, 1))   # another file has taken its place
    opened.load(scheme="int8")
    old = kept(folder / "llava")
    open_chat(folder).load(scheme="int8")
    assert kept(folder / "llava").name != old.name


# ---------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("tied", [False, True])
def test_nbytes_is_what_the_model_has(scheme, tied):
    llama = small(tied=tied).bfloat16()
    with torch.device("meta"):
        described = LLaMA(llama.config)
    if scheme:
        quantize(llama, scheme)
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in llama.state_dict().values()}
    assert quant.nbytes(described, scheme, torch.bfloat16) == sum(storages.values())


def test_a_7b_takes_what_it_is_said_to_take():
    with torch.device("meta"):
        llama = LLaMA(LLaMAConfig())
    need = {scheme: quant.nbytes(llama, scheme, torch.bfloat16) / 1e9 for scheme in (None, "int8", "int4")}
    assert 13.4 < need[None] < 13.6 and 6.5 < need["int8"] < 7.5 and 3.5 < need["int4"] < 4.2
