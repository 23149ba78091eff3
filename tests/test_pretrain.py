"""Pretraining learns, any number of processes takes the same steps, and nothing that stops it loses work."""
import dataclasses
import glob
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import pretrain
from clip import load_clip
from model import Branch, Pretraining, VideoEncoder, load_branch, mbca_loss, tube_mask, vtc_loss
from plumbing import training
from plumbing.cli import UserError
from plumbing.weightfile import read_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}


def pretraining(world, out, **options):
    defaults = {"clip": "clip", "annotations": "captions.jsonl", "root": ""}
    return pretrain.Config(**{name: str(world / value) for name, value in defaults.items()} | {
        "out": str(out), "steps": 6, "batch_size": 4, "depth": 2, "lr": 1e-5, "workers": 0, "save_every": 2,
        "log_every": 1, "min_area": 0.9, "anneal": True, "num_frames": 4, "together": 2,
        "device": "cpu"} | options)


def one_broken(world, tmp_path):
    """-> annotations with a video that is not there."""
    text = (world / "captions.jsonl").read_text().replace('"1.mp4"', '"gone.mp4"')
    (tmp_path / "a.jsonl").write_text(text)
    return str(tmp_path / "a.jsonl")


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def flags_of(cfg):
    return [f"--no-{name}" if value is False else f"--{name}" if value is True else f"--{name}={value}"
            for name, value in dataclasses.asdict(cfg).items() if value is not None]


