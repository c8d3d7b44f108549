"""The run's chat template as one Jinja text that other engines render alike."""

from __future__ import annotations

import json

from qaroma.data.templates import Template


def complete_jinja(template: Template) -> str:
    """The template's text, ending prompts as training did.

    Some templates leave the assistant's header out of their generation prompt, and those of reasoning
    models are trained with an empty thought: qaroma adds that to every prompt, so the exported text must.

    Args:
        template: of the run.
    """
    if not template.prompt_suffix:
        return template.text
    suffix = json.dumps(template.prompt_suffix, ensure_ascii=False)
    return f"{template.text}{{% if add_generation_prompt %}}{{{{ {suffix} }}}}{{% endif %}}"
