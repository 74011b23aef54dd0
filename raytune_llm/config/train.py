from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError


@section
class LoopConfig:
    """Settings of the training loop. Batch sizes count samples: packs, or rows (pairs, labelled answers) without packing."""

    epochs: PositiveFloat
    """1.5 stops halfway through the second epoch."""
    max_steps: PositiveInt | None
    pause_at: Annotated[float, Field(gt=0, lt=1)] | None
    """Stop after this fraction of the steps, with an evaluation and a checkpoint. The command without this setting resumes
    there."""
    micro_batch_size: PositiveInt
    """Samples that one worker computes in one forward pass."""
    global_batch_size: PositiveInt
    """Samples of one optimizer step over all workers. Gradient accumulation follows from it."""
    seed: Seed
    """The seed of the order of rows, of the held-out split, and of everything else that is random."""
    adapter_seed: Seed | None
    """The seed of a new adapter's initial weights and of random numbers within steps (dropout, noise). With it, two runs can
    differ in these while they see the same packs. null: `seed`."""
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    """auto: bf16 if the hardware multiplies it, else fp32."""
    compile: bool | Literal["auto"]
    """Compile each layer with torch.compile. auto: on a GPU that supports it."""
    cuda_graphs: bool
    """Capture the layers' forward and backward passes as CUDA graphs. It helps with a few hundred tokens per micro-batch, where a
    GPU waits for the host. It needs one GPU and packed rows."""
    activation_checkpointing: Literal["auto", "none", "selective", "full", "offload"]
    """What the backward pass computes again instead of keeping it. auto: the first of the other options, in this order, that
    fits in memory by plan's estimate."""
    max_grad_norm: PositiveFloat | None
    max_nonfinite_steps: NonNegativeInt
    """Steps with a non-finite gradient are skipped; more than this many stop the run."""
    stall_timeout_s: PositiveFloat
    """A worker that makes no progress for this long is reported, with its stack (resources=local and cluster)."""
    profile: bool
    """Write a trace of a few steps, and a table of where their time goes."""
    log_every_steps: PositiveInt
    eval_every_steps: PositiveInt | None
    """null: evaluate at the end of each epoch, if there is an eval split."""
    eval_at: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] | None
    """Evaluate after these fractions of the steps and at the end, instead of every `eval_every_steps`."""
    eval_on_start: bool
    """Also evaluate before the first step, if there is an eval split."""
    early_stopping: PositiveInt | None
    """Stop after this many evaluations without a better `early_stopping_metric`."""
    early_stopping_metric: str
    """A metric of evaluations, such as eval_loss or eval_gsm8k_acc."""
    early_stopping_mode: Literal["min", "max"]
    """Whether lower or higher is better."""
    eval_tasks: list[str]
    """Tasks of lm-evaluation-harness to run at each evaluation: names, YAML files, or folders with YAML files (written with a
    slash). Their scores are metrics of the evaluation, called eval_<task>_<metric>."""
    eval_task_questions: PositiveInt | None
    """Maximum questions of each of these tasks; null: all."""
    exact_match_rows: NonNegativeInt
    """Answer this many held-out rows before and after training, and count how many answers equal the reference."""
    sample_rows: NonNegativeInt
    """At each evaluation, answer this many held-out rows of each source greedily, and write the answers to samples.jsonl."""
    max_new_tokens: PositiveInt
    """Maximum length of the answers for `exact_match_rows` and `sample_rows`, in tokens."""

    def micro_batches(self, workers: int) -> int:
        """The number of micro-batches of each worker in an optimizer step. Raises ConfigError if the global batch can't be
        divided evenly among the workers."""
        together = self.micro_batch_size * workers
        if self.global_batch_size % together:
            raise ConfigError(
                "train.global_batch_size",
                f"must be a multiple of train.micro_batch_size x workers = {self.micro_batch_size} x {workers}",
                got=self.global_batch_size,
                fix=f"Set it to {-(-self.global_batch_size // together) * together}, or change one of the others.",
            )
        return self.global_batch_size // together