def wait_for_rows(log, rows):
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= rows) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def forked():
    """run(config, **what else tests/forked.py understands) -> its answer."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "tests", "forked.py")], env=ENV, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(config, **job):
        process.stdin.write(json.dumps({"config": dataclasses.asdict(config), **job}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield run
    process.stdin.close()
    process.wait()


def same_run(one, other):
    """Two folders of --out that hold the same run: log, weights, optimizer, to the bit."""
    assert log_of(one) == log_of(other)
    a, b = (training.load_checkpoint(os.path.join(folder, "last.pth")) for folder in (one, other))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(t, b["state_dict"][name]) for name, t in a["state_dict"].items())
    a, b = a["optimizer"]["state"], b["optimizer"]["state"]
    assert a.keys() == b.keys()
    for i, state in a.items():
        assert all(torch.equal(torch.as_tensor(t), torch.as_tensor(b[i][key])) for key, t in state.items())
    for name in ("branch.pth", "branch_best.pth"):
        x, y = (os.path.join(folder, name) for folder in (one, other))
        assert os.path.exists(x) == os.path.exists(y)
        if os.path.exists(x):
            x, y = read_file(x), read_file(y)
            assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


# ------------------------------------------------------------------------------------------------ learning
def test_pretrain_overfits_eight_clips(world, tmp_path):
    pretrain.main(pretraining(world, tmp_path, steps=60, batch_size=8, mask_ratio=0.0, lr=3e-5))
    log = log_of(tmp_path)
    assert log[-1]["vtc"] < 0.4 * log[0]["vtc"]
    assert Image.open(tmp_path / "curve.png").size[0] > 400


def test_a_finished_run_can_be_extended_and_other_settings_are_refused(world, tmp_path):
    pretrain.main(pretraining(world, tmp_path, steps=2))
    pretrain.main(pretraining(world, tmp_path, steps=3))
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3]
    with pytest.raises(UserError, match="--lr 1e-05, not 0.5"):
        pretrain.main(pretraining(world, tmp_path, lr=0.5))


def test_pretrain_writes_the_released_key_names_and_they_load(world, tmp_path):
    pretrain.main(pretraining(world, tmp_path, steps=1))
    names = training.load_checkpoint(tmp_path / "last.pth")["state_dict"].keys()
    assert names >= {"backbone.balance1", "backbone.btadapter_T_layers.1.temporal_fc.bias",
                     "extra_proj.1.bias"}
    clip, _ = load_clip(str(world / "clip"))
    assert load_branch(tmp_path / "last.pth", clip).depth == 2


def test_broken_videos_are_skipped_and_counted(world, tmp_path):
    pretrain.main(pretraining(world, tmp_path / "out", steps=4, annotations=one_broken(world, tmp_path)))
    assert log_of(tmp_path / "out")[-1]["skipped"] == 2   # two epochs of two steps


def test_a_run_in_which_no_two_clips_could_be_contrasted_is_no_success(world, tmp_path):
    text = "".join(json.dumps({"video": f"{name}.mp4", "caption": "x"}) + "\n" for name in (0, *"abcdefg"))
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match="nothing was learned; 14 clips were left out"):
        pretrain.main(pretraining(world, tmp_path / "out", steps=2, batch_size=8,
                                  annotations=str(tmp_path / "a.jsonl")))


def test_released_schedule_rises_over_half_an_epoch_and_ends_at_97_percent():
    share = [pretrain.lr_share(s, 1000, 1000, False) for s in range(1000)]
    assert share[0] == 0.05 and share[499] == 1 and share[999] == pytest.approx(0.970, abs=1e-3)


# ------------------------------------------------------------------------------------ gradients, processes
def gradients(world, checkpointed):
    """One backward pass over eight clips of noise, with stochastic depth -> {name: gradient}."""
    clip, _ = load_clip(str(world / "clip"))
    torch.manual_seed(0)
    branch = Branch.beside(clip, 3, drop_path=0.5, checkpointed=checkpointed)
    for name, p in branch.named_parameters():
        if "temporal_fc" in name:   # zero at first, which would hide everything behind it
            torch.nn.init.normal_(p, std=0.1)
    model = Pretraining(VideoEncoder(clip.float(), branch))
    kept = tube_mask(8, 16, 0.7)
    ids = torch.tensor([[0, i, clip.config.vocab_size - 1] for i in range(8)])
    states, text = model.see(torch.randint(256, (8, 4, 3, 32, 32), dtype=torch.uint8), ids, kept)
    video, patches, mbta = model(states, kept)
    (vtc_loss(video, text) + 0.1 * mbca_loss(patches, text) + 0.8 * mbta).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(one, other):
    largest = max(g.abs().max() for g in one.values())
    assert one.keys() == other.keys() and largest > 0
    for name, g in one.items():   # a floor, because the gradient of a key's bias is rounding noise
        assert (g - other[name]).abs().max() <= 1e-5 * g.abs().max() + 1e-7 * largest, name


def test_a_checkpointed_branch_has_the_same_gradient(world):
    assert_same_gradients(gradients(world, False), gradients(world, True))


@pytest.fixture(scope="module")
def take_steps(world, forked, tmp_path_factory):
    """take_steps(steps, size) -> (last.pth, log), with masks, without stochastic depth; each is made once."""
    folder, known = tmp_path_factory.mktemp("steps"), {}

    def run(steps, size):
        if (steps, size) not in known:
            out = folder / f"{steps}_{size}"
            cfg = pretraining(world, out, steps=steps, batch_size=8, drop_path=0.0, clip_norm=1e9, lr=2e-6,
                              save_every=100)
            answer = forked(cfg, size=size)
            assert answer["codes"] == [0] * size, answer["stderr"]
            known[steps, size] = training.load_checkpoint(out / "last.pth"), log_of(out)
        return known[steps, size]
    return run


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_take_the_steps_of_one(take_steps, steps, size):
    """The gradient: Adam's first moment after one step is a tenth of it. The weights: after 20 steps."""
    (one, log), (several, other_log) = take_steps(steps, 1), take_steps(steps, size)
    for a, b in zip(log, other_log, strict=True):
        for name in ("loss", "vtc", "mbca", "mbta"):
            assert b[name] == pytest.approx(a[name], rel=1e-5)
    if steps == 1:
        assert_same_gradients(*({i: state["exp_avg"] for i, state in saved["optimizer"]["state"].items()}
                                for saved in (one, several)))
    moved = 0
    for name, weight in one["state_dict"].items():
        if not name.endswith("k_proj.bias"):   # rounding noise, which Adam makes as large as any gradient
            assert (weight - several["state_dict"][name]).abs().max() < 1e-4, name
        if name.endswith("temporal_fc.weight"):
            moved = max(moved, weight.abs().max())
    assert moved > (1e-3 if steps == 20 else 1e-5)   # from zero: far enough to mean something


# ----------------------------------------------------------------------------------------- nothing is lost
def watched(world, out, **options):
    """A run that saves, logs and evaluates often."""
    return pretraining(world, out, **{"steps": 8, "save_every": 1, "num_frames": 2, "eval_every": 4,
                                      "eval_annotations": str(world / "captions.jsonl")} | options)


