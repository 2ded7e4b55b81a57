"""Question files in VLMEvalKit's TSV form, answered by a model, each with its own published metric.

    python -m worlds.benchmarks pope 100 pope.tsv        # the world's questions in the same form

Columns: index, image (base64) or image_path, question, answer (each one, or a list as Python or
JSON writes it), the options A, B, C, ..., hint, category, split. The metric follows from the file's
name. In the output folder: NAME.jsonl has each answer and its mark, NAME.json the result.
"""

import ast
import base64
import binascii
import csv
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from string import ascii_uppercase as LETTERS

import numpy as np

import common
from parts import formats
from worlds import questions, score

METRICS = {  # what a file's name begins with, in lower case without signs -> metric
    "mmmu": "choice", "mmstar": "choice", "mmbench": "circular", "seed": "choice",
    "scienceqa": "choice", "pope": "yesno", "mmerealworld": "choice", "mme": "pairs",
    "textvqa": "vqa", "docvqa": "anls", "infovqa": "anls", "ocrbench": "contains", "mmvet": "judge",
}  # fmt: skip
LIMITS = {"judge": 512, "contains": 128, "anls": 128, "yesno": 16, "pairs": 16}  # words; else 64


# --- texts as metrics compare them ----------------------------------------------------------------

SIGNS = ';/[]"{}()=+\\_-><@`,?!'  # what VQA's evaluation takes out; % : * ' stay
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(n) for n, word in enumerate(NUMBERS)} | {"none": "0"}
ENDS = {  # of the contractions that VQA's evaluation knows
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
           "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you y'all",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "": "ma'am o'clock 'twas y'all 'ow's'at",
}  # fmt: skip
JOINED = {  # without one of its apostrophes -> with all of them
    word[:i] + word[i + 1 :]: word
    for end, starts in ENDS.items()
    for word in (start + end for start in starts.split())
    for i, sign in enumerate(word) if sign == "'"
}  # fmt: skip


def plain(text):
    """Lower case, without articles (unless it is all that is said) and signs at word ends."""
    words = re.sub(r"[^\w\s.'-]", " ", str(text).lower()).split()
    more = [w for w in words if w not in ("a", "an", "the")]
    return " ".join(w.strip(".'") for w in more or words)


def vqa_form(text):
    """An answer as VQA's evaluation compares it: digits, no articles, apostrophes in place, full
    stops before digits alone, no signs (those with a space beside them, or in a text that has a
    number with a comma, leave no gap)."""
    text = left = re.sub(r"[\n\t]", " ", str(text)).strip()
    for sign in SIGNS:
        closed = f"{sign} " in text or f" {sign}" in text or re.search(r"\d,\d", text)
        left = left.replace(sign, "" if closed else " ")
    words = re.sub(r"\.(?!\d)", "", left).lower().split()
    words = [NUMBERS.get(w, w) for w in words if w not in ("a", "an", "the")]
    return " ".join(JOINED.get(w, w) for w in words)


# --- metrics of one answer, 0 to 1 ----------------------------------------------------------------


def exact(said, answers):
    return float(plain(said) in [plain(a) for a in answers])


def contains(said, answers, category=""):
    """OCRBench: an answer occurs in it; spaces do not count in formulas, nor case elsewhere."""
    formula = category == "Handwritten Mathematical Expression Recognition"
    texts = [str(text).strip().replace("\n", " ") for text in (said, *answers)]
    said, *answers = [t.replace(" ", "") if formula else t.lower() for t in texts]
    return float(any(a in said for a in answers))


def vqa(said, answers):
    """Mean over the annotators of min(1, how many of the others say the same / 3)."""
    said, answers = vqa_form(said), [vqa_form(a) for a in answers]
    if len(answers) == 1:  # no others, so that nothing would be right
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
        best = max(best, 1 - edits(a, b) / max(len(said), len(answer), 1))
    return best if best >= least else 0.0


def yes_or_no(said):
    """Whichever of the two is said as a word; "" for neither and for both."""
    found = {"yes", "no"} & set(re.findall(r"\w+", said.lower()))
    return found.pop() if len(found) == 1 else ""


