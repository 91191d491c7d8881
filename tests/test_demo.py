"""`perception demo` end to end, without a network."""

import html
import json
import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest

import perception_encoder as pe
import perception_lm.demo
from perception_encoder import demo, samples
from perception_lm.samples import samples as asked


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    out = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was touched"))
    said: list[str] = []
    more = perception_lm.demo.steps()
    path, summary = demo.run(pe.load_clip("PE-Core-nano", device="cpu"), out, said.append, more)
    patch.undo()
    assert len(said) == 5 + len(more)
    return path.read_text("utf-8"), summary, out


def test_summary(page: tuple[str, dict, Path]) -> None:
    _, summary, out = page
    assert json.dumps(summary)
    assert len(summary["classified"]) == len(samples.drawings())
    assert len(summary["searched"]) == 3
    assert all(len(hits) == 3 for hits in summary["searched"].values())
    assert (out / summary["pca"]).is_file()
    assert len(summary["timestamps"]) == 8
    assert summary["timestamps"] == sorted(summary["timestamps"])
    right = sum(
        row[0]["label"] == name for name, row in zip(samples.drawings(), summary["classified"].values(), strict=True)
    )
    assert right >= len(samples.drawings()) // 2  # it has learned what it shows
    assert summary["seconds"] < 120


def test_page_is_whole_and_self_contained(page: tuple[str, dict, Path]) -> None:
    text, _, _ = page
    stack: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            source = dict(attrs).get("src") or dict(attrs).get("href") or "data:"
            assert source.startswith("data:"), source
            if tag not in ("img", "meta", "br"):
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Check().feed(text)
    assert not stack
    assert len(re.findall("<figure>", text)) >= len(samples.drawings()) + 8
    assert "not because the answer is good" in text


def test_labels_cannot_break_the_page() -> None:
    assert "<script>" not in demo.bar("<script>alert(1)</script>", 0.5)
    assert "<script>" not in demo.render([("<script>", "<script>", "")], 1.0)


def test_questions_and_answers_are_on_the_page(page: tuple[str, dict, Path]) -> None:
    text, summary, _ = page
    talk = [*summary["chart"], *summary["scene"], *summary["video"]]
    assert len(talk) == sum(len(entry["questions"]) for entry in asked().values()) + 1
    for turn in talk:
        assert f"<dt>{html.escape(turn['question'])}</dt><dd><b>{html.escape(turn['answer'])}</b>" in text
        assert turn["answer"]
    assert summary["chart"][0]["question"] == "Describe the bar plot in the image."


def test_the_small_model_knows_what_it_shows(page: tuple[str, dict, Path]) -> None:
    _, summary, _ = page
    talk = [*summary["chart"], *summary["scene"], *summary["video"]]
    right = sum(turn["answer"] == turn["expected"] for turn in talk)
    assert right >= len(talk) // 2, talk


def test_without_the_tokenizers_package_the_language_model_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perception_lm.demo, "find_spec", lambda name: None)
    assert perception_lm.demo.steps() == []
    assert "pip install 'perception-vision[lm]'" in capsys.readouterr().err


def test_other_packages_add_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        name = "other"

        def load(self) -> object:
            return lambda: ["a step"]

    monkeypatch.setattr(demo, "entry_points", lambda group: [Found()] if group == "perception.demo" else [])
    assert demo.added() == ["a step"]