@pytest.fixture(scope="module")
def straight(world, forked, tmp_path_factory):
    """-> folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("straight") / "out"
    answer = forked(watched(world, out))
    assert answer["codes"] == [0], answer["stderr"]
    return out


def test_twenty_kills_at_random_moments_change_nothing(world, straight, forked, tmp_path):
    """Five runs, each killed four times: some milliseconds after its log has grown, wherever that is."""
    moments, killed = random.Random(0), 0
    for i in range(5):
        cfg, rows = watched(world, tmp_path / str(i)), 0
        for _ in range(4):
            rows = min(rows + moments.choice([0, 1, 2, 3]), 9)   # of 10
            answer = forked(cfg, signal=signal.SIGKILL, rows=rows, after=moments.uniform(0, 0.2))
            killed += answer["codes"] == [-signal.SIGKILL]
        answer = forked(cfg)
        assert answer["codes"] == [0], answer["stderr"]
        same_run(straight, cfg.out)
        assert not glob.glob(os.path.join(cfg.out, "*.tmp"))
    assert killed >= 10   # the others came too late, to a run that had ended


def test_two_processes_with_a_broken_video_stop_at_sigterm_and_go_on(world, forked, tmp_path):
    """All that they must agree on: how many clips a step has, when to stop, when to evaluate."""
    options = {"save_every": 100, "annotations": one_broken(world, tmp_path)}
    straight, stopped = (watched(world, tmp_path / name, **options) for name in ("straight", "stopped"))
    answer = forked(straight, size=2)
    assert answer["codes"] == [0, 0], answer["stderr"]
    assert forked(stopped, size=2, signal=signal.SIGTERM, rows=3)["codes"] == [143, 143]
    assert forked(stopped, size=2)["codes"] == [0, 0]
    same_run(straight.out, stopped.out)
    skipped = [row["skipped"] for row in log_of(straight.out) if "skipped" in row]
    assert skipped[-1] == 2 * 4   # in four epochs: it, and one of the other process


def test_a_step_for_which_a_process_has_no_video_is_passed_by_all(world, forked, tmp_path):
    cfg = pretraining(world, tmp_path / "out", batch_size=2, steps=8, annotations=one_broken(world, tmp_path))
    answer = forked(cfg, size=2)
    assert answer["codes"] == [0, 0], answer["stderr"]
    saved = training.load_checkpoint(tmp_path / "out" / "last.pth")
    assert len(log_of(cfg.out)) == 6   # eight clips make four steps an epoch, one of which is passed by
    assert saved["step"] == 8 and saved["skipped"] == 2 * 2


def test_a_gradient_that_is_no_number_leaves_the_last_checkpoint(world, tmp_path, monkeypatch):
    pretrain.main(pretraining(world, tmp_path, steps=2))
    before = (tmp_path / "last.pth").read_bytes()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: torch.tensor(float("inf")))
    with pytest.raises(UserError, match="step 2: the loss is [0-9.]+, the gradient inf; videos: "):
        pretrain.main(pretraining(world, tmp_path, steps=4))
    assert (tmp_path / "last.pth").read_bytes() == before


def test_a_checkpoint_in_one_precision_goes_on_in_another(world, tmp_path):
    for precision, steps in (("fp32", 1), ("bf16", 2), ("fp32", 3)):
        pretrain.main(pretraining(world, tmp_path, steps=steps, precision=precision))
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("number", [1, 2, 5, 6, 7])   # branch.pth, last.pth; then with branch_best.pth
def test_a_kill_in_the_middle_of_a_checkpoint_changes_nothing(world, straight, forked, tmp_path, number):
    cfg = watched(world, tmp_path / "out")
    assert forked(cfg, half_save=number)["codes"] == [-signal.SIGKILL]
    assert len(glob.glob(os.path.join(cfg.out, "*.tmp"))) == 1
    assert forked(cfg)["codes"] == [0]
    same_run(straight, cfg.out)
    assert not glob.glob(os.path.join(cfg.out, "*.tmp"))


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_and_the_same_command_goes_on(world, straight, forked, tmp_path, workers):
    cfg = watched(world, tmp_path / "out", workers=workers, save_every=1000)
    answer = forked(cfg, signal=signal.SIGTERM, rows=3)
    assert answer["codes"] == [143], answer["stderr"]
    assert 0 < training.load_checkpoint(tmp_path / "out" / "last.pth")["step"] < 8
    assert forked(cfg)["codes"] == [0]
    same_run(straight, cfg.out)


def test_a_restart_by_torchrun_goes_on_from_the_last_checkpoint(world, tmp_path):
    """One of two processes is killed; torchrun starts both again. The two rounds must not share a store."""
    cfg = pretraining(world, tmp_path / "out", steps=30, save_every=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "--max_restarts", "1", os.path.join(ROOT, "pretrain.py"), *flags_of(cfg)]
    env = {**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as run:
        try:
            wait_for_rows(tmp_path / "out" / "log.jsonl", 3)
            children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True).stdout.split()
            os.kill(int(children[-1]), signal.SIGKILL)
            errors = run.communicate(timeout=120)[1]
        finally:
            run.terminate()
    assert run.returncode == 0, errors
    assert errors.count("pretrain: steps ") == 2 and errors.count("pretrain: steps 0 to 30") == 1
    assert [row["step"] for row in log_of(tmp_path / "out")] == list(range(1, 31))


def test_a_loss_that_is_no_number_names_the_videos_and_leaves_the_checkpoint(world, tmp_path, monkeypatch):
    pretrain.main(pretraining(world, tmp_path, steps=2))
    before = (tmp_path / "last.pth").read_bytes()
    monkeypatch.setattr(pretrain, "vtc_loss", lambda video, text: video.sum() * float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan, .*; videos: (\d.mp4, ){3}\d.mp4"):
        pretrain.main(pretraining(world, tmp_path, steps=4))
    assert (tmp_path / "last.pth").read_bytes() == before


def test_out_of_memory_says_what_fits(world, tmp_path, monkeypatch):
    def full(video, text):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(pretrain, "vtc_loss", full)
    with pytest.raises(UserError, match="6 clips a GPU: take --checkpointed or more GPUs, or --batch_size 2"):
        pretrain.main(pretraining(world, tmp_path, batch_size=6))


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(world, tmp_path, forked):
    cfg = pretraining(world, tmp_path / "out", steps=2)
    assert forked(cfg)["codes"] == [0]
    before = (tmp_path / "out" / "last.pth").read_bytes()
    answer = forked(dataclasses.replace(cfg, steps=4), file_limit=len(before) // 2)
    assert answer["codes"] == [2] and "cannot write" in answer["stderr"].splitlines()[-1], answer["stderr"]
    assert (tmp_path / "out" / "last.pth").read_bytes() == before
    assert not glob.glob(str(tmp_path / "out" / "*.tmp"))
    assert forked(dataclasses.replace(cfg, steps=4))["codes"] == [0]


def test_the_branch_of_the_best_evaluation_is_kept(world, tmp_path, monkeypatch):
    recalls = iter([0, 10, 0, 30, 0, 20])   # mean-pooled CLIP, branch, at each of three evaluations
    monkeypatch.setattr(pretrain, "retrieval_metrics", lambda similarity: {"R@1": next(recalls)})
    for steps in (2, 3):
        pretrain.main(watched(world, tmp_path / str(steps), steps=steps, eval_every=1, anneal=False,
                              **({} if steps == 3 else {"eval_annotations": ""})))
    names = ("3/branch_best.pth", "2/branch.pth", "3/branch.pth")
    best, second, third = (read_file(tmp_path / name) for name in names)
    assert all(torch.equal(best[name], second[name]) for name in best)
    assert not all(torch.equal(best[name], third[name]) for name in best)
    assert [row["R@1 branch"] for row in log_of(tmp_path / "3") if "R@1 branch" in row] == [10, 30, 20]


# ------------------------------------------------------------------------------------------------- it ends
@pytest.mark.parametrize("size", [1, 2])
def test_an_error_in_the_loss_ends_the_program_though_a_loader_is_at_work(world, tmp_path, size):
    """No UserError: a GPU out of memory, say, or a mistake in what a reader has changed."""
    script = tmp_path / "changed.py"
    script.write_text("""import pretrain
