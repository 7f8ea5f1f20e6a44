"""Checkpoints are whole or not there: damage is found, death at any instant leaves one to go on from."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ddrl_bus import checkpoint
from ddrl_bus.checkpoint import Checkpoint
from ddrl_bus.errors import RefusedFileError

ARRAYS, MANIFEST = "arrays.safetensors", "manifest.json"
KILLS = 50


def state(step: int) -> Checkpoint:
    arrays = {
        "net.policy.weight": np.full((16, 8), step, np.float32),
        "counters": np.array([step, step * 640], np.int64),
        "rng": np.arange(step % 7, dtype=np.uint8),
    }
    return Checkpoint(step, arrays, {"algo": "impala", "env_steps": step, "nested": {"none": None}})


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.step, found.values) == (expected.step, expected.values)
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, name, strict=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with checkpoints 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    return tmp_path


# ── whole ones ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "made" / "here", state(640))
    assert path == tmp_path / "made" / "here" / "000000000640"
    assert names(path) == [ARRAYS, MANIFEST]
    assert_same(checkpoint.load(path), state(640))


def test_an_array_in_parts_is_one_array(tmp_path: Path) -> None:
    """And whatever order its bytes lie in where it is."""
    whole = np.arange(70, dtype=np.float64).reshape(10, 7)
    parts = {"ring": checkpoint.Parts(whole.dtype, whole.shape, (whole[:4], whole[4:4], np.asfortranarray(whole[4:])))}
    found = checkpoint.load(checkpoint.save(tmp_path, state(3), parts=parts))
    assert_same(found, Checkpoint(3, {**state(3).arrays, "ring": whole}, state(3).values))


def test_none_at_all_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    (tmp_path / "tmp-000000000005-1").mkdir()
    (tmp_path / "7").touch()
    assert checkpoint.newest(tmp_path) is None


def test_the_newest_goes_by_step(tmp_path: Path) -> None:
    for step in (999_999, 5, 1_000_000):
        checkpoint.save(tmp_path, state(step))
    assert_same(checkpoint.newest(tmp_path), state(1_000_000))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(6):
        checkpoint.save(tmp_path, state(step), keep)
        assert names(tmp_path) == [f"{s:012d}" for s in range(max(0, step + 1 - keep), step + 1)]


def test_the_same_step_again_comes_after_it(two: Path) -> None:
    """And the first one goes only when the second one stands: with `keep=1` there is always one."""
    for number in range(1, 4):
        again = Checkpoint(2, {"other": np.full(3, number)}, {})
        checkpoint.save(two, again, keep=1)
        assert names(two) == [f"000000000002.00{number}"]
        assert_same(checkpoint.newest(two), again)
    checkpoint.save(two, state(3), keep=2)
    assert names(two) == ["000000000002.003", "000000000003"]


# ── damaged ones ─────────────────────────────────────────────────────────────────────────────────────────────────


def cut(at: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * at))


def flip(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int((len(data) - 1) * at)] ^= 1 << 4
        path.write_bytes(data)

    return damage


def zero_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-64] + bytes(64))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"{}")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": cut(0),
    "cut in the middle": cut(0.5),
    "last byte cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "first bit": flip(0),
    "bit in the middle": flip(0.5),
    "last bit": flip(1),
    "zeroed tail": zero_tail,
    "grown": grow,
}


@pytest.mark.parametrize("name", [ARRAYS, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_the_older_one_used(two: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(two / "000000000002" / name)
    with pytest.raises(RefusedFileError, match="000000000002"):
        checkpoint.load(two / "000000000002")
    assert_same(checkpoint.newest(two), state(1))


@pytest.mark.parametrize("name", [ARRAYS, MANIFEST])
def test_no_flipped_bit_changes_anything(tmp_path: Path, name: str) -> None:
    """One bit of every byte, one at a time: refused, or what the file says is the same (white space)."""
    path = checkpoint.save(tmp_path, state(3))
    whole = (path / name).read_bytes()
    refused = 0
    for at, byte in enumerate(whole):
        (path / name).write_bytes(whole[:at] + bytes([byte ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert_same(checkpoint.load(path), state(3))
        except RefusedFileError:
            refused += 1
    assert refused > 0.95 * len(whole)


def test_files_of_two_checkpoints_do_not_mix(two: Path) -> None:
    (two / "000000000001" / ARRAYS).replace(two / "000000000002" / ARRAYS)
    with pytest.raises(RefusedFileError, match=r"no checkpoint is whole: .*000000000002.*000000000001"):
        checkpoint.newest(two)


def test_all_damaged_is_refused_and_names_each(two: Path) -> None:
    for step in (1, 2):
        cut(0.5)(two / f"{step:012d}" / ARRAYS)
    with pytest.raises(RefusedFileError, match=r"no checkpoint is whole: .*000000000002.*000000000001"):
        checkpoint.newest(two)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"step": "many"}, "not a whole checkpoint"),
        ({"values": 3}, "not a whole checkpoint"),
        ({"files": {}}, "not a whole checkpoint"),
        ({"files": []}, "not a whole checkpoint"),
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_refused(two: Path, manifest: dict[str, object], words: str) -> None:
    path = two / "000000000002"
    said = json.loads((path / MANIFEST).read_text()) | manifest
    text = json.dumps({key: said[key] for key in sorted(said) if key != "sha256"})
    said["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(RefusedFileError, match=words):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_a_manifest_that_is_no_mapping_is_refused(two: Path, text: str) -> None:
    (two / "000000000002" / MANIFEST).write_text(text)
    assert_same(checkpoint.newest(two), state(1))


# ── death and a full disk ────────────────────────────────────────────────────────────────────────────────────────

SAVE_LOOP = """
import sys
from pathlib import Path
import numpy as np
from ddrl_bus import checkpoint
folder, step = Path(sys.argv[1]), int(sys.argv[2])
arrays = {"w": np.zeros(4096, np.float32), "counters": np.zeros(1, np.int64)}
for step in range(step, step + 100_000):
    arrays["w"][:] = arrays["counters"][:] = step
    checkpoint.save(folder, checkpoint.Checkpoint(step, arrays, {"step": step}), keep=2)
    print(step, flush=True)
