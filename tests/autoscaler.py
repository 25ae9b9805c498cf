"""Ray's autoscaler without a cloud: the nodes that it would start."""

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil


def nodes_for(demand: dict[str, float], count: int, scaling: AutoscalingConfig) -> dict[str, int]:
    """The nodes that Ray's autoscaler starts for `count` such tasks on an empty cluster. Empty if they do not fit."""
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=scaling.get_node_type_configs(),
        max_num_nodes=scaling.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)] * count),
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}
