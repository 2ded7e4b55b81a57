"""Judges for the VLA Score: trajectories in, marks from 0 to 10 for each part out, and a report.

Three judges give the marks: `offline` reads the embedded world's ground truth (no VLM: for tests
and laptops), an OpenAI-compatible address, or a local VLM (`local:BACKBONE`). Marks are kept in a
JSONL file as they come, so that an interrupted judgement goes on where it stopped, and a paid call
is made once. Equation 8, which makes one number of them, is in the method's script and handed in.
"""

import base64
import hashlib
import html
import http.client
import io
import json
import math
import os
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
from worlds import loop
from worlds.client import blend

PARTS = ("Action", "Intention", "Reasoning", "Alignment")
MEANS = ("Reasoning", "Action", "Intention", "Alignment", "success", "score")
FRAMES = 8  # pictures of a trajectory that a judge is shown
SIGHTS = 15  # plans that a speed is the median of


# --- from a policy to its score -------------------------------------------------------------------


def check(cfg):
    """Whether there is such a judge, and whether its address can be reached, before anything is
    spent."""
    if not re.match(r"offline$|local:.|https?://.", cfg.judge):
        raise common.UserError(f"--judge {cfg.judge}: offline, http(s)://..., or local:BACKBONE")
    if cfg.judge.startswith("local:"):
        common.find_backbone(cfg.judge.partition(":")[2])
    elif cfg.judge != "offline":
        at = urllib.parse.urlsplit(cfg.judge)
        try:
            port = at.port or {"http": 80, "https": 443}[at.scheme]
            socket.create_connection((at.hostname, port), timeout=10).close()
        except (OSError, ValueError, TypeError) as error:
            raise common.UserError(f"--judge {cfg.judge}: nobody answers there ({error})") from None
    examples_of(cfg.judge_examples)


def judged(policy, cfg, folder, say, formula, reasons):
    """VLA Score over trajectories in the demonstrations' domain -> means of its parts and of it, or
    None where the world cannot be asked for the truth. formula: R, A, I, RA, B, reasons, --bracket
    -> a trajectory's score."""
    if not knows(cfg.world):
        say("  no VLA Score: its judges need a world that can be copied")
        return None
    runs = acted(policy, cfg, folder)
    rows = judge_all(runs, cfg, folder / "scores.jsonl", reasons, say, device=policy.device)
    for r in rows:
        parts = [r.get(name, 0) / 10 for name in MEANS[:4]]  # of who is silent Eq. 8 reads two
        r["score"] = formula(*parts, r["success"], reasons, cfg.bracket)
    report(folder / "score.html", runs, rows, cfg)
    return means(rows) | {"judge": cfg.judge}


def means(rows):
    """Of what was judged: a specialist has neither Reasoning nor Alignment."""
    return {n: float(np.mean([r[n] for r in rows])) for n in MEANS if n in rows[0]}


def acted(policy, cfg, folder):
    """The trajectories to judge. For a judge that looks they are kept in the folder: acted again,
    on a GPU say, they may differ, and what was paid for would be asked anew."""
    file = folder / "trajectories.json"
    names = "world", "seed", "steps", "score_episodes", "execute", "ensemble", "talk", "speak"
    facts = {name: getattr(cfg, name) for name in (*names, "euler", "eval_only")}
    facts["trained"] = list(getattr(policy, "trained", ()))
    if cfg.judge != "offline" and file.exists():
        kept = common.read_json(file, "of", "runs")
        if kept["of"] == facts:
            return [r | {"frames": [unpng(f) for f in r["frames"]]} for r in kept["runs"]]
    starts = loop.starts_of(cfg.world, "in", cfg.score_episodes, cfg.seed)
    runs = trajectories(policy, cfg, cfg.world, starts)
    if cfg.judge != "offline":
        seen = ("start", "task", "said", "actions", "success")
        plain = [{n: r[n] for n in seen} | {"frames": [png(f) for f in shown(r)]} for r in runs]
        common.write_json(file, {"of": facts, "runs": plain})
    return runs


# --- trajectories, with the truth about them ------------------------------------------------------


def knows(world):
    """Whether a `--world` can be copied, to see how many steps the expert still needs."""
    World, _ = loop.find(world)
    return hasattr(World, "load_state_dict")


def steps_to_go(world, scratch, limit=200):
    """Steps that the scripted expert needs from here to success."""
    scratch.load_state_dict(world.state_dict())
    expert, n = scratch.expert(0, 0.0), 0
    while not scratch.success and n < limit:
        scratch.step(expert.act())
        n += 1
    return n


