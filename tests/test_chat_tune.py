"""Chat tuning learns, resumes to the bit, takes the same steps in two processes, and refuses bad input."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import chat_tune
from data import ConversationDataset
from llm import generate, stream_text
from model import open_chat, prompt_ids
from plumbing import training
from plumbing.cli import UserError
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
    flags += [f"--{name}" for name, value in vars(cfg).items() if value is True]
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

    def keep(*given):
        chat = build(*given)
        built.append((chat, {name: p.clone() for name, p in chat.state_dict().items()}))
        return chat
    monkeypatch.setattr(chat_tune, "build", keep)
    monkeypatch.setattr(chat_tune, "save_result", lambda *_: None)   # which grows the vocabulary
    chat_tune.main(cfg)
    (chat, before), = built
    moved = {name for name, p in chat.state_dict().items() if not torch.equal(p, before[name])}
    assert all(any(name.startswith(part) for part in parts) for name in moved)
    assert all(any(name.startswith(part) for name in moved) for part in parts)


@pytest.mark.parametrize("stage", ["video", "video_paper"])
def test_a_llava_without_start_and_end_rows_stays_so(world, llava, tmp_path, stage):
    """As LLaVA-1.5."""
    shutil.copytree(llava, tmp_path / "llava")
    described = json.loads((tmp_path / "llava" / "config.json").read_text())
    (tmp_path / "llava" / "config.json").write_text(json.dumps({**described, "mm_use_im_start_end": False}))
    for folder, rows in ((llava, 2), (tmp_path / "llava", 0)):
        cfg = chat_tune.complete(tuning(world, tmp_path / "out", stage, llm=str(folder)))
        assert len(chat_tune.build(cfg, torch.float32).start_end) == rows


def test_in_half_precision_what_is_frozen_is_never_in_fp32(world, llava, tmp_path):
    """And learns as much: on a GPU that is the default, with which a 7B fits."""
    losses = {}
    for precision in ("fp32", "bf16"):
        cfg = tuning(world, tmp_path / precision, steps=3, llm=llava, precision=precision, drop_path=0.0,
                     eval_annotations=str(world / "talks.jsonl"))
        chat = chat_tune.build(chat_tune.complete(cfg), training.PRECISIONS[precision])
        kinds = {p.requires_grad: p.dtype for p in chat.parameters()}
        assert kinds == {True: torch.float32, False: training.PRECISIONS[precision]}
        chat_tune.main(cfg)
        losses[precision] = [row["loss"] for row in log_of(cfg.out) if "loss" in row]
    assert losses["bf16"] != losses["fp32"] and np.allclose(losses["bf16"], losses["fp32"], rtol=0.02)


def test_video_tuning_saves_the_gates_it_found_beside_what_it_learned(world, llava, tmp_path):
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava))
    assert read_metadata(tmp_path / "chat.bin") == {"tokens": "branch"}
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


def test_own_videos_are_learned_in_sentences_that_the_llama_never_said(world, tmp_path):
    """Four clips, each with a sentence: the folder answers with them, and its first weights with none."""
    said = ["I know that shape.", "There is an empty square.", "Only a ring blinks.", "The bar is on top."]
    rows = [json.dumps({"video": f"{i}.mp4", "question": "What happens?", "answer": text})
            for i, text in enumerate(said)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    options = {"annotations": str(tmp_path / "mine.jsonl"), "clip": None, "llm": None, "branch": None}
    cfg = tuning(world, tmp_path / "out", "video_lora", **options, weights=TINY, steps=60, lr=5e-3,
                 num_frames=None, eval_annotations=options["annotations"], log_every=100)
    cfg.checkpointed = False
    chat_tune.main(cfg)
    assert log_of(cfg.out)[-1] == {"step": 60, "all": 100.0}
    opened = open_chat(cfg.out)
    assert opened.tokens == "branch" and opened.description == "tuned for branch, with stage2"
    dataset = ConversationDataset(options["annotations"], str(world), 8, 64)
    for chat, right in ((opened.load(), [True] * 4), (open_chat(TINY).load(), [False] * 4)):
        pixels, talks, _ = zip(*(dataset[i] for i in range(4)))
        assert chat.exact(torch.stack(pixels), talks, "vicuna_v1") == right


def test_what_is_kept_for_a_branch_that_learns_are_pixels(world, llava, tmp_path, capfd):
    losses = []
    for features in ("", str(tmp_path / "features")):
        cfg = tuning(world, tmp_path / f"out{features[:1]}", steps=2, llm=llava, features=features)
        chat_tune.main(cfg)
        losses.append([row["loss"] for row in log_of(cfg.out)])
    assert losses[0] == losses[1] and "features: 8 videos of 0.0123 MB" in capfd.readouterr().err


def test_videos_that_are_not_there_are_counted_before_the_first_step(world, llava, tmp_path, capfd):
    cfg = tuning(world, tmp_path / "out", steps=1, llm=llava, annotations=one_broken(world, tmp_path))
    chat_tune.main(cfg)
    assert "1 of 8 videos are not there, the first is" in capfd.readouterr().err


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
            dataset.talks[i].turns = [("Where is it?", said if said_so else said + " It is.")]
        cfg = chat_tune.Config("video", template="vicuna_v1", workers=0)
        found = chat_tune.exact_answers(cfg, chat, dataset, CPU, torch.float32)
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
    chat = chat_tune.build(cfg, torch.float32)
    dataset = ConversationDataset(cfg.annotations, str(world), 4, 32)
    assert chat_tune.exact_answers(cfg, chat, dataset, CPU, torch.float32) == {"temporal": 0}


# ------------------------------------------------------------------------------------------- VTimeLLM's stages
def write_events(path, rows=8, **more):
    """Our own rows: two events in each clip, which lasts 2 s."""
    events = [{"start": 0.2, "end": 0.9, "text": "A shape moves."}, {"start": 1, "end": 1.7, "text": "it turns."}]
    path.write_text("".join(json.dumps({"video": f"{i}.mp4", "events": events} | more) + "\n"
                            for i in range(rows)))
    return str(path)


def write_features(folder, count=8, shape=(100, 16), dtype=np.float16):
    folder.mkdir()
    for i in range(count):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).normal(size=shape).astype(dtype))
    return str(folder)


@pytest.fixture(scope="session")
def timed(world, tmp_path_factory):
    """A folder: events.jsonl, features, and what the first two stages leave: align, boundaries."""
    folder = tmp_path_factory.mktemp("timed")
    write_events(folder / "events.jsonl", duration=2), write_features(folder / "features")
    chat_tune.main(tuning(world, folder / "align", "align", num_frames=None, steps=2))
    chat_tune.main(timing(folder, folder / "boundaries"))
    return folder


def timing(timed, out, stage="boundaries", weights="align", **options):
    """A Config of a stage with LoRA that goes on from a folder in `timed`."""
    return tuning(timed, out, stage, **{
        "clip": None, "llm": None, "branch": None, "num_frames": None, "weights": str(timed / weights),
        "annotations": str(timed / "events.jsonl"), "features": str(timed / "features"), "steps": 2, "lr": 1e-2,
        "rank": 4, "alpha": 8} | options)


def test_a_projector_begins_as_loud_as_words(world, tmp_path):
    cfg = chat_tune.complete(tuning(world, tmp_path, "align", num_frames=None))
    chat = chat_tune.build(cfg, torch.float32)
    size, words = chat.clip.config.image_size, chat.llm.model.embed_tokens.weight
    rows = chat.embed_video(torch.randint(0, 256, (8, 1, 3, size, size), dtype=torch.uint8))
    assert 0.7 < rows.norm(dim=-1).mean() / words.norm(dim=-1).mean() < 1.4


def adapter_in(folder):
    return read_file(folder / "adapter_model.safetensors")


def test_each_stage_of_vtimellm_leaves_a_folder_that_a_chat_and_the_next_stage_open(world, timed, capsys):
    out = timed / "moments"
    chat_tune.main(timing(timed, out, "moments", "boundaries"))
    assert f"`python chat.py --weights {out}` talks with it" in capsys.readouterr().out
    opened = open_chat(out)
    assert (opened.tokens, opened.description) == ("frame_cls", "with stage2 and stage3")
    before, same, new = map(adapter_in, (timed / "boundaries" / "stage2", out / "stage2", out / "stage3"))
    assert all(torch.equal(before[name], same[name]) for name in before)
    assert len(new) == 28 and all(t.any() and not torch.equal(t, same[name]) for name, t in new.items())
    saved = training.load_checkpoint(out / "last.pth")["state_dict"]
    assert len(saved) == 28 and all(".lora_" in name for name in saved)   # and nothing else
    assert os.path.samefile(out / "llava", world / "llama")
    with pytest.raises(UserError, match="has 2 adapters, and only --reuse goes on from there"):
        chat_tune.main(timing(timed, timed / "fourth", "moments", "moments"))


@torch.no_grad()
def test_what_was_trained_is_what_the_folder_answers_with(timed, tmp_path, monkeypatch):
    """Up to fp16, in which this LLaMA lies in its folder and is merged."""
    built, build = [], chat_tune.build
    monkeypatch.setattr(chat_tune, "build", lambda *given: built.append(build(*given)) or built[0])
    with torch.enable_grad():
        chat_tune.main(timing(timed, tmp_path, "moments", "boundaries"))
    video = torch.from_numpy(np.load(timed / "features" / "0.npy"))[None]
    chats = built[0].eval(), open_chat(tmp_path).load(), open_chat(timed / "boundaries").load()
    prompt = [prompt_ids(chats[0].tokenizer, [("When?", "Now.")], "vtimellm")]
    trained, merged, before = (chat.logits(video, prompt)[0] for chat in chats)
    assert (trained - merged).abs().max() < 1e-3 * trained.abs().max()
    assert (trained - before).abs().max() > 1e-2 * trained.abs().max()


def test_with_reuse_the_last_lora_goes_on_and_the_projector_may_be_tuned_along(timed, tmp_path):
    chat_tune.main(timing(timed, tmp_path / "still", "moments", "boundaries", reuse=True, lr=0, steps=1))
    chat_tune.main(timing(timed, tmp_path / "tuned", "moments", "boundaries", reuse=True, tune_projector=True))
    before, still, tuned = (adapter_in(path / "stage2") for path in (
        timed / "boundaries", tmp_path / "still", tmp_path / "tuned"))
    assert all(torch.equal(before[name], still[name]) for name in before)
    assert not any(torch.equal(before[name], tuned[name]) for name in before)
    ours, theirs = (open_chat(path).chat.video_tokens.mm_projector.weight for path in (
        tmp_path / "tuned", timed / "boundaries"))
    assert not torch.equal(ours, theirs) and not (tmp_path / "tuned" / "stage3").exists()
    with pytest.raises(UserError, match="has 0 adapters, and --reuse needs one"):
        chat_tune.main(timing(timed, tmp_path / "none", reuse=True))


def test_a_step_in_parts_and_in_two_processes_is_the_step_at_once(timed, tmp_path):
    """Conversations of different lengths: a mean of the parts' means would be another."""
    options = {"stage": "moments", "weights": "boundaries", "reuse": True, "steps": 1, "lora_dropout": 0.0,
               "clip_norm": 1e9}
    saved = []
    for name, more in (("whole", {}), ("parts", {"micro_batch": 3}), ("kept", {"checkpointed": False})):
        chat_tune.main(timing(timed, tmp_path / name, **options, **more))
        saved.append(training.load_checkpoint(tmp_path / name / "last.pth"))
    saved.append(torchrun(timing(timed, tmp_path / "two", micro_batch=1, **options), 2))
    losses = [log_of(tmp_path / name)[0]["loss"] for name in ("whole", "parts", "kept", "two")]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    whole, *others = ([state["exp_avg"] for state in s["optimizer"]["state"].values()] for s in saved)
    assert len(whole) == 28 and all(torch.equal(a, b) for a, b in zip(whole, others[1]))   # computed twice
    largest = max(m.abs().max() for m in whole)
    for other in others:
        for m, n in zip(whole, other, strict=True):
            assert (m - n).abs().max() < 1e-4 * m.abs().max() + 1e-6 * largest


