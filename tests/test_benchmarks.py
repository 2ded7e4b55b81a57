"""Published question files, graded as their own tools grade them.

VLMEvalKit is open-compass/VLMEvalKit at e8e78f0, VQA is GT-Vision-Lab/VQA's
PythonEvaluationTools/vqaEvaluation/vqaEval.py: what they return for these texts was worked out
with them, and by hand.
"""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import test_events
from test_events import Stub, stub  # noqa: F401

import common
import twinbrain
from dualvla import Config
from worlds import benchmarks, questions, score

# --- one answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("said, heard", [  # VQA processPunctuation, processDigitArticle
    ("two", "2"), ("dont", "don't"), ("none", "0"), ("The cup.", "cup"),
    ("a - red-hot cup", "redhot cup"),
    ("red-hot cup", "red hot cup"), ("1,000", "1000"), ("1,000 (about)", "1000 about"),
    ("3.5", "3.5"),
    ("50%", "50%"), ("50 %", "50 %"), ("$5", "$5"), ("5:30", "5:30"), ("it's", "it's"),
    ("what?!", "what"),
    ("youve", "you've"), ("she'dve", "she'd've"), ("shed", "shed"), ("were", "were"), ("a/b", "b"),
    ("OK\tgo\n", "ok go"), ("2.", "2"), ("u.s.", "us"), ("yall'd've", "y'all'd've"),
])  # fmt: skip
def test_texts_as_vqa_compares_them(said, heard):
    assert benchmarks.vqa_form(said) == benchmarks.vqa_form(heard) == heard


@pytest.mark.parametrize("said, answers, worth", [  # VLMEvalKit vqa_eval.py process_line
    ("two", ["2"] * 10, 1), ("dont", ["don't"] * 10, 1), ("50%", ["50"] * 10, 0),
    ("Yes.", ["yes"] * 10, 1),
    ("no", ["yes"] * 8 + ["no"] * 2, (8 * 2 / 3 + 2 * 1 / 3) / 10), ("maybe", ["yes"] * 10, 0),
    ("a", ["b"] + ["a"] * 3, (1 + 3 * 2 / 3) / 4), ("the cup", ["cup"], 1),
    # VQA's own table: said by none, one, two, three, four or more of ten
    *[("x", ["x"] * n + ["y"] * (10 - n), w) for n, w in enumerate([0, 0.3, 0.6, 0.9, 1, 1])],
])  # fmt: skip
def test_vqa_accuracy(said, answers, worth):
    assert benchmarks.vqa(said, answers) == pytest.approx(worth)


def test_anls_on_worked_examples():
    """VLMEvalKit vqa_eval.py anls_compute, hit_calculate: lengths are those of the raw texts."""
    assert benchmarks.edits("kitten", "sitting") == 3
    assert benchmarks.anls("sitting", ["kitten", "sittin"]) == pytest.approx(1 - 1 / 7)
    assert benchmarks.anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert benchmarks.anls("abc", ["xyzw"]) == 0  # less than a half
    assert benchmarks.anls("New  York", ["new york"]) == 1
    assert benchmarks.anls("new  yorc", ["new york"]) == pytest.approx(1 - 1 / 9)
    assert benchmarks.anls("ab", ["abcd"]) == 0.5 and benchmarks.anls("", ["a"]) == 0


FORMULA = "Handwritten Mathematical Expression Recognition"


@pytest.mark.parametrize("said, answer, category, worth", [  # VLMEvalKit image_vqa.py OCRBench
    ("It says STOP 4", "stop 4", "Scene Text-centric VQA", 1),
    ("It says STOP 4", "stop4", "Scene Text-centric VQA", 0), ("stop\n4", "Stop 4 ", "", 1),
    (r"\frac { a } { b }", r"\frac{a}{b}", FORMULA, 1), ("x = \n Y", "x=Y", FORMULA, 1),
    ("x = y", "x=Y", FORMULA, 0), ("x = y", "x=Y", "Doc-oriented VQA", 0),
])  # fmt: skip
def test_ocrbench_by_category(said, answer, category, worth):
    assert benchmarks.contains(said, ["nothing", answer], category) == worth
    row = {"answers": [answer], "category": category}
    assert benchmarks.grade(said, row, "contains") == worth


