"""Ray's autoscaler without a cloud: the nodes that it would start."""

from collections.abc import Mapping

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

NOT_IN = LabelSelectorOperator.LABEL_OPERATOR_NOT_IN


def nodes_for(
    demand: dict[str, float], count: int, scaling: AutoscalingConfig, selector: Mapping[str, str] | None = None
) -> dict[str, int]:
    """The nodes that Ray's autoscaler starts for `count` such tasks on an empty cluster. Empty if they do not fit.

    `selector` is a label selector whose values are of the form `!value`.
    """
    labels = [[(key, NOT_IN, [value.removeprefix("!")]) for key, value in selector.items()]] if selector else None
    task = ResourceRequestUtil.make(demand, label_selectors=labels)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=scaling.get_node_type_configs(),
        max_num_nodes=scaling.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([task] * count),
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}
