"""What the README and the docstrings promise: commands that parse, files that exist, sizes kept."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

import common
import dualvla
import twinbrain
import vita_vla
from worlds import serve

ROOT = Path(twinbrain.__file__).resolve().parent
README = (ROOT / "README.md").read_text()
SOURCES = [p for folder in ("", "parts", "worlds") for p in sorted((ROOT / folder).glob("*.py"))]
PARTS = [f"parts/{p.name}" for p in SOURCES if p.parent.name == "parts"]
# Lines a file may have, 700 if it is not named. twinbrain.py holds the paper and besides it
# four baselines of the framework, Twin-to-One, the forgetting study and questions from files;
# vita_vla.py a student, three stages, teachers made here and released, and a history kept between
# steps; dualvla.py three models trained in a row, two kinds of actions and pruning.
CAPS = {"twinbrain.py": 912, "vita_vla.py": 850, "dualvla.py": 1029, "README.md": 250}


SCRIPTS = {"twinbrain": twinbrain, "vita_vla": vita_vla, "dualvla": dualvla}
TEXT = README + "".join(script.__doc__ for script in SCRIPTS.values())


def commands():
    """Every command line that starts one of the scripts, as its name and arguments."""
    names = "|".join(SCRIPTS)
    found = re.findall(rf"(?:python|torchrun)[^\n`|&]*?({names})\.py([^\n`|&#]*)", TEXT)
    return sorted({(name, line.strip()) for name, line in found})


@pytest.mark.parametrize("name, line", commands())
def test_every_command_parses(name, line):
    arguments = [word.strip("…,;.)") for word in shlex.split(line)]
    script = SCRIPTS[name]
    if arguments not in (["-h"], ["--help"]):
        common.parse(script.Config, script.PRESETS, script.ABLATIONS, arguments)


def test_every_file_named_exists():
    names = re.findall(r"`([\w./-]+\.(?:py|md|json|jsonl|png|gif))`|\]\(([\w./-]+)\)", README)
    left_by_runs = {"result.json", "metrics.jsonl", "loss.png", "first_batch.png", "config.json",
                    "chain.json", "reasoning.jsonl", "night.py"}  # fmt: skip
    for name in {a or b for a, b in names} - left_by_runs:
        assert (ROOT / name).exists(), name


def test_messages_quoted_in_troubleshooting_exist():
    table = README.partition("## Troubleshooting")[2].partition("## ")[0]
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[2:]
    source = "".join(path.read_text() for path in SOURCES)
    quoted = [part for row in rows for words in re.findall(r"`([^`]+)`", row) if " " in words
              for part in words.split(" ... ")]  # fmt: skip
    assert len(rows) >= 10 and len(quoted) >= 5
    for part in quoted:
        assert part in source, part


def test_functions_named_exist():
    source = "".join(path.read_text() for path in SOURCES)
    names = re.findall(r"`(?:\w+\.)*(\w+)\(\)`", README)
    assert len(names) > 20
    for name in names:
        assert f"def {name}(" in source, name


def test_every_paper_is_cited():
    cited = README.partition("## Citation")[2]
    for script in SCRIPTS.values():
        number = re.search(r"arXiv (\d+\.\d+)", script.__doc__)[1]
        assert f"arXiv:{number}" in cited and f"arXiv {number}" in README


def test_the_two_commands_stand_alone():
    lines = README.splitlines()
    assert lines.count("pip install -e . && python twinbrain.py") == 1
    assert lines.count("pip install -e '.[test]' && pytest -n 2 --dist worksteal") == 1


def test_every_flag_named_exists():
    scripts = (*SCRIPTS.values(), serve)
    fields = {f for script in scripts for f in script.Config.__dataclass_fields__}
    known = {"--" + name.replace("_", "-") for name in fields}
    known |= {"--no-state", "--no-deepstack", "--no-new-words", "--nproc-per-node", "--seeds"}
    known |= {"--dist", "--check-curve", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    known |= {"--max-restarts", "--index-url"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)):
        assert flag in known, flag


def test_the_loops_differ_only_where_they_say_so():
    loops = []
    for script in SCRIPTS.values():
        lines = inspect.getsource(script.train).splitlines()
        loops.append([s for s in lines if "# [method]" not in s and '"""' not in s])
    assert loops[0] == loops[1] == loops[2]


@pytest.mark.parametrize("name", [*CAPS, "common.py", "data.py", *PARTS])
def test_files_stay_within_their_caps(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= CAPS.get(name, 700)
    assert all(len(line) <= 100 for line in lines) or name == "README.md"
