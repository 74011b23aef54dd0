"""What two settings of waiting cost a server on this machine's CPU: SmolLM2 through HTTP, as in benchmarks/serve.py.

    scripts/bench serve_waits [--rounds 3]

- `long_spins`: OpenMP's threads spin as long as they do by default, in place of raytune_llm/spinning.py's.
- `long_turns`: a thread keeps the interpreter for 5 ms, Python's default, in place of raytune_llm/serve/engines.py's SWITCH_S.

Rounds of all servers alternate; figures are medians of the rounds. `times` is how much longer answers take than with `usual`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from decode import LONG_SPINS
from serve import MODEL, Round, ask, make_adapters, ours, rounds_of
from transformers import AutoTokenizer

from raytune_llm import packaged

SWITCH_S = 0.005
WITH_LONG_TURNS = f"""
import sys
from raytune_llm import spinning
spinning.spin_briefly()
from raytune_llm.serve import engines
engines.SWITCH_S = {SWITCH_S}
from raytune_llm.__main__ import main
sys.exit(main())
"""
SERVERS: dict[str, dict[str, Any]] = {
    "usual": {},
    "long_spins": {"environment": {"GOMP_SPINCOUNT": str(LONG_SPINS)}},
    "long_turns": {"program": ["-c", WITH_LONG_TURNS]},
}
CASES = {"1_clients": (1, 0), "8_clients": (8, 0), "8_clients_8_adapters": (8, 8)}
"""Clients and adapters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    load_average = os.getloadavg()[0]
    told: dict[str, dict[str, list[Round]]] = {server: {case: [] for case in CASES} for server in SERVERS}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as open_servers:
        adapters = make_adapters(Path(name), 8)
        urls: dict[str, str] = {}
        for server, settings in SERVERS.items():
            logs = Path(name) / server
            logs.mkdir()
            urls[server] = open_servers.enter_context(ours(adapters, logs, **settings))
            asyncio.run(ask(urls[server], 8, list(adapters), 16, seed=10**6))
        for number in range(asked.rounds):
            for case, (clients, tuned) in CASES.items():
                for server, url in urls.items():
                    models = list(adapters)[:tuned] or ["base"]
                    told[server][case].append(
                        asyncio.run(ask(url, clients, models, max(4, 2 * clients), seed=100 * number + clients))
                    )
                    print(f"{server}.{case}: {told[server][case][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(packaged.resolve(MODEL))
    result: dict[str, Any] = {
        server: {case: rounds_of(tokenizer, rounds) for case, rounds in cases.items()} for server, cases in told.items()
    }
    usual = result["usual"]
    result["times"] = {
        server: {
            case: round(usual[case]["tokens_per_s"] / figures["tokens_per_s"], 3) for case, figures in result[server].items()
        }
        for server in SERVERS
    }
    print(json.dumps(result | {"load_average": load_average}))


if __name__ == "__main__":
    main()