def truth(world):
    """What the expert would say here."""
    expert = world.expert(0, 0.0)
    expert.act()
    return expert.reasoning


def trajectories(policy, cfg, world, starts):
    """Acts from each start as the closed loop does, --execute or --ensemble -> [{"start", "task",
    "frames", "said", "actions", "success", ...}].

    For the offline judge each plan comes with what the expert says, the steps to go before and
    after it, and how the hand moved.
    """
    rng, runs = np.random.default_rng(cfg.seed), []
    every, newest = 1 if cfg.ensemble else cfg.execute, [[] for _ in starts]
    World, suite = loop.find(world)
    worlds = [World(suite, cfg.size, cfg.wrist_size) for _ in starts]
    scratch = World(suite, 8, 8)
    for world, (seed, task, domain) in zip(worlds, starts):
        world.reset(seed, task, domain)
        run = {"start": f"{task}-{domain}-{seed}", "task": world.instruction, "frames": []}
        runs.append(run | {"said": [], "expert": [], "actions": [], "poses": [], "to_go": []})
    live = list(range(len(worlds)))
    while live:
        seen = [worlds[i].observe() for i in live]
        chunks = policy.act(seen, [worlds[i].instruction for i in live], rng)
        for i, observation, chunk, said in zip(live, seen, chunks, policy.said):
            world, run = worlds[i], runs[i]
            run["frames"].append(observation["images"]["static"])
            run["said"].append(said)
            run["expert"].append(truth(world))
            run["to_go"].append(steps_to_go(world, scratch))
            newest[i] = (newest[i] + [chunk])[-7:]
            for action in [blend(newest[i])] if cfg.ensemble else chunk[:every]:
                run["poses"].append([*world.pose, world.opening])
                run["actions"].append(np.asarray(action, float).round(3).tolist())
                world.step(action)
                if world.success or world.steps >= world.max_steps:
                    break
        over = [w.success or w.steps >= w.max_steps for w in worlds]
        live = [i for i in live if not over[i]]
    for world, run in zip(worlds, runs):
        run["poses"].append([*world.pose, world.opening])
        run["to_go"].append(0 if world.success else steps_to_go(world, scratch))
        run["frames"].append(world.observe()["images"]["static"])
        run["success"], run["execute"] = int(world.success), every
    return runs


# --- the offline judge ----------------------------------------------------------------------------


def jerkiness(poses):
    """Mean norm of the second difference of the hand's pose."""
    poses = np.asarray(poses, float)[:, :6]
    if len(poses) < 3:
        return 0.0
    return float(np.linalg.norm(poses[2:] - 2 * poses[1:-1] + poses[:-2], axis=1).mean())


def clauses(said):
    """What is seen, done and why: "A so i B because C" -> [A, B, C], as far as it goes."""
    seen, _, rest = said.partition(" so i ")
    act, _, why = rest.partition(" because ")
    return [part.strip() for part in (seen, act, why)]


def moved_as_said(act, poses):
    """Whether the hand's path over a plan is what the words announce; None: nothing to compare."""
    x, y, z = np.subtract(poses[-1], poses[0])[:3]
    fingers = poses[-1][6] - poses[0][6]
    across = math.hypot(x, y)
    checks = {
        "close": fingers < 0 or poses[-1][6] < 0.5, "open": fingers > 0 or poses[-1][6] > 0.5,
        "lift": z > 0, "lower": z < 0, "carry": across > 0.02, "rest": across < 0.05,
        "move": across > 0.02 or z > 0.02, "push": across > 0.01 or z < 0, "pull": across > 0.01,
    }  # fmt: skip
    return checks.get(act.partition(" ")[0])


def judge_offline(run, reasons):
    """Marks from the world's truth. Action: half smoothness, half speed, both against the expert's;
    Intention: plans that brought success nearer; Reasoning: clauses that the expert would say too;
    Alignment: plans that move as they say."""
    plans = range(len(run["said"]))
    ideal, taken, n = run["to_go"][0], max(len(run["actions"]), 1), run["execute"]
    smooth = min(1.0, 0.035 / max(jerkiness(run["poses"]), 1e-6))  # 0.035: the expert's own
    marks = {
        "Action": 0.5 * smooth + 0.5 * min(1.0, ideal / taken),
        "Intention": np.mean([run["to_go"][i + 1] < run["to_go"][i] for i in plans]),
    }
    if reasons:
        spoken = [i for i in plans if run["said"][i]]
        right = [
            np.mean([a == b for a, b in zip(clauses(run["said"][i]), clauses(run["expert"][i]))])
            for i in spoken
        ]
        span = max(n, 2)  # with --ensemble a plan's own move is shorter than any of the bounds
        fits = [moved_as_said(clauses(run["said"][i])[1], run["poses"][n * i : n * i + span + 1])
                for i in spoken]  # fmt: skip
        fits = [fit for fit in fits if fit is not None]
        marks["Reasoning"] = np.mean(right) if right else 0.0
        marks["Alignment"] = np.mean(fits) if fits else 0.0
    return {name: int(round(10 * float(mark))) for name, mark in marks.items()}


