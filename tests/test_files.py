"""Atomic writes and strict reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from prunecli import files
from prunecli.errors import PruneError


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "report.json"
    files.write_json(target, {"a": 1})

    def half(temporary: Path) -> None:
        temporary.write_text('{"a":')
        raise OSError(28, "No space left on device")

    with pytest.raises(PruneError, match="the disk is full"):
        files.write_atomic(target, half)
    assert files.read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_full_disk_is_one_sentence():
    full = Path("/dev/full")
    with pytest.raises(PruneError, match=r"Cannot write /dev/full: the disk is full\."), files.explained(full):
        full.write_text("x")


def test_a_file_in_the_way_of_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(PruneError, match="a file stands where a folder is needed"):
        files.write_text(tmp_path / "runs" / "a", "x")


def test_files_have_the_mode_of_the_users_umask(tmp_path):
    former = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o640


def test_tensors_that_share_memory_are_written_under_each_name(tmp_path):
    a = torch.arange(4.0)
    files.write_tensors(tmp_path / "w.safetensors", {"a": a, "b": a[:2]})
    back = files.read_tensors(tmp_path / "w.safetensors")
    assert torch.equal(back["a"], a)
    assert torch.equal(back["b"], a[:2])


def test_equal_contents_are_equal_bytes(tmp_path):
    metadata = dict.fromkeys("zyxwvutsrq", "ä" * 3)
    for number in range(8):
        files.write_tensors(tmp_path / f"{number}", {"a": torch.ones(2), "b": torch.zeros(3)}, metadata)
    assert len({files.sha256_of(tmp_path / f"{number}") for number in range(8)}) == 1
    assert torch.equal(files.read_tensors(tmp_path / "0")["b"], torch.zeros(3))


def test_truncated_and_missing_files_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    files.write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PruneError, match=r"w\.safetensors is truncated"):
        files.read_tensors(path)
    with pytest.raises(PruneError, match=r"nothing\.json is missing"):
        files.read_json(tmp_path / "nothing.json")
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(PruneError, match=r"half\.json is not readable JSON"):
        files.read_json(tmp_path / "half.json")


def test_nan_is_refused_because_json_has_none(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", float("nan"))
