"""llama.cpp as a peer: a GGUF file, opened through its Python binding, that writes many greedy texts at once."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp.llama_cpp as api
import numpy as np


class LlamaCpp:
    """One context with room for ``streams`` texts of ``length`` tokens each, prompt included.

    The loop is in Python, as ours is; a step is one call of llama_decode for all texts.
    """

    def __init__(self, path: Path, streams: int, length: int, threads: int) -> None:
        model = api.llama_model_default_params()
        model.use_extra_bufts = False  # they abort on any deepseek2 file where the CPU has AMX
        api.llama_log_set(_silent, ctypes.c_void_p())
        self.model = api.llama_model_load_from_file(str(path).encode(), model)
        room = api.llama_context_default_params()
        room.n_ctx = streams * length
        room.n_batch = room.n_ubatch = max(512, streams)
        room.n_seq_max = streams
        room.kv_unified = True
        room.n_threads = room.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, room)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.most = room.n_batch
        self.batch = api.llama_batch_init(self.most, 0, 1)

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """The likeliest ``tokens`` after each prompt."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        for text, prompt in enumerate(prompts):  # a prompt may be longer than one call takes
            for at in range(0, len(prompt), self.most):
                piece = prompt[at : at + self.most]
                last = at + len(piece) == len(prompt)
                self._decode(
                    [
                        (token, at + i, text, last and i + 1 == len(piece))
                        for i, token in enumerate(piece)
                    ]
                )
            answers[text].append(self._best(len(piece) - 1))
        for _ in range(tokens - 1):
            self._decode(
                [
                    (answer[-1], len(prompt) + len(answer) - 1, text, True)
                    for text, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
                ]
            )
            for text, answer in enumerate(answers):
                answer.append(self._best(text))
        return answers

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, text, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, text, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, text
        if api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not decode")

    def _best(self, row: int) -> int:
        logits = api.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


@api.llama_log_callback
def _silent(level: int, text: bytes, user: int) -> None:
    pass
