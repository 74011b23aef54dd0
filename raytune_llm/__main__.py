"""`python -m raytune_llm [verb] [overrides]`: find the verb, compose its config, run it. Without a verb it trains.

Imports nothing heavy: help and mistakes in settings answer before torch or ray is loaded.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from importlib import import_module
from keyword import iskeyword
from typing import Any

VERBS = {
    "train": "prepare what is missing, train, write the output folder (the default)",
    "prepare": "raw rows to a token store, no training",
    "plan": "steps, tokens, parameters and memory of a run, without running it",
    "tune": "a sweep: settings with several values are its space",
    "chain": "several commands, one after another",
    "submit": "train (or tune: submit tune ...) as a job of a Ray cluster, followed from here",
    "jobs": "the jobs of a cluster: jobs [status|logs|stop|fetch NAME]",
    "serve": "an OpenAI-compatible server of one model and many adapters",
    "chat": "a conversation in the terminal, with a model and adapters here or a server elsewhere",
    "predict": "answers for a data set, of a run or of any model and adapters, with metrics",
    "evaluate": "benchmarks (MMLU, C-Eval, CMMLU) of runs, side by side",
    "compare": "runs side by side: compare outputs/*",
    "export": "a merged model, as transformers and other programs load it",
    "import": "a LLaMA-Factory training file to an experiment of yours: import FILE.yaml",
    "doctor": "versions, devices and optional packages of this machine",
}


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv.pop(0) if argv and argv[0] in VERBS else None
    from raytune_llm import interrupts
    from raytune_llm.errors import HeadLost, UserError
    from raytune_llm.spinning import spin_briefly

    spin_briefly()
    # Libraries' announcements of future changes are for developers, not for users.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if verb is None and argv and not argv[0].startswith(("-", "+", "~")) and "=" not in argv[0]:
            raise _unknown_verb(argv[0])
        with interrupts.sigterm_raises():
            return _run(verb, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.instead and (command := _instead(verb, argv, error.instead)) is not None:
            print(f"This works here: {command}", file=sys.stderr)
        if isinstance(error, HeadLost):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        what = "terminated" if isinstance(interrupt, interrupts.Terminated) else "interrupted"
        print("\n" + "; ".join([what, *getattr(interrupt, "__notes__", ())]), file=sys.stderr)
        return interrupts.exit_code(interrupt)


def _run(verb: str | None, argv: list[str]) -> int:
    if any(flag in argv for flag in ("--help", "-h")):
        from raytune_llm.config.help import usage

        print(usage(verb, VERBS))
        return 0
    from raytune_llm import early_checks, read_ahead
    from raytune_llm.config import command_line
    from raytune_llm.config.run import ChatRun, EvaluateRun, PredictRun, ServeRun, TrainRun

    call = command_line.parse(verb or "train", argv)
    module = f"raytune_llm.commands.{call.verb}{'_' if iskeyword(call.verb) else ''}"

    def verb_main(run: Any) -> int:
        early_checks.check(run)
        if type(run) in (TrainRun, ServeRun, ChatRun, PredictRun, EvaluateRun):
            read_ahead.read_ahead_for(run)
        return import_module(module).main(run)

    if call.hydra_flags:
        return command_line.run_hydra(call, verb_main)
    return verb_main(command_line.load(call))


def _instead(verb: str | None, argv: list[str], option: str) -> str | None:
    """The command with this option of a group, quoted for a shell, if it is accepted. An experiment that sets `model.path`
    itself keeps its model whatever option of the group is chosen, so a packaged model's path is tried, too."""
    from raytune_llm import early_checks, packaged
    from raytune_llm.config import command_line
    from raytune_llm.errors import UserError

    words = command_line.with_option(argv, option)
    if words is None:
        return None
    paths = [f"model.path={path}" for path, package in packaged.PACKAGED.items() if package.option == option]
    for more in ([], *([path] for path in paths)):
        try:
            early_checks.check(command_line.load(command_line.parse(verb or "train", [*words, *more])))
        except UserError:
            continue
        return shlex.join(["python", "-m", "raytune_llm", *([verb] if verb else []), *words, *more])
    return None


def _unknown_verb(word: str) -> Exception:
    from difflib import get_close_matches

    from raytune_llm.errors import ConfigError

    near = get_close_matches(word, VERBS, n=1)
    fix = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(VERBS)}. Settings read key=value."
    return ConfigError("the command", "must be a verb or a setting", got=word, fix=fix)


if __name__ == "__main__":
    sys.exit(main())
