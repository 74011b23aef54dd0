from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.models.layers import layers
from raytune_llm.models.policy import Policy
from raytune_llm.models.stored import bring
from raytune_llm.train.optimizers.groups import set_learning_rate
from raytune_llm.train.strategies.base import StepOut, Training, trained

LINEAR = nn.functional.linear
"""Torch's function. DeepSpeed replaces it in stage 3, and does not restore it."""


class DeepSpeedStrategy:
    """ZeRO stages 1 to 3 with a torch optimizer inside.

    DeepSpeed's own checkpoints are tied to the world size, so state is read and written parameter by parameter through its
    `safe_get_full_*` and `safe_set_full_*` functions, under the names that every strategy uses.

    DeepSpeed reads the norm of the gradient before each step and skips the step if it is not finite, so the host waits for the
    device once per step.
    """

    def __init__(self, model: Policy, build_optimizer: Any, training: Training, *, stage: int, offload: bool) -> None:
        assert not training.layerwise, "config/rules.py refuses it"
        try:
            import deepspeed
        except ImportError:
            raise ResourceError("strategy=zero needs DeepSpeed", "Install it: pip install 'raytune-llm[deepspeed]'.") from None
        device, compute = training.device, training.compute
        if device.type == "cpu":
            # DeepSpeed would compile an op for all-reduce through shared memory at this point; gloo suffices.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
        if device.type == "cpu" and offload:
            raise ConfigError("strategy.offload", "must be false without a GPU, where everything is in host memory", got=True)
        self.module, self.device, self.stage = model, device, stage
        self.sharded = stage == 3
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": device.type == "cuda", "contiguous_gradients": True}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # ours is the loader's; DeepSpeed only divides by this value
            "gradient_accumulation_steps": 1,
            "gradient_clipping": training.max_grad_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": compute == torch.bfloat16},
            "fp16": {"enabled": compute == torch.float16},
            "steps_per_print": 10**9,
        }
        optimizer = build_optimizer(model.model, fused=False)  # by shapes, which partitioned weights do not have
        read: dict[Any, Any] = {}
        for unit in (*layers(model), model) if stage == 3 else (model,):
            read |= bring(unit, device)
            if stage == 3:
                # One unit at a time, so that no worker holds more than its shards and one unit.
                for parameter in unit.parameters():
                    parameter.data = parameter.data.to(compute)  # its one type; buffers keep theirs
                deepspeed.zero.Init(module=unit, config_dict_or_path=settings)
        for group in optimizer.param_groups:
            group["params"] = [read.get(parameter, parameter) for parameter in group["params"]]
        # DeepSpeed casts the module to one type; frozen weights of other types must keep theirs.
        engine, ds_optimizer, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)
        if stage == 3:
            _fetch_for_readers(model)
        self.engine: Any = engine
        self.zero: Any = ds_optimizer
        self.model = self.engine
        self.world = dist.get_world_size()
        self._before_pass: list[Callable[[], None]] = []

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        for call in self._before_pass:
            call()
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def parts(self) -> AbstractContextManager[None]:
        return nullcontext()  # stage 3 gathers each part as it is called

    def backward(self, loss: Tensor, lr: float) -> None:
        self.engine.backward(loss * self.world, scale_wrt_gas=False)  # ZeRO averages; shares are to be added

    def step(self, lr: float) -> StepOut:
        set_learning_rate(self.zero.param_groups, lr)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        norm = torch.as_tensor(float("inf") if norm is None else norm, dtype=torch.float32, device=self.device)
        return StepOut(grad_norm=norm, skipped=torch.tensor(bool(self.zero.overflow), device=self.device))

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        keys = self._state_keys()
        self._link_optimizer_state()
        for name, parameter in trained(self.module):
            state[f"parameters.{name}"] = _whole(safe_get_full_fp32_param(parameter), parameter)
            for key, value in keys.items():
                whole = value.clone() if value.ndim == 0 else _whole(safe_get_full_optimizer_state(parameter, key), parameter)
                state[f"optimizer.{name}.{key}"] = whole
        return state

    def before_change(self, call: Callable[[], None]) -> None:
        self._before_pass.append(call)  # a state is a copy of all of the optimizer's, and the pass needs that memory

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()  # an optimizer that averages is refused here

    def reference(self) -> AbstractContextManager[None]:
        return self.module.reference()

    def load(self, kept: Mapping[str, Tensor], read: Any) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        state = {full: torch.zeros(value.shape, device=self.device) for full, value in kept.items()}
        read(state)
        names = dict(trained(self.module))
        first = next(iter(names))
        keys = [full.removeprefix(f"optimizer.{first}.") for full in kept if full.startswith(f"optimizer.{first}.")]
        for flat in self._flat_parameters():
            self._inner.state[flat] = {
                key: value.cpu().clone() if (value := state[f"optimizer.{first}.{key}"]).ndim == 0 else torch.zeros_like(flat)
                for key in keys
            }
        self._link_optimizer_state()
        for name, parameter in names.items():
            value = state[f"parameters.{name}"]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                if self.stage < 3 or dist.get_rank() == 0:
                    parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
            for key in keys:
                if state[f"optimizer.{name}.{key}"].ndim:
                    safe_set_full_optimizer_state(parameter, state[f"optimizer.{name}.{key}"], key)

    def full_parameters(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in trained(self.module, frozen=frozen):
            if parameter.requires_grad:
                yield name, _whole(safe_get_full_fp32_param(parameter), parameter).cpu()
            else:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    whole = parameter.detach().cpu().clone()
                yield name, whole

    def close(self) -> None:
        """DeepSpeed never releases an engine's modules in this process, so their weights are released here."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self.engine.destroy()
        nn.functional.linear = LINEAR
        FWD_MODULE_STACK.clear()
        if self.stage == 3:
            for parameter in self.module.parameters():
                parameter.data, parameter.ds_tensor = parameter.data.new_empty(0), None  # type: ignore[attr-defined]

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    def _flat_parameters(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _link_optimizer_state(self) -> None:
        """Update the links through which stages 1 and 2 find a parameter's state. DeepSpeed makes them once, after the first
        parameter group has stepped, when the other groups have no state yet."""
        if self.stage < 3 and self._state_keys():
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _state_keys(self) -> dict[str, Tensor]:
        """The inner optimizer's state of the first flat parameter; empty before its first step."""
        return dict(self._inner.state.get(self._flat_parameters()[0], {}))


def _fetch_for_readers(model: Policy) -> None:
    """Register weights that a module reads without calling their layers, so that DeepSpeed gathers them before the module runs.
    DeepSpeed also finds such weights when they are read, but not while it prefetches them, as it does after a pass that called
    the layers (the reference, without the adapter).
    """
    import deepspeed

    for module in model.modules():
        if getattr(module, "reads_weights", False):
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)


def _whole(value: Tensor | None, parameter: Any) -> Tensor:
    assert value is not None
    return value.view(getattr(parameter, "ds_shape", parameter.shape)).clone()