@pytest.mark.parametrize("said, heard", [  # VLMEvalKit yorn.py YOrN_Extraction
    ("Yes", "yes"), ("No.", "no"), ("I think yes, it is", "yes"), ("There is no cup", "no"),
    ("yes and no", ""), ("Not sure", ""), ("nothing", ""), ("", ""), ("yesterday", ""),
    ("Yes,it is", "yes"),
    ("no-one", "no"),
    ("**Yes**", "yes"), ("Answer:No", "no"), ("'no'", "no"),  # Unknown there, left to a judge
])  # fmt: skip
def test_yes_or_no_alone_as_a_word(said, heard):
    assert benchmarks.yes_or_no(said) == heard


FRUIT = {"A": "apple", "B": "banana", "C": "cherry", "D": "damson"}


@pytest.mark.parametrize("said, letter", [  # VLMEvalKit matching_util.py can_infer
    ("C", "C"), ("(B)", "B"), ("B.", "B"), ("**C**", "C"), ("The answer is C", "C"),
    ("I think the answer is C", "C"), ("The correct answer is option C", "C"), ("banana", "B"),
    ("It is a Banana.", "B"), ("two bananas", "B"), ("apple or banana", ""), ("A and B", ""),
    ("E", ""), ("b", ""), ("", ""), ("Z", ""),
    ("it was a banana, as anybody would say who has ever had one", ""),  # too long to be an option
    ("The correct answer is **B**. Here's why: A is red.", "B"),
    # left to a judge there, read as anybody would
    ("Answer C because A is wrong", "C"), ("The answer is C, not A or B", "C"),
    ("Answer: B, so not A", "B"),
    ("The right option is D and neither of A and B", "D"), ("D because of the skin", "D"),
    ("The answer is A or the answer is B", ""), ("A, B and C are all possible here", ""),
    ("A. That is what I can see there", "A"), ("(D) That is what I can see there", "D"),
    ("A man who holds two of them", ""), ("D-shaped things hang on both of them", ""),
])  # fmt: skip
def test_letters_are_read_from_answers(said, letter):
    assert benchmarks.choice(said, FRUIT) == letter


@pytest.mark.parametrize("said, letter", [
    ("Answer: B", "B"), ("The answer is **B**.", "B"), ("The correct option is (C)", "C"),
    ("A", "A"),
    ("A red", "A"), ("A.", "A"), ("it may be green", "C"),
    # where can_infer stumbles: A as an article, an option inside a word or a longer number
    ("it is covered in dots", ""), ("The answer is a blue one", "B"), ("A blue one", "B"),
    ("The answer is Blue", "B"), ("the answer is green", "C"),
])  # fmt: skip
def test_how_models_say_a_letter(said, letter):
    assert benchmarks.choice(said, {"A": "red", "B": "blue", "C": "green"}) == letter


def test_options_that_hold_one_another():
    options = {"A": "cup", "B": "cup holder", "C": "10", "D": "(a) 5%"}
    heard = [benchmarks.choice(s, options) for s in ("cup holder", "a cup", "100", "10.", "(a) 5%")]
    assert heard == ["B", "A", "", "C", "D"]


@pytest.mark.parametrize("said, grade", [("A", 1), ("A.", 1), ("", 0), ("the", 0), ("B", 0)])
def test_saying_nothing_is_not_the_answer_a(said, grade):
    """Without columns of options their words stand in the question."""
    row = {"options": {}, "answers": ["A"]}
    assert benchmarks.grade(said, row, "choice") == grade


@pytest.mark.parametrize("said, grade", [  # VLMEvalKit multiple_choice.py MMMU_preproc
    ("7.7", 1), ("It is 7.7 V", 1), ("eight", 1), ("8.0", 0), ("17.7", 0), ("7.75", 0), ("", 0),
    ("A", 0),
    ("it is 7.7, I think, but I am not at all sure of this", 0), ("7.7 or other answers", 0),
])  # fmt: skip
def test_open_questions_of_mmmu_have_any_of_their_answers(said, grade):
    row = {"options": {}, "answers": ["7.7", "eight"]}
    assert benchmarks.grade(said, row, "choice") == grade


def test_an_article_alone_is_an_answer():
    assert benchmarks.exact("A", ["A"]) == benchmarks.exact("a cup", ["the cup"]) == 1
    assert benchmarks.exact("", ["A"]) == benchmarks.exact("cup", ["A"]) == 0


