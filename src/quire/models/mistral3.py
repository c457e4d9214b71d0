"""Mistral Small 3 and Ministral 3 as they are published with a vision tower: their text model."""

from quire.models.llama import DecoderNames, Llama


class Mistral3Text(Llama):
    """The tensors below `language_model`; those of the vision tower are not read."""

    names = DecoderNames("language_model.model", heads=("language_model.lm_head",))
    ignored_tensors = (
        r"^language_model\.lm_head\.weight$",
        r"^vision_tower\.",
        r"^multi_modal_projector\.",
    )
