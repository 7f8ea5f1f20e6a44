import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ddrl_bus
from ddrl_bus.errors import SecurityError, UsageError
from ddrl_bus.launch import run_dir
from ddrl_bus.launch.catalog import load_lock
from ddrl_bus.launch.start import plan_of
from ddrl_bus.topology import Plan
from ddrl_bus.transport import wire
from ddrl_bus.transport.shared import MEMORY, SlotWriter


@pytest.fixture
def plan() -> Plan:
    return plan_of("quickstart", ["seed=7"], probe=False, fresh=True)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def create(plan: Plan, path: Path | None = None, started: float = 1e9) -> Path:
    return run_dir.create(plan, path=path, command=["ddrl", "run"], started=started)


def test_holds_what_a_run_needs(plan: Plan) -> None:
    folder = create(plan)

    assert folder.parent == Path("runs/quickstart")
    assert folder.name == time.strftime("%Y%m%d", time.gmtime()) + folder.name[8:]
    assert folder.name.endswith("Z-s7")
    assert (folder.parent / "latest").resolve() == folder.resolve()
    assert load_lock(folder) == plan
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"logs", "ledger", "checkpoints"}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["command"] == ["ddrl", "run"]
    assert meta["started"] == 1e9
    assert meta["status_address"] == f"ipc://{plan.ipc_dir}/controller-0.progress"
    assert meta["versions"].keys() == {"ddrl_bus", "python", "torch", "gymnasium", "numpy", "pyzmq"}
    assert meta["versions"]["ddrl_bus"] == ddrl_bus.__version__
    assert meta["versions"]["torch"]


def test_runs_of_one_second_are_apart(plan: Plan) -> None:
    folders = [create(plan) for _ in range(3)]

    assert len(set(folders)) == 3
    assert (folders[0].parent / "latest").resolve() == folders[-1].resolve()


def test_an_existing_directory_goes_on_with_the_same_run_only(plan: Plan, tmp_path: Path) -> None:
    create(plan, tmp_path / "mine", started=1.0)
    create(plan, tmp_path / "mine", started=2.0)

    meta = run_dir.meta(tmp_path / "mine")
    assert meta["started"] == 2.0
    assert [earlier["started"] for earlier in meta["before"]] == [1.0]
    with pytest.raises(UsageError, match=rf"mine holds run {plan.run_id}, not .*--resume"):
        create(plan_of("quickstart", probe=False, fresh=True), tmp_path / "mine")


def test_where_none_can_be_made(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match=r"cannot make a run directory: .*file"):
        create(plan, tmp_path / "file" / "run")


def test_find(plan: Plan) -> None:
    first = create(plan)
    second = create(plan_of("impala", probe=False, fresh=True))
    os.utime(first / run_dir.LOCK_FILE, (1, 1))

    assert run_dir.find() == second
    assert run_dir.find("quickstart") == first
    assert run_dir.find("runs/quickstart/latest") == first
    assert run_dir.find(str(first)) == first
    with pytest.raises(UsageError, match=r"no run 'nope': .*there: impala, quickstart"):
        run_dir.find("nope")


def test_find_without_runs() -> None:
    with pytest.raises(UsageError, match="no run under"):
        run_dir.find()


def test_epochs_of_a_node_rise(tmp_path: Path) -> None:
    epochs = [run_dir.next_epoch(tmp_path, "actor-0") for _ in range(3)]
    other = run_dir.next_epoch(tmp_path, "actor-01")

    assert [epoch >> 32 for epoch in epochs] == [1, 2, 3]
    assert other >> 32 == 1
    assert len({epoch & 0xFFFFFFFF for epoch in [*epochs, other]}) == 4
    assert [line.split()[:3] for line in (tmp_path / "lives").read_text().splitlines()] == [
        *(["actor-0", f"{epoch:016x}", str(os.getpid())] for epoch in epochs),
        ["actor-01", f"{other:016x}", str(os.getpid())],
    ]


def test_lives_that_start_at_once_differ(tmp_path: Path) -> None:
    code = "from pathlib import Path; from ddrl_bus.launch.run_dir import next_epoch\n"
    code += "for _ in range(50): next_epoch(Path('.'), 'actor-0')"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(3)]

    assert [process.wait(60) for process in processes] == [0, 0, 0]
    starts = [int(line.split()[1], 16) >> 32 for line in (tmp_path / "lives").read_text().splitlines()]
    assert starts == list(range(1, 151))


def test_one_supervisor_per_host_and_run(tmp_path: Path) -> None:
    with run_dir.held(tmp_path, "gpu0"):
        with pytest.raises(UsageError, match="is being run already"), run_dir.held(tmp_path, "gpu0"):
            pass
        with run_dir.held(tmp_path, "cpu1"):
            pass
    with run_dir.held(tmp_path, "gpu0"):
        pass


def test_nobody_runs_a_share_twice_at_a_time_on_one_machine(plan: Plan) -> None:
    """In two run directories its nodes would have the same sockets and names."""
    with run_dir.sockets(plan, "local"):
        with pytest.raises(UsageError, match=r"local's share .* is being run here already; `ddrl stop` ends"):
            run_dir.alone(plan, "local").__enter__()
        with run_dir.alone(plan, "cpu1"):
            pass
    with run_dir.sockets(plan, "local"):
        pass


def test_a_run_directory_is_ones_own_whatever_the_umask(plan: Plan, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = [run_dir.create(plan, path=path, command=[], started=0.0) for path in (None, tmp_path / "mine")]
        old = tmp_path / "t" / "ddrl-0" / "run"
        old.mkdir(parents=True, mode=0o755)
        for path in (old.parent.parent, old.parent):
            path.chmod(0o755)
        run_dir.make_private(old)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (*made, old, old.parent)] == [0o700] * 4
    old.parent.parent.chmod(0o777)
    with pytest.raises(SecurityError, match=r"others can replace .*ddrl-0; type `chmod \+t "):
        run_dir.make_private(old)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_folder_that_somebody_else_made_first_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ddrl-0").mkdir(mode=0o700)
    os.chown(tmp_path / "ddrl-0", 4000, 4000)
    with pytest.raises(SecurityError, match="not ours alone"):
        run_dir.make_private(tmp_path / "ddrl-0" / "run")


def test_sockets_have_a_private_folder_that_goes_with_the_run(plan: Plan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, ipc_dir=tmp_path / "ddrl-0" / "run")
    with run_dir.sockets(plan, "local"):
        assert plan.ipc_dir.stat().st_mode & 0o777 == 0o700
        assert plan.ipc_dir.parent.stat().st_mode & 0o777 == 0o700
        (plan.ipc_dir / "learner-0.weights").touch()
    assert not plan.ipc_dir.exists()


def test_what_a_killed_publisher_left_in_memory_goes_with_the_run(plan: Plan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, ipc_dir=tmp_path / "run")
    value = wire.encode("weights", "learner-0", 1, 1, {}, {"w": np.zeros(10)})
    with run_dir.sockets(plan, "local"):
        name = SlotWriter(f"ipc://{plan.ipc_dir}/learner-0.weights", epoch=1).write(value)
        other = SlotWriter(f"ipc://{plan.ipc_dir}/learner-00.weights", epoch=1)
        assert (kept := other.write(value))
    assert name
    assert not (MEMORY / name).exists()
    assert (MEMORY / kept).exists()  # nobody of this plan
    other.close()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)

    with pytest.raises(SecurityError, match="not ours alone"):
        run_dir.make_private(tmp_path / "open" / "run")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SecurityError, match="link: not ours alone"):
        run_dir.make_private(tmp_path / "link" / "run")
