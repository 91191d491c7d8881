"""PLM-nano's pictures: answers are what the pictures show, a number draws the same again, and what is held out is."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from perception.errors import ConfigError, MediaError
from perception_lm.evaluation import nano as evaluation
from perception_lm.regions import parse_boxes
from perception_lm.tokenizer import LlamaTokenizer, read_ranks
from perception_lm.training.nano import canvas, charts, clips, emoji, reading, scenes, world
from perception_lm.training.nano.mixture import TASKS, Mixture, conversation, make
from perception_lm.training.nano.tokens import CAPITALS, corpus, train_ranks
from perception_lm.training.nano.world import COLOURS, FONTS, GROUNDS, SIDE, STYLES, Phrasings, Sample, Turn, World

WORDS = ("bell", "carrot", "dolphin", "fig", "house", "lamp", "moon", "river", "stone", "tulip")
FLAGS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "pink": (255, 0, 255)}


@pytest.fixture(scope="module")
def plain() -> World:
    """A world that needs no data: words of its own, five emoji."""
    try:
        canvas.font(FONTS["train"][0], 8)
    except MediaError as error:
        pytest.skip(f"the fonts are not installed: {error}")
    flags = {f"{name} flag": (Image.new("RGBA", (30, 20), rgb),) for name, rgb in FLAGS.items()}
    return World(words=WORDS, sprites=emoji.Sprites(flags))


def drawn(task: str, plain: World, count: int = 60) -> list[Sample]:
    mixture = Mixture(plain, {task: 1}, count=count)
    return [mixture.sample(i) for i in range(count)]


# --- the same number draws the same ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_its_number(task: str, plain: World) -> None:
    first, again = drawn(task, plain, 12), drawn(task, plain, 12)
    for a, b in zip(first, again, strict=True):
        assert a.turns == b.turns
        assert np.array_equal(a.frames, b.frames)
        assert a.frames.shape == (clips.FRAMES if a.video else 1, SIDE, SIDE, 3)
        assert a.frames.dtype == np.uint8
    assert len({a.frames.tobytes() for a in first}) == 12


def test_seed_and_split_draw_others(plain: World) -> None:
    one = Mixture(plain, {"shapes": 1}).sample(3)
    assert one.turns != Mixture(plain, {"shapes": 1}, seed=1).sample(3).turns
    assert Mixture(plain).fingerprint() != Mixture(plain, seed=1).fingerprint()
    assert Mixture(plain).fingerprint() == Mixture(plain).fingerprint()
    with pytest.raises(IndexError):
        Mixture(plain, count=4).sample(4)


def test_what_cannot_be_drawn_is_said(plain: World) -> None:
    with pytest.raises(ConfigError, match="no tasks"):
        Mixture(plain, {"poems": 1})
    with pytest.raises(ConfigError, match="emoji"):
        Mixture(World(words=WORDS), {"emoji": 1})
    with pytest.raises(ConfigError, match="level=3"):
        make(level=3, weights={"shapes": 1})


def test_a_sample_as_a_conversation(plain: World) -> None:
    sample = next(s for s in drawn("clips", plain) if len(s.turns) > 1)
    talk = conversation(sample)
    assert [m.role for m in talk.messages] == ["user", "assistant"] * len(sample.turns)
    assert len(talk.media) == 1
    assert len(conversation(sample, turns=1).messages) == 2


# --- the answers are what the pictures show -------------------------------------------------------------------------


def flat(things: list[scenes.Thing]) -> np.ndarray:
    """The things on white, in the first shade of their colours."""
    picture = np.full((SIDE, SIDE, 3), 255, np.float32)
    for thing in things:
        canvas.paint(picture, thing, COLOURS[thing.colour]["train"][0], "flat", random.Random(0))
    return canvas.finish(picture)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_shape_fills_its_box(shape: str) -> None:
    thing = scenes.Thing(shape, "black", 10, 20, 24, 18)
    inked = (flat([thing]) < 250).any(-1)
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (10, 20, 34, 38)
    (box,) = parse_boxes(scenes.box_text(thing), width=SIDE, height=SIDE)
    assert np.allclose(box.xyxy, (10, 20, 34, 38), atol=0.07)


def islands(inked: np.ndarray) -> int:
    """Connected parts of a mask."""
    left, count = {tuple(p) for p in np.argwhere(inked)}, 0
    while left:
        count, waiting = count + 1, [left.pop()]
        while waiting:
            y, x = waiting.pop()
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            waiting += near
    return count


def test_counts_are_of_what_is_there(plain: World) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        things = scenes.arrange(draw, plain, draw.randint(1, 6))
        assert scenes.count(draw, plain, things).answer == str(islands((flat(things) < 250).any(-1)))
        assert [t.centre for t in things] == sorted(t.centre for t in things)


def test_boxes_and_names_belong_together(plain: World) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        things = scenes.arrange(draw, plain, 4)
        turn = scenes.find(draw, plain, things)
        colour, shape = turn.question.split("'the ")[1].split("'")[0].split()
        x1, y1, x2, y2 = turn.facts["box"]
        crop = flat(things)[y1:y2, x1:x2]
        assert (crop == COLOURS[colour]["train"][0]).all(-1).mean() > 0.1, (shape, colour)
        assert evaluation.iou(turn.answer, turn.facts["box"]) > 0.95


def test_comparisons(plain: World) -> None:
    a, b = scenes.Thing("star", "red", 2, 30, 10, 10), scenes.Thing("cross", "blue", 40, 30, 20, 20)
    for seed in range(40):
        draw = random.Random(seed)
        if (turn := scenes.beside(draw, plain, [a, b])) is not None and "left of" in turn.question:
            assert (turn.answer == "yes") == (turn.question.index("red star") < turn.question.index("blue cross"))
        assert scenes.larger(draw, plain, [a, b]).answer == "blue cross"
        turn = scenes.exists(draw, plain, [a, b])
        assert (turn.answer == "yes") == any(t.name in turn.question for t in (a, b))


def test_easy_questions_are_true() -> None:
    thing = scenes.Thing("circle", "teal", 0, 0, 20, 20)
    yes = no = 0
    for seed in range(300):
        turn = scenes.easy_turn(random.Random(seed), thing)
        if turn.kind != "yes/no":
            assert turn.answer in ("circle", "teal")
            continue
        named = "teal" in turn.question or "circle" in turn.question
        assert turn.answer == ("yes" if named != any(w in turn.question for w in (" no ", " not ")) else "no")
        yes, no = yes + (turn.answer == "yes"), no + (turn.answer == "no")
    assert 0.6 < yes / no < 1.6


def test_bars_are_as_long_as_they_say(plain: World) -> None:
    for seed in range(40):
        draw = random.Random(seed)
        chart, face = charts.invent(draw, plain)
        picture = charts.plot(draw, plain, chart, face).astype(int)
        row = charts.FOOT // len(chart.names)
        for i, value in enumerate(chart.values):
            line = picture[i * row + row // 2, charts.LEFT : charts.RIGHT]
            length = next((n for n, pixel in enumerate(line) if abs(pixel - line[0]).max() > 12), len(line))
            assert length == round((charts.RIGHT - charts.LEFT) * value / chart.end)
        told = evaluation.read_chart(charts.describe(chart).answer)
        assert told == {"names": chart.names, "end": chart.end, "values": chart.values}
        assert len(set(chart.values)) == len(chart.values)


def test_chart_questions(plain: World) -> None:
    chart, draw = charts.Chart(("OAK", "TEA", "FISH"), (20, 50, 35), 50), random.Random(0)
    assert {charts.extreme(draw, plain, chart).answer for _ in range(20)} == {"TEA", "OAK"}
    for _ in range(20):
        turn = charts.value(draw, plain, chart)
        assert (
            turn.answer == {"OAK": "20", "TEA": "50", "FISH": "35"}[next(n for n in chart.names if n in turn.question)]
        )
        turn = charts.more(draw, plain, chart)
        a, b = sorted(chart.names, key=lambda n: turn.question.find(n) if n in turn.question else 999)[:2]
        assert turn.answer == (
            "yes" if chart.values[chart.names.index(a)] > chart.values[chart.names.index(b)] else "no"
        )
        turn = charts.where(draw, plain, chart)
        asked = next(n for n in chart.names if n in turn.question)
        assert turn.answer == {"OAK": "first", "TEA": "second", "FISH": "third"}[asked]
    assert (charts.number(draw, plain, chart).answer, charts.axis(draw, plain, chart).answer) == ("3", "50")


def test_lines_are_asked_for_by_place_and_by_word(plain: World) -> None:
    words, found = ("OAK", "TEA", "FISH"), set()
    for seed in range(60):
        turn = reading.ask(random.Random(seed), plain, words, seed % 3)
        if turn.kind == "where":
            assert words[seed % 3] in turn.question
            assert turn.answer == reading.PLACES[seed % 3]
        else:
            assert reading.PLACES[seed % 3] in turn.question
            assert turn.answer == words[seed % 3]
        found.add((turn.kind, turn.answer))
    assert len(found) == 6


def test_does_it_move(plain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[list[clips.Thing]]] = []
    draw_frames = clips._draw
    monkeypatch.setattr(clips, "_draw", lambda d, w, frames: (shown.append(frames), draw_frames(d, w, frames))[1])
    answers = []
    for seed in range(300):
        turn = clips.moving(random.Random(seed), plain).turns[0]
        if turn.kind == "moves":
            first, last = ({(t.name, t.x, t.y) for t in shown[-1][i]} for i in (0, -1))
            moved = {name for name, *_ in first - last}
            assert turn.answer == ("yes" if any(name in turn.question for name in moved) else "no")
            answers.append(turn.answer)
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


def middle(frame: np.ndarray, colour: str) -> np.ndarray:
    away = np.abs(frame.astype(int) - COLOURS[colour]["train"][0]).max(-1)
    return np.argwhere(away == away.min()).mean(0)


def test_directions(plain: World) -> None:
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    found = set()
    for seed in range(60):
        sample = clips.moving(random.Random(seed), plain)
        turn = next((t for t in sample.turns if t.kind == "direction"), None)
        if turn is None or " the red " not in turn.question or any(t.kind == "which" for t in sample.turns):
            continue
        moved = middle(sample.frames[-1], "red") - middle(sample.frames[0], "red")
        assert np.dot(moved, steps[turn.answer]) > 15
        found.add(turn.answer)
    assert len(found) >= 2


def test_one_frame_does_not_tell_which_moves(plain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[list[list[clips.Thing]]] = []
    draw_frames = clips._draw
    monkeypatch.setattr(clips, "_draw", lambda d, w, frames: (pairs.append(frames), draw_frames(d, w, frames))[1])
    for seed in range(800):
        clips.moving(random.Random(seed), plain)
    nearer = lower = drawn_last = 0
    pairs = [frames for frames in pairs if len(frames[0]) == 2]
    for frames in pairs:
        rests = next(thing for thing in frames[0] if all(thing in other for other in frames))
        moves = next(thing for thing in frames[clips.MIDDLE] if thing is not rests)
        assert {(t.w, t.h) for t in frames[0]} == {(rests.w, rests.h)}
        away = [max(abs(c - SIDE / 2) for c in thing.centre) for thing in (moves, rests)]
        nearer += (away[0] < away[1]) + 0.5 * (away[0] == away[1])
        lower += (moves.y > rests.y) + 0.5 * (moves.y == rests.y)
        drawn_last += frames[clips.MIDDLE][-1] is moves
        for frame in frames:
            a, b = frame
            assert abs(a.x - b.x) > a.w or abs(a.y - b.y) > a.h
            assert all(0 <= t.x <= SIDE - t.w and 0 <= t.y <= SIDE - t.h for t in frame)
    for count in (nearer, lower, drawn_last):
        assert 0.4 < count / len(pairs) < 0.6


def test_events_and_their_order(plain: World) -> None:
    for seed in range(30):
        sample = clips.blinking(random.Random(seed), plain)
        shown = [np.ptp(f.reshape(-1, 3).astype(int), axis=0).max() > 60 for f in sample.frames]
        if (turn := next((t for t in sample.turns if t.kind == "times"), None)) is not None:
            assert int(turn.answer) == sum(shown)
        assert shown[clips.MIDDLE]  # one frame in the middle says nothing of the number
        sample = clips.order(random.Random(seed), plain)
        answers = {t.question: t.answer for t in sample.turns if t.kind == "order"}
        for question, answer in answers.items():
            colour, at = answer.split()[0], 0 if "first" in question else -1
            frames = [f for f in sample.frames if np.ptp(f.reshape(-1, 3).astype(int), axis=0).max() > 60]
            close = np.abs(frames[at].astype(int)[..., None, :] - COLOURS[colour]["train"]).max(-1).min()
            assert close <= 100, (colour, at)


def test_words_are_written(plain: World) -> None:
    for sample in drawn("reading", plain, 20):
        (turn,) = sample.turns
        assert turn.answer.lower() in WORDS
        assert sample.picture.min() < 150


def test_lines_of_words_are_written_and_asked_for(plain: World) -> None:
    kinds = set()
    for sample in drawn("lines", plain, 60):
        kinds |= {turn.kind for turn in sample.turns}
        said = {turn.question: turn.answer for turn in sample.turns if turn.kind == "line"}
        told = next(
            (turn.answer.replace(" and ", ", ").split(", ") for turn in sample.turns if turn.kind == "words"), []
        )
        for question, answer in said.items():
            place = next(i for i, name in enumerate(reading.PLACES) if f" {name} " in question)
            assert not told or told[place] == answer
        rows = (sample.picture.min((1, 2)) < 150).nonzero()[0]  # the pictures' rows that have ink
        assert len(rows) >= 5 * max(len(told), len(said))
    assert kinds == {"words", "line", "where"}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_lines_of_words_are_as_many_and_as_long_as_the_level_says(plain: World, level: int) -> None:
    for sample in drawn("lines", replace(plain, level=level), 60):
        told = next((turn for turn in sample.turns if turn.kind == "words"), None)
        if told is None:
            continue
        words = told.answer.replace(" and ", ", ").split(", ")
        assert len(set(words)) == len(words) <= (2, 3, 5)[level]
        assert all(word.isupper() and len(word) <= (3, 5, reading.LONGEST)[level] for word in words)
        row = SIDE // len(words)
        dark = np.ptp(sample.picture.astype(int).sum(-1), axis=1) > 150  # rows with ink
        assert all(dark[i * row : (i + 1) * row].any() for i in range(len(words)))


def test_emoji_are_where_they_are_said_to_be(plain: World) -> None:
    for sample in drawn("emoji", plain, 40):
        for turn in sample.turns:
            if turn.kind != "ground":
                continue
            x1, y1, x2, y2 = turn.facts["box"]
            rgb = next(rgb for name, rgb in FLAGS.items() if f"{name} flag" in turn.question)
            assert (sample.picture[y1:y2, x1:x2] == rgb).all()


# --- what is held out is held out -----------------------------------------------------------------------------------


def test_splits_share_nothing() -> None:
    for table in (STYLES, GROUNDS, FONTS, world.BAR_WORDS, charts.BAR_COLOURS, *COLOURS.values()):
        assert table["train"]
        assert table["test"]
        assert not set(table["train"]) & set(table["test"])
    words = [f"word{a}{b}"[:7] for a in "abcdefgh" for b in "abcdefgh"] + [*WORDS, *world.BAR_WORDS["test"]]
    train, test = (reading.choose_words(words, split) for split in ("train", "test"))
    assert not set(train) & set(test)
    assert set(world.BAR_WORDS["test"]) & set(test)
    assert not set(world.BAR_WORDS["test"]) & set(train)


def phrasings(module: object) -> list[Phrasings]:
    return [thing for thing in vars(module).values() if isinstance(thing, Phrasings)]


@pytest.mark.parametrize("module", [scenes, charts, reading, emoji, clips], ids=lambda m: m.__name__.split(".")[-1])
def test_held_out_phrasings_are_others(module: object) -> None:
    assert phrasings(module)
    for found in phrasings(module):
        assert not set(found.train) & set(found.test)
        assert found.get("test") == (found.test or found.train)


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_tokenizer(plain: World) -> None:
    mixture = Mixture(plain, {"shapes": 2, "charts": 1})
    data = train_ranks(corpus(mixture, WORDS, samples=300), size=600)
    assert len(read_ranks(data)) == 600
    assert data == train_ranks(corpus(mixture, WORDS, samples=300), size=600)
    tokenizer = LlamaTokenizer.from_bytes(data)
    assert tokenizer.vocab == 600 + 256
    for text in ("The values are OAK 20 and TEA 50.", "Überraschung 日本 🙂\n\n  ", "[031,062,999,000]", "\x00\xff"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" shape")) == 1
    assert len(tokenizer.encode("TULIP")) == 5  # capitals are spelled
    assert not any(CAPITALS.search(text) for text in corpus(mixture, WORDS, samples=300))


# --- what counts as right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "answer", "right"),
    [
        (Turn("count", "?", "3"), "3", True),
        (Turn("count", "?", "3"), "3 shapes", False),
        (Turn("ground", "?", "", {"box": (0, 0, 32, 32)}), "[000,000,500,400]", True),
        (Turn("ground", "?", "", {"box": (0, 0, 32, 32)}), "[000,000,999,999]", False),
        (Turn("ground", "?", "", {"box": (0, 0, 32, 32)}), "there", False),
        (Turn("value", "?", "100", {"value": 100}), "95", True),
        (Turn("value", "?", "100", {"value": 100}), "94", False),
        (Turn("value", "?", "100", {"value": 100}), "a lot", False),
    ],
)
def test_scores(turn: Turn, answer: str, right: bool) -> None:
    assert next(iter(evaluation.scores(turn, answer).values())) is right


def test_chart_scores() -> None:
    turn = charts.describe(charts.Chart(("OAK", "TEA"), (20, 50), 50))
    assert all(evaluation.scores(turn, turn.answer).values())
    wrong = evaluation.scores(turn, turn.answer.replace("OAK 20", "OAK 25").replace("OAK and TEA", "OAT and TEA"))
    assert wrong == {"words": False, "values": False, "axis": True, "exact": False}
    assert evaluation.distance("kitten", "sitting") == 3


def test_prior_answers_without_looking(plain: World) -> None:
    samples = drawn("easy", plain, 40)
    prior = evaluation.Prior(samples)
    asked = evaluation.questions(plain, "easy", 20)
    assert all(prior.majority(q) for q in asked)
    blind = evaluation.blinded(asked)
    assert all((q.sample.frames == evaluation.GREY).all() for q in blind)
    assert [q.turn for q in blind] == [q.turn for q in asked]


def test_prior_knows_wordings() -> None:
    frames = np.zeros((1, 2, 2, 3), np.uint8)

    def asked(question: str, answer: str) -> Sample:
        return Sample("shapes", frames, (Turn("compare", question, answer),))

    names = ["red circle", "blue star", "green cross", "teal triangle"]
    pairs = [(a, b) for a in names for b in names if a != b]
    seen = [asked(f"Is the {a} larger than the {b}?", "no" if a < b else "yes") for a, b in pairs] * 9
    seen += [asked(f"Which is larger, the {a} or the {b}?", a) for a, b in pairs] * 10
    seen += [asked("Is the red star larger than the red cross?", "no")] * 2  # too few to tell
    prior = evaluation.Prior(seen)
    q = evaluation.Question(seen[0], Turn("compare", "Is the red star larger than the red cross?", "yes"))
    assert prior.guess(q) == "no"
    known = evaluation.Question(seen[0], Turn("compare", "Which is larger, the teal triangle or the red circle?", ""))
    assert prior.guess(known) == "teal triangle"
    assert evaluation.wording("What is in [1,20,300,999] of OAK, 50 red stars?") == "What is in _ of _, _ _ _?"
    other = evaluation.Question(seen[0], Turn("compare", "Which is larger, the gray star or the brown cross?", ""))
    assert prior.guess(other) in names
    assert prior.majority(other) == "no"
    strange = evaluation.Question(seen[0], Turn("compare", "What?", ""))
    assert prior.guess(strange) == prior.majority(strange)


def test_questions_are_asked_alone(plain: World) -> None:
    asked: Callable = lambda: evaluation.questions(plain, "shapes", 10, kinds=("count",))  # noqa: E731
    assert {q.turn.kind for q in asked()} == {"count"}
    assert [q.turn for q in asked()] == [q.turn for q in asked()]
    assert all([m.role for m in q.messages().messages] == ["user"] for q in asked())
