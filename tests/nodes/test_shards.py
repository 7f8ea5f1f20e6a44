"""Parameters dealt over servers, and put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import WORKERS, make_plan, net

from ddrl_bus import checkpoint
from ddrl_bus.errors import RefusedFileError, UsageError
from ddrl_bus.messages import Weights, fields_of
from ddrl_bus.nodes.shards import folder, merged, newest, parts, saved, shards
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import Array, Message

SIZES = st.dictionaries(st.text(max_size=4), st.integers(0, 1 << 30), min_size=1, max_size=40)

# ── dealt ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(SIZES, st.data())
def test_each_parameter_is_in_one_shard_and_shards_are_of_about_one_size(
    sizes: dict[str, int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    dealt = shards(sizes, count)
    assert len(dealt) == count
    assert all(dealt)
    assert sorted(name for names in dealt for name in names) == sorted(sizes)
    held = [sum(sizes[name] for name in names) for names in dealt]
    assert max(held) - min(held) <= max(sizes.values())
    assert shards(dict(data.draw(st.permutations(list(sizes.items())))), count) == dealt


def test_the_largest_are_dealt_first() -> None:
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}
    assert shards(sizes, 2) == [["a", "d"], ["b", "c", "e"]]


@pytest.mark.parametrize("count", [0, 3])
def test_as_many_shards_as_parameters_at_most(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} parameter servers, expected 1 to 2"):
        shards({"a": 1, "b": 2}, count)


# ── published ────────────────────────────────────────────────────────────────────────────────────────────────────


def slice_of(name: str, epoch: int, *counters: int) -> Message:
    arrays = {name: np.zeros(1, np.float32)}
    return wire.decode(wire.encode(Weights.KIND, "node", epoch, 1, fields_of(Weights(*counters)), arrays))


def test_a_network_of_slices_is_as_far_as_the_least_of_them() -> None:
    found = merged([slice_of("a", 9, 40, 7, 2), slice_of("b", 4, 60, 5, 2)])
    assert (found.weights, found.epoch, set(found.arrays)) == (Weights(40, 5, confirm=2), 9, {"a", "b"})


@pytest.mark.parametrize("confirm", [0, 1])
def test_a_network_is_for_a_confirmation_once_all_of_it_is(confirm: int) -> None:
    assert merged([slice_of("a", 1, 40, 7, 2), slice_of("b", 1, 40, 7, confirm)]).weights.confirm == 0


# ── saved ────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(run_dir: Path, server: int, count: int, value: float, env_steps: int) -> list[str]:
    """What a shard saves: all of its network, and which of it counts."""
    arrays: dict[str, Array] = {f"net.{name}": array for name, array in net(value).items()}
    names = parts(net(), count)[server]
    values = {"env_steps": env_steps, "updates": env_steps // 20, "shards": count, "parameters": names}
    made = checkpoint.Checkpoint(env_steps, arrays, values)
    checkpoint.save(folder(run_dir, f"param_server-{server}", count), made)
    return names


def test_of_each_shard_what_it_holds(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *WORKERS, "nodes.param_server.count=3")
    held = [save(tmp_path, server, 3, server, 100 - 20 * server) for server in range(3)]
    found = saved(plan, tmp_path)
    assert found.arrays.keys() == {f"net.{name}" for name in net()}
    for server, names in enumerate(held):
        assert all((found.arrays[f"net.{name}"] == server).all() for name in names)
    assert (found.values, found.step) == ({"env_steps": 60, "updates": 3}, 60)


def test_every_shard_must_have_saved(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *WORKERS, "nodes.param_server.count=2")
    save(tmp_path, 0, 2, 0.0, 20)
    with pytest.raises(RefusedFileError, match="checkpoints-param_server-1: no checkpoint yet"):
        saved(plan, tmp_path)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 3)])
def test_a_run_goes_on_with_as_many_servers(tmp_path: Path, before: int, now: int) -> None:
    save(tmp_path, 0, before, 0.0, 20)
    with pytest.raises(RefusedFileError, match=f"saved by {before} parameter servers, expected {now}"):
        newest(tmp_path, "param_server-0", now)
    found = newest(tmp_path, "param_server-0", before)
    assert found is not None
    assert found.step == 20
