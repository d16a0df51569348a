"""Fill in card.md, the model card: README.md of an exported folder."""

import json
import math
import re
import shlex
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.export.transformers_folder import takes_pipeline_default


@dataclass(frozen=True)
class CardFacts:
    """The facts of a card; None and empty mean unknown."""

    name: str
    model: ModelConfig
    wordpiece: bool  # whether BertTokenizer reads the folder
    prompt: str  # the example, in the language of the corpus; not empty
    language: str | None = None  # ISO 639-1 code
    license: str | None = None  # identifier of the Hugging Face hub
    datasets: tuple[str, ...] = ()  # names on the Hugging Face hub
    hardware: str | None = None
    dtype: str = "float32"  # the dtype of the stored weights
    gguf: bool = False  # whether there is a model.gguf
    gguf_remarks: str = ""  # Markdown
    bos_id: int | None = None  # the token that begins a document
    extra: str | None = None  # a section in Markdown
    trained_here: bool = True  # False: imported, and not trained since
    sources: tuple[str, ...] = ()  # names of corpus files
    documents: int | None = None  # in the training splits, as are tokens and characters
    tokens: int | None = None
    characters: int | None = None
    mixture: tuple[tuple[str, float], ...] = ()  # names of datasets and their weights
    parameters: int | None = None
    seq_length: int | None = None
    prompt_separator: float = 0.0  # share of the training segments with an end token inside
    steps: int | None = None
    tokens_trained: int | None = None
    batch_rows: int | None = None  # rows of seq_length tokens an optimizer step
    optimizer: str | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    growth: str | None = None  # what the first steps trained
    averaged: str | None = None  # the steps of the checkpoints whose mean the weights are
    training_loss: float | None = None  # nats a token, as is validation_loss
    validation_loss: float | None = None
    bits_per_character: float | None = None


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md, Markdown under a YAML header."""
    model = facts.model
    # For `max_length` transformers 4.57 wants `truncation`; for `max_new_tokens` 5 warns if `max_length` is exported.
    few = f"max_length={min(100, model.n_positions)}, truncation=True"
    length = "max_new_tokens=100" if takes_pipeline_default(model) else few
    perplexity = None if facts.validation_loss is None else math.exp(min(facts.validation_loss, 700.0))
    values = {
        **vars(facts),
        "name": _line(facts.name),
        "language": facts.language and _yaml(facts.language),
        "license": facts.license and _yaml(facts.license),
        "datasets": f"[{', '.join(map(_yaml, facts.datasets))}]" if facts.datasets else None,
        "hardware": facts.hardware and _line(facts.hardware),
        "quoted_prompt": _yaml(facts.prompt),
        "arguments": f"{json.dumps(facts.prompt, ensure_ascii=False)}, {length}, do_sample=True",
        "size": f" with {facts.parameters:,} parameters" if facts.parameters else "",
        "made": "pre-trained with gpt2_flax in JAX" if facts.trained_here else "converted by gpt2_flax",
        "stored": "" if facts.dtype == "float32" else f", in {facts.dtype}",
        "positions": model.n_positions,
        "ends_at_separator": facts.wordpiece and not facts.prompt_separator,
        "continues_separator": facts.wordpiece and facts.prompt_separator > 0,
        "gguf_command": _gguf_command(facts),
        "gguf_limit": facts.gguf and not facts.wordpiece and model.n_positions % 256 != 0,
        "data": _data(facts),
        "architecture": f"GPT-2: {model.n_layer} layers, width {model.n_embd}, {model.n_head} heads"
        + ("" if model.tie_word_embeddings else ", a head of its own"),
        "vocabulary": model.vocab_size,
        "dropout": f"{model.embd_pdrop}, {model.attn_pdrop}, {model.resid_pdrop}",
        "batch_tokens": facts.batch_rows and facts.seq_length and facts.batch_rows * facts.seq_length,
        "validation_perplexity": perplexity,
        "extra": facts.extra and facts.extra.strip(),
    }
    return _filled(Path(__file__).with_name("card.md").read_text(encoding="utf-8"), values)


def _filled(template: str, values: dict[str, Any]) -> str:
    """Fill in `{name}`; leave out `if` blocks with a false value, and lines with a value that is None."""
    block = re.compile(r"<!-- if (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
    lines = block.sub(lambda found: found[2] if values[found[1]] else "", template).splitlines()
    names = ([name for _, name, _, _ in string.Formatter().parse(line) if name] for line in lines)
    known = (line for line, used in zip(lines, names, strict=True) if all(values[name] is not None for name in used))
    return "".join(f"{line.format_map(values)}\n" for line in known)


def _gguf_command(facts: CardFacts) -> str:
    tokens = min(100, facts.model.n_positions // 2)  # leaves room for a prompt
    if not facts.wordpiece:
        return f"llama-completion -m model.gguf -no-cnv -n {tokens} -p {shlex.quote(facts.prompt)}"
    request = json.dumps({"prompt": [facts.bos_id, facts.prompt], "n_predict": tokens}, ensure_ascii=False)
    return f"""\
llama-server -m model.gguf    # and when it listens, in another shell:
curl http://127.0.0.1:8080/completion -d {shlex.quote(request)}"""


def _data(facts: CardFacts) -> str:
    counts = ((facts.documents, "documents"), (facts.tokens, "tokens"), (facts.characters, "characters"))
    amount = ", ".join(f"{count:,} {unit}" for count, unit in counts if count is not None)
    sources = ", ".join(f"`{_line(source)}`" for source in facts.sources)
    text = " of ".join(filter(None, (amount, sources)))
    if len(facts.mixture) > 1:
        total = sum(weight for _, weight in facts.mixture)
        shares = ", ".join(f"{weight / total:.1%} `{_line(name)}`" for name, weight in facts.mixture)
        text = ". ".join(filter(None, (text, f"Rows were mixed from {shares}")))
    return text


def _line(text: str) -> str:
    """Return `text` as part of a line or of a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _yaml(text: str) -> str:
    """Return `text` as a quoted YAML scalar: a JSON string with line separators and the like escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    escaped = (c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}" for c in quoted)
    return "".join(escaped)
