"""Reading, converting, loading and writing weights; and every way in which a file of weights can be wrong."""

import contextlib
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perception import checkpoint
from perception.checkpoint import (
    CheckpointWarning,
    Rule,
    convert,
    load_into,
    not_finite,
    open_checkpoint,
    read_folder,
    save_folder,
    write_safetensors,
)
from perception.errors import CheckpointError, ConfigError


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return small().state_dict()


# --- Reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_torch_files(tmp_path: Path, state: dict, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = open_checkpoint(path)
    assert list(found) == list(state)
    found.release()  # and again after the mapping was given up
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_reads_safetensors_without_copying(tmp_path: Path, state: dict) -> None:
    save_file(state, tmp_path / "w.safetensors", metadata={"hello": "there"})
    found = open_checkpoint(tmp_path / "w.safetensors")
    assert found.metadata == {"hello": "there"}
    assert found["0.weight"].data_ptr() == found["0.weight"].data_ptr()  # the same page both times
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_writing_to_a_mapped_tensor_never_reaches_the_file(tmp_path: Path, state: dict) -> None:
    save_file(state, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    model, _ = load_into(small, open_checkpoint(tmp_path / "w.safetensors"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert torch.equal(model[0].weight, state["0.weight"] + 1)


@pytest.mark.parametrize("wrapper", checkpoint.WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_unwraps_what_trainers_save(tmp_path: Path, state: dict, wrapper: str, prefix: str) -> None:
    torch.save({wrapper: {prefix + key: value for key, value in state.items()}, "epoch": 3}, tmp_path / "w.pt")
    assert list(open_checkpoint(tmp_path / "w.pt")) == list(state)


def test_a_prefix_is_taken_off_only_when_all_have_it(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b.module.c": torch.zeros(1)}, tmp_path / "w.pt")
    assert set(open_checkpoint(tmp_path / "w.pt")) == {"module.a", "b.module.c"}


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, state: dict) -> None:
    save_file(state, tmp_path / "w.safetensors")
    found = open_checkpoint(tmp_path / "w.safetensors")
    found.release()
    save_file({"a": torch.zeros(9)}, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        found["0.weight"]


# --- Hostile and damaged files -------------------------------------------------------------------------------------


class Marks:
    """A pickle that leaves a file behind when it is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["raw", "zip", "legacy"])
def test_f10_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    bad, path = Marks(tmp_path / "ran"), tmp_path / "w.pt"
    if how == "raw":
        path.write_bytes(pickle.dumps(bad))
    else:
        torch.save({"a": torch.zeros(1), "b": bad}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"w\.pt holds more than tensors.*state dict expected"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_f11_a_pickle_under_a_safetensors_name_is_refused(tmp_path: Path, state: dict) -> None:
    for name, data in {"raw": pickle.dumps(Marks(tmp_path / "ran")), "zip": None}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data) if data else torch.save(state, path)
        with pytest.raises(CheckpointError, match="pickle under a safetensors name"):
            open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_f12_a_torchscript_archive_is_refused_and_not_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit warns that it is old
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="TorchScript program"):
        open_checkpoint(tmp_path / "w.pt")


def test_f13_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"nn\.modules\.linear\.Linear.*state dict expected"):
        open_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("what", [[torch.zeros(1)], torch.zeros(1), {"a": torch.zeros(1), "b": 3}, {}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, what: object) -> None:
    torch.save(what, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="state dict expected"):
        open_checkpoint(tmp_path / "w.pt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "w.pt")  # 1 KB that unfolds to 4 TB
    with pytest.raises(CheckpointError, match="'a' is no plain dense tensor"):
        open_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_f14_an_empty_or_cut_file_says_truncated(tmp_path: Path, state: dict, zipped: bool, share: float) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.randn(64, 64)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="truncated") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
    assert f"{path.stat().st_size} bytes" in str(error.value)


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


MUTATIONS = {
    "empty": b"",
    "huge header": raw({}, length=2**60),
    "header longer than the file": raw({}, length=2**20),
    "bad JSON": raw(b'{"a": '),
    "deep JSON": raw(b"[" * 100_000),
    "no table": raw([1, 2]),
    "offset past the end": raw({"a": entry(0, 400, [100])}, bytes(40)),
    "overlap": raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "hole": raw({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20)),
    "trailing bytes": raw({"a": entry(0, 8, [2])}, bytes(9)),
    "shape overflow": raw({"a": entry(0, 8, [2**62, 2**62])}, bytes(8)),
    "truncated": raw({"a": entry(0, 4096, [1024])}, bytes(2048)),
    "shape and size differ": raw({"a": entry(0, 8, [3])}, bytes(8)),
    "unknown dtype": raw({"a": entry(0, 8, [2], "F33")}, bytes(8)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_f15_malformed_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(MUTATIONS[name])
    before = resident(reset=True)
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        open_checkpoint(path)
    assert resident() - before < 50 * 2**20


def test_f16_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    (tmp_path / "w.safetensors").write_bytes(raw(b"{" + one + b"," + one + b"}", bytes(4)))
    with pytest.raises(CheckpointError, match="'a' is there twice"):
        open_checkpoint(tmp_path / "w.safetensors")


def resident(reset: bool = False) -> int:
    """Peak resident memory in bytes since the last reset; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    return 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_f17_weights_that_are_not_finite(state: dict, value: float) -> None:
    state["2.weight"][1, 2] = value
    with pytest.warns(CheckpointWarning, match=r"NaN or infinity in 1 tensor \(2\.weight\)") as caught:
        load_into(small, state)
    assert caught[0].message.report.not_finite == ["2.weight"]
    with pytest.raises(CheckpointError, match=r"2\.weight"):
        load_into(small, state, check_finite=True)


def test_f17_large_finite_weights_are_fine(state: dict) -> None:
    state["2.weight"].fill_(3e38)  # their sum is infinite, they are not
    load_into(small, state, check_finite=True)


def test_the_quick_look_samples_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FINITE_BUDGET", 64)
    model = nn.Linear(8, 1000)
    with torch.no_grad():
        model.weight[0, 3] = float("nan")
    assert not_finite(model, whole=False) == ["weight"]  # the first row is in the sample
    with torch.no_grad():
        model.weight[0, 3], model.weight[1, 3] = 0.0, float("nan")
    assert not_finite(model, whole=False) == []  # the second is not: documented
    assert not_finite(model, whole=True) == ["weight"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n <!DOCTYPE html>\n<html><head><title>404</title></head></html>"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize(("data", "words"), [(LFS, "Git-LFS pointer"), (PAGE, "HTML page")])
def test_f18_what_people_download_by_mistake(tmp_path: Path, suffix: str, data: bytes, words: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / f"w{suffix}")


def test_other_files_are_named_as_what_they_are_not(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "w.ckpt").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="no PyTorch file"):
        open_checkpoint(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"weights are read from \.safetensors, \.pt"):
        open_checkpoint(tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match="no file of weights"):
        open_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="holds neither"):
        open_checkpoint(tmp_path)


def test_a_compressed_archive_is_refused(tmp_path: Path, state: dict) -> None:
    import zipfile

    torch.save(state, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(tmp_path / "w.pt")


def test_f31_an_old_torch_reads_no_pickles(tmp_path: Path, state: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu126")
    with pytest.raises(CheckpointError, match="use safetensors or upgrade"):
        open_checkpoint(tmp_path / "w.pt")
    assert len(open_checkpoint(tmp_path / "w.safetensors")) == len(state)


# --- Shards and folders --------------------------------------------------------------------------------------------


def shards(folder: Path, state: dict, table: dict | None = None) -> Path:
    keys = list(state)
    halves = {"model-00001-of-00002.safetensors": keys[:2], "model-00002-of-00002.safetensors": keys[2:]}
    for name, part in halves.items():
        save_file({key: state[key] for key in part}, folder / name)
    table = table or {key: name for name, part in halves.items() for key in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return index


def test_reads_shards_by_folder_and_by_index(tmp_path: Path, state: dict) -> None:
    index = shards(tmp_path, state)
    for where in (tmp_path, index):
        found = open_checkpoint(where)
        assert all(torch.equal(found[key], state[key]) for key in state)
        assert len(found) == len(state)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "x\0.safetensors"])
def test_f22_shards_outside_the_folder_are_refused(tmp_path: Path, state: dict, name: str) -> None:
    (tmp_path / "in").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = shards(tmp_path / "in", state, {"0.weight": "model-00001-of-00002.safetensors", "a": name})
    with pytest.raises(CheckpointError, match=r"plain file name|shards are \.safetensors"):
        open_checkpoint(index)


def test_f22_no_shard_is_opened_before_all_names_are_checked(
    tmp_path: Path, state: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(checkpoint, "safe_open", lambda *a, **k: opened.append(a))
    index = shards(tmp_path, state, {"0.weight": "model-00001-of-00002.safetensors", "a": "/x.safetensors"})
    with pytest.raises(CheckpointError):
        open_checkpoint(index)
    assert not opened


def test_f23_a_missing_shard_is_named(tmp_path: Path, state: dict) -> None:
    index = shards(tmp_path, state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing: model-00002-of-00002\.safetensors"):
        open_checkpoint(index)


def test_shards_that_differ_from_their_index_are_refused(tmp_path: Path, state: dict) -> None:
    index = shards(tmp_path, state)
    data = json.loads(index.read_text())
    data["weight_map"]["0.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"do not hold what it says; 1 tensor \(0\.weight\)"):
        open_checkpoint(index)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_f24_links_out_of_the_folder_are_refused(tmp_path: Path, state: dict, name: str) -> None:
    save_folder(tmp_path / "a", state, {"x": 1})
    save_folder(tmp_path / "b", state, {"x": 1})
    (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / name).symlink_to(tmp_path / "b" / name)
    with pytest.raises(CheckpointError, match="a link that leaves its folder"):
        read_folder(tmp_path / "a")


def test_f24_the_hub_cache_is_made_of_links_and_is_read(tmp_path: Path, state: dict) -> None:
    save_folder(tmp_path / "blobs", state, {"x": 1})
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert read_folder(snapshot)[0]["x"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no config.json"),
        ("", "not sound JSON"),
        ("[1]", "expected a table"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("[" * 100_000, "not sound JSON"),
        (" " * (2**20 + 1), "at most"),
        ('{"weights": {"fingerprint": "../../x"}}', "64 hex digits"),
    ],
)
def test_a_config_that_is_not_sound_is_refused(tmp_path: Path, state: dict, text: str | None, words: str) -> None:
    save_folder(tmp_path, state, {})
    (tmp_path / "config.json").unlink() if text is None else (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_folder(tmp_path)


# --- Converting ----------------------------------------------------------------------------------------------------

TABLE = (
    Rule("layers.*.ln.*", "blocks.*.norm.*"),
    Rule("head", "head.weight", lambda t: t.mT, lambda t: t.mT),
    Rule(
        ("layers.*.q", "layers.*.kv"),
        "blocks.*.qkv",
        lambda q, kv: torch.cat([q, kv]),
        lambda t: t.split([len(t) // 3, 2 * len(t) // 3]),
    ),
    Rule("packed", ("first", "second"), lambda t: t.unbind(), lambda a, b: torch.stack([a, b])),
    Rule("extra.**", None),
)


def foreign() -> dict[str, Tensor]:
    return {
        "layers.0.ln.weight": torch.randn(2),
        "layers.11.ln.weight": torch.randn(2),
        "layers.0.q": torch.randn(2, 2),
        "layers.0.kv": torch.randn(4, 2),
        "head": torch.randn(3, 5),
        "packed": torch.randn(2, 4),
        "extra.a.b.c": torch.zeros(1),
    }


def test_a_table_goes_both_ways() -> None:
    theirs = foreign()
    ours = convert(theirs, TABLE)
    assert set(ours) == {
        "blocks.0.norm.weight",
        "blocks.11.norm.weight",
        "blocks.0.qkv",
        "head.weight",
        "first",
        "second",
    }
    assert torch.equal(ours["blocks.0.qkv"], torch.cat([theirs["layers.0.q"], theirs["layers.0.kv"]]))
    assert torch.equal(ours["head.weight"], theirs["head"].T)
    back = convert(ours, TABLE, back=True)
    assert set(back) == set(theirs) - {"extra.a.b.c"}  # what is dropped is gone
    assert all(torch.equal(back[key], theirs[key]) for key in back)


def test_a_rename_copies_nothing() -> None:
    theirs = foreign()
    assert convert(theirs, TABLE)["blocks.0.norm.weight"].data_ptr() == theirs["layers.0.ln.weight"].data_ptr()


def test_a_wildcard_is_one_part_of_a_name() -> None:
    with pytest.raises(CheckpointError, match=r"1 key \(layers\.0\.1\.ln\.weight\) of 8 match no rule"):
        convert({**foreign(), "layers.0.1.ln.weight": torch.zeros(1)}, TABLE)
    with pytest.raises(CheckpointError, match="match no rule"):
        convert({"xlayers.0.ln.weight": torch.zeros(1)}, TABLE)


def test_unknown_keys_are_named_five_at_most() -> None:
    strange = {f"strange{i}": torch.zeros(1) for i in range(7)}
    with pytest.raises(CheckpointError, match=r"7 keys \(strange0, strange1, strange2, strange3, strange4, \.\.\.\)"):
        convert({**foreign(), **strange}, TABLE)
    assert convert({**foreign(), **strange}, TABLE, strict=False).unknown == list(strange)


def test_half_of_a_pair_is_an_error() -> None:
    theirs = foreign()
    del theirs["layers.0.kv"]
    with pytest.raises(CheckpointError, match=r"1 key \(layers\.0\.kv\) missing, which go with layers\.0\.q"):
        convert(theirs, TABLE)
    assert convert(theirs, TABLE, strict=False).unknown == ["layers.0.q"]


def test_two_keys_that_become_one_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="b and a become one: c"):
        convert({"a": torch.zeros(1), "b": torch.zeros(1)}, (Rule("a", "c"), Rule("b", "c")))


def test_a_rule_without_a_way_back_says_so() -> None:
    table = (Rule("a", "b", lambda t: t + 1),)
    with pytest.raises(CheckpointError, match="read only"):
        dict(convert({"b": torch.zeros(1)}, table, back=True))


def test_a_shape_a_change_was_not_made_for_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"a \(2,\) cannot become b"):
        dict(convert({"a": torch.zeros(2)}, (Rule("a", "b", lambda t: t[0, 0]),)))


@pytest.mark.parametrize("names", [("a.*", "b"), (("a", "b"), "c"), ("a", ("b", "c"))])
def test_a_rule_that_cannot_work_is_refused_when_written(names: tuple) -> None:
    with pytest.raises(ValueError, match=r"wildcards|joins or splits"):
        Rule(*names)


# --- Loading -------------------------------------------------------------------------------------------------------


def test_loads_what_was_saved(state: dict) -> None:
    model, report = load_into(small, state)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert report == checkpoint.LoadReport()
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert model[0].weight.data_ptr() == state["0.weight"].data_ptr()  # assigned, not copied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_on_the_way(state: dict, dtype: torch.dtype) -> None:
    model, _ = load_into(small, state, dtype=dtype)
    assert all(torch.equal(model.state_dict()[key], state[key].to(dtype)) for key in state)


def test_f19_strange_and_missing_keys_are_named_on_both_sides(state: dict) -> None:
    theirs = {f"strange.{key}": tensor for key, tensor in state.items()}
    with pytest.raises(CheckpointError) as error:
        load_into(small, theirs, origin="w.pt")
    five = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    assert f"w.pt does not fit Sequential: missing 6 parameters ({', '.join(five)}, ...)" in str(error.value)
    assert f"not known 6 keys ({', '.join('strange.' + name for name in five)}, ...)" in str(error.value)


def test_f20_wrong_shapes_are_named_before_anything_is_read(state: dict) -> None:
    wide = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)).state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"0\.weight is \(8, 3\), expected \(4, 3\); .*2\.weight is \(2, 8\)"):
        load_into(small, wide)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_whole_number_where_a_weight_belongs_is_refused(state: dict) -> None:
    state["0.bias"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"0\.bias is torch\.int64, expected torch\.float32"):
        load_into(small, state)


def test_f21_a_partial_checkpoint_reports_and_warns(state: dict) -> None:
    del state["2.bias"]
    state["more"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"missing 1 parameter \(2\.bias\); not known 1 key \(more\)"):
        load_into(small, state)
    with pytest.warns(CheckpointWarning, match=r"missing 1 parameter \(2\.bias\)") as caught:
        model, report = load_into(small, state, strict=False, dtype=torch.bfloat16)
    assert (report.missing, report.unexpected) == (["2.bias"], ["more"])
    assert caught[0].message.report is report
    assert model[2].bias.dtype == torch.bfloat16
    assert not model[2].bias.is_meta
    assert torch.equal(model[0].weight, state["0.weight"].bfloat16())


def test_tied_parameters_stay_tied() -> None:
    def build() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    weight = torch.randn(3, 3)
    for state in ({"a.weight": weight}, {"b.weight": weight}, {"a.weight": weight, "b.weight": weight.clone()}):
        model, _ = load_into(build, state)
        assert model["a"].weight is model["b"].weight
        assert torch.equal(model["a"].weight, weight)
    with pytest.raises(CheckpointError, match="one parameter in the model and differ"):
        load_into(build, {"a.weight": weight, "b.weight": weight + 1})


def test_buffers_that_are_never_saved_get_their_values() -> None:
    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.arange(4.0), persistent=False)
        model.register_buffer("count", torch.tensor(3), persistent=True)
        return model

    model, _ = load_into(build, {"weight": torch.ones(2, 2), "bias": torch.ones(2), "count": torch.tensor(7)})
    assert model.table.tolist() == [0, 1, 2, 3]
    assert model.count.item() == 7


def test_frozen_parameters_stay_frozen(state: dict) -> None:
    model, _ = load_into(lambda: small().requires_grad_(False), state)
    assert not any(parameter.requires_grad for parameter in model.parameters())


PEAK = """
import sys, torch
from torch import nn
from perception.checkpoint import load_into, open_checkpoint
def now():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024
build = lambda: nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))
load_into(lambda: nn.Linear(2, 2), {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, dtype=torch.bfloat16)
before, _ = now()
model, _ = load_into(build, open_checkpoint(sys.argv[1]), dtype=getattr(torch, sys.argv[2]))
total = float(sum(p.sum(dtype=torch.float32) for p in model.parameters()))
print(now()[1] - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_peak_memory_is_the_weights_once(tmp_path: Path, dtype: str, suffix: str) -> None:
    """192 MB of float32. Keeping the mapped file while casting makes it three times the result, an eager copy twice."""
    path = tmp_path / f"w{suffix}"
    state = {f"{i}.weight": torch.full((1024, 1024), 0.5) for i in range(48)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    command = [sys.executable, "-c", PEAK, str(path), dtype]
    peak, weights = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert peak < weights * 1.1 + 24 * 2**20  # and what the interpreter and the released pages take beside them


# --- Writing -------------------------------------------------------------------------------------------------------


def test_what_is_written_reads_back_in_every_dtype(tmp_path: Path) -> None:
    state = {str(dtype): torch.arange(7).to(dtype) for dtype in checkpoint.DTYPE_CODES}
    state |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "turned": torch.randn(3, 4).T}
    write_safetensors(tmp_path / "w.safetensors", state)
    theirs, ours = load_file(tmp_path / "w.safetensors"), open_checkpoint(tmp_path / "w.safetensors")
    assert set(theirs) == set(ours) == set(state)
    for key, tensor in state.items():
        assert theirs[key].dtype == tensor.dtype
        assert torch.equal(theirs[key].view(-1).float(), tensor.reshape(-1).float())
        assert torch.equal(ours[key].float(), tensor.float())


def test_the_fingerprint_follows_the_content(tmp_path: Path, state: dict) -> None:
    first = write_safetensors(tmp_path / "a.safetensors", state)
    again = write_safetensors(tmp_path / "b.safetensors", dict(reversed(state.items())))
    assert first == again == open_checkpoint(tmp_path / "a.safetensors").metadata["fingerprint"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    state["0.bias"][0] += 1
    assert write_safetensors(tmp_path / "c.safetensors", state) != first


def test_the_first_tensor_is_aligned(tmp_path: Path, state: dict) -> None:
    write_safetensors(tmp_path / "w.safetensors", state)
    (length,) = struct.unpack("<Q", (tmp_path / "w.safetensors").read_bytes()[:8])
    assert (8 + length) % 64 == 0


def test_a_folder_reads_back(tmp_path: Path, state: dict) -> None:
    save_folder(tmp_path / "new" / "one", state, {"x": 1})
    config, found = read_folder(tmp_path / "new" / "one")
    assert config["x"] == 1
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert sorted(path.name for path in (tmp_path / "new" / "one").iterdir()) == ["config.json", "model.safetensors"]


def test_views_of_one_storage_are_written_each_for_itself(tmp_path: Path) -> None:
    """As optimize() leaves a decoder's weights on CUDA, and as slices of columns and turned matrices lie."""
    whole = torch.randn(12, 4)
    views = {"q": whole[:6], "k": whole[6:9], "v": whole[9:], "column": whole[:, 1:3], "turned": whole.t()}
    apart = {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
    assert write_safetensors(tmp_path / "a", views) == write_safetensors(tmp_path / "b", apart)
    found = load_file(tmp_path / "a")
    assert found.keys() == views.keys()
    assert all(torch.equal(found[name], view) for name, view in views.items())
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size


def test_weights_of_another_save_are_refused(tmp_path: Path, state: dict) -> None:
    save_folder(tmp_path / "a", state, {})
    save_folder(tmp_path / "b", small(1).state_dict(), {})
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not the file config\.json was saved with"):
        read_folder(tmp_path / "a")


def test_a_folder_without_a_fingerprint_is_read_as_it_is(tmp_path: Path, state: dict) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"x": 1}')
    assert len(read_folder(tmp_path)[1]) == len(state)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, state: dict) -> None:
    save_folder(tmp_path, state, {"step": 1})
    with pytest.raises(TypeError):
        save_folder(tmp_path, small(1).state_dict(), {"step": object()})
    with pytest.raises(CheckpointError, match="cannot write 'a'"):
        save_folder(tmp_path, {"a": torch.zeros(1, device="meta")}, {"step": 2})
    config, found = read_folder(tmp_path)
    assert config["step"] == 1
    assert torch.equal(found["0.weight"], state["0.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


FULL = """
import resource, sys, torch
from perception.checkpoint import save_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: writes past it fail
try:
    save_folder(sys.argv[1], {"a": torch.zeros(100_000)}, {"step": 2})
except Exception as error:
    print(type(error).__name__, error)
"""


def test_f06_a_full_disk_leaves_the_old_checkpoint_and_no_part(tmp_path: Path, state: dict) -> None:
    save_folder(tmp_path, state, {"step": 1})
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("CheckpointError cannot save to")
    assert read_folder(tmp_path)[0]["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# One process imports torch; each line it is given forks a child that saves without pause, and answers with its id.
SAVERS = """
import os, sys, torch
from perception.checkpoint import save_folder
for line in sys.stdin:
    step = int(line)
    child = os.fork()
    if not child:
        while True:
            step += 1
            save_folder(sys.argv[1], {"step": torch.full((40_000,), float(step))}, {"step": step})
    print(child, flush=True)
"""


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Callable[[int], int]]:
    """Start a child that saves steps from a number on; returns its process id."""
    command = [sys.executable, "-c", SAVERS, str(tmp_path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    started = []

    def start(step: int) -> int:
        parent.stdin.write(f"{step}\n")
        parent.stdin.flush()
        started.append(int(parent.stdout.readline()))
        return started[-1]

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    parent.communicate()


def test_f29_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path, saver: Callable[[int], int]) -> None:
    """A process that saves without pause is killed twenty times; each time config and weights belong together."""
    save_folder(tmp_path, {"step": torch.zeros(40_000)}, {"step": 0})
    chance, last, leftovers = random.Random(0), 0, 0
    for _ in range(20):
        child = saver(last)
        time.sleep(chance.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        time.sleep(0.01)  # the kernel lets go of its files
        config, found = read_folder(tmp_path)
        assert found["step"].unique().tolist() == [config["step"]]
        assert config["step"] >= last
        last = config["step"]
        leftovers += len(list(tmp_path.iterdir())) > 2
    assert last > 0  # it did save
    assert leftovers  # and some were killed in the middle
    save_folder(tmp_path, {"step": torch.full((4,), -1.0)}, {"step": -1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert read_folder(tmp_path)[1]["step"].tolist() == [-1.0] * 4


@pytest.mark.parametrize("instant", ["weights written", "config replaced"])
def test_f29_a_kill_between_two_renames_is_finished_by_the_next_save(tmp_path: Path, state: dict, instant: str) -> None:
    save_folder(tmp_path, state, {"step": 1})
    save_folder(tmp_path / "new", small(1).state_dict(), {"step": 2})
    fingerprint = read_folder(tmp_path / "new")[0]["weights"]["fingerprint"]
    (tmp_path / "new" / "model.safetensors").replace(tmp_path / f"model.{fingerprint}.safetensors")
    if instant == "config replaced":
        (tmp_path / "new" / "config.json").replace(tmp_path / "config.json")
    expected = 1 if instant == "weights written" else 2
    config, found = read_folder(tmp_path)
    assert config["step"] == expected
    assert torch.equal(found["0.weight"], small(expected - 1).state_dict()["0.weight"])

    with pytest.raises(CheckpointError):  # a save that fails late must not lose it either
        save_folder(tmp_path, {"a": torch.zeros(1, device="meta")}, {})
    assert read_folder(tmp_path)[0]["step"] == expected
    assert not list(tmp_path.glob("model.*.safetensors"))


def test_a_save_between_two_reads_is_noticed(tmp_path: Path, state: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path, state, {"step": 1})
    read_config, saves = checkpoint.read_config, [3, 2]

    def slow(folder: Path) -> dict:
        config = read_config(folder)
        if saves:
            step = saves.pop()
            with monkeypatch.context() as inner:  # the save reads the config as well, and must not save in turn
                inner.setattr(checkpoint, "read_config", read_config)
                save_folder(tmp_path, small(step).state_dict(), {"step": step})
        return config

    monkeypatch.setattr(checkpoint, "read_config", slow)
    config, found = read_folder(tmp_path)
    assert config["step"] == 3
    assert torch.equal(found["0.weight"], small(3).state_dict()["0.weight"])


def test_f30_processes_that_save_to_one_folder_wait_for_each_other(tmp_path: Path, saver: Callable[[int], int]) -> None:
    save_folder(tmp_path, {"step": torch.zeros(40_000)}, {"step": 0})
    children = [saver(0), saver(10_000)]
    seen, stop = set(), time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < stop:
        config, found = read_folder(tmp_path)
        assert found["step"].unique().tolist() == [config["step"]]
        seen.add(config["step"] > 10_000)
    for child in children:
        os.kill(child, signal.SIGKILL)  # still at it: neither failed
    assert seen == {True, False}
