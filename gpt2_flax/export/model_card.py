"""The model card, README.md of an exported folder: what the model is, how it was made, how to use it.

It says what is known and leaves out what is not; nothing is asked for but the architecture.
"""

import json
import math
import shlex
from dataclasses import dataclass

from gpt2_flax.config import ModelConfig
from gpt2_flax.export.transformers_folder import takes_pipeline_default


@dataclass(frozen=True)
class CardFacts:
    """What a card can say; None and empty mean unknown."""

    name: str
    model: ModelConfig
    wordpiece: bool  # whether BertTokenizer reads the folder
    prompt: str  # shown as an example, in the corpus' language; not empty
    language: str | None = None  # ISO 639-1 code
    license: str | None = None  # identifier of the Hugging Face hub
    datasets: tuple[str, ...] = ()  # names on the Hugging Face hub
    hardware: str | None = None
    dtype: str = "float32"  # of the stored weights
    gguf: bool = False  # whether there is a model.gguf
    gguf_remarks: str = ""  # what must be known to use it, Markdown
    bos_id: int | None = None  # of the token that begins a document
    extra: str | None = None  # a section of its own, Markdown
    trained_here: bool = True  # False: taken in from elsewhere, and not trained since
    sources: tuple[str, ...] = ()  # names of corpus files
    documents: int | None = None  # of the training splits, as are tokens and characters
    tokens: int | None = None
    characters: int | None = None
    mixture: tuple[tuple[str, float], ...] = ()  # names of datasets and the weights they were read with
    parameters: int | None = None
    seq_length: int | None = None
    steps: int | None = None
    tokens_trained: int | None = None
    batch_rows: int | None = None  # rows of seq_length tokens an optimizer step
    optimizer: str | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    training_loss: float | None = None  # nats a token, as is validation_loss
    validation_loss: float | None = None
    bits_per_character: float | None = None


def model_card(facts: CardFacts) -> str:
    """Returns the text of README.md, Markdown under a YAML header."""
    title = f"# {_line(facts.name)}\n"
    parts = (_header(facts), title, _summary(facts), _usage(facts), _data(facts), _procedure(facts))
    extra = facts.extra and f"{facts.extra.strip()}\n"
    return "\n".join(part for part in (*parts, extra) if part)


def _header(facts: CardFacts) -> str:
    lines = [f"language: {_yaml(facts.language)}"] if facts.language else []
    lines += [f"license: {_yaml(facts.license)}"] if facts.license else []
    lines += ["datasets:", *(f"- {_yaml(name)}" for name in facts.datasets)] if facts.datasets else []
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2"]
    lines += ["widget:", f"- text: {_yaml(facts.prompt)}"]
    return "\n".join(("---", *lines, "---", ""))


def _summary(facts: CardFacts) -> str:
    size = f" with {facts.parameters:,} parameters" if facts.parameters else ""
    stored = "" if facts.dtype == "float32" else f", in {facts.dtype}"
    made = "pre-trained with gpt2_flax in JAX" if facts.trained_here else "converted by gpt2_flax"
    return (
        f"A GPT-2 language model{size}, {made} and stored for `transformers`{stored}.\n"
        f"It continues a text, up to {facts.model.n_positions:,} tokens in all. It was not taught to follow "
        "instructions, and it repeats the errors and prejudices of what it has read.\n"
    )


def _usage(facts: CardFacts) -> str:
    # Of `max_length` transformers 4.57 wants `truncation`; of `max_new_tokens` 5 warns where `max_length` is exported.
    few = f"max_length={min(100, facts.model.n_positions)}, truncation=True"
    length = "max_new_tokens=100" if takes_pipeline_default(facts.model) else few
    arguments = f"{json.dumps(facts.prompt, ensure_ascii=False)}, {length}, do_sample=True"
    text = f"""## How to use it

```python
from transformers import pipeline

folder = "."  # this folder, or its name on the Hugging Face hub
generate = pipeline("text-generation", folder)
print(generate({arguments})[0]["generated_text"])
```
"""
    text += _bert_usage(arguments) if facts.wordpiece else ""
    return text + _gguf_usage(facts) if facts.gguf else text


