"""A GPT-2 as UER-py computes it, in torch and written from its description: what imported models are compared with."""

import math

import torch
from torch import nn
from torch.nn import functional


class LayerNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        deviation = x.std(-1, keepdim=True, unbiased=True)
        return self.gamma * (x - x.mean(-1, keepdim=True)) / (deviation + 1e-6) + self.beta


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.linear_layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.final_linear = nn.Linear(width, width)

    def forward(self, x):
        rows, length, width = x.shape
        query, key, value = (
            layer(x).view(rows, length, self.heads, width // self.heads).transpose(1, 2) for layer in self.linear_layers
        )
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)
        scores = scores - 10000.0 * torch.ones(length, length).triu(1)
        mixed = torch.softmax(scores, -1) @ value
        return self.final_linear(mixed.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.linear_2(functional.gelu(self.linear_1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.layer_norm_1, self.self_attn = LayerNorm(width), Attention(width, heads)
        self.layer_norm_2, self.feed_forward = LayerNorm(width), FeedForward(width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm_1(x))
        return x + self.feed_forward(self.layer_norm_2(x))


class UerGpt2(nn.Module):
    """Its state dict has UER-py's names, of the embedding and of an output layer that is tied to it too."""

    def __init__(self, vocabulary: int, positions: int, layers: int, width: int, heads: int, tied: bool = True):
        super().__init__()
        self.embedding, self.encoder, self.target = nn.Module(), nn.Module(), nn.Module()
        for name, rows in (("word", vocabulary), ("pos", positions)):
            part = nn.Module()
            part.embedding = nn.Embedding(rows, width)
            self.embedding.add_module(name, part)
        self.encoder.transformer = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.encoder.layer_norm = LayerNorm(width)
        self.target.lm = nn.Module()
        self.target.lm.output_layer = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.target.lm.output_layer.weight = self.embedding.word.embedding.weight

    def forward(self, tokens):
        x = self.embedding.word.embedding(tokens) + self.embedding.pos.embedding(torch.arange(tokens.shape[1]))
        for block in self.encoder.transformer:
            x = block(x)
        return self.target.lm.output_layer(self.encoder.layer_norm(x))


def trained(steps: int, sizes: tuple[int, ...], seed: int = 0, tied: bool = True) -> UerGpt2:
    """A model drawn as UER-py draws it, then trained on texts with a pattern."""
    torch.manual_seed(seed)
    model = UerGpt2(*sizes, tied=tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("gamma", "beta")):
                parameter.normal_(0, 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        tokens = (torch.randint(0, 50, (16, 1)) + torch.randint(1, 4, (16, 1)) * torch.arange(17)) % sizes[0]
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
