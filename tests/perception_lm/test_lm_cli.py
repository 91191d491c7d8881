"""The verbs of the language model: what they print, what they write, how they end."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from PIL import Image

from perception import cli
from perception.media import read_image
from perception_encoder import samples
from perception_lm import cli as verbs
from perception_lm import zoo
from perception_lm.chat import Text

GOLDEN = Path(__file__).parents[1] / "golden" / "plm"
MODEL, PICTURE, OTHER = GOLDEN / "A" / "original", GOLDEN / "A" / "image1.png", GOLDEN / "A" / "image2.png"
CASES = json.loads((GOLDEN / "A" / "cases.json").read_text())["cases"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def perception(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, as `main` runs it; `lines` come from a pipe."""
    build = cli.build

    def with_verbs() -> typer.Typer:
        app = build()
        if not any(command.name == "generate" for command in app.registered_commands):
            verbs.register(app)
        return app

    monkeypatch.setattr(cli, "build", with_verbs)
    monkeypatch.delenv("PERCEPTION_DEBUG", raising=False)

    def run(*arguments: Any, lines: str = "", model: bool = True) -> Done:
        given = [str(argument) for argument in arguments]
        if model:
            given += ["--ckpt", str(MODEL), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["perception", *given])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def assistant() -> Any:
    return zoo.load(MODEL, device="cpu")


def test_generate_takes_the_flags_of_the_reference(perception: Run) -> None:
    """--ckpt --media_type --media_path --question; the answer, streamed, is the published one."""
    case = CASES["tile"]
    asked = ["generate", "--media_type", "image", "--media_path", PICTURE, "--question", case["question"]]
    done = perception(*asked, "--max-new-tokens", "24")
    assert done.code == 0, done.err
    wanted = zoo.load(MODEL, device="cpu").tokenizer.decode(case["greedy_ids"])
    assert done.out == wanted + "\n"
    assert done.err.startswith("24 tokens in ")
    done = perception(*asked, "--max-new-tokens", "24", "--json")
    assert json.loads(done.out) == {"text": wanted, "tokens": case["greedy_ids"], "finish": "length"}


def test_generate_takes_more(perception: Run, assistant: Any) -> None:
    clip = samples.clips()["bunny"]
    done = perception(
        *("generate", "--media-path", clip, "--media-type", "video", "--question", "What?", "--frames", "3"),
        *("--start", "1", "--end", "4", "--fps", "2", "--max-new-tokens", "5", "--system", "Be brief.", "--json"),
    )
    assert done.code == 0, done.err
    system = {"role": "system", "content": "Be brief."}
    video = {"type": "video", "video": clip, "frames": 3, "start": 1, "end": 4, "fps": 2}
    talk = [system, {"role": "user", "content": [video, {"type": "text", "text": "What?"}]}]
    assert json.loads(done.out)["tokens"] == assistant.generate([talk], max_new_tokens=5)[0].tokens
    drawn = ("--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", "3", "--repetition-penalty", "1.1")
    asked = ("generate", "--media_path", PICTURE, "--media_path", OTHER, "--question", "<image><image>?", *drawn)
    first, again = (perception(*asked, "--max-new-tokens", "6", "--samples", "2", "--json") for _ in range(2))
    assert first.code == 0, first.err
    assert first.out == again.out
    assert len(json.loads(first.out)) == 2
    said = perception("generate", "--question", "Hi?", "--max-new-tokens", "3")
    assert said.out == assistant.ask(None, "Hi?", max_new_tokens=3) + "\n"


def test_chat_from_a_pipe(perception: Run, assistant: Any) -> None:
    lines = f"/image {PICTURE}\nWhat is this?\n\nAnd \N{DOG FACE}?\n/clear\nHello <image>\n/exit\nnever asked\n"
    done = perception("chat", "--max-new-tokens", "5", lines=lines)
    assert done.code == 0, done.err
    talk = assistant.chat(max_new_tokens=5)
    wanted = [talk.ask("What is this?", PICTURE), talk.ask("And \N{DOG FACE}?")]
    wanted.append(assistant.generate([[verbs_message("Hello <image>")]], max_new_tokens=5)[0].text)
    assert done.out == "".join(f"{answer}\n" for answer in wanted)
    assert "image1.png: 5 pieces, 80 tokens" in done.err
    done = perception("chat", "--max-new-tokens", "5", "--json", lines=lines)
    found = json.loads(done.out)
    assert [turn["answer"] for turn in found] == wanted
    assert [turn["question"] for turn in found] == ["What is this?", "And \N{DOG FACE}?", "Hello <image>"]


def verbs_message(text: str) -> Any:
    from perception_lm.chat import Message

    return Message("user", (Text(text=text, literal=True),))


def test_chat_goes_on_after_an_error(perception: Run) -> None:
    lines = f"/image nowhere.png\n/sing\n/image {PICTURE}\n{'a' * 5000}\n/clear\nHello\n"
    done = perception("chat", "--max-new-tokens", "2", "--system", "Be brief.", lines=lines)
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "nowhere.png" in errors[0]
    assert "no command /sing; there are /image PATH" in errors[1]
    assert "the model's context is 1024" in errors[2]
    assert len(done.out.splitlines()) >= 1


def test_chat_with_a_clip_and_one_from_the_start(perception: Run, tmp_path: Path) -> None:
    """A path may hold spaces, with quotes or without; --frames and --max-tiles hold for all turns."""
    spaced = tmp_path / "my clip.mp4"
    spaced.write_bytes(samples.clips()["bunny"].read_bytes())
    lines = f"/video {spaced}\nWhat?\n/video '{spaced}'\nAnd?\n"
    done = perception(
        *("chat", "--max-new-tokens", "2", "--frames", "2", "--max-tiles", "1", "--media_path", PICTURE), lines=lines
    )
    assert done.code == 0, done.err
    assert "image1.png: 2 pieces, 32 tokens" in done.err
    assert done.err.count("my clip.mp4: 2 frames, 32 tokens") == 2


