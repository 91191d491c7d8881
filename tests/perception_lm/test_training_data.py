"""Rows, sources, and the stream of passes: any worker, any process, any place to begin."""

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_tiny import (
    Colours,
    one_thread,  # noqa: F401  every test here runs with it
    tiny_assistant,
    turns,
    write_rows,
)

from perception.errors import ConfigError, MediaError, PerceptionError, RequestError
from perception.training.order import Order, shuffled
from perception_lm.chat import Clip, Picture, Text
from perception_lm.losses import IGNORE
from perception_lm.training.datasets import read_datasets
from perception_lm.training.examples import Examples, NothingToLearn, Pack, plan
from perception_lm.training.rows import read_row
from perception_lm.training.sources import Jsonl, Samples, SourceConfig, open_source
from perception_lm.training.stream import Report, Stream, StreamConfig

CLIP = Path(__file__).parents[2] / "perception_encoder" / "samples" / "clips" / "bunny.mp4"

# --- rows -----------------------------------------------------------------------------------------------------------


def parts(row: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    return [(message.role, list(message.parts)) for message in read_row(row).messages]


def test_rows_of_the_reference() -> None:
    """Trap 35: the key is `image`, and boxes are x, y, w, h."""
    (_, question), (_, answer) = parts({"image": "a.jpg", "conversations": turns("A cat.", "<image>\nWhat?")})
    assert question == [Picture(image="a.jpg"), Text(text="What?", literal=True)]
    assert answer == [Text(text="A cat.", literal=True)]
    row = {"image": "a.jpg", "bbox": [[10, 20, 30, 40]], "width": 640, "height": 480}
    (_, question), _ = parts({**row, "conversations": turns(question="In <|bbox0|>?")})
    assert question[1] == Text(text="In [015,041,062,125]?", literal=True)
    row = {"video": "a.mp4", "start_time": 1.5, "end_time": 4, "bbox_map": {"17": [1, 2, 3, 4], "18": None}}
    (_, question), _ = parts({**row, "conversations": turns()})
    assert question[0] == Clip(video="a.mp4", start=1.5, end=4, boxes={"17": [1, 2, 3, 4], "18": None})
    (_, question), (_, answer) = parts({"image": ["a.jpg"], "text": "a caption"})
    assert (question[0], answer) == (Picture(image="a.jpg"), [Text(text="a caption", literal=True)])
    (_, question), _ = parts({"image": ["a.jpg", "b.jpg"], "conversations": turns(question="<image> or <image>?")})
    assert question == [
        Picture(image="a.jpg", tiling="vanilla"), Picture(image="b.jpg", tiling="vanilla"),
        Text(text="<image> or <image>?"),
    ]  # fmt: skip
    given = [{"from": "assistant", "value": "skipped"}, *turns(), {"from": "human", "value": "unanswered"}]
    assert [role for role, _ in parts({"conversations": given})] == ["user", "assistant"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert [role for role, _ in parts({"messages": [*messages, messages[0]]})] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a row is a table"),
        ({"image": "a.jpg"}, "'conversations', 'text' or 'messages'"),
        ({"conversations": []}, "empty or no list"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 0 is from 'robot'"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0 is from"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 has no 'from' and 'value'"),
        ({"conversations": [{"from": "human", "value": "unanswered"}]}, "nothing to learn"),
        ({"conversations": [turns()[0], turns()[0], turns()[1]]}, "take turns"),
        ({"messages": [{"role": "user", "content": "unanswered"}]}, "nothing to learn"),
        ({"text": 5}, "expected text"),
        ({"images": ["a.jpg"], "text": "x"}, "the key is 'image'"),
        ({"image": "a.jpg", "video": "b.mp4", "text": "x"}, "not both"),
        ({"image": "a.jpg", "bbox": [[1, 2, 3]], "width": 4, "height": 4, "text": "x"}, "'bbox' is"),
        ({"image": "a.jpg", "bbox": [[1, 2, 3, 4]], "text": "x"}, "expected its 'width'"),
        ({"image": "a.jpg", "bbox": [], "width": 4, "height": 4, "text": "<|bbox0|>"}, "0 boxes were given"),
        ({"video": "a.mp4", "bbox_map": [1], "text": "x"}, "'bbox_map' is"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": turns(question="one <image>")}, "1 of 2 pictures"),
    ],
)
def test_rows_that_are_none(row: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_row(row)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link.png", "http://x/a.png", ""]
)
def test_f126_media_stay_in_their_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    Image.new("RGB", (4, 4)).save(root / "fine.png")
    assert read_row({"image": "fine.png", "text": "x"}, root).media[0].image == root / "fine.png"  # type: ignore[union-attr]
    for row in (
        {"image": name, "text": "x"},
        {"video": name, "text": "x"},
        {"image": [name, "fine.png"], "conversations": turns(question="<image><image>")},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": name}]}, {"role": "assistant", "content": "x"},
        ]},
    ):  # fmt: skip
        with pytest.raises(MediaError, match=r"outside|expected the path"):
            read_row(row, root)