"""


def test_death_at_any_instant_leaves_a_whole_one(tmp_path: Path) -> None:
    """kill -9 of a process that saves all the time: what it reported as saved, or a later one, loads."""
    dice = random.Random(2)
    with Forks(SAVE_LOOP, tmp_path) as forks:
        for _ in range(KILLS):
            found = checkpoint.newest(tmp_path)
            reported = forks.killed_after(dice.uniform(0.0, 0.02), found.step if found else 0)
            found = checkpoint.newest(tmp_path)
            assert found is not None
            assert found.step in (reported, reported + 1)
            assert found.values == {"step": found.step}
            assert found.arrays["counters"].tolist() == [found.step]
            assert (found.arrays["w"] == found.step).all()


class Forks:
    """Children of a process that has imported everything, so that fifty of them take seconds."""

    PARENT = """
import os, sys
import numpy, safetensors.numpy, ddrl_bus.checkpoint
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv[1:] = line.split()
        exec({code!r})
    print("pid", child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""

    def __init__(self, code: str, folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, "-W", "ignore", "-c", self.PARENT.format(code=code)]
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate(timeout=10)

    def _lines(self) -> Iterator[str]:
        assert self._parent.stdout is not None
        yield from iter(self._parent.stdout.readline, "")

    def killed_after(self, seconds: float, step: int) -> int:
        """Start one at `step`, kill it so long after its first save; the last step that it reported."""
        assert self._parent.stdin is not None
        print(self._folder, step, file=self._parent.stdin, flush=True)
        child = last = 0
        for line in self._lines():
            match line.split():
                case ["pid", pid]:
                    child = int(pid)
                case ["gone"]:
                    break
                case [number]:
                    first, last = not last, int(number)
            if child and last and first:
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)
                first = False
        return last


def test_left_overs_of_a_dead_save_do_not_pile_up(tmp_path: Path) -> None:
    for step in range(4):
        (tmp_path / f"tmp-{step:012d}-{4_000_000 + step}").mkdir()
    checkpoint.save(tmp_path, state(9))
    assert names(tmp_path) == ["000000000009"]


def test_a_failing_write_leaves_what_was_there(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(two, state(3), keep=1)
    assert names(two) == ["000000000001", "000000000002"]
    assert_same(checkpoint.newest(two), state(2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB of disk; mounting it takes root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    checkpoint.save(small_disk, state(1))
    big = Checkpoint(2, {"w": np.ones(100_000, np.float32)}, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(small_disk, big, keep=1)
    assert names(small_disk) == ["000000000001"]
    assert_same(checkpoint.newest(small_disk), state(1))
    checkpoint.save(small_disk, state(3))
    assert_same(checkpoint.newest(small_disk), state(3))
