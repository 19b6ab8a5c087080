"""README, CONTRIBUTING and docs: every command parses, every path and link exists, the Python block runs."""

import json
import pathlib
import re
import shlex

import pytest

from jmoe.serving import cli

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", *DOCS]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> list[list[str]]:
    """The words of each command, those joined by && apart."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for command in words if command]


COMMANDS = [(page, command) for page in PAGES for command in shell_commands((ROOT / page).read_text())]
JMOE = [(page, words[1:]) for page, words in COMMANDS if words[0].endswith("jmoe")]


def test_the_commands_were_found():
    assert len(JMOE) >= 7 and any(words[:1] == ["demo"] for _, words in JMOE)


@pytest.mark.parametrize("words", [words for _, words in JMOE], ids=lambda words: " ".join(words)[:40])
def test_a_jmoe_command_parses(words, monkeypatch):
    ran = []
    monkeypatch.setattr(cli, "_run", lambda args, parser: ran.append(args.command) or 0)
    try:
        code = cli.main(words)
    except SystemExit as leaving:
        assert words == ["--help"] and leaving.code == 0
    else:
        assert code == 0 and ran == [words[0]]


def test_a_wrong_command_does_not_parse():
    with pytest.raises(SystemExit) as leaving:
        cli.main(["serve", "./model", "--micro-batch", "many"])
    assert leaving.value.code == 2


@pytest.mark.parametrize("page", PAGES)
def test_links_and_programs_exist(page):
    text = (ROOT / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    programs = re.findall(r"python ((?:benchmarks|examples|tests)/[\w/]+\.py)", text)
    assert missing + [program for program in programs if not (ROOT / program).is_file()] == []


def test_extras_that_are_named_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for found in re.findall(r"\.\[([\w,]+)\]", (ROOT / page).read_text())
             for name in found.split(",")}  # fmt: skip
    assert {"test", "cuda"} <= named <= set(extras)


def test_every_benchmark_and_example_is_named():
    named = README + (ROOT / "benchmarks" / "README.md").read_text()
    programs = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py"))]
    assert len(programs) >= 10
    assert [program for program in programs if program not in named] == []


def test_ci_runs_the_two_commands():
    """`.ci/run` takes them out of README by how they end; each must be there once, whole on one line."""
    lines = re.findall(r"^python3 -m venv .*", "".join(blocks(README, "sh")), re.MULTILINE)
    assert len(lines) == 2
    assert lines[0].endswith('jmoe demo "What is the capital of France?"') and lines[1].endswith(
        "-m pytest -n auto --dist worksteal"
    )
    script = (ROOT / ".ci" / "run").read_text()
    assert """readme_command 'France\\?"'""" in script and "readme_command worksteal" in script


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder of README's name with a configuration and a tokenizer, and a fake cell for whoever serves it."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "serving"))
    from fake_executor import FakeExecutor
    from tiny_tokenizer import CHAT_TEMPLATE, byte_level_backend

    from jmoe.serving.executors import create

    folder, backend, cells = tmp_path / "Mixtral-8x7B", byte_level_backend(), []
    folder.mkdir()
    sizes = {"vocab_size": backend.get_vocab_size(), "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 8, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"} | sizes | heads))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    fake = lambda model, cell, *_, **__: cells.append(cell) or FakeExecutor(cell)  # noqa: E731
    monkeypatch.setattr(create, "create_executor", fake)
    monkeypatch.chdir(tmp_path)
    return cells


def test_the_python_block_runs(checkpoint, capsys):
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    (cell,) = checkpoint
    assert (cell.mesh.attention, cell.mesh.expert, cell.mesh.num_micro_batches) == (2, 2, 4)
    assert len(capsys.readouterr().out) > 100  # the fake's 8 and 128 tokens have no sense, but text