ANSWER = re.compile(  # the letter that is called the answer: "the correct answer is option C"
    r"(?i:\banswer|\b(?:correct|right|best) (?:option|choice))(?i:\W+(?:is|option|choice))*"
    r"\W+([A-Z])\b(?!')"
)


def choice(said, options):
    """The letter that was meant, or "". As VLMEvalKit's `can_infer`: the only option's letter that
    stands as a word, if among the last four, else the only option whose words occur; but A right
    before these is an article ("A blue one"). Besides: "answer C", and C that begins it."""
    texts = "|".join(re.escape(t) for t in options.values() if t) or "(?!)"
    said = re.sub(rf"\bA(?= (?i:{texts})\b)", "a", said)
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", said).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - 4:
        return named[0]
    called = {letter for letter in ANSWER.findall(said) if letter in options}
    if len(called) == 1:
        return called.pop()
    first = re.match(r"\W*([A-Z](?=[).:*])|[B-HJ-Z]\b)", said)
    return by_words(said, options) or (first[1] if first and [first[1]] == named else "")


def by_words(said, options):
    """The only option whose words occur in an answer of at most twice the length of all options;
    of several the one that is the whole answer. They begin where a word does ("red" is not in
    "covered") and no number goes on behind them."""
    texts = {letter: str(text).strip().lower() for letter, text in options.items()}
    if len(said) > 2 * sum(map(len, texts.values())):
        return ""
    place = r"(?:(?<![a-z\d])|(?=\W))%s(?![.,]?\d)"
    found = [c for c, t in texts.items() if t and re.search(place % re.escape(t), said.lower())]
    if len(found) > 1:
        found = [c for c in found if plain(texts[c]) == plain(said)]
    return found[0] if len(found) == 1 else ""


def grade(said, row, metric):
    """One answer's worth, 0 to 1."""
    answers = row["answers"]
    if metric in ("choice", "circular"):
        options = row["options"] or dict.fromkeys(LETTERS, "")  # "": they are in the question
        if row["options"] or answers[0].strip() in options:
            return float(choice(said, options) == answers[0].strip())
        held = [by_words(said, {"A": a, "B": "Other Answers"}) for a in answers]  # MMMU's open ones
        return float("A" in held or exact(said, answers))
    if metric in ("yesno", "pairs"):
        return float(yes_or_no(said) == plain(answers[0]))
    if metric == "contains":
        return contains(said, answers, row["category"])
    return {"vqa": vqa, "anls": anls, "exact": exact}[metric](said, answers)


# --- MM-Vet's judge -------------------------------------------------------------------------------

JUDGE = """You mark answers to questions about a picture that you do not see. Compare each given
answer with the right one and say how much of the right one it holds: a number from 0.0 (nothing)
in steps of 0.1 to 1.0 (everything). <AND> stands between parts of a right answer that are all
needed: 1.0 is for all of them, and each that is missing or wrong costs its share. <OR> stands
between right answers any one of which is enough for 1.0. Wording and length do not matter.
Reply with the number alone.

Question | Right answer | Given answer | Mark
Which tools hang on the wall? | a saw <AND> a hammer | an axe | 0.0
Which tools hang on the wall? | a saw <AND> a hammer | a saw | 0.5
Which tools hang on the wall? | a saw <AND> a hammer | I see a hammer and beside it a saw. | 1.0
What is in the jar? | jam <OR> marmalade | It looks like jam. | 1.0
Why does the boy run? | His bus is leaving and he fears to be late. | For the bus. | 0.6
"""


def mark_of(text):
    """A judge's words -> a mark; anything but a number from 0 to 1 is a ValueError."""
    if not 0 <= float(text) <= 1:
        raise ValueError(f"{text} is no mark from 0.0 to 1.0")
    return float(text)


