"""Runs arms of a method's ablations over seeds, one after another, and tabulates what came out.

  python bench/study.py twinbrain t1-twin t1-vanilla --seeds 3 -- --steps 1500

Each run appends one line to assets/results/<method>.jsonl (the arm, its flags, seed, success with
interval, abilities, seconds, machine kind, versions); a line that is already there is not run
again. `--ablation list` and the README's tables read that file. Flags behind `--` go to every run.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402


def machine():
    """Kind of machine, without its name: processor, cores, accelerator."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    words = f"{model[0] if model else platform.machine()}, {torch.get_num_threads()} cores"
    return words + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")


def run(method, arm, seed, flags, keep):
    """One run -> its line for the result file; its folder is kept in `keep` if given."""
    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(keep) / f"{arm}-{seed}") if keep else str(Path(scratch) / "run")
        own = ["--ablation", arm, "--seed", str(seed), *flags]
        command = [sys.executable, str(ROOT / f"{method}.py"), *own, "--out", out]
        subprocess.run(command, check=True)
        result = json.loads((Path(out) / "result.json").read_text())
    facts = {"command": shlex.join(["python", f"{method}.py", *own]), "machine": machine()}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"arm": arm, "flags": " ".join(flags), **result, **facts}


def table(lines):
    """Mean over seeds in percent, with the 95% interval over seeds where there are several."""
    arms = list(dict.fromkeys((line["arm"], line["flags"]) for line in lines))
    heads = f"{'in-domain %':>20} {'out-of-domain %':>20} {'seconds':>8}"
    print(f"{'arm':18} {'seeds':>5}  {heads}  flags")
    for arm, flags in arms:
        mine = [line for line in lines if (line["arm"], line["flags"]) == (arm, flags)]
        cells = []
        for key in ("success", "success_out"):
            values = [100 * line[key] for line in mine if line[key] is not None]
            mean = sum(values) / len(values) if values else float("nan")
            low, high = common.ci95_mean(values) if len(values) > 1 else (mean, mean)
            cells.append(f"{mean:.1f} ({low:.1f} to {high:.1f})")
        seconds = sum(line["train_seconds"] for line in mine) / len(mine)
        print(f"{arm:18} {len(mine):5}  {cells[0]:>20} {cells[1]:>20} {seconds:8.0f}  {flags}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=["twinbrain"])
    parser.add_argument("arms", nargs="+", help="names of `--ablation list`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", default="", help="keep the run folders here")
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    file = ROOT / "assets" / "results" / f"{args.method}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    wanted = " ".join(flags)
    for seed in range(args.seeds):
        for arm in args.arms:
            if any((x["arm"], x["seed"], x["flags"]) == (arm, seed, wanted) for x in lines):
                continue
            print(f"=== {arm}, seed {seed}", flush=True)
            lines.append(run(args.method, arm, seed, flags, args.keep))
            with open(file, "a") as opened:
                opened.write(json.dumps(lines[-1]) + "\n")
    table([x for x in lines if x["arm"] in args.arms and x["flags"] == wanted])


if __name__ == "__main__":
    main()
