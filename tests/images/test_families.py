"""Pixels, layouts and features of images equal transformers'."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quire.engine.image_process import read_picture
from quire.errors import CheckpointError
from quire.images.families import family_of
from quire.model_config import ModelConfig
from quire.models.vision.encoder import Encoding
from tests.paged_model import PagedModel
from tests.vision_checkpoints import edit_json, make_vision_checkpoint, random_image
from tests.vision_reference import pixel_values, reference

SIZES = [(40, 40), (100, 31), (31, 100), (33, 32), (150, 200), (64, 64), (7, 9), (90, 20)]
FAMILIES = ["llava", "llava_next", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "gemma3"]


def padded_llava(folder: Path) -> Path:
    """LLaVA 1.5 with the processor that it was trained with."""
    make_vision_checkpoint(folder, "llava")
    edit_json(folder / "preprocessor_config.json", image_processor_type="LlavaImageProcessor", do_pad=True)
    return folder


def whole_idefics3(folder: Path) -> Path:
    make_vision_checkpoint(folder, "idefics3")
    edit_json(folder / "preprocessor_config.json", do_image_splitting=False)
    return folder


@pytest.fixture(scope="module", params=[*FAMILIES, "padded llava", "whole idefics3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if request.param == "padded llava":
        return padded_llava(folder)
    if request.param == "whole idefics3":
        return whole_idefics3(folder)
    return make_vision_checkpoint(folder, request.param)


def test_images_of_many_shapes(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    assert config.vision is not None
    family, model = family_of(config.vision), reference(folder)
    encoder = PagedModel(folder).model.image_encoder
    assert encoder is not None
    largest = family.layout(family.largest).num_tokens
    for width, height in SIZES:
        image = random_image(width, height, seed=width)
        inputs = pixel_values(folder, [image])
        read = read_picture(family, np.asarray(image))
        tiles = [
            torch.frombuffer(bytearray(part.pixels.data), dtype=torch.uint8).view(
                part.pixels.num_tiles, part.pixels.height, part.pixels.width, 3
            )
            for part in read.parts
        ]
        if "image_grid_thw" not in inputs:  # there pixels are in another order
            normal = torch.cat([encoder.normalise(part) for part in tiles])  # type: ignore[attr-defined]
            expected = inputs["pixel_values"]
            assert torch.allclose(normal, expected.reshape(-1, *expected.shape[-3:]), atol=1e-6)
        with torch.inference_mode():
            found = [Encoding(encoder, part, (height, width)).advance(1, 1) for part in tiles]
            features = model.model.get_image_features(**inputs).pooler_output
        features = torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in features])
        rows = [part for part in found if part is not None]
        assert (torch.cat(rows) - features).abs().max() < 1e-4
        assert [len(part) for part in rows] == [part.num_tokens for part in read.parts]
        assert sum(map(len, rows)) <= largest or folder.name.startswith("smolvlm")


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(family: str, tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path, family)
    stored = sum(parameter.numel() for parameter in reference(folder).parameters())
    planned = ModelConfig.from_folder(folder).spec.num_parameters
    assert abs(planned - stored) < 0.25 * stored  # layers after the last feature are not loaded


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", {"image_token_index": -1}, "image_token_index is -1"),
        ("config.json", {"vision_feature_layer": 9}, "vision_feature_layer is 9"),
        ("config.json", {"vision_feature_select_strategy": "x"}, "vision_feature_select_strategy"),
        ("config.json", {"projector_hidden_act": "x"}, "projector_hidden_act"),
        ("config.json", {"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type"),
        ("config.json", {"vision_config": {"image_size": 30, "patch_size": 8}}, "image_size"),
        ("config.json", {"text_config": {"model_type": "bert"}}, "text_config.model_type"),
        ("preprocessor_config.json", {"size": "large"}, "size is"),
        ("preprocessor_config.json", {"crop_size": {"height": 64, "width": 64}}, "image_size is 32"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5]}, "image_std"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std"),
        ("preprocessor_config.json", {"resample": 17}, "resample is 17"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
    ],
)
def test_files_that_are_not_supported(file: str, change: dict[str, object], reason: str, tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path, "llava")
    edit_json(folder / file, **change)
    with pytest.raises(CheckpointError, match=reason):
        ModelConfig.from_folder(folder)


def test_an_image_encoded_in_parts_has_the_same_embeddings(tmp_path: Path) -> None:
    for family in FAMILIES:
        folder = make_vision_checkpoint(tmp_path / family, family)
        encoder = PagedModel(folder).model.image_encoder
        assert encoder is not None
        side = 64 if family == "gemma3" else 32
        tiles = torch.from_numpy(np.array(random_image(side, side)))[None]
        if family == "llava_next":
            tiles = tiles.repeat(3, 1, 1, 1)
        with torch.inference_mode():
            whole = Encoding(encoder, tiles, (64, 32)).advance(1, 1)
            parts = Encoding(encoder, tiles, (64, 32))
            assert [parts.advance(end, 7) for end in (1, 3, 6)] == [None] * 3
            last = parts.advance(7, 7)
        assert whole is not None
        assert last is not None
        assert torch.equal(last, whole)
