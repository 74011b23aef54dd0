"""Whole commands on one GPU and on several, of models in published shapes with random weights.

    scripts/bench gpu_runs [--runs dpo first_step ...] [--workers N] [--limit-s 300] [--tiny]

dpo: 300 pairs of texts as long as those of dpo_en_demo.json, each with a request of its own, to 1,024 tokens; two epochs of four
packs a step, the reference precomputed. Pairs/s are from the tokens/s of the log after the tenth step, when all is compiled.

first_step: 16 GB of random weights are written as safetensors and dropped from the page cache; the time is from starting the
command to the first record in its metrics.

ready: `serve` of those weights, in one process and through Ray; the time is from starting the command to its line "ready at",
after which it must answer. The first one has the compiler's caches to fill, the others find them.

saving: Llama-3.2-1B's shape, all of it trained, in this process on one GPU, for 150 steps: without checkpoints, and with one
written in the background every 50 steps. Tokens/s are of all seconds from the tenth step to the last. The disk's rate is that at
which as many threads write as many bytes; a checkpoint that takes longer than 50 steps there delays the next one.

writing: as many processes as workers write the checkpoint of a state of 24 GB together, from host memory, against the rate at
which as many threads write as many bytes. It needs no GPU.

full_8b: all of Llama-3-8B's shape under FSDP2 through Ray, 8,192 tokens a worker and step, on all GPUs or --workers of them; the
checkpoint of step 40 is written in the background, against the rate at which as many threads write to the same disk. The command
is ended then, as is any at its limit.

killed: LoRA of that shape under ddp through Ray with a checkpoint every five steps; a worker gets SIGKILL after step 12, and the
run goes on to its end.

A run that fails says why, and the others go on. --tiny tries the script: small shapes, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from gpu import FULL_8B, LORA, SHAPES, each, shape_of, shape_setting
from torch.multiprocessing.spawn import spawn
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.train.checkpoint import Checkpoints
from raytune_llm.train.checkpoint_writer import PARTS
from raytune_llm.train.progress import Progress

os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)  # of benchmarks/gpu.py; commands set their own

PAIRS = Path(__file__).parent / "_dpo_lengths.json"
EPOCHS, WARMUP_STEPS = 2, 10
SAVED_AT = 40
KILLED_AT = 12
LEFT_BYTES = 4 * 2**30
"""What a checkpoint leaves of the disk."""


@dataclass(frozen=True)
class Asked:
    workers: int
    limit_s: float
    """Of a command that is followed."""
    tiny: bool

    def shape(self, name: str) -> str:
        """The setting with a model's shape."""
        return shape_setting(shape_of(name, tiny=self.tiny))

    def length(self, tokens: int) -> int:
        return 256 if self.tiny else tokens


def command(folder: Path, rows: list[dict[str, Any]], *settings: str) -> list[str]:
    data, output = folder / "rows.jsonl", folder / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        sys.executable, "-m", "raytune_llm", "model=hub", "model.tokenizer=bytes", f"data.path={data}",
        f"data.cache={folder / 'stores'}", f"output_dir={output}", "resources=inline", "tracking=none", *settings,
    ]  # fmt: skip