from plumbing import cli

def loss(*features):
    raise RuntimeError("a mistake")

pretrain.vtc_loss = loss
cli.run(pretrain.main, cli.start(pretrain.Config))
""")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
    command = [sys.executable, *(torchrun if size > 1 else []), str(script),
               *flags_of(pretraining(world, tmp_path / "out", workers=1))]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 1 and "RuntimeError: a mistake" in done.stderr, done.stderr
    assert "DataLoader worker" not in done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_is_for_the_script_to_answer(world, tmp_path, number, code):
    """Its loader's process gets the signal too, and does not die of it."""
    cfg = pretraining(world, tmp_path / "out", workers=1, steps=100_000, save_every=100_000)
    with subprocess.Popen([sys.executable, os.path.join(ROOT, "pretrain.py"), *flags_of(cfg)], env=ENV,
                          stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        wait_for_rows(tmp_path / "out" / "log.jsonl", 1)
        os.killpg(run.pid, number)
        errors = run.communicate(timeout=120)[1]
    assert run.returncode == code and "KeyboardInterrupt" not in errors and "DataLoader" not in errors, errors
    assert ("pretrain.py: interrupted" in errors) == (number == signal.SIGINT)
    assert os.path.exists(tmp_path / "out" / "last.pth") == (number == signal.SIGTERM)


# -------------------------------------------------------------------------------------- recipes, precision
def test_recipes_say_what_is_not_said():
    def said(recipe, **given):
        cfg = pretrain.complete(pretrain.Config(recipe, "clip", "annotations", "root", **given))
        return cfg.batch_size, cfg.text_length, cfg.mbca_weight, cfg.mbta_weight
    assert said("released") == said(None) == (416, 64, 0.1, 0.8)
    assert said("paper") == (640, 32, 1, 1) and said("paper", batch_size=8) == (8, 32, 1, 1)


def test_without_a_flag_the_toy_world_is_learned(world, tmp_path, monkeypatch, capsys):
    """Two short steps, on clips of the test world in the place of the rendered ones."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train_captions.jsonl: not there; `python -m toy render` makes it"):
        pretrain.main(pretrain.Config())
    os.symlink(os.path.join(ROOT, "weights"), "weights")
    os.makedirs("out")
    os.symlink(world, "out/shapes")
    monkeypatch.setitem(pretrain.RECIPES, "toy", pretrain.RECIPES["toy"] | dict.fromkeys(
        ("annotations", "eval_annotations"), "out/shapes/captions.jsonl") | {"batch_size": 4, "steps": 2})
    pretrain.main(pretrain.Config(workers=0, device="cpu"))
    found, path = capsys.readouterr().out.splitlines()
    assert found.startswith("R@1 branch ") and found.endswith(" %, twins mean-pooled CLIP 50.0 %")
    assert path.startswith("out/branch/branch.pth: ") and "chat.py --branch out/branch/branch.pth`" in path


def test_the_recipe_sets_each_group_of_learning_rates(world, tmp_path):
    rates = {}
    for recipe in ("released", "paper"):
        pretrain.main(pretraining(world, tmp_path / recipe, steps=1, recipe=recipe, text_length=8))
        groups = training.load_checkpoint(tmp_path / recipe / "last.pth")["optimizer"]["param_groups"]
        rates[recipe] = {group["factor"]: len(group["params"]) for group in groups}
    assert rates["paper"].keys() == {1} and rates["released"].keys() == {10, 100}
    assert rates["released"][100] == 2 * 12 + 2   # two temporal layers (attention 8, norm 2, fc 2), two gates


def test_half_precision_halves_the_frozen_towers_and_nothing_that_learns(world, tmp_path, monkeypatch):
    made = []

    class Kept(Pretraining):
        def __init__(self, encoder):
            super().__init__(encoder)
            made.append(self)
    monkeypatch.setattr(pretrain, "Pretraining", Kept)
    for name in ("fp32", "bf16"):
        pretrain.main(pretraining(world, tmp_path / name, steps=4, precision=name))
    model = made[1]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert {p.dtype for p in model.encoder.clip.vision_model.encoder.parameters()} == {torch.bfloat16}
    for a, b in zip(log_of(tmp_path / "fp32"), log_of(tmp_path / "bf16"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)   # at a temperature of 0.01, without training


# ----------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, message", [
    ({"annotations": "nowhere.jsonl"}, "nowhere.jsonl"), ({"clip": "nowhere"}, "nowhere"),
    ({"eval_annotations": "nowhere.jsonl"}, "nowhere.jsonl"), ({"root": None}, "--root: needed"),
    ({"anneal": False, "steps": 11}, "at zero after 5"),
    ({"batch_size": 3}, "--batch_size 3"), ({"batch_size": 400}, "has only 8 clips")])
def test_pretrain_refuses_what_it_cannot_use(world, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        pretrain.main(dataclasses.replace(pretraining(world, tmp_path / "out"), **change))


def test_a_foreign_file_in_the_place_of_the_checkpoint_is_refused_and_kept(world, tmp_path):
    (tmp_path / "last.pth").write_bytes(b"precious")
    for message in ("other files than those of a run", "last.pth: not a checkpoint"):
        with pytest.raises(UserError, match=message):
            pretrain.main(pretraining(world, tmp_path))
        assert (tmp_path / "last.pth").read_bytes() == b"precious"
        (tmp_path / "run.lock").touch()


def test_an_out_folder_that_is_a_file_is_one_line(world, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot make this folder"):
        pretrain.main(pretraining(world, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_the_command_line_ends_in_one_line_and_exit_code_2(world, tmp_path):
    flags = ["--clip", "nowhere", "--annotations", "a", "--root", "r", "--out", str(tmp_path)]
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "nowhere" in done.stderr
