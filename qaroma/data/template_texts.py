"""The texts of qaroma's own templates, and what is changed in a tokenizer's: its date."""

from __future__ import annotations

import datetime
import json
import re

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
NONE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

# Templates write today's date into the system turn. A run must render the same tomorrow, when it is
# resumed, so the date is fixed: the one that Llama 3's template falls back to by itself.
FIXED_DATE = datetime.date(2024, 7, 26)

_STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def with_fixed_date(text: str) -> str:
    """The template with every ``strftime_now("...")`` replaced by the text of the fixed date."""
    return _STRFTIME.sub(lambda call: json.dumps(FIXED_DATE.strftime(call.group(2))), text)
