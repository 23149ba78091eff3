"""The branch, its losses and the video tokens, against the released code and against first principles."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import model as nanobt
from clip import CLIP, CLIPConfig
from llm import load_llama, save_llama
from model import (IGNORE_INDEX, VIDEO_INDEX, VIDEO_TOKENS, Branch, Pretraining, VideoEncoder,
                   backbone_states, branch_tensors, load_branch, open_chat, place_embedding, prompt_ids,
                   save_chat, tube_mask)
from plumbing.cli import UserError
from plumbing.training import save_checkpoint
from plumbing.weightfile import read_file, read_tensors, write_safetensors
from small import write_branch

FIXTURES = os.path.join(os.path.dirname(__file__), "fixtures")
CONFIG = CLIPConfig(
    image_size=56, patch_size=14, vision_width=64, vision_layers=6, vision_heads=2, vision_mlp=256,
    text_width=32, text_layers=1, text_heads=2, text_mlp=32, vocab_size=50, context_length=8,
    projection_dim=32)
CASES = read_file(os.path.join(FIXTURES, "btadapter_cases.safetensors"))
RECORDED = read_file(os.path.join(FIXTURES, "btadapter_branch.safetensors"))


def recorded_clip():
    clip = CLIP(CONFIG)
    tensors = read_file(os.path.join(FIXTURES, "btadapter_clip.safetensors"))
    clip.load_state_dict({**clip.state_dict(), **tensors})   # the recording has no text tower
    return clip.requires_grad_(False).eval()


@pytest.fixture
def recorded(tmp_path):
    """recorded(...) -> the recorded encoder, with its branch from a file in the released layout."""
    def recorded(gates="gated", skip_last=0):
        tensors = {name: t for name, t in RECORDED.items() if gates == "gated" or "balance" not in name}
        save_checkpoint(tmp_path / "branch.pth", {"meta": {}, "state_dict": tensors})
        clip = recorded_clip()
        clip.image_states = clip.vision_model.states   # recorded with normalised floats
        branch = load_branch(tmp_path / "branch.pth", clip, skip_last)
        for layer in [*branch.btadapter_T_layers, *branch.btadapter_S_layers]:
            layer.p = 0.0   # recorded without stochastic depth
        return VideoEncoder(clip, branch).eval()
    return recorded


def seen(kind, encoder, video):
    """What a kind of video tokens sees -> (B, K, D)."""
    return VIDEO_TOKENS[kind](torch.nn.Identity(), encoder.branch).see(encoder.clip, video)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def small_encoder(T=4, seed=0, **options):
    """-> (encoder with a lively branch: nothing is zero, video (2, T, 3, 56, 56) uint8)."""
    torch.manual_seed(seed)
    branch = Branch(64, 2, 256, 4, drop_path=0.0, **options)
    for name, p in branch.named_parameters():
        torch.nn.init.normal_(p, std={"balance1": 1e-4, "balance2": 1e-2}.get(name, 0.3))
    return VideoEncoder(recorded_clip(), branch), torch.randint(256, (2, T, 3, 56, 56), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("gates", ["gated", "ungated"])
@pytest.mark.parametrize("T", [1, 5, 8])
def test_video_feature_equals_the_released_code(T, gates, recorded):
    with torch.no_grad():
        feature = recorded(gates).encode_video(CASES[f"T{T}.video"])
    assert relative(feature, CASES[f"T{T}.{gates}.video_feature"]) < 1e-5


@pytest.mark.parametrize("gates", ["gated", "ungated"])
def test_tokens_of_every_branch_layer_equal_the_released_code(gates, recorded):
    encoder = recorded(gates)
    with torch.no_grad():
        states = backbone_states(encoder.clip, CASES["T5.video"], 4)
        outputs = encoder.branch(states, place_embedding(encoder.clip))
    for j, tokens in enumerate(outputs):
        assert relative(tokens, CASES[f"T5.{gates}.branch{j}"]) < 1e-5


def test_backbone_states_equal_the_released_code():
    states = list(recorded_clip().vision_model.states(CASES["T5.video"].flatten(0, 1)))
    for i in (0, 3, 6):
        assert relative(states[i], CASES[f"T5.clip{i}"].reshape(states[i].shape)) < 1e-5


@pytest.mark.parametrize("T", [1, 5, 8, 66, 100])
def test_chat_tokens_equal_the_released_code(T, recorded):
    """Patches, then CLS. 66 and 100 frames are more than the 64 time positions; 1, 5 and 8 are fewer."""
    if T > 64:
        generator = torch.Generator().manual_seed(CASES[f"T{T}.seed"].item())
        video, expected = 0.5 * torch.randn(1, T, 3, 56, 56, generator=generator), CASES[f"T{T}.chat_tokens"]
    else:
        video, expected = CASES[f"T{T}.video"], CASES[f"T{T}.gated.chat_tokens"]
    with torch.no_grad():
        tokens = seen("branch", recorded(skip_last=1), video)
    assert tokens.shape[1] == 17 and relative(tokens, expected) < 1e-5


@pytest.mark.parametrize("case, weights", [("train_T1", (1, 0.1, 0.1)), ("train_T4_tube", (1, 0.1, 0))])
def test_losses_and_every_gradient_equal_the_released_code(case, weights, recorded):
    model = Pretraining(recorded()).train()
    prefix, clip, text = "extra_proj.", model.encoder.clip, CASES[f"{case}.text_feature"]
    model.extra_proj.load_state_dict(
        {name.removeprefix(prefix): t for name, t in RECORDED.items() if name.startswith(prefix)})
    kept = torch.stack([(~hidden).nonzero()[:, 0] for hidden in CASES[f"{case}.hidden_patches"]])
    feature, patches, mbta = model(backbone_states(clip, CASES[f"{case}.video"], 4, kept=kept), kept)
    parts = nanobt.vtc_loss(feature, text), nanobt.mbca_loss(patches, text), mbta
    names = "NCE_loss", "branch_text_nce_loss", "clip_branch_mask_mse_loss"
    for part, weight, name in zip(parts, weights, names):
        if weight:
            assert weight * part.item() == pytest.approx(CASES[f"{case}.{name}"].item(), rel=1e-5)
    sum(weight * part for part, weight in zip(parts, weights)).backward()
    grads = {name.replace("encoder.branch.", "backbone."): p.grad for name, p in model.named_parameters()}
    expected = {k.split(".grad.")[1]: v for k, v in CASES.items() if k.startswith(f"{case}.grad.")}
    largest = max(v[0] for v in expected.values())
    assert len(expected) == (120 if weights[2] else 116)
    for name, summary in expected.items():
        g = grads[name].flatten()
        got = torch.cat([g.norm()[None], g[torch.linspace(0, len(g) - 1, 32).long()]])
        # a key bias has no gradient but rounding noise: softmax does not see it. Hence the floor
        assert (got - summary).abs().max() < 1e-5 * summary.abs().max() + 1e-7 * largest, name


def test_mbta_holds_each_visible_patch_to_the_same_patch_of_clip(monkeypatch):
    """Of several frames, which the recorded case has not."""
    (encoder, video), compared = small_encoder(), []
    kept = nanobt.tube_mask(2, 16, 0.7)   # (2, 5)
    states = backbone_states(encoder.clip, video, 4, kept=kept)
    monkeypatch.setattr(nanobt, "mbta_loss", lambda student, teacher: compared.append(teacher))
    model = Pretraining(encoder)
    model(states, kept)
    teacher, tokens = compared[0].unflatten(1, (5, 4)), encoder.clip.project_image(states[-1])   # (2, 4, 6, P)
    assert torch.allclose(teacher, tokens[:, :, 1:].transpose(1, 2))
    assert torch.equal(nanobt.to_branch(tokens[:, 0, 0], tokens[:, :, 1:])[:, 1:], teacher.flatten(1, 2))


# -------------------------------------------------------------------------------------------------- structure
@pytest.mark.parametrize("kind", ["branch", "mean", "st_pool"])
def test_a_hundred_frames_are_seen_as_released_and_eight_in_the_toy_world(kind):
    kind = VIDEO_TOKENS[kind](None)
    assert [kind.frames_of(*given) for given in ((None, 224), (None, 64), (5, 224))] == [100, 8, 5]


def test_drop_path_leaves_out_whole_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 3)
    dropped = nanobt.drop_path(x, 0.25, training=True)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3]) and (dropped == dropped[:, :1]).all()
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    assert nanobt.drop_path(x, 0.25, training=False) is x


def moved(layers, index, N=5, T=4):
    """Which outputs of the first layer change with its input `index` -> the video token, (N, T) patches."""
    layer, x = getattr(small_encoder()[0].branch, layers)[0], torch.randn(2, 1 + N * T, 64)
    y = x.clone()
    y[:, index] += torch.randn(64)   # not a constant, which LayerNorm would take out
    with torch.no_grad():
        hit = (layer(x, T) - layer(y, T)).abs().amax((0, 2)) > 1e-6
    return hit[0], hit[1:].view(N, T)


PATCH_2_FRAME_1 = 1 + 2 * 4 + 1


def test_temporal_attention_reaches_its_own_patch_in_every_frame_and_nothing_else():
    cls, patches = moved("btadapter_T_layers", PATCH_2_FRAME_1)
    assert not cls and patches[2].all() and patches.sum() == 4


def test_spatial_attention_reaches_every_patch_of_its_own_frame_and_the_video_token():
    cls, patches = moved("btadapter_S_layers", PATCH_2_FRAME_1)
    assert cls and patches[:, 1].all() and patches.sum() == 5


def test_the_video_token_reaches_every_frame():
    cls, patches = moved("btadapter_S_layers", 0)
    assert cls and patches.all()


def test_temporal_layers_of_a_new_branch_are_the_identity():
    branch = Branch.beside(recorded_clip())
    x = torch.randn(2, 1 + 5 * 4, 64)
    for layer in branch.btadapter_T_layers:
        assert torch.equal(layer(x, 4), x)


def test_spatial_layers_of_a_new_branch_are_copies_of_the_layers_they_read():
    clip = recorded_clip()
    branch = Branch.beside(clip)
    for j, layer in enumerate(branch.btadapter_S_layers):
        for name, p in clip.vision_model.encoder.layers[2 + j].state_dict().items():
            assert torch.equal(layer.state_dict()[name], p)


def test_mean_pooled_clip_is_blind_to_order_and_the_branch_is_not():
    encoder, video = small_encoder()
    with torch.no_grad():
        forwards, backwards = (encoder(v)[1] for v in (video, video.flip(1)))
        assert relative(forwards, backwards) < 1e-6
        assert relative(encoder.encode_video(video), encoder.encode_video(video.flip(1))) > 1e-4


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one_does():
    encoder, video = small_encoder()
    model = Pretraining(encoder)
    kept = tube_mask(2, 16, 0.7)
    states, text = model.see(video, torch.tensor([[48, 3, 49], [48, 4, 49]]), kept)
    feature, patches, mbta = model(states, kept)
    (nanobt.vtc_loss(feature, text) + nanobt.mbca_loss(patches, text) + mbta).backward()
    for name, p in model.named_parameters():
        if name.startswith("encoder.clip."):
            assert p.grad is None, name
        else:
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_tube_mask_keeps_77_of_256_patches_and_they_differ_from_video_to_video():
    kept = tube_mask(8, 256, 0.7, torch.Generator().manual_seed(0))
    assert kept.shape == (8, 77) and all(len(set(row)) == 77 for row in kept.tolist())
    assert len({tuple(row) for row in kept.tolist()}) == 8


def test_the_branch_has_position_by_position_each_with_all_its_frames():
    state = torch.arange(2 * 3 * 6.0).view(2, 3, 6, 1)
    tokens = nanobt.to_branch(state[:, :, 0].mean(1), state[:, :, 1:])
    assert tokens.shape == (2, 1 + 5 * 3, 1)
    assert torch.equal(tokens[:, 1:].view(2, 5, 3), state[:, :, 1:, 0].transpose(1, 2))


@pytest.mark.parametrize("chunk", [128, 3])   # 3 frames: chunks end in the middle of a clip
def test_of_every_frame_the_kept_patches_are_held_on_to_and_no_others(chunk, monkeypatch):
    encoder, video = small_encoder()
    kept = tube_mask(2, 16, 0.7, torch.Generator().manual_seed(0))
    whole = backbone_states(encoder.clip, video, 4)
    monkeypatch.setattr(nanobt, "frames_at_once", lambda *_: chunk)
    visible = backbone_states(encoder.clip, video, 4, kept=kept)
    for all_tokens, tokens in zip(whole, visible, strict=True):
        assert tokens.shape == (2, 4, 1 + 5, 64)
        for b in range(2):
            assert torch.allclose(tokens[b], all_tokens[b][:, [0] + [1 + n for n in kept[b]]], atol=1e-6)


def test_a_mask_that_hides_nothing_changes_nothing():
    encoder, video = small_encoder()
    kept = tube_mask(2, 16, 0.0)
    everything = encoder.feature(backbone_states(encoder.clip, video, 4))
    none_hidden = encoder.feature(backbone_states(encoder.clip, video, 4, kept=kept), kept)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(everything, none_hidden))


def test_a_visible_patch_is_marked_with_its_own_place():
    """Patches that change places, with their states, are the same patches elsewhere: the branch must tell."""
    encoder, video = small_encoder()
    kept, positions = torch.arange(5).repeat(2, 1), place_embedding(encoder.clip)
    states = backbone_states(encoder.clip, video, 4, kept=kept)
    tokens, elsewhere = (encoder.branch(states, positions, k)[-1] for k in (kept, kept + 7))
    assert relative(tokens, elsewhere) > 1e-3


@pytest.mark.parametrize("sizes, device, frames", [
    ({}, "cpu", 4), ({"image_size": 336}, "cpu", 2), ({"image_size": 1344}, "cpu", 1), ({}, "cuda", 128),
    ({"image_size": 64, "patch_size": 16, "vision_width": 128, "vision_mlp": 512}, "cpu", 128)])
def test_a_cpu_sees_few_large_frames_at_once_and_many_small_ones(sizes, device, frames):
    assert nanobt.frames_at_once(CLIPConfig(**sizes), torch.device(device)) == frames


def test_the_chunk_of_frames_does_not_change_the_states(monkeypatch):
    encoder, video = small_encoder(T=5)
    at_once = backbone_states(encoder.clip, video, 4)
    monkeypatch.setattr(nanobt, "frames_at_once", lambda *_: 3)
    in_chunks = backbone_states(encoder.clip, video, 4)
    for a, b in zip(at_once, in_chunks, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_odd_number_of_frames_beyond_the_table_repeats_the_last_frame():
    state = torch.arange(5.0).view(1, 5, 1, 1)
    assert nanobt.average_frames(state, 2).flatten().tolist() == [0.5, 2.5, 4.0]


@pytest.mark.parametrize("tokens, K", [("branch", 17), ("mean", 16), ("st_pool", 4 + 16)])
def test_number_of_video_tokens(tokens, K, recorded):
    assert seen(tokens, recorded(skip_last=1), torch.randn(2, 4, 3, 56, 56)).shape == (2, K, 64)


# ----------------------------------------------------------------------------------------------- branch files
@pytest.fixture
def reload(tmp_path):
    """reload(tensors) -> Branch, from a file with these tensors; loose: not under `state_dict`."""
    def reload(tensors, loose=False, **options):
        whole = tensors if loose else {"meta": {"epoch": 1}, "state_dict": tensors}
        save_checkpoint(tmp_path / "b.pth", whole)
        return load_branch(tmp_path / "b.pth", recorded_clip(), **options)
    return reload


@pytest.mark.parametrize("prefix, old", [
    ("backbone.", "btadapter"), ("backbone.", "timesFPN"), ("module.backbone.", "btadapter")])
def test_pretraining_layout_is_read_in_both_namings(prefix, old, reload):
    branch = small_encoder()[0].branch
    tensors = {k.replace("btadapter", old): v for k, v in branch_tensors(branch, prefix).items()}
    others = "text_backbone.text_projection.weight", "backbone.class_embedding", f"backbone.{old}_pos_embed"
    tensors |= {name: torch.zeros(2, 2) for name in (*others, "extra_proj.0.weight")}
    loaded = reload(tensors)
    assert all(torch.equal(p, branch.state_dict()[name]) for name, p in loaded.state_dict().items())


def test_a_tuned_file_has_the_layers_of_chat_and_is_refused_for_retrieval(reload):
    tensors = {name: t for name, t in branch_tensors(small_encoder()[0].branch, "model.vision_tower.").items()
               if "layers.3" not in name}
    assert reload(tensors, loose=True, skip_last=1).depth == 3
    with pytest.raises(UserError, match="tuned for chat"):
        reload(tensors, loose=True)


def test_chat_leaves_out_the_last_layer_of_a_pretraining_file(reload):
    assert reload(branch_tensors(small_encoder()[0].branch, "backbone."), skip_last=1).depth == 3


@pytest.mark.parametrize("layout", ["backbone.", "model.vision_tower."])
@pytest.mark.parametrize("in_file", [False, True])
def test_gates_are_the_files_or_else_none_in_pretraining_and_zeros_in_chat(in_file, layout, reload):
    tuned, branch = layout != "backbone.", small_encoder(gated=in_file)[0].branch
    loaded = reload(branch_tensors(branch, layout), loose=tuned, skip_last=1)
    assert (loaded.balance1 is not None) == (in_file or tuned)
    if in_file or tuned:
        assert torch.equal(loaded.balance2, branch.balance2 if in_file else torch.zeros(64))


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.pop("backbone.btadapter_T_layers.1.temporal_fc.weight"), "missing.*1.temporal_fc.weight"),
    (lambda t: t.update({"backbone.btadapter_cls_token": torch.zeros(1, 1, 32)}), "another size.*_cls_token"),
    (lambda t: t.update({"backbone.btadapter_new": torch.zeros(1)}), "unexpected.*btadapter_new"),
    (lambda t: [t.pop(k) for k in list(t) if "S_layers" in k], "no BT-Adapter branch"),
    (lambda t: t.update(branch_tensors(Branch(32, 2, 64, 4), "backbone.")), "does not fit this model")])
def test_a_branch_file_that_does_not_fit_is_refused_by_name(spoil, message, reload):
    tensors = branch_tensors(small_encoder()[0].branch, "backbone.")
    spoil(tensors)
    with pytest.raises(UserError, match=f"b.pth.*{message}"):
        reload(tensors)


def test_parameter_counts_are_those_of_the_released_branch():
    with torch.device("meta"):
        four, three = Branch(depth=4), Branch(depth=3)
    count = lambda branch: sum(p.numel() for name, p in branch.named_parameters() if "balance" not in name)
    assert (count(four), count(three)) == (71_451_648, 53_605_376)


# ----------------------------------------------------------------------------------------- folders of weights
def llava_folder(world, folder, projector, added=0, kind="safetensors"):
    """A folder for open_chat: the small CLIP, branch and LLaMA of the toy world, and what LLaVA adds to them.

    projector: {name: tensor}; added: rows of added tokens; kind: safetensors, bin or sharded bin."""
    for name in ("clip", "branch.pth"):
        os.symlink(world / name, folder / name)
    llama, _, _ = load_llama(str(world / "llama"))
    llama.float().resize_vocab(340 + added)
    torch.manual_seed(0)
    llama.model.embed_tokens.weight.data[340:].normal_()
    llava = folder / "llava"
    save_llama(llava, llama, world / "tokenizer.model", projector, dtype=torch.float32)
    if kind != "safetensors":
        tensors = {name: t.clone() for name, t in read_tensors(llava).items()}
        os.remove(llava / "model.safetensors")
        names = list(tensors)
        files = {"pytorch_model.bin": names} if kind == "bin" else {"0.bin": names[::2], "1.bin": names[1::2]}
        for file, names in files.items():
            torch.save({name: tensors[name] for name in names}, llava / file)
        if len(files) > 1:
            index = {"weight_map": {name: file for file, names in files.items() for name in names}}
            (llava / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return llama


def linear(seed=1, prefix="model.mm_projector."):
    torch.manual_seed(seed)
    return {f"{prefix}weight": torch.randn(32, 32), f"{prefix}bias": torch.randn(32)}


def mlp2x(prefix="model.mm_projector."):
    return {**linear(2, f"{prefix}0."), **linear(3, f"{prefix}2.")}


LLAVAS = {   # release: its projector, how many tokens it adds
    "v1": (linear, 3), "v0 with a token for padding": (linear, 4),
    "v1 without a token for patches": (linear, 2), "v1 filled up to a round size": (linear, 64),
    "1.5": (mlp2x, 0), "preview of Llama 2": (linear, 0)}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("release", LLAVAS)
def test_every_llava_release_projects_as_its_own_arithmetic_says(world, tmp_path, release, kind):
    make, added = LLAVAS[release]
    llama = llava_folder(world, tmp_path, make(), added, kind)
    chat = open_chat(tmp_path).load()
    video = torch.randint(256, (1, 2, 3, 32, 32), dtype=torch.uint8)
    x, w = chat.video_tokens.see(chat.clip, video), make(prefix="")
    if make is linear:
        expected = x @ w["weight"].T + w["bias"]
    else:
        expected = F.gelu(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
    words = llama.model.embed_tokens.weight
    with torch.no_grad():
        assert relative(chat.embed_video(video), expected) < 1e-5
        assert torch.allclose(chat.start_end, words[-2:] if 2 <= added <= 4 else words.mean(0).expand(2, -1))
        ids = torch.randint(340 + added, (1, 9))
        assert relative(chat.llm(ids), llama(ids)) < 1e-5


def test_a_chat_holds_no_text_tower(world, tmp_path):
    llava_folder(world, tmp_path, linear())
    assert not any("text_" in name for name in open_chat(tmp_path).load().state_dict())


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
@pytest.mark.parametrize("make", [linear, mlp2x])
def test_a_projector_file_counts_before_the_projector_inside_llava(world, tmp_path, make, prefix):
    llava_folder(world, tmp_path, linear(seed=5))
    torch.save(make(prefix=prefix), tmp_path / "mm_projector.bin")
    loaded = open_chat(tmp_path).load().video_tokens.mm_projector.state_dict()
    assert all(torch.equal(t, make(prefix="")[name]) for name, t in loaded.items())


def test_chat_bin_counts_before_a_projector_file_and_untuned_passes_it_by(world, tmp_path):
    llava_folder(world, tmp_path, linear(seed=5))
    torch.save(linear(seed=6), tmp_path / "mm_projector.bin")
    rows = torch.full((2, 32), 3.0)
    torch.save({**linear(seed=7), "model.video_start_end.weight": rows}, tmp_path / "chat.bin")
    for tuned, seed in ((None, 7), (False, 6)):
        chat = open_chat(tmp_path, chat_file=tuned).load()
        assert torch.equal(chat.video_tokens.mm_projector.weight, linear(seed)["model.mm_projector.weight"])
        assert torch.equal(chat.start_end, rows) == (tuned is None)


@pytest.mark.parametrize("added, taken", [(3, True), (6, True), (0, False), (64, False)])
def test_a_projector_file_brings_start_and_end_rows_if_words_were_added(world, tmp_path, added, taken):
    llava_folder(world, tmp_path, {}, 3)
    words = torch.randn(340 + added, 32)
    torch.save({**linear(), "model.embed_tokens.weight": words}, tmp_path / "mm_projector.bin")
    assert torch.equal(open_chat(tmp_path).load().start_end, words[-2:]) == taken


PADDED = {   # where a folder says which tokens were added: the file, what it says
    "as LLaVA": ("added_tokens.json", {"<im_patch>": 340, "<im_start>": 341, "<im_end>": 342}),
    "as Video-ChatGPT": (
        "added_tokens.json", {"<im_start>": 0, "<im_end>": 1, "<vid_start>": 341, "<vid_end>": 342}),
    "as transformers since": ("tokenizer_config.json", {"added_tokens_decoder": {
        "1": {"content": "<s>"}, "341": {"content": "<im_start>"}, "342": {"content": "<im_end>"}}})}


@pytest.mark.parametrize("layout", PADDED)
@pytest.mark.parametrize("added", [8, 20])
def test_start_and_end_rows_of_a_padded_vocabulary_are_those_that_the_folder_names(
        world, tmp_path, layout, added):
    llama = llava_folder(world, tmp_path, linear(), added)
    file, stated = PADDED[layout]
    (tmp_path / "llava" / file).write_text(json.dumps(stated))
    words = llama.model.embed_tokens.weight
    assert torch.equal(open_chat(tmp_path).load().start_end, words[[341, 342]])
    # a projector file whose table is as long has them at the same place; one of another length, at its end
    for length, places in ((340 + added, [341, 342]), (347, [345, 346])):
        words = torch.randn(length, 32)
        torch.save({**linear(), "model.embed_tokens.weight": words}, tmp_path / "mm_projector.bin")
        assert torch.equal(open_chat(tmp_path).load().start_end, words[places])


@pytest.mark.parametrize("tensors, message", [
    ({"model.mm_projector.weight": torch.zeros(48, 16), "model.mm_projector.bias": torch.zeros(48)},
     r"of another size.*\(48, 16\).*\(32, 32\)"),
    ({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, "holds no mm_projector; .* like a LLaMA"),
    ({**mlp2x(), "model.mm_projector.4.weight": torch.zeros(32, 32)}, "1 unexpected")])
def test_a_projector_file_that_does_not_fit_is_refused(world, tmp_path, tensors, message):
    llava_folder(world, tmp_path, linear())
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=f"mm_projector.bin.*{message}"):
        open_chat(tmp_path)


def test_a_kind_of_video_tokens_that_is_not_known_is_refused(world, tmp_path):
    llava_folder(world, tmp_path, linear())
    write_safetensors(tmp_path / "chat.bin", linear(), {"tokens": "magic"})
    with pytest.raises(UserError, match="chat.bin: tuned for magic, no kind"):
        open_chat(tmp_path)
    with pytest.warns(UserWarning, match="chat.bin: tuned for magic, not for mean: .*--no-tuned"):
        open_chat(tmp_path, "mean")


def test_the_first_line_of_a_chat_says_that_a_branch_beside_chat_bin_is_not_read(world, tmp_path):
    llava_folder(world, tmp_path, linear())
    write_branch(tmp_path / "branch.pth")
    save_chat(tmp_path / "chat.bin", open_chat(tmp_path).chat)
    said = [open_chat(tmp_path, branch_file=file).description for file in (None, tmp_path / "branch.pth")]
    assert said == ["tuned for branch, branch.pth unused", "without chat.bin"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_wrapped_and_mixed_files_give_the_same_chat(world, tmp_path, wrapper, dtype):
    """Every second tensor in fp32, as where norms were kept so; every name as DDP or torch.compile has it."""
    chats = []
    for name in ("plain", "mixed"):
        folder = tmp_path / name
        folder.mkdir()
        llava_folder(world, folder, linear())
        (folder / "clip").unlink()
        shutil.copytree(world / "clip", folder / "clip")
        torch.save(linear(4), folder / "mm_projector.bin")
        branch = branch_tensors(Branch(32, 2, 64, 1), "model.vision_tower.")
        torch.save({**linear(5), **branch}, folder / "chat.bin")
        for file in "clip/model.safetensors", "llava/model.safetensors", "mm_projector.bin", "chat.bin":
            tensors = {key: t.clone().bfloat16() for key, t in read_file(folder / file).items()}
            if name == "mixed":
                tensors = {wrapper + key: t.float() if i % 2 else t
                           for i, (key, t) in enumerate(tensors.items())}
            write_safetensors(folder / file, tensors)
        torch.manual_seed(0)
        chats.append(open_chat(folder).load(dtype))
    plain, mixed = (chat.state_dict() for chat in chats)
    assert {t.dtype for t in mixed.values()} == {dtype}
    assert plain.keys() == mixed.keys()
    assert all(torch.equal(t, mixed[key]) for key, t in plain.items() if "branch" not in key)


def test_a_llama_without_any_projector_is_refused(world, tmp_path):
    llava_folder(world, tmp_path, {})
    with pytest.raises(UserError, match="a LLaMA, not a LLaVA"):
        open_chat(tmp_path)


# ---------------------------------------------------------------------------------------------------- prompts
class Words:
    """A tokenizer that gives every new word the next id."""
    bos_id, eos_id, vocab, between, added = 1, 2, {}, "", {}

    def encode(self, text):
        words = filter(None, text.replace("\n", " \n ").split(" "))
        return [self.vocab.setdefault(word, 10 + len(self.vocab)) for word in words]


def test_prompt_learns_the_answers_and_their_ends_and_nothing_else():
    t = Words()
    ids, labels = prompt_ids(t, [("what ?", "a dog"), ("why ?", "it runs")])
    learned = [i for i in labels if i != IGNORE_INDEX]
    assert learned == t.encode("a dog") + [2] + t.encode("it runs") + [2]
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(ids, labels))
    assert ids[0] == 1 and ids.count(VIDEO_INDEX) == 1 and ids.count(2) == 2


def test_prompt_of_a_second_question_begins_with_the_first_turn():
    t = Words()
    first, _ = prompt_ids(t, [("what ?", "a dog")])
    second, _ = prompt_ids(t, [("what ?", "a dog"), ("why ?", None)])
    assert second == first + t.encode("USER: why ?") + t.encode("ASSISTANT:")


def test_parts_of_a_prompt_are_apart_also_where_the_tokenizer_puts_no_space_before_them():
    class Letters(Words):
        between = " "

        def encode(self, text):
            return [ord(c) for c in text]
    ids, _ = prompt_ids(Letters(), [("what?", "a dog"), ("why?", None)])
    text = "".join(chr(i) for i in ids if i > 2)
    assert text.endswith("questions. USER: what?\n ASSISTANT: a dog USER: why? ASSISTANT:")


def test_an_answer_that_looks_like_a_prompt_is_still_learned_whole():
    t = Words()
    answer = "USER: ASSISTANT: </s> no"
    _, labels = prompt_ids(t, [("what ?", answer)])
    assert [i for i in labels if i != IGNORE_INDEX] == t.encode(answer) + [2]


def test_a_llava_that_was_trained_without_start_and_end_rows_gets_none(world, tmp_path):
    llava_folder(world, tmp_path, mlp2x(), 0)
    config = tmp_path / "llava" / "config.json"
    settings = {**json.loads(config.read_text()), "mm_use_im_start_end": False}   # as llava-v1.5-7b says
    config.write_text(json.dumps(settings))
    chat = open_chat(tmp_path).load()
    tokens, words = torch.randn(4, 32), chat.llm.model.embed_tokens.weight
    assert chat.start_end.shape == (0, 32)
    expected = torch.cat([words[[1, 5]], tokens, words[[7]]])
    assert torch.equal(chat.splice([1, 5, VIDEO_INDEX, 7], tokens), expected)


def test_opening_weights_imports_nothing_more_of_torch():
    """Random numbers on the meta device would cost 800 modules and more than a second."""
    program = ("import sys, model; before = set(sys.modules); model.open_chat('weights/tiny').load(); "
               "print(len([name for name in set(sys.modules) - before if name.startswith('torch.')]))")
    root = os.path.dirname(os.path.abspath(nanobt.__file__))
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert int(done.stdout) < 10, done.stderr


@pytest.mark.parametrize("checkpointed, megabytes", [(False, 184), (True, 21.5)])
def test_what_the_branch_keeps_of_a_clip_for_the_gradient(checkpointed, megabytes):
    """The arithmetic of docs/train.md: ViT-L/14, 8 frames, 70 % hidden, bf16; a second clip beside one."""
    branch, kept_bytes = Branch(checkpointed=checkpointed).train(), []
    weights = {p.untyped_storage().data_ptr() for p in branch.parameters()}
    for B in (1, 2):
        kept, storages = tube_mask(B, 256, 0.7), {}
        states = [torch.randn(B, 8, 1 + kept.shape[1], 1024).bfloat16() for _ in range(4)]

        def remember(t, storages=storages):   # the storages stay alive, so that no address is used twice
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t
        hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            branch(states, torch.randn(257, 1024), kept)
        kept_bytes.append(sum(s.nbytes() for address, s in storages.items() if address not in weights))
    assert (kept_bytes[1] - kept_bytes[0]) / 1e6 == pytest.approx(megabytes, rel=0.02)