class Followed:
    """A command that says its progress as JSON lines, read as they come."""

    def __init__(self, words: Sequence[str], errors: Path) -> None:
        self.began, self._errors = time.time(), errors
        self._found: list[dict[str, Any]] = []
        with errors.open("w") as file:
            words = [*words, "log_format=json"]
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"event"'):
                self._found.append(json.loads(line))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in list(self._found) if event["event"] == kind]

    def times(self) -> dict[int, float]:
        """When each step was recorded, the last time."""
        return {event["step"]: event["time"] for event in self.events("step")}

    def until(self, holds: Callable[[], object], limit_s: float) -> None:
        """Wait for it. limit_s: since the command's start."""
        while not holds():
            code = self.process.poll()
            if code is not None and not holds():
                raise RuntimeError(f"the command ended with code {code}: {self._errors.read_text()[-1500:]}")
            if time.time() - self.began > limit_s:
                said = [event["text"] for event in self.events("notice")][-3:]
                raise TimeoutError(f"ended after {limit_s:g} s, with {len(self.times())} steps; it said {said}")
            time.sleep(0.05)

    def end(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.kill()
        self.process.wait()


@contextmanager
def followed(words: Sequence[str], folder: Path) -> Iterator[Followed]:
    run = Followed(words, folder / "errors.txt")
    try:
        yield run
    finally:
        run.end()


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dpo(folder: Path, asked: Asked) -> dict[str, float]:
    draw = random.Random(0)

    def message(role: str, length: int) -> dict[str, str]:
        return {"role": role, "content": "".join(draw.choices(string.ascii_letters, k=length))}

    rows = [
        {"messages": [message("user", request)], "chosen": message("assistant", better), "rejected": message("assistant", worse)}
        for request, better, worse in json.loads(PAIRS.read_text())["rows"]
    ]
    settings = [*LORA, "data=chat_pairs", "stage=dpo", "model.path=null", "model.weights=random", asked.shape("llama3_8b")]
    sizes = ["data.max_length=1024", "train.micro_batch_size=4", "train.global_batch_size=4", f"train.epochs={EPOCHS}"]
    subprocess.run(command(folder, rows, *settings, *sizes), check=True, stdout=sys.stderr)
    found = records(folder)
    tokens_per_pair = found[-1]["tokens_seen"] / (EPOCHS * len(rows))
    speed = mean(record["tokens_per_s"] for record in found if record["step"] > WARMUP_STEPS)
    return {
        "pairs_per_s": round(speed / tokens_per_pair, 2),
        "tokens_per_s": round(speed),
        "tokens_a_pair": round(tokens_per_pair),
    }


def write_weights(folder: Path, asked: Asked) -> Path:
    """A model's folder with random weights, which are in no cache of the system."""
    weights = folder / "model"
    shape = shape_of("llama3_8b", tiny=asked.tiny)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.save_pretrained(weights)
    del model
    torch.cuda.empty_cache()
    forget(weights)
    return weights


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ready(folder: Path, asked: Asked) -> dict[str, float]:
    weights = write_weights(folder, asked)
    base = [sys.executable, "-m", "raytune_llm", "serve", "model=hub", "model.tokenizer=bytes", f"model.path={weights}"]
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    found = {}
    for name, resources in (("first", "inline"), ("inline", "inline"), ("local", "local")):
        forget(weights)
        began = time.perf_counter()
        words = [*base, f"resources={resources}", "serve.port=8123"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | caches) as server:
            assert server.stdout is not None
            try:
                for line in server.stdout:
                    print(f"{time.perf_counter() - began:.1f} {line}", end="", file=sys.stderr, flush=True)
                    if "ready at" in line:
                        found[f"{name}_s"] = round(time.perf_counter() - began, 1)
                        found[f"{name}_first_answer_s"] = round(time.perf_counter() - began + answer_s(), 1)
                        break
            finally:
                server.send_signal(signal.SIGINT)
    return found


def answer_s() -> float:
    """Seconds of a short completion."""
    url = "http://127.0.0.1:8123/v1"
    with urllib.request.urlopen(f"{url}/models") as models:
        name = json.load(models)["data"][0]["id"]
    body = json.dumps({"model": name, "prompt": "hello", "max_tokens": 4}).encode()
    began = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})) as got:
        assert json.load(got)["choices"]
    return time.perf_counter() - began


def first_step(folder: Path, asked: Asked) -> dict[str, float]:
    weights = write_weights(folder, asked)
    messages = [{"role": "user", "content": "a" * 100}, {"role": "assistant", "content": "b" * 200}]
    settings = [*LORA, f"model.path={weights}", "data=chat", "data.max_length=4096", "train.micro_batch_size=2"]
    began = time.perf_counter()
    with subprocess.Popen(
        command(folder, [{"messages": messages}] * 100, *settings, "train.global_batch_size=2", "train.max_steps=1"),
        stdout=sys.stderr,
    ) as run:
        while not records(folder):
            if run.poll() not in (None, 0):
                sys.exit("the command failed")
            time.sleep(0.1)
        seconds = time.perf_counter() - began
    return {"first_step_s": round(seconds, 1)}


