import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from shenhong.corpus.pack import best_fit, pack, render, rows
from shenhong.errors import DataError
from shenhong.tokenizer import TokenizerSettings
from shenhong.tokenizer.tokenizer import train

CHARACTERS = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 200))
TOKENIZER = train(
    [CHARACTERS * 3, "hello world, " * 30],
    TokenizerSettings(vocab_size=448, isolate_ideographs=True),
)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300))
@settings(max_examples=150, deadline=None)
def test_every_piece_has_its_place(lengths):
    row, column = best_fit(np.array(lengths), 64)
    taken = np.zeros((row.max() + 1, 64), int)
    for r, c, length in zip(row, column, lengths, strict=True):
        assert c + length <= 64
        taken[r, c : c + length] += 1
    assert taken.max() == 1
    filled = taken.sum(1)
    assert (filled > 0).all()
    assert (filled[:-1] + filled[1:] > 64).all()  # two neighbouring rows never fit into one


def test_poems_fill_rows():
    lengths = np.random.default_rng(0).integers(30, 90, 5000)
    row, _ = best_fit(lengths, 512)
    assert lengths.sum() / ((row.max() + 1) * 512) > 0.995


document = st.tuples(
    st.text(CHARACTERS + "hello ，", max_size=8), st.text(CHARACTERS + "hello 。，", max_size=60)
)


@given(st.lists(document, min_size=1, max_size=20), st.integers(8, 40))
@settings(max_examples=100, deadline=None)
def test_rows_hold_every_document(documents, width):
    t = TOKENIZER
    prompts, texts = [d[0] for d in documents], [d[1] for d in documents]
    flat, counted, offsets = render(prompts, texts, t)
    expected = []
    for n, (prompt, text) in enumerate(documents):
        head = t.encode_prompt(prompt) if prompt else [t.bos_id]
        whole = [*head, *t.encode(text), t.eos_id]
        assert flat[offsets[n] : offsets[n + 1]].tolist() == whole
        assert counted[offsets[n] : offsets[n + 1]].tolist() == [0] * len(head) + [1] * (
            len(whole) - len(head)
        )
        pieces = [whole[:width]]
        pieces += [
            [t.bos_id, *whole[i : i + width - 1]] for i in range(width, len(whole), width - 1)
        ]
        expected += pieces
    tokens, counts, starts = rows(flat, counted, offsets, width, t)
    assert ((tokens == t.bos_id) == (starts == 1)).all()
    assert tokens.dtype == np.uint16 and counts.sum() == counted.sum()
    assert not counts[(tokens == t.bos_id) | (tokens == t.pad_id)].any()
    found = []
    for row in tokens.tolist():
        for token in row:
            if token == t.bos_id:
                found.append([])
            if token != t.pad_id:
                found[-1].append(token)
    assert sorted(found) == sorted(expected)


def test_pack_writes_what_training_reads(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer")
    table = pa.table({"id": ["a", "b"], "prompt": ["五", ""], "text": ["一丁丂七，", "hello"]})
    for name in ("train", "valid", "test"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    facts = pack(tmp_path, tmp_path / "tokenizer", tmp_path / "tokens", 32, lambda line: None)
    with safe_open(tmp_path / "tokens" / "train.safetensors", "np") as file:
        assert file.metadata()["characters"] == "10"
        assert file.get_tensor("tokens").shape == file.get_tensor("counted").shape == (1, 32)
        assert int(file.get_tensor("counted").sum()) == facts["train"]["counted"]
    assert {p.name for p in (tmp_path / "tokens").iterdir()} == {
        "train.safetensors",
        "valid.safetensors",
        "test.safetensors",
    }
    (tmp_path / "valid.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"valid\.parquet"):
        pack(tmp_path, tmp_path / "tokenizer", tmp_path / "tokens", 32, lambda line: None)
