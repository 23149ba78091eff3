"""The house keeps its shape: which files stand where, who imports whom, how long a line is."""
import ast
import glob
import os
import warnings

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
METHOD = {"model", "clip", "llm", "data", "linvt", "metrics"}
SCRIPTS = {"pretrain", "chat_tune", "chat", "search", "eval_retrieval", "eval_qa", "eval_grounding"}
FOLDERS = {"plumbing", "toy", "bench", "weights"}
BUDGETS = {   # lines that a file aims at; to pass them is a reason to look, not to squeeze
    "model.py": 460, "clip.py": 320, "llm.py": 450, "data.py": 310, "metrics.py": 150, "pretrain.py": 240,
    "chat_tune.py": 270, "eval_retrieval.py": 160, "eval_grounding.py": 160, "eval_qa.py": 340,
    "chat.py": 290, "search.py": 90, "linvt.py": 160, "plumbing/cli.py": 120, "plumbing/training.py": 140, "plumbing/weightfile.py": 290,
    "plumbing/store.py": 80, "plumbing/video.py": 400, "plumbing/mp4.py": 111, "plumbing/quant.py": 240,
    "plumbing/memory.py": 60, "plumbing/pictures.py": 170, "plumbing/terminal.py": 60}
FILES = sorted(os.path.relpath(path, ROOT) for folder in ("", *FOLDERS)
               for path in glob.glob(os.path.join(ROOT, folder, "*.py")))


def text(file):
    with open(os.path.join(ROOT, file), encoding="utf-8") as f:
        return f.read()


def imported(file):
    """The modules of this repository that a file imports anywhere, by their first name."""
    names = set()
    for node in ast.walk(ast.parse(text(file))):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & (METHOD | SCRIPTS | FOLDERS)


def test_the_root_has_the_files_that_a_newcomer_looks_for_and_no_other():
    here = {file.removesuffix(".py") for file in FILES if "/" not in file}
    asked_for = {"model", "clip", "llm", "pretrain", "eval_retrieval", "chat_tune", "chat", "data"}
    assert asked_for <= here <= METHOD | SCRIPTS


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_stands_below_it(file):
    names = imported(file)
    assert not names & SCRIPTS   # a script is run, or called by a test
    if not file.startswith(("toy/", "bench/")):
        assert not names & {"toy", "bench"}
    if file.startswith("plumbing/"):
        assert names <= {"plumbing"}
    if file in ("clip.py", "llm.py", "data.py"):
        assert not names & {"clip", "llm", "data", "model"}


@pytest.mark.parametrize("file", FILES)
def test_no_line_is_longer_than_110_characters(file):
    assert [number for number, line in enumerate(text(file).splitlines(), 1) if len(line) > 110] == []


def test_files_over_their_budget_are_named():
    lines = {file: len(text(file).splitlines()) for file in FILES}
    over = [f"{file} {lines[file]} of {budget}" for file, budget in BUDGETS.items() if lines[file] > budget]
    if over:
        warnings.warn(f"lines over budget: {', '.join(over)}; {sum(lines.values())} in all")
