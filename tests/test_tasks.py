"""Scores equal those that others report: readers are tested against each official layout, metrics against examples
worked out by hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tars
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hive_scale.evaluate import easyvqa, gqa, mme, okvqa, scienceqa
from hive_scale.evaluate.answer_parsing import choice_letter, plain_normal, vqa_normal, yes_or_no
from hive_scale.evaluate.readers import rows
from hive_scale.evaluate.tasks import TASKS, find_task
from hive_scale.evaluate.vqa_types import ImageFile, Question, Unanswerable, decoded

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(seed: int) -> dict[str, Any]:
    return {"bytes": tars.image_bytes(seed=seed), "path": None}


def write(path: Path, rows: Sequence[dict[str, Any]], row_group: int = 2) -> None:
    """Rows as the hub stores them; a column called image holds {bytes, path}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0] if name != "image"}
    if "image" in rows[0]:
        columns["image"] = pa.array([row["image"] for row in rows], type=IMAGE)
    parquet.write_table(pa.table(columns), path, row_group_size=row_group)


def touch_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tars.image_bytes())


def ask(truth: dict[str, Any], about_image: bool = True) -> Question:
    return Question("q", "?", ImageFile("p", bytes) if about_image else None, truth)


# --- what an answer says


# by the code of the VQA challenge's server (EvalAI), as lmms-eval runs it
VQA = [
    ("The Dog.", "dog"),
    ("a  cat and an owl", "cat and owl"),
    ("an", ""),
    ("Two", "2"),
    ("none", "0"),
    ("zero", "0"),
    ("one hundred", "1 hundred"),
    ("eleven", "eleven"),  # the table ends at ten
    ("the answer is two.", "answer is 2"),
    ("1,000", "1000"),
    ("10,000 people", "10000 people"),
    ("3.5", "3.5"),  # a decimal point stays
    ("3.", "3"),
    ("u.s.a.", "usa"),
    ("no.", "no"),
    ("x" + "." * 40, "x........"),  # of full stops 32 are dropped: re.sub is given its flag for a count
    ("dont know", "don't know"),
    ("cannot", "cannot"),
    ("isn't", "isn't"),
    ("couldn'tve", "couldn't've"),
    ("10 o'clock", "10 o'clock"),
    ("oclock", "o'clock"),
    ("twas", "'twas"),
    ("somebody'd", "somebodyd"),
    ("Im", "im"),  # the table's capitals are never met
    ("its", "its"),
    ("it's", "it 's"),
    ("man's hat", "man 's hat"),
    ("let's go", "let 's go"),
    ("t-shirt", "t shirt"),  # between letters a mark parts words
    ("black/white", "black white"),
    ("red - white", "red white"),
    ("red -white t-shirt", "red white tshirt"),  # beside one space, a mark goes everywhere
    ("wi-fi / ethernet", "wi fi ethernet"),
    ("t-shirt;-hat", "t shirt hat"),  # the spaces that count are the answer's own, not those of marks before
    ("(red)", "red"),
    ("yes!no", "yes no"),
    ("c++", "c"),
    ("50%", "50%"),  # no mark of the table
    ("$5 & #1", "$5 & #1"),
    ("“red”", "“red”"),
    ("`a`", ""),
    ("\tred\nblue ", "red blue"),
    ("yes?\n", "yes"),
    ("", ""),
]
# the published table of contractions: those that it changes, and that come to it whole ("'s" is parted before)
CONTRACTIONS = """
aint arent cant couldve couldnt couldn'tve couldnt've didnt doesnt dont hadnt hadnt've hadn'tve hasnt havent hed
hed've he'dve hes howd howll hows isnt itd itd've it'dve itll maam mightnt mightnt've mightn'tve mightve mustnt mustve
neednt notve oclock oughtnt 'ows'at shant shed've she'dve shouldve shouldnt shouldnt've shouldn'tve somebodyd've
somebody'dve somebodyll somebodys someoned someoned've someone'dve someonell someones somethingd somethingd've
something'dve somethingll thats thered thered've there'dve therere theres theyd theyd've they'dve theyll theyre theyve
twas wasnt wed've we'dve weve werent whatll whatre whats whatve whens whered wheres whereve whod whod've who'dve wholl
whos whove whyll whyre whys wont wouldve wouldnt wouldnt've wouldn'tve yall yall'll y'allll yall'd've y'alld've
y'all'dve youd youd've you'dve youll youre youve
"""
NOT_IN_IT = "shes ive id ill im ids hell well were shell wed lets whens'"