# --- a file ---------------------------------------------------------------------------------------


def test_the_worlds_questions_are_written_by_command(status, tmp_path):
    for words in ((), ("popp", "3", "x.tsv"), ("pope", "few", "x.tsv"), ("pope", "3")):
        code, _, err = status(benchmarks.main, *words)
        assert code == 2 and "pope|seed|scienceqa|mme NUMBER FILE.tsv" in err
        assert err.count("\n") == 1
    assert status(benchmarks.main, "seed", "5", str(tmp_path / "x.tsv"))[0] == 0
    rows = benchmarks.read(tmp_path / "x.tsv")
    assert len(rows) == 5 and all(benchmarks.grade("", row, "choice") == 0 for row in rows)


SHOT = score.png(np.zeros((8, 8, 3), np.uint8))


def table(path, *rows):
    path.write_text("\n".join("\t".join(row) for row in rows))
    return path


def answered(path, said, cfg=None, **how):
    """-> what `run` finds where these are the answers, the answers' lines, what was printed."""
    cfg, lines = cfg or replace(Config(), out=str(path.parent / "out")), []
    found = benchmarks.run(path, lambda samples, limit: said, cfg, lines.append, **how)
    folder = path.parent / "out"
    assert json.loads((folder / f"{path.stem}.json").read_text()).items() >= found.items()
    return found, score.read_jsonl(folder / f"{path.stem}.jsonl"), lines


def marked(path, *marks):
    return [row | {"mark": mark} for row, mark in zip(benchmarks.read(path), marks, strict=True)]


@pytest.mark.parametrize("text, names", [
    ("", "needs the columns"), ("question\tanswer\n", "and a row"),
    ("index\tquestion\n1\twhat\n", "needs the columns"),
    ("index\timage\tquestion\tanswer\n1\t" + "A" * 80 + "\tq\ta\n", "row 1 has no readable image"),
    ("index\timage\tquestion\tanswer\n1\t7\tq\ta\n", "row 1 has no readable image"),
    ("index\timage_path\tquestion\tanswer\n1\tno.png\tq\ta\n", "row 1 has no readable image"),
])  # fmt: skip
def test_bad_files_are_named(tmp_path, text, names):
    file = tmp_path / "bad.tsv"
    file.write_text(text)
    with pytest.raises(common.UserError, match="--benchmark .*bad.tsv") as error:
        benchmarks.read(file)
    assert names in str(error.value)
    with pytest.raises(common.UserError):
        benchmarks.read(tmp_path / "missing.tsv")


def test_answers_written_as_lists():
    assert benchmarks.several("left") == ["left"]
    assert benchmarks.several("['a', \"b\"]") == ["a", "b"]
    assert benchmarks.several('["a"') == ['["a"']


def test_a_row_may_have_several_pictures(tmp_path):
    shots = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 200)]
    for name, shot in zip("ab", shots):
        score.Image.fromarray(shot).save(tmp_path / f"{name}.png")
    rows = [
        ("index", "image", "image_path", "question", "answer"),
        ("0", "1", "", "q", "x"), ("1", str([score.png(shot) for shot in shots]), "", "q", "x"),
        ("2", "", "['a.png', 'b.png']", "q", "x"), ("3", "1", "", "q", "x"),
    ]  # fmt: skip
    for row in benchmarks.read(table(tmp_path / "MMMU_DEV_VAL.tsv", *rows)):
        assert [benchmarks.formats.decode(i).mean() for i in row["images"]] == [0, 200]


def test_a_picture_that_would_start_another_program_is_refused(tmp_path):
    """Pillow hands EPS to Ghostscript."""
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    rows = [("index", "image_path", "question", "answer"), ("1", "a.eps", "q", "x")]
    with pytest.raises(common.UserError, match="row 1 has no readable image"):
        benchmarks.read(table(tmp_path / "POPE.tsv", *rows))


def test_a_longer_name_is_another_benchmark():
    rows = [{"options": {"A": "x"}, "answers": ["A"]}]
    assert benchmarks.metric_of("MME-RealWorld.tsv", rows) == "choice"
    assert benchmarks.metric_of("MME.tsv", rows) == "pairs"
    for answer, metric in (("Yes", "yesno"), ("no parking", "exact")):
        assert benchmarks.metric_of("x.tsv", [{"options": {}, "answers": [answer]}]) == metric


