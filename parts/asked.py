"""Questions about pictures: the tabletop's own, and files of LLaVA's and VLMEvalKit's formats."""

import base64
import csv
import json
import os
import random
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from parts import formats
from parts.formats import decode, read_json, reading, stopped_by
from parts.process import UserError, stamp
from worlds import questions, tabletop


def question_sets(names, count, size=64, wrist_size=32):
    """The world's question sets in the forms of published benchmarks -> {name: [sample]}."""
    return {
        name: [
            {"images": list(images.values()), "question": question, "answer": answer}
            for images, question, answer, _ in questions.benchmark(name, count, 0, size, wrist_size)
        ]
        for name in names
    }


class Questions:
    """Questions about tabletop scenes, an endless supply: sample i is drawn from its own seed."""

    def __init__(self, size=64, wrist_size=32):
        self.world = tabletop.Tabletop("bridge", size, wrist_size)

    def __len__(self):
        return 10_000_000

    def get(self, index, rng):
        question = None
        while question is None:  # a scene does not allow every kind of question
            observation = self.world.scatter(index)
            question = questions.ask(self.world, random.Random(int(rng.integers(2**31))))
        return {
            "images": list(observation["images"].values()),
            "question": question.question,
            "answer": question.answer,
        }


class QuestionFile:
    """LLaVA's JSON or JSONL, or a VLMEvalKit TSV: samples like those of `Questions`."""

    def __init__(self, path, folder, skip_bad=False, every=False, again=False):
        self.path, self.faults, items = path, [], {}
        rows = self.rows()
        self.pasted = {}  # of a TSV: index -> picture
        if path.suffix == ".tsv":
            self.pasted = {row.get("index"): row.get("image") for row in rows}
        for number, row in enumerate(rows, 1):
            try:
                with reading(f"{path}, item {number}"):
                    row = json.loads(row) if isinstance(row, str) else row
                    asked = self.ask(row) if "conversations" in row else [self.choose(row)]
                    if not all(answer.strip() for _, _, answer in asked):
                        raise ValueError("an empty answer, from which nothing can be learned")
                    items[number] = asked
            except UserError as fault:
                self.faults.append(str(fault))
        for number, fault in self.bad(items, folder, every, again).items():
            del items[int(number)]
            self.faults.append(fault)
        self.samples = [sample for asked in items.values() for sample in asked]
        if (self.faults and not skip_bad) or not self.samples:
            raise stopped_by(self.faults, path)

    def bad(self, items, folder, every, again):
        """The items whose pictures are none -> {number: fault}. They are looked for once, if
        `every`, and remembered in folder."""
        images = {number: asked[0][0] for number, asked in items.items() if asked}
        files = [image for some in images.values() for image in some if isinstance(image, Path)]
        files = [file.resolve() for file in (self.path, *files)]
        kept = folder / f"{files[0].name}-{stamp(files, 'questions')}.json"
        if not again:
            with suppress(UserError):  # there is none yet, or only half of it
                return read_json(kept)
        bad = {}
        if not (every or kept.exists()):
            return bad
        words = f"reading {self.path.name} (once)"
        for number, some in tqdm(images.items(), words, leave=False, disable=None):
            try:
                for image in some:
                    with reading(f"{self.path}, item {number}, field image"):
                        decode(image)
            except UserError as fault:
                bad[number] = str(fault)
        folder.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(f".{os.urandom(4).hex()}.tmp")
        draft.write_text(json.dumps(bad))
        os.replace(draft, kept)
        return bad

    def rows(self):
        with reading(self.path):
            if self.path.suffix == ".json":
                rows = json.loads(self.path.read_text("utf-8"))
                if not isinstance(rows, list):
                    raise ValueError("not a list of conversations")
                return rows
            if self.path.suffix == ".jsonl":
                return [line for line in self.path.read_text("utf-8").split("\n") if line.strip()]
            csv.field_size_limit(2**31 - 1)
            with open(self.path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file, delimiter="\t"))

    def find(self, name):
        for folder in (self.path.parent, self.path.parent / "images", formats.DATA):
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"field image: no file {name} beside it, in images/ or in {formats.DATA}")

    def ask(self, row):
        """A conversation -> a sample for each answer; what was said before it comes first."""
        images, said = row.get("image", []), row["conversations"]
        images = [self.find(name) for name in ([images] if isinstance(images, str) else images)]
        if not images:
            raise ValueError("field image: none; questions without a picture are not for this")
        marks = sum(turn["value"].count("<image>") for turn in said)
        if marks > len(images):
            raise ValueError(f"field conversations: {marks} marks <image>, {len(images)} pictures")
        text, out = "", []
        for turn in said:
            if turn["from"] in ("gpt", "assistant"):
                out.append((images, text.strip(), turn["value"]))
            text += turn["value"].replace("<image>", "").strip() + "\n"
        if not out:
            raise ValueError("field conversations: no turn from gpt or assistant, so no answer")
        return out

    def choose(self, row):
        """A row of a TSV: base64 or a path; a short entry is the index of the row that has it."""
        image = row.get("image") or ""
        if image:
            image = self.pasted.get(image) or image
            image = json.loads(image.replace("'", '"')) if image.startswith("[") else [image]
            image = [base64.b64decode(part, validate=True) for part in image]
        else:
            image = [self.find(row["image_path"])]
        options = [f"{letter}. {row[letter]}" for letter in "ABCDEFGH" if row.get(letter)]
        if not row.get("question") or not row.get("answer"):
            raise ValueError(f"field {'answer' if row.get('question') else 'question'} is empty")
        return image, "\n".join([row["question"], *options]), row["answer"]

    def __len__(self):
        return len(self.samples)

    def get(self, index, rng=None):
        images, question, answer = self.samples[index]
        with reading(f"{self.path}, sample {index}, field image"):
            return {"images": [decode(i) for i in images], "question": question, "answer": answer}
