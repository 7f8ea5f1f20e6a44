from pathlib import Path

import pytest

from ddrl_bus.errors import EnvError, UsageError
from ddrl_bus.launch.catalog import catalog, find_topology, packaged
from ddrl_bus.topology import EnvSettings


def test_packaged_topologies_are_found_by_name() -> None:
    assert {"quickstart", "impala", "two-hosts"} <= packaged().keys()
    assert find_topology("quickstart") == packaged()["quickstart"]


def test_a_file_goes_before_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("name: mine")

    assert find_topology("quickstart") == Path("quickstart")


def test_a_missing_path_is_left_to_the_loader() -> None:
    assert find_topology("no/such.yaml") == Path("no/such.yaml")


def test_a_near_name_is_proposed() -> None:
    with pytest.raises(UsageError, match=r"'quickstat'; have .*; did you mean 'quickstart'"):
        find_topology("quickstat")


@pytest.mark.parametrize("name", catalog().algorithms)
def test_a_rule_is_wired_to_a_replay_if_it_replays(name: str) -> None:
    entry = catalog().algorithms[name]
    assert (entry.windows(entry.config()) is not None) == ("samples" in entry.wiring)


def test_catalog_has_every_algorithm_and_probes_when_asked() -> None:
    assert "trajectories" in catalog().algorithms["impala"].wiring
    assert catalog().probe_env is None
    probe = catalog(probe=True).probe_env
    assert probe is not None
    probe(EnvSettings(id="CartPole-v1"))
    with pytest.raises(EnvError, match="CartPole-v1"):
        probe(EnvSettings(id="CartPoel-v1"))
