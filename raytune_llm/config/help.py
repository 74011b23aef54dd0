"""The text of --help: of the program, or of one verb."""

from __future__ import annotations

from collections.abc import Mapping

from raytune_llm.config.load import defaults
from raytune_llm.config.options import groups, listed, of_verbs, options

POSITIONAL = {"import": "FILE.yaml", "jobs": "[status|logs|stop|fetch NAME]", "compare": "FOLDER ..."}
"""Verb -> its words without a key."""
FLAGS = {
    "--cfg job": "print the composed config and stop",
    "--config-dir DIR": "a folder of your own groups and experiments, beside ours",
    "--config-name N": "another primary config; `--config-dir outputs/x --config-name run` runs x again",
    "-m": "one run for each combination of comma-separated values",
    "--hydra-help": "Hydra's own flags, such as --info and --shell-completion",
}
FLAGS_OF_VERBS = {"tune": {"--dry-run": "show the trials and what they need, and run nothing"}}
RUN_EXPERIMENTS = ("train", "plan", "tune", "submit")
"""Verbs that can run the experiments of train."""
EXAMPLES = {
    "train": (
        "+experiment=sft_smollm2",
        "model=hub model.path=my/model data=alpaca data.path=rows.jsonl optimizer.lr=1e-4",
        "--config-dir outputs/mine --config-name run",
    ),
    "prepare": ("prepare model=smollm2_135m data=commands",),
    "plan": ("plan +experiment=sft_llama3 resources.num_workers=8",),
    "tune": (
        "tune +experiment=tune_smollm2",
        "tune +experiment=sft_smollm2 tune=asha 'optimizer.lr=tag(log,interval(1e-4,1e-2))' adapter.rank=8,16",
        "tune resume outputs/sweep keep=3",
    ),
    "chain": ("chain +experiment=sft_then_dpo_then_export_smollm2",),
    "submit": (
        "submit +experiment=sft_llama3 output_dir=/shared/sft submit.address=http://head:8265",
        "submit tune +experiment=tune_smollm2 output_dir=/shared/sweep submit.address=http://head:8265",
    ),
    "jobs": ("jobs submit.address=http://head:8265", "jobs logs NAME submit.address=http://head:8265"),
    "serve": (
        "serve model=smollm2_135m 'serve.adapters={commands: outputs/sft_smollm2/final}' serve.watch=outputs",
        "serve model=smollm2_135m resources=cluster serve.replicas=[1,8]",
    ),
    "chat": (
        "chat model=smollm2_135m chat.adapter=outputs/sft_smollm2/final",
        "chat chat.url=http://127.0.0.1:8000 chat.adapter=commands",
    ),
    "predict": ("predict predict.run=outputs/sft_smollm2 data=commands output_dir=outputs/commands",),
    "evaluate": ("evaluate evaluate.models=[outputs/a,outputs/b] evaluate.tasks=[mmlu_test] output_dir=outputs/mmlu",),
    "compare": ("compare outputs/*",),
    "export": (
        "export export.run=outputs/sft_smollm2 export.output_dir=exported/commands",
        "export model=smollm2_135m export.format=gguf export.dtype=q8_0 export.output_dir=exported/smollm2_gguf",
    ),
    "import": ("import examples/train_lora/llama3_lora_sft.yaml name=sft world_size=8",),
    "doctor": ("doctor",),
}


def usage(verb: str | None, verbs: Mapping[str, str]) -> str:
    """verbs: what each does. None: the help of the program, with the settings of train."""
    settings = defaults(verb or "train")
    shown = [group for group in groups() if group != "experiment"]
    if verb is None:
        head = ["Fine-tune, align, sweep and serve language models on Ray, from one composed config.", ""]
        head += ["  python -m raytune_llm [verb] [group=option ...] [setting=value ...]", "", "Verbs (VERB --help shows more)"]
        head += [f"  {name:<10}{text}" for name, text in verbs.items()]
        examples = [line for name in ("train", "plan", "tune", "serve") for line in EXAMPLES[name][:2]]
    else:
        shown = [group for group in shown if any(line.startswith(f"{group}.") for line in settings)]
        words = [POSITIONAL.get(verb), "[group=option ...]" if shown else None, "[setting=value ...]" if settings else None]
        head = [f"{verb}: {verbs[verb]}", "", "  " + " ".join(["python -m raytune_llm", verb, *filter(None, words)])]
        examples = EXAMPLES[verb]
    lines = [*head, "", "Examples", *(f"  python -m raytune_llm {example}" for example in examples)]
    if shown:
        lines += ["", "Groups (group=option)", *(f"  {group:<14}{listed(options(group))}" for group in shown)]
    if runs := _experiments(verb):
        lines += ["", "Experiments (+experiment=name)", *(f"  {line}" for line in runs)]
    if settings:
        lines += ["", f"Settings of {verb or 'train'} (setting=value) and their defaults", *(f"  {line}" for line in settings)]
        flags = FLAGS_OF_VERBS.get(verb or "", {}) | FLAGS
        lines += ["", "Flags", *(f"  {flag:<19}{text}" for flag, text in flags.items())]
    return "\n".join(lines)


def _experiments(verb: str | None) -> list[str]:
    """The lines about experiments that the verb can run."""
    special = of_verbs()
    lines = []
    if verb in RUN_EXPERIMENTS or verb is None:
        lines.append(" ".join(name for name in options("experiment") if name not in special))
    lines += [f"of {other}: {name}" if verb is None else name for name, other in special.items() if verb in (None, other)]
    return lines
