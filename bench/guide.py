"""How long the reading group's commands take, as they stand in docs/guide.md and docs/tour.ipynb.

  python bench/guide.py [--evening 2]

What stands under "Run" of an evening, in order, in one new folder and with an empty cache, so that
demonstrations are made as on a first evening; `tour` is the notebook's cells as one program. The
loss is that of actions (VITA-VLA: of the arm) in a run's log, at its first and last line. Both
cores belong to it: let nothing else run.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from study import append  # noqa: E402

DISPLAY = "class Image:\n    def __init__(self, *_, **__): ...\ndef display(*_): ...\n"


def evenings():
    """-> {"1": [commands], ..., "tour": [command]}, as the guide has them."""
    parts = re.split(r"^## Evening (\d)", (ROOT / "docs" / "guide.md").read_text(), flags=re.M)
    found = {}
    for number, text in zip(parts[1::2], parts[2::2]):
        block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
        found[number] = [x for x in block.splitlines() if x.startswith("python ")]
    return found | {"tour": ["python tour.py"]}


def cells():
    """The notebook's code as one program, which shows nothing."""
    some = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in some if c["cell_type"] == "code")


def losses(folder):
    """-> the first and the last loss of actions that a run, or its last stage, has logged."""
    logs = sorted(folder.rglob("metrics.jsonl"), key=lambda x: x.stat().st_mtime)
    lines = [json.loads(x) for x in logs[-1].read_text().splitlines()] if logs else []
    some = [x[term] for x in lines for term in ("action", "arm") if term in x]
    return [some[0], some[-1]] if some else None


def measure(evening, line, folder, env):
    """Runs a command in the folder -> its row."""
    began, words = time.perf_counter(), [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=folder, env=env, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - began
    done.check_returncode()
    row = {"evening": evening, "line": line, "seconds": round(seconds, 1)}
    if "--out" in words and "-pictures" not in words[-1]:
        row["action"] = losses(folder / words[words.index("--out") + 1])
    return row


def prepare(folder):
    """All that the commands need, in an empty folder -> their environment."""
    for source in ROOT.iterdir():
        if source.name not in ("runs", ".git"):
            (folder / source.name).symlink_to(source)
    (folder / "IPython").mkdir()
    (folder / "IPython" / "__init__.py").write_text("")
    (folder / "IPython" / "display.py").write_text(DISPLAY)
    (folder / "tour.py").write_text(cells())
    return os.environ | {"ONEFILE_VLA_CACHE": str(folder / "cache")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = evenings()
    parser.add_argument("--evening", choices=known, help="one alone; else all, and the notebook")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        env = prepare(Path(scratch))
        for evening in [args.evening] if args.evening else known:
            for line in known[evening]:
                row = measure(evening, line, Path(scratch), env)
                loss = "loss {:.3g} to {:.3g}".format(*row["action"]) if row.get("action") else ""
                print(f"evening {evening}  {row['seconds']:6.1f} s  {loss:22}  {line}", flush=True)
                append("guide", row)


if __name__ == "__main__":
    main()
