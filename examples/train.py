"""Train a small model and write with it.    python examples/train.py recipes/text.toml"""

import sys

from shenhong import LLM, train_recipe

recipe = sys.argv[1] if len(sys.argv) > 1 else "recipes/text.toml"
run = train_recipe(recipe, "runs/short", changes=["train.steps=20"])
with LLM(run) as llm:
    print(llm.generate("The", 40, plain=True))
