"""Question files in VLMEvalKit's TSV form, answered by a model, each with its own metric.

    python -m worlds.benchmarks pope 100 pope.tsv        # the world's questions in the same form

Columns: index, image (base64) or image_path, question, answer (each one, or a list as Python or
JSON writes it), the options A, B, C, ..., hint, category. The metric follows from the file's name.
"""

import ast
import base64
import binascii
import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import common
from worlds import questions, score

METRICS = {  # what a file's name begins with, in lower case without signs -> metric
    "mmmu": "choice", "mmstar": "choice", "mmbench": "circular", "seed": "choice",
    "scienceqa": "choice", "pope": "yesno", "mmerealworld": "choice", "mme": "pairs",
    "textvqa": "vqa", "docvqa": "anls", "infovqa": "anls", "ocrbench": "contains", "mmvet": "judge",
}  # fmt: skip
LIMITS = {"judge": 512, "contains": 128, "anls": 128, "yesno": 16, "pairs": 16}  # words; else 64
LETTERS = "ABCDEFGHI"
MEANT = re.compile(  # the letter an answer begins with: "B", "(B)", "The answer is: **B**"
    r"\W*(?i:(?:the )?(?:correct )?(?:answer|option)(?: is)?\W+)?\(?([A-I])\b(?!\s+[a-z])"
)


# --- metrics of one answer, 0 to 1 ----------------------------------------------------------------


def plain(text):
    """Lower case, without articles (unless it is all that is said) and signs at word ends."""
    words = re.sub(r"[^\w\s.'-]", " ", str(text).lower()).split()
    more = [w for w in words if w not in ("a", "an", "the")]
    return " ".join(w.strip(".'") for w in more or words)


def exact(said, answers):
    return float(plain(said) in [plain(a) for a in answers])


def contains(said, answers):
    """OCRBench: the answer occurs in what was said, spaces and case aside."""
    squeeze = lambda text: "".join(str(text).lower().split())  # noqa: E731
    return float(any(squeeze(a) in squeeze(said) for a in answers))


def vqa(said, answers):
    """Mean over the annotators of min(1, how many of the others say the same / 3)."""
    said, answers = plain(said), [plain(a) for a in answers]
    if len(answers) == 1:
        return float(said == answers[0])
    others = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    return float(np.mean([min(1.0, rest.count(said) / 3) for rest in others]))


def edits(a, b):
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def anls(said, answers, least=0.5):
    """1 - distance / length to the nearest answer; less than a half counts nothing."""
    best = 0.0
    for answer in answers:
        a, b = (" ".join(str(x).lower().split()) for x in (said, answer))
        best = max(best, 1 - edits(a, b) / max(len(a), len(b), 1))
    return best if best >= least else 0.0


def choice(said, options):
    """The letter that was meant: said alone or first, or by its option's words; else ""."""
    found = MEANT.match(said)
    if found and found[1] in options:
        return found[1]
    said = f" {plain(said)} "
    meant = [letter for letter, words in options.items() if f" {plain(words)} " == said]
    inside = [letter for letter, words in options.items() if f" {plain(words)} " in said]
    meant = meant or inside
    return meant[0] if len(meant) == 1 else ""


def yes_or_no(said):
    found = re.match(r"\W*(yes|no)\b", said.strip().lower())
    return found[1] if found else ""


# --- a file ---------------------------------------------------------------------------------------


def read(path):
    """-> rows: {"index", "images" [(h, w, 3)], "question", "answers", "options", "hint",
    "category", "group": what its pictures are called}"""
    flag, rows, pictures = f"--benchmark {path}", [], {}
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise common.UserError(f"{flag}: cannot be read ({error})") from None
    if not table or not {"question", "answer"} <= set(table[0]):
        raise common.UserError(f"{flag}: needs the columns question and answer, and a row")
    for number, row in enumerate(table):
        index = row.get("index") or str(number)
        try:
            images, name = pictures_of(row, Path(path).parent, pictures)
        except (OSError, ValueError, KeyError, binascii.Error) as error:
            raise common.UserError(f"{flag}: row {index} has no readable image ({error})") from None
        pictures[index] = images, name
        options = {c: row[c] for c in LETTERS if row.get(c)}
        rows.append({"index": index, "images": images, "question": row["question"], "group": name,
                     "answers": several(row["answer"] or ""), "options": options,
                     "hint": row.get("hint") or "", "category": row.get("category")})  # fmt: skip
    return rows


def pictures_of(row, folder, known):
    """A row's pictures and what names them; a short "image" is the index of an earlier row's."""
    text, path = row.get("image") or "", row.get("image_path") or ""
    if len(text) >= 64:
        files = [io.BytesIO(base64.b64decode(part, validate=True)) for part in several(text)]
    elif text or not path:
        return known[text]
    else:
        files = [folder / name for name in several(path)]
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return images, path or hash(text)


