"""What the documents contain."""

import re
import shlex
from collections.abc import Iterator


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks in one of the languages; "" is a block without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [content for language, content in fences if language in languages]


def shell_lines(text: str) -> Iterator[str]:
    """Every command in a document: lines of bash, lines after a `$ `, and code in a sentence that begins like one."""
    for content in blocks(text, "bash"):
        yield from content.replace("\\\n", " ").splitlines()
    for content in blocks(text, ""):
        yield from re.findall(r"^\$ (.*)$", content.replace("\\\n", " "), re.M)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", prose):
        if re.match(r"(gpt2-flax|python|bash|pip|sbatch|mkdocs) ", span):
            yield " ".join(span.split())


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command, without placeholders' brackets, environment variables and what the shell does."""
    for line in shell_lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";<>|&")
        lexer.whitespace_split = True
        words, skip = [], False
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                if words:
                    yield words
                words, skip = [], False
            elif set(word) <= set("<>") or skip:
                skip = not skip
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