# --- judges that look -----------------------------------------------------------------------------

RUBRIC = """You are an engineer who rates how robots carry out tasks. You get a task, what the robot
said before its moves{without}, and pictures of the whole run in order. Rate each of these with a
whole number from 0 (poor, or no evidence) over 5 (acceptable) to 10 (excellent):
Action: are the moves coherent, precise and efficient?
Intention: does each move help towards the task?
{more}Stay with what is visible, invent nothing, and name what is unclear. Name critical failures:
collisions, unsafe or needless moves, dropped things. A drawer counts only when fully open or shut.
Answer with JSON alone: {{"Thought": "...", "Result": {{{fields}}}}}"""
SPEECH = """Reasoning: is what it says correct, consistent and useful?
Alignment: do the moves follow what it says?
"""


def rubric(reasons):
    names = PARTS if reasons else PARTS[:2]
    fields = ", ".join(f'"{name}": 0' for name in names)
    more = SPEECH if reasons else ""
    return RUBRIC.format(without="" if reasons else " (nothing)", more=more, fields=fields)


def parse_marks(text, reasons):
    """A judge's answer -> {"Action": 7, ...}; anything but the JSON asked for is a ValueError."""
    names = PARTS if reasons else PARTS[:2]
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    said = json.loads(text)
    if not isinstance(said, dict) or not isinstance(said.get("Result"), dict):
        raise ValueError("no Result")
    marks = {name: said["Result"].get(name) for name in names}
    for name, mark in marks.items():
        if type(mark) is not int or not 0 <= mark <= 10:
            raise ValueError(f"{name}: {mark!r} is not a whole number from 0 to 10")
    return marks | {"Thought": str(said.get("Thought", ""))}


def shown(run):
    """At most FRAMES pictures, the first and the last among them."""
    n = len(run["frames"])
    return [run["frames"][i] for i in np.unique(np.linspace(0, n - 1, FRAMES).round().astype(int))]


