"""The studies: each variant is what it says, and a study goes on where it was stopped."""
import dataclasses
import json
import os
import shutil

import pytest
import torch

from clip import load_clip
from model import Branch, VideoEncoder, backbone_states, tube_mask
from plumbing.cli import UserError
from toy import ablate
from toy.ablate import Variant
from toy.world import film, make_clips, write_video

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CLIP = os.path.join(ROOT, "weights", "tiny", "clip")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four clips and their twins for training, as many to test."""
    folder = tmp_path_factory.mktemp("ablate")
    for split, held_out in (("train", False), ("test", True)):
        rows = []
        for i, clip in enumerate(make_clips(4, 0, held_out)[:8]):
            write_video(str(folder / f"{split}{i}.mp4"), film(clip))
            rows.append({"video": f"{split}{i}.mp4", "caption": clip.caption, **dataclasses.asdict(clip)})
        (folder / f"{split}_captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ablate.Config("losses", CLIP, str(folder), str(folder / "out"), str(folder), seeds=1, steps=2,
                         processes=1)


@pytest.fixture
def taught(monkeypatch):
    """The variants that are taught, as they come."""
    variants, teach = [], ablate.teach
    monkeypatch.setattr(ablate, "teach", lambda *given: variants.append(given[1]) or teach(*given))
    return variants


def test_a_study_has_every_variant_and_goes_on_where_it_was_stopped(config, capsys, monkeypatch, taught):
    config = dataclasses.replace(config, seeds=2, steps=1)
    teach = ablate.teach

    def stop_at_the_fourth(*given):
        if len(taught) == 3:
            taught.append("stopped")
            raise KeyboardInterrupt
        return teach(*given)
    monkeypatch.setattr(ablate, "teach", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(config)
    ablate.main(config)
    variants = ablate.STUDIES["losses"][1]
    assert len(taught) == 2 * len(variants) + 1
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in ["mean-pooled CLIP", *variants]) and "Table 7" in out
    assert os.path.getsize(os.path.join(config.pictures, "ablate_losses.png")) > 1000
    ablate.main(config)
    assert len(taught) == 2 * len(variants) + 1 and capsys.readouterr().out == out


def test_what_studies_share_runs_once_and_other_settings_are_other_runs(config, taught):
    ablate.main(dataclasses.replace(config, stage="projection"))
    taught.clear()
    ablate.main(dataclasses.replace(config, stage="mask"))
    ratios = sorted(variant.mask_ratio for variant in taught)
    assert ratios == [0.0, 0.0, 0.3, 0.5, 0.5, 0.9, 0.9]   # 0.7 stands in both
    ablate.main(dataclasses.replace(config, stage="mask", steps=3))
    assert len(taught) == 7 + 8


def test_two_processes_find_what_one_finds(config, tmp_path, capsys):
    tables = []
    for processes in (1, 2):
        out = str(tmp_path / str(processes))
        ablate.main(dataclasses.replace(config, stage="depth", steps=1, out=out, processes=processes))
        assert len(os.listdir(os.path.join(out, "runs"))) == 5
        tables.append(capsys.readouterr().out.splitlines())
    assert tables[0] == tables[1] and len(tables[0]) > 6


def test_another_clip_and_another_world_are_seen_and_run_anew(config, tmp_path, taught):
    cfg = dataclasses.replace(config, stage="structure", out=str(tmp_path / "out"), steps=1)
    ablate.main(cfg)
    shutil.copytree(CLIP, tmp_path / "clip")
    ablate.main(dataclasses.replace(cfg, clip=str(tmp_path / "clip")))
    shutil.copytree(config.data, tmp_path / "data")
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}_captions.jsonl"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    ablate.main(dataclasses.replace(cfg, data=str(tmp_path / "data")))
    assert len(taught) == 3 * 7
    kinds = sorted(name.split("_")[0] for name in os.listdir(cfg.out))
    assert kinds == ["runs", *["test"] * 3, *["train"] * 3]


def test_bad_input_is_one_line(config):
    with pytest.raises(UserError, match="no such study"):
        ablate.main(dataclasses.replace(config, stage="song"))


def test_each_variant_is_what_it_says():
    clip, _ = load_clip(CLIP)
    positions = clip.float().vision_model.embeddings.position_embedding.weight
    states = [torch.randn(2, 4, 17, 128) for _ in range(4)]
    as_it_is = Variant().change

    def tokens(change, states):
        torch.manual_seed(0)
        branch = Branch.beside(clip, 4).eval()
        change(branch)
        with torch.no_grad():
            return branch(states, positions)[-1], branch
    later = [states[0], *(torch.randn_like(state) for state in states[1:])]
    assert torch.allclose(tokens(ablate.one_entrance, states)[0], tokens(ablate.one_entrance, later)[0])
    assert not torch.allclose(tokens(as_it_is, states)[0], tokens(as_it_is, later)[0])
    assert not any(p.requires_grad for p in tokens(ablate.no_time, states)[1].btadapter_T_layers.parameters())
    backwards = [state.flip(1) for state in states]
    there, back = (tokens(ablate.no_space, played)[0][:, 0] for played in (states, backwards))
    assert torch.allclose(there, back, atol=1e-6)   # blind to order: CLS passes by the layers along time
    plain = tokens(as_it_is, states)[0]
    for change in (ablate.random_projection, ablate.no_projection):   # from zero, attention does nothing yet
        assert not torch.allclose(tokens(change, states)[0], plain)
    gates = (({}, as_it_is, (0.5, 0.5)), ({}, ablate.branch_alone, (1, 0)),
             ({"gated": False}, as_it_is, (1, 1)))
    for options, change, (ours, clips) in gates:   # gates or sums, with CLIP or without
        branch = Branch.beside(clip, 4, **options).eval()
        change(branch)
        with torch.no_grad():
            cls = ours * branch(states, positions)[-1][:, :1] + clips * states[-1][:, :, 0]   # (2, 4, D)
            feature = VideoEncoder(clip, branch).feature(states)[0]
            assert torch.allclose(feature, clip.project_image(cls).mean(1), atol=1e-5)


def test_a_concatenation_begins_as_the_mean_of_branch_and_backbone():
    clip = load_clip(CLIP)[0].float()
    states, branch = [torch.randn(2, 4, 17, 128) for _ in range(4)], Branch.beside(clip, 4).eval()
    with torch.no_grad():
        mean, joined = (kind(clip, branch).feature(states)[0] for kind in (VideoEncoder, ablate.Concatenated))
    assert torch.allclose(mean, joined, atol=1e-5)


def test_layers_inside_clip_begin_as_clip_and_then_know_the_order():
    clip = load_clip(CLIP)[0].float()
    pixels = torch.randint(0, 256, (2, 4, 3, 64, 64), dtype=torch.uint8)
    states, branch = backbone_states(clip, pixels, 5), Branch.beside(clip, 5).eval()
    ablate.no_marks(branch)
    encoder, backwards = ablate.InsideCLIP(clip, branch), [state.flip(1) for state in states]
    with torch.no_grad():
        feature, tokens = encoder.feature(states)
        assert torch.allclose(feature, clip.project_image(states[-1][:, :, 0]).mean(1), atol=1e-4)
        assert tokens.shape == (2, 1 + 16 * 4, 128)
        ablate.random_projection(branch)
        branch.btadapter_time_embed.weight.data.normal_()
        assert not torch.allclose(encoder.feature(states)[0], encoder.feature(backwards)[0], atol=1e-2)


def test_bottlenecks_begin_as_clip_then_know_the_order_and_learn_alone():
    clip = load_clip(CLIP)[0].float()
    pixels = torch.randint(0, 256, (2, 4, 3, 64, 64), dtype=torch.uint8)
    states, branch = backbone_states(clip, pixels, 5), Branch.beside(clip, 5)
    ablate.bottlenecks(branch)
    encoder, backwards = ablate.InsideCLIP(clip, branch), [state.flip(1) for state in states]
    feature = encoder.feature(states)[0]
    assert torch.allclose(feature, clip.project_image(states[-1][:, :, 0]).mean(1), atol=1e-4)
    for layer in branch.btadapter_T_layers:
        torch.nn.init.normal_(layer.up.weight)
    feature = encoder.feature(states)[0]
    assert not torch.allclose(feature, encoder.feature(backwards)[0], atol=1e-2)
    feature.sum().backward()
    learned = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {f"branch.btadapter_T_layers.{i}.{part}.{name}" for i in range(1, 5)
                       for part in ("down", "conv", "up") for name in ("weight", "bias")}


def test_a_bottleneck_reads_one_frame_to_each_side_of_its_own_place():
    layer, x = ablate.Bottleneck(8), torch.randn(1, 1 + 2 * 6, 8)   # two places, six frames
    torch.nn.init.normal_(layer.up.weight)
    other = x.clone()
    other[0, 1 + 3] += 1   # the first place in frame 3
    changed = (layer(x, 6) - layer(other, 6)).abs().sum(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [1 + 2, 1 + 3, 1 + 4]


def test_the_shape_of_stan_sums_and_sees_every_patch(config, monkeypatch):
    seen, variant = [], ablate.STUDIES["related"][1]["STAN's shape: sums"]
    monkeypatch.setattr(ablate, "tube_mask", lambda *given: seen.append(tube_mask(*given)) or seen[-1])
    branch = ablate.teach(config, variant, 0).branch
    assert branch.balance1 is None and branch.balance2 is None
    assert [kept.shape for kept in seen] == [(8, 16)] * config.steps
    others = [one for name, one in ablate.STUDIES["related"][1].items() if name != "branch"]
    assert {(one.mask_ratio, one.losses) for one in others} == {(0.0, ablate.VTC)}
    assert others[-1].encoder is ablate.InsideCLIP and others[-1].change is ablate.bottlenecks


def test_few_looks_are_a_quarter_and_the_released_test_uses_sums(config):
    clips = make_clips(200, 0, False)
    assert 0.15 < sum(map(ablate.few_looks, clips)) / len(clips) < 0.35
    branch = ablate.teach(config, Variant(sums_after=True), 0).branch
    assert branch.balance1 is None and branch.balance2 is None
    assert ablate.teach(config, Variant(), 0).branch.balance1 is not None
