"""A chat template and a tokenizer with the features of those that Llama 3.2 Vision is published with, written for these tests."""

from __future__ import annotations

import json
from pathlib import Path

BOS, EOT, END, IMAGE, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|image|>", "<|finetune_right_pad_id|>"
START_HEADER, END_HEADER, EOM, TOOL = "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"

TEMPLATE = """\
{{- bos_token }}
{%- if date is not defined %}
    {%- if strftime_now is defined %}
        {%- set date = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date = "1 Jan 2000" %}
    {%- endif %}
{%- endif %}
{%- set seen = namespace(images=0, turn=0) %}
{%- if messages[0].role == "system" %}
    {%- set rules = messages[0]["content"] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set rules = "" %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if turn["content"] is not string %}
        {%- for part in turn["content"] if part["type"] == "image" %}
            {%- set seen.images = seen.images + 1 %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if refuses_system and seen.images and rules != "" %}
    {{- raise_exception("No system message may stand before images.") }}
{%- endif %}
{%- if not seen.images or rules %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
    {{- "Today Date: " + date + "\\n\\n" + rules }}
    {{- "<|eot_id|>" }}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role not in ("user", "assistant") %}
        {{- raise_exception("Only user and assistant talk here, not " ~ turn.role ~ ".") }}
    {%- endif %}
    {%- if (turn.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Users and assistants take turns.") }}
    {%- endif %}
    {{- "<|start_header_id|>" ~ turn["role"] ~ "<|end_header_id|>\\n\\n" }}
    {%- if turn["content"] is string %}
        {{- turn["content"] | trim }}
    {%- else %}
        {%- for part in turn["content"] %}
            {%- if part["type"] == "image" %}
                {{- "<|image|>" }}
            {%- elif part["type"] == "text" %}
                {{- part["text"] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
REFUSING_TEMPLATE = "{%- set refuses_system = true %}\n" + TEMPLATE
"""As the first published templates were: no system message beside images."""


def special_tokens(head_rows: int) -> dict[str, int]:
    """Ids of the special tokens of a small vocabulary: the last ones of the output's rows, and the image token behind them."""
    names = (BOS, END, "<|reserved_special_token_0|>", PAD, START_HEADER, END_HEADER, EOM, EOT, TOOL)
    return {name: head_rows - len(names) + index for index, name in enumerate(names)} | {IMAGE: head_rows}


def write_tokenizer(
    folder: Path, head_rows: int, *, template: str | None = TEMPLATE, template_file: str = "chat_template.jinja"
) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level tokenizer with Llama's special tokens, and the template beside it.

    head_rows: rows of the output; the image token's id is the next.
    template_file: chat_template.jinja, chat_template.json or tokenizer_config.json, as the three have been published.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = special_tokens(head_rows)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = min(special.values())
    if plain < len(letters):
        raise ValueError(f"{head_rows} rows have no room for {len(letters)} bytes and {len(special)} special tokens")
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {f"<unused_{index}>": index for index in range(len(letters), plain)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    if {name: tokenizer.token_to_id(name) for name in special} != special:
        raise AssertionError("special tokens have other ids")
    # Llama's own puts the first token before every text that is encoded with special tokens.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, special[BOS])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    if template is not None and template_file == "chat_template.jinja":
        (folder / template_file).write_text(template, encoding="utf-8")
    elif template is not None and template_file == "chat_template.json":
        (folder / template_file).write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    elif template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
