"""CLIP: its towers against transformers, its tokenizer against open_clip, and the files that it reads and
refuses."""
import dataclasses
import gzip
import json
import os
import shutil
import sys

import pytest
import torch
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import clip as clip_module
from clip import CLIP, CLIPConfig, Tokenizer, load_clip, save_clip
from plumbing import weightfile
from plumbing.cli import UserError

FIXTURES = os.path.join(ROOT, "tests", "fixtures")
TINY = os.path.join(FIXTURES, "clip_tiny")
OPENAI_SIZES = CLIPConfig(image_size=16, patch_size=8, vision_width=192, vision_layers=2, vision_heads=3,
                          vision_mlp=96, text_width=128, text_layers=1, text_heads=2, text_mlp=40,
                          context_length=12, projection_dim=24)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny():
    return load_clip(TINY)


@pytest.fixture(scope="module")
def expected():
    return weightfile.read_tensors(os.path.join(FIXTURES, "clip_tiny_expected.safetensors"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(clip_module.VOCABULARY)


@pytest.fixture(scope="module")
def recorded():
    with open(os.path.join(FIXTURES, "clip_bpe.json"), encoding="utf-8") as f:
        return json.load(f)


def assert_close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() < 1e-5


def encode_floats(clip, pixels):
    """encode_image for pixels that were recorded as normalised floats."""
    *_, x = clip.vision_model.states(pixels)
    return clip.project_image(x[:, 0])


def noise(*shape):
    """uint8 pixels."""
    return torch.randint(256, shape, dtype=torch.uint8)


def small_merges(tokenizer, count):
    return [(tokenizer.symbols[a], tokenizer.symbols[b]) for a, b in list(tokenizer.merges)[:count]]


# ---------------------------------------------------------------------------------------------------- towers
def test_every_image_state_equals_transformers(tiny, expected):
    states = list(tiny[0].vision_model.states(expected["pixels"]))
    assert len(states) == 4
    for i, x in enumerate(states):
        assert_close(x, expected[f"image_states.{i}"])


def test_every_text_state_equals_transformers(tiny, expected):
    states = list(tiny[0].text_model.states(expected["ids"]))
    assert len(states) == 5
    for i, x in enumerate(states):
        assert_close(x, expected[f"text_states.{i}"])
    assert_close(tiny[0].text_model.final_layer_norm(x), expected["text_last"])


def test_features_equal_transformers(tiny, expected):
    assert_close(encode_floats(tiny[0], expected["pixels"]), expected["image_features"])
    assert_close(tiny[0].encode_text(expected["ids"]), expected["text_features"])


def test_every_projected_image_token_equals_transformers(tiny, expected):
    assert_close(tiny[0].project_image(expected["image_states.3"]), expected["image_tokens"])


def test_scaled_cosines_equal_transformers(tiny, expected):
    images = nn.functional.normalize(encode_floats(tiny[0], expected["pixels"]), dim=-1)
    texts = nn.functional.normalize(tiny[0].encode_text(expected["ids"]), dim=-1)
    assert_close(tiny[0].logit_scale.exp() * images @ texts.T, expected["logits_per_image"])


def test_the_walk_over_layers_computes_only_what_is_taken(tiny, expected):
    ran = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i))
             for i, layer in enumerate(tiny[0].vision_model.encoder.layers)]
    walk = tiny[0].vision_model.states(expected["pixels"])
    next(walk), next(walk)
    for hook in hooks:
        hook.remove()
    assert ran == [0]


def test_clip_normalises_pixels_with_its_own_statistics(tiny):
    x = clip_module.normalise(torch.tensor([0, 255]).byte().view(2, 1, 1, 1).expand(2, 3, 1, 1))
    # -mean / std
    assert x.flatten(1)[0].tolist() == pytest.approx([-1.7922626, -1.7520971, -1.4802198], abs=1e-5)
    # (1 - mean) / std
    assert x.flatten(1)[1].tolist() == pytest.approx([1.9303361, 2.0748837, 2.1458969], abs=1e-5)
    pixels = noise(2, 3, 28, 28)
    assert torch.equal(tiny[0].encode_image(pixels), encode_floats(tiny[0], clip_module.normalise(pixels)))


def test_text_is_causal(tiny, expected):
    ids = expected["ids"].clone()
    end = ids.argmax(-1)
    before = tiny[0].encode_text(ids)
    ids[0, end[0] + 1:] = 7
    assert torch.equal(tiny[0].encode_text(ids), before)
    ids[0, end[0] - 1] = 7
    assert not torch.allclose(tiny[0].encode_text(ids)[0], before[0], atol=1e-3)


