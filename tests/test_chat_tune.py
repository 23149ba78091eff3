"""Chat tuning learns, resumes to the bit, takes the same steps in two processes, and refuses bad input."""
import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import chat_tune
from data import ConversationDataset
from llm import generate, stream_text
from model import open_chat, prompt_ids
from plumbing import training
from plumbing.cli import UserError
from plumbing.store import digest_of
from plumbing.weightfile import read_file, read_metadata

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "weights", "tiny")
CPU = torch.device("cpu")


def tuning(world, out, stage="video", **options):
    video = stage == "video"
    return chat_tune.Config(stage=stage, **{
        "clip": str(world / "clip"), "llm": str(world / "llama"), "root": str(world), "out": str(out),
        "annotations": str(world / ("talks.jsonl" if video else "stills.jsonl")), "steps": 6, "batch_size": 4,
        "branch": str(world / "branch.pth"), "lr": 1e-3, "workers": 0, "save_every": 2, "log_every": 1,
        "num_frames": 4, "device": "cpu"} | options)


@pytest.fixture(scope="session")
def llava(world, tmp_path_factory):
    """A LLaVA folder, as the stage projector leaves it."""
    out = tmp_path_factory.mktemp("projector")
    chat_tune.main(tuning(world, out, "projector", steps=2))
    return str(out / "llava")


def one_broken(world, tmp_path):
    """-> annotations with a video that is not there."""
    text = (world / "talks.jsonl").read_text().replace('"1.mp4"', '"gone.mp4"')
    (tmp_path / "a.jsonl").write_text(text)
    return str(tmp_path / "a.jsonl")


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def torchrun(cfg, size):
    """-> last.pth of a run in `size` processes."""
    flags = [f"--{name}={value}" for name, value in vars(cfg).items() if type(value) in (str, int, float)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size),
               os.path.join(ROOT, "chat_tune.py"), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return training.load_checkpoint(os.path.join(cfg.out, "last.pth"))


def test_two_processes_under_torchrun_take_the_step_of_one(world, llava, tmp_path):
    """Compared is Adam's first moment after one step, a tenth of the gradient, whose scale weights hide."""
    options = {"llm": llava, "steps": 1, "drop_path": 0.0, "clip_norm": 1e9}
    saved = [torchrun(tuning(world, tmp_path / str(size), **options), size) for size in (1, 2)]
    one, two = ([state["exp_avg"] for state in s["optimizer"]["state"].values()] for s in saved)
    largest = max(m.abs().max() for m in one)
    assert len(one) > 30 and largest > 0
    for m, n in zip(one, two, strict=True):
        assert (m - n).abs().max() < 1e-4 * m.abs().max() + 1e-6 * largest


# ----------------------------------------------------------------------------------------------- chat_tune
def test_broken_videos_are_skipped_and_counted_in_tuning(world, llava, tmp_path):
    broken = one_broken(world, tmp_path)
    chat_tune.main(tuning(world, tmp_path / "out", llm=llava, steps=4, annotations=broken))
    assert log_of(tmp_path / "out")[-1]["skipped"] == 2   # two epochs of two steps


def test_a_step_for_which_a_process_has_no_video_is_passed_by_all_in_tuning(world, llava, tmp_path):
    broken = one_broken(world, tmp_path)
    cfg = tuning(world, tmp_path / "out", llm=llava, steps=4, batch_size=2, annotations=broken)
    assert torchrun(cfg, 2)["skipped"] == 2 and len(log_of(cfg.out)) == 3


PROJECTOR = ["video_tokens.mm_projector", "start_end"]


@pytest.mark.parametrize("stage, parts", [("projector", PROJECTOR), ("language", [*PROJECTOR, "llm"]),
                                          ("video", [*PROJECTOR, "video_tokens.branch.btadapter"])])
def test_each_stage_trains_its_own_parts_and_nothing_else(world, llava, tmp_path, stage, parts, monkeypatch):
    cfg = tuning(world, tmp_path, stage, steps=2, **({} if stage == "projector" else {"llm": llava}))
    built, build = [], chat_tune.build

    def keep(cfg):
        chat = build(cfg)
        built.append((chat, {name: p.clone() for name, p in chat.state_dict().items()}))
        return chat
    monkeypatch.setattr(chat_tune, "build", keep)
    monkeypatch.setattr(chat_tune, "save_result", lambda *_: None)   # which grows the vocabulary
    chat_tune.main(cfg)
    (chat, before), = built
    moved = {name for name, p in chat.state_dict().items() if not torch.equal(p, before[name])}
    assert all(any(name.startswith(part) for part in parts) for name in moved)
    assert all(any(name.startswith(part) for name in moved) for part in parts)


