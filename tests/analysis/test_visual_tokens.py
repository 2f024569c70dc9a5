"""Which place of an image a visual token shows, found out from the models themselves."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import DynamicCache

import models
from mmshiftkv import ShiftKVCache, visual_token_map
from tiny_llava import IMAGE_SIZE, PATCH_SIZE, document_image

GRID = IMAGE_SIZE // PATCH_SIZE
# Wide, tall, small, in need of padding on either axis, by a pixel, and one that loses a row of patches to unpadding.
LLAVA_SIZES = [(300, 100), (100, 300), (112, 112), (57, 113), (113, 57), (200, 190), (90, 250), (31, 300)]
NO_KEPT = torch.zeros(1, 2, 1, dtype=torch.long)


def embeddings(case, inputs):
    """What the text decoder is given, (B, T, d)."""
    seen = []
    handle = case.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        case.model(**inputs)
    handle.remove()
    return seen[0]


@contextmanager
def changed_outputs(modules, change):
    """As long as the context lasts, the modules give change(output)."""
    handles = [module.register_forward_hook(lambda module, args, output: change(output)) for module in modules]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("size", [(224, 168), (140, 280)])
def test_the_qwen_token_that_a_change_of_the_picture_moves_is_the_one_in_its_place(vision_case, size):
    """Without attention among patches, each visual token depends on its own part of the picture alone."""
    case = vision_case("qwen2_5_vl")
    picture = document_image(*size)
    inputs = case.inputs(("What is the Total?", picture))
    (grid,) = visual_token_map(case.model, inputs, NO_KEPT).grids
    assert (grid.name, grid.extent) == ("image", (0, 0, 1, 1))
    rows, cols = size[1] // 28, size[0] // 28
    assert grid.counts.shape == (rows, cols)
    with changed_outputs((block.attn for block in case.model.model.visual.blocks), torch.zeros_like):
        before = embeddings(case, inputs)[0]
        for row, col in [(0, 0), (rows - 1, 0), (0, cols - 1), (rows // 2, cols // 2), (rows - 1, cols - 1)]:
            changed = picture.copy()
            ImageDraw.Draw(changed).rectangle((28 * col, 28 * row, 28 * col + 27, 28 * row + 27), fill="black")
            after = embeddings(case, case.inputs(("What is the Total?", changed)))[0]
            assert (after != before).any(dim=-1).nonzero()[:, 0].tolist() == [int(grid.columns[row, col])]


@pytest.mark.parametrize("family", ["vicuna", "mistral"])
@pytest.mark.parametrize("size", LLAVA_SIZES)
def test_each_llava_token_lies_where_its_patch_does(vision_case, family, size):
    """Each patch's features are made its number, which then shows in the text decoder's input."""
    case = vision_case(family)
    inputs = case.inputs(("What is the Total?", document_image(*size)))
    base, crops = visual_token_map(case.model, inputs, NO_KEPT).grids
    assert (base.name, crops.name) == ("base image", "crops")

    def number_patches(features):
        return torch.arange(features[..., 0].numel()).view(*features.shape[:-1], 1).expand_as(features).float()

    with changed_outputs([case.model.model.multi_modal_projector], number_patches):
        found = embeddings(case, inputs)[0]
    column_of = {
        int(found[column, 0]): column for column in torch.cat([crops.columns.flatten(), base.columns.flatten()])
    }
    assert column_of.keys() >= set(range(GRID * GRID))
    assert [column_of[number] for number in range(GRID * GRID)] == base.columns.flatten().tolist()
    newline = case.model.model.image_newline
    assert all(found[column].equal(newline) for column in crops.newline_columns)

    # Rows and columns of the canvas whose patches are in the prompt, from left to right and top to bottom.
    tiles = inputs["pixel_values"].shape[1] - 1
    across = 2 if tiles == 4 else tiles if size[0] > size[1] else 1
    canvas = np.arange(tiles * GRID * GRID).reshape(tiles // across, across, GRID, GRID).transpose(0, 2, 1, 3)
    canvas = canvas.reshape(tiles // across * GRID, across * GRID) + GRID * GRID
    there = np.isin(canvas, list(column_of))
    left = canvas[np.ix_(there.any(axis=1), there.any(axis=0))]
    assert [[column_of[int(number)] for number in row] for row in left] == crops.columns.tolist()


@pytest.mark.parametrize("size", LLAVA_SIZES)
def test_a_spot_of_the_picture_is_in_the_cell_of_the_crops_that_covers_it(vision_case, size):
    case = vision_case("vicuna")
    blank = case.inputs(("What?", Image.new("RGB", size, "white")))
    crops = visual_token_map(case.model, blank, NO_KEPT).grids[1]
    before = embeddings(case, blank)[0]
    left, top, right, bottom = crops.extent
    rows, cols = crops.counts.shape
    height, width = (bottom - top) / rows, (right - left) / cols
    for row, col in {(0, 0), (0, cols - 1), (rows - 1, 0), (rows // 2, cols // 2), (rows - 1, cols - 1), (1, 1)}:
        x, y = left + (col + 0.5) * width, top + (row + 0.5) * height
        picture = Image.new("RGB", size, "white")
        corners = (x - width / 4, y - height / 4, x + width / 4, y + height / 4)
        box = [round(corner * side) for corner, side in zip(corners, size * 2, strict=True)]
        ImageDraw.Draw(picture).rectangle(box, fill="black")
        change = (case.inputs(("What?", picture))["pixel_values"] - blank["pixel_values"])[0, 1:].abs().sum(dim=1)
        by_patch = change.view(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE).sum(dim=(2, 4))
        number = GRID * GRID + int(by_patch.argmax())

        def mark(features, number=number):
            marked = features.clone()
            marked.view(-1, features.shape[-1])[number] += 1
            return marked

        with changed_outputs([case.model.model.multi_modal_projector], mark):
            moved = (embeddings(case, blank)[0] != before).any(dim=-1)
        assert moved.nonzero()[:, 0].tolist() == [int(crops.columns[row, col])]


def test_counts_are_of_all_layers_or_one_and_text_has_its_own(vision_case):
    case = vision_case("qwen2_5_vl")
    inputs = case.inputs(("Read line 1.", document_image(112, 112)))
    tokens = inputs["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(1, heads, tokens, generator=generator).topk(9).indices.sort().values for heads in (2, 2, 3)]
    for layer, chosen in ((None, [0, 2]), (2, [2])):
        found = visual_token_map(case.model, inputs, [layers[0], None, layers[2]], layer=layer)
        expected = torch.zeros(tokens, dtype=torch.long)
        for index in chosen:
            for head in layers[index][0]:
                expected[head] += 1
        assert found.layers == tuple(chosen)
        assert found.pairs == sum(layers[index].shape[1] for index in chosen)
        (grid,) = found.grids
        assert found.counts is grid.counts
        assert grid.counts.equal(expected[grid.columns])
        assert found.text_counts.equal(expected[found.text_columns])
        assert found.text_ids.equal(inputs["input_ids"][0, found.text_columns])
        columns = torch.cat([grid.columns.flatten(), found.text_columns]).sort().values
        assert columns.tolist() == list(range(tokens))
        assert found.kept == 9 * found.pairs == int(grid.counts.sum() + found.text_counts.sum())
        assert found.visual_share == int(grid.counts.sum()) / found.kept


@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
def test_a_cache_gives_the_same_as_its_kept_indices(vision_case, family):
    case = vision_case(family)
    inputs = case.prompts(3)
    cache = ShiftKVCache(case.model, budget=20)
    case.model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
    kept = [cache.kept_indices(layer) for layer in range(len(cache.layers))]
    for image in range(3):
        found = visual_token_map(case.model, inputs, cache, image=image)
        same = visual_token_map(case.model, inputs, kept, image=image)
        alone = visual_token_map(case.model, inputs, kept[1], image=image)
        of_layer = visual_token_map(case.model, inputs, cache, image=image, layer=1)
        for mine, theirs in ((found, same), (alone, of_layer)):
            for grid, other in zip(mine.grids, theirs.grids, strict=True):
                assert grid.counts.equal(other.counts)
            assert mine.text_counts.equal(theirs.text_counts)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
def test_a_row_of_a_padded_batch_has_the_map_it_has_alone(vision_case, family):
    case = vision_case(family)
    prompts = [("What is the Total?", document_image(224, 168)), ("Read line 1.", document_image(112, 140))]
    together = case.inputs(*prompts)
    cache = ShiftKVCache(case.model, budget=20)
    case.model.generate(**together, past_key_values=cache, max_new_tokens=2, do_sample=False)
    for image, prompt in enumerate(prompts):
        alone, inputs = ShiftKVCache(case.model, budget=20), case.inputs(prompt)
        case.model.generate(**inputs, past_key_values=alone, max_new_tokens=2, do_sample=False)
        found = visual_token_map(case.model, together, cache, image=image)
        expected = visual_token_map(case.model, inputs, alone)
        padding = together["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        for grid, other in zip(found.grids, expected.grids, strict=True):
            assert grid.counts.equal(other.counts)
            assert grid.columns.equal(other.columns + padding)
        assert found.text_ids.equal(expected.text_ids)
        assert found.text_counts.equal(expected.text_counts)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral"])
def test_one_of_several_images_of_a_prompt(vision_case, family):
    case = vision_case(family)
    sizes = [(112, 112), (168, 112), (112, 224)]
    content = [{"type": "image", "image": document_image(*size)} for size in sizes]
    inputs = case.processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    maps = [visual_token_map(case.model, inputs, NO_KEPT, image=image) for image in range(3)]
    parts = [part for found in maps for grid in found.grids for part in (grid.columns, grid.newline_columns)]
    columns = torch.cat([part.flatten() for part in parts if part is not None])
    is_image = inputs["input_ids"][0] == case.model.config.image_token_id
    assert columns.sort().values.equal(is_image.nonzero()[:, 0])
    if family == "qwen2_5_vl":
        assert [tuple(found.counts.shape) for found in maps] == [(h // 28, w // 28) for w, h in sizes]
    assert all(found.text_columns.equal(maps[0].text_columns) for found in maps)


def test_bad_requests_are_told_what_there_is(vision_case):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts(2)
    cache = ShiftKVCache(case.model, budget=8)
    with pytest.raises(ValueError, match="no layer has kept indices; the cache has seen no prompt yet"):
        visual_token_map(case.model, inputs, cache)
    case.model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    for layer in (6, -1, "0", True):
        with pytest.raises(ValueError, match=f"layer={layer!r} must be one of the compressed layers 0, 1, 2, 3, 4, 5"):
            visual_token_map(case.model, inputs, cache, layer=layer)
    for image in (2, -1, 0.0, True):
        with pytest.raises(ValueError, match=f"image={image!r} must be an int from 0 to 1: 2 in the prompt"):
            visual_token_map(case.model, inputs, cache, image=image)
    with pytest.raises(ValueError, match=r"of 2 rows, but input_ids has .* 1 rows: it is not of this prompt"):
        visual_token_map(case.model, case.prompts(1), cache)
    with pytest.raises(TypeError, match=r"kept must be a cache that selects tokens.*not DynamicCache"):
        visual_token_map(case.model, inputs, DynamicCache())


def test_a_prompt_without_visual_tokens_is_refused(vision_case):
    case = vision_case("qwen2_5_vl")
    text = case.processor.tokenizer("Read line 1.", return_tensors="pt")
    with pytest.raises(ValueError, match="no visual tokens, as there is no image_grid_thw; there are input_ids"):
        visual_token_map(case.model, text, NO_KEPT)
    with pytest.raises(ValueError, match="no image_sizes"):
        visual_token_map(vision_case("vicuna").model, text, NO_KEPT)
    inputs = {**case.prompts(1), "input_ids": text["input_ids"]}
    with pytest.raises(ValueError, match=r"input_ids has 0 image tokens, but the 1 image\(s\) of the inputs make 48"):
        visual_token_map(case.model, inputs, NO_KEPT)


def test_a_model_of_another_family_is_refused():
    with pytest.raises(TypeError, match="LlamaForCausalLM is not supported; supported are Qwen-VL models"):
        visual_token_map(models.text_model(), {"input_ids": models.prompt_ids()}, NO_KEPT)
