"""The function that each worker of a group runs. [ray]

Ray's controller imports this file too, to pass the function on. torch and the models are imported only inside the function, so
the controller starts seconds earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raytune_llm.errors import UserError

if TYPE_CHECKING:
    from raytune_llm.runs.inbox import Message


def worker_main(settings: Mapping[str, Any]) -> None:
    """Train on this worker. settings: `run`, the folders of its `stores`, the `inbox`, the `threads` that torch may use without a
    GPU, and whether the group `yields`: saves and ends when the driver asks it to."""
    import ray
    import ray.train.torch
    import torch
    import torch.distributed as dist

    from raytune_llm.runs.faults import Heartbeat
    from raytune_llm.runs.ray_metrics import RayMetrics
    from raytune_llm.runs.worker import work

    inbox = settings["inbox"]
    if ray.get(inbox.error.remote()) is not None:
        return  # not raised: Ray would restart the group, and an error that the user has to fix would only occur again
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(settings["threads"])

    def send(message: Message) -> None:
        inbox.put.remote(message)

    run, rank = settings["run"], dist.get_rank()
    inbox.join.remote(rank, ray.util.get_node_ip_address())
    heartbeat = Heartbeat(rank, run.train.stall_timeout_s, inbox.beat.remote, send)
    metrics = RayMetrics(run.name)
    if rank == 0:
        metrics.measured("workers", dist.get_world_size())

    def yields() -> bool:
        if not settings["yields"]:
            return False
        asked = torch.tensor(rank == 0 and ray.get(inbox.asked_to_yield.remote()), dtype=torch.int32, device=device)
        dist.broadcast(asked, src=0)
        return bool(asked.item())

    try:
        outcome = work(
            run,
            *settings["stores"],
            device=device,
            sinks=[send, metrics.record],
            on_update=send,
            on_samples=send,
            on_step=heartbeat.stepped,
            on_measured=metrics.measured,
            yields=yields,
        )
    except UserError as error:
        ray.get(inbox.fail.remote(error))
        raise
    finally:
        heartbeat.close()
        metrics.close()
    ray.get(inbox.leave.remote(rank))
    if rank == 0:
        ray.get(inbox.finish.remote(outcome))