def test_tuning_with_lora_goes_on_as_if_nothing_had_happened(timed, tmp_path, monkeypatch):
    """With dropout, and in parts."""
    options = {"steps": 4, "micro_batch": 2, "save_every": 1}
    chat_tune.main(timing(timed, tmp_path / "straight", **options))
    save = training.save_run

    def killed(*args):
        save(*args)
        raise RuntimeError("killed")
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
            patched.setattr(training, "save_run", killed)
            chat_tune.main(timing(timed, tmp_path / "broken", **options))
    chat_tune.main(timing(timed, tmp_path / "broken", **options))
    straight, resumed = (adapter_in(tmp_path / name / "stage2") for name in ("straight", "broken"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "broken")


# ---------------------------------------------------------------------------------------------- LinVT's stages
@pytest.fixture(scope="session")
def long(world, llava, tmp_path_factory):
    """A folder: weights in `chat`, long.jsonl about videos that follow each other, what the stage linvt leaves."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "chat").mkdir()
    for name, path in (("clip", world / "clip"), ("branch.pth", world / "branch.pth"), ("llava", llava)):
        os.symlink(path, folder / "chat" / name)
    rows = [json.loads(line) for line in (world / "talks.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):   # a batch of short ones, then one of longer ones
        del row["video"]
        row["videos"] = [f"{(i + j) % 8}.mp4" for j in range(2 if i < 4 else 3)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat_tune.main(condensing(world, folder, folder / "linvt"))
    return folder


def condensing(world, long, out, stage="linvt", weights="chat", **options):
    return tuning(world, out, stage, **{
        "clip": None, "llm": None, "branch": None, "num_frames": 8, "weights": str(long / weights), "steps": 2,
        "annotations": str(long / "long.jsonl"), "features": str(long / "features"), "rank": 4} | options)


def test_linvt_learns_alone_and_leaves_a_folder_that_answers(world, long):
    saved = training.load_checkpoint(long / "linvt" / "last.pth")["state_dict"]
    assert saved and all(name.startswith("video_tokens.linvt.") for name in saved)
    learned = open_chat(long / "linvt", "branch+linvt").load().video_tokens.linvt.state_dict()
    for name, t in learned.items():
        assert torch.equal(t, saved[f"video_tokens.linvt.{name}"].half().float())
    assert open_chat(long / "linvt").tokens == "branch"
    assert len(os.listdir(long / "features")) == 8   # each clip once


def test_it_learns_from_features_what_it_learns_from_frames(world, long, tmp_path):
    chat_tune.main(condensing(world, long, tmp_path, features="", steps=1, log_every=1))
    frames, features = (log_of(path)[0]["loss"] for path in (tmp_path, long / "linvt"))
    assert frames == pytest.approx(features, rel=1e-3)


def test_with_lora_it_goes_on_at_a_tenth_of_the_rate(world, long, tmp_path):
    with pytest.raises(UserError, match="lacks linvt.bin"):
        chat_tune.main(condensing(world, long, tmp_path, "linvt_lora"))
    chat_tune.main(condensing(world, long, tmp_path, "linvt_lora", "linvt", steps=1))
    saved = training.load_checkpoint(tmp_path / "last.pth")
    fast, slow = saved["optimizer"]["param_groups"]
    assert slow["lr"] == pytest.approx(fast["lr"] / 10) and len(fast["params"]) == 28
    assert len(slow["params"]) == len(saved["state_dict"]) - 28
    opened = open_chat(tmp_path, "branch+linvt")
    assert opened.description == "with stage2" and len(opened.adapters) == 1


def test_long_videos_of_several_lengths_in_one_batch_are_one_line(world, long, tmp_path):
    with pytest.raises(UserError, match="several lengths, in one batch"):
        chat_tune.main(condensing(world, long, tmp_path, batch_size=8))


# ---------------------------------------------------------------------------------------------------- features
def test_features_are_made_once_for_each_file_and_window(world, timed, tmp_path, monkeypatch):
    """What is learned from them is what is learned from frames, up to fp16."""
    annotations = tmp_path / "events.jsonl"
    text = "".join(open(write_events(annotations, 2, **more)).read() for more in (
        {}, {"video": "0.mp4", "window": [0, 1.9]}))   # the second: two rows about one window
    annotations.write_text(text)
    looked, sample = [], chat_tune.data.sample_frames

    def counted(path, *args, **options):
        looked.append((os.path.basename(path), options["window"]))
        return sample(path, *args, **options)
    monkeypatch.setattr(chat_tune.data, "sample_frames", counted)
    for name, features in (("frames", ""), ("made", "features"), ("read", "features")):
        chat_tune.main(timing(timed, tmp_path / name, steps=1, annotations=str(annotations), root=str(world),
                              features=features and str(tmp_path / features)))
    assert looked[4:] == [("0.mp4", None), ("1.mp4", None), ("0.mp4", [0, 1.9])]
    frames, made, read = (log_of(tmp_path / name)[0]["loss"] for name in ("frames", "made", "read"))
    assert made == read == pytest.approx(frames, rel=1e-3)


def test_videos_without_features_are_left_out_and_counted(timed, tmp_path, capfd):
    """Nothing is under --root: eight names, and seven released files."""
    features = write_features(tmp_path / "features", 7)
    chat_tune.main(timing(timed, tmp_path / "out", features=features, batch_size=8, steps=1))
    assert log_of(tmp_path / "out")[0]["skipped"] == 1
    assert f"skipped: {timed}/7.mp4: has no features in {features}" in capfd.readouterr().err


@pytest.mark.parametrize("count, shape, dtype, message", [
    (8, (80, 16), "e", r"\d.npy: features \(80, 16\) float16, needed are floats \(100, 16\)"),
    (8, (100, 16), "i", r"\d.npy: features .* int32, needed are floats"),
    (8, (100, 16), "O", r"\d.npy: holds no features"), (0, (), "e", "a batch without one readable video")])
def test_features_that_are_none_or_of_another_length_are_one_line(timed, tmp_path, count, shape, dtype, message):
    """Objects, too: to read them would be to run what they say."""
    features = write_features(tmp_path / "features", count, shape, dtype)
    with pytest.raises(UserError, match=message) as error:
        chat_tune.main(timing(timed, tmp_path / "out", features=features))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, message", [
    ({"stage": "boundaries"}, "--weights: needed"), ({"stage": "align", "num_frames": 8}, "in 100 frames"),
    ({"stage": "boundaries", "weights": "w"}, "--clip: not for the stage boundaries"),
    ({"weights": "w"}, "--weights: not for the stage video"),
    ({"reuse": True}, "--reuse: not for the stage video"), ({"stage": "video_lora"}, "--weights: needed"),
    ({"stage": "song"}, "--stage song"), ({"tokens": "all"}, "--tokens all"), ({"llm": "nowhere"}, "nowhere"),
    ({"branch": ""}, "--branch"), ({"eval_only": True}, "--eval_annotations"), ({"clip": None}, "--clip"),
    ({"batch_size": 9}, "has only 8 rows"),
    ({"tokens": "linvt"}, "--tokens linvt: not for the stage video"),
    ({"stage": "linvt", "clip": None, "llm": None, "weights": "w", "reuse": True}, "--reuse: not for the stage"),
    ({"stage": "linvt", "clip": None, "llm": None, "weights": "w", "tokens": "mean"}, "--tokens mean: not for")])
def test_chat_tune_refuses_what_it_cannot_use(world, llava, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        chat_tune.main(dataclasses.replace(tuning(world, tmp_path / "out", llm=llava), **change))


def test_evaluation_alone_leaves_the_log_of_a_training_run(world, llava, tmp_path):
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava))
    before = log_of(tmp_path)
    chat_tune.main(tuning(world, tmp_path, steps=1, llm=llava, eval_only=True,
                          eval_annotations=str(world / "talks.jsonl")))
    assert log_of(tmp_path) == before