@pytest.mark.parametrize(("answer", "normal"), VQA)
def test_answers_of_the_vqa_challenge(answer: str, normal: str) -> None:
    assert vqa_normal(answer) == normal


def test_every_mark_of_the_vqa_challenge_parts_words() -> None:
    for mark in ';/[]"{}()=+\\_-><@`!':
        assert vqa_normal(f"red{mark}hat") == "red hat"
    assert vqa_normal("yes?no, 1,a") == "yesno 1a"  # but for those that go before all else
    assert vqa_normal("red.hat") == "redhat"
    for mark in "':*&%$#~^|":
        assert vqa_normal(f"red{mark}hat") == f"red{mark}hat"


def test_every_contraction_of_the_vqa_challenge_gets_its_apostrophe_back() -> None:
    for word in CONTRACTIONS.split():
        put_back = vqa_normal(word)
        assert put_back != word
        assert put_back.replace("'", "") == word.replace("'", "")
        assert put_back.count("'") == word.count("'") + 1
    for word in NOT_IN_IT.split():
        assert vqa_normal(word) == word


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        (" NO ", "no"),
        ("yes, there is", "yes"),
        (".Yes", "yes"),
        ("Y", "yes"),
        ("n.", "no"),
        ("y e s", "other"),
        ("yn", "other"),
        ("not really", "no"),
        ("None of them", "no"),
        ("nothing", "no"),
        ("know", "no"),  # within four letters
        ("I know", "other"),  # "no" begins after the fourth letter, dots not counted
        ("a no", "no"),
        ("ab no", "other"),
        ("...a no", "no"),
        ("eyes", "yes"),
        ("no yes", "no"),
        ("noyes", "no"),
        ("It is: yes", "other"),
        ("k", "other"),
        ("", "other"),
    ],
)
def test_yes_and_no(answer: str, read: str) -> None:
    assert yes_or_no(answer) == read


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # alone, in either case
        ("B", "B"),
        (" B ", "B"),
        ("b", "B"),
        ("e\n", "E"),
        ("ä", ""),
        ("1", ""),
        # before a dot
        ("B.", "B"),
        ("B. because it is cold", "B"),
        ("B.because", "B"),
        ("b. because it is cold", ""),  # a letter before a dot is a capital in all scorers
        ("1.", ""),
        ("B because it is cold", ""),  # without its dot a letter must stand alone
        ("B) cold", ""),
        ("(B)", ""),
        ("B:", ""),
        # the sentence that ScienceQA's authors look for
        ("The answer is B.", "B"),
        ("Water boils. The answer is C.\nBECAUSE: it is warm", "C"),
        ("The answer is B because", "B"),
        ("The answer is Because", "B"),  # any sign may follow
        ("The answer is B", ""),  # but some must
        ("The answer is b.", ""),
        ("the answer is B.", ""),
        ("The answer is (B).", ""),
        ("The answer is A. No: The answer is B.", ""),  # one of them
        ("A. The answer is B.", "A"),  # the beginning goes first
        ("", ""),
    ],
)
def test_letters_of_choices(answer: str, letter: str) -> None:
    assert choice_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (" T-Shirt. ", "tshirt", True),
        ("T-Shirt", "t-shirt", True),
        ("Yes, ", "yes", True),
        ("yes!", "yes", True),
        ("two", "2", False),  # numbers and articles are OK-VQA's matter
        ("the man", "man", False),
        ("red -", "red", False),  # the space stays
        ("fire  hydrant", "fire hydrant", False),
        ("“red”", "red", False),  # no ASCII punctuation
        ("", "yes", False),
    ],
)
def test_exact_match_of_gqa(answer: str, truth: str, right: bool) -> None:
    assert (plain_normal(answer) == plain_normal(truth)) == right
    assert gqa.score([(ask({"answer": truth}), answer)]) == {"accuracy": 100.0 * right}