def test_padding_does_not_change_a_text(tiny, expected):
    ids = expected["ids"]
    assert_close(tiny[0].encode_text(ids[:2, :8]), tiny[0].encode_text(ids[:2]))


def test_pixels_that_are_normalised_already_are_refused(tiny):
    with pytest.raises(AssertionError, match="torch.float32 pixels"):
        tiny[0].encode_image(torch.zeros(1, 3, 28, 28))


def test_defaults_are_vit_l_14():
    with torch.device("meta"):
        model = CLIP(CLIPConfig())
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 427_616_513
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (257, 1024)
    assert shapes["vision_model.encoder.layers.23.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["visual_projection.weight"] == (768, 1024)
    assert shapes["text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert shapes["text_model.encoder.layers.11.self_attn.q_proj.bias"] == (768,)
    assert shapes["text_projection.weight"] == (768, 768)
    assert shapes["logit_scale"] == ()
    assert len(shapes) == 4 + 24 * 16 + 4 + 2 + 12 * 16 + 2 + 2


def test_a_fresh_model_has_no_number_left_unset(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    assert all(t.isfinite().all() for t in CLIP(OPENAI_SIZES).state_dict().values())


def test_a_fresh_model_learns_to_match_its_batch():
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(OPENAI_SIZES, vocab_size=20))
    pixels, ids = noise(6, 3, 16, 16), torch.cat((torch.randint(0, 19, (6, 5)), torch.full((6, 1), 19)), 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        images, texts = (nn.functional.normalize(x, dim=-1)
                         for x in (model.encode_image(pixels), model.encode_text(ids)))
        loss = nn.functional.cross_entropy(model.logit_scale.exp() * images @ texts.T, torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < 0.1


# ------------------------------------------------------------------------------------------------- tokenizer
def test_ids_equal_those_of_open_clip(tokenizer, recorded):
    assert len(recorded) >= 300
    assert [text for text, ids in recorded if tokenizer.encode(text) != ids] == []


def test_vocabulary_ends_with_start_and_end_token(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (49408, 49406, 49407)


def test_rows_are_start_text_end_zeros(tokenizer):
    rows = tokenizer(["a cat", ""], context_length=6)
    assert rows.tolist() == [[49406, 320, 2368, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0]]
    assert rows.dtype == torch.int64
    assert tokenizer("a cat").shape == (1, 77)


def test_too_long_captions_keep_their_end_token_and_stay_distinct(tiny):
    model, tokenizer = tiny
    rows = tokenizer(["red " * 50, "blue " * 50], context_length=16)
    assert rows[:, -1].tolist() == [tokenizer.eot] * 2
    assert (rows[:, :-1] != tokenizer.eot).all()
    features = model.encode_text(rows)
    assert (features[0] - features[1]).abs().max() > 0.1


def test_a_caption_of_exactly_the_context_is_not_cut(tokenizer):
    sot, *letters, eot = tokenizer("a b c d", context_length=6)[0].tolist()
    assert letters == tokenizer.encode("a b c d") and (sot, eot) == (tokenizer.sot, tokenizer.eot)
    assert tokenizer("a b c d", context_length=5)[0].tolist() == [sot, *letters[:3], eot]


def test_text_cannot_forge_start_and_end_tokens(tokenizer):
    ids = tokenizer.encode("<|startoftext|> a <|endoftext|> b")
    assert tokenizer.sot not in ids and tokenizer.eot not in ids


def test_half_a_surrogate_pair_is_text(tokenizer):
    assert tokenizer.encode("\ud83d") == tokenizer.encode("?")


def test_merges_txt_gives_the_same_vocabulary_as_the_archive(tokenizer, tmp_path):
    with gzip.open(clip_module.VOCABULARY, "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")
    merges = "\n".join(["#version: 0.2", *lines[1:48895]]) + "\n"
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    other = Tokenizer.from_file(tmp_path / "merges.txt")
    assert other.symbols == tokenizer.symbols and other.merges == tokenizer.merges


def test_fewer_merges_give_a_smaller_vocabulary_with_the_same_first_ids(tokenizer):
    small = Tokenizer(small_merges(tokenizer, 100))
    assert (small.vocab_size, small.sot, small.eot) == (614, 612, 613)
    assert small.symbols[:612] == tokenizer.symbols[:612]
    assert "".join(small.symbols[i] for i in small.encode("a photograph")) == "a</w>photograph</w>"


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"#version: 0.2\na b c\n", "too many"),
    (b"#version: 0.2\nab c\n", "KeyError: 'ab'"),
    (b"\xff\xfe", "CLIP's vocabulary"), (b"\x1f\x8b\x08\x00", "CLIP's vocabulary")])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, message):
    (tmp_path / "merges.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        Tokenizer.from_file(tmp_path / "merges.txt")
    assert str(tmp_path / "merges.txt") in str(e.value) and "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------- files
def openai_names(state):
    """A Hugging Face state dict in OpenAI's names: written out once more, so that the table of clip.py has a
    witness."""
    out = {"visual.class_embedding": state["vision_model.embeddings.class_embedding"],
           "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
           "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
           "visual.proj": state["visual_projection.weight"].T.contiguous(),
           "text_projection": state["text_projection.weight"].T.contiguous(),
           "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
           "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
           "logit_scale": state["logit_scale"]}
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for old, new, layers in (("visual.transformer", "vision_model", 2), ("transformer", "text_model", 1)):
            for i in range(layers):
                a, b = f"{old}.resblocks.{i}", f"{new}.encoder.layers.{i}"
                out[f"{a}.attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{b}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
                out[f"{a}.attn.out_proj.{kind}"] = state[f"{b}.self_attn.out_proj.{kind}"]
                out[f"{a}.ln_1.{kind}"] = state[f"{b}.layer_norm1.{kind}"]
                out[f"{a}.ln_2.{kind}"] = state[f"{b}.layer_norm2.{kind}"]
                out[f"{a}.mlp.c_fc.{kind}"] = state[f"{b}.mlp.fc1.{kind}"]
                out[f"{a}.mlp.c_proj.{kind}"] = state[f"{b}.mlp.fc2.{kind}"]
    return out


def as_torchscript(tensors, path):
    """The tensors as nested modules of a TorchScript archive, as OpenAI published its models."""
    root = nn.Module()
    for name, tensor in tensors.items():
        module, (*parents, leaf) = root, name.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    for name, value in (("input_resolution", 16), ("context_length", 12), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.script(root), path)


@pytest.fixture(scope="module")
def openai_model():
    torch.manual_seed(0)
    model = CLIP(OPENAI_SIZES).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["torchscript", "state_dict"])
def test_an_archive_of_openai_equals_the_hugging_face_folder(openai_model, tokenizer, tmp_path, dtype,
                                                             layout):
    tensors = {name: t.to(dtype) for name, t in openai_names(openai_model.state_dict()).items()}
    path = str(tmp_path / "weights.pt")
    as_torchscript(tensors, path) if layout == "torchscript" else torch.save(tensors, path)
    save_clip(tmp_path / "folder", openai_model, tokenizer, dtype)
    (a, a_tokenizer), (b, b_tokenizer) = load_clip(path), load_clip(tmp_path / "folder")
    assert a.config == b.config == OPENAI_SIZES
    assert {p.dtype for p in a.parameters()} == {dtype}
    assert a_tokenizer.merges == b_tokenizer.merges
    pixels, ids = noise(2, 3, 16, 16), a_tokenizer(["a cat", "two dogs"], 12)
    assert all(torch.equal(p, b.state_dict()[name]) for name, p in a.state_dict().items())
    assert_close(a.float().encode_image(pixels), b.float().encode_image(pixels))
    assert_close(a.encode_text(ids), b.encode_text(ids))


def test_loaded_models_are_frozen_and_keep_the_dtype_of_the_file(tiny, tmp_path):
    save_clip(tmp_path, *tiny)
    model, _ = load_clip(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_saving_and_loading_give_the_same_model_and_tokenizer(tiny, tmp_path, expected):
    save_clip(tmp_path / "new" / "folder", *tiny, dtype=torch.float32)
    model, tokenizer = load_clip(tmp_path / "new" / "folder")
    assert model.config == tiny[0].config
    assert tokenizer.symbols == tiny[1].symbols and tokenizer.merges == tiny[1].merges
    assert torch.equal(*(encode_floats(m, expected["pixels"]) for m in (model, tiny[0])))
    assert torch.equal(model.encode_text(expected["ids"]), tiny[0].encode_text(expected["ids"]))


def test_a_shortened_vocabulary_is_saved_with_its_ids(tiny, tokenizer, tmp_path):
    small = Tokenizer(small_merges(tokenizer, 10))
    save_clip(tmp_path, CLIP(dataclasses.replace(tiny[0].config, vocab_size=small.vocab_size)), small)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary["<|endoftext|>"] == load_clip(tmp_path)[1].eot == 523
    assert [vocabulary[symbol] for symbol in small.symbols] == list(range(524))


def test_a_saved_folder_says_what_transformers_asks_for(tiny, tmp_path):
    save_clip(tmp_path, *tiny)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["CLIPModel"], "clip")
    assert config["torch_dtype"] == "float16"
    # where text is pooled
    assert (config["text_config"]["bos_token_id"], config["text_config"]["eos_token_id"]) == (576, 577)
    assert b'"__metadata__": {"format": "pt"}' in (tmp_path / "model.safetensors").read_bytes()[:100]


def test_position_ids_of_older_files_are_left_out_and_nothing_else(tiny, tmp_path):
    save_clip(tmp_path, *tiny)
    state = weightfile.read_tensors(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(16)[None] for tower in ("vision", "text")}
    torch.save({**state, **ids}, tmp_path / "pytorch_model.bin")
    load_clip(tmp_path)
    torch.save({**state, "vision_model.position_ids": torch.arange(16)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="1 unexpected.*vision_model.position_ids"):
        load_clip(tmp_path)


def test_sizes_are_those_of_the_tensors_and_heads_those_of_the_config(tiny, tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    config = {"model_type": "clip", "vision_config": None, "vision_config_dict": {"num_attention_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": {"num_hidden_layers": 10**9}}))
    found = clip_module.read_clip(tmp_path).config   # ViT-B/32 has 8 heads in the text tower, and leaves that out
    assert found == dataclasses.replace(tiny[0].config, vision_heads=2, text_heads=8)


# ------------------------------------------------------------------------------------------------- bad input
def refused(path, message):
    with pytest.raises(UserError, match=message) as e:
        load_clip(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_missing_and_empty_paths_are_refused(tmp_path):
    (tmp_path / "empty.pt").touch()
    refused(tmp_path / "nowhere", "No such file")
    refused(tmp_path / "empty.pt", "empty")
    refused(tmp_path, "no model.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    shutil.copy(os.path.join(TINY, "config.json"), tmp_path)
    refused(tmp_path, "no model.safetensors")


@pytest.mark.parametrize("change, message", [
    ({"vision_config": [1]}, "not a CLIP"), ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
    ({"text_config": {"num_attention_heads": "x"}}, "not a CLIP .*'x'"),
    ({"vision_config": {"num_attention_heads": 7}}, "no model has 7 heads in a width of 32")])
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, message)


@pytest.mark.parametrize("name, shape, message", [
    ("vision_model.embeddings.patch_embedding.weight", (1 << 40, 3, 4, 0), "does not fit"),
    ("vision_model.embeddings.patch_embedding.weight", (1 << 40, 3, 0, 0), "not a CLIP"),
    ("vision_model.embeddings.position_embedding.weight", (0, 40), "isqrt"),
    ("visual_projection.weight", (21, 40), "does not fit.*visual_projection.weight"),
    ("text_projection.weight", None, "text_projection.weight")])
def test_tensors_of_sizes_that_make_no_model_are_refused(tmp_path, name, shape, message):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    tensors = {n: t for n, t in weightfile.read_tensors(TINY).items() if n != name}
    tensors |= {name: torch.empty(shape)} if shape else {}
    weightfile.write_safetensors(str(tmp_path / "model.safetensors"),
                                 {n: t.clone() for n, t in tensors.items()})
    refused(tmp_path, message)


def test_a_small_model_without_its_merges_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(os.path.join(TINY, name), tmp_path)
    refused(tmp_path, "knows 578 ids, but .* makes 49408")


def test_a_weight_file_without_its_config_is_refused():
    refused(os.path.join(TINY, "model.safetensors"), "needed is .* the folder of Hugging Face")


def test_an_openai_archive_with_a_tensor_missing_or_unknown_is_refused(openai_model, tmp_path):
    tensors = openai_names(openai_model.state_dict())
    path = tmp_path / "weights.pt"
    torch.save({name: t for name, t in tensors.items() if name != "ln_final.bias"}, path)
    refused(path, "1 missing.*text_model.final_layer_norm.bias")
    torch.save({**tensors, "visual.attnpool.c_proj.bias": torch.zeros(3)}, path)
    refused(path, "1 unexpected.*visual.attnpool.c_proj.bias")
    torch.save({**tensors, "visual.conv1.weight": torch.zeros(3)}, path)
    refused(path, "not a CLIP")


def test_a_folder_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make this folder"):
        save_clip(tmp_path / "file", *tiny)
