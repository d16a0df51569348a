"""The datasets of a run: one dataset, or several in fixed shares."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpt2_flax.config.schema import Verify
from gpt2_flax.data.batches import Batches, shares_of_rest
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.integrity import FirstUse
from gpt2_flax.data.packing import RowLayout
from gpt2_flax.errors import ExitCode, UserError

if TYPE_CHECKING:
    from gpt2_flax.tokenizers.tokenizer import Tokenizer


class Mixture:
    """The opened datasets of a run, all of one tokenizer; `datasets` maps each folder, as given, to its dataset.

    Args:
        weights: the weight of each dataset folder in the samples of the run.

    Raises:
        UserError: CONFIG, when two datasets have different tokenizers; and as `TokenDataset`.
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
        """Compare shards with their checksums.

        Args:
            how: "full" verifies all splits now. "first-use" verifies the validation splits now, and each training shard
                in the background once it is used. "off" verifies nothing.

        Raises:
            UserError: DATA, naming the first damaged file. Damage that is found in the background is raised by the
                next read, by `check_unchanged`, or by `wait_until_verified`.
        """
        for dataset in self.datasets.values():
            if how == "full":
                dataset.verify()
            elif how == "first-use":
                dataset.verify(dataset.validation)
                dataset.train.check_at_first_use(self._first_use)

    def check_unchanged(self) -> None:
        """Raise `UserError` (DATA) for a file that changed since it was opened, or for a damaged shard."""
        self._first_use.raise_failure()
        for dataset in self.datasets.values():
            dataset.check_unchanged()

    def wait_until_verified(self, patience: float | None) -> None:
        """Wait until the shards that were used so far are verified; raise `UserError` (DATA) for a damaged shard.

        After `patience` seconds, warn and return; None waits without a limit.
        """
        self._first_use.wait(patience)

    def tokenizer(self) -> "Tokenizer":
        """Return the tokenizer of the datasets; raise as `TokenDataset.tokenizer`."""
        return next(iter(self.datasets.values())).tokenizer()

    def batches(self, layout: RowLayout, seed: int, prompt_separator: float = 0.0) -> Batches:
        """Return the batches of the training splits.

        Args:
            layout: how to cut the splits into rows.
            seed: seed of the order and of the inserted tokens.
            prompt_separator: share of the segments with an inserted end token, see `prompt_separator`.

        Raises:
            UserError: as `Batches`; as `tokenizer` when `prompt_separator` is above 0.
        """
        splits = [dataset.train for dataset in self.datasets.values()]
        if not prompt_separator:
            return Batches(splits, self.shares, layout, seed)
        # Imported here, because most runs insert nothing.
        from gpt2_flax.data.prompt_separator import PromptSeparator, SeparatedBatches

        tokenizer = self.tokenizer()  # all datasets have its ids; an imported dataset may not record its bos
        separator = PromptSeparator(prompt_separator, seed, tokenizer.bos_id, tokenizer.eos_id)
        return SeparatedBatches(splits, self.shares, layout, seed, separator)

    def fingerprints(self) -> dict[str, str]:
        """Return sha256 sums of the tokenizer, and of the training and validation tokens with their order and shares.

        The fingerprints of a single dataset are the dataset's own. The folders do not matter.
        """
        parts = [dataset.fingerprints() for dataset in self.datasets.values()]
        sums = parts[0]
        for name in ("tokens_fingerprint", "validation_fingerprint") if len(parts) > 1 else ():
            lines = (f"{share} {part[name]}\n" for share, part in zip(self.shares, parts, strict=True))
            sums = sums | {name: hashlib.sha256("".join(lines).encode()).hexdigest()}
        return sums
