"""Figures that say how well a model predicts a text."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """Sums over `tokens` predicted tokens, and figures from them; those of several splits add up."""

    nats: float = 0.0
    correct: float = 0.0
    """Tokens whose most likely prediction was right."""
    tokens: int = 0
    characters: float | None = 0.0
    """Those of the text that the tokens stand for, None when the dataset does not know."""

    def __add__(self, other: "Evaluation") -> "Evaluation":
        known = self.characters is not None and other.characters is not None
        characters = self.characters + other.characters if known else None
        return Evaluation(self.nats + other.nats, self.correct + other.correct, self.tokens + other.tokens, characters)

    def __str__(self) -> str:
        bits = "-" if self.bits_per_character is None else f"{self.bits_per_character:.4f}"
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.2f}  bits/character {bits}  "
            f"accuracy {self.accuracy:.1%}"
        )

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.tokens)

    @property
    def bits_per_character(self) -> float | None:
        """Comparable between vocabularies: all bits spent, end of document included, over the characters of the text.

        None when these are not known, or none.
        """
        return self.nats / math.log(2) / self.characters if self.characters else None
