"""Two turns of a conversation, through the model's own chat template.    python examples/chat.py runs/SmolLM2-135M-Instruct.gguf"""

import sys

from shenhong import LLM

model = sys.argv[1] if len(sys.argv) > 1 else "runs/SmolLM2-135M-Instruct.gguf"
with LLM(model) as llm:
    messages = []
    for question in ("Capital of France?", "And of Italy?"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": llm.chat(messages, 40)})
        print(messages[-1]["content"])
