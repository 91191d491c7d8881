"""The verbs of the language model: generate, chat, ground, estimate, train, export."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from perception.cli import Device, Dtype, Json, check_picture, note, show, table
from perception.errors import CheckpointError, ConfigError, MissingExtra, PerceptionError

DEFAULT_MODEL = "PLM-nano"

Model = Annotated[str, typer.Option("--ckpt", "--model", help="A model name, hub id or folder.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="A tokenizer.model or tokenizer.json, in place of the model's own if it has one.")
]
MediaPaths = Annotated[
    list[str] | None,
    typer.Option("--media_path", "--media-path", help="A picture or a video; give it again for more."),
]
MediaKind = Annotated[str, typer.Option("--media_type", "--media-type", help="auto, image or video.")]
Tiling = Annotated[str | None, typer.Option(help="thumb+tile, or vanilla: one tile.")]
MaxTiles = Annotated[int | None, typer.Option(min=1, help="Tiles of a picture: fewer is faster, and sees less.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of a video.")]
Start = Annotated[float | None, typer.Option(help="Where to begin in a video, in seconds.")]
End = Annotated[float | None, typer.Option(help="Where to end in a video, in seconds.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second to choose from.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")]
Temperature = Annotated[float, typer.Option(help="0: the likeliest answer; above, drawn at random.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that together reach this.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Draw among so many of the likeliest tokens.")]
Penalty = Annotated[float | None, typer.Option(help="Above 1: repeats become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Of the draws; the same seed gives the same answer.")]
System = Annotated[str | None, typer.Option(help="A system message in place of the usual one.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command; called through the entry-point group `perception.commands`."""
    for verb in (generate, chat, ground, estimate, train, export):
        app.command(verb.__name__)(verb)