def ask_judge(rows, cfg, file, say):
    """Gives each row a language model's mark, or None -> what went wrong. `file` keeps the marks as
    they come: what has one there is not asked about again."""
    done, todo = score.marked(file), {}
    for row in rows:
        right = re.sub(r"\s*(<AND>|<OR>)\s*", r" \1 ", " <OR> ".join(row["answers"]))
        words = JUDGE + " | ".join([row["question"], right, row["said"], ""])
        facts = json.dumps([words, cfg.judge, cfg.judge_model])
        row["key"] = hashlib.sha256(facts.encode()).hexdigest()[:16]
        todo |= {} if row["key"] in done else {row["key"]: (row["index"], words)}
    tokens = sum(len(words) for _, words in todo.values()) // 4
    dollars = (tokens + 4 * 3 * len(todo)) / 1e6 * cfg.judge_price  # 3 tokens said, four times that
    say(f"  {len(todo)} answers to {cfg.judge}: about {tokens:,} tokens, ${dollars:.2f}")
    how = cfg.judge, cfg.judge_model, os.environ.get("OPENAI_API_KEY", "")

    def ask(question):
        index, words = question
        try:
            mark = score.chat(*how, [{"type": "text", "text": words}], read=mark_of)
        except TimeoutError as error:
            raise TimeoutError(f"question {index}, {error}") from None
        return {"index": index, "mark": mark}

    faults, done = score.ask_all(todo, ask, file), score.marked(file)
    for row in rows:
        row["mark"] = done.get(row["key"], {}).get("mark")
    return faults


# --- a file ---------------------------------------------------------------------------------------


def read(path):
    """-> rows: {"index", "images" [bytes or path], "question", "answers", "options", "hint",
    "category", "split", "group": what its pictures are called}"""
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
        row["index"] = row.get("index") or str(number)
    for row in sorted(table, key=refers):  # those that have pictures of their own first
        try:
            pictures[row["index"]] = pictures_of(row, Path(path).parent, pictures)
        except (OSError, ValueError, KeyError, binascii.Error) as error:
            words = f"row {row['index']} has no readable image ({error})"
            raise common.UserError(f"{flag}: {words}") from None
    for row in table:
        images, group = pictures[index := row["index"]]
        facts = {name: row.get(name) or "" for name in ("question", "hint", "category", "split")}
        facts |= {"answers": several(row["answer"] or ""), "index": index, "images": images}
        rows.append(facts | {"options": {c: row[c] for c in LETTERS if row.get(c)}, "group": group})
    return rows


def refers(row):
    """Whether a row's picture is another row's: then "image" is short, that one's index."""
    text = row.get("image") or ""
    return len(text) < 64 and bool(text or not row.get("image_path"))


def pictures_of(row, folder, known):
    """A row's pictures and what names them."""
    text, path = row.get("image") or "", row.get("image_path") or ""
    if refers(row):
        return known[text]
    if text:
        files = [base64.b64decode(part, validate=True) for part in several(text)]
    else:
        files = [folder / name for name in several(path)]
    for file in files:  # tried now and decoded again when asked: all at once would fill the memory
        formats.decode(file)
    return files, path or hash(text)


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
    return "yesno" if all(plain(r["answers"][0]) in ("yes", "no") for r in rows) else "exact"


# --- metrics of a file: rows with "said" and "mark" -----------------------------------------------


def scores(rows, metric):
    """Shares from 0 to 1, and as "score" what tables print."""
    marks = [r["mark"] for r in rows]
    out = {"accuracy": float(np.mean(marks)), "score": 100 * float(np.mean(marks))}
    if metric == "contains":  # OCRBench counts
        out["score"] = sum(marks)
    elif metric == "pairs":  # MME: of the pictures both answers too
        pictures = {}
        for r in rows:
            pictures.setdefault((r["category"], r["group"]), []).append(r["mark"])
        out["accuracy+"] = float(np.mean([min(pair) for pair in pictures.values()]))
        out["score"] += 100 * out["accuracy+"]
    elif metric == "yesno":  # POPE's F1 of yes; an answer that is neither is no yes
        true = [plain(r["answers"][0]) == "yes" for r in rows]
        told = [yes_or_no(r["said"]) == "yes" for r in rows]
        hits = sum(a and b for a, b in zip(true, told))
        out |= {"precision": hits / max(sum(told), 1), "recall": hits / max(sum(true), 1)}
        out["f1"] = 2 * hits / max(sum(true) + sum(told), 1)
        out["score"] = 100 * out["f1"]
    return out