# --- files ----------------------------------------------------------------------------------------------------------


def test_f124_lines_as_files_have_them(tmp_path: Path) -> None:
    """A mark at the start, Windows' line ends, blank lines; and the line of what is wrong."""
    good = json.dumps({"text": "a caption"})
    data = b"\xef\xbb\xbf" + f"{good}\r\n\r\n{good}\n{{broken\n".encode() + good.encode()
    (tmp_path / "rows.jsonl").write_bytes(data)
    source = Jsonl(tmp_path / "rows.jsonl")
    assert len(source) == 4
    assert [source.where(i).rpartition(":")[2] for i in range(4)] == ["1", "3", "4", "5"]
    assert source[0] == source[1] == source[3]
    with pytest.raises(ValueError, match="Expecting property name"):
        source[2]
    before = source.fingerprint()
    (tmp_path / "rows.jsonl").write_bytes(data.replace(b"caption", b"Caption"))
    assert Jsonl(tmp_path / "rows.jsonl").fingerprint() != before


def test_a_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perception_lm.training.sources.MAX_LINE", 100)
    source = Jsonl(write_rows(tmp_path, [{"text": "x" * 200}, {"text": "y"}]))
    with pytest.raises(ValueError, match="MAX_LINE=100"):
        source[0]
    assert source[1]