def several(text):
    """One text, or a list of them as Python or JSON writes it."""
    if text.startswith("["):
        try:
            found = ast.literal_eval(text)
            return [str(a) for a in found] or [""]
        except (ValueError, SyntaxError):
            pass
    return [text]


def asked(row):
    """The question as it is put, with hint and options."""
    parts = [row["hint"], row["question"], *(f"{c} {t}" for c, t in row["options"].items())]
    return " ".join(part for part in parts if part)


def metric_of(path, rows):
    name = re.sub(r"[^a-z]", "", Path(path).stem.lower())
    for begin, metric in METRICS.items():
        if name.startswith(begin):
            return metric
    if all(r["options"] for r in rows):
        return "choice"
    return "yesno" if all(yes_or_no(r["answers"][0]) for r in rows) else "exact"


def grade(said, row, metric, cfg=None):
    """One answer's worth, 0 to 1."""
    if metric in ("choice", "circular"):
        right = row["answers"][0].strip()
        if not row["options"] and right not in list(LETTERS):
            return exact(said, [right])
        return float(choice(said, row["options"] or dict.fromkeys(LETTERS, "")) == right)
    if metric in ("yesno", "pairs"):
        return float(yes_or_no(said) == plain(row["answers"][0]))
    if metric == "judge":
        return ask_judge(said, row, cfg)
    return {"vqa": vqa, "anls": anls, "contains": contains, "exact": exact}[metric](
        said, row["answers"]
    )


def ask_judge(said, row, cfg):
    """MM-Vet: how right an answer is, from 0 to 1, as a language model sees it."""
    words = (
        f"Question: {row['question']}\nRight answer: {row['answers'][0]}\nGiven answer: {said}\n"
        'How right is the given answer? Answer with JSON alone: {"score": a number from 0 to 1}'
    )

    def number(text):
        value = float(json.loads(text)["score"])
        if not 0 <= value <= 1:
            raise ValueError(value)
        return value

    content = [{"type": "text", "text": words}]
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        return score.chat(cfg.judge, cfg.judge_model, key, content, read=number)
    except TimeoutError as error:
        raise common.UserError(f"--judge {cfg.judge}: question {row['index']}, {error}") from None


def total(grades, rows, metric):
    """-> {"accuracy": ..., ...} of a file; MME adds the pictures with both answers right, and its
    score, at most 200 for each category. In MMBench a question stands there once for each turn of
    its options (7, 1000007, 2000007, ...) and is right where all are."""
    out = {"accuracy": float(np.mean(grades)), "questions": len(rows)}
    if metric == "circular":
        turns = {}
        for g, row in zip(grades, rows):
            turns.setdefault(row["index"].zfill(6)[-6:], []).append(g)
        right = float(np.mean([min(each) for each in turns.values()]))
        out = {"accuracy": right, "questions": len(turns), "of each turn": out["accuracy"]}
    if metric == "pairs":
        groups, points = {}, 0.0
        for g, row in zip(grades, rows):
            groups.setdefault(row["category"], {}).setdefault(row["group"], []).append(g)
        for pairs in (list(some.values()) for some in groups.values()):
            points += 100 * (np.mean(sum(pairs, [])) + np.mean([min(p) for p in pairs]))
        both = [min(p) for some in groups.values() for p in some.values()]
        out |= {"accuracy+": float(np.mean(both)), "score": float(points)}
    return out


def run(path, write, cfg, say=print, at_once=32):
    """Answers a file; write(samples, most words of each) -> answers. -> its metric, printed too."""
    rows = read(path)
    metric = metric_of(path, rows)
    if metric == "judge" and not cfg.judge.startswith("http"):
        raise common.UserError(f"--benchmark {path}: MM-Vet needs --judge URL")
    said = []
    for i in range(0, len(rows), at_once):
        samples = [{"images": r["images"], "question": asked(r)} for r in rows[i : i + at_once]]
        said += write(samples, LIMITS.get(metric, 64))
    grades = [grade(s, r, metric, cfg) for s, r in zip(said, rows)]
    found = total(grades, rows, metric)
    words = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    say(f"{Path(path).name} ({metric}): {words}")
    return found


def export(name, n, path, size=64):
    """The world's questions of one benchmark as a TSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter="\t")
        out.writerow(["index", "image", "question", "answer"])
        for i, (images, question, answer, _) in enumerate(questions.benchmark(name, n, size=size)):
            out.writerow([i, score.png(images["static"]), question, answer])


def main():
    name, n, path, *more = [*sys.argv[1:], "", "", ""]
    if name not in ("pope", "seed", "scienceqa", "mme") or not n.isdigit() or not path or any(more):
        words = "python -m worlds.benchmarks pope|seed|scienceqa|mme NUMBER FILE.tsv"
        raise common.UserError(f"a set, a number of questions and a file are needed: {words}")
    export(name, int(n), path)


if __name__ == "__main__":
    common.run_main(main)
