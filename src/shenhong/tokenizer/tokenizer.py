"""Byte-level BPE, saved as deepseek-v3's tokenizer is: pre-tokenizer, special tokens, chat template.

The pre-tokenizer of deepseek-v3 takes a run of Chinese as one piece, so ordinary training learns words.
With `isolate_ideographs` every ideograph is a piece of its own while merges are trained: then each
common character becomes one token, no merge ever crosses two characters, and the ids are the same under
the pre-tokenizer of deepseek-v3, which is the one saved (llama.cpp knows it by name, no patch needed).

Such a tokenizer is separable: a text of known characters is looked up in a table, a thousand times
faster than by merging. `encode_many` does that where it is exact, and falls back to the library for any
text with another character.

Legend: N texts, I ids of all texts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as _Backend

from shenhong.errors import DataError, ModelError, RequestError
from shenhong.runs.files import pointer
from shenhong.runs.regular import read_inside
from shenhong.tokenizer.normalise import IDEOGRAPH, normalise

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT)  # their ids are 0, 1, 2, 3, 4

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
)

# The three splits of deepseek-v3's tokenizer.json, in their order.
_DIGITS = r"\p{N}{1,3}"
_IDEOGRAPHS = "[一-龥぀-ゟ゠-ヿ]+"
_PIECES = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# While merges are trained: every ideograph by itself, also those outside deepseek-v3's range.
_SCRIPT = f"{IDEOGRAPH}\u3040-\u30ff"
_ONE_IDEOGRAPH = f"[{_SCRIPT}]"
_ONE = re.compile(_ONE_IDEOGRAPH)
_OTHERS = re.compile(f"[^{_SCRIPT}\\0]+")  # texts are joined by \\0 where this is used

NEVER = "(?!)"  # matches nothing: the pattern of a tokenizer without special tokens
# By these a step of the library writes something before a text: Metaspace, ByteLevel and Prepend.
NO_PREFIX = {"prepend_scheme": "never", "add_prefix_space": False, "prepend": ""}
MOST_GROWTH = (
    1024  # characters that a model's tokenizer may write in place of one; real ones write three
)


LEAST = 320  # entries of a vocabulary: all bytes, the special tokens, and some merges


class TokenizerSettings(BaseModel):
    """How the tokenizer is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(
        8192,
        ge=LEAST,
        le=262_144,
        multiple_of=64,
        description="entries of the vocabulary, special tokens and bytes included; multiple of 64. A small text gets as many as it yields",
    )
    isolate_ideographs: bool = Field(
        False, description="one token for each common Chinese character instead of words"
    )
    train_characters: int = Field(
        20_000_000,
        ge=1_000,
        description="characters of the training text that are read to train the merges",
    )


def deepseek_v3_splits(ideographs: str = _IDEOGRAPHS) -> pre_tokenizers.PreTokenizer:
    splits = (_DIGITS, ideographs, _PIECES)
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(texts: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """Train merges on the texts; fewer than asked for where the texts yield no more, in multiples of 64.

    Error: DataError when they are too few for any vocabulary.
    """
    limited = list(_limited(texts, settings.train_characters))
    backend = _Backend(models.BPE())
    backend.pre_tokenizer = deepseek_v3_splits(
        _ONE_IDEOGRAPH if settings.isolate_ideographs else _IDEOGRAPHS
    )
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        _condensed(limited) if settings.isolate_ideographs else limited, trainer
    )
    found = backend.get_vocab_size()
    if found < settings.vocab_size:
        if found < LEAST:
            raise DataError(
                f"the corpus yields {found} tokens, fewer than the {LEAST} of the smallest vocabulary; add text"
            )
        return train(limited, settings.model_copy(update={"vocab_size": found // 64 * 64}))
    backend.pre_tokenizer = deepseek_v3_splits()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
            ),
        ]
    )
    return Tokenizer(backend)


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def _condensed(texts: Iterable[str]) -> list[str]:
    """Texts that train the same merges in a tenth of the time.

    When every ideograph is a word, only how often each word occurs matters, and of that only the
    order: a word seen n times is written down 4 sqrt(n) times.
    """
    ideographs = np.zeros(0x110000, np.int64)
    others: Counter[str] = Counter()
    iterator = iter(texts)
    while some := list(itertools.islice(iterator, 8192)):
        whole = "\0".join(some)
        codes = np.frombuffer(whole.encode("utf-32-le"), np.uint32)
        ideographs += np.bincount(codes, minlength=len(ideographs))
        others.update(_OTHERS.findall(whole))
    counts = Counter(
        {chr(c): int(ideographs[c]) for c in np.flatnonzero(ideographs) if _ONE.match(chr(c))}
    )
    counts.update(others)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return list(itertools.chain.from_iterable([word] * math.isqrt(16 * n) for word, n in ordered))


