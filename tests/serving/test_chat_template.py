"""Chat templates: rendered as transformers renders them, and kept inside the sandbox and the caps."""

import datetime
import json

import pytest

from jmoe.serving.text import chat_template
from jmoe.serving.text.chat_template import ChatTemplate, ChatTemplateError, read_chat_template

HELLO = [{"role": "user", "content": "Grüße <b>"}]
CHATML = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nBe brief<|im_end|>' }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}"""
MIXTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}
{% elif message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' -}}
{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""
TOOLS = """{% set ns = namespace(seen=0) %}{% for m in messages %}{% if m.content is none %}{% continue %}{% endif %}
{% set ns.seen = ns.seen + 1 %}{{ m | tojson }}{% if ns.seen == 2 %}{% break %}{% endif %}
{% endfor %}{{ tools | tojson(indent=2) }}{{ strftime_now('%Y') | length }}"""


def test_chatml():
    assert ChatTemplate(CHATML).render(HELLO) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nGrüße <b><|im_end|>\n<|im_start|>assistant\n"
    )
    assert not ChatTemplate(CHATML).render(HELLO, add_generation_prompt=False).endswith("assistant\n")


def test_special_tokens_generation_block_and_refusal():
    template = ChatTemplate(MIXTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    both = [*HELLO, {"role": "assistant", "content": "ja"}]
    assert template.render(both) == "<s> [INST] Grüße <b> [/INST] ja</s>"
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render([*HELLO, *HELLO])


def test_tools_loop_controls_and_json_keeps_letters():
    text = ChatTemplate(TOOLS).render(HELLO, options={"tools": [{"name": "ß"}]})
    assert text == json.dumps(HELLO[0], ensure_ascii=False) + '[\n  {\n    "name": "ß"\n  }\n]4'


def test_strftime_now_is_today():
    today = datetime.date.today().isoformat()
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(HELLO)
    assert today <= text <= datetime.date.today().isoformat()


@pytest.mark.oracle
@pytest.mark.parametrize("source", [CHATML, MIXTRAL, TOOLS])
def test_equals_transformers(source):
    compile_template = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    messages = [*HELLO, {"role": "assistant", "content": "naïve 🙂"}]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = compile_template(
        conversations=[messages], chat_template=source, tools=[{"name": "x"}], add_generation_prompt=True, **names
    )
    ours = ChatTemplate(source, names).render(messages, options={"tools": [{"name": "x"}]})
    assert ours == rendered[0]


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{% set _ = messages.append(messages) %}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
    ],
)
def test_an_escape_from_the_sandbox_is_an_error(escape):
    with pytest.raises(ChatTemplateError, match="the sandbox forbids"):
        ChatTemplate(escape).render(HELLO)


@pytest.mark.parametrize(
    "broken", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ 1 // 0 }}", "{{ x.y }}"]
)
def test_anything_else_that_goes_wrong_is_an_error(broken):
    with pytest.raises(ChatTemplateError, match=r"^chat template: "):
        ChatTemplate(broken).render(HELLO)


def test_a_syntax_error_is_found_when_it_is_loaded():
    with pytest.raises(ChatTemplateError, match="expected jinja2"):
        ChatTemplate("{% for %}")


def test_sizes_are_capped(monkeypatch):
    with pytest.raises(ChatTemplateError, match="characters, got"):
        ChatTemplate("x" * (chat_template.MAX_TEMPLATE_CHARS + 1))
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 1000)
    with pytest.raises(ChatTemplateError, match="at most 1000 characters, got more"):
        ChatTemplate("{% for i in range(99999) %}{{ i }} {% endfor %}").render(HELLO)
    with pytest.raises(ChatTemplateError, match="at most 1000 characters together, got 1001"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "x" * 1001}])
    with pytest.raises(ChatTemplateError, match="range"):
        ChatTemplate("{% for i in range(10**9) %}{% endfor %}").render(HELLO)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "expected 1 to 4096, got 0"),
        ([HELLO[0]] * 4097, "expected 1 to 4096, got 4097"),
        (["hi"], r"messages\[0\]: expected a mapping"),
        ([{"content": "hi"}], r"messages\[0\]: expected a mapping with a 'role'"),
        ([HELLO[0], {"role": "user", "content": 3}], r"messages\[1\].content: expected a string, got int"),
        ([{"role": "assistant", "content": None}], r"got NoneType"),
    ],
)
def test_messages_of_the_wrong_form(messages, sentence):
    with pytest.raises(ChatTemplateError, match=sentence):
        ChatTemplate(CHATML).render(messages)


def test_where_the_source_comes_from():
    named = {"chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]}
    assert read_chat_template(named, None) == "A"
    assert read_chat_template(named, None, "tool_use") == "B"
    assert read_chat_template(named, "FILE") == "FILE"
    assert read_chat_template({"chat_template": "C"}, None) == "C"
    assert read_chat_template({}, None) is None
    with pytest.raises(ChatTemplateError, match="expected one named 'rag', got default, tool_use"):
        read_chat_template(named, None, "rag")
