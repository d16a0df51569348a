"""What the documents contain."""

import re


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks in one of the languages; "" is a block without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [content for language, content in fences if language in languages]
