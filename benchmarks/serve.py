"""Serving on this machine: SmolLM2 through HTTP, prompts of about 60 tokens, 32 new ones; beside LLaMA-Factory's API where it is
installed, and beside PEFT's own batches.

    scripts/bench serve --llamafactory /path/to/its/python

Clients ask one request after the other, each with a prompt of its own, and read a stream. Rounds of all sides alternate; figures
are medians of the rounds. Tokens are counted from the answers' texts, by one tokenizer for all. PEFT answers without HTTP.
LLaMA-Factory imports torchaudio, which texts do not need: where it can't be loaded beside a torch for CPUs, an empty module
of that name does, without torchvision.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_llm import packaged

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CLIENTS = (1, 8, 32)
ADAPTERS = (8, 16)
NEW_TOKENS = 32
WORDS = ("river", "stone", "cloud", "garden", "window", "market", "engine", "letter", "forest", "bridge", "candle", "harbor")
START_S = 300


class Round(NamedTuple):
    """What clients saw in one go."""

    seconds: float
    texts: list[str]
    first_s: list[float]


def questions(number: int, seed: int) -> list[str]:
    """About 60 tokens each with SmolLM2's template, and none begins like another."""
    draw = random.Random(seed)
    return [
        f"{draw.randrange(10**6)}: write a long story in which these words come: {' '.join(draw.choices(WORDS, k=9))}."
        for _ in range(number)
    ]


# Servers --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(command: list[str], environment: Mapping[str, str], log: Path, url_in: Callable[[str], str | None]) -> Iterator[str]:
    """The server's URL. url_in: reads it from what the server has printed so far; None: it is not known yet."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    try:
        until = time.monotonic() + START_S
        while (url := url_in(log.read_text())) is None or not _answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(log.read_text()[-3000:])
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def ours(
    adapters: Mapping[str, Path],
    folder: Path,
    program: Sequence[str] = ("-m", "raytune_llm"),
    environment: Mapping[str, str] = {},
) -> contextlib.AbstractContextManager[str]:
    """program: what Python runs, with the arguments of `raytune_llm`."""
    names = ", ".join(f"{name}: '{path}'" for name, path in adapters.items())
    command = [
        sys.executable, *program, "serve", "model=smollm2_135m", f"serve.adapters={{{names}}}", "serve.port=0",
        f"serve.max_adapters={max(ADAPTERS)}", "serve.max_rank=8", "serve.precision=bf16", "serve.base_name=base",
    ]  # fmt: skip
    return served(command, environment, folder / "ours.log", _ready_at)


def _ready_at(said: str) -> str | None:
    found = re.search(r"^ready at (\S+)$", said, re.MULTILINE)
    return found and found[1]


@contextlib.contextmanager
def llamafactory(python: str, folder: Path) -> Iterator[str]:
    with _kept_port() as port, _llamafactory(python, folder, port) as url:
        yield url


def _llamafactory(python: str, folder: Path, port: int) -> contextlib.AbstractContextManager[str]:
    settings = {"model_name_or_path": packaged.resolve(MODEL), "template": "smollm2", "infer_backend": "huggingface"}
    settings |= {"infer_dtype": "bfloat16", "trust_remote_code": False}
    (folder / "theirs.yaml").write_text(json.dumps(settings))  # JSON is YAML
    environment = {"API_PORT": str(port), "API_HOST": "127.0.0.1", "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(python).with_name("llamafactory-cli")), "api", str(folder / "theirs.yaml")]
    return served(command, environment, folder / "theirs.log", lambda said: f"http://127.0.0.1:{port}")


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    return False


@contextlib.contextmanager
def _kept_port() -> Iterator[int]:
    """A port that no other process is given inside the block. uvicorn opens it, since both sockets have SO_REUSEADDR (on Linux,
    as long as only one of them listens)."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]


# Clients --------------------------------------------------------------------------------------------------------------


async def ask(url: str, clients: int, models: Sequence[str], requests: int, seed: int) -> Round:
    """So many requests in all, from so many clients at once; model after model."""
    waiting = list(enumerate(questions(requests, seed)))
    texts, first = [""] * requests, [0.0] * requests
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:

        async def client() -> None:
            while waiting:
                number, question = waiting.pop(0)
                body = {
                    "model": models[number % len(models)], "messages": [{"role": "user", "content": question}],
                    "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True,
                }  # fmt: skip
                began = time.perf_counter()
                async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        said = "".join(one["delta"].get("content") or "" for one in json.loads(line[6:])["choices"])
                        if said and not texts[number]:
                            first[number] = time.perf_counter() - began
                        texts[number] += said

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return Round(time.perf_counter() - began, texts, first)


def rounds_of(tokenizer: Any, rounds: Sequence[Round]) -> dict[str, float]:
    counts = [sum(len(tokenizer.encode(text)) for text in one.texts) for one in rounds]
    return {
        "tokens_per_s": round(statistics.median(count / one.seconds for count, one in zip(counts, rounds, strict=True)), 1),
        "first_token_s": round(statistics.median(statistics.median(one.first_s) for one in rounds), 3),
        "tokens_a_request": round(statistics.mean(counts) / len(rounds[0].texts), 1),
    }