def random_run(folder: Path, asked: Asked, shape: str, length: int, *settings: str) -> list[str]:
    """The command of a run with random weights, and rows that fill packs of so many tokens."""
    tokens = asked.length(length)
    words = "".join(random.Random(0).choices(string.ascii_letters, k=tokens))
    request, answer = words[: tokens // 4], words[tokens // 4 : -64]  # the chat's own tokens come on top
    row = {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}
    sizes = [f"data.max_length={tokens}", "data.eval_fraction=0", "train.epochs=100000", "train.seed=0"]
    base = ["data=chat", "model.path=null", "model.weights=random", asked.shape(shape), *sizes, "optimizer.lr=1e-5"]
    return command(folder, [row] * 512, *base, *settings)


def through_ray(asked: Asked) -> list[str]:
    return ["resources=local", f"resources.num_workers={asked.workers}", "train.log_every_steps=1"]


def saving(folder: Path, asked: Asked) -> dict[str, Any]:
    steps = 30 if asked.tiny else 150
    found: dict[str, Any] = {"disk_gb_per_s": round(disk_bytes_per_s(folder, PARTS, 2**28 if asked.tiny else 2**34) / 1e9, 2)}
    for name, every in {"none": 100000, "every_50": steps // 3}.items():
        place = folder / name
        place.mkdir()
        sizes = ["train.micro_batch_size=4", "train.global_batch_size=4", f"train.max_steps={steps}", "train.log_every_steps=5"]
        kept = ["checkpoint.asynchronous=true", f"checkpoint.every_steps={every}", "checkpoint.keep=1"]
        with followed(random_run(place, asked, "llama3_2_1b", 4096, "adapter=none", *sizes, *kept), place) as run:
            try:
                run.until(lambda run=run: steps in run.times(), asked.limit_s)
            except TimeoutError as error:
                found[name] = {"failed": str(error)}
                continue
        tokens = {event["step"]: event["tokens_seen"] for event in run.events("step")}
        times = run.times()
        found[name] = {"tokens_per_s": round((tokens[steps] - tokens[10]) / (times[steps] - times[10]))}
        usual = median(times[step + 5] - times[step] for step in range(10, steps, 5))
        waits = {step: times[step + 5] - times[step] - usual for step in range(every, steps, every)}
        found[name] |= {f"wait_at_{step}_s": round(wait, 2) for step, wait in waits.items()}
        for done in place.glob("run/checkpoints/step-*/COMPLETE"):
            step = int(done.parent.name.removeprefix("step-"))
            found[name][f"written_at_{step}_s"] = round(done.stat().st_mtime - times[step], 2)
        since = {step: round(at - times[10], 2) for step, at in times.items()}
        print(name, found[name], since, [event["text"] for event in run.events("notice")], file=sys.stderr, flush=True)
        shutil.rmtree(place)
    if "failed" not in found["none"] | found["every_50"]:
        found["every_50"]["of_none"] = round(found["every_50"]["tokens_per_s"] / found["none"]["tokens_per_s"], 3)
    return found


def writing(folder: Path, asked: Asked) -> dict[str, Any]:
    size = 2**27 if asked.tiny else 24 * 10**9
    disk = disk_bytes_per_s(folder, PARTS * asked.workers, size)
    spawn(write_state, (asked.workers, str(folder), size // asked.workers), nprocs=asked.workers)
    seconds = json.loads((folder / "seconds.json").read_text())
    size = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*"))  # of whole tensors, so a little less
    return {
        "disk_gb_per_s": round(disk / 1e9, 2),
        "checkpoint_gb": round(size / 1e9, 2),
        "checkpoint_s": round(seconds, 1),
        "checkpoint_gb_per_s": round(size / seconds / 1e9, 2),
        "of_disk": round(size / seconds / disk, 3),
    }


def write_state(rank: int, world: int, folder: str, size: int) -> None:
    """One of several workers, each of which has at most so many bytes of the state."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    numbers = size // 4
    weight = torch.randn(min(4096 * 14336, numbers // 8))
    state = {f"parameters.{rank}.{number}": weight + number for number in range(numbers // len(weight))}
    checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1, asynchronous=False)
    dist.barrier()
    began = time.perf_counter()
    checkpoints.save(state, Progress(step=1), {})
    seconds = time.perf_counter() - began
    checkpoints.close()
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def full_8b(folder: Path, asked: Asked) -> dict[str, Any]:
    with torch.device("meta"):
        config = AutoConfig.for_model(**SHAPES["llama3_8b"])
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    free = shutil.disk_usage(folder).free
    if not asked.tiny and free < 12 * weights + LEFT_BYTES:
        return {"not_run": f"a checkpoint has {12 * weights / 1e9:.0f} GB, and {free / 1e9:.0f} GB of the disk are free"}
    sizes = ["train.micro_batch_size=1", f"train.global_batch_size={asked.workers}", "train.max_steps=100000"]
    kept = ["checkpoint.asynchronous=true", f"checkpoint.every_steps={SAVED_AT}", "checkpoint.keep=1"]
    disk = disk_bytes_per_s(folder, PARTS * asked.workers, 2**28 if asked.tiny else 2**35)
    done = folder / f"run/checkpoints/step-{SAVED_AT}/COMPLETE"
    words = random_run(folder, asked, "llama3_8b", 8192, *FULL_8B, *through_ray(asked), *sizes, *kept)
    with followed(words, folder) as run:
        run.until(lambda: SAVED_AT in run.times(), asked.limit_s)
        steps = [b - a for a, b in pairwise(run.times()[step] for step in range(3, SAVED_AT + 1))]
        tokens = {event["step"]: event["tokens_seen"] for event in run.events("step")}
        result: dict[str, Any] = {
            "first_step_s": round(run.times()[1] - run.began, 1),
            "step_s": round(median(steps), 3),
            "mean_step_s": round(mean(steps), 3),
            "tokens_per_s": round((tokens[SAVED_AT] - tokens[3]) / sum(steps) / asked.workers),
            "disk_gb_per_s": round(disk / 1e9, 2),
            "choices": run.events("begin")[0]["choices"],
        }
        try:
            run.until(done.exists, asked.limit_s)
        except TimeoutError as error:
            files = list(done.parent.rglob("*"))
            return {**result, "failed": str(error), "written_gb": round(sum(file.stat().st_size for file in files) / 1e9, 1)}
        size = sum(file.stat().st_size for file in done.parent.rglob("*"))
        seconds = done.stat().st_mtime - run.times()[SAVED_AT]
        ended = done.stat().st_mtime
        times = {step: at for step, at in run.times().items() if SAVED_AT <= step <= 2 * SAVED_AT and at <= ended}
    during = [b - a for a, b in pairwise(times.values())]
    return {
        **result,
        "steps_while_written": len(during[1:]),
        "checkpoint_gb": round(size / 1e9, 2),
        "checkpoint_s": round(seconds, 1),
        "checkpoint_gb_per_s": round(size / seconds / 1e9, 2),
        "of_disk": round(size / seconds / disk, 3),
        "step_of_the_save_s": round(during[0], 3) if during else None,
        "step_while_written_s": round(median(during[1:]), 3) if during[1:] else None,
        "mean_step_while_written_s": round(mean(during[1:]), 3) if during[1:] else None,
    }


def disk_bytes_per_s(folder: Path, writers: int, size: int) -> float:
    """So many threads write as many files, until all is on the disk."""
    piece = random.Random(0).randbytes(2**24)

    def write(number: int) -> None:
        with (folder / f"disk-{number}").open("wb", buffering=0) as file:
            for _ in range(size // writers // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())

    began = time.perf_counter()
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    seconds = time.perf_counter() - began
    files = list(folder.glob("disk-*"))
    written = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    return written / seconds


def killed(folder: Path, asked: Asked) -> dict[str, Any]:
    sizes = ["train.micro_batch_size=2", f"train.global_batch_size={2 * asked.workers}", "train.max_steps=40"]
    words = random_run(folder, asked, "llama3_8b", 4096, *LORA, *through_ray(asked), *sizes, "checkpoint.every_steps=5")
    with followed(words, folder) as run:
        run.until(lambda: KILLED_AT in run.times(), asked.limit_s)
        first_step_s = run.times()[1] - run.began
        step_s = median(b - a for a, b in pairwise(run.times()[step] for step in range(3, KILLED_AT + 1)))
        worker = workers_of(run.process.pid)[-1]
        before, at = len(run.events("step")), time.time()
        worker.kill()
        run.until(lambda: len(run.events("begin")) > 1, asked.limit_s)
        begun = run.events("begin")[1]
        after = [event for event in run.events("step")[before:] if event["time"] < begun["time"]]
        run.until(lambda: len(run.events("step")) > before + len(after), asked.limit_s)
        next_step = run.events("step")[before + len(after)]
        result = {
            "first_step_s": round(first_step_s, 1),
            "step_s": round(step_s, 3),
            "to_begin_s": round(begun["time"] - at, 1),
            "to_next_step_s": round(next_step["time"] - at, 1),
            "steps_repeated": KILLED_AT - begun["first_step"],
            "notices": [event["text"] for event in run.events("notice")],
        }
        run.until(lambda: run.process.poll() == 0, asked.limit_s)
        return {**result, "end_s": round(time.time() - run.times()[40], 1)}


def workers_of(pid: int) -> list[psutil.Process]:
    """The training workers that a command started, the oldest first."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


RUNS: dict[str, Callable[[Path, Asked], dict[str, Any]]] = {
    "dpo": dpo,
    "first_step": first_step,
    "ready": ready,
    "saving": saving,
    "writing": writing,
    "full_8b": full_8b,
    "killed": killed,
}
SEVERAL = ("full_8b", "killed")


def measured(name: str, asked: Asked) -> dict[str, Any]:
    gpus = torch.cuda.device_count()
    if name in SEVERAL and not asked.tiny and gpus < max(2, asked.workers):
        return {"not_run": f"needs {max(2, asked.workers)} GPUs, and there are {gpus}"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return RUNS[name](Path(folder), asked)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--workers", type=int, help="of writing, full_8b and killed; all GPUs")
    parser.add_argument("--limit-s", type=float, default=300)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    asked = Asked(workers=arguments.workers or max(2, gpus), limit_s=arguments.limit_s, tiny=arguments.tiny)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if gpus else "none", "workers": asked.workers}
    results |= dict(each({name: partial(measured, name, asked) for name in arguments.runs}))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
