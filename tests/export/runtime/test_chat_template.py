"""Chat templates: what transformers renders, and nothing that a template should not get at."""

import datetime
import threading
import time
from typing import Any

import pytest
from llama_chat import BOS, EOT, REFUSING_TEMPLATE, TEMPLATE, write_tokenizer

from flamingo_export.errors import PromptError
from flamingo_export.runtime import chat_template, template_filters
from flamingo_export.runtime.chat_template import MAX_SOURCE, ChatTemplate

SPECIAL = {"bos_token": BOS, "eos_token": EOT}
IMAGE = {"type": "image"}
CONVERSATIONS: dict[str, Any] = {
    "text": [{"role": "user", "content": " What is a flamingo? "}],
    "image": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]}],
    "image last": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}],
    "two images": [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Which is larger?"}]}],
    "turns": [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A bird."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "And {{ this }} {% raw %}?"}]},
    ],
    "system": [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "Ü, 你好, \U0001f9a9"}],
    "system and image": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [IMAGE]}],
}


def rendered(source: str, messages=(), **options) -> str:
    return ChatTemplate(source).render(messages, special=SPECIAL, **options)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 400)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("open_turn", [True, False])
def test_conversations_are_written_as_transformers_writes_them(theirs, name, open_turn):
    messages, today = CONVERSATIONS[name], datetime.date.today()
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
    assert rendered(TEMPLATE, messages, open_turn=open_turn, day=today) == expected


# A line each: what templates of tuned models do, within what they may.
PIECES = [
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ m.role|upper }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m['content'] | string | length }},{% endfor %}",
    "{% for k, v in messages[0] | dictsort %}{{ k }}={{ v }};{% endfor %}{% for k, v in messages[0]|items %}{{ k }}{% endfor %}",
    "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'a': ['<', 'é']} | tojson | safe }}",
    "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('ab') }}{{ twice(3) | trim | int + 1 }}",
    "{% set x %} captured {{ 1 + 2 }} {% endset %}{{ x | trim ~ '!' }}{{ x | replace(' ', '_') }}",
    "{% for x in range(9) %}{% if x == 2 %}{% continue %}{% endif %}{% if x > 4 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% set ns = namespace(n=1, l=[]) %}{% for i in range(3) %}{% set ns.n = ns.n * 2 %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.l }}",
    "{{ 'a' in 'abc' }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 1 / 4 }}{{ -3 | abs }}{{ x is defined }}{{ 'z' if y is defined else 'w' }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | map(attribute='role') | map('upper') | unique | sort | list }}{{ [3, 1] | max }}{{ [3, 1] | first }}{{ 'abc'[::-1] }}",
    "{{ x | default('none') }}{{ '' | d('empty', true) }}{{ messages[-1].role }}{{ messages[7] }}{{ messages[0].missing }}",
    "{% if messages %}{% generation %}said{% endgeneration %}{% endif %}\n  {% if true %}\n  kept\n  {% endif %}\n",
    "{% filter upper %}shout {{ 'a' }}{% endfilter %}{% for x in [] %}{% else %}nothing{% endfor %}{{ ('a', 'b') }}{{ {'k': 1}.k }}",
    "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}@{{ loop.depth }}{% endif %}{% endfor %}",
    "{% raw %}{{ kept }}{% endraw %}{# left out #}{{ 'x' | indent(2, true) }}{{ 'two words' | title }}{{ 'W' | lower }}",
]


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_of_templates_render_as_in_transformers(theirs, piece):
    messages = CONVERSATIONS["turns"]
    expected = theirs.apply_chat_template(messages, chat_template=piece, tokenize=False)
    assert rendered(piece, messages, open_turn=False) == expected


def test_the_template_refuses_in_its_own_words():
    with pytest.raises(PromptError, match=r"refuses this conversation: No system message may stand before images\.$"):
        rendered(REFUSING_TEMPLATE, CONVERSATIONS["system and image"])
    assert "Be brief." in rendered(REFUSING_TEMPLATE, CONVERSATIONS["system"])
    with pytest.raises(PromptError, match="Users and assistants take turns"):
        rendered(TEMPLATE, [CONVERSATIONS["text"][0]] * 2)
    with pytest.raises(PromptError, match="not tool"):
        rendered(TEMPLATE, [{"role": "tool", "content": "3"}])


def test_the_day_is_fixed_unless_given():
    assert "Today Date: 26 Jul 2024" in rendered(TEMPLATE, CONVERSATIONS["text"])
    assert "Today Date: 02 Jan 2031" in rendered(TEMPLATE, CONVERSATIONS["text"], day=datetime.date(2031, 1, 2))
    with pytest.raises(PromptError, match="strftime_now"):
        rendered("{{ strftime_now('%999999999d') }}")


