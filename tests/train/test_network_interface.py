"""The interface over which ranks exchange gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.train.network_interface import interface_variables
from tests import netcluster
from tests.processes import in_new_process
from tests.train.ranks import sum_over_machines

ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "ens5": ["fe80::1%ens5", "10.0.3.7", "02:42:ac:11:00:02"],
    "ens50": ["10.0.4.7"],
}


def test_ranks_use_the_interface_that_has_the_nodes_ray_address():
    chosen = {"GLOO_SOCKET_IFNAME": "ens5", "NCCL_SOCKET_IFNAME": "=ens5"}
    assert interface_variables({}, ADDRESSES, "10.0.3.7") == chosen
    assert interface_variables({}, ADDRESSES, "127.0.0.1")["GLOO_SOCKET_IFNAME"] == "lo"


def test_interfaces_that_the_user_has_set_are_kept():
    assert interface_variables({"GLOO_SOCKET_IFNAME": "ib0"}, ADDRESSES, "10.0.3.7") == {"NCCL_SOCKET_IFNAME": "=ens5"}
    assert interface_variables({"NCCL_SOCKET_IFNAME": "ib0"}, ADDRESSES, "10.0.3.7") == {"GLOO_SOCKET_IFNAME": "ens5"}


def test_an_address_that_no_interface_has_changes_nothing():
    assert interface_variables({}, ADDRESSES, "54.1.2.3") == {}


@pytest.mark.skipif(netcluster.unavailable() is not None, reason=str(netcluster.unavailable()))
def test_gloo_connects_machines_whose_host_names_resolve_to_loopback():
    with netcluster.network() as net:
        machines = [net.add(f"node{i}") for i in range(2)]

        url, chosen = (
            f"tcp://{machines[0].address}:29500",
            {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"},
        )
        for machine in machines:
            addresses = {"lo": ["127.0.0.1"], "eth0": [machine.address]}
            assert interface_variables({}, addresses, machine.address) == chosen
        with ThreadPoolExecutor() as pool:  # without the variables, the second rank waits five minutes
            ranks = [(machine.inside.pid, rank, len(machines), url) for rank, machine in enumerate(machines)]
            sums = list(pool.map(lambda rank: in_new_process(sum_over_machines, *rank, env=chosen), ranks))
        assert sums == [3.0, 3.0]
