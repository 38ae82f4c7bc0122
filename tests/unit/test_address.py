"""What one node tells another to call it by."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError
from torl_mega.launch.commands import command, environment
from torl_mega.launch.preflight import with_node_addresses
from torl_mega.planner.placement import place
from torl_mega.process.address import LOOPBACK, interface_of, is_loopback, own_address


@pytest.fixture(autouse=True)
def no_interface_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORL_IFNAME", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost", "LOCALHOST.", "::1", "[::1]", ""])
def test_loopback_is_known_in_every_spelling(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "n0", "gpu01.cluster", "2001:db8::1"])
def test_what_others_may_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_machine_on_its_own_stays_at_home() -> None:
    assert own_address([]) == LOOPBACK
    assert own_address(["127.0.0.1", "localhost"]) == LOOPBACK


def test_a_peer_that_cannot_be_found_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid cannot be reached"):
        own_address(["no-such-host.invalid"])


def test_the_chosen_interface_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORL_IFNAME", "lo")
    assert own_address(["10.0.0.1"]) == LOOPBACK
    assert interface_of(LOOPBACK) == "lo"
    assert interface_of("203.0.113.9") is None
    monkeypatch.setenv("TORL_IFNAME", "bond77")
    with pytest.raises(ConfigError, match=r"TORL_IFNAME = bond77 .* this node has .*lo"):
        own_address([])


def test_on_debian_a_nodes_own_name_is_a_trap_that_is_not_stepped_into() -> None:
    """In a network of its own: two interfaces, and routes that differ by peer."""
    script = """
ip link set lo up && ip link add torl0 type bridge && ip addr add 10.213.9.10/24 dev torl0 && ip link set torl0 up
ip link add torl1 type bridge && ip addr add 10.213.8.10/24 dev torl1 && ip link set torl1 up
exec "$0" -c 'from torl_mega.process.address import *
for peers in (["127.0.1.1", "10.213.9.11"], ["10.213.8.11"], ["10.213.9.10"]):
    found = own_address(peers)
    print(found, interface_of(found))'
"""
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, sys.executable], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "not permitted" in done.stderr or "ip: " in done.stderr:
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
    assert done.stdout.split("\n")[:3] == ["10.213.9.10 torl0", "10.213.8.10 torl1", "10.213.9.10 torl0"], done.stderr


def test_every_process_hears_addresses_not_names(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("conf/torl_7b.yaml")
    planned, problems = place(config, nodes=2, gpus=8, gpu="h100", hosts=("gpu01", "gpu02"))
    assert planned is not None, problems
    for host, ip in (("gpu01", "10.1.0.1"), ("gpu02", "10.1.0.2")):
        (tmp_path / f"{host}.json").write_text(f'{{"checks": [], "address": "{ip}", "interface": "bond0"}}')
    placement = with_node_addresses(planned, tmp_path)
    words = [*placement.addresses("server"), *placement.addresses("sandbox")]
    for mine in placement.processes:
        env = environment(mine, placement, config)
        words += [*command(mine.role, mine, placement, config, "c", tmp_path), *env.values()]
        assert env["GLOO_SOCKET_IFNAME"] == "bond0"
        assert "NCCL_SOCKET_IFNAME" not in env
    assert not any("gpu0" in word or "127.0" in word for word in words)
    assert environment(placement.of("rank")[9], placement, config)["MASTER_ADDR"] == "10.1.0.1"
    monkeypatch.setenv("TORL_IFNAME", "bond0")
    assert environment(placement.of("server")[0], placement, config)["NCCL_SOCKET_IFNAME"] == "bond0"
