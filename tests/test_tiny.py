"""The embedded backbone: loads like any Qwen3-VL, reads each word as one token, sees the tabletop.

Answers are also checked by a second reading of the scenes, written without worlds/questions.py.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from common import mrope_positions, patchify, quick_vision
from worlds.questions import ASK, FIRST_TEST_SEED, ask, benchmark
from worlds.tabletop import COLOURS, MOVABLES, TARGETS, Tabletop, all_sentences

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    return quick_vision(loaded.eval())


def prompt(tokenizer, images, text):
    """-> inputs of the model for one question, static camera only"""
    image = images["static"]
    grid = (1, image.shape[0] // 8, image.shape[1] // 8)
    pads = "<|image_pad|>" * (grid[1] * grid[2] // 4)
    chat = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{text}<|im_end|>\n"
    ids = tokenizer.encode(chat + "<|im_start|>assistant\n", add_special_tokens=False)
    positions = mrope_positions(ids, [grid], tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    return dict(
        input_ids=torch.tensor([ids]),
        position_ids=torch.from_numpy(positions)[:, None],
        pixel_values=torch.from_numpy(patchify(image, 8)),
        image_grid_thw=torch.tensor([grid]),
    )


def test_folder_is_small_and_complete(model):
    files = {path.name: path.stat().st_size for path in TINY.iterdir() if path.suffix != ".py"}
    wanted = "config generation_config tokenizer tokenizer_config preprocessor_config accuracy"
    assert {f"{name}.json" for name in wanted.split()} <= set(files)
    assert sum(files.values()) < 8_000_000
    assert 1_500_000 < sum(p.numel() for p in model.parameters()) < 2_500_000
    assert model.config.vision_config.deepstack_visual_indexes


def test_every_word_is_one_token(tokenizer):
    for text in all_sentences(n=1):
        assert len(tokenizer.encode(text)) == len(text.split()), text
    for word in [*COLOURS, *MOVABLES, *TARGETS, "yes", "no", "left", "behind", "A", "7"]:
        assert len(tokenizer.encode(word)) == 1
    for token in ["🔍", "<|action|>", "<|propri|>", "<loc_31>", "<robot_action_255>"]:
        assert len(tokenizer.encode(token * 3)) == 3


def test_any_text_survives_encoding(tokenizer):
    for text in [
        "zébra ☃ 1234\n\n",
        "<|im_start|>red<|im_end|>",
        "Question: a red\tblock <loc_3> ",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_is_qwens(tokenizer):
    parts = [{"type": "image"}, {"type": "text", "text": "Question: what is at <loc_3><loc_4>"}]
    chat = [{"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Question: what is at <loc_3><loc_4><|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(tokenizer.encode(text)) == 4 + 1 + 4 + 2 + 2


def test_pictures_keep_their_size():
    processor = AutoImageProcessor.from_pretrained(TINY, backend="pil")
    for size in (64, 32):
        image = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
        out = processor(image, return_tensors="np")
        assert out["image_grid_thw"].tolist() == [[1, size // 8, size // 8]]
        assert np.array_equal(out["pixel_values"], patchify(image, 8))


def test_it_answers_held_out_questions(model, tokenizer):
    kinds = ["colour", "shape", "exist", "yesno", "position", "relation", "count"]
    world, rng, right, end = Tabletop(), random.Random(0), [], tokenizer.eos_token_id
    for seed in range(FIRST_TEST_SEED + 777, FIRST_TEST_SEED + 10**6):
        images = world.scatter(seed)["images"]
        question = ask(world, rng, kinds[len(right) % len(kinds)])
        if question is None:
            continue
        inputs = prompt(tokenizer, images, "Question: " + question.question)
        want = tokenizer.encode(question.answer) + [end]
        ids = torch.cat([inputs["input_ids"], torch.tensor([want[:-1]])], 1)
        after = inputs["position_ids"].max() + torch.arange(1, len(want))
        inputs["position_ids"] = torch.cat([inputs["position_ids"], after.expand(3, 1, -1)], dim=2)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids}).logits[0, -len(want) :]
        right.append(logits.argmax(-1).tolist() == want)
        if len(right) == 105:
            break
    assert np.mean(right) >= 0.9


def test_recorded_accuracy_does_not_fall():
    """What the shipped weights reached, of enough questions that one in a hundred is seen."""
    facts = json.loads((TINY / "accuracy.json").read_text())
    for kind in ("exist", "relation", "count", "point", "position", "lean"):
        assert facts["accuracy"][kind] >= 0.95, kind
    for kind in ("shape", "caption", "colour"):
        assert facts["accuracy"][kind] >= 0.97 and facts["questions"][kind] >= 10_000, kind


def truth(world, text):
    """A second reading: the answer to a question, found in the scene from the words alone."""
    things = [t for t in world.things if t.colour in COLOURS and t.kind in MOVABLES + TARGETS]
    if found := re.fullmatch(r"(?:what|which) colour (?:is|does) the (\w+)(?: have)?", text):
        return next(t.colour for t in things if t.kind == found[1])
    if found := re.fullmatch(r"(?:what is the|what kind of thing is) (\w+)(?: thing)?", text):
        return next(t.kind for t in things if t.colour == found[1])
    if found := re.fullmatch(r"(?:how many|count the) (\w+?)s?(?: things)?(?: are there)?", text):
        return str(sum(found[1] in (t.kind, t.colour, "coloured") for t in things))
    if found := re.fullmatch(r"is there an? (\w+) (\w+) in (?:the|this) image", text):
        return "yes" if any((t.colour, t.kind) == found.groups() for t in things) else "no"
    if found := re.fullmatch(r"is the (\w+ \w+) at the (left|front) or at the \w+", text):
        thing = next(t for t in things if t.name == found[1])
        words, value = {"left": ("left right", thing.x), "front": ("front back", thing.y)}[found[2]]
        return words.split()[value > 0.5]
    return None


def test_answers_agree_with_a_second_reading():
    world, rng, seen = Tabletop(), random.Random(1), set()
    for seed in range(400):
        world.scatter(seed)
        for kind in ("colour", "shape", "count", "exist", "position", "yesno"):
            question = ask(world, rng, kind)
            answer = question and truth(world, question.question)
            if answer is not None:
                assert answer == question.answer, (seed, question)
                seen.add(kind)
    assert seen == {"colour", "shape", "count", "exist", "position", "yesno"}


def test_relations_agree_with_the_picture_plane():
    world, rng, checked = Tabletop(), random.Random(2), 0
    for seed in range(300):
        world.scatter(seed)
        question = ask(world, rng, "relation")
        found = question and re.search(
            r"the (\w+ \w+) (?:seen from|of) the (\w+ \w+)$", question.question
        )
        if not found:
            continue
        a, b = (next(t for t in world.things if t.name == found[i]) for i in (1, 2))
        across, along = a.x - b.x, a.y - b.y
        ok = {"left": -across, "right": across, "front": -along, "behind": along}
        assert ok[question.answer] == max(ok.values())
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("name", ["pope", "seed", "scienceqa", "mme"])
def test_benchmarks_are_balanced_and_repeatable(name):
    first = [(q, a, tuple(o)) for _, q, a, o in benchmark(name, 120)]
    assert first == [(q, a, tuple(o)) for _, q, a, o in benchmark(name, 120)]
    answers, choices = [a for _, a, _ in first], first[0][2]
    assert all(a in choices for a in answers)
    worst = max(answers.count(c) for c in choices) / len(answers)
    assert worst <= (0.5 if len(choices) == 2 else 0.4)
    if name == "mme":
        assert answers == ["yes", "no"] * 60


def test_questions_cover_every_kind():
    world, rng = Tabletop(), random.Random(3)
    world.scatter(11)
    for kind in ASK:
        drawn = [q for q in (ask(world, rng, kind) for _ in range(30)) if q]
        assert drawn and all(q.kind == kind and q.question == q.question.strip() for q in drawn)
        assert all(q.answer in q.choices for q in drawn if q.choices)
