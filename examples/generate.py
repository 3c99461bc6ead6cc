"""Write four answers to one prompt.    python examples/generate.py runs/poet"""

import sys

from shenhong import LLM, Sampling

model = sys.argv[1] if len(sys.argv) > 1 else "runs/poet"
with LLM(model) as llm:
    for answer in llm.generate(["七绝 长城"] * 4, 80, Sampling(temperature=0.8), seed=1):
        print(answer)