REACHING = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'][1] }}",
    "{{ ('' | attr('__class__')) }}",
    "{{ messages.__class__ }}",
    "{{ messages.append('x') }}",
    "{{ messages['append']('x') }}",
    "{{ messages[0].items() }}",
    "{{ messages[0].get('role') }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ 'a'.strip() }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s' % messages }}",
    "{{ '{0}' | format(1) }}",
    "{{ range.__init__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace(a=1) %}{{ ns.__class__.x }}",
    "{% set ns = namespace(a=1) %}{{ ns._Namespace__attrs.x }}",
    "{% set ns = namespace(a=1) %}{{ ns['__class__'].x }}",
    "{% set ns = namespace(a=1) %}{{ ns }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__ }}{{ lipsum.__globals__ }}",
    "{{ self.__init__ }}{{ self._TemplateReference__context.x }}",
    "{{ undefined._undefined_exception }}",
    "{% macro m() %}{% endmacro %}{{ m.name }}{{ m._func }}",
    "{% for x in [1] %}{{ loop._recurse }}{{ loop.cycle }}{% endfor %}",
    "{% include 'other' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'other' %}",
    "{{ messages | map(attribute='__class__') | list | first | attr('x') }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "{{ [1] | map('string.__class__') | list }}",
    "{{ strftime_now }}",
    "{{ joined('a') }}{{ environment.tick }}",
    "{{ dict(a=1) }}",
]


@pytest.mark.parametrize("source", REACHING)
def test_nothing_outside_is_reached(source):
    with pytest.raises(PromptError, match=r"the chat template (was stopped|fails|cannot be read|reads another file)"):
        rendered(source, [{"role": "user", "content": "x"}])


ENDLESS = [
    "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for a in r %}{% for b in r if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | map('abs') | list | length }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | sort | last }}{% endfor %}",
    "{% set ns = namespace(a='a', b='b') %}{% for i in range(19) %}{% set ns.a = ns.a ~ ns.a %}{% set ns.b = ns.b ~ ns.b %}{% endfor %}"
    "{{ ns.a | trim(ns.b ~ 'a') }}",
]
LARGE = [
    "{{ 'a' * 999999999999 }}",
    "{{ [0] * 999999999999 }}",
    "{{ 'ab' | center(999999999) }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x={}) %}{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x == ns.x }}",
    "{% set ns = namespace(x=(1,)) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}more{{ ns.x }}{% endset %}{% endfor %}",
    *(
        "{% set b = '" + "a" * 20000 + "' %}{% set all = range(5000) | map('replace', '1', b) %}" + rest
        for rest in (
            "{{ all | list | length }}",
            "{{ all | sort | length }}",
            "{{ all | unique | list | length }}",
            "{{ all | reverse | first }}",
            "{{ all | select('ne', '') | list }}",
            "{% for x in all %}{{ loop.length }}{% endfor %}",
        )
    ),
    "{{ [1] | tojson(indent=999999999) }}",
    "{% set s = '" + "a" * 1000 + "' %}{{ range(50000) | list | tojson(separators=(s, ':')) | length }}",
    "{% set ns = namespace(x=range(20000) | list) %}{% for i in range(60) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x | tojson(indent=16) | length }}",
    "{{ 'a\\nb' | indent(999999999) }}",
    "{{ range(99999999999) | list }}",
    "{% for i in range(99999) %}{% for j in range(99) %}aaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "{% macro m() %}{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endmacro %}{% set x = m() %}",
    "{% set ns = namespace() %}{% set ns.me = ns %}{{ [ns] }}",
]


@pytest.mark.slow
@pytest.mark.parametrize("source", ENDLESS)
def test_what_does_not_end_is_stopped(source):
    started = time.thread_time()  # of the processor: a busy machine is not the template's fault
    with pytest.raises(PromptError, match="the chat template was stopped"):
        rendered(source, seconds=0.3)
    assert time.thread_time() - started < 5


@pytest.mark.slow
@pytest.mark.parametrize("source", LARGE)
def test_what_grows_is_stopped(source, monkeypatch):
    """Before memory is taken: a few texts of the largest size fit. (Of a tenth of it here: tracing memory is slow.)"""
    import tracemalloc

    for module in (chat_template, template_filters):
        monkeypatch.setattr(module, "MAX_SIZE", 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(PromptError, match=r"the chat template (was stopped|fails|cannot be read): (?!it does not end)"):
            rendered(source, seconds=120, characters=100_000)  # time is not what stops it
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_faults_of_a_template_name_it():
    for source in ("{% if %}", "{% for %}", "{{ 1 | nofilter }}", "{{ 1 is notest }}", "{{ " + "(" * 5000 + ")" * 5000 + "}}"):
        with pytest.raises(PromptError, match="the chat template cannot be read"):
            ChatTemplate(source)
    nested = "{% for x in [1] %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(PromptError, match="the chat template"):
        rendered(nested)
    with pytest.raises(PromptError, match="at most"):
        ChatTemplate("a" * (MAX_SOURCE + 1))


def test_a_template_that_wants_tools_says_so():
    with pytest.raises(PromptError, match="It reads tools, which are not offered here"):
        rendered("{% for tool in tools %}{{ tool }}{% endfor %}")


def test_threads_have_budgets_of_their_own():
    template, found = ChatTemplate(TEMPLATE), []

    def render() -> None:
        found.append(template.render(CONVERSATIONS["turns"], special=SPECIAL))

    threads = [threading.Thread(target=render) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