def png(image, scale=1):
    """(h, w, 3) uint8 -> a PNG in base64."""
    image = Image.fromarray(image)
    file = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def unpng(text):
    """What `png` made, of scale 1 -> (h, w, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]))


def task_words(run, reasons, example=None):
    text = f"Task: {run['task']}\n"
    if reasons:
        said = [s for i, s in enumerate(run["said"]) if s and s not in run["said"][:i]]
        text += "Reasoning: " + ("; ".join(said) or "(none)") + "\n"
    if example:
        marks = ", ".join(f"{name} {example[name]}" for name in PARTS if name in example)
        text = f"A similar run ({example['task']}) was rated by experts: {marks}.\n" + text
    return text + "Trajectory:"


def thumb(run):
    """First and last picture, coarse and grey, for the search of similar scenes."""
    ends = [Image.fromarray(run["frames"][i]).convert("L").resize((8, 8)) for i in (0, -1)]
    return np.concatenate([np.asarray(e).ravel() for e in ends]).tolist()


def cosine(a, b):
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / norm if norm else 0.0


def similar(run, examples):
    """The annotated run nearest in words; of equally near ones, nearest in sight."""
    words = Counter(run["task"].split())

    def likeness(e):
        other = Counter(e["task"].split())
        every = sorted(set(words) | set(other))
        near = cosine([words[w] for w in every], [other[w] for w in every])
        return round(near, 3), cosine(thumb(run), e["thumb"]) if "thumb" in e else 0.0

    return max(examples, key=likeness, default=None)


def chat(url, model, key, content, tries=6, timeout=60.0, pause=1.0, read=lambda text: text):
    """One question to an OpenAI-compatible address -> read(answer); waits longer after each fault.

    Slow, busy (429) or failing (5xx) servers, broken connections and answers that `read` refuses
    are tried again; a refused request is the user's to mend.
    """
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    where = url.rstrip("/") + "/chat/completions"
    fault = ""
    for attempt in range(tries):
        wait = pause * 2**attempt
        try:
            request = urllib.request.Request(where, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                said = json.loads(answer.read())
            return read(said["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            fault = f"status {error.code}"
            if error.code != 429 and error.code < 500:
                raise common.UserError(f"--judge {url}: {error.code} {error.reason}") from None
            after = error.headers.get("Retry-After", "")
            wait = max(wait, float(after)) if after.isdigit() else wait
        except (OSError, http.client.HTTPException) as error:  # time-outs and resets among them
            fault = f"{type(error).__name__} {error}"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            fault = f"answer not understood ({error})"
        if attempt + 1 < tries:
            time.sleep(min(wait, 60.0))
    raise TimeoutError(f"no usable answer after {tries} tries: {fault}")


def judge_by_address(cfg, reasons, examples, pause=1.0, timeout=60.0):
    """-> function: run -> marks."""
    key = os.environ.get("OPENAI_API_KEY", "")

    def judge(run):
        words = rubric(reasons) + "\n" + task_words(run, reasons, similar(run, examples))
        content = [{"type": "text", "text": words}]
        for frame in shown(run):
            url = {"url": "data:image/png;base64," + png(frame, max(1, 256 // len(frame)))}
            content.append({"type": "image_url", "image_url": url})
        read = lambda text: parse_marks(text, reasons)  # noqa: E731
        how = dict(pause=pause, timeout=timeout, read=read)
        return chat(cfg.judge, cfg.judge_model, key, content, **how)

    return judge


def judge_by_vlm(backbone, reasons, examples, device):
    """A VLM of this machine -> function: run -> marks. It decodes greedily: one try."""
    half = torch.float32 if str(device) == "cpu" else torch.bfloat16
    vlm, processor = common.load_backbone(backbone, "fp32" if half == torch.float32 else "bf16")
    vlm = vlm.to(device)  # not in 16 bits: a rotation's frequencies would be, too

    def judge(run):
        words = rubric(reasons) + "\n" + task_words(run, reasons, similar(run, examples))
        pixels, grids = processor.images(shown(run))
        ids = torch.tensor([processor.prompt("", words, grids)[0]])
        given = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.from_numpy(pixels).to(half),
        }  # fmt: skip
        if vlm.config.model_type.startswith("qwen"):
            given["mm_token_type_ids"] = (ids == processor.image_token_id).int()
            given["image_grid_thw"] = torch.tensor(grids)
        given = common.to_device(given, torch.device(device))
        out = vlm.generate(**given, do_sample=False, max_new_tokens=300)
        text = processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        try:
            return parse_marks(text, reasons)
        except ValueError as error:
            raise TimeoutError(f"no usable answer: {error}") from None

    return judge


# --- all trajectories, once each ------------------------------------------------------------------


def key_of(run, cfg, reasons):
    """Names a trajectory, its judge and the question: other words, moves or examples are another
    one."""
    facts = [run["start"], run["said"], run["actions"], cfg.judge, reasons]
    if cfg.judge != "offline":
        facts += [cfg.judge_model, examples_of(cfg.judge_examples)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def read_jsonl(path):
    """Whole lines of a JSONL file; a line that a crash cut short is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in rows if isinstance(r, dict)]


def examples_of(path):
    """Annotated runs: the lines of an earlier scores.jsonl, put right by a person."""
    if not path:
        return []
    if not Path(path).exists():
        raise common.UserError(f"--judge-examples {path}: no such file")
    rows = read_jsonl(path)
    if not rows or any("task" not in r or "Action" not in r for r in rows):
        raise common.UserError(f"--judge-examples {path}: lines need a task and marks")
    return rows


def estimate(runs, cfg, reasons, examples=()):
    """Tokens and dollars that judging these runs will take, roughly: what is read, and answers
    of 150 tokens at four times the price."""
    said = (task_words(r, reasons, similar(r, examples)) for r in runs)
    text = sum(len(rubric(reasons)) + len(words) for words in said) / 4
    tokens = text + sum(len(shown(r)) for r in runs) * 255  # a picture of 256 pixels
    return int(tokens), (tokens + 4 * 150 * len(runs)) / 1e6 * cfg.judge_price


def marked(file):
    """What a JSONL file of marks holds -> {key: row}."""
    return {row["key"]: row for row in read_jsonl(file) if "key" in row}


