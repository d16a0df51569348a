"""Texts to test tokenizers with."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs real text")

TEXTS = [
    "今天天气很好,我们去公园吧。今天晚上再说，好不好？",
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "新华社北京１２月３１日电 GPT-2 模型 iPhone 15 Pro,2024年。",
    "naïve café déjà vu — “引号”……《书名》· 你好 world!",
] * 5
NAMES = ["<s>", "</s>", "<unk>", "<pad>", "<0x41>", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "<|endoftext|>"]
HOSTILE = "[CLS]你[SEP] [PAD][UNK] <s>x</s> <unk><pad> <|endoftext|> [MASK]"

_COMMON = "的一是不了今天 thequickbrown,.!?，。　１２３éï[]#<>s\t\r\n\u2028\ufeff\u200b\x00▁"
UNICODE = st.lists(
    st.one_of(
        st.characters(codec="utf-8"),  # of every plane, but for surrogates
        st.sampled_from([*_COMMON, *NAMES, "  "]),
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    ),
    max_size=60,
).map("".join)


def real_lines(count: int) -> list[str]:
    """Return the first lines of two corpora, including blank lines."""
    names = ("CLUECorpusSmall_sampled.txt", "news-commentary-v13-en-zh_sampled.txt")
    return [line for name in names for line in (DATA / name).read_bytes().decode().split("\n")[: count // 2]]


def ids_of(tokenizer, text: str) -> list[int]:
    """Return the ids of one text, after checking their dtype."""
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == (np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    return ids.tolist()
