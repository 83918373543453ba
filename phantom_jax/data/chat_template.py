"""A conversation template in Jinja, which `transformers` renders from a published folder's `chat_template.jinja`."""

import json

import tokenizers

from phantom_jax.data.conversation import IMAGE_MARK, Template

FILE = "chat_template.jinja"

_CHECK = (
    "{{ raise_exception('roles must be user, assistant, user, assistant, and so on, and there is no system role: "
    "the system text belongs to the template') }}"
)


def to_jinja(template: Template, tokenizer: tokenizers.Tokenizer, *, image: str) -> str:
    """The template for `apply_chat_template`, whose tokens are those of our own rendering.

    A content is a text, in which `<image>` says where an image stands, or a list of parts of the types text and image,
    which stand in their order. Images that open the first question are followed by what the template puts after them.

    Args:
      template: what to render.
      tokenizer: which will encode it.
      image: what stands for an image.
    """
    mark, shown = _literal(IMAGE_MARK), _literal(image)
    text = f".replace({mark}, {shown})" if image != IMAGE_MARK else ""
    if template.keep_question:
        question = f"{{{{- message['content']{text} -}}}}"
        part = f"{{{{- part['text']{text} -}}}}"
    else:
        question = f"{{{{- {shown} * message['content'].count({mark}) -}}}}"
        part = ""
    after = "{%- if seen.image and seen.first -%}" + _print(template.after_image) + "{%- endif -%}"
    after = after if template.after_image else ""
    lines = [
        _print(template.begin + _opening_space(template, tokenizer) + template.system),
        "{%- set seen = namespace(image=false, first=true) -%}",
        "{%- for message in messages -%}",
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}" + _CHECK + "{%- endif -%}",
        "{%- if message['role'] == 'user' -%}",
        _print(template.user),
        "{%- if message['content'] is string -%}",
        question,
        "{%- else -%}",
        "{%- for part in message['content'] -%}",
        "{%- if part['type'] == 'image' -%}",
        _print(image),
        "{%- set seen.image = true -%}",
        "{%- else -%}",
        after,
        "{%- set seen.first = false -%}",
        part,
        "{%- endif -%}",
        "{%- endfor -%}",
        after,
        "{%- endif -%}",
        "{%- set seen.first = false -%}",
        "{%- if not loop.last or add_generation_prompt -%}" + _print(template.assistant) + "{%- endif -%}",
        "{%- else -%}",
        _print(template.answer_begin),
        "{%- if message['content'] is string -%}",
        "{{- message['content'] -}}",
        "{%- else -%}",
        "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}",
        "{%- endif -%}",
        _print(template.answer_end),
        "{%- if not loop.last -%}" + _print(template.turn_end) + "{%- endif -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(filter(None, lines)) + "\n"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _print(text: str) -> str:
    return f"{{{{- {_literal(text)} -}}}}" if text else ""


def _opening_space(template: Template, tokenizer: tokenizers.Tokenizer) -> str:
    """A space after a written `begin` that makes the opening text's tokens those it has where `begin` is not written.

    Some tokenizers put a space before the first text only, and with `begin` written it is not the first any more.
    """
    opening = template.system or template.user
    pre_tokenizer = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    first = pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first"
    return " " if template.begin and first and opening and not opening.startswith(" ") else ""