def test_folders_and_datasets_files(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in (10, 2):
        write_rows(tmp_path, [{"text": f"chunk {number}"}], f"a.chunk.{number}.jsonl")
    source = Jsonl(tmp_path)
    assert [source[i].messages[1].parts[0].text for i in range(2)] == ["chunk 2", "chunk 10"]  # type: ignore[union-attr]
    toml = tmp_path / "sets.toml"
    toml.write_text('[a]\nannotation = "a.chunk.2.jsonl"\nroot_dir = "pictures"\n[b]\nrows = "."\nweight = 2\n')
    found = read_datasets(toml)
    assert found["a"] == SourceConfig(rows=str(tmp_path / "a.chunk.2.jsonl"), root=str(tmp_path / "pictures"))
    assert (len(open_source(found["a"], Path())), len(open_source(found["b"], Path()))) == (1, 2)
    js = tmp_path / "sets.json"
    js.write_text('{"b": {"rows": ".", "weight": 2}}')
    assert read_datasets(js)["b"] == found["b"]
    for name, text in {"x.toml": "[a]\nrows='a'\nsource='b'", "y.toml": "[a]\nroxs='a'", "z.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError):
            read_datasets(tmp_path / name)
    for missing in ("no.jsonl", "pictures"):
        with pytest.raises(ConfigError, match="no rows"):
            Jsonl(tmp_path / missing)


# --- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 17, 100])
def test_a_permutation_without_making_one(size: int) -> None:
    orders = {tuple(shuffled(i, size, key) for i in range(size)) for key in range(8)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(orders) > min(size, 5) - 1


def test_every_sample_once_before_any_twice() -> None:
    order = Order([30, 7], [3, 1], seed=5)
    places = [order[k] for k in range(3000)]
    for source, size in enumerate((30, 7)):
        mine = [place for place in places if place.source == source]
        assert [place.epoch for place in mine] == [n // size for n in range(len(mine))]
        first, second = ([p.index for p in mine[e * size : (e + 1) * size]] for e in (0, 1))
        assert sorted(first) == sorted(second) == list(range(size))
        assert first != second
    share = sum(place.source == 0 for place in places[:1024])
    assert share in (768, 767, 769)  # to one, in every block
    again = Order([30, 7], [3, 1], seed=5)
    for block in (0, 3, 2, 7, 6, 0):  # there and back
        assert order[block * 1024 + 5] == Order([30, 7], [3, 1], seed=5)[block * 1024 + 5]
    assert [again[k] for k in (2999, 5, 1500, 1024, 1023)] == [places[k] for k in (2999, 5, 1500, 1024, 1023)]
    assert [Order([9], shuffle=False)[k].index for k in range(11)] == [*range(9), 0, 1]
    for sizes, weights in (([], None), ([0], None), ([3], [0.0]), ([3], [float("nan")]), ([3], [1.0, 2.0])):
        with pytest.raises(ConfigError, match="weights"):
            Order(sizes, weights)


# --- examples -------------------------------------------------------------------------------------------------------


def examples(seq_len: int = 160) -> Examples:
    return Examples(processor=tiny_assistant().processor, seq_len=seq_len)


def test_lengths_are_known_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, size in enumerate(((60, 20), (20, 60), (24, 24))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "conversations": turns("yes " * n, "<image>\nWhat?")} for n in range(3)]
    rows.append({"image": ["0.png", "1.png"], "conversations": turns(question="<image> or <image>?")})
    source, make = Jsonl(write_rows(tmp_path, rows)), examples(400)
    whole = [make(source[i]) for i in range(4)]
    assert [len(example.pixels) for example in whole if example.pixels is not None] == [4, 4, 5, 2]
    monkeypatch.setattr(type(make.processor), "_pixels", None)
    assert [make.length(source[i]) for i in range(4)] == list(map(len, whole))


def test_f125_what_does_not_fit() -> None:
    """Cut between turns, with the pictures of what was cut; without an answer it is no sample at all."""
    picture = {"type": "image", "image": Image.new("RGB", (24, 24))}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "first"}]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [picture, {"type": "text", "text": "second"}]},
        {"role": "assistant", "content": "two"},
    ]
    whole = examples()(read_row({"messages": messages}))
    assert whole.pixels is not None
    first = examples()(read_row({"messages": messages[:2]}))
    cut = examples(len(first) + 3)(read_row({"messages": messages}))
    assert cut.pixels is None
    # The end of the text is not in it: that was cut, too.
    assert cut.tokens.tolist() == whole.tokens[: len(cut)].tolist() == first.tokens[: len(cut)].tolist()
    assert int((cut.labels != IGNORE).sum()) == int((first.labels != IGNORE).sum()) - 1
    with pytest.raises(NothingToLearn, match="seq_len is 50"):
        examples(50)(read_row({"messages": messages}))


def test_plan() -> None:
    lengths = [5, 9, 3, 3, 7, 12, 1]
    rows = plan(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 or len(row) == 1 for row in rows)
    assert len(rows) == 4
    assert plan([], 10) == []


# --- the stream -----------------------------------------------------------------------------------------------------


def stream(rank: int = 0, size: int = 1, workers: int = 0, source: Any = None, **changes: Any) -> Stream:
    sources = {"a": Samples(source or Colours()), "b": Samples(Colours(10, seed=1))}
    config = StreamConfig(**{"batch": 6, "tokens": 400, "workers": workers, **changes})
    order = Order([len(s) for s in sources.values()], [2, 1], seed=3)
    return Stream(sources, order, examples(), config, rank=rank, size=size)


def documents(packs: list[Pack]) -> list[tuple[int, ...]]:
    found = []
    for pack in packs:
        rows = pack.tokens[0].split(list(pack.lengths)) if pack.packed else pack.tokens
        found += [tuple(row[:n].tolist()) for row, n in zip(rows, pack.lengths, strict=True)]
    return sorted(found)


