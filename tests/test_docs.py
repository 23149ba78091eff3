"""What docs/paper-vs-code.md says in code font exists: files, functions, classes, tables, flags, defaults."""
import ast
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENT = os.path.join(ROOT, "docs", "paper-vs-code.md")
FLAG = re.compile(r"(\w+\.py) --(\w[\w-]*)(=\S+| \S+)?")   # script.py --flag, --flag=default or --flag value
NAME = re.compile(r"((?:plumbing\.)?[a-z]\w*)((?:\.[A-Za-z_]\w*)+)")      # module.name, module.Class.method


def in_code_font(text):
    """Everything between backticks, without blocks of code."""
    return sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))))


def document():
    with open(DOCUMENT, encoding="utf-8") as f:
        return f.read()


def body(file):
    """The statements of a file of this repository; FileNotFoundError where there is none."""
    with open(os.path.join(ROOT, file), encoding="utf-8") as f:
        return ast.parse(f.read()).body


def defined(statements):
    """{name: its statement} of what a module or class defines itself; what it imports is not among them."""
    names = {}
    for s in statements:
        if isinstance(s, (ast.FunctionDef, ast.ClassDef)):
            names[s.name] = s
        elif isinstance(s, (ast.Assign, ast.AnnAssign)):
            for target in s.targets if isinstance(s, ast.Assign) else [s.target]:
                names |= {name.id: s for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def trouble(words):
    """What is wrong with one mention in the document; None if nothing is."""
    if "/" in words or re.fullmatch(r"\w+\.py", words):
        return None if os.path.isfile(os.path.join(ROOT, words)) else "no such file"
    if found := FLAG.fullmatch(words):
        script, flag, value = found.groups()
        if not os.path.isfile(os.path.join(ROOT, script)):
            return "no such file"
        names = defined(body(script))
        fields = defined(names["Config"].body)
        name = flag.removeprefix("no-")
        if name not in fields or name != flag and "bool" not in ast.unparse(fields[name].annotation):
            return "no such flag"
        default = fields[name].value and ast.literal_eval(fields[name].value)
        if default is None and "RELEASED" in names:   # a flag that a recipe or stage sets
            default = ast.literal_eval(names["RELEASED"].value).get(name)
        if value and value[0] == "=" and str(default) != value[1:]:
            return f"the default is {default}"
        return None
    if found := NAME.fullmatch(words):
        file = found[1].replace(".", "/") + ".py"
        if not os.path.isfile(os.path.join(ROOT, file)):
            return "no such module"
        names = defined(body(file))
        for part in found[2][1:].split("."):
            if part not in names:
                return f"{part} is not defined there"
            names = defined(getattr(names[part], "body", []))
        return None
    return "neither a file nor module.name nor script.py --flag"


@pytest.mark.parametrize("words", in_code_font(document()))
def test_what_the_document_names_exists(words):
    assert trouble(words) is None


def test_the_document_names_enough_to_be_worth_checking():
    found = in_code_font(document())
    assert len(found) > 60 and sum("--" in words for words in found) > 15


@pytest.mark.parametrize("words, what", [
    ("modle.py", "no such file"), ("tests/test_doc.py", "no such file"), ("models.Branch", "no such module"),
    ("model.Branch.foward", "foward is not defined there"),
    ("model.load_clip", "load_clip is not defined there"),   # imported, not defined
    ("pretrain.py --learning_rate", "no such flag"), ("pretrain.py --no-lr", "no such flag"),
    ("pretrain.py --lr=1e-06", "the default is 2e-06"), ("pretrain.py --clip=x", "the default is None"),
    ("load_branch", "neither a file nor module.name nor script.py --flag")])
def test_a_wrong_name_is_noticed(words, what):
    assert trouble(words) == what


def test_every_equation_from_2_to_8_has_a_row():
    assert re.findall(r"^\| (\d) \|", document(), re.M) == list("2345678")


def test_no_row_of_a_table_is_longer_than_two_lines():
    assert max(len(line) for line in document().splitlines() if line.startswith("|")) <= 250
