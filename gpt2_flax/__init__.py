"""Pre-train GPT-2 in JAX on your own text and hand it over in `transformers` format."""

__version__ = "0.2.0"