# --- the metric of a file -------------------------------------------------------------------------


def test_what_a_run_leaves_and_prints(tmp_path):
    rows = [("index", "image", "question", "answer", "category"),
            ("q7", SHOT, "what", "['a cup', 'mug']", "things"),
            ("q9", SHOT, "who", "me", "people")]  # fmt: skip
    file = table(tmp_path / "mine.tsv", *rows)
    found, lines, said = answered(file, ["The mug.", "you"])
    assert list(lines[0].values()) == ["q7", "things", "The mug.", ["a cup", "mug"], 1]
    assert list(lines[1]) == ["index", "category", "prediction", "answer", "mark"]
    assert found["categories"]["people"] == {"accuracy": 0, "score": 0}
    want = f"mine.tsv (exact): accuracy 0.5, score 50, questions 2; answers in {tmp_path / 'out'}"
    assert said == [want]


def test_pope_reports_f1_of_yes(tmp_path):
    """VLMEvalKit yorn.py POPE_rating: a row counts in each of its categories, unknown as no yes."""
    rows = [("index", "image", "question", "answer", "category")]
    truth = ["Yes", "Yes", "No", "No", "Yes"]
    kinds = ["random", "random,popular", "random", "popular", "popular"]
    rows += [(str(i), SHOT, "q", a, c) for i, (a, c) in enumerate(zip(truth, kinds))]
    said = ["Yes", "Perhaps", "Yes, there is", "hm", "yes"]  # right, unknown, wrong, unknown, right
    found, lines, _ = answered(table(tmp_path / "POPE.tsv", *rows), said)
    assert [line["mark"] for line in lines] == [1, 0, 0, 0, 1]
    parts = found.pop("categories")
    # of six: 2 found, 1 false alarm, the unknown one missed twice
    want = {"accuracy": 2 / 6, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "score": 400 / 7}
    assert found == pytest.approx(want | {"questions": 5})
    want = {"accuracy": 1 / 3, "precision": 1, "recall": 1 / 2, "f1": 2 / 3, "score": 200 / 3}
    assert parts["popular"] == pytest.approx(want) and set(parts) == {"random", "popular"}


def test_files_of_the_world_and_pairs(tmp_path):
    file = tmp_path / "MME_tabletop.tsv"
    benchmarks.export("mme", 8, file)
    rows = benchmarks.read(file)
    assert len(rows) == 8 and benchmarks.metric_of(file, rows) == "pairs"
    assert benchmarks.formats.decode(rows[0]["images"][0]).shape == (64, 64, 3)
    assert rows[0]["group"] == rows[1]["group"]
    found, *_ = answered(file, [r["answers"][0] for r in rows])
    assert found == {"accuracy": 1, "accuracy+": 1, "score": 200, "questions": 8}
    half = benchmarks.total(marked(file, 1, 1, 1, 0, 1, 1, 1, 1), "pairs")
    assert half["accuracy"] == 7 / 8 and half["accuracy+"] == 3 / 4


def test_mmes_pairs_share_a_picture_however_it_is_given(tmp_path):
    """VLMEvalKit yorn.py MME_rating: a score for each category, their sum in all. The second
    question names the picture by the first one's index."""
    shots = [images["static"] for images, *_ in questions.benchmark("pope", 2)]
    one, two = (score.png(shot) for shot in shots)
    rows = [("0", one, "q", "Yes", "existence"), ("1", "0", "q", "No", "existence"),
            ("2", two, "q", "Yes", "count"), ("3", "2", "q", "No", "count")]  # fmt: skip
    head = ("index", "image", "question", "answer", "category")
    found = benchmarks.total(marked(table(tmp_path / "MME.tsv", head, *rows), 1, 1, 1, 0), "pairs")
    points = {name: each["score"] for name, each in found.pop("categories").items()}
    assert points == {"existence": 200, "count": 50}
    assert found == {"accuracy": 0.75, "questions": 4, "accuracy+": 0.5, "score": 200 + 50}
    for i, shot in enumerate((one, two)):
        (tmp_path / f"{i}.png").write_bytes(base64.b64decode(shot))
    head = ("index", "image_path", "question", "answer", "category")
    rows = [(i, f"{int(i) // 2}.png", *rest) for i, _, *rest in rows]
    again = benchmarks.total(marked(table(tmp_path / "MME.tsv", head, *rows), 1, 1, 1, 0), "pairs")
    assert again.items() >= found.items()


