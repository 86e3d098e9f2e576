"""Chat templates within bounds: honest ones render as in Jinja's own sandbox, and no other takes the machine."""

from __future__ import annotations

import functools
import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from merino_edge import limits
from merino_edge.chat_template import render
from merino_edge.errors import ArtefactError

MESSAGES = [
    {"role": "system", "content": "You are <kind> & brief."},
    {"role": "user", "content": "  Hello, žluťoučký\nkůň 🦊 "},
    {"role": "assistant", "content": "<think>x</think>Hi!"},
    {"role": "user", "content": "What is 1 + 1?"},
]
PROPERTIES = {"a": {"type": "integer"}, "b": {"enum": [1]}}
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": PROPERTIES}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
VARIABLES = {"messages": MESSAGES, "tools": TOOLS, "add_generation_prompt": True, **TOKENS}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HONEST = [
    CHATML,
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content|trim %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{{ bos_token + '[INST] ' ~ system }}"
    "{% for m in rest if m.role != 'system' %}{{ loop.index0 % 2 }}{{ m['content'].strip() + eos_token }}{% endfor %}",
    "{% set ns = namespace(last=-1, text='') %}{% for m in messages[::-1] %}{% if m.role == 'user' and ns.last < 0 %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% set ns.text = ns.text + m.content[:3] %}{% endfor %}"
    "{{ ns.last }}{{ ns.text }}{{ messages|length - 1 - ns.last }}",
    "{% macro part(name, value, depth=0) %}{{ ' ' * depth }}{{ name }}: {% if value is mapping %}{\n{% for k, v in"
    " value|items %}{{ part(k, v, depth + 2) }}{% endfor %}}{% else %}{{ value|tojson }}{% endif %}\n{% endmacro %}"
    "{% for tool in tools %}{{ part(tool.name, tool.parameters) }}{% endfor %}",
    "{{ tools|tojson(indent=2) }}{{ tools[0]|tojson }}{{ tools|map(attribute='name')|join(', ') }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list|last|upper }}",
    "{% set x %}a{{ messages[1].content|trim }}b{% endset %}{{ x|replace('a', 'c')|title }}{{ x.split('\n')[0] }}",
    "{% set x | upper %}abc{{ 1 }}{% endset %}{{ x }}{% filter lower %}ABC{{ bos_token }}{% endfilter %}",
    "{% macro box(t) %}[{{ caller(t) }}]{{ varargs }}{{ kwargs }}{% endmacro %}"
    "{% call(y) box('hi', 1, 2, z=3) %}<{{ y }}>{% endcall %}",
    "{% for m in [[1, [2, [3]]], [4]] recursive %}({{ m if m is number else loop(m) }}){% endfor %}",
    "{{ '%s is %d and %05.1f' % ('x', 3, 2.5) }}{{ '{} {a:>4}'.format(1, a='b') }}{{ '%s!'|format('x') }}",
    "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ -3 }}{{ [1] + [2] }}{{ (1, 2) }}{{ 'ab' * 3 }}",
    "{{ {'a': [1, {'b': none}]} }}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('\n') }}{{ 'a.b'.rsplit('.', 1) }}{{ 'x'.center(5) }}|",
    "{% for group in messages|groupby('role') %}{{ group.grouper }}{{ group.list|length }}{% endfor %}",
    "{% for row in range(7)|batch(3, '-') %}{{ row|join }}{% endfor %}{{ range(5)|sum }}{{ [3, 1]|sort|first }}",
    "{{ missing }}{{ missing|default('d') }}{{ messages is iterable }}{{ 'tools' is defined }}{{ none }}{{ true }}",
    "{% autoescape true %}{{ messages[0].content }}{{ '<' ~ messages[0].content }}{% endautoescape %}{{ '<' ~ 1 }}",
    "{% set a, b = 1, 2 %}{{ a ~ b }}{% with c = 3 %}{{ c }}{% endwith %}{% set d = dict(x=1, **{'y': 2}) %}{{ d }}",
    "{{ messages[1].content|indent(4, first=true) }}{{ 'a b c'|truncate(3, true) }}{{ 'abc'|reverse }}{{ '<'|e }}",
    "{%- for m in messages -%}  {%- if loop.first %}F{% elif loop.last %}L{% else %}{{ loop.revindex }}{% endif %}"
    "{{ loop.previtem.role if loop.previtem is defined }}{%- else -%}none{%- endfor -%}",
    "{% for k, v in {'b': 1, 'a': 2}|dictsort %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.items()|list }}{{ {}.get('x') }}",
    "{{ 'yes' if messages|length > 3 and not tools is none else 'no' }}{{ cycler('a', 'b').next() }}{{ joiner()() }}",
    "{% block body %}in{{ self.foot() }}{% endblock %}{% block foot %}out{% endblock %}",
    "{{ 'abc'.encode().decode() }}{{ 'a\tb'.expandtabs(4) }}{{ ','.join(['x', 'y']) }}{{ '-'.join('abc') }}",
]


def _plain() -> ImmutableSandboxedEnvironment:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return plain