def ask_all(todo, ask, file):
    """{key: question} to ask; ask(question) -> a row, which `file` keeps as soon as it is given.
    After three faults in a row whoever judges is taken to be gone -> what went wrong."""
    faults, in_a_row = [], 0
    with open(file, "a") as out:
        if out.tell() and not Path(file).read_bytes().endswith(b"\n"):
            out.write("\n")  # a crash cut the last line short
        for key, question in todo.items():
            try:
                row = ask(question)
            except TimeoutError as error:
                faults.append(str(error))
                in_a_row += 1
                if in_a_row == 3:
                    break
                continue
            in_a_row = 0
            out.write(json.dumps({"key": key, **row}) + "\n")
            out.flush()
    return faults


def judge_all(runs, cfg, file, reasons, say=print, pause=1.0, timeout=60.0, device="cpu"):
    """Marks of every run, in order; those that `file` already holds are not asked for again."""
    keys = [key_of(run, cfg, reasons) for run in runs]
    kept, examples = marked(file), examples_of(cfg.judge_examples)
    todo = {k: run for k, run in zip(keys, runs) if k not in kept}
    judge = partial(judge_offline, reasons=reasons)
    if cfg.judge.startswith("local:"):
        judge = judge_by_vlm(cfg.judge.partition(":")[2], reasons, examples, device)
    elif cfg.judge != "offline":
        judge = judge_by_address(cfg, reasons, examples, pause, timeout)
        tokens, dollars = estimate(todo.values(), cfg, reasons, examples)
        say(f"  {len(todo)} trajectories to {cfg.judge}: about {tokens:,} tokens, ${dollars:.2f}")

    def row(run):
        facts = {"task": run["task"], "success": run["success"]}
        return facts | judge(run) | {"thumb": thumb(run)}

    faults, done = ask_all(todo, row, file), marked(file)
    missing = sum(key not in done for key in keys)
    if missing:
        again = f"--{'out' if cfg.eval_only else 'resume'} {Path(file).parent}"
        raise common.UserError(
            f"{missing} of {len(runs)} trajectories could not be judged ({faults[0]}); the others "
            f"are in {file}: the same command with {again} goes on with what is missing"
        )
    return [done[key] for key in keys]


# --- report ---------------------------------------------------------------------------------------


def report(path, runs, rows, cfg):
    """One HTML file: pictures, words and marks of every trajectory."""
    mean = means(rows)
    who = {"offline": "the world's ground truth, no VLM"}.get(cfg.judge, cfg.judge)
    head = "".join(f"<th>{n}</th>" for n in mean)
    cells = "".join(f"<td>{v:.2f}</td>" for v in mean.values())
    parts = [f"<h1>VLA Score {mean['score']:.3f}</h1><p>Judge: {html.escape(who)}; "]
    parts += [f"{len(rows)} trajectories.</p><table><tr>{head}</tr><tr>{cells}</tr></table>"]
    for run, r in zip(runs, rows):
        parts.append(f"<h2>{html.escape(run['task'])}: {r['score']:.2f}</h2><p>")
        parts += [f'<img src="data:image/png;base64,{png(f, 2)}">' for f in shown(run)]
        marks = ", ".join(f"{n} {r[n]}" for n in MEANS[:-1] if n in r)
        said = [s for i, s in enumerate(run["said"]) if s and s not in run["said"][:i]]
        parts.append(f"</p><p>{marks}</p><p>{html.escape(r.get('Thought', ''))}</p><ul>")
        parts += [f"<li>{html.escape(s)}</li>" for s in said]
        parts.append("</ul>")
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.3em 1em;text-align:right}"
    page = f"<!doctype html><meta charset=utf-8><title>VLA Score</title><style>{style}</style>"
    Path(path).write_text(page + "\n".join(parts), encoding="utf-8")


def sight(world, seed, steps):
    """-> what is seen in an episode after some steps of its expert."""
    observation, expert = world.reset(seed), world.expert(0, 0.0)
    for _ in range(steps):
        world.step(expert.act())
        observation = world.observe()
    return observation


def speed(policy, cfg):
    """Milliseconds that a plan for one robot takes, the median and, as few plans may say much, the
    mean; and words said on the way."""
    times, words = [], []
    with loop.Crew(cfg.world, 1, cfg.size, cfg.wrist_size) as crew:
        for i in range(SIGHTS):
            observation = crew.ask({0: (sight, i, 3 * (i % 6))})[0]
            began = time.perf_counter()
            policy.act([observation], [crew.facts[0][1]], np.random.default_rng(i))
            times.append(1000 * (time.perf_counter() - began))
            words.append(len(policy.said[0].split()))
    mean = float(np.mean(times))
    return {"ms": float(np.median(times)), "ms_mean": mean, "words": float(np.mean(words))}
