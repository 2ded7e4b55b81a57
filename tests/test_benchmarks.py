"""Published question files, graded as their own tools grade them; more in test_events.py."""

import base64

import pytest

from worlds import benchmarks, questions, score


@pytest.mark.parametrize("said, letter", [
    ("Answer: B", "B"), ("The answer is **B**.", "B"), ("The correct option is (C)", "C"),
    ("it is covered in dots", ""), ("The answer is a blue one", "B"), ("A blue one", "B"),
])  # fmt: skip
def test_how_models_say_a_letter(said, letter):
    assert benchmarks.choice(said, {"A": "red", "B": "blue", "C": "green"}) == letter


@pytest.mark.parametrize("said, grade", [("A", 1), ("A.", 1), ("", 0), ("the", 0), ("B", 0)])
def test_saying_nothing_is_not_the_answer_a(said, grade):
    """Without columns of options their words stand in the question."""
    row = {"options": {}, "answers": ["A"]}
    assert benchmarks.grade(said, row, "choice") == grade


def test_an_article_alone_is_an_answer():
    assert benchmarks.exact("A", ["A"]) == benchmarks.exact("a cup", ["the cup"]) == 1
    assert benchmarks.exact("", ["A"]) == benchmarks.exact("cup", ["A"]) == 0


def test_the_worlds_questions_are_written_by_command(status, tmp_path):
    for words in ((), ("popp", "3", "x.tsv"), ("pope", "few", "x.tsv"), ("pope", "3")):
        code, _, err = status(benchmarks.main, *words)
        assert code == 2 and "pope|seed|scienceqa|mme NUMBER FILE.tsv" in err
        assert err.count("\n") == 1
    assert status(benchmarks.main, "seed", "5", str(tmp_path / "x.tsv"))[0] == 0
    rows = benchmarks.read(tmp_path / "x.tsv")
    assert len(rows) == 5 and all(benchmarks.grade("", row, "choice") == 0 for row in rows)


def written(folder, name, head, rows):
    lines = ["\t".join(cells) for cells in (head, *rows)]
    (folder / name).write_text("\n".join(lines))
    return folder / name


def test_mmes_pairs_share_a_picture_however_it_is_given(tmp_path):
    """Its second question names the picture by the first one's index; a score for each category."""
    shots = [images["static"] for images, *_ in questions.benchmark("pope", 2)]
    one, two = (score.png(shot) for shot in shots)
    head = ("index", "image", "question", "answer", "category")
    rows = [("0", one, "q", "Yes", "existence"), ("1", "0", "q", "No", "existence"),
            ("2", two, "q", "Yes", "count"), ("3", "2", "q", "No", "count")]  # fmt: skip
    read = benchmarks.read(written(tmp_path, "MME.tsv", head, rows))
    found = benchmarks.total([1, 1, 1, 0], read, "pairs")
    assert found == {"accuracy": 0.75, "questions": 4, "accuracy+": 0.5, "score": 200 + 50}
    for i, shot in enumerate((one, two)):
        (tmp_path / f"{i}.png").write_bytes(base64.b64decode(shot))
    head = ("index", "image_path", "question", "answer", "category")
    rows = [(i, f"{int(i) // 2}.png", *rest) for i, _, *rest in rows]
    read = benchmarks.read(written(tmp_path, "MME.tsv", head, rows))
    assert benchmarks.total([1, 1, 1, 0], read, "pairs") == found


def test_a_longer_name_is_another_benchmark():
    rows = [{"options": {"A": "x"}, "answers": ["A"]}]
    assert benchmarks.metric_of("MME-RealWorld.tsv", rows) == "choice"
    assert benchmarks.metric_of("MME.tsv", rows) == "pairs"
