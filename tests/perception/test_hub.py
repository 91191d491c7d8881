"""From a reference to a path: ids, folders, and the hub's real client against a hub of our own on the loopback."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from perception import hub
from perception.errors import CheckpointError, ConfigError
from perception.hub import HubId, locate, parse_hub_id

COMMIT = "a" * 40
WEIGHTS = bytes(range(256)) * 1200  # 300 KB
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "model.pt": b"pickle"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("facebook/PE-Core-L14-336", HubId("facebook/PE-Core-L14-336")),
        ("hf://o/n", HubId("o/n")),
        ("hf://o/n@v1.0:sub/w.pt", HubId("o/n", "v1.0", "sub/w.pt")),
        ("o/n@refs/pr/3", HubId("o/n", "refs/pr/3")),
        ("timm/vit_pe_core_base_patch16_224.fb", HubId("timm/vit_pe_core_base_patch16_224.fb")),
    ],
)
def test_ids(text: str, expected: HubId) -> None:
    assert parse_hub_id(text) == expected


BAD_IDS = ["../../etc", "a/b/c", "a\0b", "a/b\0", "x" * 300, "o/" + "n" * 300, "", "o/", "/n", "o/n:../x", "o/n@../x"]
BAD_IDS += ["o/..", "-o/n", "o/n--m", "o/n:a//b", "o/n@", "o/n:", "o/n:C:\\x", "http://o/n", "o/n o", "o/n\n"]


@pytest.mark.parametrize("text", BAD_IDS)
def test_f27_bad_ids_are_refused_without_a_look_at_the_disk(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_disk(*_: object, **__: object) -> None:
        raise AssertionError("looked at the disk")

    for name in ("stat", "open", "exists"):
        monkeypatch.setattr(Path, name, no_disk)
    with pytest.raises(ConfigError):
        parse_hub_id(text)
    with pytest.raises(ConfigError):
        locate("hf://" + text)


@pytest.mark.parametrize("text", ["", "a/b/c", "a\0b", "x" * 300, "o/" + "n" * 300])
def test_f27_bad_references_are_config_errors(text: str) -> None:
    with pytest.raises(ConfigError):
        locate(text)


def test_local_files_and_folders_win_over_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "w.pt").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")
    assert locate("owner/name", filename=("none.pt", "w.pt")) == Path("owner/name/w.pt")
    assert locate(tmp_path / "owner" / "name" / "w.pt").read_bytes() == b"x"
    with pytest.raises(CheckpointError, match="no file"):
        locate("owner/name", filename="none.pt")


@pytest.mark.parametrize("reference", ["./none", "none.safetensors", "/none/there", "~/none-there", Path("o/n")])
def test_paths_that_are_not_there_are_not_taken_for_ids(reference: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no file or folder"):
        locate(reference)


def test_f28_a_local_file_is_held_against_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"x")
    assert locate(tmp_path / "w.pt", sha256=hashlib.sha256(b"x").hexdigest())
    with pytest.raises(CheckpointError, match="another sha256"):
        locate(tmp_path / "w.pt", sha256="0" * 64)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("ON", True), ("true", True), ("0", False), ("", False)])
def test_the_offline_variable(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub.is_offline() is expected


# --- With a hub ----------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """As much of the model hub as a download needs. `o/gated` is gated, `o/n` has FILES, nothing else is there."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path.rpartition('/')[2]}")
        path = self.path.split("?")[0]
        if "/o/gated" in path:
            self.send(403, code="GatedRepo")
        elif "/o/n/" not in path:
            self.send(401 if "/o/private" in path else 404, code="RepoNotFound")
        elif "/resolve/" in path:
            revision, _, name = path.partition("/resolve/")[2].partition("/")
            if revision not in ("main", COMMIT):
                self.send(404, code="RevisionNotFound")
            elif name not in FILES:
                self.send(404, code="EntryNotFound")
            else:
                self.send(200, FILES[name], ETag=f'"{hashlib.sha256(FILES[name]).hexdigest()}"')
        elif "/tree/" in path:
            entries = [{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in FILES.items()]
            self.send(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": name} for name in FILES]
            self.send(200, json.dumps({"id": "o/n", "sha": COMMIT, "siblings": siblings}).encode())

    def send(self, status: int, body: bytes = b"", code: str | None = None, **headers: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# The client reads its environment when it is imported, so each case is a process of its own.
ASK = """
import json, os, resource, sys
from perception.hub import locate
setup, calls = json.loads(sys.argv[1]), json.loads(sys.argv[2])
if setup.get("blocked"):
    import socket
    def refuse(*a, **k):
        print("NETWORK", flush=True)
        os._exit(0)
    socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
if setup.get("limit"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (setup["limit"],) * 2)
for args, options in calls:
    try:
        print(locate(*args, **options), flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


def start(home: Path, calls: list, endpoint: str, env: dict[str, str], **setup: object) -> subprocess.Popen:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    full = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    command = [sys.executable, "-c", ASK, json.dumps(setup), json.dumps(calls)]
    return subprocess.Popen(command, env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ask(
    home: Path, calls: list, server: Hub | None = None, env: dict[str, str] | None = None, **setup: object
) -> list[str]:
    endpoint = f"http://127.0.0.1:{server.server_port}" if server else "http://127.0.0.1:9"
    out, err = start(home, calls, endpoint, env or {}, **setup).communicate(timeout=120)
    lines = out.splitlines()
    assert len(lines) >= len(calls), err
    return lines


def test_downloads_once_and_then_uses_the_cache(tmp_path: Path, server: Hub) -> None:
    calls = [
        (["hf://o/n:model.safetensors"], {}),
        (["o/n"], {"filename": ["other.safetensors", "model.safetensors"]}),
        (["hf://o/n:model.safetensors"], {}),
        (["o/n"], {}),
        (["o/n"], {}),
        (["o/n"], {"offline": True}),
    ]
    lines = ask(tmp_path, calls, server)
    assert Path(lines[0]).read_bytes() == WEIGHTS
    assert lines[0] == lines[1] == lines[2]
    assert sorted(path.name for path in Path(lines[3]).iterdir()) == ["config.json", "model.safetensors"]  # no pickle
    assert lines[3] == lines[4] == lines[5]
    assert server.asked.count("GET model.safetensors") == 1
    assert server.asked.count("GET config.json") == 1


def test_the_first_of_several_files_that_is_there(tmp_path: Path, server: Hub) -> None:
    (line,) = ask(tmp_path, [(["o/n"], {"filename": ["none.pt", "config.json", "model.pt"]})], server)
    assert Path(line).name == "config.json"
    assert "GET model.pt" not in server.asked


def test_each_refusal_of_the_hub_says_what_to_do(tmp_path: Path, server: Hub) -> None:
    calls = [
        (["hf://o/gated:w.pt"], {}),
        (["hf://o/none:w.pt"], {}),
        (["hf://o/n:none.pt"], {}),
        (["hf://o/n@v9:model.pt"], {}),
        (["o/n"], {"filename": ["none.pt", "neither.pt"]}),
    ]
    gated, missing, no_file, no_revision, neither = ask(tmp_path, calls, server)
    url = "https://huggingface.co/o/gated"
    assert gated == f"CheckpointError: o/gated is gated: accept its terms at {url}, then run `hf auth login`"
    assert missing.startswith("CheckpointError: the hub has no repository o/none, or it is private")
    assert no_file.startswith("CheckpointError: o/n has no file none.pt")
    assert no_revision.startswith("CheckpointError: o/n has no revision 'v9'")
    assert neither.startswith("CheckpointError: o/n has no file none.pt or neither.pt")


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_f05_offline_and_not_cached(tmp_path: Path, env: dict[str, str]) -> None:
    options = {} if env else {"offline": True}
    calls = [(["hf://facebook/PE-Core-T16-384:PE-Core-T16-384.pt"], options), (["o/n"], options)]
    lines = ask(tmp_path, calls, env=env, blocked=True)
    for line, name in zip(lines, ("facebook/PE-Core-T16-384", "o/n"), strict=True):
        assert line.startswith(f"CheckpointError: {name}")
        assert str(tmp_path / "hub") in line
        assert f"`perception download {name}`" in line


def test_f05_a_cached_file_needs_no_network(tmp_path: Path, server: Hub) -> None:
    call = (["hf://o/n:model.safetensors"], {})
    (first,) = ask(tmp_path, [call], server)
    assert ask(tmp_path, [call], blocked=True) == [first]
    assert ask(tmp_path, [call], blocked=True, env={"HF_HUB_OFFLINE": "1"}) == [first]
    missing = (["hf://o/gone@main:model.pt"], {})
    assert ask(tmp_path, [missing], server, blocked=True) == ["NETWORK"]  # a try would have been seen


@pytest.mark.slow  # the client tries again for half a minute
def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    (line,) = ask(tmp_path, [(["hf://o/n:model.pt"], {})])
    assert line.startswith("CheckpointError: o/n:model.pt is not in the cache")
    assert "the hub cannot be reached" in line


def test_half_a_snapshot_is_not_taken_for_a_model(tmp_path: Path, server: Hub) -> None:
    calls = [(["hf://o/n:config.json"], {}), (["o/n"], {"offline": True}), (["o/n"], {})]
    _, offline, online = ask(tmp_path, calls, server)
    assert "is not in the cache" in offline
    assert (Path(online) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "there", "offline", "asks"),
    [
        ('{"model_type": "perception_lm"}', "", False, True),
        ('{"model_type": "llama"}', "", False, True),
        ('{"model_type": "llama"}', "", True, False),
        ('{"model_type": "llama"}', "tokenizer.json", False, False),
        ('{"model_type": "llama"}', "original/tokenizer.model", False, False),
        ('{"format": "perception"}', "", False, False),
        ('{"architecture": "vit_pe_core_base_patch16_224"}', "", False, False),  # timm's
        ("[]", "", False, False),
        ("{", "", False, False),
    ],
)
def test_a_cached_language_model_gets_its_tokenizer(
    config: str, there: str, offline: bool, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = tmp_path / COMMIT
    for name in ("config.json", there):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name:
            (folder / name).write_text(config)
    asked: list[dict] = []

    def download(**options: object) -> None:
        asked.append(options)
        raise OSError("no network")  # what is here is used all the same

    monkeypatch.setattr(hub, "_cached", lambda hub_id, names: folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("hf://o/n", offline=offline) == folder
    assert bool(asked) is asks
    for options in asked:
        assert options["revision"] == COMMIT  # of the same commit, and never weights
        assert "tokenizer.model" in options["allow_patterns"]
        assert "*.safetensors" not in options["allow_patterns"]


def test_f06_a_full_disk_leaves_no_partial_file(tmp_path: Path, server: Hub) -> None:
    call = (["hf://o/n:model.safetensors"], {})
    (line,) = ask(tmp_path, [call], server, limit=100_000)
    assert line.startswith("CheckpointError: o/n:model.safetensors cannot be written to the cache")
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert not left
    assert Path(ask(tmp_path, [call], server)[0]).read_bytes() == WEIGHTS  # and the next try begins anew


def test_f06_a_cache_that_cannot_be_written(tmp_path: Path, server: Hub) -> None:
    (tmp_path / "file").write_bytes(b"")
    (line,) = ask(tmp_path / "file", [(["hf://o/n:model.safetensors"], {})], server)
    assert line.startswith("CheckpointError: o/n:model.safetensors cannot be written to the cache")
    assert "HF_HOME" in line


def test_f28_a_cached_file_that_changed_is_fetched_again(tmp_path: Path, server: Hub) -> None:
    right, wrong = hashlib.sha256(WEIGHTS).hexdigest(), "0" * 64
    where = "hf://o/n:model.safetensors"
    (path,) = ask(tmp_path, [([where], {"sha256": right})], server)
    blob = Path(path).resolve()
    blob.write_bytes(b"x" * len(WEIGHTS))
    calls = [
        ([where], {"sha256": right, "offline": True}),
        ([where], {"sha256": right}),
        ([where], {"sha256": right, "offline": True}),
        ([where], {"sha256": wrong}),
    ]
    offline, online, again, never = ask(tmp_path, calls, server)
    assert offline.startswith("CheckpointError")
    assert "fetch it again online" in offline
    assert online == again == path
    assert Path(path).read_bytes() == WEIGHTS
    assert f"published is {wrong}" in never


def test_f30_two_processes_download_once(tmp_path: Path, server: Hub) -> None:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    both = [start(tmp_path, [(["hf://o/n:model.safetensors"], {})], endpoint, {}) for _ in range(2)]
    results = [process.communicate(timeout=120)[0].strip() for process in both]
    assert results[0] == results[1]
    assert Path(results[0]).read_bytes() == WEIGHTS
    assert server.asked.count("GET model.safetensors") == 1


def test_nothing_listens_here() -> None:
    """The tests above take port 9 for a hub that is not there."""
    with socket.socket() as probe, pytest.raises(OSError):  # noqa: PT011
        probe.connect(("127.0.0.1", 9))
