"""How near are texts to each other?    python examples/embed.py runs/poet"""

import sys

from torch.nn.functional import normalize

from shenhong import LLM

model = sys.argv[1] if len(sys.argv) > 1 else "runs/poet"
texts = ["明月松间照，清泉石上流。", "床前明月光，疑是地上霜。", "大漠孤烟直，长河落日圆。"]
with LLM(model) as llm:
    rows = normalize(llm.embed(texts))
    print((rows @ rows.T).numpy().round(3))
