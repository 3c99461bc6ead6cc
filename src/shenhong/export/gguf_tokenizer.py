"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2") whose way of splitting text is only given by name.

tokenizer.ggml.tokens, token_type, merges     vocabulary, kinds of tokens, merges "a b" in their order
tokenizer.ggml.pre                            the name of the splits; each known one is spelled out below
tokenizer.ggml.{bos,eos,padding,eot,eom}_token_id, add_bos_token; tokenizer.chat_template
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from shenhong.errors import ModelError
from shenhong.export.gguf_file import GgufFile
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import Special, deepseek_v3_splits, whole

_Kind = gguf.TokenType
Splits = pre_tokenizers.PreTokenizer
T = TypeVar("T", str, int)


class _Pre(NamedTuple):
    """What a name in tokenizer.ggml.pre stands for in the tokenizer the file was made from."""

    splits: Callable[[], Splits]
    begins: bool = False  # whether a text begins with bos where the file does not say
    whole_first: bool = False  # a piece that is a token needs no merges
    composes: bool = False  # text is brought to NFC first


def _gpt2(digits: bool) -> Splits:
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if not digits:
        return rest
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), rest])


def _words(digits: str) -> Splits:
    """The splits of GPT-4's tokenizer, which Llama 3 and Qwen took over."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, plain])


_PRE = {
    "gpt-2": _Pre(lambda: _gpt2(digits=False)),
    "smollm": _Pre(lambda: _gpt2(digits=True)),
    "starcoder": _Pre(lambda: _gpt2(digits=True)),
    "llama-bpe": _Pre(lambda: _words(r"\p{N}{1,3}"), begins=True, whole_first=True),
    "qwen2": _Pre(lambda: _words(r"\p{N}"), composes=True),
    "deepseek-v3": _Pre(deepseek_v3_splits, begins=True),
}
# Tokens that end an answer in the templates of today, whatever the file calls its eos.
_ENDS = ("<|im_end|>", "<|eot_id|>")


def name_of_splits(values: dict[str, Any]) -> str | None:
    """What a byte-level BPE's tokenizer.json would be called in tokenizer.ggml.pre; None where no name fits."""
    model, normalizer = values["model"], values["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("end_of_word_suffix"):
        return None
    for name, pre in _PRE.items():
        composes = {"type": "NFC"} if pre.composes else None
        splits = json.loads(pre.splits().__getstate__())
        if (
            _that_splits(splits) == _that_splits(values["pre_tokenizer"])
            and normalizer == composes
            and bool(model.get("ignore_merges")) == pre.whole_first
        ):
            return name
    return None


def _that_splits(part: Any) -> Any:
    """A pre-tokenizer without what changes the offsets of pieces alone."""
    if isinstance(part, list):
        return [_that_splits(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {name: _that_splits(value) for name, value in part.items() if name != "trim_offsets"}


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer as an object of the `tokenizers` library that gives the ids of the original.

    Error: ModelError where the file has none, another kind, or one that contradicts itself.
    """
    with whole(f"{file.path}: the tokenizer", "download the file again"):
        try:
            return _built(file)
        except ModelError as error:
            raise ModelError(f"{file.path}: {error}") from None


def _built(file: GgufFile) -> Tokenizer:
    kind, name = (_text(file, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2":
        raise ModelError(f"tokenizer {kind!r:.40}; only byte-level BPE (gpt2) is read")
    pre = _PRE.get(name or "")
    if pre is None:
        raise ModelError(f"tokenizer splits {name!r:.40}; those known are {', '.join(_PRE)}")
    tokens = _list(file, "tokens", str)
    types = _list(file, "token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _list(file, "merges", str)]
    if not tokens or len(types) != len(tokens) or any(len(pair) != 2 for pair in merges):
        raise ModelError("tokens, their types and merges do not fit together")
    used = [i for i, type in enumerate(types) if type != _Kind.UNUSED]
    vocabulary = {tokens[i]: i for i in used}
    if len(vocabulary) != len(used):
        raise ModelError("two tokens of the vocabulary are the same")
    backend = Backend(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_first)  # type: ignore[arg-type]
    )
    backend.pre_tokenizer = pre.splits()
    backend.decoder = decoders.ByteLevel()
    if pre.composes:
        backend.normalizer = normalizers.NFC()
    # In the order of their ids, as the library numbers those it meets anew.
    backend.add_tokens(
        [
            AddedToken(tokens[i], special=types[i] == _Kind.CONTROL, normalized=False)
            for i in used
            if types[i] in (_Kind.CONTROL, _Kind.USER_DEFINED) and tokens[i]
        ]
    )
    names = ("bos", "eos", "padding", "eot", "eom")
    bos, eos, pad, eot, eom = (_token(file, tokens, key) for key in names)
    begins = file.metadata.get("tokenizer.ggml.add_bos_token", pre.begins)
    if begins is True and bos in vocabulary:
        backend.post_processor = _first(bos, vocabulary[bos])
    ends = [vocabulary[end] for end in dict.fromkeys((*_ENDS, eot, eom)) if end in vocabulary]
    template = _text(file, "tokenizer.chat_template")
    return Tokenizer(backend, special=Special(bos, eos, pad, begins is True, template, tuple(ends)))


def _first(bos: str, number: int) -> processors.PostProcessor:
    """Puts ``bos`` before a text, whatever it is called: the library's own way to say it gives ":" and "$" a meaning."""
    name, text = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    other = {"Sequence": {"id": "B", "type_id": 0}}
    made = processors.TemplateProcessing()
    state = {
        "type": "TemplateProcessing",
        "single": [name, text],
        "pair": [name, text, name, other],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    made.__setstate__(json.dumps(state).encode())
    return made


def _text(file: GgufFile, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _list(file: GgufFile, name: str, kind: type[T]) -> list[T]:
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ModelError(
            f"metadata tokenizer.ggml.{name} is missing or not a list of {kind.__name__}"
        )
    return values  # type: ignore[return-value]


def _token(file: GgufFile, tokens: list[str], name: str) -> str | None:
    number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise ModelError(f"tokenizer.ggml.{name}_token_id is {number!r:.40}, not one of its tokens")
    return tokens[number]
