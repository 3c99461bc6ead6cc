"""Show an answer as it is written.    python examples/stream.py runs/poet"""

import sys

from shenhong import LLM

model = sys.argv[1] if len(sys.argv) > 1 else "runs/poet"
with LLM(model) as llm:
    for piece in llm.stream("五律 江上", 100, seed=7):
        print(piece, end="", flush=True)
    print()
