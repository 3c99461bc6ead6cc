"""Prints the losses, loads and biases of a short training on rows of a file, or on the toy "texts"; see test_mesh.py."""

import json
import sys
from pathlib import Path

import torch

from shenhong.model import ModelConfig
from shenhong.parallel import join, leave
from shenhong.train.data import PackedRows, Rows, Source
from shenhong.train.objectives import NextToken, Objective
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import Trainer
from tests.train import tiny_model

torch.set_num_threads(1)
mesh = join()
settings = TrainSettings(steps=6, **json.loads(sys.argv[2]))
config = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
)
source: Source
objective: Objective
if sys.argv[1] == "texts":
    config, source, objective = tiny_model.CONFIG, tiny_model.Texts(2), tiny_model.Alignment()
else:
    source = PackedRows(Rows(Path(sys.argv[1]), 0, 2), settings, 3)
    objective = NextToken(config, settings)
trainer = Trainer(settings, config, objective, source, mesh, 3, torch.float32, torch.device("cpu"))
results = [trainer.step(step, 6) for step in range(6)]
if mesh.leads:
    biases = [router.e_score_correction_bias.tolist() for router in trainer.model.routers]
    losses = [[*r.losses.values(), r.grad_norm] for r in results]
    print(json.dumps({"losses": losses, "load": [r.load for r in results], "biases": biases}))
leave()
