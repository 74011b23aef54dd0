"""`serve` on Ray Serve over toy engines, as a process of its own: lines of standard input update it.

python -m tests.toy_server OVERRIDE ...
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

from raytune_llm import interrupts, load_config
from raytune_llm.config.run import ServeRun
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.serve.backend import ModelFacts
from tests.toy_engine import ToyRunner

STEP_S = 0.05


def toy_engine(run: ServeRun, *, step_s: float) -> tuple[Any, ModelFacts]:
    tokenizer = byte_tokenizer()
    runner: Any = ToyRunner(num_blocks=512, block_size=4, vocab_size=len(tokenizer), slots=run.serve.max_adapters)
    runner.delay_s = step_s
    end: Any = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = run.engine.max_rows
    engine = NativeEngine(runner, tokenizer, end_ids=[end], max_length=600, max_rows=rows, step_tokens=64)
    for name, folder in run.serve.adapters.items():
        engine.add_adapter(name, folder)
    return engine, ModelFacts(name="base", max_length=engine.max_length, hidden_size=2, scores=False)


def main(overrides: list[str]) -> None:
    from raytune_llm.serve import onray

    run = load_config("serve", ["model=tiny_random", "resources=local", "serve.port=0", *overrides])

    def updates() -> None:
        for number, _ in enumerate(sys.stdin):
            onray.update(run, build=partial(toy_engine, step_s=STEP_S + 0.001 * (1 + number)))
            print("updated", flush=True)

    threading.Thread(target=updates, daemon=True).start()
    try:
        onray.serve_on_ray(run, notify=partial(print, flush=True), build=partial(toy_engine, step_s=STEP_S))
    except KeyboardInterrupt as interrupt:
        sys.exit(interrupts.exit_code(interrupt))


if __name__ == "__main__":
    main(sys.argv[1:])
