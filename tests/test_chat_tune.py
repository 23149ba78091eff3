"""The training scripts: they learn, they resume to the bit, two processes train as one, and they refuse what they cannot use."""
import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import chat_tune
import pretrain
from data import ConversationDataset
from llm import generate, stream_text
from model import open_chat, prompt_ids
from plumbing import training
from plumbing.cli import UserError
from plumbing.weightfile import read_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def pretraining(world, out, **options):
    options = {"steps": 6, "batch_size": 4, "depth": 2, "lr": 1e-5, "workers": 0, "save_every": 2, "log_every": 1, "min_area": 0.9,
               "anneal": True, "num_frames": 4, "together": 2, "device": "cpu"} | options
    return pretrain.Config(clip=str(world / "clip"), annotations=str(world / "captions.jsonl"), root=str(world), out=str(out), **options)


def tuning(world, out, stage="video", **options):
    options = {"steps": 6, "batch_size": 4, "lr": 1e-3, "workers": 0, "save_every": 2, "log_every": 1, "num_frames": 4, "device": "cpu",
               "llm": str(world / "llama"), "tokens": "branch" if stage == "video" else "mean",
               "branch": str(world / "branch.pth")} | options
    return chat_tune.Config(stage=stage, clip=str(world / "clip"), root=str(world), out=str(out),
                            annotations=str(world / ("talks.jsonl" if stage == "video" else "stills.jsonl")), **options)


@pytest.fixture(scope="session")
def llava(world, tmp_path_factory):
    """A LLaVA folder, as the stage projector leaves it."""
    out = tmp_path_factory.mktemp("projector")
    chat_tune.main(tuning(world, out, "projector", steps=2))
    return str(out / "llava")


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


@pytest.mark.parametrize("script", ["pretrain.py", "chat_tune.py"])
def test_two_processes_under_torchrun_take_the_step_of_one(world, llava, tmp_path, script):
    """Compared is Adam's first moment after one step, a tenth of the gradient: weights would hide a wrong scale."""
    moments = []
    for size in (1, 2):
        out = tmp_path / str(size)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size, os.path.join(ROOT, script),
                   "--clip", world / "clip", "--root", world, "--out", out, "--steps", 1, "--batch_size", 4, "--workers", 0, "--num_frames", 4,
                   "--device", "cpu", "--drop_path", 0, "--clip_norm", 1e9]
        if script == "pretrain.py":
            command += ["--annotations", world / "captions.jsonl", "--depth", 2, "--min_area", 0.9]
        else:
            command += ["--annotations", world / "talks.jsonl", "--llm", llava, "--branch", world / "branch.pth", "--stage", "video"]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        moments.append([state["exp_avg"] for state in training.load_checkpoint(out / "last.pth")["optimizer"]["state"].values()])
        assert len(log_of(out)) == 1
    one, two = moments
    largest = max(m.abs().max() for m in one)
    assert len(one) > 30 and largest > 0
    for m, n in zip(one, two, strict=True):
        assert (m - n).abs().max() < 1e-4 * m.abs().max() + 1e-6 * largest


# ---------------------------------------------------------------------------------------------------- chat_tune
def test_broken_videos_are_skipped_and_counted_in_tuning(world, llava, tmp_path):
    rows = (world / "talks.jsonl").read_text().replace('"1.mp4"', '"gone.mp4"')
    (tmp_path / "a.jsonl").write_text(rows)
    chat_tune.main(dataclasses.replace(tuning(world, tmp_path / "out", llm=llava, steps=4), annotations=str(tmp_path / "a.jsonl")))
    assert log_of(tmp_path / "out")[-1]["skipped"] == 2   # two epochs of two steps


