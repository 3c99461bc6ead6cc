"""Which of these lines does the model hold likelier?    python examples/score.py runs/poet"""

import sys

from shenhong import LLM

model = sys.argv[1] if len(sys.argv) > 1 else "runs/poet"
lines = ["白日依山尽，黄河入海流。", "山白尽日依，海流入河黄。"]
with LLM(model) as llm:
    for line, score in zip(lines, llm.score(lines), strict=True):
        print(f"{line}  {score.total:.1f} nats, perplexity {score.perplexity:.1f}")
