"""The pages cannot rot: their links lead somewhere, their commands parse, and what they name is there."""
import argparse
import functools
import importlib
import operator
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import evaluate
import figures
import protocol
import seg4diff
from support import cli
from support.data import DATASETS, TRAINING_SETS

ROOT = Path(cli.__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "nano/README.md", "nano/flux.md", "nano/judge.md"]
PAGES += sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))
# A page, and the commands all of whose options it explains.
EXPLAINED = [("evaluate.py", "docs/protocol.md"), ("seg4diff.py", "docs/protocol.md"),
             ("explore.py", "docs/protocol.md"), ("train_magnet.py", "docs/magnet.md"),
             ("figures.py", "docs/paper_map.md")]
NUMBERS = {"N": "1", "T": "0.1"}                         # what stands for a number in a command
# The stem of a file of ours -> the module's full name.
MODULES = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
           for folder in (".", "support", "nano", "tools") for path in ROOT.glob(f"{folder}/*.py")}


@functools.cache
def page(name: str) -> tuple[str, list[str], list[str]]:
    """A page's text, its code spans `...`, and the lines of its code blocks for the shell."""
    text = (ROOT / name).read_text()
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return text, [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)], lines


def commands(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of every line that runs one by python or torchrun."""
    found = []
    for line in lines:
        for part in re.split(r"&&|;", line):
            if not re.match(r"\s*(python|torchrun)\b.*\.py\b", part):
                continue
            words = [NUMBERS.get(word, word) for word in shlex.split(part, comments=True)]
            script = next(word for word in words if word.endswith(".py"))
            found.append((script, words[words.index(script) + 1:]))
    return found


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script hands to support.cli.command, which is not run."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "command", lambda main, parser: parsers.append(parser))
        patch.setattr(sys, "path", sys.path.copy())      # scripts in folders put ours into it
        runpy.run_path(str(ROOT / script), run_name="__main__")
    (parser,) = parsers
    return parser


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All options that its --help shows, and those of its subcommands."""
    options = set()
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            options |= {option for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            options |= set().union(*map(options_of, action.choices.values()))
    return options - {"--help"}


def exists(name: str) -> bool:
    """Whether "module.Class.function" is there, the module by its full name or by its file's alone."""
    first, *rest = name.split(".")
    module = MODULES.get(first) or f"{first}.{rest.pop(0)}"                  # support.metrics
    try:
        operator.attrgetter(".".join(rest))(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


# ---------------------------------------------------------------------------- the checks


def test_readme_is_short_and_shows_the_test_command():
    text, _, _ = page("README.md")
    assert text.count("\n") <= 150
    assert re.search(r"<!-- test command -->\n```bash\npytest[^\n]*\n```\n", text)       # as .ci/run reads it


def test_readme_shows_what_the_first_command_prints():
    data = DATASETS["scenes"]()
    ev = protocol.evaluation(seg4diff.load("nano", device="cpu"), data, "ovss")
    facts = [f"{fact + ':':9s}{value}" for fact, value in evaluate.facts_of(ev, len(data.names)).items()]
    assert "\n".join(facts) in page("README.md")[0]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text, _, _ = page(name)
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")}
    assert not [link for link in links if not ((ROOT / name).parent / link).exists()]


@pytest.mark.parametrize("name", PAGES)
def test_commands_parse(name):
    """Every command of code blocks and code spans, and no option by an abbreviation."""
    _, spans, lines = page(name)
    for script, words in commands(lines + spans):
        assert (ROOT / script).is_file(), script
        parser = parser_of(script)
        try:
            parser.parse_args(words)
        except ValueError as e:
            pytest.fail(f"{script} {shlex.join(words)}: {e}")
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options_of(parser)


@pytest.mark.parametrize("name", PAGES)
def test_options_exist(name):
    """Those that stand alone, as in tables of options."""
    known = set().union(*(options_of(parser_of(script)) for script, _ in EXPLAINED))
    _, spans, _ = page(name)
    named = {option for span in spans if span.startswith("--") for option in re.findall(r"(?<!\S)--[\w-]+", span)}
    assert named <= known


@pytest.mark.parametrize("name", PAGES)
def test_what_is_named_is_there(name):
    """`module.function`, `file.py: function`, `folder/file` and `test_file`."""
    text, spans, _ = page(name)
    missing = []
    for span in spans:
        file = re.fullmatch(r"([\w/]+\.py)(?:: (\w+))?", span)
        dotted = re.fullmatch(r"([a-z]\w*)((?:\.[A-Za-z_]\w*)+)(?:\(.*\))?", span)
        inside = re.fullmatch(r"(?:support|nano|tools|tests|docs|notebooks)/[\w./-]+", span)
        if file:
            there = (ROOT / file[1]).is_file() or Path(file[1]).stem in MODULES
            there = there and (file[2] is None or exists(f"{Path(file[1]).stem}.{file[2]}"))
        elif inside:
            there = (ROOT / span).exists()
        elif re.fullmatch(r"test_\w+", span):
            there = (ROOT / "tests" / f"{span}.py").is_file()
        elif dotted and (dotted[1] in MODULES or dotted[1] == "support"):
            there = exists(dotted[1] + dotted[2])
        else:
            continue
        if not there:
            missing.append(span)
    missing += [path for path in re.findall(r"tests/test_\w+\.py", text) if not (ROOT / path).is_file()]
    assert not missing


def test_notebooks_are_there():
    numbers = set(re.findall(r"\| (\d\d) (?=\|)", page("docs/paper_map.md")[0]))
    assert numbers == {path.name[:2] for path in ROOT.glob("notebooks/*.ipynb")}
    assert all(f"({path.relative_to(ROOT)})" in page("README.md")[0] for path in ROOT.glob("notebooks/*.ipynb"))


@pytest.mark.parametrize("script, name", EXPLAINED)
def test_every_option_is_explained(script, name):
    _, spans, _ = page(name)
    assert not options_of(parser_of(script)) - {word for span in spans for word in span.split()}


def test_every_task_figure_and_data_set_is_explained():
    assert not {f"`{task}`" for task in protocol.TASKS} - set(re.findall(r"`\w+`", page("docs/protocol.md")[0]))
    drawn = [words for script, words in commands(page("docs/paper_map.md")[1]) if script == "figures.py"]
    assert figures.FIGURES.keys() <= {word for words in drawn for word in words}
    assert DATASETS.keys() | TRAINING_SETS.keys() <= set(page("docs/data.md")[1])