# --- metrics by hand


def test_mme_by_hand() -> None:
    def pair(category: str, name: str, answers: tuple[str, str]) -> list[tuple[Question, str]]:
        truths = ("yes", "no")
        facts = [{"answer": truth, "category": category, "image": name} for truth in truths]
        return [(ask(fact), answer) for fact, answer in zip(facts, answers, strict=True)]

    answered = [
        *pair("existence", "1.jpg", ("Yes", "No")),  # acc 100, acc+ 100
        *pair("existence", "2.jpg", ("yes", "Yes.")),  # acc 50, acc+ 0
        *pair("OCR", "1.jpg", ("", "maybe")),  # acc 0: no answer, and another
        *pair("code_reasoning", "1.png", ("no", "no")),  # acc 50
    ]
    assert mme.score(answered) == {
        "sum": 175.0,
        "perception": 125.0,
        "cognition": 50.0,
        "existence": 125.0,  # (200 + 50) / 2
        "OCR": 0.0,
        "code_reasoning": 50.0,
    }
    with pytest.raises(ValueError, match="has 1 questions"):
        mme.score(answered[:-1])


def test_mme_has_the_published_subtasks_and_maxima() -> None:
    """Arxiv 2306.13394, section 2: ten of perception, four of cognition, 200 points each."""
    perception = [
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ]
    cognition = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
    facts = [{"answer": "yes", "category": name, "image": "1"} for name in (*perception, *cognition)] * 2
    scores = mme.score([(ask(fact), "yes") for fact in facts])
    assert (scores.pop("sum"), scores.pop("perception"), scores.pop("cognition")) == (2800, 2000, 800)
    assert scores == dict.fromkeys([*perception, *cognition], 200)


def test_one_question_and_none_are_scored() -> None:
    assert okvqa.score([(ask({"answers": ["cat"] * 10}), "cat")]) == {"accuracy": 100.0}
    assert scienceqa.score([(ask({"answer": "A"}), "A")]) == {"image": 100.0}
    assert scienceqa.score([(ask({"answer": "A"}, about_image=False), "A")]) == {"full": 100.0, "image": 0.0}
    assert okvqa.score([]) == gqa.score([]) == {"accuracy": 0.0}
    assert scienceqa.score([]) == {"image": 0.0}
    assert mme.score([]) == {"sum": 0.0, "perception": 0.0, "cognition": 0.0}


