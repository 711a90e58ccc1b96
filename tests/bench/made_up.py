"""Records and provenance made up for tests of the report: any size, any speed, complete unless said otherwise."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo.bench.records import BASELINE, RECORDS, Difference, Record, Turn

SPEC_BENCH = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")


def turn(
    tokens: list[int],
    emitted: list[int] | None = None,
    drafted: list[int] | None = None,
    seconds: tuple[float, float, float, float] = (0.1, 0.0, 1.0, 0.0),
    difference: Difference | None = None,
    peak_bytes: int | None = None,
) -> Turn:
    """One answer; plain decoding unless rounds are given. `seconds` are prefill, draft, verify, rest."""
    emitted = [1] * len(tokens) if emitted is None else emitted
    drafted = [0] * len(emitted) if drafted is None else drafted
    stops = ["nothing" if count == 0 else "confidence" if count < 4 else "length" for count in drafted]
    prefill, draft, verify, rest = seconds
    return Turn(
        prompt_tokens=10,
        dropped_tokens=0,
        tokens=tokens,
        finish_reason="length",
        prefill=prefill,
        draft=draft,
        verify=verify,
        rest=rest,
        emitted=emitted,
        drafted=drafted,
        stops=stops,
        peak_bytes=peak_bytes,
        difference=difference,
    )


def record(question: int, method: str, *turns: Turn, task: str = "qa", repeat: int = 0) -> Record:
    return Record(question=question, task=task, category=task, method=method, repeat=repeat, turns=list(turns))


def make_run(
    methods: dict[str, float],
    *,
    tasks: tuple[str, ...] = SPEC_BENCH,
    questions: int = 4,
    repeats: int = 1,
    tokens: int = 60,
    seed: int = 0,
) -> list[Record]:
    """Methods by how often a drafted token is accepted: each drafts up to four tokens a round, as a chain does."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(len(tasks) * questions):
        task = tasks[number % len(tasks)]
        text = rng.integers(0, 500, tokens).tolist()
        for repeat in range(repeats):
            plain = turn(text, seconds=(0.05, 0.0, tokens * 0.01 * float(rng.normal(1, 0.02)), tokens * 2e-4))
            records.append(record(number, BASELINE, plain, task=task, repeat=repeat))
            for method, chance in methods.items():
                records.append(record(number, method, _drafted_turn(text, chance, rng), task=task, repeat=repeat))
    return records


def _drafted_turn(text: list[int], chance: float, rng: np.random.Generator) -> Turn:
    emitted, drafted = list[int](), list[int]()
    while (room := len(text) - sum(emitted)) > 0:
        count = min(int(rng.integers(1, 5)), room - 1)
        hits = int(np.cumprod(rng.random(count) < chance).sum())
        drafted.append(count)
        emitted.append(hits + 1)
    draft, verify = 0.0012 * sum(drafted), 0.0101 * len(emitted) * float(rng.normal(1, 0.02))
    return turn(text, emitted, drafted, (0.05, draft, verify, len(emitted) * 4e-4), peak_bytes=123_456_789)


PROVENANCE: dict[str, Any] = {
    "recipe": {"model": "demo", "max_tokens": 60, "repeats": 1, "batch": 1, "methods": [{"name": "kangaroo"}]},
    "commit": "0123456789abcdef",
    "dirty": False,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "machine": {"cpu": "A made-up processor", "cores": 2},
    "threads": 1,
    "dtype": "float32",
    "fingerprint": "abc",
}


def save_run(folder: Path, records: list[Record], **provenance: Any) -> Path:
    """Write a run's folder as the benchmark does."""
    folder.mkdir(parents=True)
    (folder / RECORDS).write_text("".join(entry.model_dump_json() + "\n" for entry in records))
    facts = PROVENANCE | provenance
    named = {method["name"] for method in facts["recipe"].get("methods", [])}
    others = sorted({record.method for record in records} - named - {BASELINE})
    methods = [*facts["recipe"].get("methods", []), *({"name": name} for name in others)]
    (folder / "provenance.json").write_text(json.dumps(facts | {"recipe": facts["recipe"] | {"methods": methods}}))
    return folder