def test_video_tuning_saves_the_gates_it_found_beside_what_it_learned(world, llava, tmp_path):
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava))
    digest = digest_of(world / "branch.pth")
    assert read_metadata(tmp_path / "chat.bin") == {"tokens": "branch", "branch": digest}
    assert read_file(tmp_path / "chat.bin").keys() >= {
        "model.vision_tower.balance2", "model.vision_tower.btadapter_S_layers.0.mlp.fc1.weight",
        "model.mm_projector.weight", "model.video_start_end.weight"}


def test_video_tuning_of_the_shipped_weights_learns_eight_clips_by_heart(world, tmp_path, capsys):
    shipped = {name: os.path.join(TINY, file) for name, file in (
        ("clip", "clip"), ("llm", "llava"), ("branch", "branch.pth"))}
    chat_tune.main(tuning(world, tmp_path, steps=60, batch_size=8, drop_path=0.0, **shipped,
                          eval_annotations=str(world / "talks.jsonl")))
    losses = [row["loss"] for row in log_of(tmp_path) if "loss" in row]
    assert losses[-1] < 0.2 * losses[0]
    assert log_of(tmp_path)[-1]["temporal"] > 50   # blind to order, half would be the most
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
    assert training.load_checkpoint(tmp_path / "last.pth")["step"] == 1
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
    monkeypatch.setattr(chat_tune, "TOY", chat_tune.TOY | dict.fromkeys(
        ("annotations", "eval_annotations"), "out/shapes/talks.jsonl") | {"batch_size": 4, "steps": 2})
    chat_tune.main(chat_tune.Config("video", workers=0, device="cpu"))
    answers, path = capsys.readouterr().out.splitlines()
    assert answers.startswith("video, branch tokens: temporal questions ")
    assert path == "out/chat/chat.bin: `python chat.py --chat out/chat/chat.bin` talks with it"
    with pytest.raises(UserError, match="--clip, --llm, --annotations, --root: needed"):
        chat_tune.main(chat_tune.Config("projector"))


def test_exact_answers_are_what_greedy_decoding_says(world):
    """The shipped model is asked; what it says must count as right, and anything else as wrong."""
    chat = open_chat(TINY).load()
    dataset = ConversationDataset(str(world / "talks.jsonl"), str(world), 8, 64)
    for said_so in (True, False):
        for i in range(len(dataset)):
            with torch.no_grad():
                prompt, _ = prompt_ids(chat.tokenizer, [("Where is it?", None)])
                embeds = chat.splice(prompt, chat.embed_video(dataset[i][0][None])[0])
            ids = generate(chat.llm, embeds=embeds[None], max_new_tokens=40, stop_ids=chat.tokenizer.stop_ids)
            said = "".join(stream_text(chat.tokenizer, ids)).strip()
            dataset.conversations[i] = [("Where is it?", said if said_so else said + " It is.")]
        cfg = chat_tune.Config("video", template="vicuna_v1", workers=0)
        found = chat_tune.exact_answers(cfg, chat, dataset, CPU)
        assert found == {"temporal": 100 * said_so}


def test_an_answer_beyond_the_context_is_wrong_and_a_batch_of_these_stops_training(world, llava, tmp_path):
    rows = [json.loads(line) for line in (world / "talks.jsonl").read_text().splitlines()[:4]]
    for i, row in enumerate(rows):
        row["conversations"][0]["value"] = "word " * 600
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = tuning(world, tmp_path / "out", llm=llava, steps=1, annotations=str(tmp_path / "2.jsonl"))
    chat_tune.main(cfg)   # one of four is as it was
    assert log_of(cfg.out)[0]["loss"] > 0
    cfg = dataclasses.replace(cfg, annotations=str(tmp_path / "3.jsonl"), out=str(tmp_path / "none"))
    cfg = chat_tune.complete(cfg)
    with pytest.raises(UserError, match="step 0: no answer of its 4 conversations .* context of 512 tokens"):
        chat_tune.main(cfg)
    assert not (tmp_path / "none" / "chat.bin").exists()
    chat = chat_tune.build(cfg)
    dataset = ConversationDataset(cfg.annotations, str(world), 4, 32)
    assert chat_tune.exact_answers(cfg, chat, dataset, CPU) == {"temporal": 0}


# ----------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, message", [
    ({"stage": "song"}, "--stage song"), ({"tokens": "all"}, "--tokens all"), ({"llm": "nowhere"}, "nowhere"),
    ({"branch": ""}, "--branch"), ({"eval_only": True}, "--eval_annotations"), ({"clip": None}, "--clip"),
    ({"batch_size": 9}, "has only 8 rows")])
def test_chat_tune_refuses_what_it_cannot_use(world, llava, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        chat_tune.main(dataclasses.replace(tuning(world, tmp_path / "out", llm=llava), **change))


def test_evaluation_alone_leaves_the_log_of_a_training_run(world, llava, tmp_path):
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava))
    before = log_of(tmp_path)
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava, eval_only=True,
                          eval_annotations=str(world / "talks.jsonl")))
    assert log_of(tmp_path) == before