def test_a_step_for_which_a_process_has_no_video_is_passed_by_all_in_tuning(world, llava, tmp_path):
    (tmp_path / "a.jsonl").write_text((world / "talks.jsonl").read_text().replace('"1.mp4"', '"gone.mp4"'))
    cfg = dataclasses.replace(tuning(world, tmp_path / "out", llm=llava, steps=4, batch_size=2), annotations=str(tmp_path / "a.jsonl"))
    flags = [text for name, value in vars(cfg).items() if value is not None and not isinstance(value, bool) for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", os.path.join(ROOT, "chat_tune.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(log_of(tmp_path / "out")) == 3 and training.load_checkpoint(tmp_path / "out" / "last.pth")["skipped"] == 2


@pytest.mark.parametrize("stage, parts", [("projector", ["video_tokens.mm_projector", "start_end"]), ("language", ["video_tokens.mm_projector", "start_end", "llm"]),
                                          ("video", ["video_tokens.mm_projector", "start_end", "video_tokens.branch.btadapter"])])
def test_each_stage_trains_its_own_parts_and_nothing_else(world, llava, tmp_path, stage, parts, monkeypatch):
    cfg = tuning(world, tmp_path, stage, steps=2, **({} if stage == "projector" else {"llm": llava}))
    built, build = [], chat_tune.build

    def keep(cfg):
        chat = build(cfg)
        built.append((chat, {name: p.clone() for name, p in chat.state_dict().items()}))
        return chat
    monkeypatch.setattr(chat_tune, "build", keep)
    monkeypatch.setattr(chat_tune, "save_result", lambda cfg, chat: None)   # which grows the vocabulary
    chat_tune.main(cfg)
    (chat, before), = built
    moved = {name for name, p in chat.state_dict().items() if not torch.equal(p, before[name])}
    assert all(any(name.startswith(part) for part in parts) for name in moved)
    assert all(any(name.startswith(part) for name in moved) for part in parts)


def test_video_tuning_saves_the_gates_it_found_beside_what_it_learned(world, llava, tmp_path):
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava))
    learned = read_file(tmp_path / "chat.bin")
    assert {"model.vision_tower.balance2", "model.vision_tower.btadapter_S_layers.0.mlp.fc1.weight", "model.mm_projector.weight",
            "model.video_start_end.weight"} <= set(learned)


def test_video_tuning_of_the_shipped_weights_learns_eight_clips_by_heart(world, tmp_path, capsys):
    tiny = os.path.join(ROOT, "weights", "tiny")
    cfg = tuning(world, tmp_path, steps=60, batch_size=8, drop_path=0.0, llm=os.path.join(tiny, "llava"), branch=os.path.join(tiny, "branch.pth"),
                 eval_annotations=str(world / "talks.jsonl"))
    chat_tune.main(dataclasses.replace(cfg, clip=os.path.join(tiny, "clip")))
    losses = [row["loss"] for row in log_of(tmp_path) if "loss" in row]
    assert losses[-1] < 0.2 * losses[0]
    assert log_of(tmp_path)[-1]["temporal"] > 50   # twins share every picture: blind to order, half would be the most
    assert "temporal questions" in capsys.readouterr().out


