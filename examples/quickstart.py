"""Kangaroo in a few lines: stream an answer, complete a batch, look at the counts."""

import kangaroo
from kangaroo import Sampling

decoder = kangaroo.load("demo")
question = [{"role": "user", "content": "Can you help me to book a table for two tonight?"}]

for piece in decoder.stream(question, max_tokens=64):
    print(piece.text, end="", flush=True)
print(f"\n[{decoder.stats.compression_rate:.2f} tokens per round, {decoder.stats.tokens_per_second:.0f} tokens/s]\n")

# A batch, sampled. The same seed gives the same text with any drafter, in any company.
answers = decoder.generate(
    [question, [{"role": "user", "content": "Write a short story about a fox."}]],
    max_tokens=64,
    sampling=Sampling(temperature=0.8, top_p=0.95, seed=7),
)
for answer in answers:
    print(f"{answer.text}\n[{len(answer.tokens)} tokens, {answer.finish_reason}]\n")
