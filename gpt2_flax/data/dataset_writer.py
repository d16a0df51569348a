"""Writing a shard of a dataset: a file of token ids and a file of document starts, each with its checksum.

Dimension key: B documents, N numbers, T tokens.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from gpt2_flax.data.dataset_info import OFFSET, Shard, TokenType, shard_paths
from gpt2_flax.folders import sync_folder
from gpt2_flax.tokenizers.ragged_ids import token_dtype


class ShardWriter:
    """Writes one shard; the files have temporary names until `close` renames them.

    As a context manager it closes the files if the block fails. `dtype` defaults to the smallest type that holds the
    vocabulary.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        index: int,
        vocab_size: int,
        unk_id: int | None,
        *,
        dtype: TokenType | None = None,
    ):
        self._dtype = np.dtype(dtype or token_dtype(vocab_size)).newbyteorder("<")
        self._vocab_size = min(vocab_size, np.iinfo(self._dtype).max + 1)
        self._unk_id = -1 if unk_id is None else unk_id  # no token is -1
        tokens, offsets = shard_paths(folder, split, index)
        tokens.parent.mkdir(parents=True, exist_ok=True)
        self._tokens, self._offsets = _NewFile(tokens), _NewFile(offsets)
        self._n_documents = self._n_tokens = self._n_unknown = self._max_id = 0
        self._n_characters: int | None = 0

    def add(self, ids_T: np.ndarray, starts_B: np.ndarray, characters: int | None) -> None:
        """Append tokens to the shard.

        Args:
            ids_T: Token ids of any integer type.
            starts_B: int64 positions in `ids_T` at which documents start. Tokens before the first position belong to
                the last document of the previous call.
            characters: Number of characters of text that the tokens stand for; None if it is not known.

        Raises:
            ValueError: An id is outside the vocabulary (numpy would wrap it silently), the starts do not ascend, or the
                first token of the shard does not start a document.
        """
        if self._n_characters is not None:
            self._n_characters = None if characters is None else self._n_characters + characters
        if not len(ids_T):
            return
        low, high = int(ids_T.min()) if ids_T.dtype.kind == "i" else 0, int(ids_T.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"token ids {low}..{high} do not fit a vocabulary of {self._vocab_size}")
        ascending = (np.diff(starts_B, prepend=-1, append=len(ids_T)) > 0).all()
        if not ascending or not (self._n_tokens or (len(starts_B) and starts_B[0] == 0)):
            raise ValueError("document starts must ascend within the ids, and the first token of a shard must be one")
        self._offsets.write((starts_B + self._n_tokens).astype(OFFSET))
        self._tokens.write(np.ascontiguousarray(ids_T, self._dtype))
        self._n_documents += len(starts_B)
        self._n_tokens += len(ids_T)
        self._n_unknown += int(np.count_nonzero(ids_T == self._unk_id))
        self._max_id = max(self._max_id, high)

    def close(self) -> Shard:
        """Flush the files to disk, give them their names and return their entry for dataset.json."""
        return Shard(
            documents=self._n_documents,
            tokens=self._n_tokens,
            unknown=self._n_unknown,
            characters=self._n_characters,
            max_id=self._max_id,
            tokens_sha256=self._tokens.publish(),
            offsets_sha256=self._offsets.publish(),
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._tokens.file.close()
        self._offsets.file.close()


class _NewFile:
    """A file that has a temporary name until `publish`."""

    def __init__(self, path: Path):
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        self._sha256 = hashlib.sha256()
        self.file = self._temporary.open("wb", buffering=2**20)

    def write(self, numbers_N: np.ndarray) -> None:
        """Append a contiguous array."""
        self._sha256.update(numbers_N.data)
        self.file.write(numbers_N.data)

    def publish(self) -> str:
        """Flush the file to disk, give it its name and return the hexadecimal sha256 of its content."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self._temporary.rename(self._path)
        sync_folder(self._path.parent)
        return self._sha256.hexdigest()
