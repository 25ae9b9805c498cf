"""The network interface over which the ranks of a training exchange gradients: the one that has the node's Ray address.

Gloo takes the interface of the address to which the machine's own host name resolves. On Debian this is 127.0.1.1, so
ranks on several machines do not find each other. NCCL takes the first interface that is no loopback, which may be a
bridge of containers. Ray's address is one by which the nodes of this cluster do reach each other.
"""

import os
from collections.abc import Mapping
from typing import Any

import ray.util
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class NodeAddressConfig(TorchConfig):
    """Ray Train's process group, on the interfaces that have the nodes' Ray addresses."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeAddressBackend


class _NodeAddressBackend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    import psutil  # part of Ray, found after Ray is imported

    addresses = {name: [each.address for each in of] for name, of in psutil.net_if_addrs().items()}
    os.environ.update(interface_variables(os.environ, addresses, ray.util.get_node_ip_address()))


def interface_variables(
    environ: Mapping[str, str], addresses: Mapping[str, list[str]], node_address: str
) -> dict[str, str]:
    """The variables that name the interface to Gloo and NCCL, except those that the user has set.

    There are none if no interface has the address, for example behind address translation.

    Args:
        addresses: the addresses of each interface.
    """
    name = next((name for name, of in addresses.items() if node_address in of), None)
    # Without "=" NCCL also takes all interfaces whose names begin like this.
    chosen = {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {variable: value for variable, value in chosen.items() if not environ.get(variable)}
