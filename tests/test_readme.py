"""What the README and runs/ print can be typed: flags exist, files exist, and the short commands run."""
import os
import re
import shlex
import subprocess
import sys

import pytest

import chat
import chat_tune
import data
import eval_retrieval
import pretrain
import search
from bench import __main__ as bench
from plumbing.cli import parse
from toy import __main__ as toy
from toy import ablate
from weights import __main__ as weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGE = dict(positional=["stage"])
SCRIPTS = {   # as it is typed: its file, its module, how it is parsed
    "chat.py": ("chat.py", chat, chat.FLAGS), "chat_tune.py": ("chat_tune.py", chat_tune, {}), "pretrain.py": ("pretrain.py", pretrain, {}),
    "eval_retrieval.py": ("eval_retrieval.py", eval_retrieval, {}), "search.py": ("search.py", search, search.FLAGS),
    "data.py": ("data.py", data, dict(positional=["video"])), "-m toy": ("toy/__main__.py", toy, STAGE),
    "-m toy.ablate": ("toy/ablate.py", ablate, STAGE), "-m bench": ("bench/__main__.py", bench, STAGE),
    "-m weights": ("weights/__main__.py", weights, weights.FLAGS)}


def commands():
    """Every command line of this repository's scripts in code blocks of the documents, in docstrings and in runs/."""
    for name in ("README.md", "docs/numbers.md", *(file for file, _, _ in SCRIPTS.values()), "runs/tiny.sh", "runs/ablate.sh"):
        with open(os.path.join(ROOT, name)) as f:
            text = re.sub(r"\\\n\s*", "", f.read())   # joined lines
        for line in text.splitlines():
            found = re.search(r"(?:^\s*|[ |/])(?:python|torchrun [^.]*?|\$PYTHON|train) (?:-m torch[^ ]* )?(\w+\.py|-m [\w.]+)( .*|$)", line.split("   #")[0])
            if found and found[1] in SCRIPTS and "`" not in line:
                rest = found[2] + (" --clip c --root r" if re.match(r"\s*train ", line) else "")
                yield name, found[1], re.sub(r"\s(\||&&|->|>|<|#).*", "", rest.replace('"$@"', "").replace("$seed", "0").replace('"$study"', "losses"))


@pytest.mark.parametrize("where, script, rest", list(commands()))
def test_every_printed_command_has_flags_that_exist(where, script, rest):
    _, module, flags = SCRIPTS[script]
    parse(module.Config, shlex.split(rest), **flags)


def test_the_search_for_commands_finds_them():
    found = list(commands())
    assert len(found) >= 20 and {script for _, script, _ in found} == set(SCRIPTS)


def test_files_that_the_readme_names_exist():
    with open(os.path.join(ROOT, "README.md")) as f:
        text = f.read()
    names = set(re.findall(r"\]\(((?!http)[^)]+)\)", text)) | set(re.findall(r"`(\w+\.py|assets/[\w.]+|runs/\w+\.sh)`", text))
    assert len(names) > 12
    for name in names:
        assert os.path.exists(os.path.join(ROOT, name)), name


def test_the_tiny_weights_are_small():
    total = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(os.path.join(ROOT, "weights", "tiny")) for name in names if not name.startswith("quantised_"))
    assert 1e6 < total < 12e6


def ask(*command, questions=None):
    return subprocess.run([sys.executable, os.path.join(ROOT, "chat.py"), *command], input=questions or "", capture_output=True, text=True, cwd="/")


def test_the_shipped_weights_answer_about_the_shipped_clip():
    """A static and a temporal question, as the README's first command asks them."""
    with open(os.path.join(ROOT, "assets", "sample.answers")) as f:
        expected = f.read()
    done = ask(questions="What colour is the shape?\nWhat does the shape do?\n")
    assert (done.returncode, done.stdout) == (0, expected)
    assert "sample.mp4" in done.stderr and "weights/tiny" in done.stderr and len(done.stderr.splitlines()) == 1
    assert ask("-q", "What colour is the shape?").stdout == expected.splitlines(keepends=True)[0]
