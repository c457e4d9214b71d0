"""TextPrompts: what sentence-transformers puts before a text, by the name of a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quire.errors import CheckpointError, RequestError
from quire.model_config import read_json


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """The prompts of a model's folder; `default` is used where none is named."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    lowers: bool = False
    """Texts are in lower case before they become tokens."""

    def apply(self, texts: Sequence[str], name: str | None = None) -> list[str]:
        """The texts with the prompt of this name. Raises `RequestError` for a name that the model does not have."""
        name = self.default if name is None else name
        if name is None:
            prompt = ""
        elif name in self.prompts:
            prompt = self.prompts[name]
        else:
            known = f"there is {', '.join(self.prompts)}" if self.prompts else "this model has none: leave it out"
            raise RequestError(f"prompt_name is {name[:200]!r}; {known}", param="prompt_name")
        return [prompt + (text.lower() if self.lowers else text) for text in texts]


def read_text_prompts(folder: Path) -> TextPrompts:
    """Read config_sentence_transformers.json and sentence_bert_config.json. Raises `CheckpointError` if they hold no
    prompts as texts by name."""
    path, settings = folder / "config_sentence_transformers.json", folder / "sentence_bert_config.json"
    lowers = settings.is_file() and bool(read_json(settings).get("do_lower_case"))
    if not path.is_file():
        return TextPrompts(lowers=lowers)
    values = read_json(path)
    prompts, default = values.get("prompts") or {}, values.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{path}: prompts is {str(prompts)[:200]}; supported: an object of texts")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{path}: default_prompt_name is {default!r}, which is none of {', '.join(prompts)}")
    return TextPrompts(prompts, default, lowers)
