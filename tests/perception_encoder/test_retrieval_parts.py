"""Parts: every source, the same bytes whoever makes them, nothing done twice, damage seen."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_models import clip_config
from safetensors.torch import load_file

import perception_encoder as pe
from perception.errors import ConfigError, MediaError
from perception_encoder import samples
from perception_encoder.retrieval import pipeline
from perception_encoder.retrieval.columns import column, from_tensors, to_tensors
from perception_encoder.retrieval.engines import embed_with_processes, embed_with_ray
from perception_encoder.retrieval.parts import PartError, Parts, read_part, sidecar_path
from perception_encoder.retrieval.sources import as_source, picture_of, read_list

sys.path.insert(0, str(Path(__file__).parent))
from retrieval_tools import contents, pictures, tar

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clip(golden: Path) -> pe.CLIP:
    return pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return pictures(tmp_path_factory.mktemp("pictures"), 23)


# --- what a part holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_parts_hold_what_embed_gives(clip: pe.CLIP, files: list[str], tmp_path: Path, file_format: str) -> None:
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    parts = pe.embed(clip, files, out=tmp_path, part_rows=10, batch_size=4, file_format=file_format)
    assert (parts.plan.parts, parts.plan.rows, len(parts)) == (3, 23, 23)
    torch.testing.assert_close(parts.vectors(), pe.embed(clip, files))
    assert parts.column("id") == parts.column("source") == files
    assert set(parts.column("width")) == {30}
    assert set(parts.column("height")) == {20}
    sidecar = read_part(tmp_path, 2, verify=True).sidecar
    assert (sidecar.rows, sidecar.width, sidecar.failures) == (3, 12, ())
    assert sidecar.fingerprint == parts.plan.fingerprint
    assert sidecar.preprocess == clip.preprocess.fingerprint()


def test_half_precision_and_unnormalised(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    parts = pe.embed(clip, files[:3], out=tmp_path, dtype="float16", normalize=False)
    assert parts.vectors().dtype == torch.float16
    torch.testing.assert_close(
        parts.vectors().float(), pe.embed(clip, files[:3], normalize=False), rtol=1e-3, atol=1e-3
    )


def test_columns_come_back_as_they_were(tmp_path: Path) -> None:
    given = {
        "text": ["é", None, "", "a\ud800b"],
        "whole": [1, None, -5, 2**62],
        "real": [0.5, 1, None, 3],
        "truth": [True, None, False, True],
        "mixed": [1, "two", None, [3]],
        "none": [None] * 4,
    }
    columns = {name: column(values) for name, values in given.items()}
    back = from_tensors(to_tensors(columns), 4, "here")
    for name in ("text", "whole", "real", "truth", "none"):
        assert back[name].to_list() == given[name], name
    assert back["mixed"].to_list() == ["1", "two", None, "[3]"]
    assert back["text"].take([3, 0]).to_list() == ["a\ud800b", "é"]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_folder_skips_what_is_broken_and_says_so(clip: pe.CLIP, tmp_path: Path) -> None:
    names = pictures(tmp_path / "in", 6)
    Path(names[2]).write_bytes(b"\x89PNG\r\n\x1a\n")
    parts = pe.embed(clip, tmp_path / "in", out=tmp_path / "out", part_rows=4, batch_size=2)
    assert len(parts) == 5
    (failure,) = parts.failures()
    assert (failure.position, failure.source) == (2, names[2])
    assert "cut short or damaged" in failure.reason
    with pytest.raises(MediaError, match="0002"):
        pe.embed(clip, tmp_path / "in", out=tmp_path / "strict", on_error="raise")


def test_tars(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    shards = [str(tar(tmp_path / "a.tar", files[:9])), str(tar(tmp_path / "b.tar", files[9:]))]
    parts = pe.embed(clip, shards, out=tmp_path / "out", part_rows=5, batch_size=3)
    assert parts.plan.parts == 2 + 3
    torch.testing.assert_close(parts.vectors(), pe.embed(clip, files))
    assert parts.column("text") == [f"picture {i}" for i in (*range(9), *range(14))]
    assert parts.column("meta.number")[9:12] == [0, 1, 2]
    assert parts.column("meta.even")[:3] == [True, False, True]
    assert parts.column("id")[9] == f"{shards[1]}/a/0000"
    assert picture_of(parts.column("source")[10], parts.column("inside")[10], None) == Path(files[10]).read_bytes()
    # A folder of tars stands for its tars.
    (tmp_path / "shards").mkdir()
    for shard in shards:
        (tmp_path / "shards" / Path(shard).name).symlink_to(shard)
    assert as_source(tmp_path / "shards").settings() == {"type": "tar"}


def test_a_tar_cut_short(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", files[:6]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 700])
    parts = pe.embed(clip, tmp_path / "cut.tar", out=tmp_path / "out", part_rows=2)
    assert 1 <= len(parts) < 6
    torch.testing.assert_close(parts.vectors(), pe.embed(clip, files[: len(parts)]))
    assert "damaged or cut short" in parts.failures()[-1].reason
    (tmp_path / "no.tar").write_bytes(b"nothing of the kind" * 60)
    with pytest.raises(MediaError, match="cannot be read as a tar"):
        pe.embed(clip, tmp_path / "no.tar", out=tmp_path / "none")
    with pytest.raises(ConfigError, match="decompress it"):
        as_source(tmp_path / "x.tar.gz")


def test_a_tar_with_names_that_climb(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    """Nothing is unpacked: a name is a name; links and devices are not followed."""
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.add(files[0], "../../escaped.png")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, files[1]
        archive.addfile(link)
    parts = pe.embed(clip, tmp_path / "evil.tar", out=tmp_path / "out")
    assert parts.column("inside") == ["../../escaped.png"]
    assert not (tmp_path.parent / "escaped.png").exists()


def test_parquet(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = [Path(file).read_bytes() for file in files]
    table = {"jpg": data, "caption": [f"c{i}" for i in range(23)], "key": [f"k{i}" for i in range(23)]}
    pq.write_table(pa.table(table), tmp_path / "bytes.parquet", row_group_size=7)
    found = as_source(tmp_path / "bytes.parquet", id="key", keep=("key",))
    parts = pe.embed(clip, found, out=tmp_path / "a", part_rows=10)
    torch.testing.assert_close(parts.vectors(), pe.embed(clip, files))
    assert parts.column("id") == parts.column("meta.key") == table["key"]
    assert parts.column("text") == table["caption"]
    assert picture_of(parts.column("source")[8], parts.column("inside")[8], None) == data[8]

    named = {"path": [*files[:2], None], "image": [{"bytes": None, "path": f} for f in (*files[:2], None)]}
    for name, paths in named.items():
        pq.write_table(pa.table({name: paths}), tmp_path / f"{name}.parquet")
        parts = pe.embed(clip, tmp_path / f"{name}.parquet", out=tmp_path / name)
        torch.testing.assert_close(parts.vectors(), pe.embed(clip, files[:2]))
        assert "row 2" in parts.failures()[0].reason
    texts = pe.embed(clip, as_source(tmp_path / "bytes.parquet", shown="text"), out=tmp_path / "t")
    wanted = clip.encode_text(clip.tokenize(table["caption"]), normalize=True).detach()
    torch.testing.assert_close(texts.vectors(), wanted)
    with pytest.raises(ConfigError, match="no columns"):
        pe.embed(clip, as_source(tmp_path / "bytes.parquet", image="nope"), out=tmp_path / "n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(MediaError, match="cannot be read as Parquet"):
        pe.embed(clip, tmp_path / "bad.parquet", out=tmp_path / "b")


def test_lines_of_text(clip: pe.CLIP, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(
        "\ufeffa dog\n\n  a cat \n\xff\n".encode("utf-8", "surrogatepass") + b"\xff\xfe\nlast"
    )
    parts = pe.embed(clip, tmp_path / "t.txt", out=tmp_path / "out", part_rows=2)
    assert parts.column("text") == ["a dog", "a cat", "ÿ", "last"]
    assert [one.rpartition(":")[2] for one in parts.column("id")] == ["1", "3", "4", "6"]
    wanted = clip.encode_text(clip.tokenize(["a dog", "a cat"]), normalize=True).detach()
    torch.testing.assert_close(parts.vectors()[:2], wanted)
    assert "line 5" in parts.failures()[0].reason


def test_videos(clip: pe.CLIP, tmp_path: Path) -> None:
    pytest.importorskip("av")
    video = str(samples.clips()["bunny"])
    frames = pe.embed(clip, as_source(video, fps=0.5), out=tmp_path / "f")
    assert frames.column("start") == [0.0, 2.0, 4.0]
    assert frames.column("id")[1] == f"{video}#50"
    from perception.media import read_video

    shown = torch.stack([clip.preprocess(frame) for frame in read_video(video, indices=[0, 50, 100]).frames])
    torch.testing.assert_close(frames.vectors(), clip.encode_image(shown, normalize=True).detach())
    clips = pe.embed(clip, as_source(video, video="clips", seconds=3.0, frames=2), out=tmp_path / "c")
    assert clips.column("start") == [0.0, 3.0]
    assert clips.column("end")[0] == 3.0
    shown = torch.stack([clip.preprocess(frame) for frame in read_video(video, indices=[0, 74]).frames])
    wanted = clip.encode_video(shown[None], normalize=True, protocol="unit-mean").detach()
    torch.testing.assert_close(clips.vectors()[:1], wanted)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    bad = pe.embed(clip, [tmp_path / "bad.mp4"], out=tmp_path / "b")
    assert len(bad) == 0
    assert "cannot be read as a video" in bad.failures()[0].reason


def test_lists_and_refusals(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    folder = Path(files[0]).parent
    (folder / "list.lst").write_text("0000.png\n\n0001.png\n")
    assert read_list(folder / "list.lst") == files[:2]
    with pytest.raises(ConfigError, match="one kind at a time"):
        as_source([files[0], tmp_path / "a.tar"])
    with pytest.raises(ConfigError, match="made of files"):
        as_source([b"bytes"])
    with pytest.raises(ConfigError, match="take the options"):
        as_source(files[0], fps=3)
    with pytest.raises(MediaError, match="there is no file or folder"):
        as_source(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; parts need a folder"):
        pe.embed(clip, files, out=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to embed"):
        pe.embed(clip, tmp_path / "empty", out=tmp_path / "out")
    tower = pe.VisionTransformer(clip.config.vision, clip.preprocess)
    (tmp_path / "t.txt").write_text("a text\n")
    with pytest.raises(ConfigError, match="no text tower"):
        pe.embed(tower, tmp_path / "t.txt", out=tmp_path / "t")


# --- resuming --------------------------------------------------------------------------------------------------------


def test_nothing_is_done_twice(
    clip: pe.CLIP, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = pipeline.write_part
    monkeypatch.setattr(
        pipeline, "write_part", lambda folder, number, *rest: made.append(number) or real(folder, number, *rest)
    )
    embed = functools.partial(pe.embed, clip, files, out=tmp_path, part_rows=5, batch_size=2)
    embed()
    assert made == [0, 1, 2, 3, 4]
    whole = contents(tmp_path)
    embed()
    assert made == [0, 1, 2, 3, 4]
    sidecar_path(tmp_path, 3).unlink()
    embed()
    assert made[5:] == [3]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("damage", ["cut", "one byte", "gone", "sidecar"])
def test_f109_a_damaged_part_is_made_again(clip: pe.CLIP, files: list[str], tmp_path: Path, damage: str) -> None:
    embed = functools.partial(pe.embed, clip, files, out=tmp_path, part_rows=10)
    embed()
    whole, path = contents(tmp_path), tmp_path / "part-00001.safetensors"
    data = path.read_bytes()
    if damage == "sidecar":
        sidecar_path(tmp_path, 1).write_text("{}")
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(PartError):
        read_part(tmp_path, 1, verify=True)
    assert Parts(tmp_path).missing(verify=True) == [1]
    embed()
    assert contents(tmp_path) == whole


def test_other_settings_are_refused(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    pe.embed(clip, files, out=tmp_path, part_rows=10)
    with pytest.raises(ConfigError, match=r"part_rows: 10 there, 5 asked"):
        pe.embed(clip, files, out=tmp_path, part_rows=5)
    other = pe.load_clip("PE-Core-nano", device="cpu")
    with pytest.raises(ConfigError, match="fingerprint"):
        pe.embed(other, files, out=tmp_path, part_rows=10)
    chunks = next(tmp_path.glob("chunks-*.jsonl"))
    chunks.write_text(chunks.read_text().replace("0000.png", "0001.png"))
    sidecar_path(tmp_path, 0).unlink()
    with pytest.raises(PartError, match="was changed"):
        pe.embed(clip, files, out=tmp_path, part_rows=10)


def test_f110_a_plan_or_sidecar_that_names_files_elsewhere(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    pe.embed(clip, files[:3], out=tmp_path)
    sidecar = sidecar_path(tmp_path, 0)
    data = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**data, "file": "../other.safetensors"}))
    with pytest.raises(PartError, match="expected the part beside it"):
        read_part(tmp_path, 0)
    sidecar.write_text(json.dumps({**data, "rows": 10**15}))
    with pytest.raises(PartError, match="which cannot be"):
        read_part(tmp_path, 0)
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "chunks": "../chunks-1.jsonl"}))
    with pytest.raises(ConfigError, match="expected a file beside it"):
        Parts(tmp_path)


def test_a_vector_that_is_no_number_is_a_failure(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    """F-103, at the door."""

    class Broken:
        preprocess, state_dict, parameters, source = clip.preprocess, clip.state_dict, clip.parameters, None

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            x = clip.encode_image(pixels)
            x[1] = torch.nan
            return x

    parts = pe.embed(Broken(), files[:4], out=tmp_path)
    assert len(parts) == 3
    assert "infinite or not a number" in parts.failures()[0].reason
    assert parts.failures()[0].position == 1


KILLED = """
import sys, time, pathlib, torch
torch.set_num_threads(1)
import perception_encoder as pe
source, out, log, slow, what = sys.argv[1:]
clip = pe.load_clip("PE-Core-nano", device="cpu")
real = pathlib.Path.replace
def replace(path, target):  # every file of ours takes its place so
    with open(log, "a") as file:
        file.write(pathlib.Path(target).name + chr(10))
    time.sleep(float(slow))
    result = real(path, target)
    time.sleep(float(slow))
    return result