def test_interrupted_tuning_goes_on_as_if_nothing_had_happened(world, llava, tmp_path, monkeypatch):
    chat_tune.main(tuning(world, tmp_path / "straight", llm=llava))
    save = training.save_checkpoint

    def killed(path, state):
        save(path, state)
        if state.get("step") == 2:
            raise RuntimeError("killed")
    monkeypatch.setattr(training, "save_checkpoint", killed)
    with pytest.raises(RuntimeError, match="killed"):
        chat_tune.main(tuning(world, tmp_path / "broken", llm=llava))
    monkeypatch.setattr(training, "save_checkpoint", save)
    chat_tune.main(tuning(world, tmp_path / "broken", llm=llava))
    straight, resumed = (read_file(tmp_path / name / "chat.bin") for name in ("straight", "broken"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "broken")


def test_sigterm_saves_and_the_same_command_goes_on_in_tuning(world, llava, tmp_path, monkeypatch):
    asked = threading.Event()
    asked.set()
    with monkeypatch.context() as patched:
        patched.setattr(training, "on_sigterm", lambda: asked)
        with pytest.raises(SystemExit, match="143"):
            chat_tune.main(tuning(world, tmp_path, llm=llava))
    assert training.load_checkpoint(tmp_path / "last.pth")["step"] == 0
    chat_tune.main(tuning(world, tmp_path, llm=llava))
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_the_stage_video_alone_is_tuned_in_the_toy_world(world, tmp_path, monkeypatch, capsys):
    """Two short steps, on clips of the test world in the place of the rendered ones."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train_talks.jsonl: not there; `python -m toy render` makes it"):
        chat_tune.main(chat_tune.Config("video"))
    os.symlink(os.path.join(ROOT, "weights"), "weights")
    os.makedirs("out")
    os.symlink(world, "out/shapes")
    monkeypatch.setattr(chat_tune, "TOY", chat_tune.TOY | {
        "annotations": "out/shapes/talks.jsonl", "eval_annotations": "out/shapes/talks.jsonl", "batch_size": 4, "steps": 2})
    chat_tune.main(chat_tune.Config("video", workers=0, device="cpu"))
    answers, path = capsys.readouterr().out.splitlines()
    assert answers.startswith("video, branch tokens: temporal questions ")
    assert path == "out/chat/chat.bin: talk with it by `python chat.py --weights weights/tiny --chat out/chat/chat.bin`"
    with pytest.raises(UserError, match="--clip, --llm, --annotations, --root: needed"):
        chat_tune.main(chat_tune.Config("projector"))


def test_exact_answers_are_what_greedy_decoding_says(world):
    """The shipped model is asked; what it says must count as right, and anything else as wrong."""
    chat = open_chat(os.path.join(ROOT, "weights", "tiny")).load()
    dataset = ConversationDataset(str(world / "talks.jsonl"), str(world), 8, 64)
    for said_so in (True, False):
        for i in range(len(dataset)):
            with torch.no_grad():
                embeds = chat.splice(prompt_ids(chat.tokenizer, [("Where is it?", None)])[0], chat.embed_video(dataset[i][0][None])[0])
            said = "".join(stream_text(chat.tokenizer, generate(chat.llm, embeds=embeds[None], max_new_tokens=40,
                                                                stop_ids=chat.tokenizer.stop_ids))).strip()
            dataset.conversations[i] = [("Where is it?", said if said_so else said + " It is.")]
        assert chat_tune.exact_answers(chat, dataset, "vicuna_v1", torch.device("cpu")) == {"temporal": (8 * said_so, 8)}


def test_an_answer_beyond_the_context_is_wrong_and_does_not_stop_training(world, llava, tmp_path):
    row = json.loads((world / "talks.jsonl").read_text().splitlines()[0])
    row["conversations"][0]["value"] = "word " * 600
    (tmp_path / "long.jsonl").write_text((json.dumps(row) + "\n") * 4)
    cfg = dataclasses.replace(tuning(world, tmp_path / "out", llm=llava, steps=1), annotations=str(tmp_path / "long.jsonl"))
    chat_tune.main(cfg)
    assert log_of(tmp_path / "out")[0]["loss"] == 0
    found = chat_tune.exact_answers(chat_tune.build(cfg), ConversationDataset(cfg.annotations, str(world), 4, 32), "vicuna_v1", torch.device("cpu"))
    assert found == {"temporal": (0, 4)}


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, message", [
    ({"stage": "song"}, "--stage song"), ({"tokens": "all"}, "--tokens all"), ({"llm": "nowhere"}, "nowhere"),
    ({"branch": ""}, "--branch"), ({"eval_only": True}, "--eval_annotations"), ({"clip": None}, "--clip: needed"),
    ({"batch_size": 0}, "--batch_size 0"), ({"num_frames": 0}, "--num_frames 0")])
def test_chat_tune_refuses_what_it_cannot_use(world, llava, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        chat_tune.main(dataclasses.replace(tuning(world, tmp_path / "out", llm=llava), **change))


def test_a_foreign_file_in_the_place_of_the_checkpoint_is_refused_and_kept(world, tmp_path):
    (tmp_path / "last.pth").write_bytes(b"precious")
    with pytest.raises(UserError, match="last.pth"):
        pretrain.main(pretraining(world, tmp_path))
    assert (tmp_path / "last.pth").read_bytes() == b"precious"


def test_a_checkpoint_of_another_model_is_refused(world, tmp_path):
    pretrain.main(pretraining(world, tmp_path, steps=1))
    saved = training.load_checkpoint(tmp_path / "last.pth")
    saved["state_dict"]["backbone.balance1"] = torch.zeros(1)   # would be broadcast without a word
    training.save_checkpoint(tmp_path / "last.pth", saved)
    with pytest.raises(UserError, match="other sizes"):
        pretrain.main(pretraining(world, tmp_path, steps=2))


def test_an_out_folder_that_is_a_file_is_one_line(world, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot make this folder"):
        pretrain.main(pretraining(world, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_evaluation_alone_leaves_the_log_of_a_training_run(world, llava, tmp_path):
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava))
    before = log_of(tmp_path)
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava, eval_only=True, eval_annotations=str(world / "talks.jsonl")))
    assert log_of(tmp_path) == before


def test_pictures_and_videos_in_one_batch_are_refused():
    items = [(torch.zeros(1, 3, 4, 4), [], 0), (torch.zeros(2, 3, 4, 4), [], 1)]
    with pytest.raises(UserError, match="pictures and videos"):
        chat_tune.collate(items)


def test_the_command_line_ends_in_one_line_and_exit_code_2(world, tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "pretrain.py"), "--clip", "nowhere", "--annotations", "a", "--root", "r", "--out",
                           str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