def take(stream: Stream, steps: int, position: int = 0) -> list[tuple[list[tuple[int, ...]], Report]]:
    found = []
    for _, step in zip(range(steps), stream.steps(position), strict=False):
        packs = list(step.packs)
        found.append((documents(packs), step.report))
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_is_the_same_whoever_makes_it(ahead: bool) -> None:
    """Any number of workers, any number of processes, any place to begin."""
    wanted = [found for found, _ in take(stream(), 4)]
    assert all(len(step) == 6 for step in wanted)
    assert wanted[0] != wanted[1]
    assert [found for found, _ in take(stream(ahead=ahead), 4)] == wanted
    assert [found for found, _ in take(stream(workers=2, ahead=ahead), 4)] == wanted
    assert [found for found, _ in take(stream(ahead=ahead), 2, position=12)] == wanted[2:]
    shares = [[found for found, _ in take(stream(rank, 4, ahead=ahead), 4)] for rank in range(4)]
    assert [sorted(chain(*step)) for step in zip(*shares, strict=True)] == wanted
    padded = [found for found, _ in take(stream(layout="padded", rows=2, ahead=ahead), 4)]
    assert padded == wanted


@pytest.mark.parametrize("ahead", [False, True])
def test_f124_bad_rows_are_named(tmp_path: Path, ahead: bool) -> None:
    Image.effect_noise((60, 60), 90).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:900])
    rows: list[Any] = [{"text": f"caption {i}"} for i in range(6)]
    rows[1], rows[2], rows[3] = "{broken", {"image": "missing.png", "text": "x"}, {"image": "half.png", "text": "x"}
    rows[4] = {"text": "long " * 300}
    source = Jsonl(write_rows(tmp_path, rows))
    one = Stream({"s": source}, Order([6], shuffle=False), examples(), StreamConfig(batch=6, ahead=ahead))
    ((found, report),) = take(one, 1)
    assert (len(found), report.samples) == (2, 2)
    lost = {bad.index: bad for bad in report.lost}
    assert sorted(lost) == [1, 2, 3, 4]
    assert [lost[i].too_long for i in sorted(lost)] == [False, False, False, True]
    for index, what in {1: "Expecting property name", 2: "missing.png", 3: "half.png", 4: "seq_len"}.items():
        assert lost[index].why.startswith(f"{tmp_path / 'rows.jsonl'}:{index + 1}: ")
        assert what in lost[index].why


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "start_time": "1", "text": "x"},
        {"video": "a.mp4", "end_time": [2], "text": "x"},
        {"video": "a.mp4", "bbox_map": {"0": 5}, "text": "x"},
        {"video": "a.mp4", "bbox_map": {"0": ["1", "2", "3", "4"]}, "text": "x"},
        {"messages": [{"type": "video", "video": "a.mp4", "frames": "8"}]},
        {"messages": [{"type": "video", "video": "a.mp4", "fps": "2"}]},
        {"messages": [{"type": "video", "video": "a.mp4", "indices": 5}]},
    ],
)
def test_f124_fields_of_the_wrong_type_are_bad_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    shutil.copy(CLIP, tmp_path / "a.mp4")
    if "messages" in row:
        said = [{"role": "user", "content": row["messages"]}, {"role": "assistant", "content": "x"}]
        row = {"messages": said}
    source = Jsonl(write_rows(tmp_path, [{"text": "caption"}, row]))
    ((_, report),) = take(
        Stream({"s": source}, Order([2], shuffle=False), examples(seq_len=1000), StreamConfig(batch=2)), 1
    )
    assert [bad.index for bad in report.lost] == [1]
    assert report.lost[0].why.startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert "expected" in report.lost[0].why


def test_a_fault_in_somebodys_code_is_no_bad_row() -> None:
    class Broken(Colours):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise ZeroDivisionError("theirs")

    with pytest.raises(ZeroDivisionError, match="theirs"):
        take(stream(source=Broken()), 1)
    assert not issubclass(ZeroDivisionError, PerceptionError | ValueError)


def test_packs() -> None:
    (packs, _) = next((list(s.packs), s) for s in stream().steps(0))
    for pack in packs:
        assert pack.packed
        assert sum(pack.lengths) == pack.tokens.shape[1] <= 400
        slots = int((pack.tokens == tiny_assistant().tokenizer.image_token).sum())
        assert slots == 4 * (0 if pack.pixels is None else len(pack.pixels))
        # The last label of a document never points into the next: it is the end of the text.
        for labels in pack.labels[0].split(list(pack.lengths)):
            assert int(labels[-1]) == tiny_assistant().tokenizer.end_of_text
    assert torch.equal(packs[0].to("cpu").tokens, packs[0].tokens)
