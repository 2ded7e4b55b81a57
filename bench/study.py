"""Runs arms of a method's ablations over seeds and tabulates what came out.

  python bench/study.py twinbrain t1-twin t1-vanilla --seeds 3
  python bench/study.py twinbrain t1-vanilla --seeds 3 -- --steps 1845
  python bench/study.py twinbrain t9-student --seeds 3 -- --distill runs/t1-twin-{seed}
  python bench/study.py dualvla ours --seeds 3 --keep runs/dual
  python bench/study.py dualvla base-ft no-pruning --seeds 3 --keep runs/dual --after ours

Each run appends one line to assets/results/<method>.jsonl (the arm, its flags, seed, success with
interval, abilities, seconds, machine kind, versions); a line that is already there is not run
again. `--ablation list` and the README's tables read that file. Flags behind `--` go to every run,
{seed} in them replaced. As many runs go side by side as the machine has cores, one thread each:
on small models that is almost twice as fast as one run after another with all threads. `--after
ARM` lets arms begin where that one's first stages ended: VITA-VLA's teacher (freeze-vlm: after
two-stage), DualVLA's E and G. A line's command is the whole run's, of which these are parts. Where
the lines of `ours` are there and its folders are not, `python dualvla.py --seed S --threads 1
--stage generalist --out runs/dual/ours-S` makes E and G again.
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402
from parts import process  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARED = {  # method or arm: flags that take a stage of another run, and that stage's folder
    "vita_vla": {"--teacher": "teacher"},
    "freeze-vlm": {"--student": "finetune"},
    "dualvla": {"--expert": "expert", "--generalist": "generalist"},
}


def machine():
    """Kind of machine, without its name: processor, cores, accelerator, lack of bfloat16."""
    facts = [line.partition(":") for line in process.cpu_facts().splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in facts}
    model = facts.get("model name", platform.machine())
    model += " (Zen 5)" if model == "AMD EPYC" and facts.get("cpu family") == "26" else ""
    words = f"{model}, {os.cpu_count()} cores"
    words += f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return words + ("" if common.multiplies_bf16(DEVICE) else " without bfloat16")


def append(name, row):
    """Adds a measurement with its command, machine and versions to bench/results/<name>.jsonl."""
    file = ROOT / "bench" / "results" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    own = [Path(sys.argv[0]).name, *sys.argv[1:]]
    facts = {"command": shlex.join(["python", "bench/" + own[0], *own[1:]]), "machine": machine()}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"date": time.strftime("%Y-%m-%d")}
    with open(file, "a") as opened:
        opened.write(json.dumps({**row, **facts}) + "\n")


def run(method, arm, seed, flags, args):
    """One run -> its line for the result file; its folder is kept in --keep if given."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(args.keep) / f"{arm}-{seed}" if args.keep else Path(scratch) / "run"
        own = ["--ablation", arm, "--seed", str(seed), *(f.format(seed=seed) for f in flags)]
        base, given = Path(args.keep) / f"{args.after}-{seed}", {}
        if args.after:
            places = SHARED[method] | SHARED.get(arm, {})
            given = {f: str(base / at) for f, at in places.items() if (base / at).exists()}
        folder = out
        if "--student" in given:  # what is left of the chain
            given["--stage"], folder = "frozen", out / "frozen"
        more = [word for pair in given.items() for word in pair]
        command = [sys.executable, str(ROOT / f"{method}.py"), *own, *more, "--out", str(folder)]
        if args.parallel > 1:
            command += ["--threads", "1"]
        calm = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, env=calm, stdout=subprocess.PIPE, text=True)
        print(f"=== {arm}, seed {seed}\n{done.stdout}", flush=True)
        if done.returncode:
            raise common.UserError(f"{shlex.join(command)} ended with status {done.returncode}")
        places = (out / name for name in ("frozen", "finetune", ""))  # a chain's last stage
        last = next(place for place in places if (place / "result.json").exists())
        result = json.loads((last / "result.json").read_text())
        if last != out:
            found = [*(base.glob("*/result.json") if folder != out else ()),
                     *out.glob("*/result.json")]  # fmt: skip
            stages = {file.parent.name: json.loads(file.read_text()) for file in found}
            also = {"teacher": ("domains", "length")}  # Seer is compared with its students
            result["stages"] = {
                name: {k: stage[k] for k in ("samples", "train_seconds", *also.get(name, ()))}
                for name, stage in stages.items()
            }
        log = last / result.get("stage", "") / "metrics.jsonl"  # of DualVLA's last stage
        lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
        if curve := [[x["step"], x["abilities"]] for x in lines if "abilities" in x]:
            result["curve"] = curve  # Figure 2
    facts = {"command": shlex.join(["python", f"{method}.py", *own]), "machine": machine()}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    line = {"arm": "", "flags": " ".join(flags), "parallel": args.parallel, **result, **facts}
    return line | {"arm": arm}  # a stage taken from another run has that one's


def table(lines):
    """Mean over seeds, with the 95% interval over seeds where there are several."""
    heads = {"length": "average length", "answers": "answers %", "success_out": "out-of-domain %"}
    second = next((key for key in heads if lines[0].get(key) is not None), "success_out")
    print(f"{'arm':18} {'seeds':>5}  {'success %':>20} {heads[second]:>20} {'seconds':>8}  flags")
    for arm, flags in dict.fromkeys((line["arm"], line["flags"]) for line in lines):
        mine = [line for line in lines if (line["arm"], line["flags"]) == (arm, flags)]
        cells = []
        for key, scale in (("success", 100), (second, 1 if second == "length" else 100)):
            values = [scale * line[key] for line in mine if line.get(key) is not None]
            mean = sum(values) / len(values) if values else float("nan")
            low, high = common.ci95_mean(values) if len(values) > 1 else (mean, mean)
            cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
        seconds = sum(line["train_seconds"] for line in mine) / len(mine)
        print(f"{arm:18} {len(mine):5}  {cells[0]:>20} {cells[1]:>20} {seconds:8.0f}  {flags}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=["twinbrain", "vita_vla", "dualvla"])
    parser.add_argument("arms", nargs="+", help="names of `--ablation list`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", default="", help="keep the run folders here")
    parser.add_argument("--after", default="", help="arm in --keep whose first stages serve others")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs side by side")
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.after and not (args.keep and args.method in SHARED):
        parser.error("--after ARM needs --keep DIR, and a method of several stages")
    known = importlib.import_module(args.method).ABLATIONS
    if strange := [arm for arm in args.arms if arm not in known]:
        parser.error(f"{args.method} has no arm {strange[0]}: {', '.join(known)}")
    if min(args.seeds, args.parallel) < 1:
        parser.error("--seeds and --parallel: at least 1")
    file = ROOT / "assets" / "results" / f"{args.method}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = common.result_lines(args.method)
    if "--dtype" not in flags and not common.multiplies_bf16(DEVICE):
        flags += ["--dtype", "fp32"]  # said, as it is not to be compared with bfloat16
    wanted = " ".join(flags)
    known = {(x["arm"], x["seed"], x["flags"]) for x in lines}
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]

    def work(job):
        line = run(args.method, *job, flags, args)
        with open(file, "a") as opened:
            opened.write(json.dumps(line) + "\n")
        return line

    with ThreadPoolExecutor(args.parallel) as pool:
        lines += pool.map(work, [job for job in jobs if (*job, wanted) not in known])
    table([x for x in lines if x["arm"] in args.arms and x["flags"] == wanted])


if __name__ == "__main__":
    common.run_main(main)