@pytest.mark.parametrize(
    ("matches", "accuracy"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],  # 3: (3 x 2/3 + 7 x 1) / 10
)
def test_okvqa_by_hand(matches: int, accuracy: float) -> None:
    people = ["a Race"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert okvqa.soft_accuracy("race.", people) == pytest.approx(accuracy)


def test_okvqa_leaves_each_person_out_of_those_who_agree() -> None:
    """Two who agree of three: to each of the two there is one other, to the third there are two."""
    assert okvqa.soft_accuracy("race", ["race", "race", "run"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    assert okvqa.soft_accuracy("race", ["race"] * 4) == pytest.approx(1.0)
    assert okvqa.soft_accuracy("race", []) == 0


def test_okvqa_in_percent_with_a_missing_answer() -> None:
    answered = [(ask({"answers": ["two"] * 10}), "2"), (ask({"answers": ["cat"] * 10}), "")]
    assert okvqa.score(answered) == {"accuracy": 50.0}


def test_gqa_by_hand() -> None:
    answered = [(ask({"answer": "yes"}), "Yes."), (ask({"answer": "left"}), "right"), (ask({"answer": "man"}), "")]
    assert gqa.score(answered)["accuracy"] == pytest.approx(100 / 3)


def test_scienceqa_by_hand() -> None:
    answered = [
        (ask({"answer": "A"}), "A"),
        (ask({"answer": "B"}), "A. the first"),
        (ask({"answer": "C"}, about_image=False), "C. the third"),
        (ask({"answer": "C"}, about_image=False), "C"),
    ]
    assert scienceqa.score(answered) == {"full": 75.0, "image": 50.0}
    assert scienceqa.score(answered[:2]) == {"image": 50.0}  # without text questions there is no such figure


# --- official layouts


def check(question: Question, prompt: str, truth: dict[str, Any], seed: int | None) -> None:
    assert question.prompt == prompt
    assert question.truth == truth
    assert (question.image is None) == (seed is None)
    if question.image is not None and seed is not None:
        assert question.image.read() == tars.image_bytes(seed=seed)


def test_mme_from_parquet(tmp_path: Path) -> None:
    asked = ["Is this a dog? Please answer yes or no.", "Is this a cat? Please answer yes or no."]
    rows = [
        {"question_id": f"existence/{n}.jpg", "image": image(n), "question": q, "answer": a, "category": "existence"}
        for n in range(3)
        for q, a in zip(asked, ("Yes", "No."), strict=True)
    ]
    write(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    questions = mme.read(tmp_path)
    assert len({question.id for question in questions}) == 6
    assert questions[0].image == questions[1].image != questions[2].image
    truth = {"answer": "no", "category": "existence", "image": "existence/2.jpg"}
    check(questions[5], "Is this a cat?\nAnswer the question using a single word or phrase.", truth, seed=2)


def test_mme_from_its_release(tmp_path: Path) -> None:
    touch_image(tmp_path / "count" / "1.jpg")  # both of the release's ways to lay out a subtask
    (tmp_path / "count" / "1.txt").write_text("Are there two?\t Yes \nAre there three?\tNo.\n")
    touch_image(tmp_path / "posters" / "images" / "tt1.png")
    (tmp_path / "posters" / "questions_answers_YN").mkdir()
    (tmp_path / "posters" / "questions_answers_YN" / "tt1.txt").write_text("A?\tYes\nB?\tNo")
    questions = mme.read(tmp_path)
    assert [question.truth["image"] for question in questions] == ["count/1.jpg"] * 2 + ["posters/tt1.png"] * 2
    assert mme.score([(question, question.truth["answer"]) for question in questions])["sum"] == 400
    (tmp_path / "count" / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1\.txt has no image of its name"):
        mme.read(tmp_path)


@pytest.mark.parametrize(("limit", "asked"), [(1, [0, 3]), (2, [0, 1, 3, 4]), (3, range(6)), (9, range(6))])
def test_a_limit_leaves_the_pairs_of_mme_whole(tmp_path: Path, limit: int, asked: Sequence[int]) -> None:
    """Also where the questions about an image do not stand together, and images of two subtasks share a name."""
    told = [("count", "1", "Yes"), ("count", "2", "No"), ("color", "1", "Yes")] * 2
    rows = [
        {"question_id": f"{name}.jpg", "image": image(0), "question": "?", "answer": answer, "category": category}
        for category, name, answer in told
    ]
    write(tmp_path / "test-00000-of-00001.parquet", rows)
    questions = mme.read(tmp_path)
    some = mme.TASK.first(questions, limit)
    assert some == [questions[place] for place in asked]
    mme.score([(question, "yes") for question in some])  # which refuses half a pair
    assert gqa.TASK.first(questions, limit) == questions[:limit], "elsewhere each question is scored by itself"


def test_gqa_from_parquet(tmp_path: Path) -> None:
    rows = [{"id": "07", "imageId": "n1", "question": "Is it red?", "answer": "no", "isBalanced": True}]
    write(tmp_path / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    images = tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    write(images, [{"id": "n0", "image": image(0)}, {"id": "n1", "image": image(1)}])
    (question,) = gqa.read(tmp_path)
    check(question, "Is it red?\nAnswer the question using a single word or phrase.", {"answer": "no"}, seed=1)
    write(images, [{"id": "n0", "image": image(0)}])
    with pytest.raises(ValueError, match=r"no image n1; the files are at https"):
        gqa.read(tmp_path)


def test_gqa_from_its_release(tmp_path: Path) -> None:
    item = {"imageId": "n161313", "question": "Is it red?", "answer": "no", "types": {}}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps({"201307251": item}))
    with pytest.raises(ValueError, match=r"n161313\.jpg: unpack"):
        gqa.read(tmp_path)
    touch_image(tmp_path / "images" / "n161313.jpg")
    (question,) = gqa.read(tmp_path)
    assert question.id == "201307251"


def test_okvqa_from_parquet(tmp_path: Path) -> None:
    rows = [{"question_id": "2971475", "image": image(3), "question": "Which sport?", "answers": ["race"] * 10}]
    write(tmp_path / "data" / "val2014-00000-of-00002.parquet", rows)
    (question,) = okvqa.read(tmp_path)
    prompt = (
        "Which sport?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    check(question, prompt, {"answers": ["race"] * 10}, seed=3)


def test_okvqa_from_its_release(tmp_path: Path) -> None:
    asked = {"questions": [{"image_id": 297147, "question": "Which sport?", "question_id": 2971475}]}
    answers = [{"answer_id": i, "raw_answer": "racing", "answer_confidence": "yes", "answer": "race"} for i in range(3)]
    told = {"annotations": [{"image_id": 297147, "question_id": 2971475, "answers": answers}]}
    (tmp_path / okvqa.ASKED).write_text(json.dumps(asked))
    with pytest.raises(ValueError, match=r"mscoco_val2014_annotations\.json not found"):
        okvqa.read(tmp_path)
    (tmp_path / okvqa.ANSWERED).write_text(json.dumps(told))
    touch_image(tmp_path / "val2014" / "COCO_val2014_000000297147.jpg")
    (question,) = okvqa.read(tmp_path)
    assert question.truth == {"answers": ["race"] * 3}
    (tmp_path / okvqa.ANSWERED).write_text(json.dumps({"annotations": []}))
    with pytest.raises(ValueError, match="no answers to question 2971475"):
        okvqa.read(tmp_path)


SCIENCE = {"question": "Which is warmer?", "choices": ["ice", "steam"], "answer": 1, "hint": "Water boils."}
SCIENCE_PROMPT = (
    "Context: Water boils.\nWhich is warmer?\nA. ice\nB. steam"
    "\nAnswer with the option's letter from the given choices directly."
)


def test_scienceqa_from_parquet(tmp_path: Path) -> None:
    rows = [SCIENCE | {"image": image(4)}, SCIENCE | {"image": None, "hint": ""}, SCIENCE | {"image": image(5)}]
    write(tmp_path / "ScienceQA-FULL" / "test-00000-of-00001.parquet", rows)
    write(tmp_path / "ScienceQA-IMG" / "test-00000-of-00001.parquet", rows[:1])  # part of the former
    first, second, third = scienceqa.read(tmp_path)
    check(first, SCIENCE_PROMPT, {"answer": "B"}, seed=4)
    check(second, SCIENCE_PROMPT.removeprefix("Context: Water boils.\n"), {"answer": "B"}, seed=None)
    check(third, SCIENCE_PROMPT, {"answer": "B"}, seed=5)


def test_scienceqa_from_its_release(tmp_path: Path) -> None:
    problems = {"4": SCIENCE | {"image": "image.png"}, "5": SCIENCE | {"image": None}, "6": SCIENCE | {"image": None}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["6"], "test": ["4", "5"]}))
    touch_image(tmp_path / "images" / "test" / "4" / "image.png")
    first, second = scienceqa.read(tmp_path)
    check(first, SCIENCE_PROMPT, {"answer": "B"}, seed=0)
    assert second.image is None
    problems["5"]["answer"] = 2
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ValueError, match="question 5: its answer is choice 2 of 2"):
        scienceqa.read(tmp_path)
    problems["5"]["answer"] = -1
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ValueError, match="question 5: its answer is choice -1 of 2"):
        scienceqa.read(tmp_path)


def test_easyvqa_from_its_package(tmp_path: Path) -> None:
    touch_image(tmp_path / "test" / "images" / "7.png")
    asked = [["what shape is in the image?", "circle", 7], ["is there a circle?", "yes", 7]]
    (tmp_path / "test" / "questions.json").write_text(json.dumps(asked))
    questions = easyvqa.read(tmp_path)
    assert questions[0].image == questions[1].image
    answered = [(questions[0], "Circle."), (questions[1], "no")]
    assert easyvqa.score(answered) == {"accuracy": 50.0, "named": 100.0}
    assert easyvqa.score(answered[:1]) == {"accuracy": 100.0, "named": 100.0}
    no = [(ask({"answer": "no"}), "no"), (ask({"answer": "red"}), "blue"), (ask({"answer": "box"}), "box")]
    assert easyvqa.score(no) == {"accuracy": pytest.approx(200 / 3), "named": 50.0}
    assert easyvqa.score([]) == {"accuracy": 0.0, "named": 0.0}


# --- what a user gets wrong


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_wrong_folder_is_named_with_the_place_to_get_the_files(tmp_path: Path, task: Any) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"it holds notes\.txt\); the files are at "):
        task.read(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        task.read(tmp_path / "nowhere")


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "val2014-0.parquet", [{"question_id": "1", "image": image(0), "question": "?"}])
    with pytest.raises(ValueError, match="no column 'answers': its columns are question_id, question, image"):
        okvqa.read(tmp_path)


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "val2014-0.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"val2014-0\.parquet cannot be read as parquet"):
        okvqa.read(tmp_path)


FILES = {  # of each official layout
    "mme": ["OCR/1.txt"],
    "gqa": ["testdev_balanced_questions.json"],
    "okvqa": [okvqa.ASKED, okvqa.ANSWERED],
    "scienceqa": ["problems.json", "pid_splits.json"],
    "easyvqa": ["test/questions.json"],
}
NAMES = ("test", "question", "questions", "annotations", "question_id", "image_id", "answers", "answer", "choices")
values = st.recursive(
    st.none() | st.integers() | st.text("ab\ud83d", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=9,
)
contents = st.binary(max_size=9) | values.map(lambda value: json.dumps(value).encode())


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents)
def test_files_of_another_shape_are_refused_with_the_place_to_get_them(
    tmp_path: Path, name: str, content: bytes
) -> None:
    for file in FILES[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with suppress(ValueError):
        assert isinstance(find_task(name).read(tmp_path), list)


def test_a_record_of_another_shape_is_told_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "questions.json").write_text('[["what?", "red"]]')
    with pytest.raises(ValueError, match="a record is not as published"):
        find_task("easyvqa").read(tmp_path)
    (tmp_path / "test" / "questions.json").write_text("[" * 99_999)
    with pytest.raises(ValueError, match=r"questions\.json cannot be read as JSON"):
        find_task("easyvqa").read(tmp_path)
    (tmp_path / "testdev_balanced_questions.json").write_text('{"1": {"question": "?"}}')
    with pytest.raises(ValueError, match=r"a record is not as published \(KeyError: 'answer'\); the files are at http"):
        find_task("gqa").read(tmp_path)


def test_a_column_of_bare_bytes_is_no_column_of_images(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": pa.array([b"bytes"]), "question": pa.array(["?"])}), path)
    with pytest.raises(ValueError, match="column 'image' holds no images as the hub has them"):
        rows([path], "image", ["question"])


def test_a_damaged_row_group_of_images_is_a_broken_image(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"question": "?", "image": image(i)} for i in range(4)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    at = next(column.column(i) for i in range(3) if column.column(i).path_in_schema == "image.bytes").data_page_offset
    content[at : at + 50] = b"\xff" * 50
    (tmp_path / "a.parquet").write_bytes(content)
    found = rows([tmp_path / "a.parquet"], "image", ["question"])
    assert found[2]["image"].read() == image(2)["bytes"]
    with pytest.raises(Unanswerable, match=r"a\.parquet:0:1: .*cannot be read as parquet"):
        decoded(found[1]["image"], lambda data: torch.zeros(1))


def test_a_misspelt_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean scienceqa"):
        find_task("sciencqa")
