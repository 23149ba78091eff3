"""What README, docs and runs/ print can be typed: flags exist, files exist, the short commands and the Python
run."""
import contextlib
import glob
import io
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import chat
import chat_tune
import data
import eval_grounding
import eval_qa
import eval_retrieval
import model
import pretrain
import search
from bench import __main__ as bench
from plumbing.cli import UserError, parse
from toy import __main__ as toy
from toy import ablate, clock, scenes
from weights import __main__ as weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGE = dict(positional=["stage"])
SCRIPTS = {   # as it is typed: its module, how it is parsed
    "chat.py": (chat, chat.FLAGS), "chat_tune.py": (chat_tune, {}), "pretrain.py": (pretrain, {}),
    "eval_retrieval.py": (eval_retrieval, {}), "eval_grounding.py": (eval_grounding, {}),
    "eval_qa.py": (eval_qa, eval_qa.FLAGS), "search.py": (search, search.FLAGS),
    "data.py": (data, dict(positional=["video"])), "-m toy": (toy, STAGE), "-m toy.ablate": (ablate, STAGE),
    "-m toy.clock": (clock, {}), "-m toy.scenes": (scenes, STAGE),
    "-m bench": (bench, STAGE), "-m weights": (weights, weights.FLAGS)}
COMMAND = re.compile(r"(?:^\s*|[ |/])(?:python3?|torchrun [^.]*?|\$PYTHON|train) (?:-m torch[^ ]* )?"
                     r"(\w+\.py|-m [\w.]+)( .*|$)")


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def commands():
    """Every command line of this repository's scripts in the documents, in docstrings and in runs/."""
    texts = [os.path.relpath(path, ROOT) for pattern in ("*.md", "docs/*.md", "runs/*.sh")
             for path in sorted(glob.glob(os.path.join(ROOT, pattern)))]
    texts += [os.path.relpath(module.__file__, ROOT) for module, _ in SCRIPTS.values()]
    for name in texts:
        for line in re.sub(r"\\\n\s*", "", read(name)).splitlines():   # joined lines
            found = COMMAND.search(line.split("   #")[0])
            if found and found[1] in SCRIPTS and "`" not in line:
                rest = found[2] + (" --clip c --root r" if re.match(r"\s*train ", line) else "")
                rest = re.sub(r'"\$\{?@[^"]*"', "", rest).replace("$seed", "0").replace('"$study"', "losses")
                yield name, found[1], re.sub(r"\s(\||&&|->|>|<|#).*", "", rest)


@pytest.mark.parametrize("where, script, rest", list(commands()))
def test_every_printed_command_has_flags_that_exist(where, script, rest):
    module, flags = SCRIPTS[script]
    parse(module.Config, shlex.split(rest), **flags)


def test_the_search_for_commands_finds_them():
    found = list(commands())
    assert len(found) >= 40 and {script for _, script, _ in found} == set(SCRIPTS)
    assert {"README.md", "docs/chat.md", "docs/train.md", "docs/weights.md"} <= {where for where, *_ in found}


PAGES = ["README.md", "docs/chat.md", "docs/weights.md", "docs/train.md", "docs/numbers.md", "docs/qa.md"]


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_document_names_exist(name):
    named = re.findall(r"\]\(((?!http)[^)#]+)\)", read(name))   # links, and pictures
    named = {os.path.join(os.path.dirname(name), path) for path in named}
    named |= set(re.findall(r"`((?:plumbing/|toy/)?\w+\.py|assets/[\w.]+|runs/\w+\.sh)`", read(name)))
    assert named and [path for path in named if not os.path.exists(os.path.join(ROOT, path))] == []


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "chat.py"])
def test_a_script_without_what_it_needs_says_what_that_is(script):
    module, flags = SCRIPTS[script]
    try:
        parse(module.Config, [], **flags)
    except UserError as e:
        assert re.fullmatch(r"-{0,2}\w+: needed, \w.*", str(e))


def test_the_tree_names_every_file_at_the_root():
    tree = read("README.md").split("## The house")[1].split("```")[1]
    here = {os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "*.py"))}
    assert set(re.findall(r"\w+\.py", tree)) - {"test_house.py"} == here
    assert len(read("README.md").splitlines()) <= 162


def test_the_tiny_weights_are_small():
    files = [path for path in glob.glob(os.path.join(ROOT, "weights", "tiny", "**"), recursive=True)
             if os.path.isfile(path) and "quantised_" not in path]
    assert 1e6 < sum(map(os.path.getsize, files)) < 12e6


# ---------------------------------------------------------------------------------------- what runs
def block(marker):
    """The Python that follows a marker in the README."""
    return re.search(rf"<!-- {marker} -->\n```python\n(.*?)```", read("README.md"), re.S)[1]


def ask(*command, questions=None, folder="/"):
    return subprocess.run([sys.executable, os.path.join(ROOT, "chat.py"), *command], input=questions or "",
                          capture_output=True, text=True, cwd=folder)


def test_the_shipped_weights_answer_about_the_shipped_clip():
    """A static and a temporal question, as the README's first command asks them."""
    expected = read("assets/sample.answers")
    done = ask(questions="What colour is the shape?\nWhat does the shape do?\n")
    assert (done.returncode, done.stdout) == (0, expected)
    assert "sample.mp4" in done.stderr and "weights/tiny" in done.stderr and done.stderr.count("\n") == 2
    assert ask("-q", "What colour is the shape?").stdout == expected.splitlines(keepends=True)[0]
    shown = re.search(r"```\n(video .*\nweights .*\n).*\n.*\n> What does the shape do\?\n(.*)\n", read("README.md"))
    first, answer = shown.groups()
    assert answer == expected.splitlines()[1]
    assert ask("--no-cache", "-q", "What does the shape do?", folder=ROOT).stderr == first


def test_the_time_of_an_event_is_as_printed():
    command, shown = re.search(r"<!-- when -->\n```\npython chat.py (.*)\n```\n```\n(.*?)```", read("README.md"),
                               re.S).groups()
    done = ask("--no-cache", *shlex.split(command), folder=ROOT)
    assert done.stdout + "".join(done.stderr.splitlines(keepends=True)[2:]) == shown


def test_questions_that_work_get_answers():
    questions = re.findall(r'"([^"]+)"', re.search("These weights know (.*)", read("README.md"))[1])
    answers = ask(questions="\n".join(questions)).stdout.splitlines()
    assert answers == ["It moves left then up.", "It is orange.", "It is a big orange star that moves left then up."]


def test_the_python_of_the_readme_prints_what_stands_beside_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        exec(block("python").replace("torch.set_grad_enabled(False)", ""), {})
    shown = re.findall(r"^print\(.*# (.*)$", block("python"), re.M)
    for line, expected in zip(printed.getvalue().splitlines(), shown, strict=True):
        numbers = [[float(n) for n in re.findall(r"\d\.\d+", text)] for text in (line, expected)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-3) and (numbers[0] or line == expected)


def test_a_kind_of_video_tokens_is_one_class_and_one_entry(monkeypatch, capsys):
    scope = {"VideoTokens": model.VideoTokens}
    exec(block("kind"), scope)
    monkeypatch.setitem(model.VIDEO_TOKENS, "max", scope["MaxTokens"])
    with pytest.warns(UserWarning, match="chat.bin: tuned for branch, not for max"):
        chat.main(chat.Config(question=["What colour is the shape?"], tokens="max", cache=False, device="cpu"))
    out, err = capsys.readouterr()
    assert out.startswith("It is") and "16 video tokens" in err