def test_mmbench_counts_a_question_that_is_right_however_its_options_are_turned(tmp_path):
    """VLMEvalKit multiple_choice.py mcq_circular_eval: a turn's index is a million on."""
    rows = [
        ("index", "image", "question", "answer", "A", "B"),
        ("7", SHOT, "which", "A", "cup", "ball"), ("1000007", "7", "which", "B", "ball", "cup"),
        ("9", SHOT, "who", "B", "I", "you"), ("1000009", "9", "who", "A", "you", "I"),
    ]  # fmt: skip
    file = table(tmp_path / "MMBench_DEV_EN_V11.tsv", *rows)
    found, *_ = answered(file, ["A", "B", "B", "B"])
    assert found == {"accuracy": 0.5, "score": 50, "questions": 2, "of each turn": 0.75}


def test_mmmu_counts_its_validation_questions(tmp_path):
    """VLMEvalKit image_mcq.py MMMUDataset: "dev" has a row of its own."""
    rows = [("index", "image", "question", "answer", "A", "B", "split"),
            ("1", SHOT, "q", "A", "x", "y", "dev"), ("2", SHOT, "q", "B", "x", "y", "validation"),
            ("3", SHOT, "q", "['7', 'seven']", "", "", "validation")]  # fmt: skip
    found, *_ = answered(table(tmp_path / "MMMU_DEV_VAL.tsv", *rows), ["B", "B", "Seven."])
    assert found == {"accuracy": 1, "score": 100, "questions": 2}


def test_ocrbench_counts_right_answers(tmp_path):
    """VLMEvalKit image_vqa.py OCRBench: Final Score is a number of questions."""
    rows = [("index", "image", "question", "answer", "category"),
    ("1", SHOT, "q", "['x=Y']", FORMULA),
            ("2", SHOT, "q", "['Stop']", "Doc-oriented VQA"),
            ("3", SHOT, "q", "['Go']", FORMULA)]  # fmt: skip
    found, *_ = answered(table(tmp_path / "OCRBench.tsv", *rows), ["x = Y", "a stop sign", "go"])
    assert found["score"] == 2 and found["categories"][FORMULA]["score"] == 1


def test_how_many_words_an_answer_may_have(tmp_path):
    allowed = []
    for name, limit in (("POPE", 16), ("DocVQA", 128), ("MMStar", 64)):
        file = table(tmp_path / f"{name}.tsv", ("image", "question", "answer"), (SHOT, "q", "no"))
        cfg = replace(Config(), out=str(tmp_path))
        benchmarks.run(file, lambda s, limit: allowed.append(limit) or ["no"], cfg, str)
        assert allowed[-1] == limit


# --- MM-Vet's judge -------------------------------------------------------------------------------