def generate(
    question: Annotated[str, typer.Option(help="What to ask.")],
    media_path: MediaPaths = None,
    media_type: MediaKind = "auto",
    ckpt: Model = DEFAULT_MODEL,
    tiling: Tiling = None,
    max_tiles: MaxTiles = None,
    frames: Frames = None,
    start: Start = None,
    end: End = None,
    fps: Fps = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer here; may repeat.")] = None,
    system: System = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer one question about pictures, a video, or nothing."""
    of_video = {"frames": frames, "start": start, "end": end, "fps": fps}
    messages = _messages(question, media_path, media_type, of_video)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    assistant = _load(ckpt, device, dtype, tokenizer)
    shown = {"tiling": tiling, "max_tiles": max_tiles, **of_video}
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    settings = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty, "stop": stop or ()}
    options = {**shown, **drawn, **settings}
    began = time.perf_counter()
    if as_json or samples != 1:
        replies = assistant.generate([messages], samples=samples, **options)
        found = [{"text": r.text, "tokens": r.tokens, "finish": r.finish} for r in replies]
        show(found[0] if samples == 1 else found, as_json, lambda: "\n\n".join(reply.text for reply in replies))
        count = sum(len(reply.tokens) for reply in replies)
    else:
        count = _say(assistant.stream(messages, **options))
    seconds = time.perf_counter() - began
    note(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second")


def chat(
    ckpt: Model = DEFAULT_MODEL,
    media_path: MediaPaths = None,
    tiling: Tiling = None,
    max_tiles: MaxTiles = None,
    frames: Frames = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    system: System = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Talk, with pictures and videos on the way: /image PATH, /video PATH, /clear, /exit. Reads from a pipe, too."""
    shown = {"tiling": tiling, "max_tiles": max_tiles, "frames": frames}
    drawn = {"temperature": temperature, "top_p": top_p, "seed": seed, "repetition_penalty": repetition_penalty}
    talk = _load(ckpt, device, dtype, tokenizer).chat(system, max_new_tokens=max_new_tokens, **shown, **drawn)
    turns = Turns(talk, quiet=as_json)
    for path in media_path or []:
        turns.attach(path, "auto")
    for line in _lines("You: " if sys.stdin.isatty() else ""):
        if turns.take(line):
            break
    if as_json:
        show(turns.said, True, str)
    if turns.failed and not sys.stdin.isatty():
        raise typer.Exit(1)


class Turns:
    """What a line of the user's does. quiet: answers are collected in `said`, not shown."""

    def __init__(self, talk: Any, *, quiet: bool = False):
        self.talk, self.quiet = talk, quiet
        self.waiting: list[Any] = []  # media for the next question
        self.said: list[dict[str, str]] = []
        self.failed = 0

    def take(self, line: str) -> bool:
        """True when it was the last one."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return True
        try:
            if word == "/clear":
                self.talk.clear()
                self.waiting = []
            elif word in ("/image", "/video"):
                self.attach(rest.strip().strip("'\""), word[1:])
            elif word.startswith("/") and "/" not in word[1:]:
                raise ConfigError(f"no command {word}; there are /image PATH, /video PATH, /clear and /exit")
            elif line.strip():
                self.ask(line.strip())
        except (PerceptionError, ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self.failed += 1
            note(f"error: {error}")
        return False

    def attach(self, path: str, kind: Any) -> None:
        """Keep a picture or video for the next question; one that cannot be read is refused now."""
        from perception_lm.assistant import media_part
        from perception_lm.chat import Message

        part = media_part(path, kind)
        shown = {name: self.talk.options.get(name) for name in ("tiling", "max_tiles", "frames")}
        (found,) = self.talk.assistant.processor.estimate([[Message("user", (part,))]], **shown)
        self.waiting.append(part)
        note(f"{Path(path).name}: {found.pieces[0]} {'frames' if kind == 'video' else 'pieces'}, {found.slots} tokens")

    def ask(self, question: str) -> None:
        from perception_lm.chat import Message, Text

        # Without media there is nothing that a mark could stand for: it is text.
        message = Message("user", (*self.waiting, Text(text=question, literal=not self.waiting)))
        pieces = self.talk.stream(message)
        self.waiting = []
        try:
            if self.quiet:
                self.said.append({"question": question, "answer": "".join(pieces)})
            else:
                _say(pieces)
        except KeyboardInterrupt:
            pieces.close()
            note("\nstopped")


def ground(
    image: Annotated[str, typer.Argument(help="A picture.")],
    caption: Annotated[str, typer.Argument(help="What to look for, in words.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the picture with the boxes.")] = None,
    ckpt: Model = DEFAULT_MODEL,
    tiling: Tiling = None,
    max_tiles: MaxTiles = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Where in a picture is what a sentence says: x1, y1, x2, y2 in pixels, a line a box."""
    from perception.files import atomic_write

    if out is not None:
        check_picture(out)
    assistant = _load(ckpt, device, dtype, tokenizer)
    boxes, picture = assistant.ground(image, caption, draw=True, tiling=tiling, max_tiles=max_tiles)
    if out is not None:
        with atomic_write(out) as temporary:
            picture.save(temporary)
    if not boxes:
        note("the answer names no box")
    rows = [[round(value, 1) for value in box.xyxy] for box in boxes]
    found = {"boxes": rows, "size": list(picture.size), "out": None if out is None else str(out)}
    show(found, as_json, lambda: "\n".join(" ".join(map(str, row)) for row in rows))


def estimate(
    ckpt: Model = DEFAULT_MODEL,
    question: Annotated[str, typer.Option(help="What would be asked.")] = "",
    media_path: MediaPaths = None,
    media_type: MediaKind = "auto",
    tiling: Tiling = None,
    max_tiles: MaxTiles = None,
    frames: Frames = None,
    start: Start = None,
    end: End = None,
    fps: Fps = None,
    max_new_tokens: MaxNewTokens = 256,
    batch: Annotated[int, typer.Option(min=1, help="Such questions at once.")] = 1,
    tokenizer: Tokenizer = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16")] = "bf16",
    as_json: Json = False,
) -> None:
    """Tokens and memory that a question would need, from the files' headers; no weights are read or downloaded."""
    from perception_lm import zoo

    of_video = {"frames": frames, "start": start, "end": end, "fps": fps}
    messages = _messages(question, media_path, media_type, of_video)
    config, words = _facts(ckpt, tokenizer)
    (found,) = _processor(config, words).estimate([messages], tiling=tiling, max_tiles=max_tiles, **of_video)
    total = min(found.tokens + max_new_tokens, config.media.context)
    memory = zoo.estimate(config, dtype=dtype, batch=batch, tokens=total)
    fits = found.room >= max_new_tokens
    needed = {"weights": memory.weights, "cache": memory.cache, "media": memory.media, "logits": memory.logits}
    values = {
        "model": ckpt,
        "tokens": found.tokens,
        "text": found.text,
        "slots": found.slots,
        "pieces": list(found.pieces),
        "context": config.media.context,
        "fits": fits,
        "counted": words is not None,
        "bytes": {**needed, "total": memory.total},
    }

    def text() -> str:
        about = "" if words is not None else "about "
        rows = [[name, _size(size)] for name, size in {**needed, "total": memory.total}.items()]
        verdict = "fits" if fits else "DOES NOT FIT; lower --max-tiles or --frames"
        head = f"{about}{found.tokens} tokens ({found.slots} of media) and {max_new_tokens} of an answer, of "
        return f"{head}{config.media.context}: {verdict}\n\n{table(rows, ['memory', dtype])}"

    show(values, as_json, text)


def train(
    run: Annotated[str, typer.Argument(help="A run file, or the name of a ready-made one; see --list.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value or table.key=value over the file.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One step: shapes, parameters, memory; keep nothing.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="The run files that come with the package.")] = False,
    as_json: Json = False,
) -> None:
    """Train, or go on with a run that was stopped: the same command again. Under torchrun, on many devices.

    Told to stop (SIGTERM, Ctrl-C), it finishes its step, saves, and ends with exit code 0.
    """
    import logging

    from perception_lm.training.launch import rehearse, summary
    from perception_lm.training.launch import train as run_it
    from perception_lm.training.run import load_run, run_names

    if listed or not run:
        show(run_names(), as_json, lambda: "\n".join(run_names()))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("perception").setLevel(logging.INFO)
    settings = load_run(run, overrides or [])
    if dry_run:
        found = rehearse(settings)
        show(found, as_json, lambda: summary(found))
        return
    done = run_it(settings)
    if os.environ.get("RANK", "0") != "0":  # of several processes, one says it
        return
    said = "finished" if done else "stopped; the same command continues it"
    show({"out": settings.out, "finished": done}, as_json, lambda: f"{settings.out}: {said}")


def export(
    model: Annotated[str, typer.Argument(help="A model name, hub id or folder; a training run or checkpoint of one.")],
    out: Annotated[Path, typer.Argument(help="A folder.")],
    format: Annotated[str, typer.Option(help="native, original or hf; tower: the vision tower alone.")] = "native",
    dtype: Annotated[str, typer.Option(help="stored, fp32, bf16, fp16")] = "stored",
    tokenizer: Tokenizer = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds another model, too.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model in another layout, bit for bit the same weights."""
    from perception.checkpoint import check_folder
    from perception.training.state import find_checkpoint, read_facts

    if format not in ("native", "original", "hf", "tower"):
        raise ConfigError(f"no format {format!r}; there are: native, original, hf, tower")
    check_folder(out, "a vision tower" if format == "tower" else "a language model")
    if os.path.isdir(model) and (found := find_checkpoint(model)) is not None:  # noqa: PTH112 -- may be too long for Path
        from perception.device import pick_dtype
        from perception_encoder.training.launch import FORMAT
        from perception_lm.training.export import load_checkpoint

        if tokenizer is not None:
            raise ConfigError(f"{model} is a training run, which has what it needs; --tokenizer is for other models")
        if read_facts(found).get("format") == FORMAT:
            _export_encoder(model, out, format, dtype, force)
            show({"format": format, "out": str(out)}, as_json, lambda: str(out))
            return
        assistant = load_checkpoint(model, dtype=None if dtype == "stored" else pick_dtype(dtype))
    else:
        assistant = _load(model, "cpu", dtype, tokenizer)
    if format == "tower":
        from perception_lm.training.export import save_tower

        save_tower(assistant, out, replace=force)
    else:
        assistant.save(out, format, replace=force)  # type: ignore[arg-type]
    show({"format": format, "out": str(out)}, as_json, lambda: str(out))


def _export_encoder(run: str, out: Path, format: str, dtype: str, force: bool) -> None:
    from perception.device import pick_dtype
    from perception_encoder import checkpoints
    from perception_encoder.training.launch import load_checkpoint

    if format != "native":
        raise ConfigError(
            f"{run} is a run of an encoder, which is written as native; `perception convert {out}` makes other layouts "
            "of that"
        )
    model = load_checkpoint(run)
    checkpoints.export(model if dtype == "stored" else model.to(pick_dtype(dtype)), out, "native", replace=force)


def _load(ckpt: str, device: str, dtype: str, tokenizer: Path | None) -> Any:
    from perception_lm.zoo import load

    return load(ckpt, tokenizer=tokenizer, device=device, dtype=dtype)


def _messages(question: str, media: list[str] | None, kind: str, of_video: dict[str, Any]) -> list[Any]:
    """A conversation of one question. Without media a mark in it can stand for nothing: it is text, as in `chat`.

    Raises ConfigError for options of a video where there is none.
    """
    from perception_lm.assistant import question_about
    from perception_lm.chat import Clip, Message, Text

    (message,) = question_about(list(media or []), question, kind)  # type: ignore[arg-type]
    given = [name for name, value in of_video.items() if value is not None]
    if given and not any(isinstance(part, Clip) for part in message.parts):
        raise ConfigError(f"--{given[0]} is for videos, and none is given")
    return [message] if media else [Message("user", (Text(text=question, literal=True),))]


def _facts(ckpt: str, tokenizer: Path | None) -> tuple[Any, Any]:
    """The config of a model, and its tokenizer where that is on this machine. The network is not asked."""
    from perception_lm import zoo
    from perception_lm.checkpoints import open_folder
    from perception_lm.config import PlmConfig
    from perception_lm.tokenizer import LlamaTokenizer

    try:
        found = open_folder(zoo.download(ckpt, offline=True))
    except CheckpointError as error:  # not in the cache
        try:
            config, path = PlmConfig.from_dict(zoo.describe(ckpt)["config"]), tokenizer
        except LookupError:
            raise error from None
    else:
        if not isinstance(found.config, PlmConfig):
            raise ConfigError(f"{ckpt} holds a decoder alone; a whole model is a folder with a vision tower")
        config, path = found.config, tokenizer or found.tokenizer
    if path is None:
        return config, None
    try:
        words = LlamaTokenizer.from_file(path)
    except MissingExtra:
        if tokenizer is not None:
            raise
        return config, None
    if words.vocab != config.decoder.vocab:
        raise ConfigError(
            f"{path} has {words.vocab} ids and {ckpt} has {config.decoder.vocab}: they do not belong together"
        )
    return config, words


def _processor(config: Any, tokenizer: Any) -> Any:
    from perception.device import shapes_only
    from perception_lm.processor import Processor
    from perception_lm.projector import build_projector
    from perception_lm.tokenizer import SPECIAL

    # Without a tokenizer: four characters a token, as English has.
    rough: Any = SimpleNamespace(
        special=dict.fromkeys(SPECIAL, 0), image_token=0, pad=0, encode=lambda text: [0] * -(-len(text) // 4)
    )
    grid = config.media.tile // config.vision.patch_size
    with shapes_only():
        slots = build_projector(config.projector).tokens(grid, grid)
    return Processor(tokenizer or rough, config.media, slots)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _say(pieces: Iterable[Any]) -> int:
    """Show an answer as it comes; returns its tokens."""
    count = 0
    for piece in pieces:
        count += len(piece.tokens)
        typer.echo(str(piece), nl=False)
        sys.stdout.flush()
    typer.echo()
    return count


def _lines(prompt: str, read: Callable[[str], str] = input) -> Iterator[str]:
    """Lines of the terminal or the pipe, until it ends."""
    while True:
        try:
            yield read(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            note("")
            return
