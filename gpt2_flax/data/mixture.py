"""The datasets of a run: one, or several that are read together in fixed shares."""

import hashlib
from collections.abc import Mapping

from gpt2_flax.config import Packing, Verify
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.integrity import FirstUse
from gpt2_flax.data.loader import MixedLoader, shares_of_rest
from gpt2_flax.errors import ExitCode, UserError


class Mixture:
    """Datasets of one tokenizer, opened, with the weights of their samples; `datasets` has them by folder as given.

    Raises `UserError`: as `TokenDataset`, and CONFIG when two of them were prepared with different tokenizers.
    """

    def __init__(self, weights: Mapping[str, float]):
        self.name = ", ".join(weights)
        self.datasets = {folder: TokenDataset(folder) for folder in weights}
        self._first_use = FirstUse()
        self.shares = shares_of_rest(weights.values())
        first = next(iter(self.datasets.values()))
        self.vocab_size, self.tokenizer_fingerprint = first.info.vocab_size, first.info.tokenizer_fingerprint
        self.tokenizer_folder = first.tokenizer_folder
        for other in self.datasets.values():
            same = (other.info.vocab_size, other.info.tokenizer_fingerprint)
            if same != (self.vocab_size, self.tokenizer_fingerprint):
                where = f"{first.folder} and {other.folder}"
                fix = "prepare both with the same tokenizer"
                raise UserError(ExitCode.CONFIG, "datasets were prepared with different tokenizers", where, fix)

    def verify(self, how: Verify) -> None:
        """Verify all splits ("full"), or validation splits now and each training shard when it is used ("first-use").

        "off": nothing. Raises `UserError` (DATA) naming the first file that is wrong. For a training shard that is
        verified later whoever reads next raises it, and the two methods below.
        """
        for dataset in self.datasets.values():
            if how == "full":
                dataset.verify()
            elif how == "first-use":
                dataset.verify(dataset.validation)
                dataset.train.check_at_first_use(self._first_use)

    def check_unchanged(self) -> None:
        """Raise `UserError` (DATA) that names a file which changed since it was opened, or a damaged shard."""
        self._first_use.raise_failure()
        for dataset in self.datasets.values():
            dataset.check_unchanged()

    def wait_until_verified(self, patience: float | None) -> None:
        """Wait until the shards used so far are verified, but warn after `patience` seconds (None: never).

        A run computes checksums from its start on, and soon has them all: a save seldom waits.
        Raises `UserError` (DATA) for a damaged shard.
        """
        self._first_use.wait(patience)

    def loader(
        self, seq_length: int, seed: int, packing: Packing = "stream", attend_across_documents: bool = False
    ) -> MixedLoader:
        """Returns the loader of the training splits; raises as `rows_of`."""
        splits = [dataset.train for dataset in self.datasets.values()]
        return MixedLoader(splits, self.shares, seq_length, seed, packing, attend_across_documents)

    def fingerprints(self) -> dict[str, str]:
        """Returns sha256 sums that tell mixtures apart; those of a single dataset are its own.

        `tokens_fingerprint` is of the training tokens of all, their order and their shares, wherever they lie;
        `validation_fingerprint` likewise.
        """
        parts = [dataset.fingerprints() for dataset in self.datasets.values()]
        sums = parts[0]
        for name in ("tokens_fingerprint", "validation_fingerprint") if len(parts) > 1 else ():
            lines = (f"{share} {part[name]}\n" for share, part in zip(self.shares, parts, strict=True))
            sums = sums | {name: hashlib.sha256("".join(lines).encode()).hexdigest()}
        return sums