@pytest.fixture
def vet(stub, tmp_path, monkeypatch):  # noqa: F811
    """A file of four questions, and the settings of a judge who gives 0.5 for each answer."""
    monkeypatch.setattr(score.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(test_events, "GOOD", 0.5)
    rows = [("index", "image", "question", "answer", "category"),
    ("v0", SHOT, "q0", "1<AND>2", "ocr,math"),
            ("v1", SHOT, "q1", "x<OR>y", "ocr"), ("v2", SHOT, "q2", "z", "rec"),
            ("v3", SHOT, "q3", "z", "rec")]  # fmt: skip
    cfg = replace(Config(), judge=stub, out=str(tmp_path / "out"))
    return table(tmp_path / "MMVet.tsv", *rows), cfg


SAID = ["one", "it is x", "z", "no"]


def test_a_judge_marks_mmvet(vet):
    """VLMEvalKit mmvet.py MMVet_acc: a category's mean is over all rows that name it."""
    Stub.faults = ["good", "words", "eleven", "good"]  # what is no mark is asked for again
    found, lines, said = answered(vet[0], SAID, vet[1])
    assert found["accuracy"] == 0.5 and found["score"] == 50 and set(found["categories"]) == {
        "ocr", "math", "rec"}  # fmt: skip
    assert [line["mark"] for line in lines] == [0.5] * 4 and len(Stub.asked) == 6
    assert "4 answers to http" in said[0] and "tokens, $0.00" in said[0] and len(said) == 2
    text = Stub.asked[0][0]["messages"][0]["content"][0]["text"]
    assert text.startswith(benchmarks.JUDGE) and text.endswith("\nq0 | 1 <AND> 2 | one | ")
    assert "<OR>" in benchmarks.JUDGE and "0.5\n" in benchmarks.JUDGE


def test_marks_are_kept_and_paid_for_once(vet):
    Stub.faults = ["good", "good"] + [500] * 6  # the third stays silent, the fourth is asked
    with pytest.raises(common.UserError, match="1 of 4 answers have no mark .question v2") as error:
        answered(vet[0], SAID, vet[1])
    assert f"with --out {vet[1].out} goes on" in str(error.value) and len(Stub.asked) == 9
    out = vet[0].parent / "out"
    assert [r["mark"] for r in score.read_jsonl(out / "MMVet.jsonl")] == [0.5, 0.5, None, 0.5]
    marks = out / "MMVet-marks.jsonl"
    marks.write_text(marks.read_text() + '\n{"key": "to')  # torn by a crash
    Stub.asked.clear()
    found, _, said = answered(vet[0], SAID, vet[1])
    assert found["accuracy"] == 0.5 and len(Stub.asked) == 1 and "1 answers to" in said[0]
    Stub.asked.clear()
    assert answered(vet[0], SAID, vet[1])[0] == found and not Stub.asked
    answered(vet[0], ["two", *SAID[1:]], vet[1])
    assert len(Stub.asked) == 1  # another answer is another question


def test_a_judge_that_is_gone_is_not_asked_on_and_on(vet):
    Stub.faults = [500] * 24
    with pytest.raises(common.UserError, match="4 of 4 .*question v0, no usable answer") as error:
        answered(vet[0], SAID, vet[1])
    assert "\n" not in str(error.value) and len(Stub.asked) == 3 * 6


def test_mmvet_needs_a_judge(vet):
    with pytest.raises(common.UserError, match="MM-Vet needs dualvla.py's --judge URL"):
        answered(vet[0], SAID, replace(vet[1], judge="offline"))


# --- both brains of a twin ------------------------------------------------------------------------

TINY = [
    "--steps", "1", "--demos", "20", "--episodes", "1", "--gifs", "0", "--questions", "2",
    "--batch", "4", "--optimizer", "adamw",
    "--domains", "in", "--width", "32", "--depth", "2", "--heads", "2", "--threads", "1",
    "--device", "cpu",
]  # fmt: skip


def test_each_brain_of_a_twin_answers(tmp_path, capsys, status):
    file, run, out = tmp_path / "POPE_tabletop.tsv", str(tmp_path / "run"), tmp_path / "out"
    benchmarks.export("pope", 6, file)
    twinbrain.main([*TINY, "--out", run])
    twinbrain.main(["--eval-only", run, "--benchmark", str(file), "--out", str(out)])
    said = capsys.readouterr().out
    asked = [r | {"answer": r["answers"][0]} for r in benchmarks.read(file)]
    asked = [r | {"images": [benchmarks.formats.decode(i) for i in r["images"]]} for r in asked]
    policy = twinbrain.load_policy(run, twinbrain.torch.device("cpu"))
    for side, vlm in policy.model.brains().items():
        assert f"POPE_tabletop.tsv (yesno), {side} brain: accuracy" in said
        found = json.loads((out / f"POPE_tabletop-{side}.json").read_text())
        lines = score.read_jsonl(out / f"POPE_tabletop-{side}.jsonl")
        batch = common.ask(asked, policy.processor, twinbrain.SYSTEM_L)
        right = policy.model.answer(vlm, batch)[1].tolist()  # word by word as in one pass
        assert [r["prediction"] == a["answer"] for r, a in zip(lines, asked)] == right
        assert found["brain"] == side and found["questions"] == 6
        assert any(right) and found["accuracy"] >= np.mean(right)
    code, _, err = status(twinbrain.main, "--benchmark", str(file))
    assert code == 2 and "needs --eval-only RUN" in err