# PEFT -----------------------------------------------------------------------------------------------------------------


def make_adapters(folder: Path, number: int) -> dict[str, Path]:
    """Rank 8 on every linear layer, with small random weights, so that each changes what is said."""
    base = AutoModelForCausalLM.from_pretrained(packaged.resolve(MODEL), dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    made = {}
    for seed in range(number):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_" in name:
                    weights.normal_(std=0.01)
        made[f"a{seed}"] = folder / f"a{seed}"
        model.save_pretrained(made[f"a{seed}"])
    return made


def peft_rates(adapters: Mapping[str, Path], tokenizer: Any, rounds: int) -> dict[str, float]:
    """Eight rows with eight adapters: in one batch, and one after another."""
    names = list(adapters)[:8]
    base = AutoModelForCausalLM.from_pretrained(packaged.resolve(MODEL), dtype=torch.bfloat16)
    model: Any = PeftModel.from_pretrained(base, str(adapters[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(adapters[name]), adapter_name=name)
    model = model.to(torch.bfloat16).eval()
    tokenizer.padding_side = "left"
    times: dict[str, list[float]] = {"mixed": [], "one_by_one": []}
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for seed in range(rounds):
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True, tokenize=False)
            for one in questions(len(names), seed)
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            began = time.perf_counter()
            model.generate(**batch, adapter_names=names, **settings)
            times["mixed"].append(time.perf_counter() - began)
            began = time.perf_counter()
            for name, prompt in zip(names, prompts, strict=True):
                model.set_adapter(name)
                model.generate(**tokenizer(prompt, return_tensors="pt", add_special_tokens=False), **settings)
            times["one_by_one"].append(time.perf_counter() - began)
    return {f"{way}_tokens_per_s": round(len(names) * NEW_TOKENS / statistics.median(ts), 1) for way, ts in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llamafactory", help="the Python that has LLaMA-Factory 0.9.5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true")
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(packaged.resolve(MODEL))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as open_servers:
        folder = Path(name)
        adapters = make_adapters(folder, max(ADAPTERS))
        sides = {"ours": open_servers.enter_context(ours(adapters, folder))}
        if asked.llamafactory:
            sides["llamafactory"] = open_servers.enter_context(llamafactory(asked.llamafactory, folder))
        cases: dict[str, tuple[str, int, list[str]]] = {
            f"{side}.{clients}_clients": (side, clients, ["base"]) for clients in CLIENTS for side in sides
        }
        cases |= {f"ours.8_clients_{number}_adapters": ("ours", 8, list(adapters)[:number]) for number in ADAPTERS}
        told: dict[str, list[Round]] = {case: [] for case in cases}
        for side, url in sides.items():
            asyncio.run(ask(url, 1, ["base"], 1, seed=10**6))
            if side == "ours":
                asyncio.run(ask(url, 8, list(adapters), 2 * len(adapters), seed=10**6))
        for number in range(asked.rounds):
            for case, (side, clients, models) in cases.items():
                requests = max(2, clients) if side == "llamafactory" else max(4, 2 * clients)
                told[case].append(asyncio.run(ask(sides[side], clients, models, requests, seed=100 * number + clients)))
                print(f"{case}: {told[case][-1].seconds:.1f} s", file=sys.stderr)
        open_servers.close()
        result: dict[str, Any] = {side: {} for side in sides}
        for case, rounds in told.items():
            side, what = case.split(".")
            result[side][what] = rounds_of(tokenizer, rounds)
        if not asked.no_peft:
            result["peft"] = peft_rates(adapters, tokenizer, asked.rounds)
    result["goals"] = goals(result)
    result["load_average"] = os.getloadavg()[0]
    print(json.dumps(result))


def goals(result: Mapping[str, Any]) -> dict[str, float]:
    """Ratios within this run."""
    mine = result["ours"]
    told = {}
    for number in ADAPTERS:
        took = mine["8_clients"]["tokens_per_s"] / mine[f"8_clients_{number}_adapters"]["tokens_per_s"]
        told[f"time_with_{number}_adapters"] = took
    for clients in CLIENTS if "llamafactory" in result else ():
        theirs, own = result["llamafactory"][f"{clients}_clients"], mine[f"{clients}_clients"]
        told[f"{clients}_clients_times_llamafactory"] = own["tokens_per_s"] / theirs["tokens_per_s"]
        told[f"{clients}_clients_first_token_of_theirs"] = own["first_token_s"] / theirs["first_token_s"]
    if "peft" in result:
        mixed = mine["8_clients_8_adapters"]["tokens_per_s"]
        told["times_peft_mixed"] = mixed / result["peft"]["mixed_tokens_per_s"]
        told["times_peft_one_by_one"] = mixed / result["peft"]["one_by_one_tokens_per_s"]
    return {name: round(value, 3) for name, value in told.items()}


if __name__ == "__main__":
    main()