@pytest.mark.parametrize("template", HONEST)
def test_an_honest_template_renders_as_in_the_plain_sandbox(template: str) -> None:
    plain = _plain()
    assert render(template, VARIABLES) == plain.from_string(template).render(**VARIABLES)


def test_a_long_conversation_is_far_from_the_limits() -> None:
    """As many messages as the server takes, as long as a prompt may be; templates copy what they get many times."""
    length = limits.MAX_PROMPT_BYTES // limits.MAX_MESSAGES - 40
    messages = [{"role": "user", "content": "x" * length}] * limits.MAX_MESSAGES
    plain = _plain()
    for template in (CHATML, HONEST[1], HONEST[2]):
        variables = {**VARIABLES, "messages": messages}
        assert render(template, variables) == plain.from_string(template).render(**variables)


HUGE = 3 * 10**9
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{{ b }}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'x' }}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    f"{{{{ 'a' * {HUGE} }}}}",
    f"{{{{ {HUGE} * ['a'] }}}}",
    f"{{{{ '%{HUGE}d' % 1 }}}}",
    f"{{{{ '%*d' % ({HUGE}, 1) }}}}",
    f"{{{{ '%(x){HUGE}d' % {{'x': 1}} }}}}",
    f"{{{{ '{{:{HUGE}}}'.format(1) }}}}",
    f"{{{{ '{{:{{}}}}'.format(1, {HUGE}) }}}}",
    f"{{{{ '{{:{{}}}}'.format(1, '{HUGE}') }}}}",
    f"{{{{ '%{HUGE}s'|format('x') }}}}",
    f"{{{{ ['%{HUGE}s']|format('x') }}}}",
    f"{{{{ 'a'.center({HUGE}) }}}}",
    f"{{{{ 'a'|center({HUGE}) }}}}",
    f"{{{{ 'a'.zfill({HUGE}) }}}}",
    f"{{{{ 'a\tb'.expandtabs({HUGE}) }}}}",
    f"{{{{ [1, 2]|tojson(indent={HUGE}) }}}}",
    f"{{{{ 'a\nb'|indent({HUGE}) }}}}",
    f"{{{{ range({HUGE}) }}}}",
    f"{{{{ (1).to_bytes({HUGE}, 'big') }}}}",
    f"{{% autoescape 'a' * {HUGE} %}}x{{% endautoescape %}}",
    f"{{% autoescape 'a'|center({HUGE}) %}}x{{% endautoescape %}}",
    "{{ 10 ** 999999999 }}",
    "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set n = ('f' * 4000000)|int(0, 16) %}{{ n is divisibleby(n + 1) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('a', 'aab') %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = x %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = {1: ns.l, 2: ns.l} %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1], m=[1]) %}{% for i in range(99) %}{% set ns.l = (ns.l, ns.l) %}"
    "{% set ns.m = (ns.m, ns.m) %}{% endfor %}{{ ns.l == ns.m }}",
    "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ f(60, 'x', 'y') }}",
    "{% set ns = namespace() %}{% set l = [ns, ns] %}{% set ns.x = 'a' * 9999999 %}{{ l }}",
    "{% set ns = namespace() %}{% set ns.a = 'a' * 9999999 %}{% set ns.b = ns.a %}{{ ns }}",
    "{% set big = 'a' * 9999999 %}{% for i in range(99999) %}{{ big }}{% endfor %}",
    "{% set big = 'a' * 9999999 %}{{ range(9999)|map('default', big, true)|join }}",
    "{% set big = 'a' * 9999999 %}{{ ''.join(range(9999)|map(attribute='x', default=big)) }}",
    "{% set big = 'a' * 9999999 %}{{ " + " ~ ".join(["big"] * 99) + " }}",
    "{% set big = 'a' * 9999999 %}" + "{{ big }}" * 99,
    "{% set big = 'a' * 9999999 %}" + "".join(f"{{% set b{i} = big[1:] %}}" for i in range(99)) + "x",
    "{{ ('a' * 4000000).rfind('b' + 'a' * 2000000) }}",
    "{% for i in range(99) %}{% for j in range(9999) %}" + "y" * 100_000 + "{% endfor %}{% endfor %}",
    "{{ lipsum(n=99999) }}",
    '{{ "\\ud800" }}',
    "{{ strftime_now('%999999999d') }}{{ strftime_now('%Y' * 999999) }}",
    "{{ ('a' * 2000000)|tojson }}{{ ['a']|tojson(separators=('b' * 9999999, 'c')) }}",
    "{% generation %}{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}"
    "{% endgeneration %}",
    "{% include 'x' %}",
    "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__()() }}",
    "(" * 20_000 + "{{ " + "(" * 20_000,
    "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
    "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000,
]


@pytest.mark.parametrize("template", BOMBS, ids=lambda template: template[:60].replace("/", "|"))
def test_what_would_take_the_machine_is_one_line(template: str) -> None:
    with pytest.raises(ArtefactError, match="the chat template failed") as refusal:
        render(template, VARIABLES)
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)
    json.dumps(str(refusal.value)).encode()