def _bert_usage(arguments: str) -> str:
    return f"""
The vocabulary is that of a BERT tokenizer, so these classes work too:

```python
from transformers import BertTokenizer, GPT2LMHeadModel, TextGenerationPipeline

tokenizer = BertTokenizer.from_pretrained(folder)
model = GPT2LMHeadModel.from_pretrained(folder)
generate = TextGenerationPipeline(model, tokenizer)
print(generate({arguments})[0]["generated_text"])
```

They give other text, though: `BertTokenizer` puts `[SEP]`, the end of a document, behind the prompt, and the model goes
on from there as if a new document began. `pipeline` above and `AutoTokenizer` do not, and they leave out the blanks
between Chinese characters. Prefer them.
"""


def _gguf_usage(facts: CardFacts) -> str:
    prompt, positions = facts.prompt, facts.model.n_positions
    tokens = min(100, positions // 2)  # so that a prompt has room too
    if facts.wordpiece:
        request = json.dumps({"prompt": [facts.bos_id, prompt], "n_predict": tokens}, ensure_ascii=False)
        commands = f"""\
llama-server -m model.gguf    # and when it listens, in another shell:
curl http://127.0.0.1:8080/completion -d {shlex.quote(request)}"""
    else:
        commands = f"llama-completion -m model.gguf -no-cnv -n {tokens} -p {shlex.quote(prompt)}"
    remarks = facts.gguf_remarks and f"\n{facts.gguf_remarks}"
    if positions % 256 and not facts.wordpiece:
        remarks += f"""
The model has {positions:,} positions. llama.cpp rounds that up to a multiple of 256 and ends with a failed assertion
when a text gets there, so keep prompt and `-n` together below it.
"""
    return f"""
`model.gguf` is the same model for llama.cpp:

```sh
{commands}
```
{remarks}"""


def _data(facts: CardFacts) -> str:
    counts = ((facts.documents, "documents"), (facts.tokens, "tokens"), (facts.characters, "characters"))
    amount = ", ".join(f"{count:,} {unit}" for count, unit in counts if count is not None)
    sources = ", ".join(f"`{_line(source)}`" for source in facts.sources)
    text = " of ".join(part for part in (amount, sources) if part)
    if len(facts.mixture) > 1:
        total = sum(weight for _, weight in facts.mixture)
        shares = ", ".join(f"{weight / total:.1%} `{_line(name)}`" for name, weight in facts.mixture)
        text = ". ".join(part for part in (text, f"Rows were mixed from {shares}") if part)
    return f"## Training data\n\n{text}.\n" if text else ""


def _procedure(facts: CardFacts) -> str:
    model = facts.model
    architecture = f"GPT-2: {model.n_layer} layers, width {model.n_embd}, {model.n_head} heads"
    architecture += "" if model.tie_word_embeddings else ", a head of its own"
    perplexity = None if facts.validation_loss is None else math.exp(min(facts.validation_loss, 700.0))
    batch = facts.batch_rows and f"{facts.batch_rows:,} rows" + (
        f" ({facts.batch_rows * facts.seq_length:,} tokens)" if facts.seq_length else ""
    )
    rows = (
        ("architecture", architecture),
        ("vocabulary", f"{model.vocab_size:,} tokens" if model.vocab_size else None),
        ("parameters", facts.parameters and f"{facts.parameters:,}"),
        ("dropout (embedding, attention, residual)", f"{model.embd_pdrop}, {model.attn_pdrop}, {model.resid_pdrop}"),
        ("sequence length", facts.seq_length and f"{facts.seq_length:,} tokens"),
        ("steps", facts.steps and f"{facts.steps:,}"),
        ("tokens trained on", facts.tokens_trained and f"{facts.tokens_trained:,}"),
        ("batch", batch),
        ("optimizer", facts.optimizer),
        ("learning rate", facts.learning_rate and f"{facts.learning_rate:g}"),
        ("schedule", facts.schedule),
        ("hardware", facts.hardware),
        ("training loss", _number(facts.training_loss)),
        ("validation loss", _number(facts.validation_loss)),
        ("validation perplexity", _number(perplexity)),
        ("validation bits per character", _number(facts.bits_per_character)),
    )
    lines = [f"| {name} | {_line(value)} |" for name, value in rows if value]
    return "\n".join(("## Training procedure", "", "| | |", "|---|---|", *lines, ""))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _line(text: str) -> str:
    """`text` as part of a line or a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _yaml(text: str) -> str:
    """`text` as a quoted YAML scalar: a JSON string is one once line separators and the like are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    escaped = (c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}" for c in quoted)
    return "".join(escaped)
