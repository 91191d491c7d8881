"""embed, index and search as a user meets them: what is printed and written, and one clear line for each mistake."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from golden_models import clip_config

import perception_encoder as pe
from perception_encoder import samples

sys.path.insert(0, str(Path(__file__).parent))
from retrieval_tools import pictures, tar

pytest.importorskip("faiss", reason="the extra `retrieval` is not installed")
pytest.importorskip("pyarrow", reason="the extra `retrieval` is not installed")


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[[str], Done]


@pytest.fixture(scope="module")
def model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model") / "clip"
    pe.save(pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu"), where)
    return where


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path) -> Run:
    """A command line in a folder with 9 pictures in `photos`; MODEL stands for a tiny model."""
    from perception.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    pictures(Path("photos"), 9)

    def command(line: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["perception", *shlex.split(line.replace("MODEL", str(model)))])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(int(end.value.code or 0), captured.out, captured.err)

    return command


def said(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_from_a_folder_to_answers(run: Run) -> None:
    Path("photos/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    built = run("index photos -o idx --model MODEL")
    assert "idx: 9 rows" in built.out
    assert "recall@" not in built.out  # fewer than ten rows hold out none
    hits = said(run("search idx photos/0003.png -k 2 --json"))
    assert hits[0]["path"] == "photos/0003.png"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    table = run("search idx 'a red car' -k 3 --html page.html")
    assert len(table.out.splitlines()) == 5
    page = Path("page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "<h1>a red car</h1>" in page
    run("search idx photos/0001.png --minus photos/0002.png --html page.html")
    assert "<h1>photos/0001.png, not photos/0002.png</h1>" in Path("page.html").read_text()
    like = said(run("search idx --like photos/0004.png --like photos/0005.png -k 3 --json"))
    shown = said(run("search idx photos/0004.png photos/0005.png -k 3 --json"))
    assert {hit["id"] for hit in like} == {hit["id"] for hit in shown}
    assert like[0]["score"] == pytest.approx(shown[0]["score"], abs=1e-5)
    assert like[0]["score"] < 0.999  # it is none of the examples
    assert "nothing found" in run("search idx 'a cat' --filter width>=31").out
    assert len(said(run("search idx 'a cat' --filter width=30 --json"))) == 9
    pictures(Path("more"), 12)
    assert said(run("index add idx more --json")) == {"index": "idx", "added": 12, "rows": 21}
    assert "0 added" in run("index add idx more").out
    assert len(json.loads(run("index duplicates idx --threshold 0.99999 --json").out)) == 9
    assert said(run("index delete idx more/0000.png nobody --json"))["deleted"] == 1
    assert "20 rows in one index" in run("index merge idx").out
    assert "rows            20" in run("index report idx").out
    assert sum(len(cluster["ids"]) for cluster in json.loads(run("index clusters idx -k 4 --json").out)) == 20
    again = run("index photos -o idx --model MODEL")
    assert "idx: 20 rows" in again.out


def test_parts_say_what_was_there(run: Run) -> None:
    first = run("embed photos -o parts --model MODEL --part-rows 4")
    assert "9 vectors in 3 of 3 parts, 0 failed" in first.out
    Path("parts/part-00001.safetensors").write_bytes(b"")
    assert "3 of 3 parts (2 were there already)" in run("embed photos -o parts --model MODEL --part-rows 4").out
    assert "idx: 9 rows" in run("index parts -o idx").out
    run("index add idx photos --on-duplicate replace")
    assert "idx: 9 rows" in run("index parts -o idx").out  # opened, not begun anew
    Path("texts.txt").write_text("a cat\na dog\n")
    run("embed texts.txt -o texts --model MODEL")
    assert "an index of other pictures" in run("index texts -o idx").err


def test_tars_and_columns(run: Run) -> None:
    tar(Path("a.tar"), sorted(map(str, Path("photos").iterdir())))
    run("index a.tar -o idx --model MODEL")
    hits = said(run("search idx 'a cat' --filter even=true --filter number>2 --filter text~picture --json"))
    assert [hit["metadata"]["even"] for hit in hits] == [True] * 3
    assert hits[0]["text"].startswith("picture ")


def test_videos(run: Run) -> None:
    pytest.importorskip("av")
    clip = samples.clips()["bunny"]
    run(f"index {clip} -o frames --model MODEL --fps 0.5")
    run(f"index {clip} -o clips --model MODEL --video clips --seconds 3 --frames 2")
    frames = said(run("search frames 'a rabbit' --json --html page.html"))
    assert sorted(hit["span"] for hit in frames) == [[0, 2], [2, 4], [4, 6]]
    assert Path("page.html").read_text().count("data:image/jpeg") == 3
    assert sorted(hit["span"][0] for hit in said(run("search clips 'a rabbit' --json"))) == [0, 3]
    assert "4.00-6.00 s" in run("search frames 'a rabbit'").out


def test_out_and_in_again(run: Run) -> None:
    run("index photos -o idx --model MODEL")
    assert "9 rows in 1 files" in run("index export idx out").out
    assert "holds an export already" in run("index export idx out").err
    assert np.load("out/img_emb/img_emb_0.npy").shape == (9, 12)
    run("index import out -o parts --root photos")
    assert "nobody said which" in run("index parts -o back").out
    assert "vouch for one" in run("search back 'a cat'").err
    assert "vouch for one" in run("search back 'a cat' --model MODEL").err
    assert "makes 384" in run("index parts -o back --model PE-Core-nano").err
    assert "nobody" not in run("index parts -o back --model MODEL").out
    assert len(said(run("search back 'a cat' -k 3 --json --html page.html"))) == 3
    Path("texts.txt").write_text("a cat\na dog\n")
    run("index texts.txt -o texts --model MODEL")
    run("index export texts words")
    assert np.load("words/text_emb/text_emb_0.npy").shape == (2, 12)


def test_a_model_by_another_name(run: Run, tmp_path: Path, model: Path) -> None:
    """An index that moved to a machine where its model lies elsewhere."""
    run("index photos -o idx --model MODEL")
    facts = json.loads(Path("idx/index.json").read_text())
    Path("idx/index.json").write_text(json.dumps({**facts, "model": "gone/away"}))
    assert "gone/away is not" in run("search idx 'a cat'").err
    assert len(said(run("search idx 'a cat' --model MODEL --json"))) == 9
    assert "another model or preprocessing" in run("search idx 'a cat' --model PE-Core-nano").err
    pictures(Path("more"), 1)
    assert "1 added" in run("index add idx more --model MODEL").out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("embed", "nothing to embed"),
        ("embed nowhere -o p", "there is no file or folder 'nowhere'"),
        ("embed photos -o e.npy", "--out e.npy: vectors go into one .safetensors file, or into a folder of parts"),
        ("embed photos -o E.PT", "--out E.PT: vectors go into one .safetensors file, or into a folder of parts"),
        ("embed photos -o p --vectors float8", "--vectors float8; choose from float32, float16"),
        ("embed photos -o p --format csv", "--format csv; choose from safetensors, parquet"),
        ("embed photos -o e.safetensors --part-rows 5 --engine ray", "--engine, --part-rows: for parts"),
        ("embed texts.txt -o e.safetensors", "for lines of text give a folder"),
        ("embed photos -o p --video clips", "--video: not for images"),
        ("embed photos -o p --keep label", "are for Parquet, not image"),
        ("embed clip.mp4 -o p --video clips --fps 3", "--fps: not for --video clips"),
        ("embed clip.mp4 -o p --seconds 3", "--seconds: not for --video frames"),
        ("embed photos -o p --gpus 1", "--gpus: for --engine ray"),
        ("embed photos -o p --engine spark", "choose process or ray"),
        ("embed photos texts.txt -o p", "one kind at a time"),
        ("index photos -o i --kind tree", "choose from auto, flat"),
        ("index photos -o i --max-memory lots", "is no amount of memory"),
        ("index photos -o i --max-memory 10", "too little"),
        ("index photos -o i --target-recall 2", "target_recall=2.0"),
        ("index photos -o i --store tree", "choose from faiss, lance"),
        ("index parts -o i --batch-size 3", "--batch-size: for embedding"),
        ("index photos -o i --vectors float8", "--vectors float8; choose from float32, float16"),
        ("index photos -o idx.faiss", "--out idx.faiss: an index is a folder; give a name without .faiss"),
        ("index delete idx nope nobody", "none of these is in idx: 'nope', 'nobody'; ids are as `perception search`"),
        ("search idx a --filter lable=x", "no column 'lable' to filter by; there are "),
        ("search idx a --html photos", "--html photos is a folder"),
        ("search idx a --html page.png", "--html page.png: a page is written; give a name that ends in .html"),
        ("index export idx out.npy", "out.npy: an export is a folder; give a name without .npy"),
        ("index import photos -o p.npy", "--out p.npy: parts are a folder; give a name without .npy"),
        ("index import photos -o p --which words", "--which words; choose from image, text"),
        ("index nowhere -o i", "there is no file or folder 'nowhere'"),
        ("index add idx", "nothing to embed"),
        ("index add idx texts.txt", "idx is an index of images"),
        ("search idx", "nothing to look for"),
        ("search idx ''", "empty sentence"),
        ("search idx nothere.png", "there is no picture 'nothere.png'"),
        ("search idx a -k 0", "k=0"),
        ("search idx --like nobody", "'nobody'"),
        ("search idx a --filter nonsense", "NAME=VALUE"),
        ("search idx a --filter width>=wide", "they do not compare"),
        ("search photos a", "is no index"),
        ("index report photos", "is no index"),
        ("index clusters idx -k 99", "choose 1 to 9"),
        ("index duplicates idx --threshold 2", "a cosine lies between"),
        ("index export idx out --layout csv", "choose clip-retrieval or npy"),
        ("index import photos -o p", "holds no vectors"),
    ],
)
def test_every_mistake_is_one_line(run: Run, line: str, message: str) -> None:
    Path("texts.txt").write_text("a cat\n")
    Path("clip.mp4").write_bytes(b"no video")
    if " idx" in line:
        run("index photos -o idx --model MODEL")
    if " parts" in line:
        run("embed photos -o parts --model MODEL")
    model = " --model MODEL" if line.startswith(("embed", "index photos")) else ""
    done = run(line + model)
    assert done.code == 1
    (error,) = [one for one in done.err.splitlines() if one.startswith("error: ")]
    assert message in error
    assert done.out == ""


def test_folders_may_have_dots_in_their_names(run: Run) -> None:
    assert run("embed photos -o parts.v1.5 --model MODEL").code == 0
    Path("old.npy").mkdir()
    assert run("embed photos -o old.npy --model MODEL").code == 0, "a folder that is there is one"


def test_budgets_are_checked_before_any_work(run: Run) -> None:
    assert run("index photos -o i --kind tree --model MODEL").code == 1
    assert not Path("i").exists()


def test_lance_takes_no_budgets(run: Run) -> None:
    pytest.importorskip("lancedb", reason="the extra `lance` is not installed")
    assert "LanceDB chooses its own" in run("index photos -o i --store lance --max-memory 1GB --model MODEL").err
    assert not Path("i").exists()
    assert "store           lance" in run("index photos -o i --store lance --model MODEL").out
