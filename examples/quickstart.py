"""Kangaroo in a few lines: stream an answer, complete a batch, draw several answers, look at counts."""

import kangaroo
from kangaroo import Sampling

decoder = kangaroo.load("demo")
question = [{"role": "user", "content": "Can you help me to book a table for two tonight?"}]

with decoder.stream(question, max_tokens=64) as stream:
    for piece in stream:
        print(piece.text, end="", flush=True)
stats = stream.stats
print(f"\n[{stats.compression_rate:.2f} tokens per round, {stats.tokens_per_second:.0f} tokens/s]\n")

# A batch: text, messages or token ids, each with a Sampling of its own. The same seed gives the same text with any
# drafter, in any company.
answers = decoder.generate(
    [question, "Once upon a time", decoder.tokenizer.encode("Long ago")],
    sampling=[Sampling(temperature=0.8, top_p=0.95, seed=7), Sampling(), Sampling(temperature=0.8, seed=3)],
    max_tokens=64,
    stop=["\n\n"],
    logprobs=2,
)
for answer in answers:
    print(f"{answer.text}\n[{len(answer.tokens)} tokens, {answer.finish_reason} by {answer.stopped_by!r}]\n")
print("the first token of the first answer, and its rivals:", answers[0].logprobs and answers[0].logprobs[0])

# Three answers to one prompt.
for answer in decoder.generate(["The fox"], n=3, sampling=Sampling(temperature=1.0), max_tokens=12):
    print("The fox" + answer.text)
