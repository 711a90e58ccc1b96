"""Many requests at once: questions that come as they please, against the same questions one at a time.

`QUESTIONS=16 TOKENS=48 python examples/engine.py` asks more of them, at greater length.
"""

import asyncio
import os
import time

import kangaroo

COUNT, TOKENS = int(os.environ.get("QUESTIONS", "3")), int(os.environ.get("TOKENS", "12"))
TOPICS = ["tea", "rain", "trains", "bread", "chess", "snow", "music", "glass", "bees", "maps", "ships", "paper"]
QUESTIONS = [
    [{"role": "user", "content": f"Tell me something about {TOPICS[i % len(TOPICS)]}, please."}] for i in range(COUNT)
]


async def ask(engine: kangaroo.Engine, at_once: bool) -> tuple[list[list[int]], float]:
    """The answers' tokens, and tokens per second of this process's own time: other processes do not count."""
    began = time.process_time()

    async def answer(question: list[dict[str, str]]) -> list[int]:
        return [piece.token async for piece in engine.stream(question, max_tokens=TOKENS, ignore_eos=True)]

    if at_once:
        answers = list(await asyncio.gather(*map(answer, QUESTIONS)))
    else:
        answers = [await answer(question) for question in QUESTIONS]
    return answers, sum(map(len, answers)) / (time.process_time() - began)


with kangaroo.load("demo").engine(rows=16, prefix_tokens=0) as engine:
    asyncio.run(ask(engine, at_once=False))  # the first pass over anything is slower than those after it
    alone, slow = asyncio.run(ask(engine, at_once=False))
    together, fast = asyncio.run(ask(engine, at_once=True))
    again, faster = asyncio.run(ask(engine, at_once=True))  # by now it is known whether drafts pay
    status = engine.status()

print(f"one at a time {slow:.1f} tokens/s, {COUNT} at once {fast:.1f}, then {faster:.1f}: {faster / slow:.2f} times")
print("the same texts:", alone == together == again)
print(f"{status.emitted / status.rounds:.2f} tokens per round; drafting stopped: {dict(status.stops)}")
