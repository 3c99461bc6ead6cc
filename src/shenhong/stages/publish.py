"""model: the finished Hugging Face folder, from the last checkpoint of a training, or from its best one.

A model is published with a chat template only if it has learnt to answer: what it goes on from had one, or its text has
prompts. Without one every engine, ours among them, goes on with the bare text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shenhong.stages.base import Context, Stage

if TYPE_CHECKING:
    from shenhong.model import ModelConfig
    from shenhong.stages.training import Train
    from shenhong.tokenizer import Tokenizer


class Publish(Stage):
    follows = ()

    def __init__(self, name: str, output: Path, train: Train) -> None:
        super().__init__(name, output, (train.name,))
        self.train = train

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        from shenhong.errors import CheckpointError
        from shenhong.export import save_model
        from shenhong.model import Decoder
        from shenhong.runs.files import digest
        from shenhong.train import best, checkpoint

        checkpoints = context.path / self.train.output
        found = checkpoint.load_newest(checkpoints)
        if found is None:
            raise CheckpointError(f"{checkpoints} is empty; remove the run folder and train again")
        progress, weights, _ = found
        step = progress.step
        if progress.worse:  # at its last look
            step, weights = best.weights(checkpoints)
            context.say(
                f"held-out text is clearly better foretold after step {step} than after step {progress.step}: "
                f"the finished model is the one of step {step}"
            )
        decoder = Decoder(architecture(context))
        decoder.load_state_dict(weights)
        folder = context.path / self.output
        save_model(decoder, folder, self._tokenizer(context))
        return {
            "step": step,
            **({"last_step": progress.step} if step != progress.step else {}),
            "sha256": digest(folder / "model.safetensors"),
            "torch": torch.__version__,
        }

    def _tokenizer(self, context: Context) -> Path | Tokenizer:
        """The run's, with the chat template that the model has learnt, if any; a foreign one as it came."""
        from shenhong.corpus.pack import has_prompts
        from shenhong.tokenizer import Tokenizer
        from shenhong.tokenizer.tokenizer import CHAT_TEMPLATE

        step, folder = self.train.step, context.path / "tokenizer"
        tokenizer = Tokenizer.load(folder)
        before = folder if context.recipe.init else None
        if step.before is not None:
            before = context.path / step.before.model
        learnt = Tokenizer.load(before).special.template if before else None
        corpus = context.path / step.corpus_folder
        if learnt is None and (step.corpus.conversations or has_prompts(corpus)):
            learnt = CHAT_TEMPLATE
        if not tokenizer.own or learnt == tokenizer.special.template:
            return folder
        tokenizer.special = tokenizer.special._replace(template=learnt)
        return tokenizer


def architecture(context: Context) -> ModelConfig:
    """The recipe's model with this run's tokenizer, or the shape of the model that training began from."""
    from shenhong.stages.init_from import architecture as taken_over
    from shenhong.tokenizer import Tokenizer

    if context.recipe.init:
        return taken_over(context.path)
    tokenizer = Tokenizer.load(context.path / "tokenizer")
    return context.recipe.architecture(
        tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
