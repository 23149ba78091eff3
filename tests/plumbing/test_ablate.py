"""The studies: each variant is what it says, a study goes on where it was stopped, and it knows which CLIP it is about."""
import dataclasses
import json
import os
import shutil

import pytest
import torch

from clip import load_clip
from model import Branch, VideoEncoder
from plumbing.cli import UserError
from toy import ablate
from toy.world import film, make_clips, write_video

CLIP = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "weights", "tiny", "clip")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four clips and their twins for training, as many to test, and what the shipped CLIP saw of them."""
    folder = tmp_path_factory.mktemp("ablate")
    for split, held_out in (("train", False), ("test", True)):
        rows = []
        for i, clip in enumerate(make_clips(4, 0, held_out)[:8]):
            write_video(str(folder / f"{split}{i}.mp4"), film(clip))
            rows.append({"video": f"{split}{i}.mp4", "caption": clip.caption, **dataclasses.asdict(clip)})
        (folder / f"{split}_captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = ablate.Config("see", CLIP, str(folder), str(folder / "out"), str(folder), seeds=2, steps=2, batch_size=8, processes=1)
    ablate.main(cfg)
    return cfg


def test_a_study_has_every_variant_and_goes_on_where_it_was_stopped(config, capsys, monkeypatch):
    shutil.rmtree(os.path.join(config.out, "runs"), ignore_errors=True)   # of the other tests
    teach, runs = ablate.teach, []

    def stop_at_the_fourth(*given):
        runs.append(given)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return teach(*given)
    monkeypatch.setattr(ablate, "teach", stop_at_the_fourth)
    cfg = dataclasses.replace(config, stage="losses")
    with pytest.raises(KeyboardInterrupt):
        ablate.main(cfg)
    ablate.main(cfg)
    variants = ablate.STUDIES["losses"][1]
    assert len(runs) == 2 * len(variants) + 1   # the one that was stopped ran twice
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in ["mean-pooled CLIP", *variants]) and "Table 7" in out
    assert os.path.getsize(os.path.join(config.pictures, "ablate_losses.png")) > 1000
    ablate.main(cfg)
    assert len(runs) == 2 * len(variants) + 1 and capsys.readouterr().out == out


def test_what_studies_share_runs_once_and_other_settings_are_other_runs(config, monkeypatch):
    teach, runs = ablate.teach, []
    monkeypatch.setattr(ablate, "teach", lambda *given: runs.append(given[1]) or teach(*given))
    ablate.main(dataclasses.replace(config, seeds=1, stage="projection"))
    runs.clear()
    ablate.main(dataclasses.replace(config, seeds=1, stage="mask"))
    assert sorted(variant.mask_ratio for variant in runs) == [0.0, 0.3, 0.5, 0.9]   # 0.7 is the branch as it is
    ablate.main(dataclasses.replace(config, seeds=1, stage="mask", steps=3))
    assert len(runs) == 4 + 5


def test_two_processes_find_what_one_finds(config, tmp_path, capsys):
    tables = []
    for processes in (1, 2):
        cfg = dataclasses.replace(config, stage="depth", seeds=1, out=str(tmp_path / str(processes)), processes=processes)
        shutil.copytree(config.out, cfg.out, ignore=shutil.ignore_patterns("runs"))
        ablate.main(cfg)
        assert len(os.listdir(os.path.join(cfg.out, "runs"))) == 5
        tables.append([line.rsplit("|", 2)[0] for line in capsys.readouterr().out.splitlines()])   # without the seconds
    assert tables[0] == tables[1] and len(tables[0]) > 6


def test_another_clip_another_world_and_no_stage_are_refused(config, world, tmp_path):
    with pytest.raises(UserError, match="another CLIP"):
        ablate.main(dataclasses.replace(config, stage="mask", clip=str(world / "clip")))
    for split in ablate.SPLITS:
        with open(os.path.join(config.data, f"{split}_captions.jsonl")) as f:
            (tmp_path / f"{split}_captions.jsonl").write_text("".join(reversed(f.readlines())))
    with pytest.raises(UserError, match="another world"):
        ablate.main(dataclasses.replace(config, stage="mask", data=str(tmp_path)))
    with pytest.raises(UserError, match="no such stage"):
        ablate.main(dataclasses.replace(config, stage="song"))


def test_the_chat_study_gathers_the_last_evaluation_of_each_run(config, tmp_path, capsys):
    cfg = dataclasses.replace(config, stage="chat", out=str(tmp_path), pictures=str(tmp_path))
    for i, tokens in enumerate(ablate.VIDEO_TOKENS):
        for seed in range(cfg.seeds):
            (tmp_path / f"chat_{tokens}_{seed}").mkdir()
            rows = [{"step": 1, "loss": 2.0}, *({"step": step, kind: 10.0 * i + seed + step} for step in (1, 2) for kind in ("static", "temporal"))]
            (tmp_path / f"chat_{tokens}_{seed}" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ablate.main(cfg)
    table = capsys.readouterr().out
    assert "| CLIP's, mean over time | 12.5 (12.0 to 13.0) | 12.5 (12.0 to 13.0) |" in table and "s a step" not in table
    assert os.path.getsize(tmp_path / "ablate_chat.png") > 1000
    (tmp_path / "chat_mean_1" / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(UserError, match="chat_mean_1.*never evaluated"):
        ablate.main(cfg)
    os.remove(tmp_path / "chat_mean_1" / "log.jsonl")
    with pytest.raises(UserError, match="chat_mean_1.*not there"):
        ablate.main(cfg)


def test_each_variant_is_what_it_says():
    clip, _ = load_clip(CLIP)
    positions, states = clip.float().vision_model.embeddings.position_embedding.weight, [torch.randn(2, 4, 17, 128) for _ in range(4)]

    def tokens(change, states):
        torch.manual_seed(0)
        branch = Branch.beside(clip, 4).eval()
        change(branch)
        with torch.no_grad():
            return branch(states, positions)[-1], branch
    later = [states[0], *(torch.randn_like(state) for state in states[1:])]
    assert torch.allclose(tokens(ablate.one_entrance, states)[0], tokens(ablate.one_entrance, later)[0])
    assert not torch.allclose(tokens(ablate.as_it_is, states)[0], tokens(ablate.as_it_is, later)[0])
    assert not any(p.requires_grad for p in tokens(ablate.no_time, states)[1].btadapter_T_layers.parameters())
    forwards, backwards = (tokens(ablate.no_space, played)[0][:, 0] for played in (states, [state.flip(1) for state in states]))
    assert torch.allclose(forwards, backwards, atol=1e-6)   # blind to order: CLS passes by the layers along time
    plain = tokens(ablate.as_it_is, states)[0]
    for change in (ablate.random_projection, ablate.no_projection):   # from zero the layers along time do nothing yet
        assert not torch.allclose(tokens(change, states)[0], plain)
    with torch.no_grad():   # gates or sums, with CLIP or without
        for options, change, shares in (({}, ablate.as_it_is, (0.5, 0.5)), ({}, ablate.branch_alone, (1.0, 0.0)), ({"gated": False}, ablate.as_it_is, (1, 1))):
            branch = Branch.beside(clip, 4, **options).eval()
            change(branch)
            cls = shares[0] * branch(states, positions)[-1][:, :1] + shares[1] * states[-1][:, :, 0]   # (2, 4, D): frame by frame
            assert torch.allclose(VideoEncoder(clip, branch).feature(states)[0], clip.project_image(cls).mean(1), atol=1e-5)