def total(rows, metric):
    """-> scores of a file, "questions", and scores of its "categories". In MMBench a question
    stands there once for each turn of its options (7, 1000007, 2000007, ...) and is right where
    all are; of MMMU the validation counts; POPE's and MM-Vet's rows are of several categories."""
    turns, kinds, more = {}, {}, {}
    if metric == "circular":
        more = {"of each turn": scores(rows, metric)["accuracy"]}
        for r in rows:
            turns.setdefault(r["index"].zfill(6)[-6:], []).append(r)
        rows = [some[0] | {"mark": min(r["mark"] for r in some)} for some in turns.values()]
    rows = [r for r in rows if r["split"] == "validation"] or rows
    for r in rows:
        names = r["category"].split(",") if metric in ("yesno", "judge") else [r["category"]]
        for name in names:
            kinds.setdefault(name.strip(), []).append(r)
    each = {name: scores(some, metric) for name, some in kinds.items()}
    # as published: POPE counts a row once for each category, MME adds its categories up
    out = scores(sum(kinds.values(), []) if metric == "yesno" else rows, metric)
    if metric == "pairs":
        out["score"] = sum(some["score"] for some in each.values())
    more |= {"categories": each} if any(each) else {}
    return out | {"questions": len(rows)} | more


def check(cfg):
    """What no type can say about the flags of scripts that answer questions."""
    common.refuse({
        f"--benchmark {cfg.benchmark} needs --eval-only RUN": cfg.benchmark and not cfg.eval_only,
        f"--questions {cfg.questions}: an even number, at least 2 (MME asks in pairs)":
            cfg.questions < 2 or cfg.questions % 2,
    })  # fmt: skip


def run(path, write, cfg, say=print, who="", at_once=32):
    """Answers a file; write(samples, most words of each) -> answers. -> its scores, printed too.
    who: which brain writes, where there are several."""
    rows, folder = read(path), Path(cfg.out)
    name, metric, faults = Path(path).stem + (who and "-" + who), metric_of(path, rows), []
    if metric == "judge" and not vars(cfg).get("judge", "").startswith("http"):
        raise common.UserError(f"--benchmark {path}: MM-Vet needs dualvla.py's --judge URL")
    for i in range(0, len(rows), at_once):
        some = rows[i : i + at_once]
        seen = ([formats.decode(file) for file in r["images"]] for r in some)
        samples = [{"images": i, "question": asked(r)} for i, r in zip(seen, some)]
        for row, said in zip(some, write(samples, LIMITS.get(metric, 64))):
            row["said"] = said
            row["mark"] = None if metric == "judge" else grade(said, row, metric)
    folder.mkdir(parents=True, exist_ok=True)
    if metric == "judge":
        faults = ask_judge(rows, cfg, folder / f"{name}-marks.jsonl", say)
    with open(folder / f"{name}.jsonl", "w") as file:
        for r in rows:
            facts = {"index": r["index"], "category": r["category"], "prediction": r["said"]}
            file.write(json.dumps(facts | {"answer": r["answers"], "mark": r["mark"]}) + "\n")
    missing = sum(row["mark"] is None for row in rows)
    if missing:
        raise common.UserError(
            f"--judge {cfg.judge}: {missing} of {len(rows)} answers have no mark ({faults[0]}); "
            f"the same command with --out {folder} goes on with what is missing"
        )
    found = total(rows, metric)
    about = {"benchmark": Path(path).name, "metric": metric, "brain": who, "run": cfg.eval_only}
    common.write_json(folder / f"{name}.json", about | found)
    words = ", ".join(f"{k} {value:.4g}" for k, value in found.items() if k != "categories")
    say(f"{Path(path).name} ({metric}){who and f', {who} brain'}: {words}; answers in {folder}")
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
