"""README and docs/: commands parse, programs compile, links lead somewhere, figures agree, the site builds."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from support.documents import blocks, commands

import gpt2_flax
from gpt2_flax.cli import app
from gpt2_flax.config.file import load_stages
from gpt2_flax.config.parse import config_keys
from gpt2_flax.errors import ExitCode, UserError

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
GENERATED = ["cli.md", "configuration.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
PLACEHOLDERS = {"N": "1", "H": "1", "STEP": "1", "CONFIG": "quickstart", "NAME": "quickstart"}
PLACEHOLDERS |= {"section.key=value": "model.n_layer=1", "KEY=VALUE": "model.n_layer=1", "KEY": "model.n_layer"}
OTHER_PROGRAMS = {"cat", "curl", "docker", "kubectl", "llama-completion", "llama-server", "lm_eval", "mkdocs"}
OTHER_PROGRAMS |= {"pip", "sbatch", "swanlab"}

SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = set(SETUP["options.extras_require"])


def relative(path):
    return str(path.relative_to(ROOT))


def without_brackets(words):
    """`CONFIG [section.key=value ...] [--verify]` as a user would type it."""
    plain = (re.sub(r"^\[(?=\w|-)|(?<=\w)\]$|\.\.\.$", "", word) for word in words)
    return [PLACEHOLDERS.get(word, word) for word in plain if word not in ("", "]")]


def check_config(arguments):
    """Reads the config of `train` or `plan` with its overrides; of a file that the user writes, only the keys."""
    overrides = [argument for argument in arguments if "=" in argument]
    for override in overrides:
        assert re.sub(r"^stages\.\d+\.", "", override.partition("=")[0]) in config_keys(), override
    files = [Path(argument) for argument in arguments if "=" not in argument]
    if not files or not files[0].suffix:
        load_stages(files[0] if files else None, overrides)


@pytest.fixture
def no_models_needed(monkeypatch):
    """Lets commands accept models that do not exist."""
    monkeypatch.setattr("gpt2_flax.checkpoint.run_folder.check_model", lambda path: path)
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_in_a_document_parses(page, no_models_needed):
    for words in commands(page.read_text(encoding="utf-8")):
        program, *rest = words
        if program == "gpt2-flax":
            check_our_command(without_brackets(rest))
        elif program in ("python", "python3", "bash") and not rest[0].startswith("-"):
            script = (ROOT / rest[0]).read_text(encoding="utf-8")
            helpers = (ROOT / "scripts" / "uer_command_line.py").read_text(encoding="utf-8")
            for option in (word.partition("=")[0] for word in rest[1:] if word.startswith("--")):
                assert option in script or option[2:] in script + helpers, f"{option} in {' '.join(words)}"
        else:
            assert program in OTHER_PROGRAMS, words
        for wanted in re.findall(r"(?:\.|gpt2_flax)\[([\w,-]+)\]", " ".join(words)):
            assert set(wanted.split(",")) <= EXTRAS, words


def check_our_command(arguments):
    name, *rest = arguments
    if name.startswith("-"):
        assert name in ("--help", "--debug", "--version", "--install-completion"), arguments
    elif rest or any(parameter.required for parameter in COMMANDS[name].params):
        if not rest or "--help" in rest:
            return  # a sentence about the command
        context = COMMANDS[name].make_context(name, [*rest])  # which empties the list
        given = [context.params.get("config"), *(context.params.get("overrides") or ())]
        if name in ("train", "plan") and "--budget" not in rest:
            check_config([str(argument) for argument in given if argument is not None])


def test_the_check_of_commands_can_fail(no_models_needed):
    for wrong in (
        "gpt2-flax trian quickstart",
        "gpt2-flax generate runs/mine --promt x",
        "gpt2-flax train quickstart optimizer.lr=1",
        "gpt2-flax train quickstart model.n_layer=0",
        "gpt2-flax export runs/mine exported --format onnx",
        "gpt2-flax evaluate runs/mine --batch-size 0",
        "gpt2-flax prepare corpus/",
    ):
        (words,) = commands(f"```bash\n{wrong}   # a remark\n```")
        with pytest.raises((typer.BadParameter.__bases__[0], UserError, KeyError, AssertionError)):
            check_our_command(without_brackets(words[1:]))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_programs_and_configs_in_a_document_are_valid(page):
    text = page.read_text(encoding="utf-8")
    for program in blocks(text, "python"):
        if page.name != "python-api.md":  # which shows signatures
            ast.parse(program)
            assert all(hasattr(gpt2_flax, name) for name in re.findall(r"\bgpt2_flax\.(\w+)\(", program))
    for config in blocks(text, "toml"):
        sections = tomllib.loads(config)
        assert {f"{name}.{key}" for name, keys in sections.items() for key in keys} <= set(config_keys())


def anchors(path):
    """The anchors of a document as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md"], ids=relative)
def test_links_outside_the_site_lead_somewhere(page):
    """`mkdocs build` checks the links inside docs/."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.multiprocess
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', page)


def test_generated_pages_are_current():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, page in module.PAGES.items():
        current = (ROOT / "docs" / name).read_text(encoding="utf-8") == page()
        assert current, f"docs/{name} is old: run python scripts/generate_docs.py"
    assert set(module.PAGES) == set(GENERATED)


def test_readme_is_short():
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 200 for path in READMES)


def test_the_figures_of_the_quickstart_are_the_same_in_every_document():
    pages = [*READMES, ROOT / "docs" / "quickstart.md", ROOT / "docs" / "zh" / "quickstart.md"]
    marked = r"<!-- quickstart figures -->\n(.*)<!-- end of quickstart figures -->"
    assert len({re.search(marked, page.read_text(encoding="utf-8"), re.S)[1] for page in pages}) == 1


def test_every_extra_is_documented():
    table = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", table, re.M)
    assert {extra for row in rows for extra in re.findall(r"`([\w-]+)`", row)} == EXTRAS


def test_every_exit_code_is_documented():
    table = (ROOT / "docs" / "exit_codes.md").read_text(encoding="utf-8")
    documented = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for code in cell.split(", ")}
    assert documented == {int(code) for code in ExitCode}