pathlib.Path.replace = replace
print("ready", flush=True)
if what == "index":
    pe.Index.build(source, clip, out, part_rows=25, batch_size=5, kind="ivf-flat")
else:
    pe.embed(clip, source, out=out, part_rows=4, batch_size=2)
print("done", flush=True)
"""


def kill_at_random_moments(tmp_path: Path, count: int, kills: int, what: str) -> set[str]:
    """Kill a job that many times while it works, start it again each time, and compare; the files that were under way.

    A moment is so many files after the start and a bit: kills are spread over the whole of the job, however fast the
    machine is. A job that comes to its end in between is compared too, and begun anew.
    """
    pictures(tmp_path / "in", count)
    chance, log, interrupted = random.Random(5), tmp_path / "log", set()

    def start(out: str, slow: float) -> "subprocess.Popen[str]":
        log.write_text("")
        command = [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path / "in"), str(tmp_path / out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, str(log), str(slow), what], stdout=subprocess.PIPE, text=True, env=env)

    assert "done" in start("whole", 0).communicate()[0]
    wanted, files = contents(tmp_path / "whole"), len(log.read_text().split())
    killed = 0
    while killed < kills:
        before = {path.stem for path in (tmp_path / "killed").rglob("part-*.json")}
        process, after = start("killed", 0.01), chance.randint(1, max(2, 4 * files // kills))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while len(log.read_text().split()) < after and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))
        process.send_signal(signal.SIGKILL)
        ended = "done" in process.communicate()[0]
        made = log.read_text().split()
        assert not before & {name.partition(".")[0] for name in made}, "a finished part was made again"
        if ended:
            assert contents(tmp_path / "killed") == wanted
            shutil.rmtree(tmp_path / "killed")
        else:
            killed += 1
            interrupted.add(made[-1])
    assert "done" in start("killed", 0).communicate()[0]
    assert contents(tmp_path / "killed") == wanted
    return interrupted


def test_f108_killed_twice_and_the_bytes_are_equal(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 32, 2, "parts")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["parts", "index"])
def test_f108_killed_at_20_random_moments(tmp_path: Path, what: str) -> None:
    pytest.importorskip("faiss")
    interrupted = kill_at_random_moments(tmp_path, 200, 20, what)
    kinds = {name.partition("-")[0] for name in interrupted}
    assert "part" in kinds
    assert what == "parts" or kinds & {"trained", "block", "index", "manifest.json", "report.json", "index.json"}


# --- the same parts, whoever makes them ------------------------------------------------------------------------------


def test_ranks_divide_the_parts(
    clip: pe.CLIP, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `torchrun` says in the environment, in turn."""
    settings = {"part_rows": 4, "batch_size": 3}
    pe.embed(clip, files, out=tmp_path / "one", **settings)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        pe.embed(clip, files, out=tmp_path / "three", **settings)
        assert set(Parts(tmp_path / "three").finished()) >= set(range(rank, 6, 3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    with pytest.raises(ConfigError, match="rank=5"):
        pe.embed(clip, files, out=tmp_path / "x", rank=5, world=2)


LOAD = functools.partial(pe.load_clip, "PE-Core-nano", device="cpu")


@pytest.fixture
def by_one_process(files: list[str], tmp_path: Path) -> dict[str, str]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pe.embed(LOAD(), files, out=tmp_path / "one", part_rows=4, batch_size=3)
    finally:
        torch.set_num_threads(before)
    return contents(tmp_path / "one")


@pytest.mark.slow
def test_several_processes(files: list[str], tmp_path: Path, by_one_process: dict[str, str]) -> None:
    parts = embed_with_processes(LOAD, files, tmp_path / "two", processes=2, threads=1, part_rows=4, batch_size=3)
    assert len(parts) == 23
    assert contents(tmp_path / "two") == by_one_process


@pytest.mark.slow
def test_torchrun(files: list[str], tmp_path: Path, by_one_process: dict[str, str]) -> None:
    (tmp_path / "list.txt").write_text("\n".join(files))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "perception.cli", "embed", "--files", str(tmp_path / "list.txt"), "-o", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--part-rows", "4", "--batch-size", "3"], env=env, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert contents(tmp_path / "two") == by_one_process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_data(files: list[str], tmp_path: Path, by_one_process: dict[str, str]) -> None:
    """A local Ray, really: two actors, and one part that is there already."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    parts = embed_with_ray(LOAD, files, tmp_path / "ray", actors=2, threads=1, part_rows=4, batch_size=3)
    assert parts.missing(verify=True) == []
    assert contents(tmp_path / "ray") == by_one_process
    sidecar_path(tmp_path / "ray", 2).unlink()
    embed_with_ray(LOAD, files, tmp_path / "ray", actors=2, threads=1, part_rows=4, batch_size=3)
    assert contents(tmp_path / "ray") == by_one_process


def test_no_ray(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'perception-vision\[ray\]'"):
        embed_with_ray(LOAD, files, tmp_path / "ray")


def test_reading_runs_ahead_of_the_model(
    clip: pe.CLIP, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is at batch 0, batch 1 has been read: decode and model overlap."""
    order: list[str] = []
    real: Callable[..., torch.Tensor] = pipeline.embed_pixels

    def slow(model: object, pixels: torch.Tensor) -> torch.Tensor:
        order.append("model starts")
        time.sleep(0.1)
        order.append("model ends")
        return real(model, pixels)

    class Reading:
        def __call__(self, image: object, **options: object) -> torch.Tensor:
            order.append("read")
            return clip.preprocess(image)

        def fingerprint(self) -> str:
            return clip.preprocess.fingerprint()

    monkeypatch.setattr(pipeline, "embed_pixels", slow)
    before, clip.preprocess = clip.preprocess, Reading()  # type: ignore[assignment]
    reading, clip.preprocess = clip.preprocess, before
    shown = type("Shown", (), {})()
    for name in ("state_dict", "parameters", "encode_image"):
        setattr(shown, name, getattr(clip, name))
    shown.preprocess, shown.source = reading, None
    parts = pe.embed(shown, files[:12], out=tmp_path, batch_size=4, part_rows=4, workers=1)
    np.testing.assert_array_equal(parts.vectors().numpy(), pe.embed(clip, files[:12], batch_size=4).numpy())
    first_end = order.index("model ends")
    assert order[:first_end].count("read") > 4


def test_the_header_is_the_same_every_time(clip: pe.CLIP, files: list[str], tmp_path: Path) -> None:
    """safetensors writes several header keys in an order that changes; a part has one."""
    for name in ("a", "b", "c"):
        pe.embed(clip, files[:5], out=tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert load_file(tmp_path / "a" / "part-00000.safetensors")["vectors"].shape == (5, 12)
