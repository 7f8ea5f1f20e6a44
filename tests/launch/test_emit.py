"""What engines are given: word for word, and as the engines' own tools and schemas read it.

To take the present texts for right: DDRL_ACCEPT=1 pytest tests/launch/test_emit.py; then read the diff.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from runs import eventually

from ddrl_bus import keys
from ddrl_bus.errors import SecurityError, UsageError
from ddrl_bus.launch.catalog import catalog
from ddrl_bus.launch.emit import ENGINES, Options
from ddrl_bus.launch.start import plan_of
from ddrl_bus.topology import Plan, load_text

ACCEPTED = Path(__file__).parent / "emitted"
HOSTS = ["hosts.gpu0=10.0.0.1", "hosts.cpu1=10.0.0.2"]
OPTIONS = Options("/opt/ddrl/bin/ddrl-node", "registry/ddrl:1")
CI = os.environ.get("CI") == "true"


def two_hosts(*more: str) -> Plan:
    return plan_of("two-hosts", [*HOSTS, *more], probe=False)


def lock_in(text: str) -> str:
    """The topology that a file holds, whatever it is indented by."""
    found = re.search(r"^( *)name: [a-z-]+\n *run_id:.*?^ *keep: \d+\n", text, re.MULTILINE | re.DOTALL)
    assert found is not None, text
    return found[0]


def only(files: dict[str, str]) -> str:
    (text,) = files.values()
    return text


def needs(tool: str) -> Any:
    """Skips where the tool is missing, but not in CI, which installs it."""
    return pytest.mark.skipif(not shutil.which(tool) and not CI, reason=f"needs {tool}")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plan:
    """The two hosts by keys."""
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "keys"))
    for host in ("gpu0", "cpu1"):
        keys.new(host)
    return two_hosts("insecure=false")


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stops", [True, False])
def test_word_for_word(engine: str, stops: bool) -> None:
    """The topology, which is as `ddrl show` has it, stands in these files as one word."""
    plan = two_hosts(*([] if stops else ["stop.reward=null", "stop.steps=null"]))
    for name, text in ENGINES[engine](plan, OPTIONS).items():
        folder = ACCEPTED / ("stops" if stops else "goes-on")
        text = text.replace(lock_in(text), "THE TOPOLOGY\n") if "run_id:" in text else text
        if os.environ.get("DDRL_ACCEPT"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        assert text == (folder / name).read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_the_same_each_time(engine: str) -> None:
    assert ENGINES[engine](two_hosts(), OPTIONS) == ENGINES[engine](two_hosts(), OPTIONS)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_topology_in_it_is_whole_and_others_join_it(engine: str) -> None:
    files = ENGINES[engine](two_hosts("env.id='a$${b}$c'"), OPTIONS)
    text = next(text for text in files.values() if "run_id:" in text)
    indented = lock_in(text)
    lock = re.sub(rf"^{' ' * (len(indented) - len(indented.lstrip()))}", "", indented, flags=re.MULTILINE)
    plan = load_text(lock.replace("$$", "$") if engine == "compose" else lock, "emitted", catalog=catalog())
    assert plan.env.id == "a${b}$c"
    assert plan.groups == two_hosts().groups
    joins = re.findall(r"--join\W+tcp://(\S+?)[\s\"']", "".join(files.values()))
    there = plan.join_address if engine != "slurm" else "tcp://${nodes[head]}:7077"
    assert [f"tcp://{address}" for address in joins] == [there]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_host_needs_nobody_to_join(engine: str) -> None:
    files = ENGINES[engine](plan_of("quickstart", probe=False), OPTIONS)
    assert engine == "slurm" or "--join" not in "".join(files.values())


@pytest.mark.parametrize("engine", ["slurm", "k8s", "compose"])
def test_what_stays_inside_one_machine_in_the_file_but_not_there_is_refused(engine: str) -> None:
    hosts = "hosts={a: 127.0.0.1:7077, b: 127.0.0.1:7177}"
    plan = plan_of("quickstart", [hosts, "nodes.actor.host=b"], probe=False)
    with pytest.raises(SecurityError, match="quickstart with the addresses that the engine gives its hosts"):
        ENGINES[engine](plan, OPTIONS)


@pytest.mark.parametrize("engine", ["k8s", "compose"])
def test_hosts_whose_names_would_be_one_are_refused(engine: str) -> None:
    hosts = "hosts={a.b: 10.0.0.1, a_b: 10.0.0.2}"
    plan = plan_of("quickstart", [hosts, "nodes.actor.host=a_b", "insecure=true"], probe=False)
    with pytest.raises(UsageError, match=r"hosts a\.b, a_b would not be told apart: quickstart-a-b, quickstart-a-b"):
        ENGINES[engine](plan, OPTIONS)


# ── as the engines read it ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("engine", "shell"), [("slurm", "bash"), ("tmux", "sh")])
def test_scripts_parse(engine: str, shell: str) -> None:
    text = only(ENGINES[engine](two_hosts(), OPTIONS))
    subprocess.run([shell, "-n"], input=text, text=True, check=True, timeout=30)
    if engine == "slurm":  # what srun starts is a script within the script
        task = text.partition("<<'TASK'\n")[2].partition("\nTASK\n")[0]
        assert task.startswith("set -euo pipefail")
        subprocess.run(["bash", "-n"], input=task, text=True, check=True, timeout=30)


@needs("shellcheck")
@pytest.mark.parametrize("engine", ["slurm", "tmux"])
def test_shellcheck_finds_nothing(engine: str) -> None:
    text = only(ENGINES[engine](two_hosts(), OPTIONS))
    scripts = [text, "#!/bin/bash\n" + text.partition("<<'TASK'\n")[2].partition("\nTASK\n")[0]]
    for script in scripts if engine == "slurm" else scripts[:1]:
        found = subprocess.run(
            ["shellcheck", "-"], input=script, text=True, capture_output=True, check=False, timeout=60
        )
        assert (found.returncode, found.stdout) == (0, "")


@needs("systemd-analyze")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    files = ENGINES["systemd"](two_hosts(), Options(shutil.which("true") or ""))
    units = [name for name in files if name.endswith(".service")]
    assert units == ["ddrl-two-hosts-gpu0.service", "ddrl-two-hosts-cpu1.service"]
    for name in units:
        (tmp_path / name).write_text(files[name])
    verify = ["systemd-analyze", "verify", *(str(tmp_path / name) for name in units)]
    found = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=60)
    ours = [line for line in found.stderr.splitlines() if str(tmp_path) in line or "ddrl" in line]
    assert (found.returncode, ours) == (0, [])


def documents(text: str) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all(text))


@pytest.mark.parametrize("stops", [True, False])
def test_kubernetes_schemas_take_the_manifests(stops: bool) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    plan = two_hosts(*([] if stops else ["stop.reward=null", "stop.steps=null"]))
    found = documents(only(ENGINES["k8s"](plan, OPTIONS)))
    workload = "Job" if stops else "StatefulSet"
    assert [document["kind"] for document in found] == ["Service", "ConfigMap", workload, workload]
    for document in found:
        assert validate.validate(document, "1.27", strict=True)
    found[2]["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(found[2], "1.27", strict=True)


def test_pods_have_the_names_that_are_dialled() -> None:
    job = documents(only(ENGINES["k8s"](two_hosts(), OPTIONS)))[2]
    pod = job["spec"]["template"]["spec"]
    topology = documents(lock_in(only(ENGINES["k8s"](two_hosts(), OPTIONS))))[0]
    assert f"{pod['hostname']}.{pod['subdomain']}" == topology["hosts"]["gpu0"]
    forever = two_hosts("stop.reward=null", "stop.steps=null")
    stateful = documents(only(ENGINES["k8s"](forever, OPTIONS)))[2]
    name = f"{stateful['metadata']['name']}-0.{stateful['spec']['serviceName']}"
    assert name == topology["hosts"]["gpu0"]


def test_the_compose_specification_takes_the_file() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = only(ENGINES["compose"](two_hosts(), OPTIONS))
    compose_spec.PyCompose.from_yaml(text).validate()
    with pytest.raises(ValueError, match="innit"):
        compose_spec.PyCompose.from_yaml(text.replace("init:", "innit:"))


@needs("tmux")
def test_tmux_has_a_window_per_host_with_its_line(tmp_path: Path) -> None:
    """Of hosts that are all this machine; what is typed there is a program that writes down how it was called."""
    (tmp_path / "node").write_text('#!/bin/sh\necho "$@" >>"$(dirname "$0")/said"\nexec sleep 60\n')
    (tmp_path / "node").chmod(0o755)
    hosts = "hosts={a: 127.0.0.1:7077, b: 127.0.0.1:7177}"
    plan = plan_of("quickstart", [hosts, "nodes.actor.host=b", "name=w"], probe=False)
    environ = {**os.environ, "TMUX_TMPDIR": str(tmp_path)}
    environ.pop("TMUX", None)

    def tmux(*words: str) -> str:
        return subprocess.run(["tmux", *words], env=environ, capture_output=True, text=True, check=True).stdout

    script = only(ENGINES["tmux"](plan, Options(shlex.quote(str(tmp_path / "node")))))
    subprocess.run(["sh"], input=script, text=True, env=environ, check=True, timeout=30)
    try:
        said = tmp_path / "said"
        eventually(lambda: said.exists() and len(said.read_text().splitlines()) == 2, "two lines")
        assert tmux("list-windows", "-t", "w", "-F", "#{window_name}").split() == ["a", "b"]
        head, other = sorted(said.read_text().splitlines(), key=lambda line: line.startswith("--join"))
        assert other == "--join tcp://127.0.0.1:7077 --host b"
        topology = Path(head.split()[1])
        assert head == f"-t {topology} --host a"
        assert topology.read_text() == plan.lock()
    finally:
        tmux("kill-server")


# ── by keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", ENGINES)
def test_with_keys_who_joins_names_the_head_and_no_secret_is_written(engine: str, guarded: Plan) -> None:
    text = "".join(ENGINES[engine](guarded, OPTIONS).values())
    assert re.findall(r"--join\W+tcp://(\w+)@", text) == ["gpu0"]
    assert not any(keys.own(host).secret in text or keys.own(host).public in text for host in ("gpu0", "cpu1"))


def test_each_pod_has_the_secret_of_its_host(guarded: Plan) -> None:
    text = only(ENGINES["k8s"](guarded, OPTIONS))
    for host, document in zip(("gpu0", "cpu1"), documents(text)[2:], strict=True):
        files = f"--from-file=$DDRL_KEYS/allowed --from-file=$DDRL_KEYS/{host}.key"
        assert f"kubectl create secret generic two-hosts-{host}-keys {files}\n" in text
        pod = document["spec"]["template"]["spec"]
        secret = {"secretName": f"two-hosts-{host}-keys", "defaultMode": 0o400}
        assert {"name": "keys", "secret": secret} in pod["volumes"]
        (container,) = pod["containers"]
        assert {"name": "keys", "mountPath": "/etc/ddrl-keys", "readOnly": True} in container["volumeMounts"]
        assert container["env"] == [{"name": keys.ENVIRONMENT, "value": "/etc/ddrl-keys"}]
    validate = pytest.importorskip("kubernetes_validate")
    assert all(validate.validate(document, "1.27", strict=True) for document in documents(text))


def test_each_service_has_the_folder_of_its_host(guarded: Plan) -> None:
    text = only(ENGINES["compose"](guarded, OPTIONS))
    (document,) = documents(text)
    for host in ("gpu0", "cpu1"):
        service = document["services"][f"two-hosts-{host}"]
        assert service["volumes"] == [f"two-hosts-{host}:/run-dir", f"./keys/{host}:/etc/ddrl-keys:ro"]
        assert service["environment"] == {keys.ENVIRONMENT: "/etc/ddrl-keys"}
    compose_spec = pytest.importorskip("compose_spec")
    compose_spec.PyCompose.from_yaml(text).validate()


def test_units_scripts_and_windows_name_the_folder(guarded: Plan) -> None:
    units = ENGINES["systemd"](guarded, OPTIONS)
    for host in ("gpu0", "cpu1"):
        unit = units[f"ddrl-two-hosts-{host}.service"]
        assert "\nUser=ddrl\nEnvironment=DDRL_KEYS=/etc/ddrl/keys\n" in unit
        assert "DynamicUser" not in unit
    for engine in ("slurm", "tmux"):
        text = only(ENGINES[engine](guarded, OPTIONS))
        assert "~/.config/ddrl/keys" in text
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_prints_or_writes(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ddrl_bus.cli import ddrl

    words = ["emit", "systemd", "two-hosts", *HOSTS, "--node-command", OPTIONS.command]
    printed = CliRunner().invoke(ddrl, words).stdout
    folder = tmp_path / "new" / "units"
    written = CliRunner().invoke(ddrl, [*words, "-o", str(folder)]).stdout.split()
    files = ENGINES["systemd"](two_hosts(), OPTIONS)
    assert printed == "".join(f"# ── {name}\n{text}" for name, text in files.items())
    assert written == [str(folder / name) for name in files]
    assert {path.name: path.read_text() for path in folder.iterdir()} == files
    script = CliRunner().invoke(ddrl, ["emit", "slurm", "two-hosts", *HOSTS]).stdout
    assert script == only(ENGINES["slurm"](two_hosts(), Options()))
    wrong = CliRunner().invoke(ddrl, ["emit", "nomad", "two-hosts"])
    assert wrong.exit_code == 64
    assert json.dumps("nomad").strip('"') in wrong.stderr
