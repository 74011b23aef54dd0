from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError


@section
class LoopConfig:
    """The `train` group. Batch sizes count packs, or samples without packing."""

    epochs: PositiveFloat
    """1.5 ends after half of the steps of the second."""
    max_steps: PositiveInt | None
    pause_at: Annotated[float, Field(gt=0, lt=1)] | None
    """After this part of the steps the run ends with an evaluation and a checkpoint, and resumes from there without this."""
    micro_batch_size: PositiveInt
    """What one worker computes at once."""
    global_batch_size: PositiveInt
    """What one optimizer step sees over all workers; accumulation follows."""
    seed: Seed
    """The seed of the order of rows, of the held-out split, and of all else that is random."""
    adapter_seed: Seed | None
    """The seed of a new adapter's first weights and of what steps draw (dropout, noise), where they are to differ from other runs
    over the same packs. null: `seed`."""
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    """auto: bf16 where the hardware multiplies it, else fp32."""
    compile: bool | Literal["auto"]
    """torch.compile of each layer. auto: on a GPU that can."""
    cuda_graphs: bool
    """Capture the layers' passes as CUDA graphs: for a few hundred tokens a micro-batch, where a GPU waits for the host. One GPU,
    packed rows."""
    activation_checkpointing: Literal["auto", "none", "selective", "full", "offload"]
    """What layers compute again in the backward pass. auto: the first of the others that fits, by plan's estimate."""
    max_grad_norm: PositiveFloat | None
    max_nonfinite_steps: NonNegativeInt
    """Steps with a non-finite gradient are skipped; more than this many stop the run."""
    stall_timeout_s: PositiveFloat
    """A worker that makes no step for so long is named, with where it is (resources=local and cluster)."""
    profile: bool
    """Write a trace of a few steps and a table of where their time goes."""
    log_every_steps: PositiveInt
    eval_every_steps: PositiveInt | None
    """none: at each epoch's end, where there is an eval split."""
    eval_at: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] | None
    """Evaluate after these parts of the steps and at the end, and nowhere else, whatever `eval_every_steps` says."""
    eval_on_start: bool
    """Also before the first step, where there is an eval split: what training starts from."""
    early_stopping: PositiveInt | None
    """Stop after so many evaluations without a better `early_stopping_metric`."""
    early_stopping_metric: str
    """A figure of evaluations, such as eval_loss or eval_gsm8k_acc."""
    early_stopping_mode: Literal["min", "max"]
    """Whether lower or higher is better."""
    eval_tasks: list[str]
    """Tasks of lm-evaluation-harness that the policy answers at each evaluation: names, YAML files, folders with YAML files
    (written with a slash). Their scores are figures of the evaluation, eval_<task>_<metric>."""
    eval_task_questions: PositiveInt | None
    """The most questions of one of these tasks; null: all."""
    exact_match_rows: NonNegativeInt
    """So many held-out rows are answered before and after training and compared with their reference."""
    sample_rows: NonNegativeInt
    """At each evaluation the policy answers the first so many held-out rows of each source, greedily, for samples.jsonl."""
    max_new_tokens: PositiveInt
    """Length of those answers."""

    def micro_batches(self, workers: int) -> int:
        """The number of micro-batches of each worker in an optimizer step. Raises ConfigError if the workers can't share a step
        evenly."""
        together = self.micro_batch_size * workers
        if self.global_batch_size % together:
            raise ConfigError(
                "train.global_batch_size",
                f"must be a multiple of train.micro_batch_size x workers = {self.micro_batch_size} x {workers}",
                got=self.global_batch_size,
                fix=f"Set it to {-(-self.global_batch_size // together) * together}, or change one of the others.",
            )
        return self.global_batch_size // together