def test_a_stopped_answer_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C while the model speaks."""

    class Talk:
        def stream(self, message: Any) -> Any:
            yield from ()
            raise KeyboardInterrupt

    turns = verbs.Turns(Talk())
    assert turns.take("tell me everything") is False
    assert "stopped" in capsys.readouterr().err
    assert turns.failed == 0

    def read(prompt: str) -> str:
        raise KeyboardInterrupt

    assert list(verbs._lines("", read)) == []


def test_ground(perception: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "boxes.png"
    done = perception("ground", PICTURE, "a dog", "--out", out, "--json", "--tiling", "vanilla")
    assert done.code == 0, done.err
    size = list(read_image(PICTURE).size)
    assert json.loads(done.out) == {"boxes": [], "size": size, "out": str(out)}
    assert "the answer names no box" in done.err
    with Image.open(out) as picture:
        assert list(picture.size) == size
    monkeypatch.setattr("perception_lm.assistant.Assistant._about", lambda *_: "[100,200,300,400] [500,500,600,600]")
    done = perception("ground", PICTURE, "a dog")
    width, height = size
    assert done.out.splitlines()[0] == f"{width * 0.1:.1f} {height * 0.2:.1f} {width * 0.3:.1f} {height * 0.4:.1f}"
    assert len(done.out.splitlines()) == 2


def test_estimate(perception: Run, assistant: Any) -> None:
    asked = ("estimate", "--media_path", PICTURE, "--question", "What is in the picture?", "--ckpt", MODEL)
    done = perception(*asked, "--json", "--batch", "2", model=False)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    batch = assistant.processor([[*question("What is in the picture?")]])
    assert (found["tokens"], found["slots"], found["pieces"], found["fits"]) == (batch.lengths[0], 80, [5], True)
    parameters = sum(p.numel() for p in assistant.model.parameters())
    assert found["bytes"]["weights"] == parameters * 2
    assert found["counted"] is True
    text = perception(*asked, "--max-new-tokens", "1000", model=False).out
    assert "DOES NOT FIT; lower --max-tiles or --frames" in text


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": text}]}]


def test_estimate_of_a_published_model_downloads_nothing(perception: Run, tmp_path: Path) -> None:
    """Perception-LM-8B with a picture of 448 x 448: 37 tiles of 256 tokens, and 18.24 GiB of weights in bf16."""
    Image.new("RGB", (448, 448)).save(tmp_path / "a.png")
    for name in ("Perception-LM-8B", "facebook/Perception-LM-8B"):
        done = perception("estimate", "--ckpt", name, "--media_path", tmp_path / "a.png", "--json", model=False)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert (found["slots"], found["pieces"], found["counted"]) == (9472, [37], False)
        assert found["bytes"]["weights"] == 2 * 9_794_260_736
    text = perception("estimate", "--ckpt", name, model=False).out
    assert text.startswith("about ")
    assert "18.24 GiB" in text


def test_export(perception: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for format in ("hf", "native", "original"):
        done = perception("export", MODEL, out / format, "--format", format, "--json", model=False)
        assert done.code == 0, done.err
        assert json.loads(done.out) == {"format": format, "out": str(out / format)}
        asked = ("generate", "--question", "Hi?", "--max-new-tokens", "4", "--ckpt", out / format)
        assert perception(*asked, model=False).out == perception("generate", *asked[1:5]).out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate"], 2, "question"),
        (["generate", "--question", "a", "--media_path", "nowhere.png"], 1, "nowhere.png"),
        (["generate", "--question", "a", "--media_type", "audio", "--media_path", "x"], 1, "media_type='audio'"),
        (["generate", "--question", "a", "--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["generate", "--question", "a", "--tiling", "x", "--media_path", "PICTURE"], 1, "tiling='x'"),
        (
            ["generate", "--question", "<image><image>", "--media_path", "PICTURE"],
            1,
            "2 <image> marks and 1 image parts",
        ),
        (["generate", "--question", "a", "--ckpt", "nowhere"], 1, "nowhere"),
        (["generate", "--question", "a", "--device", "cuda:9"], 1, "devices here"),
        (["generate", "--question", "a", "--dtype", "int3"], 1, "choose from auto"),
        (["chat", "--ckpt", "Perception-LM-2B"], 1, "did you mean 'Perception-LM-8B'"),
        (["ground", "PICTURE"], 2, "caption"),
        (["ground", "PICTURE", "a", "--out", "x.nonsense"], 1, "no picture suffix"),
        (["estimate", "--frames", "0", "--media_type", "video", "--media_path", "x.mp4"], 2, "--frames"),
        (["export", "MODEL", "out", "--format", "gguf"], 1, "no format 'gguf'"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    perception: Run, arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str({"PICTURE": PICTURE, "MODEL": MODEL}.get(argument, argument)) for argument in arguments]
    if "--ckpt" not in given and given[0] != "export":
        given += ["--ckpt", str(MODEL)]
    done = perception(*given, model=False)
    assert done.code == code, done.err
    assert message in done.err
    if code == 1:
        assert done.out == ""
        assert done.err.strip().splitlines()[-1].startswith("error: ")


def test_importing_the_verbs_imports_no_extra() -> None:
    """They are registered for every `perception` command, with the extra `lm` or without."""
    code = (
        "import sys, perception_lm.cli; assert not {'tiktoken', 'tokenizers', 'transformers', 'av'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_verbs_are_installed() -> None:
    assert [entry.value for entry in entry_points(group=cli.GROUP, name="lm")] == ["perception_lm.cli:register"]