class Special(NamedTuple):
    """What a tokenizer says of itself beside its vocabulary; names of tokens, None for what it lacks."""

    bos: str | None = BOS
    eos: str | None = EOS
    pad: str | None = PAD
    begins: bool = True  # whether a text begins with bos
    template: str | None = CHAT_TEMPLATE
    ends: tuple[int, ...] = ()  # further tokens that end an answer


class Tokenizer:
    """A tokenizer, ours or one that came with a model. Ids are below `vocab_size`.

    `own`: it has the special tokens above, so `encode_prompt` knows how a message is asked; the others' template does.
    """

    def __init__(
        self, backend: _Backend, simplify: bool = False, special: Special | None = None
    ) -> None:
        self.backend = backend
        self.simplify = simplify  # the corpus was simplified, so messages are too
        self.own = all(backend.token_to_id(token) is not None for token in SPECIAL)
        if special is None:
            lacking = [token for token in SPECIAL if backend.token_to_id(token) is None]
            if lacking:
                raise ModelError(f"the tokenizer lacks {lacking[0]}; run the tokenizer stage again")
            special = Special()
        self.special = special
        bos, eos, pad = (
            None if name is None else backend.token_to_id(name)
            for name in (special.bos, special.eos, special.pad)
        )
        # What has no bos or pad is never asked for it; eos stands there so that all are tokens.
        self.eos_id = eos or 0
        self.bos_id = self.eos_id if bos is None else bos
        self.pad_id = self.eos_id if pad is None else pad
        self.begin = [] if bos is None or not special.begins else [bos]  # of a text
        self.ends = frozenset(special.ends) | ({eos} if eos is not None else set())
        self.user_id = backend.token_to_id(USER) or 0
        self.assistant_id = backend.token_to_id(ASSISTANT) or 0
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self._table: np.ndarray | None = None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a folder with tokenizer.json. Error: ModelError when a file of it is missing or damaged."""
        folder = Path(folder)
        path, remedy = folder / "tokenizer.json", _remedy(folder)
        try:
            text = read_inside(path).decode("utf-8")
        except FileNotFoundError:
            raise ModelError(f"no tokenizer at {path}; {remedy}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot read {path} ({error}); {remedy}") from None
        with whole(str(path), remedy):
            values = json.loads(text)
            # The library cuts bytes by the length of this prefix, and aborts the process in mid-character.
            if values["model"].get("continuing_subword_prefix"):
                raise ModelError(f"{path}: a continuing_subword_prefix is not read")
            _check_growth(values, path)
            values |= dict.fromkeys(("truncation", "padding"))  # a text is read whole, as it is
            backend = _Backend.from_str(json.dumps(values))
            config = read_object(folder / "tokenizer_config.json")
            with whole(str(folder / "tokenizer_config.json"), remedy):
                backend.add_tokens(_added(backend, config))
            return cls(backend, bool(config.get("simplify")), _special(folder, backend, config))

    def save(self, folder: Path) -> None:
        """tokenizer.json, tokenizer_config.json and, where there is a template, chat_template.jinja, as transformers reads
        them.

        Error: OSError when the disk is full; callers write the folder whole or not at all.
        """
        folder = Path(folder)
        special = self.special
        names = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: token for name, token in names.items() if token is not None},
            "add_bos_token": special.begins,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,
        }
        contents = {"tokenizer.json": self.backend.to_str(pretty=False)}
        if special.template is not None:
            config["chat_template"] = contents["chat_template.jinja"] = special.template
        if self.simplify:
            config["simplify"] = True
        contents["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no BOS. The names of special tokens in it are ordinary text.

        Error: RequestError when it is not valid Unicode.
        """
        with _readable():
            if not self.own:
                return self._merged([text])[0].tolist()
            return self.encode_many([text])[0].tolist() if text else []

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text that goes on from other text: without the mark some tokenizers write before a first word."""
        return self.encode(text) if self.own else self._by(self._inside, text)  # ours write none

    def encode_rendered(self, text: str, marked: bool = False) -> list[int]:
        """Ids of what a chat template wrote, as the library cuts a text at its special tokens.

        Every name of a special token in it is that token. `marked`: only those with `mark` behind their first character
        are, all others are text, and the marks are taken out.
        Error: RequestError when it is not valid Unicode.
        """
        if not marked:
            return self._by(self.backend, text)
        return self._by(self._bare, self._told(text).replace(self.mark, ""))

    def _told(self, text: str) -> str:
        """With the secret of each name that has the mark. Names are compared where a mark stands and nowhere else."""
        pieces, last, at = [], 0, text.find(self.mark)
        while at >= 0:
            name = self._with_mark.match(text, at - 1) if at > last else None
            if name:
                secret = self._secret[name[0].replace(self.mark, "", 1)]
                pieces += [text[last : at - 1], secret]
                last = name.end()
            at = text.find(self.mark, last if name else at + 1)
        return "".join([*pieces, text[last:]])

    def _by(self, backend: _Backend, text: str) -> list[int]:
        """Ids by the library or one of its variants here. Only its batches let other threads run meanwhile."""
        with _readable():
            (found,) = backend.encode_batch_fast([text], add_special_tokens=False)
        return found.ids if backend is self.backend else self._translated(found.ids)

    def _translated(self, ids: list[int]) -> list[int]:
        """From the ids of `_bare` to ours."""
        return [self._meant.get(id, id) for id in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids without special tokens; bytes that are no character become U+FFFD."""
        text, run = "", list[int]()
        for id in ids:
            if id in self.literal:
                text += self.backend.decode(run, skip_special_tokens=True) + self.literal[id]
                run = []
            else:
                run.append(id)
        return text + self.backend.decode(run, skip_special_tokens=True)

    def encode_prompt(self, message: str) -> list[int]:
        """Ids of our chat template for one user message, up to where the answer begins.

        Of a model without our special tokens: those of the bare text, to be continued.
        """
        if not self.own:
            return [*self.begin, *self.encode(message)]
        message = normalise(message) if self.simplify else message
        return [self.bos_id, self.user_id, *self.encode(message), self.assistant_id]

    def encode_many(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [I] (int32) of all texts, and offsets [N+1]: text n has ids[offsets[n]:offsets[n+1]]."""
        if self._table is None:
            self._table = self._characters()
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
        ids = self._table[codes]
        bounds = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
        unknown = np.add.reduceat(np.append(ids < 0, False), bounds[:-1]) if texts else np.empty(0)
        unknown = np.where(bounds[:-1] == bounds[1:], 0, unknown)
        slow = np.flatnonzero(unknown)
        if not len(slow):
            return ids, bounds
        found = self._merged([texts[n] for n in slow])
        pieces: list[np.ndarray] = []
        lengths = np.diff(bounds)
        last = 0
        for n, piece in zip(slow.tolist(), found, strict=True):
            pieces += [ids[bounds[last] : bounds[n]], piece]
            lengths[n] = len(piece)
            last = n + 1
        pieces.append(ids[bounds[last] :])
        return np.concatenate(pieces), np.concatenate([[0], np.cumsum(lengths)])

    def _merged(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text by the library. Names of special tokens in a text must not become them."""
        with _readable():
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        result = [np.array(item.ids, np.int32) for item in encoded]
        marked = [n for n, ids in enumerate(result) if self._marked[ids].any()]
        if marked:
            with _readable():
                bare = self._bare.encode_batch_fast(
                    [texts[n] for n in marked], add_special_tokens=False
                )
            for n, item in zip(marked, bare, strict=True):
                result[n] = np.array(self._translated(item.ids), np.int32)
        return result

    @functools.cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @functools.cached_property
    def _marked(self) -> np.ndarray:
        """[ids] bool: the special tokens, also those that are only special by their looks."""
        marked = np.zeros(self.vocab_size, bool)
        marked[[id for id, t in self._added.items() if t.special or t.content.startswith("<")]] = 1
        return marked

    @functools.cached_property
    def _secret(self) -> dict[str, str]:
        """To the name of each special token one that nobody can write."""
        return {
            token.content: f"{id}x{secrets.token_hex(16)}"
            for id, token in self._added.items()
            if self._marked[id] and token.content
        }

    @property
    def names(self) -> list[str]:
        """Of the special tokens, the longer first."""
        return sorted(self._secret, key=len, reverse=True)

    @functools.cached_property
    def mark(self) -> str:
        """What a chat template's own names of special tokens are told by; nobody can write it."""
        return secrets.token_hex(8)

    @functools.cached_property
    def _with_mark(self) -> re.Pattern[str]:
        """The names that have the mark behind their first character."""
        alone = {token.content for token in self._added.values() if token.single_word}
        found = []
        for name in self.names:
            written = re.escape(name[0]) + self.mark + re.escape(name[1:])
            found.append(rf"(?<!\w){written}(?!\w)" if name in alone else written)
        return re.compile("|".join(found) or NEVER)

    @functools.cached_property
    def _bare(self) -> _Backend:
        """The same tokenizer, but that it knows its special tokens by their secret names. Ids: see `_meant`."""
        values = json.loads(self.backend.to_str())
        for token in values["added_tokens"]:
            if secret := self._secret.get(token["content"]):
                token |= {"content": secret, "single_word": False}  # looked at where they are found
                # Where text is changed at its beginning, a name that is looked for behind that would not be found.
                token["normalized"] &= self.normalised(secret) == secret
        return _Backend.from_str(json.dumps(values))

    @functools.cached_property
    def _meant(self) -> dict[int, int]:
        """Ids of added tokens in `_bare` that are others here."""
        bare = self._bare.get_added_tokens_decoder().items()
        known = {self._secret.get(t.content, t.content): id for id, t in self._added.items()}
        return {id: known[token.content] for id, token in bare}

    def normalised(self, text: str) -> str:
        """As the library reads it, before it cuts it into words. Error: RequestError when it is not valid Unicode."""
        with _readable():
            text.encode()
            return self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text

    @functools.cached_property
    def _inside(self) -> _Backend:
        """`_bare` without what it writes before a text."""
        values = json.loads(self._bare.to_str())
        for step in (*_steps(values["normalizer"]), *_steps(values["pre_tokenizer"])):
            step |= {name: value for name, value in NO_PREFIX.items() if name in step}
        return _Backend.from_str(json.dumps(values))

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether tokens are spelled in GPT-2's alphabet of bytes."""
        decoder = json.loads(self.backend.to_str())["decoder"]
        return any(step["type"] == "ByteLevel" for step in _steps(decoder))

    @functools.cached_property
    def literal(self) -> dict[int, str]:
        """What added tokens write whose letters (ö, č) a byte-level decoder would take for bytes."""
        if not self.byte_level:
            return {}
        alphabet = set(byte_alphabet().values())
        return {
            id: token.content
            for id, token in self._added.items()
            if not token.special
            and not token.content.isascii()
            and alphabet.issuperset(token.content)
        }

    def _characters(self) -> np.ndarray:
        """For each code point the id of its token, or -1 where only merging can tell.

        A character has an entry when it is one token and can join no other: no token holds it together
        with another character or with a part of one.
        """
        table = np.full(0x110000, -1, np.int32)
        if not self.own:
            return table  # its splits and its alphabet may be of another kind
        byte_of = {c: b for b, c in byte_alphabet().items()}
        single: dict[str, int] = {}
        joined: set[str] = set()
        for token, number in self.backend.get_vocab(with_added_tokens=False).items():
            if token in SPECIAL:
                continue
            raw = bytes(byte_of[c] for c in token)
            text = raw.decode("utf-8", errors="replace")
            if len(text) == 1 and text != "\ufffd":
                single[text] = number
            elif "\ufffd" not in text:
                joined.update(text)
            elif sum(byte & 0xC0 != 0x80 for byte in raw[1:]) or _closes(raw):
                return table  # a token crosses two characters: nothing can be said of any
        for character, number in single.items():
            if character not in joined:
                table[ord(character)] = number
        table[ord("<")] = -1  # may begin the name of a special token
        return table


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Error: RequestError for text that is not valid Unicode, or that the model's own expressions give up on."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start + 1} is half of a surrogate pair; send valid Unicode text"
        ) from None
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # of Rust; no Exception, and nowhere to be imported from
            raise
        reason = (str(error).splitlines() or [""])[0][:120]
        raise RequestError(
            f"the model's tokenizer cannot read this text ({reason}); send another text"
        ) from None


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder of tokenizer.json, and those that are nested in it."""
    if step is not None:
        yield step
        for name in ("normalizers", "pretokenizers", "decoders"):
            for nested in step.get(name) or ():
                yield from _steps(nested)


def _check_growth(values: dict[str, Any], path: Path) -> None:
    """Error: ModelError where a file of some hundred characters makes a text of one character fill the memory."""
    growth = 1
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(values.get(part)):
            growth *= max(1, *(len(step.get(name) or "") for name in ("content", "prepend")))
    if growth > MOST_GROWTH:
        raise ModelError(
            f"{path}: its normalizers write {growth:,} characters in place of one, more than {MOST_GROWTH:,}"
        )


@contextlib.contextmanager
def whole(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever the library raises into a ModelError; where its Rust code panics that is no Exception.

    ``what`` is a file's path, or words.
    """
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ModelError(pointer(Path(what)) or f"{what} is damaged ({reason}); {remedy}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is not there. Error: ModelError."""
    with whole(str(path), _remedy(path.parent)):
        values = json.loads(read_inside(path)) if path.exists() else {}
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    return values


def _remedy(folder: Path) -> str:
    """A folder of a whole model came from elsewhere as often as from here."""
    if (folder / "config.json").exists():
        return "copy, download or export the model folder again"
    return "run the tokenizer stage again"


def _added(backend: _Backend, config: dict[str, Any]) -> list[AddedToken]:
    """What tokenizer_config.json says of added tokens otherwise than tokenizer.json: there transformers believes it."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")

    def facts(token: AddedToken) -> tuple[bool, ...]:
        return tuple(getattr(token, flag) for flag in flags)

    known = {t.content: facts(t) for t in backend.get_added_tokens_decoder().values()}
    said = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda one: int(one[0]))
    tokens = [
        AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})
        for _, token in said
    ]
    return [t for t in tokens if t.content and known.get(t.content) != facts(t)]


def _special(folder: Path, backend: _Backend, config: dict[str, Any]) -> Special:
    """As transformers reads it from tokenizer_config.json and the files beside it."""

    def name(of: str) -> str | None:
        said = config.get(of)
        said = said.get("content") if isinstance(said, dict) else said
        return said if isinstance(said, str) else None

    bos = name("bos_token")
    first = backend.encode("a").ids[:1]
    return Special(
        bos,
        name("eos_token"),
        name("pad_token"),
        bool(bos)
        and (bool(config.get("add_bos_token")) or first == [backend.token_to_id(bos or "")]),
        _template(folder, config),
        ends_of(folder),
    )


def ends_of(folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer: of generation_config.json, or where there is none of config.json. Error: ModelError."""
    own = folder / "generation_config.json"
    said = read_object(own if own.exists() else folder / "config.json").get("eos_token_id")
    said = said if isinstance(said, list) else [said]
    return tuple(i for i in said if type(i) is int and abs(i) < 1 << 31)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template, wherever a folder has it; of several by name the one that transformers takes.

    As there, "tool_use" serves where tools are offered and "default" otherwise; without a default, a template that says so.
    """
    given = config.get("chat_template") or read_object(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(given, list):  # in older folders
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
    named: dict[str, Any] = dict(given) if isinstance(given, dict) else {"default": given}
    with whole(str(folder / "chat_template.jinja"), _remedy(folder)):
        for path in (folder / "additional_chat_templates").glob("*.jinja"):
            named[path.stem] = _written(path, folder)
        if (path := folder / "chat_template.jinja").exists():
            named["default"] = _written(path, folder)
    named = {str(name): text for name, text in named.items() if isinstance(text, str)}
    if not named:
        return None
    without = f"its chat templates are called {', '.join(sorted(named))}, and none is the default; copy one to chat_template.jinja"
    if "default" not in named:
        named["default"] = f"{{{{ raise_exception({json.dumps(without)}) }}}}"
    if "tool_use" not in named:
        return named["default"]
    # Each begins on a line of its own and ends as a file of its own, so that jinja trims white space there as it would.
    tools, default = (text.removesuffix("\n") for text in (named["tool_use"], named["default"]))
    return "{% if tools %}\n" + tools + "{%+ else %}\n" + default + "{%+ endif %}"


def _written(path: Path, folder: Path) -> str:
    """A file of text, every line of which ends in a line feed, as in transformers."""
    return io.TextIOWrapper(io.BytesIO(read_inside(path, folder)), encoding="utf-8").read()


def _closes(raw: bytes) -> bool:
    """Whether a token of parts of characters holds the end of one and more after it."""
    if raw[0] & 0xC0 == 0x80:
        return len(raw) > 3
    need = 1 if raw[0] < 0x80 else 2 if raw[0] < 0xE0 else 3 if raw[0] < 0xF0 else 4
    return len(raw) > need


def byte_alphabet() -> dict[int, str]:
    """The printable character by which byte-level BPE writes each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


def build(
    corpus_dir: Path,
    out: Path,
    settings: TokenizerSettings,
    log: Callable[[str], None],
    simplify: bool = False,
) -> dict:
    """The tokenizer stage: train on the training split, save to `out`, return what was measured.

    `simplify`: the corpus was turned into simplified Chinese, and so shall messages be.

    Prompts are part of the training text. Errors: DataError (no corpus, too little text).
    """
    import pyarrow.parquet as pq

    path = Path(corpus_dir) / "train.parquet"
    try:
        table = pq.read_table(path, columns=["prompt", "text"])
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}); run the corpus stage again") from None
    texts = table["text"].to_pylist()
    prompts = [prompt for prompt in table["prompt"].to_pylist() if prompt]
    tokenizer = train(itertools.chain(texts, prompts), settings)
    if tokenizer.vocab_size < settings.vocab_size:
        log(
            f"the text yields no {settings.vocab_size:,} tokens: the vocabulary has {tokenizer.vocab_size:,} and not tokenizer.vocab_size {settings.vocab_size:,}"
        )
    tokenizer.simplify = simplify
    tokenizer.save(out)
    sample = texts[:: max(1, len(texts) // 20_000)]
    ids, _ = tokenizer.encode_many(sample)
    characters = sum(map(len, sample))
    counts = Counter("".join(sample))
    if tokenizer._table is None:
        tokenizer._table = tokenizer._characters()
    whole = sum(n for c, n in counts.items() if tokenizer._table[ord(c)] >= 0)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "tokens_per_character": round(len(ids) / max(characters, 1), 5),
        "characters_that_are_one_token": round(whole / max(characters, 1), 5),
    }
    line = f"tokenizer: {facts['vocab_size']} tokens, {facts['tokens_per_character']} per character"
    if settings.isolate_ideographs:  # what it is for
        line += f", {whole / max(characters, 1):.2%} of characters are one token"
    log(line)
    return facts
